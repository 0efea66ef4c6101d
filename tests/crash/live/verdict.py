"""Judges one state of a directory: what a restart of the server makes of it, and what QEMU says."""

import hashlib
import json
import subprocess
import traceback
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from nbdq.chain.clusters import ClusterCache
from nbdq.chain.open import open_disk
from nbdq.chain.policy import Policy
from nbdq.errors import ImageError, NbdqError
from nbdq.locks import Locking
from nbdq.qcow2.audit.check import check_image
from nbdq.qcow2.bitmaps.bits import DirtyBits
from nbdq.qcow2.bitmaps.directory import BitmapFlags, read_bitmaps
from nbdq.qcow2.bitmaps.tables import load_bits
from nbdq.qcow2.features import Autoclear, Incompatible
from nbdq.qcow2.fields import MAGIC
from nbdq.qcow2.format import read_header
from nbdq.storage import FileStorage
from tests.crash.live.images import read_by_qemu
from tests.crash.live.scenario import Prepared
from tests.crash.live.server import STATE, Server
from tests.crash.live.tree import Contents
from tests.crash.recorder import SECTOR
from tests.crash.stamps import Values, read_stamps
from tests.crash.verdict import Fault, Finding, fingerprint, metadata_fingerprint
from tests.support.tools import execute

_SOUND = (0, 3)


@dataclass(frozen=True)
class Restarted:
    """What a server finds that is started after the crash."""

    values: dict[str, Values]
    """What the disks hold."""
    tops: dict[str, str]
    formats: dict[str, str]
    """Of the tops."""
    layers: dict[str, int]
    """How many."""


class Bench:
    """The directory in which states become files; where the recording was made, for names in images are absolute."""

    def __init__(self, prepared: Prepared, *, referee: "Referee | None") -> None:
        """Without a ``referee``, QEMU is not asked."""
        self._prepared = prepared
        self._directory = prepared.directory
        self._scenario = prepared.scenario
        self._referee = referee
        self._restarts: dict[bytes, Restarted | Finding] = {}
        self._checked: set[bytes] = set()
        self._headers: set[bytes] = set()

    def put(self, contents: Contents) -> None:
        """Let the directory have these files and no others."""
        for path in self._directory.iterdir():
            if path.name not in contents:
                path.unlink()
        for name, content in contents.items():
            (self._directory / name).write_bytes(content)

    def restart(self, contents: Contents) -> Restarted | Finding:
        """What a restart finds; the files may be changed by it."""
        key = key_of(contents)
        if key not in self._restarts:
            self.put(contents)
            self._restarts[key] = self._look()
        return self._restarts[key]

    def _look(self) -> Restarted | Finding:
        scenario = self._scenario
        try:
            server = Server(self._directory, scenario.disks, state=scenario.state)
            try:
                chains = {name: volume.chain for name, volume in server.volumes.items()}
                values = {name: scenario.padded(read_stamps(server.read(name))) for name in chains}
                tops = {name: Path(chain.path).name for name, chain in chains.items()}
                formats = {name: str(chain.layers[0].format) for name, chain in chains.items()}
                layers = {name: len(chain.layers) for name, chain in chains.items()}
                server.clean_up()
                return self._strays(server) or Restarted(values, tops, formats, layers)
            finally:
                server.kill()
        except (NbdqError, OSError) as error:
            return Finding(Fault.UNREADABLE, str(error))
        except Exception:
            return Finding(Fault.BROKEN, traceback.format_exc())

    def _strays(self, server: Server) -> Finding | None:
        """What was made and is no use, although the server knew of it (C9)."""
        if not self._scenario.state:
            return None  # then nobody knows
        known = {
            *self._prepared.names,
            STATE,
            f"{STATE}.new",
            *(Path(path).name for path in server.used()),
        }
        strays = sorted({path.name for path in self._directory.iterdir()} - known)
        return Finding(Fault.UNTIDY, f"left behind: {', '.join(strays)}") if strays else None

    def check(self, contents: Contents, restarted: Restarted, report: Callable[[Finding], None]) -> Finding | None:
        """Whether all images are sound and refer to each other rightly; ``report`` may hear of more later."""
        for name, content in contents.items():
            if content[: len(MAGIC)] != MAGIC or content[79] & int(Incompatible.DIRTY):
                continue
            key = metadata_fingerprint([content])
            if key in self._checked:
                continue
            self._checked.add(key)
            (self._directory / name).write_bytes(content)
            finding = _own_check(self._directory / name)
            if finding is not None:
                return finding
            if self._referee is not None:
                self._referee.submit(name, bytes(content), report)
        return self._check_names(contents, restarted) if self._referee is not None else None

    def check_bitmaps(self, contents: Contents) -> Finding | None:
        """Whether the bitmaps of an image, if all are believed, miss together a sector that has changed in it (C7)."""
        self.put(contents)
        for name, before in self._prepared.bitmapped.items():
            path = self._directory / name
            clusters = ClusterCache(budget=1 << 20)
            try:
                bits = _believed(path)
                if bits is None:
                    continue
                layers = open_disk(str(path), format="qcow2", policy=Policy(locking=Locking.OFF), clusters=clusters)
                with closing(layers):
                    content = bytearray(layers.size)
                    layers.read_into(0, memoryview(content))
            except (ImageError, OSError) as error:
                return Finding(Fault.CORRUPT, f"bitmaps of {name}: {error}")
            finally:
                clusters.close()
            changed = np.flatnonzero(self._scenario.padded(read_stamps(content)) != before)
            known = np.zeros(len(changed), dtype=np.uint8)
            for each in bits:
                granules = changed * SECTOR >> each.granularity_bits
                known |= each.packed[granules >> 3] >> (granules & 7).astype(np.uint8) & 1
            if not known.all():
                return Finding(Fault.LOST, f"bitmaps of {name} miss sectors {changed[known == 0][:8]}")
        return None

    def _check_names(self, contents: Contents, restarted: Restarted) -> Finding | None:
        """Whether QEMU finds the same chains, and reads the same from them."""
        heads = {name: bytearray(content[:4096]) for name, content in contents.items() if name != STATE}
        key = key_of(heads) + repr(restarted.tops).encode()
        if key in self._headers:
            return None
        self._headers.add(key)
        self.put(contents)
        for disk in self._scenario.disks:
            top = self._directory / restarted.tops[disk.name]
            format = restarted.formats[disk.name]
            done = execute("qemu-img", "info", "-f", format, "--backing-chain", "--output=json", top, cwd=top.parent)
            if done.returncode:
                return Finding(Fault.CORRUPT, f"qemu-img info: {done.stderr}")
            count = len(json.loads(done.stdout))
            if count != restarted.layers[disk.name]:
                return Finding(Fault.CORRUPT, f"qemu-img info: {count} layers, not {restarted.layers[disk.name]}")
            found = self._scenario.padded(read_by_qemu(top, format=format))
            differing = (found != restarted.values[disk.name]).nonzero()[0]
            if len(differing):
                return Finding(Fault.CORRUPT, f"QEMU reads something else in sectors {differing[:8]} of {disk.name}")
        return None


def _believed(path: Path) -> list[DirtyBits] | None:
    """All bitmaps of an image; None if it has none, or some that nobody would believe."""
    with closing(FileStorage.open(str(path))) as storage:
        header = read_header(storage)
        if Autoclear.BITMAPS not in header.autoclear:
            return None
        entries = read_bitmaps(storage, header)
        if any(BitmapFlags.IN_USE in entry.flags for entry in entries):
            return None
        loaded = [load_bits(storage, header, entry.name) for entry in entries]
        return [bits for bits in loaded if bits is not None]


def key_of(contents: Contents) -> bytes:
    """Equal for equal contents under equal names."""
    digest = hashlib.blake2b(repr(sorted(contents)).encode(), digest_size=16)
    digest.update(fingerprint([contents[name] for name in sorted(contents)]))
    return digest.digest()


def _own_check(path: Path) -> Finding | None:
    """What nbdq's check finds besides leaks."""
    with closing(FileStorage.open(str(path))) as storage:
        try:
            result = check_image(storage, read_header(storage))
        except (ImageError, OSError) as error:
            return Finding(Fault.CORRUPT, f"nbdq check: {error}")
    if result.corruptions or result.check_errors:
        return Finding(Fault.CORRUPT, f"nbdq check of {path.name}: {'; '.join(result.findings[:4])}")
    return None


class Referee:
    """Has qemu-img check images while we look at the next ones; each without what is below it."""

    def __init__(self, directory: Path, *, slots: int = 2) -> None:
        """Use the existing, empty ``directory``."""
        self._paths = [directory / f"image{number}" for number in range(slots)]
        self._running: list[tuple[subprocess.Popen[bytes], Callable[[], None]] | None] = [None] * slots
        self._next = 0
        self.count = 0

    def submit(self, name: str, content: bytes, report: Callable[[Finding], None]) -> None:
        """Have an image checked, perhaps after this call; ``report`` is called if more than leaks is found."""
        number, self._next = self._next, (self._next + 1) % len(self._paths)
        self._collect(number)
        path = self._paths[number]
        path.write_bytes(content)
        self.count += 1
        process = subprocess.Popen(
            _check(path), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._running[number] = process, partial(self._tell, name, path, report)

    def _collect(self, number: int) -> None:
        running, self._running[number] = self._running[number], None
        if running is not None and running[0].wait() not in _SOUND:
            running[1]()

    @staticmethod
    def _tell(name: str, path: Path, report: Callable[[Finding], None]) -> None:
        done = execute(*_check(path))
        said = " ".join((done.stdout + done.stderr).split())[:400]
        report(Finding(Fault.CORRUPT, f"qemu-img check of {name}: status {done.returncode}: {said}"))

    def finish(self) -> None:
        """Wait for all that was submitted."""
        for number in range(len(self._paths)):
            self._collect(number)


def _check(path: Path) -> list[str]:
    image = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "backing": None}
    return ["qemu-img", "check", f"json:{json.dumps(image)}"]

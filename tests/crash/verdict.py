"""Judges one state of a disk: does it open, is its metadata sound, and does every sector hold what it may hold?"""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np

from nbdq.chain.clusters import ClusterCache
from nbdq.chain.open import open_disk
from nbdq.chain.policy import Policy
from nbdq.errors import ImageError
from nbdq.locks import Locking
from tests.crash.guest import Allowed
from tests.crash.recorder import SECTOR
from tests.crash.stamps import ELSEWHERE, GARBAGE, Values, as_rows, read_stamps, whole_stamps
from tests.crash.workloads import SNAPSHOT, Prepared
from tests.support.tools import execute

POLICY = Policy(locking=Locking.OFF, allow_data_file=True)
#: Exit codes of qemu-img check: nothing found, and leaks only.
_SOUND = (0, 3)
#: The last byte of the incompatible features; bit 0 is the dirty bit.
_DIRTY_BYTE = 79


class Fault(Enum):
    """What can be wrong with a state."""

    UNREADABLE = "unreadable"
    """It does not open, or a read fails."""
    CORRUPT = "corrupt"
    """``qemu-img check`` or nbdq's own check finds more than leaks."""
    LOST = "lost"
    """A sector holds less than was flushed."""
    FOREIGN = "foreign"
    """A sector holds what was never written to it."""
    BROKEN = "broken"
    """The engine raised what it must not raise."""
    UNREPAIRABLE = "unrepairable"
    """Repair does not help, or changes what the guest reads."""
    UNTIDY = "untidy"
    """Something is left behind that nobody will ever use or remove."""


@dataclass(frozen=True)
class Finding:
    """What is wrong with a state, in words."""

    fault: Fault
    text: str

    def __str__(self) -> str:
        return f"{self.fault.value}: {self.text}"


def fingerprint(contents: Sequence[bytearray]) -> bytes:
    """Equal for equal states."""
    digest = hashlib.blake2b(digest_size=16)
    for content in contents:
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.digest()


def metadata_fingerprint(contents: Sequence[bytearray]) -> bytes:
    """Equal for states that differ in nothing but which stamps lie in the sectors that bear any."""
    digest = hashlib.blake2b(digest_size=16)
    for content in contents:
        rows = as_rows(bytes(content) + bytes(-len(content) % SECTOR))
        others = np.flatnonzero(~whole_stamps(rows) & rows.any(axis=1))
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(others.tobytes())
        digest.update(rows[others].tobytes())
    return digest.digest()


class Bench:
    """A directory in which states of one disk become files."""

    def __init__(self, prepared: Prepared, directory: Path) -> None:
        """Put the unchanging layers into the new ``directory``."""
        self.prepared = prepared.copy_to(directory)
        self.top = self.prepared.top

    def put(self, contents: Sequence[bytes | bytearray]) -> None:
        """Make the files that change have ``contents``."""
        for name, content in zip(self.prepared.written, contents, strict=True):
            descriptor = os.open(self.prepared.directory / name, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                os.pwrite(descriptor, content, 0)
                os.ftruncate(descriptor, len(content))
            finally:
                os.close(descriptor)

    def read(self, snapshot: str | None = None) -> Values:
        """What the guest finds, through nbdq's reader, or what it would find in an internal snapshot.

        Raises:
            ImageError, OSError: it does not open, or cannot be read.
        """
        clusters = ClusterCache(budget=1 << 20)
        disk = open_disk(str(self.top), format="qcow2", policy=POLICY, clusters=clusters, snapshot=snapshot)
        try:
            content = bytearray(disk.size)
            disk.read_into(0, memoryview(content))
        finally:
            disk.close()
            clusters.close()
        return read_stamps(content)

    def look(self) -> Values | Finding:
        """As :meth:`read`, a failure being a finding (C1, C3)."""
        try:
            return self.read()
        except (ImageError, OSError) as error:
            return Finding(Fault.UNREADABLE, str(error))

    def look_at_snapshot(self) -> Finding | None:
        """Whether an internal snapshot still holds what it always held."""
        if self.prepared.snapshot is None:
            return None
        try:
            differing = np.flatnonzero(self.read(SNAPSHOT) != self.prepared.snapshot)
        except (ImageError, OSError) as error:
            return Finding(Fault.UNREADABLE, f"the snapshot: {error}")
        return Finding(Fault.LOST, f"sectors of the snapshot: {differing[:8]}") if len(differing) else None

    def qemu_check(self) -> Finding | None:
        """What ``qemu-img check`` says (C2)."""
        done = execute("qemu-img", "check", "-f", "qcow2", self.top, cwd=self.top.parent)
        if done.returncode in _SOUND:
            return None
        return Finding(Fault.CORRUPT, f"qemu-img check: {' '.join((done.stdout + done.stderr).split())[:400]}")

    def is_dirty(self, contents: Sequence[bytes | bytearray]) -> bool:
        """Whether the image says that its refcounts are not to be believed."""
        return bool(contents[0][_DIRTY_BYTE] & 1)

    def repaired(self, values: Values, *, what: str = "leaks") -> Finding | None:
        """What goes wrong if QEMU repairs ``what``, after which it must read the same ``values`` (C8)."""
        done = execute("qemu-img", "check", "-r", what, "-f", "qcow2", self.top, cwd=self.top.parent)
        if done.returncode != 0:
            return Finding(Fault.UNREPAIRABLE, f"qemu-img check -r {what}: status {done.returncode}: {done.stdout}")
        flat = self.top.parent / "flat"
        done = execute("qemu-img", "convert", "-O", "raw", "-f", "qcow2", self.top, flat, cwd=self.top.parent)
        if done.returncode != 0:
            return Finding(Fault.UNREADABLE, f"qemu-img convert: {done.stderr}")
        differing = np.flatnonzero(read_stamps(flat.read_bytes()) != values)
        flat.unlink()
        if len(differing):
            return Finding(Fault.UNREPAIRABLE, f"after repair QEMU reads something else in sectors {differing[:8]}")
        return None


def compare(values: Values, allowed: Allowed) -> Finding | None:
    """Whether every sector holds what it may hold (C3, C4)."""
    wrong = allowed.wrong(values)
    if not len(wrong):
        return None
    alien = [int(sector) for sector in wrong if values[sector] in (GARBAGE, ELSEWHERE)]
    sector = alien[0] if alien else int(wrong[0])
    fault = Fault.FOREIGN if alien else Fault.LOST
    found = {GARBAGE: "garbage", ELSEWHERE: "the stamp of another sector"}.get(
        int(values[sector]), f"#{values[sector]}"
    )
    return Finding(fault, f"{len(wrong)} sectors, such as {sector}: {found}, allowed {allowed.of(sector)}")


class Referee:
    """Has qemu-img check states while we look at the next ones."""

    def __init__(self, prepared: Prepared, directory: Path, *, slots: int = 2) -> None:
        """Use ``slots`` new directories beneath ``directory``, each for one process at a time."""
        self._benches = [Bench(prepared, directory / f"referee{number}") for number in range(slots)]
        self._running: list[tuple[subprocess.Popen[bytes], Bench, Callable[[Finding], None]] | None] = [None] * slots
        self._next = 0

    def submit(self, contents: Sequence[bytearray], report: Callable[[Finding], None]) -> None:
        """Have a state checked, perhaps after this call; ``report`` is called if more than leaks is found."""
        number, self._next = self._next, (self._next + 1) % len(self._benches)
        self._collect(number)
        bench = self._benches[number]
        bench.put(contents)
        process = subprocess.Popen(
            ["qemu-img", "check", "-q", "-f", "qcow2", str(bench.top)],
            cwd=bench.top.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
        )
        self._running[number] = (process, bench, report)

    def _collect(self, number: int) -> None:
        running, self._running[number] = self._running[number], None
        if running is not None:
            process, bench, report = running
            if process.wait() not in _SOUND:
                finding = bench.qemu_check()
                report(
                    finding or Finding(Fault.CORRUPT, f"qemu-img check ended with {process.returncode}, then did not")
                )

    def finish(self) -> None:
        """Wait for all that was submitted."""
        for number in range(len(self._benches)):
            self._collect(number)

    def close(self) -> None:
        """Wait, and remove the directories."""
        self.finish()
        for bench in self._benches:
            shutil.rmtree(bench.top.parent)

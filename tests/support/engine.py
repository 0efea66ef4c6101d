"""The write engine on a file whose system calls are recorded, can be made to fail, and wait for no disk.

Everything counts as being in the page cache and a sync saves nothing, so that tests are quick and see the same on every
machine; QEMU's tools read the same page cache and can judge the file while it is open.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from nbdq.block import LowerDisk
from nbdq.chain.clusters import ClusterCache
from nbdq.chain.disk import ChainDisk
from nbdq.chain.index import Layer
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.raw import RawImage
from nbdq.qcow2.create import CreateOptions, plan_image, write_header, write_tables
from nbdq.qcow2.entries import COMPRESSED, OFFSET_MASK
from nbdq.qcow2.format import read_header
from nbdq.qcow2.image import Qcow2Image
from nbdq.qcow2.writing.writable import WritableImage
from nbdq.storage import Data, FileStorage
from tests.support.images import content
from tests.support.tools import execute, run

K = 1 << 10
M = 1 << 20
T = 1 << 40


class Call(NamedTuple):
    """A system call that changes a file: ``write``, ``sync``, ``reserve``, ``punch``, ``zero`` or ``truncate``."""

    name: str
    offset: int = 0
    length: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.length


_MODES = {0: "reserve", 3: "punch", 16: "zero"}


class WatchedStorage(FileStorage):
    """Records what is done to the file."""

    def __init__(self, descriptor: int, path: str) -> None:
        super().__init__(descriptor, path)
        self.calls: list[Call] = []
        self.reads: list[tuple[int, int]] = []
        """(offset, length) of reads that may wait."""
        self.before: Callable[[Call], None] = lambda call: None
        """Called before anything is done; what it raises is the failure of the system call."""

    def _do(self, name: str, offset: int = 0, length: int = 0) -> None:
        call = Call(name, offset, length)
        self.before(call)
        self.calls.append(call)

    def _pwritev(self, buffers: Sequence[Data], offset: int) -> int:
        self._do("write", offset, sum(map(len, buffers)))
        return super()._pwritev(buffers, offset)

    def _fdatasync(self) -> None:
        self._do("sync")

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        self._do(_MODES[mode], offset, length)
        super()._fallocate(mode, offset, length)

    def _ftruncate(self, size: int) -> None:
        self._do("truncate", size)
        super()._ftruncate(size)

    def read_cached(self, offset: int, view: memoryview) -> bool:
        return super().read_into(offset, view) == len(view)

    def read_into(self, offset: int, view: memoryview) -> int:
        self.reads.append((offset, len(view)))
        return super().read_into(offset, view)

    def take(self) -> list[Call]:
        """The calls since the last time."""
        calls, self.calls = self.calls, []
        return calls


class CountedDisk(ChainDisk):
    """A lower disk that remembers what was read of its contents."""

    reads: list[tuple[int, int]]

    def __init__(self, layers: Sequence[Layer], *, clusters: ClusterCache) -> None:
        super().__init__(layers, clusters=clusters)
        self.reads = []

    def read_into(self, offset: int, view: memoryview) -> None:
        self.reads.append((offset, len(view)))
        super().read_into(offset, view)

    def read_cached(self, offset: int, view: memoryview) -> bool:
        self.reads.append((offset, len(view)))
        return super().read_cached(offset, view)


def make_image(path: Path, size: int, **options: Any) -> Path:
    """An empty QCOW2 image; ``options`` are those of :class:`CreateOptions`."""
    storage = WatchedStorage.create(str(path))
    layout = plan_image(CreateOptions(size=size, **options))
    write_tables(storage, layout)
    write_header(storage, layout)
    storage.close()
    return path


def make_raw(path: Path, size: int, *ranges: tuple[int, int], seed: int = 77) -> Path:
    """A sparse raw disk with data in these (offset, length) ranges."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in ranges:
            file.seek(offset)
            file.write(content(seed << 20, offset, length))
    return path


class Engine:
    """One writable disk and everything that it consists of."""

    def __init__(self, path: Path, *, below: Path | None = None, data: Path | None = None, punch: bool = True) -> None:
        """Open ``path`` over the raw or QCOW2 file ``below``, with the external data file ``data``."""
        self.path = path
        self.clusters = ClusterCache(budget=8 << 20)
        self.events: list[str] = []
        self.storage = WatchedStorage.open(str(path), writable=True)
        self.data = WatchedStorage.open(str(data), writable=True) if data else self.storage
        self.below = self._open_below(below) if below else None
        lower: LowerDisk | None = self.below
        self.image = WritableImage(
            self.storage,
            read_header(self.storage),
            data=self.data if data else None,
            below=lower,
            punch=punch,
            on_event=self.events.append,
        )
        self.disk = OverlayDisk(self.image, self.below, clusters=self.clusters)
        self.cluster_size = self.image.cluster_size

    def _open_below(self, path: Path) -> CountedDisk:
        storage = WatchedStorage.open(str(path))
        if storage.read(0, 4) == b"QFI\xfb":
            return CountedDisk([Qcow2Image(storage, read_header(storage))], clusters=self.clusters)
        return CountedDisk([RawImage(storage)], clusters=self.clusters)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.closing(self.clusters):
            self.disk.close()

    def write(self, offset: int, length: int, *, seed: int = 1) -> bytes:
        """Write contents of our own; return them."""
        data = content(seed << 20, offset, length)
        self.disk.write(offset, memoryview(data))
        return data

    def write_cached(self, offset: int, length: int, *, seed: int = 1) -> bool:
        """The same without waiting, if that goes."""
        return self.disk.write_cached(offset, memoryview(content(seed << 20, offset, length)))

    def read(self, offset: int, length: int) -> bytes:
        view = memoryview(bytearray(b"\xaa") * length)
        self.disk.read_into(offset, view)
        return bytes(view)

    def contents(self) -> bytes:
        return self.read(0, self.disk.size)

    def settle(self) -> None:
        """Flush until nothing is left to do, and forget what that did."""
        self.disk.flush()
        self.disk.flush()
        self.take()

    def take(self) -> list[Call]:
        """What was done to the image file since the last time."""
        return self.storage.take()

    def entry(self, cluster: int) -> int:
        """The descriptor of a guest cluster, as the tables in memory have it."""
        found = self.entries(cluster, 1)
        return found[0] if found else 0

    def entries(self, cluster: int, count: int) -> list[int]:
        """The words of some entries of one L2 table; none where there is no table."""
        l1_index, index = divmod(cluster, self.image.geometry.l2_count)
        found = self.image.entries(l1_index, index, count)
        return [] if found is None else found.tolist()

    def host(self, cluster: int) -> int:
        """Host offset of a guest cluster that has one."""
        entry = self.entry(cluster)
        assert entry & OFFSET_MASK
        assert not entry & COMPRESSED
        return entry & OFFSET_MASK

    def refcount(self, host: int) -> int:
        """Of the cluster at a host offset, as it is in memory."""
        return self.image.refcounts.get(host // self.cluster_size)

    def role(self, offset: int) -> str:
        """What lies at a host offset."""
        image, size = self.image, self.cluster_size
        l1, table = image.mapping.l1, image.refcounts.table
        if offset < size:
            return "header"
        if table.offset <= offset < table.offset + len(table.words) * 8:
            return "refcount table"
        if offset - offset % size in image.refcounts.block_offsets():
            return "refcounts"
        if l1.offset <= offset < l1.offset + len(l1.words) * 8:
            return "L1"
        tables = {entry & OFFSET_MASK for entry in l1.words.tolist()} | {
            loaded.offset for loaded in image.mapping.tables.values()
        }
        return "L2" if offset - offset % size in tables else "data"

    def story(self) -> list[str]:
        """What was done since the last time: every sync, and between two of them each kind of place that was written.

        Reservations are left out.
        """
        steps: list[str] = []
        since_sync = 0
        for call in self.take():
            if call.name == "sync":
                steps.append("sync")
                since_sync = len(steps)
            elif call.name != "reserve":
                role = self.role(call.offset)
                step = role if call.name == "write" else f"{call.name} {role}"
                if step not in steps[since_sync:]:
                    steps.append(step)
        return steps


def check(path: Path) -> None:
    """QEMU finds neither damage nor leaks, nor a COPIED flag that is not exact."""
    done = execute("qemu-img", "check", "-f", "qcow2", path)
    assert done.returncode == 0, done.stdout + done.stderr


def shown(path: Path, *options: str) -> bytes:
    """What QEMU reads."""
    raw = path.with_suffix(".shown")
    run("qemu-img", "convert", "-U", *options, "-f", "qcow2", "-O", "raw", path, raw)
    return raw.read_bytes()

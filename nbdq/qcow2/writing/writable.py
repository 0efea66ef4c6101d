"""One QCOW2 image, open for writing: what its clusters are, how they change, and when a change is durable.

:meth:`WritableImage.flush` is the crash argument (design section 6), read aloud: write raised refcounts and new tables;
sync; write the entries that name them; sync; only then may freed clusters be used again. In between nothing is written
but guest data, into clusters that the tables in the file either name already or do not name yet.

Guest writes and zeroing are in modules of their own beside this one; both change tables only under
:attr:`WritableImage.lock`, and do guest I/O without it.
"""

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from nbdq.block import LowerDisk
from nbdq.errors import CorruptImage
from nbdq.qcow2.entries import COMPRESSED, COPIED, DESCRIPTOR_MASK, OFFSET_MASK, Geometry
from nbdq.qcow2.format import Header, Incompatible
from nbdq.qcow2.header_area import write_fields
from nbdq.qcow2.image import Qcow2Image
from nbdq.qcow2.writing.allocator import Allocator, TableFull
from nbdq.qcow2.writing.epochs import Epochs
from nbdq.qcow2.writing.mapping import Mapping, l1_problem
from nbdq.qcow2.writing.metadata import find_metadata
from nbdq.qcow2.writing.protection import ProtectedClusters
from nbdq.qcow2.writing.refcounts import BrokenRefcounts, Refcounts
from nbdq.qcow2.writing.tables import Table, Taken, Write
from nbdq.storage import FileStorage

#: Freed clusters, and changed L2 tables, that may wait for a flush before one is forced (R-50).
_FREED_BUDGET = 64 << 20
_DIRTY_BUDGET = 16 << 20
_Result = TypeVar("_Result")


class Bitmaps(Protocol):
    """Who keeps book of what the guest changes."""

    def mark(self, offset: int, length: int) -> None:
        """The guest range is about to change; called before its first byte does."""
        ...

    @property
    def is_empty(self) -> bool:
        """Whether nobody wants to know."""
        ...

    def resize(self, size: int) -> None:
        """The disk is about to have, or has now, ``size`` bytes; no request is under way beyond either size.

        Raises:
            OSError: the book cannot be kept for so many; nothing has changed. Never for a size that it had.
        """
        ...

    def store(self, image: "WritableImage") -> None:
        """Write the book to the image; nothing changes any more."""
        ...


class WritableImage:
    """The active state of an image. Owns its storages until :meth:`close`. Thread-safe.

    No other program may write to the image meanwhile (:data:`nbdq.locks.WRITER`). ``below`` is the disk that shows
    through where nothing is allocated; it does not change, and stays the caller's.
    """

    def __init__(
        self,
        storage: FileStorage,
        header: Header,
        *,
        data: FileStorage | None = None,
        below: LowerDisk | None = None,
        punch: bool = True,
        on_event: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Load what every write needs: L1 table, refcount table, and where metadata is.

        The caller has seen to it that the image may be written: it is neither corrupt nor dirty, and promises nothing
        that we do not keep (:mod:`nbdq.qcow2.writing.prepare`). On failure the storages stay the caller's.

        Args:
            punch: give the space of clusters that became free back to the file system.
            on_event: told in one line of what an operator should know; called with locks held.

        Raises:
            CorruptImage: tables contradict each other so that writing would do damage.
            OSError: they cannot be read.
        """
        self.storage = storage
        self.data = data or storage
        self.header = header
        self.path = storage.path
        self.below = below
        self.bitmaps: Bitmaps | None = None
        self.geometry = Geometry(header.cluster_bits, header.extended_l2, header.version, header.has_data_file)
        self.size = header.guest_size
        self.cluster_size = header.cluster_size
        self.reader = Qcow2Image(storage, header, data=data)
        """For what is read from the file alone: compressed clusters."""
        self.on_event = on_event
        self.punches = punch and not header.has_data_file

        length = header.l1_size * 8
        l1 = Table.parse(header.l1_table_offset, storage.read(header.l1_table_offset, length).ljust(length, b"\0"))
        if problem := l1_problem(l1.values, self.geometry):
            raise CorruptImage(self.path, problem, "repair it with nbdq check -r all")
        self.protected = ProtectedClusters(np.empty(0, dtype=np.uint64))
        self.refcounts = Refcounts(storage, header, self.protected)  # needed to find what it then has to protect
        metadata = find_metadata(storage, header, l1.values, self.refcounts.block_offsets())
        # A table that a snapshot names is copied before it is changed, even if flag and refcount say that it is ours.
        shared = np.isin(
            (l1.values & np.uint64(OFFSET_MASK)) >> np.uint64(header.cluster_bits), metadata.snapshot_tables
        )
        l1.values[shared] &= np.uint64(OFFSET_MASK)
        self.protected.begin_with(metadata.clusters)
        self.allocator = Allocator(storage, self.cluster_size, self.refcounts, self.protected)
        self.mapping = Mapping(storage, self.geometry, self.refcounts, self.allocator, self.protected, l1)

        self.lock = threading.Lock()
        """Tables, refcounts and everything below them; never held while guest data is read or written."""
        self.changed = threading.Condition(self.lock)
        """A guest cluster is no longer in flight."""
        self.in_flight: set[int] = set()
        """Guest clusters that a write is about to give new host clusters; only that write may change their entries."""
        self.published = False
        """A table names clusters whose data no sync has covered yet."""
        self._flush_lock = threading.Lock()  # taken before `lock`
        self.epochs = Epochs()
        """Who may still touch what was freed."""
        self.packing = 0
        """Host offset behind the compressed cluster that was stored last: where the next one may go; 0 for nowhere."""
        self.is_corrupt = False
        """Corruption was found; nothing is written any more."""

    def hold(self) -> AbstractContextManager[None]:
        """While somebody keeps host offsets of this image: nothing that is freed meanwhile is reused or punched (R-50).

        What was freed is free after the first flush that begins after the hold has ended.
        """
        return self.epochs.hold()

    def barrier(self) -> None:
        """Return when every request that had begun before the call is over. Not to be called from within a request."""
        with self.lock:
            before = self.epochs.advance()
        self.epochs.wait_for(before)

    # Changes.

    def check_writable(self) -> None:
        """Refuse a change to an image that was found to be corrupt.

        Raises:
            OSError: EROFS.
        """
        if self.is_corrupt:
            raise OSError(errno.EROFS, "the image is corrupt and was made read-only; repair it", self.path)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the lock to change tables; what shows that the image is corrupt marks it so.

        Raises:
            OSError: EIO if metadata turns out to be corrupt, EROFS if it did before.
            TableFull: see :meth:`grow_refcount_table`.
        """
        with self.lock:
            self.check_writable()
            try:
                yield
            except BrokenRefcounts as error:
                raise self.corruption(str(error)) from error

    def corruption(self, text: str) -> OSError:
        """Mark the image corrupt, at once and durably; nothing else is written to it any more (W6). Under the lock."""
        if not self.is_corrupt:
            self.is_corrupt = True
            self.on_event(f"image is corrupt and read-only from now on: {text}")
            if self.header.version >= 3:
                marked = replace(self.header, incompatible=self.header.incompatible | Incompatible.CORRUPT)
                self.write_header(marked)
        return OSError(errno.EIO, f"the image is corrupt: {text}", self.path)

    def corrupt_entry(self, offset: int) -> OSError:
        """What is said of a guest offset whose entry breaks a rule of the format."""
        return OSError(errno.EIO, f"corrupt table entry for guest offset {offset}", self.path)

    def free_entry(self, entry: int) -> None:
        """An L2 descriptor is gone from the tables in memory; so are its references. Under the lock.

        Nothing is freed that has no flag to say that it is ours, and has no second reference either: then the refcounts
        lie, and a leak is the smaller damage (R-28).
        """
        if self.geometry.has_data_file:
            return
        bits = self.geometry.cluster_bits
        if entry & COMPRESSED:
            offset, length = self.geometry.compressed_range(entry & DESCRIPTOR_MASK)
            first = offset >> bits
            self.allocator.free(first, (offset + length - 1 >> bits) - first + 1)
            return
        first, inside = divmod(entry & OFFSET_MASK, self.cluster_size)
        if first and not inside and (entry & COPIED or self.refcounts.get(first) > 1):
            self.allocator.free(first)

    @property
    def is_pressed(self) -> bool:
        """Whether so much waits for a flush that there has to be one."""
        return self.allocator.freed_bytes > _FREED_BUDGET or self.mapping.dirty_bytes > _DIRTY_BUDGET

    def relieve(self, *, tables_only: bool = False) -> None:
        """Flush if too much waits for it; ``tables_only``: if it is tables, which take memory. Without the lock.

        Raises:
            OSError: as :meth:`flush`.
        """
        if self.mapping.dirty_bytes > _DIRTY_BUDGET or (self.is_pressed and not tables_only):
            self.flush()

    # Durability.

    def flush(self) -> None:
        """Make everything durable that calls which have returned have changed.

        Raises:
            OSError: ENOSPC if it can be tried again; EIO if the image is corrupt, or after a failure that is final.
        """
        with self._flush_lock:
            self._flush(self.lock)

    def _flush(self, lock: AbstractContextManager[object]) -> None:
        """``lock`` is ours, or nothing if the caller holds it."""
        with lock:
            if self.is_corrupt:
                raise OSError(errno.EIO, "the image is corrupt; metadata is not written any more", self.path)
            epoch = self.epochs.advance()
            freed = self.allocator.take_freed()
            try:
                blocks, refcount_table = self.refcounts.take()
                new_tables, changed_tables = self.mapping.take()
            except MemoryError as error:
                raise self.storage.give_up("no memory to copy what has changed") from error
            published, self.published = self.published, False
        try:
            first = _writes([*blocks, *new_tables])
            then = _writes(changed_tables)
            self._write(first)
            if self.data is not self.storage:
                self.data.sync()
            if then and (first or published):
                self.storage.sync()  # refcounts, new tables and data, before anything names them (W1, W3)
            if refcount_table is not None:
                if not then:
                    self.storage.sync()
                self._write(refcount_table.writes)
                if then:
                    self.storage.sync()
            self._write(then)
            self.storage.sync()
        except BaseException:
            with lock:
                self.mapping.put_back([*new_tables, *changed_tables])
                self.refcounts.put_back(blocks, refcount_table)
                self.allocator.put_back(freed)
                self.published |= published
            raise
        with lock:
            self.mapping.settle()
            self.refcounts.settle()
            self.allocator.retire(freed, epoch)
            self._release()

    def _write(self, writes: list[Write]) -> None:
        for offset, data in writes:
            self.storage.write(offset, data)

    def _release(self) -> None:
        """Let go of what no table in the file names any more, and no request can still touch (R-50)."""
        try:
            released = self.allocator.release(self.epochs.oldest_active())
        except BrokenRefcounts as error:
            raise self.corruption(str(error)) from error
        open_cluster = self.packing // self.cluster_size
        if any(first <= open_cluster < first + clusters for first, clusters, _ in released):
            self.packing = 0
        if self.punches:
            for first, clusters, _ in released:
                self.storage.punch(first * self.cluster_size, clusters * self.cluster_size)

    @contextmanager
    def quiescent(self) -> Iterator[None]:
        """Hold the lock while everything in memory is as it is in the file.

        Raises:
            OSError: as :meth:`flush`.
        """
        with self._flush_lock:
            self._flush(self.lock)  # most of it, while others go on
            with self.changing():
                self._flush(nullcontext())
                yield

    def grow_refcount_table(self) -> None:
        """Replace the refcount table by a longer one (A4, R-54). Without the lock, after :class:`TableFull`.

        Raises:
            OSError: EFBIG at the format's limit, ENOSPC, or a failure that is final.
        """
        with self._flush_lock:
            self._flush(self.lock)  # so that no page of the old table is on its way
            with self.changing():
                longer = self.refcounts.longer_table()
                self.allocator.claim(longer.first, longer.clusters)
                start = longer.first * self.cluster_size
                self.storage.reserve(start, longer.clusters * self.cluster_size)
                self._write(longer.writes())
                self.storage.sync()
                table_clusters = len(longer.table.words) * 8 // self.cluster_size
                self.write_header(
                    replace(
                        self.header,
                        refcount_table_offset=longer.table.offset,
                        refcount_table_clusters=table_clusters,
                    )
                )
                self.allocator.free(*self.refcounts.adopt(longer))

    def growing(self, change: Callable[[], _Result]) -> _Result:
        """Run ``change`` under the lock, as often as the refcount table has to grow for it."""
        while True:
            try:
                with self.changing():
                    return change()
            except TableFull:
                self.grow_refcount_table()

    # Metadata that belongs to others: bitmaps, snapshots.

    def allocate_metadata(self, cluster_count: int) -> int:
        """Host offset of neighbouring clusters for metadata; they are counted, and protected from the guest.

        Nothing is durable before the next :meth:`flush`.

        Raises:
            OSError: ENOSPC; EIO or EROFS if the image is corrupt.
        """
        run = self.growing(lambda: self.allocator.allocate_neighbours(cluster_count))
        offset = run.first * self.cluster_size
        try:
            self.storage.reserve(offset, cluster_count * self.cluster_size)
        except OSError:
            with self.lock:
                self.allocator.undo(run)
            raise
        with self.lock:
            self.protected.add(run.first, run.clusters)
        return offset

    def free_metadata(self, offset: int, cluster_count: int) -> None:
        """Give clusters up that nothing durable names any more; they are free after the next :meth:`flush`."""
        with self.lock:
            self.protected.remove(offset // self.cluster_size, cluster_count)
            self.allocator.free(offset // self.cluster_size, cluster_count)

    def update_header(self, header: Header) -> None:
        """Change fixed fields of the header, durably; :attr:`header` is ``header`` from now on.

        One sector is written, so that a crash leaves either header (R-54, R-55). Extensions and backing name stay.

        Raises:
            OSError: a failure that is final.
        """
        with self.lock:
            self.write_header(header)

    def write_header(self, header: Header) -> None:
        """:meth:`update_header` under the lock."""
        self.header = write_fields(self.storage, header)

    def rewrite_header(self, change: Callable[[FileStorage, Header], Header]) -> None:
        """Let ``change`` rewrite the header area of the file, durably; :attr:`header` is what it returns.

        It runs under the lock, so that no other change of the header comes between; guest writes go on in place only.

        Raises:
            OSError: EROFS if the image is corrupt; whatever ``change`` raises, and then the header counts as unchanged.
        """
        with self.changing():
            self.header = change(self.storage, self.header)

    def finish(self) -> None:
        """Store the bitmaps, and flush until nothing is left to be written; the storages stay open.

        No other call may be in progress, and after it none may change the image. A corrupt image is left as it is.

        Raises:
            OSError: as :meth:`flush`, and EIO after a failure that was final: what was written last may be lost.
        """
        if not self.is_corrupt:
            self._store_bitmaps()
            self.flush()
            while self.refcounts.needs_flush:  # what was freed is lowered now
                self.flush()

    def close(self) -> None:
        """:meth:`finish`, and close.

        Raises:
            OSError: as :meth:`finish`. Everything is closed nevertheless.
        """
        try:
            self.finish()
        finally:
            self.reader.close()

    def _store_bitmaps(self) -> None:
        """Losing them is a pity for backups, no reason to lose data: in the file they still are in use (R-57)."""
        try:
            if self.bitmaps is not None:
                self.bitmaps.store(self)
        except OSError as error:
            self.on_event(f"{self.path}: dirty bitmaps are lost, they cannot be stored: {error.strerror}")

    def entries(self, l1_index: int, first: int, count: int) -> NDArray[np.uint64] | None:
        """A copy of entries of one L2 table; None where there is no table. With extended L2 two words each.

        Raises:
            OSError: the table is corrupt, or cannot be read.
        """
        step = 2 if self.geometry.extended_l2 else 1
        with self.lock:
            table = self.mapping.get(l1_index)
            return None if table is None else table.values[first * step : (first + count) * step].copy()


def _writes(changes: list[Taken]) -> list[Write]:
    """All writes, ascending."""
    return sorted(chain.from_iterable(taken.writes for taken in changes))

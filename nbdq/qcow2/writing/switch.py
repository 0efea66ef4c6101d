"""Another state of all metadata, written beside the present one, and made the present one by one sector of the header.

Where L1 table, refcount table and snapshot table begin stands in one sector. So a change of any number of refcounts
and flags is atomic if nothing that the file names is touched: every refcount block that changes, and every L2 table,
gets a new place, is written there and synced, and then the header is written (R-54). After a crash the file says the
old thing or the new one, and both are true to the last flag; what the other one would have used are leaks. To raise
refcounts first, as QEMU does, leaves in between flags that claim one reference where refcounts say two.
"""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from nbdq.qcow2.format import Header
from nbdq.qcow2.writing.allocator import Run, TableFull
from nbdq.qcow2.writing.writable import WritableImage

Counts = NDArray[np.unsignedinteger]
_Result = TypeVar("_Result")


def metadata_of(image: WritableImage) -> NDArray[np.bool_]:
    """Which clusters of the file hold metadata, by number; under the lock."""
    found = np.zeros(-(-image.storage.size() // image.cluster_size), dtype=np.bool_)
    clusters = image.protected.clusters()
    found[clusters[clusters < len(found)].astype(np.intp)] = True
    return found


class Switch:
    """One change, being prepared and then made; under the lock of an image that is as it is in its file."""

    def __init__(self, image: WritableImage) -> None:
        """Load all refcounts.

        Raises:
            BrokenRefcounts, OSError: a block cannot be read.
        """
        self._image = image
        self.path = image.path
        self.cluster_size = image.cluster_size
        self.metadata = metadata_of(image)
        """Which clusters of the file are metadata."""
        self.counts = image.refcounts.counts(len(self.metadata))
        """The refcounts of the same clusters."""
        self._runs: list[Run] = []
        self._abandoned: list[tuple[int, int]] = []

    def clusters(self, count: int) -> NDArray[np.uint64]:
        """Host offsets of new clusters, for metadata.

        Raises:
            TableFull, BrokenRefcounts, OSError: as :meth:`Allocator.allocate`; ENOSPC.
        """
        found = [np.empty(0, dtype=np.uint64)]
        while count:
            run = self._image.allocator.allocate(count)
            found.append(np.arange(run.first, run.first + run.clusters, dtype=np.uint64))
            count -= run.clusters
            self._reserve(run)
        return np.concatenate(found) * np.uint64(self.cluster_size)

    def area(self, length: int) -> int:
        """Host offset of ``length`` > 0 bytes of new clusters side by side, for metadata.

        Raises:
            TableFull, BrokenRefcounts, OSError: as :meth:`clusters`.
        """
        run = self._image.allocator.allocate_neighbours(self._whole(length))
        self._reserve(run)
        return run.first * self.cluster_size

    def _whole(self, length: int) -> int:
        return -(-length // self.cluster_size)

    def _reserve(self, run: Run) -> None:
        self._runs.append(run)
        self._image.storage.reserve(run.first * self.cluster_size, run.clusters * self.cluster_size)

    def write(self, offset: int, data: bytes) -> None:
        """Fill whole new clusters, zeros behind ``data``.

        Raises:
            OSError: as :meth:`FileStorage.write`.
        """
        self._image.storage.write(offset, data.ljust(self._whole(len(data)) * self.cluster_size, b"\0"))

    def abandon(self, offset: int, length: int) -> None:
        """Metadata that the new state does not name: free when the state is the present one, and flushed."""
        if length:
            self._abandoned.append((offset // self.cluster_size, self._whole(length)))

    def undo(self) -> None:
        """Give back all new clusters; nothing has happened."""
        for run in self._runs:
            self._image.allocator.undo(run)

    def make(self, counts: Counts, header: Header) -> None:
        """Let the file say ``counts`` where they differ from :attr:`counts`, and ``header``; durable on return.

        Raises:
            TableFull, BrokenRefcounts, OSError: as :meth:`clusters`; then nothing has changed. Any failure to write is
                final for the image: nobody knows which state the file has.
        """
        image, refcounts = self._image, self._image.refcounts
        table_length = len(refcounts.table.words) * 8
        old_table, new_table = refcounts.table.offset, self.area(table_length)
        changed = refcounts.blocks_that_differ(self.counts, counts)
        places: dict[int, int] = {}
        while missing := sorted((changed | refcounts.changed_in_place()) - places.keys()):
            places.update(zip(missing, self.clusters(len(missing)).tolist(), strict=True))
        try:
            refcounts.assign(changed, self.counts, counts)
            for offset in refcounts.move(places, table_offset=new_table):
                self.abandon(offset, self.cluster_size)
            blocks, table = refcounts.take()
            assert table is not None, "it has a new place"
            for taken in (*blocks, table):
                for offset, data in taken.writes:
                    image.storage.write(offset, data)
            image.storage.sync()
            image.write_header(replace(header, refcount_table_offset=new_table))
        except BaseException:
            image.storage.give_up("nobody knows which state of its metadata the file has")
            raise
        refcounts.settle()
        self.abandon(old_table, table_length)
        for run in self._runs:
            image.protected.add(run.first, run.clusters)
        for first, count in self._abandoned:
            image.protected.remove(first, count)
            image.allocator.free(first, count)


def switching(image: WritableImage, change: Callable[[Switch], _Result], *, drained: bool) -> _Result:
    """Run ``change``, which ends with :meth:`Switch.make`, on an image at rest; again if the refcount table must grow.

    Args:
        drained: no request is under way, and what works on the image besides is waited for.

    Raises:
        OSError: as :meth:`WritableImage.flush`; ENOSPC.
    """
    while True:
        try:
            with image.quiescent():
                if drained and image.in_flight:
                    image.changed.wait()
                    continue
                return _attempt(image, change)
        except TableFull:
            image.grow_refcount_table()


def _attempt(image: WritableImage, change: Callable[[Switch], _Result]) -> _Result:
    with enough_memory(image):
        switch = Switch(image)
        try:
            return change(switch)
        except BaseException:
            if image.storage.failure is None:
                switch.undo()
            raise


@contextmanager
def enough_memory(image: WritableImage) -> Iterator[None]:
    """For what needs memory in proportion to the file, which may claim to be of any size.

    Raises:
        OSError: ENOMEM if there is not enough.
    """
    try:
        yield
    except MemoryError:
        raise OSError(errno.ENOMEM, "there is no memory for the refcounts of so large a file", image.path) from None


def reclaim(image: WritableImage, clusters: NDArray[np.uint64]) -> None:
    """Free ``clusters``, ascending, that were used by a state of the image which nothing names any more, durably.

    Each has one reference that is none. Requests may be in progress: none can know these clusters, because the last
    request that did held a reference until it ended (R-50). After a crash meanwhile, or a failure, which is told as an
    event, what is left leaks.
    """
    try:
        _reclaim(image, clusters)
    except OSError as error:
        image.on_event(f"{image.path}: space that became free is leaked: {error.strerror}")


def _reclaim(image: WritableImage, clusters: NDArray[np.uint64]) -> None:
    if not len(clusters):
        return
    block_clusters, size = image.refcounts.block_clusters, image.cluster_size
    _, starts = np.unique(clusters // np.uint64(block_clusters), return_index=True)
    try:
        for part in np.split(clusters, starts[1:]):
            if image.punches:
                edges = np.flatnonzero(np.diff(part) != 1) + 1
                first = part[np.concatenate(([0], edges))]
                count = np.diff(np.concatenate(([0], edges, [len(part)])))
                for start, length in zip(first.tolist(), count.tolist(), strict=True):
                    image.storage.punch(start * size, length * size)
            with image.changing():
                image.refcounts.clear(part)
                is_crowded = image.refcounts.is_crowded
            if is_crowded:
                image.flush()
    finally:
        with image.lock:
            image.allocator.search_again()

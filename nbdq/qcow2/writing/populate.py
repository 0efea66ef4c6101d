"""Copying what shows through from below into the image itself, beside the guest (4.8): block-stream's copy-on-read.

Nothing that the guest reads changes, so that this may happen at any time and stop at any point. What is below does not
change either; it is read before a cluster is claimed, and what the guest has written in the meantime stays.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from nbdq.block import Kind
from nbdq.qcow2.entries import ALL_SUBCLUSTERS, COMPRESSED, READS_ZERO, SUBCLUSTERS
from nbdq.qcow2.writing.allocator import TableFull
from nbdq.qcow2.writing.guest_reads import GuestReads
from nbdq.qcow2.writing.guest_writes import GuestWrites, NewClusters
from nbdq.qcow2.writing.mapping import L2Table
from nbdq.qcow2.writing.writable import WritableImage

#: Bytes that are read at once, and so can go to the file in one write.
_CHUNK = 4 << 20


class Populate:
    """Copies into one image."""

    def __init__(self, image: WritableImage, reads: GuestReads, writes: GuestWrites) -> None:
        self._image = image
        self._reads = reads
        self._writes = writes
        self._geometry = image.geometry
        self._bits = image.geometry.cluster_bits
        self._granule = image.geometry.granule

    @property
    def _can_hide(self) -> bool:
        """Whether zeros need no data. Version 2 has no entry for them, and a raw data file has to hold them (Q80)."""
        return self._geometry.version >= 3 and not self._image.header.data_file_raw

    def populate(self, offset: int, length: int) -> int:
        """Let the image hold what the range reads as from below; bytes of data that were copied.

        Granules that lie in the range only in part count whole. Those that the image decides itself stay as they are;
        zeros become zero clusters without data, in version 2 data. Afterwards the range reads the same whatever is
        below. Nothing is durable before the next flush.

        Raises:
            OSError: ENOSPC, EROFS or EIO. What was copied until then is right, and can stay.
        """
        image = self._image
        position = offset - offset % self._granule
        end = min(-(-(offset + length) // self._granule) * self._granule, image.size)
        copied = 0
        while position < end:
            coverage = self._geometry.l2_coverage
            stop = min(end, (position // coverage + 1) * coverage)
            with image.epochs.pinned():
                if self._can_hide and self._reads.zero_below(position, stop):
                    self._hide(position, stop)
                else:
                    stop = min(stop, (position // _CHUNK + 1) * _CHUNK)
                    for start, piece_end, kind, _ in list(self._reads.pieces(position, stop - position)):
                        if kind in (Kind.UNALLOCATED, Kind.UNALLOCATED_OFFSET):
                            copied += self._fill(start, piece_end)
            image.relieve()
            position = stop
        return copied

    def _fill(self, start: int, end: int) -> int:
        """Copy a range that nothing in the image decides, as far as that is still true."""
        if self._can_hide and self._reads.zero_below(start, end):
            self._hide(start, end)
            return 0
        data = memoryview(bytearray(-(-(end - start) // self._granule) * self._granule))
        self._reads.read_below(start, data[: end - start])
        copied = 0
        for low, high, is_zero in self._runs(data):
            high = min(high, end - start)
            if is_zero:
                self._hide(start + low, start + high)
            else:
                copied += self._copy(start + low, data[low:high])
        return copied

    def _runs(self, data: memoryview) -> Iterator[tuple[int, int, bool]]:
        """(start, end, is zero) of the granules of ``data`` that are treated alike."""
        if not self._can_hide:
            yield 0, len(data), False
            return
        words = np.frombuffer(data, dtype=np.uint64).reshape(-1, self._granule // 8)
        is_data: NDArray[np.bool_] = np.any(words != 0, axis=1)
        edges = [0, *(np.flatnonzero(is_data[1:] != is_data[:-1]) + 1).tolist(), len(is_data)]
        for first, last in pairwise(edges):
            yield first * self._granule, last * self._granule, not is_data[first]

    # Data.

    def _copy(self, offset: int, view: memoryview) -> int:
        copied = 0
        while view:
            try:
                with self._image.changing():
                    count, part = self._claim(offset, len(view))
            except TableFull:
                self._image.grow_refcount_table()
                continue
            if part is not None:
                self._writes.write_new(part, offset, view[:count])
                copied += count
            offset += count
            view = view[count:]
        return copied

    def _claim(self, offset: int, length: int) -> tuple[int, NewClusters | None]:
        """The beginning of the range, and where it goes; None if the guest was faster. Under the lock."""
        image = self._image
        cluster = offset >> self._bits
        while cluster in image.in_flight:
            image.changed.wait()
            image.check_writable()
        l1_index = cluster // self._geometry.l2_count
        table = image.mapping.own(l1_index)
        length = min(length, (l1_index + 1) * self._geometry.l2_coverage - offset)
        is_open = self._is_open(table, offset)
        count = self._granule
        while count < length and self._is_open(table, offset + count) == is_open:
            count += self._granule
        count = min(count, length)
        if not is_open:
            return count, None
        part = self._writes.prepare(offset, count)
        assert isinstance(part, NewClusters), "nothing is there that could be overwritten"
        return min(count, (part.first + part.clusters << self._bits) - offset), part

    def _is_open(self, table: L2Table, offset: int) -> bool:
        """Whether the granule shows what is below."""
        number = (offset & self._image.cluster_size - 1) // self._granule
        index = offset >> self._bits & self._geometry.l2_count - 1
        return self._image.mapping.shows_below(table, index, subclusters=1 << number)

    # Zeros.

    def _hide(self, start: int, end: int) -> None:
        """Make zeros of what is open in a range of one table; granules of which the guest has nothing."""
        image = self._image
        clusters = range(start >> self._bits, (end - 1 >> self._bits) + 1)
        l1_index, first = divmod(clusters.start, self._geometry.l2_count)
        while True:
            try:
                with image.changing():
                    while any(cluster in clusters for cluster in image.in_flight):
                        image.changed.wait()
                        image.check_writable()
                    table = image.mapping.own(l1_index)
                    image.mapping.changed(l1_index, first, len(clusters))
                    if self._geometry.extended_l2:
                        self._hide_subclusters(table, first, len(clusters), start, end)
                    else:
                        entries = table.values[first : first + len(clusters)]
                        entries[(entries & np.uint64(image.mapping.own_bits)) == 0] = READS_ZERO
                    return
            except TableFull:
                image.grow_refcount_table()

    def _hide_subclusters(self, table: L2Table, first: int, count: int, start: int, end: int) -> None:
        pairs = table.values[2 * first : 2 * (first + count)].reshape(-1, 2)
        wanted = np.full(count, ALL_SUBCLUSTERS, dtype=np.uint64)
        inside = self._image.cluster_size - 1
        wanted[0] &= np.uint64(ALL_SUBCLUSTERS << (start & inside) // self._granule & ALL_SUBCLUSTERS)
        wanted[-1] &= np.uint64((1 << ((end - 1 & inside) // self._granule + 1)) - 1)
        bitmaps = pairs[:, 1]
        wanted &= ~(bitmaps | bitmaps >> np.uint64(SUBCLUSTERS))
        wanted[(pairs[:, 0] & np.uint64(COMPRESSED)) != 0] = 0
        pairs[:, 1] |= wanted << np.uint64(SUBCLUSTERS)

"""Zeros and discards: a guest range is given up by changing its entries, whole tables at a time (3.5, 3.6).

Nothing here costs more than the metadata it touches: a range without an L2 table is not looked at, where nothing shows
through from below, and a table is changed by a few vector operations. Host clusters that lose their entry are freed
like all others, so a discarded cluster cannot show up elsewhere after a crash (T4, R-50).
"""

import errno
from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from nbdq.qcow2.entries import ALL_SUBCLUSTERS, COMPRESSED, COPIED, OFFSET_MASK, READS_ZERO, SUBCLUSTERS
from nbdq.qcow2.writing.allocator import TableFull
from nbdq.qcow2.writing.guest_reads import GuestReads
from nbdq.qcow2.writing.guest_writes import GuestWrites
from nbdq.qcow2.writing.mapping import L2Table
from nbdq.qcow2.writing.writable import WritableImage

_ALL_ZERO = ALL_SUBCLUSTERS << SUBCLUSTERS
_ZEROS = memoryview(bytes(2 << 20))


class Zeroing:
    """Zeros and discards of one image."""

    def __init__(self, image: WritableImage, reads: GuestReads, writes: GuestWrites) -> None:
        self._image = image
        self._reads = reads
        self._writes = writes
        self._geometry = image.geometry

    @property
    def _can_hide(self) -> bool:
        """Version 2 has no entry that hides what is below (M2, Z3)."""
        return self._geometry.version >= 3 or self._image.below is None

    def zero(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        """Make the range read as zeros; see :class:`nbdq.block.WritableBlockDevice`.

        Raises:
            OSError: EOPNOTSUPP if ``fast`` and data would have to be written (Z4); else ENOSPC, EROFS or EIO.
        """
        with self._image.epochs.pinned():
            self._zero(offset, length, unmap=unmap, fast=fast)
        self._image.relieve()

    def _zero(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        image = self._image
        end = offset + length
        granule = self._geometry.granule
        low = min(-(-offset // granule) * granule, end)
        high = end if end == image.size else max(end // granule * granule, low)
        edges = [edge for edge in ((offset, low), (high, end)) if edge[0] < edge[1]]
        # Where an edge and what surrounds it read as zeros already, there is nothing to do (Z2).
        written = []
        for start, stop in edges:
            around = start // granule * granule
            if not self._reads.reads_zero(around, min(around + granule, image.size) - around):
                written.append((start, stop))
        if fast and (written or not self._can_hide or image.header.data_file_raw):
            raise OSError(errno.EOPNOTSUPP, "zeros would have to be written", image.path)
        if image.bitmaps is not None:
            image.bitmaps.mark(offset, length)
        for start, stop in written:
            self._writes.write(start, _ZEROS[: stop - start])
        if low < high:
            self._zero_granules(low, high, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        """Give up whole clusters of the range; what is left of it at the edges stays (T1).

        Raises:
            OSError: EROFS or EIO; ENOSPC if there is no room for a table.
        """
        image = self._image
        size = image.cluster_size
        end = offset + length
        low = -(-offset // size) * size
        high = end if end == image.size else end // size * size
        if low >= high or not self._can_hide:
            return
        with image.epochs.pinned():
            if image.bitmaps is not None:
                image.bitmaps.mark(low, high - low)
            self._zero_granules(low, high, unmap=True)
        image.relieve()

    def abandon(self, start: int) -> None:
        """Let the image hold nothing from a cluster that begins at ``start`` on, even behind the end of the disk (T5).

        There may be no request in that range. What is below shows then: if the guest can see the difference, the caller
        has marked bitmaps. Tables that map nothing else are given up.

        Raises:
            OSError: as :meth:`discard`. Any part of the range may be left as it was.
        """
        image = self._image
        coverage = self._geometry.l2_coverage
        for l1_index in image.mapping.present(start // coverage, len(image.mapping.l1.words)):
            first = max(0, start - l1_index * coverage) >> self._geometry.cluster_bits
            image.growing(partial(self._abandon_in_table, l1_index, first))
            image.relieve()

    def _abandon_in_table(self, l1_index: int, first: int) -> None:
        mapping = self._image.mapping
        if mapping.get(l1_index) is None:
            return
        if first:
            table = mapping.own(l1_index)
            mapping.changed(l1_index, first, self._geometry.l2_count - first)
        else:
            table = mapping.drop(l1_index)
        step = 2 if self._geometry.extended_l2 else 1
        entries = table.values[first * step :]
        descriptors = entries[::step].copy()
        entries[:] = 0
        self._free(descriptors)

    def _zero_granules(self, start: int, end: int, *, unmap: bool) -> None:
        """``start`` and ``end`` are multiples of the granule, or the end of the disk."""
        image = self._image
        if not self._can_hide:
            for position in range(start, end, len(_ZEROS)):
                self._writes.write(position, _ZEROS[: min(end - position, len(_ZEROS))])
            return
        if image.header.data_file_raw:  # the data file alone is the disk, too (Q80)
            image.check_writable()
            image.data.write_zeros(start, end - start, allocated=not unmap)
        for low, high in self._by_tables(start, end):
            image.relieve(tables_only=True)  # space can wait for the end of the request, before which none is free
            self._zero_in_table(low, high, unmap=unmap)

    def _by_tables(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The range in parts of one L2 table each, and extended clusters that are not covered whole by themselves."""
        coverage = self._geometry.l2_coverage
        size = self._image.cluster_size
        first, last = start // coverage, (end - 1) // coverage + 1
        for l1_index in self._tables_to_change(first, last):
            low, high = max(start, l1_index * coverage), min(end, (l1_index + 1) * coverage)
            while low < high:
                stop = high
                if low % size:
                    stop = min(stop, (low // size + 1) * size)
                elif stop % size and stop != self._image.size and stop - low > size:
                    stop = stop // size * size
                yield low, stop
                low = stop

    def _tables_to_change(self, first: int, last: int) -> Iterator[int]:
        """Those of the L1 indexes whose table is there, or where something shows through that it would have to hide."""
        position = first
        for l1_index in self._image.mapping.present(first, last):
            yield from self._tables_that_hide(position, l1_index)
            yield l1_index
            position = l1_index + 1
        yield from self._tables_that_hide(position, last)

    def _tables_that_hide(self, first: int, last: int) -> Iterator[int]:
        coverage = self._geometry.l2_coverage
        if first >= last or self._reads.zero_below(first * coverage, min(last * coverage, self._image.size)):
            return
        if last - first == 1:
            yield first
            return
        middle = (first + last) // 2
        yield from self._tables_that_hide(first, middle)
        yield from self._tables_that_hide(middle, last)

    def _zero_in_table(self, start: int, end: int, *, unmap: bool) -> None:
        image = self._image
        bits = self._geometry.cluster_bits
        l1_index = start // self._geometry.l2_coverage
        clusters = range(start >> bits, (end - 1 >> bits) + 1)
        hides_nothing = self._reads.zero_below(start, end)
        while True:
            try:
                with image.changing():
                    while any(cluster in clusters for cluster in image.in_flight):
                        image.changed.wait()
                        image.check_writable()
                    if hides_nothing and image.mapping.get(l1_index) is None:
                        return
                    table = image.mapping.own(l1_index)
                    first = clusters.start % self._geometry.l2_count
                    image.mapping.changed(l1_index, first, len(clusters))  # even if freeing fails, which comes last
                    if not self._geometry.extended_l2:
                        self._zero_entries(table, first, len(clusters), keep_nothing=hides_nothing, unmap=unmap)
                    elif start % image.cluster_size or (end % image.cluster_size and end != image.size):
                        if not self._zero_subclusters(table, first, start, end):
                            break  # a compressed cluster
                    else:
                        self._zero_extended(table, first, len(clusters), keep_nothing=hides_nothing, unmap=unmap)
                    return
            except TableFull:
                image.grow_refcount_table()
        for position in range(start, end, len(_ZEROS)):
            self._writes.write(position, _ZEROS[: min(end - position, len(_ZEROS))])

    # Entries; under the lock.

    def _zero_entries(self, table: L2Table, first: int, count: int, *, keep_nothing: bool, unmap: bool) -> None:
        entries = table.values[first : first + count]
        old = entries.copy()
        if self._geometry.version >= 3:
            new = np.full(count, READS_ZERO, dtype=np.uint64)
            if keep_nothing:  # what was never there stays that way
                new[old == 0] = 0
        else:
            new = np.zeros(count, dtype=np.uint64)
        kept = self._kept(old, table, first, unmap=unmap)
        new[kept] = old[kept] | np.uint64(READS_ZERO)
        entries[:] = new
        self._free(old[~kept])

    def _zero_extended(self, table: L2Table, first: int, count: int, *, keep_nothing: bool, unmap: bool) -> None:
        pairs = table.values[2 * first : 2 * (first + count)].reshape(-1, 2)
        old = pairs.copy()
        kept = self._kept(old[:, 0], table, first, unmap=unmap)
        bitmap = np.full(count, _ALL_ZERO, dtype=np.uint64)
        if keep_nothing:
            bitmap[~old.any(axis=1)] = 0
        # The bitmap first: a reader without the lock must not take its bits for those of another cluster.
        pairs[:, 1] = bitmap
        pairs[:, 0] = np.where(kept, old[:, 0], np.uint64(0))
        self._free(old[~kept, 0])

    def _zero_subclusters(self, table: L2Table, index: int, start: int, end: int) -> bool:
        """Set the zero bits of a part of one cluster; False for a compressed one, which has none (Q46)."""
        granule, inside = self._geometry.granule, self._image.cluster_size - 1
        low = (start & inside) // granule
        high = -(-((end - 1 & inside) + 1) // granule)
        mask = (1 << high) - (1 << low)
        entry, bitmap = table.words[2 * index], table.words[2 * index + 1]
        if entry & COMPRESSED:
            return False
        table.words[2 * index + 1] = bitmap & ~mask | mask << SUBCLUSTERS
        return True

    def _kept(self, old: NDArray[np.uint64], table: L2Table, first: int, *, unmap: bool) -> NDArray[np.bool_]:
        """Which entries keep their host cluster: our own, if nobody wants the space back (Z1)."""
        if self._image.header.data_file_raw:
            return np.asarray((old & np.uint64(COPIED)) != 0, dtype=np.bool_)
        if unmap or self._geometry.version < 3:
            return np.zeros(len(old), dtype=bool)
        kept = (old & np.uint64(COPIED | COMPRESSED)) == COPIED
        if not self._geometry.has_data_file:
            kept &= (old & np.uint64(OFFSET_MASK)) != 0
        return np.asarray(kept, dtype=np.bool_)

    def _free(self, entries: NDArray[np.uint64]) -> None:
        """The references of these descriptors are gone."""
        image = self._image
        if image.geometry.has_data_file:
            return
        simple = (entries & np.uint64(COPIED | COMPRESSED)) == COPIED
        hosts = (entries[simple] & np.uint64(OFFSET_MASK)) >> np.uint64(image.geometry.cluster_bits)
        hosts = np.sort(hosts[hosts != 0])
        if len(hosts):
            edges = np.flatnonzero(np.diff(hosts) != 1) + 1
            starts = hosts[np.concatenate(([0], edges))]
            ends = hosts[np.concatenate((edges - 1, [len(hosts) - 1]))]
            for low, high in zip(starts.tolist(), ends.tolist(), strict=True):
                image.allocator.free(low, high - low + 1)
        for entry in entries[~simple & (entries > READS_ZERO)].tolist():
            image.free_entry(entry)

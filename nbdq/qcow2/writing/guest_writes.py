"""A guest's write: into the clusters that it owns, or into new ones, filled up with what was there before (3.3, 3.4).

A write is carried out in parts. A part that goes to new clusters has three steps: under the lock, room is found and the
guest clusters are noted as in flight, so that another write to them waits; without the lock, the data is written
together with what has to be copied around it; under the lock, the entries are *published*. Readers see the old contents
until then, and a write that fails leaves no trace but free clusters (A7, A8).
"""

from typing import NamedTuple

from nbdq.qcow2.entries import ALL_SUBCLUSTERS, COMPRESSED, COPIED, OFFSET_MASK, READS_ZERO, SUBCLUSTERS
from nbdq.qcow2.writing.allocator import Run, TableFull
from nbdq.qcow2.writing.guest_reads import GuestReads
from nbdq.qcow2.writing.mapping import L2Table
from nbdq.qcow2.writing.writable import WritableImage

#: Clusters that one part takes at most: what others have to wait for.
_PART_BYTES = 4 << 20
_ZEROS = memoryview(bytes(2 << 20))


class _InPlace(NamedTuple):
    """The next ``length`` bytes go to ``host``, which the tables name already."""

    host: int
    length: int


class NewClusters(NamedTuple):
    """The next bytes go to host clusters that the tables will name: for ``clusters`` guest clusters from ``first``."""

    first: int
    clusters: int
    host: int
    run: Run | None
    """Allocated for this; None if the host cluster was there, but not used."""
    is_unwritten: bool
    """What is there now reads as zeros."""


class GuestWrites:
    """Writes to one image."""

    def __init__(self, image: WritableImage, reads: GuestReads) -> None:
        self._image = image
        self._reads = reads
        geometry = image.geometry
        self._bits = geometry.cluster_bits
        self._cluster_size = geometry.cluster_size
        self._l2_count = geometry.l2_count
        self._extended = geometry.extended_l2
        self._granule = geometry.granule
        self._data_file = geometry.has_data_file
        #: Clusters that became metadata after tables which name them were checked: two entries had named one (R-28).
        self._new_metadata = frozenset() if self._data_file else image.protected.added
        self._part_clusters = max(1, _PART_BYTES // geometry.cluster_size)

    def write(self, offset: int, view: memoryview) -> None:
        """Write ``view``, which stays the caller's; see :class:`nbdq.block.WritableBlockDevice`.

        Raises:
            OSError: ENOSPC, EROFS or EIO.
        """
        image = self._image
        with image.epochs.pinned():
            if image.bitmaps is not None:  # who keeps book may wait for those who did not know of it (barrier)
                image.bitmaps.mark(offset, len(view))
            while view:
                try:
                    with image.changing():
                        part = self.prepare(offset, len(view))
                except TableFull:
                    image.grow_refcount_table()
                    continue
                if isinstance(part, _InPlace):
                    count = part.length
                    image.data.write(part.host, view[:count])
                else:
                    count = min(len(view), (part.first + part.clusters << self._bits) - offset)
                    self.write_new(part, offset, view[:count])
                offset += count
                view = view[count:]
        image.relieve()

    def in_place(self, table: L2Table, index: int, *, start: int, end: int) -> int:
        """Host offset of a cluster whose bytes ``[start, end)`` may be overwritten where they are; else -1."""
        if self._extended:
            entry = table.words[2 * index]
            if entry & (COPIED | COMPRESSED) != COPIED:
                return -1
            bits = self._subclusters(start, end)
            if table.words[2 * index + 1] & bits != bits:
                return -1
        else:
            entry = table.words[index]
            if entry & (COPIED | COMPRESSED | READS_ZERO) != COPIED:
                return -1
        host = entry & OFFSET_MASK
        return host if host >> self._bits not in self._new_metadata else -1

    def _subclusters(self, start: int, end: int) -> int:
        """Allocation bits of the subclusters that bytes ``[start, end)`` of a cluster touch."""
        return (1 << -(-end // self._granule)) - (1 << start // self._granule)

    # Preparing; under the lock.

    def prepare(self, offset: int, length: int) -> _InPlace | NewClusters:
        """Where the beginning of the range goes; what is new is in flight from now on. Under the lock.

        For new clusters :meth:`write_new` has to follow, which lands them.

        Raises:
            TableFull, BrokenRefcounts: as :meth:`Allocator.allocate`.
            OSError: ENOSPC, EROFS or EIO; nothing is in flight.
        """
        image = self._image
        cluster = offset >> self._bits
        while cluster in image.in_flight:
            image.changed.wait()
            image.check_writable()
        l1_index, index = divmod(cluster, self._l2_count)
        table = image.mapping.own(l1_index)
        start = offset & self._cluster_size - 1
        touched = min((start + length + self._cluster_size - 1) >> self._bits, self._l2_count - index)
        host = self.in_place(table, index, start=start, end=min(start + length, self._cluster_size))
        if host >= 0:
            return self._in_place_run(table, index, start, length, host, touched)
        if index in table.forbidden or self.is_new_metadata(table, index):
            raise image.corruption(f"guest cluster {cluster} lies on metadata")
        if self.has_own_host(table, index):
            image.in_flight.add(cluster)
            return NewClusters(cluster, 1, self._entry(table, index) & OFFSET_MASK, None, is_unwritten=False)
        count = 1
        if not self._extended or (start == 0 and length >= self._cluster_size):
            limit = min(touched, self._part_clusters)
            if self._extended:
                limit = min(limit, length >> self._bits)  # a last cluster that is partial goes alone
            while count < limit and self._needs_new(table, index + count, cluster + count):
                count += 1
        new = self._place(cluster, count)
        image.in_flight.update(range(cluster, cluster + new.clusters))
        return new

    def _in_place_run(self, table: L2Table, index: int, start: int, length: int, host: int, touched: int) -> _InPlace:
        """As many bytes from ``start`` of cluster ``index`` as lie at one place of the file."""
        end = self._cluster_size
        for number in range(1, touched):
            part = min(start + length - end, self._cluster_size)
            if self.in_place(table, index + number, start=0, end=part) != host + end:
                break
            end += self._cluster_size
        return _InPlace(host + start, min(length, end - start))

    def _entry(self, table: L2Table, index: int) -> int:
        return table.words[2 * index if self._extended else index]

    def has_own_host(self, table: L2Table, index: int) -> bool:
        """Whether a cluster that cannot simply be overwritten has a host cluster of its own nevertheless."""
        entry = self._entry(table, index)
        return entry & (COPIED | COMPRESSED) == COPIED and (self._data_file or entry & OFFSET_MASK != 0)

    def is_new_metadata(self, table: L2Table, index: int) -> bool:
        return (
            self.has_own_host(table, index)
            and (self._entry(table, index) & OFFSET_MASK) >> self._bits in self._new_metadata
        )

    def _needs_new(self, table: L2Table, index: int, cluster: int) -> bool:
        return (
            cluster not in self._image.in_flight
            and index not in table.forbidden
            and not self.has_own_host(table, index)
        )

    def _place(self, cluster: int, count: int) -> NewClusters:
        if self._data_file:  # guest and host offsets are equal (Q77); nobody knows what is there
            return NewClusters(cluster, count, cluster << self._bits, None, is_unwritten=False)
        run = self._image.allocator.allocate(count)
        return NewClusters(cluster, run.clusters, run.first << self._bits, run, is_unwritten=run.is_fresh)

    # Writing; without the lock.

    def write_new(self, part: NewClusters, offset: int, view: memoryview) -> None:
        """Write ``view`` into clusters that :meth:`prepare` has found, and publish them.

        Raises:
            OSError: as :meth:`write`; the clusters are free again.
        """
        image = self._image
        try:
            first, last = self._to_fill(part, offset, len(view))
            buffers = [view]
            position = part.host + offset - (part.first << self._bits)
            if first < offset and (head := self._old(first, offset, part)):
                buffers.insert(0, head)
                position -= len(head)
            end = offset + len(view)
            if end < last and (tail := self._old(end, last, part)):
                buffers.append(tail)
            image.data.write_vector(position, buffers)
        except BaseException:
            with image.lock:
                if part.run is not None:
                    image.allocator.undo(part.run)
                self.land(part)
            raise
        self._publish(part, offset, len(view))

    def _to_fill(self, part: NewClusters, offset: int, length: int) -> tuple[int, int]:
        """The guest range that has to be written so that the new entries are true of all they say."""
        start, end = part.first << self._bits, part.first + part.clusters << self._bits
        if not self._extended:
            return start, end
        entry, bitmap = self._read_pair(part.first)
        low, high = offset - start, offset + length - start
        allocated = bitmap & ALL_SUBCLUSTERS
        if entry & COMPRESSED:
            return start, end
        if self._moves(part, entry) and allocated:  # what the old cluster held moves along
            low = min(low, ((allocated & -allocated).bit_length() - 1) * self._granule)
            high = max(high, allocated.bit_length() * self._granule)
        # A subcluster that is in use already is being written in place, maybe by others too; leave its rest alone.
        if self._moves(part, entry) or not allocated >> low // self._granule & 1:
            low = low // self._granule * self._granule
        if self._moves(part, entry) or not allocated >> (high - 1) // self._granule & 1:
            high = -(-high // self._granule) * self._granule
        return start + low, start + high

    def _moves(self, part: NewClusters, entry: int) -> bool:
        """Whether the old cluster has contents somewhere else."""
        return entry & OFFSET_MASK != part.host or part.run is not None

    def _read_pair(self, cluster: int) -> tuple[int, int]:
        """Descriptor and bitmap of an extended entry; it cannot change while the cluster is in flight."""
        l1_index, index = divmod(cluster, self._l2_count)
        with self._image.lock:
            table = self._image.mapping.get(l1_index)
            assert table is not None, "a table stays once it is there"
            return table.words[2 * index], table.words[2 * index + 1]

    def _old(self, start: int, end: int, part: NewClusters) -> memoryview | None:
        """What the guest range reads as now; None if that is what will be there without being written."""
        stop = min(end, self._image.size)  # zeros behind the end of the disk, which may grow one day
        if self._data_file:
            end = stop
        if start >= stop or self._reads.reads_zero(start, stop - start):
            return None if part.is_unwritten or start >= end else _ZEROS[: end - start]
        data = memoryview(bytearray(end - start))
        self._reads.read_into(start, data[: stop - start])
        return data

    # Publishing; under the lock.

    def _publish(self, part: NewClusters, offset: int, length: int) -> None:
        image = self._image
        l1_index, index = divmod(part.first, self._l2_count)
        is_published = False
        try:
            with image.changing():
                table = image.mapping.own(l1_index)
                if self._extended:
                    replaced = self.set_extended(table, index, part, offset - (part.first << self._bits), length)
                else:
                    replaced = self.set_standard(table, index, part)
                image.mapping.changed(l1_index, index, part.clusters)
                image.published = is_published = True
                self.land(part)
                for entry in replaced:  # last, because it can fail: what is not freed leaks
                    image.free_entry(entry)
        except BaseException:
            if not is_published:
                with image.lock:
                    if part.run is not None:
                        image.allocator.undo(part.run)
                    self.land(part)
            raise

    def set_standard(self, table: L2Table, index: int, part: NewClusters) -> list[int]:
        """The descriptors whose clusters are not used any more."""
        replaced = []
        for number in range(part.clusters):
            old = table.words[index + number]
            host = part.host + (number << self._bits)
            table.words[index + number] = host | COPIED
            if old & OFFSET_MASK != host or old & COMPRESSED:
                replaced.append(old)
        return replaced

    def set_extended(self, table: L2Table, index: int, part: NewClusters, start: int, length: int) -> list[int]:
        replaced = []
        for number in range(part.clusters):
            old, bitmap = table.words[2 * (index + number)], table.words[2 * (index + number) + 1]
            host = part.host + (number << self._bits)
            low, high = (
                max(0, start - (number << self._bits)),
                min(self._cluster_size, start + length - (number << self._bits)),
            )
            written = ALL_SUBCLUSTERS if old & COMPRESSED else self._subclusters(low, high)
            allocated = bitmap & ALL_SUBCLUSTERS | written
            # The descriptor first: a reader without the lock must not find bits that belong to another cluster.
            table.words[2 * (index + number)] = host | COPIED
            table.words[2 * (index + number) + 1] = allocated | bitmap & ~(ALL_SUBCLUSTERS | written << SUBCLUSTERS)
            if old & OFFSET_MASK != host or old & COMPRESSED:
                replaced.append(old)
        return replaced

    def land(self, part: NewClusters) -> None:
        """The clusters are no longer in flight; the lock is held."""
        image = self._image
        image.in_flight.difference_update(range(part.first, part.first + part.clusters))
        image.changed.notify_all()

"""A chain that can be written: a QCOW2 image in front, which changes, over a disk that does not.

The image is asked first, one table access for each cluster; what it does not hold is answered by the index over all
layers below, at the same cost for any depth. Must not know NBD, sockets or event loops.

The methods named ``…_cached`` and :meth:`OverlayDisk.write_cached` are for one thread, which never waits: they look at
tables without the lock, under a pin of their own (see :class:`nbdq.qcow2.writing.epochs.Epochs`).
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from nbdq.block import Kind, Piece, Status
from nbdq.chain.clusters import ClusterCache
from nbdq.chain.disk import ChainDisk, FileHoles, new_buffer, sound_runs, statuses, zero_pieces
from nbdq.chain.index import Runs, clip_runs, merge_granules, runs_at
from nbdq.qcow2.distinct import union
from nbdq.qcow2.entries import (
    ALL_SUBCLUSTERS,
    COMPRESSED,
    COPIED,
    DESCRIPTOR_MASK,
    OFFSET_MASK,
    READS_ZERO,
    SUBCLUSTERS,
)
from nbdq.qcow2.snapshots import Snapshot
from nbdq.qcow2.writing.compressed import CompressedWrites
from nbdq.qcow2.writing.epochs import NEVER
from nbdq.qcow2.writing.growth import grow
from nbdq.qcow2.writing.guest_reads import GuestReads
from nbdq.qcow2.writing.guest_writes import GuestWrites
from nbdq.qcow2.writing.inline_writes import InlineWrites
from nbdq.qcow2.writing.internal_snapshots import apply_snapshot
from nbdq.qcow2.writing.mapping import L2Table
from nbdq.qcow2.writing.populate import Populate
from nbdq.qcow2.writing.shrink import shrink
from nbdq.qcow2.writing.writable import WritableImage
from nbdq.qcow2.writing.zeroing import Zeroing
from nbdq.storage import Data

#: Guest bytes of the first status chunk, for those who want no more than one extent.
_FIRST_CHUNK = 2 << 20
_CHUNK = 512 << 20


class OverlayDisk:
    """A :class:`~nbdq.block.WritableBlockDevice`. Owns both disks until :meth:`close`."""

    def __init__(self, top: WritableImage, below: ChainDisk | None, *, clusters: ClusterCache) -> None:
        """Take ownership of ``top`` and of ``below``, which is what ``top`` lies over; ``clusters`` is shared."""
        self.top = top
        self.replace_below(below)
        self._clusters = clusters
        self._reads = GuestReads(top, self._inflate)
        self._writes = GuestWrites(top, self._reads)
        self._inline_writes = InlineWrites(top, self._writes)
        self._zeroing = Zeroing(top, self._reads, self._writes)
        self._populate = Populate(top, self._reads, self._writes)
        self._compressed = CompressedWrites(top, lambda descriptor: clusters.forget((top.reader, descriptor)))
        geometry = top.geometry
        self._bits = geometry.cluster_bits
        self._cluster_size = geometry.cluster_size
        self._inside = geometry.cluster_size - 1
        self._l2_bits = (geometry.l2_coverage).bit_length() - 1
        self._l2_mask = geometry.l2_count - 1
        self._extended = geometry.extended_l2
        self._data_file = geometry.has_data_file
        self._has_zeros = geometry.version >= 3
        self._granule = geometry.granule
        self._tables = top.mapping.tables
        self._epochs = top.epochs
        self._holes = FileHoles([top.reader])

    def replace_below(self, below: ChainDisk | None) -> None:
        """Let ``below`` show through from now on, instead of what did; that is the caller's again.

        No other call may be in progress: the caller has drained the disk. Nothing is written.
        """
        self.below = self.top.below = below
        """Everything under the top; None if there is nothing."""
        self.layer_count = 1 + (len(below.layers) if below is not None else 0)
        self._below_size = min(below.size, self.top.size) if below is not None else 0

    @property
    def size(self) -> int:
        """Bytes, a multiple of 512."""
        return self.top.size

    def _inflate(self, descriptor: int) -> bytes:
        reader = self.top.reader
        return self._clusters.get((reader, descriptor), lambda: reader.read_compressed(descriptor))

    # Without waiting.

    def _find(self, offset: int) -> tuple[int, int] | None:
        """Kind and host value of what ``offset`` is in the top; None if the table has to be loaded."""
        table = self._tables.get(offset >> self._l2_bits)
        if table is None:
            return None if self.top.mapping.l1.words[offset >> self._l2_bits] & OFFSET_MASK else (Kind.UNALLOCATED, 0)
        index = offset >> self._bits & self._l2_mask
        return (
            self._find_extended(table, index, offset) if self._extended else self._find_standard(table, index, offset)
        )

    def _find_standard(self, table: L2Table, index: int, offset: int) -> tuple[int, int] | None:
        entry = table.words[index]
        if entry == 0:
            return Kind.UNALLOCATED, 0
        if entry & COMPRESSED:
            return Kind.COMPRESSED, entry & DESCRIPTOR_MASK
        host = entry & OFFSET_MASK
        if entry & READS_ZERO:
            return None if host & self._inside or not self._has_zeros else (Kind.ZERO, 0)
        return None if self._is_odd(entry, offset) else (Kind.DATA, host + (offset & self._inside))

    def _is_odd(self, entry: int, offset: int) -> bool:
        """Whether a descriptor does not simply name a place: then its exact meaning is the decoder's to tell."""
        host = entry & OFFSET_MASK
        if self._data_file:
            return host != offset - (offset & self._inside) or not entry & COPIED
        return not host or bool(host & self._inside)

    def _find_extended(self, table: L2Table, index: int, offset: int) -> tuple[int, int] | None:
        # Two words that another thread may be changing: what does not fit together is asked for again with the lock.
        # A descriptor that is there before and after its bitmap is read belongs to it: none comes back while we look.
        entry, bitmap = table.words[2 * index], table.words[2 * index + 1]
        if entry != table.words[2 * index]:
            return None
        if entry & COMPRESSED:
            return None if bitmap else (Kind.COMPRESSED, entry & DESCRIPTOR_MASK)
        if not bitmap:
            return Kind.UNALLOCATED, 0
        if bitmap & bitmap >> SUBCLUSTERS & ALL_SUBCLUSTERS:
            return None
        number = (offset & self._inside) // self._granule
        host = entry & OFFSET_MASK
        state = bitmap >> number & (1 | 1 << SUBCLUSTERS)
        if not state:
            return Kind.UNALLOCATED, 0
        if state == 1 << SUBCLUSTERS:
            return Kind.ZERO, 0
        return None if self._is_odd(entry, offset) else (Kind.DATA, host + (offset & self._inside))

    def read_cached(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` without ever waiting; False if only :meth:`read_into` can."""
        epochs = self._epochs
        epochs.inline = epochs.current
        try:
            granule = self._granule
            if offset // granule == (offset + len(view) - 1) // granule:
                return self._read_granule(offset, view)
            while view:
                count = granule - offset % granule
                if not self._read_granule(offset, view[:count]):
                    return False
                offset, view = offset + count, view[count:]
            return True
        finally:
            epochs.inline = NEVER

    def _read_granule(self, offset: int, view: memoryview) -> bool:
        """The same for a range inside one granule."""
        found = self._find(offset)
        if found is None:
            return False
        kind, host = found
        if kind == Kind.DATA:
            return self.top.data.read_cached(host, view)
        if kind == Kind.UNALLOCATED:
            return self._read_below_cached(offset, view)
        if kind == Kind.ZERO:
            view[:] = bytes(len(view))
            return True
        cluster = self._clusters.peek((self.top.reader, host))
        if cluster is None:
            return False
        inside = offset & self._inside
        view[:] = memoryview(cluster)[inside : inside + len(view)]
        return True

    def _read_below_cached(self, offset: int, view: memoryview) -> bool:
        count = max(0, min(len(view), self._below_size - offset))
        if count:
            assert self.below is not None
            if not self.below.read_cached(offset, view[:count]):
                return False
        if count < len(view):
            view[count:] = bytes(len(view) - count)
        return True

    def gather_cached(self, offset: int, length: int) -> list[Piece] | None:
        """The range as pieces of files and of memory, if all of it is in memory; never waits.

        Pieces of files are of layers below only: a cluster of the top could be used for something else before its
        bytes have left a socket.
        """
        epochs = self._epochs
        epochs.inline = epochs.current
        try:
            pieces: list[Piece] = []
            end = offset + length
            while offset < end:
                found = self._find(offset)
                if found is None:
                    return None
                kind, host = found
                stop = self._same_until(offset, end, kind, host)
                count = stop - offset
                if kind == Kind.UNALLOCATED and offset < self._below_size:
                    assert self.below is not None
                    count = min(count, self._below_size - offset)
                    parts = self.below.gather_cached(offset, count)
                    if parts is None:
                        return None
                    pieces += parts
                elif kind in (Kind.UNALLOCATED, Kind.ZERO):
                    pieces += zero_pieces(count)
                else:
                    view = new_buffer(count)
                    if kind == Kind.DATA:
                        if not self.top.data.read_cached(host, view):
                            return None
                    elif not self._read_granule(offset, view):
                        return None
                    pieces.append(view)
                offset += count
            return pieces
        finally:
            epochs.inline = NEVER

    def _same_until(self, offset: int, end: int, kind: int, host: int) -> int:
        """How far the following granules continue what ``offset`` is."""
        granule = self._granule if kind != Kind.COMPRESSED else self._cluster_size
        position = offset - offset % granule + granule
        if kind == Kind.COMPRESSED:
            return min(position, end)
        while position < end:
            expected = (kind, host + position - offset if kind == Kind.DATA else 0)
            if self._find(position) != expected:
                return position
            position += granule
        return end

    def write_cached(self, offset: int, view: memoryview) -> bool:
        """Write ``view`` if the page cache and tables in memory are enough for that.

        Raises:
            OSError: the write failed.
        """
        top, epochs = self.top, self._epochs
        epochs.inline = epochs.current
        try:
            table = self._tables.get(offset >> self._l2_bits)
            if table is None or not table.is_own or top.is_corrupt:
                return False
            start = offset & self._inside
            length = len(view)
            index = offset >> self._bits & self._l2_mask
            host = self._writes.in_place(table, index, start=start, end=min(start + length, self._cluster_size))
            if host < 0:
                return self._inline_writes.write(offset, view, self._read_below_cached)
            done = self._cluster_size - start
            while done < length:  # one write, if the clusters are neighbours
                index += 1
                part = min(length - done, self._cluster_size)
                if (
                    index > self._l2_mask
                    or self._writes.in_place(table, index, start=0, end=part) != host + start + done
                ):
                    return False
                done += self._cluster_size
            if top.bitmaps is not None:
                top.bitmaps.mark(offset, length)
            top.data.write(host + start, view)
            return True
        finally:
            epochs.inline = NEVER

    def status_cached(self, offset: int, length: int) -> bool:
        """Whether :meth:`status` can answer for the range from memory; it always takes a lock."""
        return False

    # Waiting.

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``; may wait for a disk and inflate.

        Raises:
            OSError: EIO where metadata is corrupt or the medium fails.
        """
        self._reads.read_into(offset, view)

    def gather(self, offset: int, length: int) -> list[Piece]:
        """The range in memory; may wait for a disk and inflate.

        Raises:
            OSError: EIO where metadata is corrupt or the medium fails.
        """
        view = new_buffer(length)
        self._reads.read_into(offset, view)
        return [view]

    def write(self, offset: int, view: memoryview) -> None:
        """Write ``view``; see :class:`~nbdq.block.WritableBlockDevice`."""
        self._writes.write(offset, view)

    def zero(self, offset: int, length: int, *, unmap: bool, fast: bool = False) -> None:
        """Make the range read as zeros; see :class:`~nbdq.block.WritableBlockDevice`."""
        self._zeroing.zero(offset, length, unmap=unmap, fast=fast)

    def discard(self, offset: int, length: int) -> None:
        """Give up the contents of whole clusters; see :class:`~nbdq.block.WritableBlockDevice`."""
        self._zeroing.discard(offset, length)

    def grow(self, size: int) -> None:
        """Make the disk larger, durably; what is new reads as zeros. See :func:`nbdq.qcow2.writing.growth.grow`."""
        grow(self.top, self._zeroing, size)
        if self.below is not None:
            self._below_size = min(self.below.size, size)

    # For live operations; from any thread, beside the guest's requests unless it says otherwise.

    def populate(self, offset: int, length: int) -> int:
        """Copy what shows through in the range into the top; see :meth:`Populate.populate`."""
        return self._populate.populate(offset, length)

    def write_compressed(self, offset: int, data: Data, *, if_open: bool = False) -> bool:
        """Store a compressed cluster as it is; see :meth:`CompressedWrites.store`."""
        return self._compressed.store(offset, data, if_open=if_open)

    def shrink(self, size: int) -> None:
        """Make the disk smaller, durably; the caller has drained it. See :func:`nbdq.qcow2.writing.shrink.shrink`."""
        try:
            shrink(self.top, self._zeroing, size)
        finally:
            self._below_size = min(self._below_size, self.size)

    def apply_snapshot(self, snapshot: Snapshot) -> NDArray[np.uint64]:
        """Go back to an internal snapshot; see :func:`nbdq.qcow2.writing.internal_snapshots.apply_snapshot`."""
        unused = apply_snapshot(self.top, snapshot)
        if self.below is not None:
            self._below_size = min(self.below.size, self.size)
        return unused

    def make_empty(self) -> None:
        """Let the top hold nothing, so that the disk reads as what is below; the caller has drained it.

        Bitmaps are not marked: what is below should read the same. Durable after the next :meth:`flush`.

        Raises:
            OSError: ENOSPC, EROFS or EIO; the top may hold some of what it held.
        """
        self._zeroing.abandon(0)

    def flush(self) -> None:
        """Make everything durable; see :class:`~nbdq.block.WritableBlockDevice`."""
        self.top.flush()

    def status(self, offset: int, length: int) -> Iterator[Status]:
        """Block status of the range, in ascending chunks that together cover it exactly.

        Raises:
            OSError: EIO where metadata is corrupt, after everything before it; or a table cannot be read.
        """
        chunks = sound_runs(self.runs(offset, length), lambda layer: self.top.path)
        return statuses(chunks, self.layer_count)

    def runs(self, offset: int, length: int) -> Iterator[tuple[Runs, int]]:
        """(runs, end) chunks that cover the range exactly; layer 0 is the top.

        Raises:
            OSError: a table cannot be read.
        """
        end = offset + length
        chunk = _FIRST_CHUNK
        while offset < end:
            stop = min(end, (offset // chunk + 1) * chunk)
            runs = self._holes.split(self._top_runs(offset, stop), stop)
            yield (self._fill_from_below(runs, offset, stop) if self._below_size > offset else runs), stop
            offset, chunk = stop, _CHUNK

    def _top_runs(self, start: int, end: int) -> Runs:
        base = start - start % self._cluster_size
        count = -(-(end - base) // self._granule)
        kind = np.zeros(count, dtype=np.uint8)
        host = np.zeros(count, dtype=np.uint64)
        found = self._reads.granules(base, end)
        if found is None:
            return Runs(np.array([start], np.uint64), kind[:1], np.zeros(1, np.uint16), host[:1])
        inside = found.position < count
        kind[found.position[inside]], host[found.position[inside]] = found.kind[inside], found.host[inside]
        return clip_runs(merge_granules(base, kind, np.zeros(count, np.uint16), host, self._granule), start, end)

    def _fill_from_below(self, runs: Runs, start: int, end: int) -> Runs:
        """What the top does not decide is decided below, as far as that reaches; behind it there is nothing (S1)."""
        assert self.below is not None
        stop = min(end, self._below_size)
        parts = [part for part, _ in self.below.runs(start, stop - start)]
        if stop < end:
            nothing = np.zeros(1, np.uint8)
            parts.append(Runs(np.array([stop], np.uint64), nothing, np.zeros(1, np.uint16), nothing.astype(np.uint64)))
        below = Runs(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        layer = below.layer + (below.start < stop).astype(np.uint16)  # what is behind the end is the top's own
        starts = union(runs.start, below.start)
        above, under = runs_at(runs, starts), runs_at(below._replace(layer=layer), starts)
        open_ = above.kind <= Kind.UNALLOCATED_OFFSET
        return Runs(
            starts,
            np.where(open_, under.kind, above.kind),
            np.where(open_, under.layer, above.layer),
            np.where(open_, under.host, above.host),
        )

    def prefetch(self, offset: int, length: int) -> None:
        """Bring the range nearer, as far as that is cheap. A hint."""
        for start, end, kind, host in self._reads.pieces(offset, length):
            if kind == Kind.DATA:
                self.top.data.prefetch(host, end - start)
            elif kind <= Kind.UNALLOCATED_OFFSET and start < self._below_size:
                assert self.below is not None
                self.below.prefetch(start, min(end, self._below_size) - start)

    def finish(self) -> None:
        """Write everything, so that the top is complete without us (:meth:`WritableImage.finish`); close nothing."""
        self.top.finish()

    def close(self) -> None:
        """Flush, and close every layer. No call may be in progress.

        Raises:
            OSError: what was written last may not be durable.
        """
        try:
            self.top.close()
        finally:
            if self.below is not None:
                self.below.close()

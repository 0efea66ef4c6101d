"""The audit of L1 and L2 tables: every entry judged, every host cluster that it references counted (C2, C3, C6).

However many snapshots share an L2 table, it is read once and counts as often as it is referenced; what is wrong in it
counts as often, too, as in QEMU, which walks through it again for each.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nbdq.errors import CorruptImage
from nbdq.qcow2.audit.reference_counts import ReferenceCounts
from nbdq.qcow2.audit.result import CheckResult
from nbdq.qcow2.audit.sparse_tables import lies_in_data, read_tables, refuse_overlaps
from nbdq.qcow2.audit.stored_refcounts import StoredRefcounts
from nbdq.qcow2.entries import Geometry
from nbdq.storage import FileStorage

OFFSET_MASK = np.uint64(0x00FF_FFFF_FFFF_FE00)
COPIED = np.uint64(1 << 63)
COMPRESSED = np.uint64(1 << 62)
ZERO = np.uint64(1)
_L1_RESERVED = np.uint64(0x7F00_0000_0000_01FF)
_L2_RESERVED = np.uint64(0x3F00_0000_0000_01FE)
_ALLOCATED = np.uint64(0xFFFF_FFFF)
_HIGH = np.uint64(32)

#: Entries of an L1 table that are looked at together.
L1_PIECE = 1 << 18

#: Distinct L2 tables that an image may have whatever space it occupies; with it, four for each cluster.
_SPARSE_TABLES = 1 << 20

_Flags = NDArray[np.bool_]
_Words = NDArray[np.uint64]
_Offsets = NDArray[np.int64]


@dataclass(frozen=True)
class L1Table:
    """An L1 table of the image and how many snapshots have it; the active one is none of theirs."""

    offset: int
    size: int
    """Entries."""
    owner: str
    """For messages."""
    active: bool
    weight: int = 1


@dataclass(frozen=True)
class L2Tables:
    """All L2 tables, each once, by ascending offset."""

    offsets: _Offsets
    references: _Offsets
    """From all L1 tables."""
    active: _Offsets
    """From the active L1 table alone."""
    guest_offsets: _Offsets
    """Where the first entry of the table is on the disk, as its (last) reference in the active L1 table says."""


class MappingAudit:
    """One pass over all L1 and L2 tables. Notes findings in ``result``, references in ``counts``."""

    def __init__(
        self, storage: FileStorage, geometry: Geometry, result: CheckResult, counts: ReferenceCounts, limit: int
    ) -> None:
        """``limit``: a region that ends at or after it is out of the file by a cluster or more."""
        self._storage = storage
        self._geometry = geometry
        self._result = result
        self._counts = counts
        self._limit = limit
        self._bits = np.int64(geometry.cluster_bits)
        occupied = storage.size() if storage.is_block_device else storage.allocated_size()
        self._most_tables = _SPARSE_TABLES + (4 * occupied >> geometry.cluster_bits)

    def read_l1_tables(self, tables: list[L1Table]) -> L2Tables:
        """Judge and count what the L1 tables say, and gather the L2 tables.

        Raises:
            CorruptImage: there are more than any sound image has.
            OSError: the file cannot be read.
        """
        offsets = np.array([table.offset for table in tables], dtype=np.int64)
        sizes = np.array([table.size * 8 for table in tables], dtype=np.int64)
        refuse_overlaps(self._storage.path, "L1 tables", offsets, sizes)
        merged = np.zeros((4, 0), dtype=np.int64)
        waiting: list[NDArray[np.int64]] = []
        for table in tables:
            for begin in range(0, table.size, L1_PIECE):
                waiting.append(self._read_l1(table, begin, min(L1_PIECE, table.size - begin)))
                if sum(part.shape[1] for part in waiting) >= L1_PIECE:
                    merged = self._merge([merged, *waiting])
                    waiting.clear()
        merged = self._merge([merged, *waiting])
        tables_found = L2Tables(merged[0], merged[1], merged[2], merged[3])
        cluster_size = self._geometry.cluster_size
        weights = None if (tables_found.references == 1).all() else tables_found.references
        self._count(tables_found.offsets, cluster_size, weights, "L2 table")
        return tables_found

    def _read_l1(self, table: L1Table, begin: int, count: int) -> NDArray[np.int64]:
        """Columns of offset, references, active references, guest offset; one for each entry with a table."""
        data = self._storage.read(table.offset + begin * 8, count * 8)
        entries = np.frombuffer(data[: len(data) // 8 * 8], dtype=">u8")
        index = np.flatnonzero(entries)
        entry = entries[index].astype(np.uint64)
        offset = (entry & OFFSET_MASK).astype(np.int64)

        def note(wrong: _Flags, what: str) -> None:
            places = np.flatnonzero(wrong).tolist()
            texts = (f"{table.owner}L1 entry {begin + index[i]} is {int(entry[i]):#x}: {what}" for i in places)
            self._result.corrupt_each(len(places) * table.weight, texts)

        empty = offset == 0
        note(empty, "flags without an L2 table")
        note(~empty & (entry & _L1_RESERVED != 0), "reserved bits are set")
        note(offset & (self._geometry.cluster_size - 1) != 0, "the L2 table is not at a cluster")
        kept = np.flatnonzero(~empty)
        columns = np.empty((4, len(kept)), dtype=np.int64)
        columns[0] = offset[kept]
        columns[1] = table.weight
        columns[2] = int(table.active)
        columns[3] = (index[kept] + begin) * self._geometry.l2_coverage if table.active else -1
        return columns

    def _merge(self, parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        columns = np.concatenate(parts, axis=1)
        columns = columns[:, np.argsort(columns[0], kind="stable")]
        starts = np.flatnonzero(np.diff(columns[0], prepend=-1))
        if len(starts) > self._most_tables:
            what = f"L1 tables name {len(starts)} L2 tables or more, which a file of this size cannot hold"
            raise CorruptImage(self._storage.path, what, "restore the image from a copy")
        if len(starts) == columns.shape[1]:
            return columns
        return np.stack(
            [
                columns[0, starts],
                np.add.reduceat(columns[1], starts),
                np.add.reduceat(columns[2], starts),
                np.maximum.reduceat(columns[3], starts),
            ]
        )

    def read_l2_tables(self, tables: L2Tables, stored: StoredRefcounts) -> None:
        """Judge and count what the L2 tables say; COPIED against the refcounts that are ``stored`` (C2).

        Raises:
            CorruptImage: tables lie over each other.
            OSError: the file cannot be read.
        """
        for rows, words in self.batches(tables):
            batch = L2Batch(words, tables, rows, self._geometry)
            self._judge(batch)
            self._count_batch(batch)
            self._judge_copied(batch, stored)

    def batches(self, tables: L2Tables) -> Iterator[tuple[NDArray[np.int64], _Words]]:
        """The tables that are in the file and not empty: their places among all, and one row of words for each."""
        cluster_size = self._geometry.cluster_size
        inside = np.flatnonzero(tables.offsets < self._storage.size())
        inside = inside[lies_in_data(self._storage, tables.offsets[inside], cluster_size)]
        offsets = tables.offsets[inside]
        refuse_overlaps(self._storage.path, "L2 tables", offsets, cluster_size)
        for chosen, words in read_tables(self._storage, offsets, cluster_size):
            yield inside[chosen], words

    def judge_l1_copied(self, table: L1Table, stored: StoredRefcounts) -> None:
        """COPIED in the active L1 table must say whether the refcount of the L2 table is 1 (Q37)."""
        for index, entry, refcount in copied_mismatches_l1(self._storage, table, stored, self._geometry.cluster_bits):
            texts = (
                f"L1 entry {i} is {int(e):#x}, but the refcount of the L2 table is {int(r)}"
                for i, e, r in zip(index.tolist(), entry, refcount, strict=True)
            )
            self._result.corrupt_each(len(index), texts)
            self._result.copied_errors += len(index)

    def _judge(self, batch: "L2Batch") -> None:
        geometry, result = self._geometry, self._result

        def note(wrong: _Flags, what: str, weights: _Offsets = batch.references) -> None:
            if wrong.any():
                places = np.flatnonzero(wrong)
                texts = (batch.describe(place, what) for place in places.tolist())
                result.corrupt_each(batch.weigh(places, weights), texts)

        entry, bitmap, compressed = batch.entry, batch.bitmap, batch.compressed
        # Most tables have nothing but aligned data clusters: the bits of all entries together say so.
        if batch.any_bits & int(_L2_RESERVED):
            note(~compressed & (entry & _L2_RESERVED != 0), "reserved bits are set")
        if batch.any_bits & int(OFFSET_MASK) & (geometry.cluster_size - 1):
            note(batch.placed & (batch.host & (geometry.cluster_size - 1) != 0), "the host offset is not at a cluster")
        if batch.any_bits & int(COMPRESSED):
            note(compressed & (entry & COPIED != 0), "a compressed cluster has COPIED set")
        if geometry.version < 3 and batch.any_bits & int(ZERO):
            note(~compressed & (entry & ZERO != 0), "a zero cluster in an image of version 2")
        if geometry.has_data_file:
            note(compressed, "a compressed cluster in an image with a data file")
            guest = batch.guest()
            astray = batch.placed & (guest >= 0) & (batch.host != guest)
            note(astray, "not at its guest offset in the data file", batch.active)
        if geometry.extended_l2:
            if not geometry.has_data_file:
                note(compressed & (bitmap != 0), "a compressed cluster has subclusters")
            note(batch.placed & (bitmap >> _HIGH & bitmap & _ALLOCATED != 0), "subclusters are allocated and zero")
            unplaced = ~batch.placed & ~compressed
            note(unplaced & (bitmap & _ALLOCATED != 0), "subclusters are allocated without a host cluster")

    def _count_batch(self, batch: "L2Batch") -> None:
        geometry, result = self._geometry, self._result
        data = batch.data
        host = batch.host if data is None else batch.host[data]
        if not geometry.has_data_file:
            self._count(host, geometry.cluster_size, batch.weights(data, batch.references), "data cluster")
        result.allocated_clusters += batch.weigh(data, batch.active)
        apart = np.flatnonzero(host[1:] != host[:-1] + geometry.cluster_size)
        before, after = (apart, apart + 1) if data is None else (data[apart], data[apart + 1])
        result.fragmented_clusters += batch.weigh(after[batch.row(before) == batch.row(after)], batch.active)
        if not batch.any_bits & int(COMPRESSED) or geometry.has_data_file:
            return
        packed = np.flatnonzero(batch.compressed & (batch.bitmap == 0))
        offsets, lengths = compressed_ranges(batch.entry[packed], geometry)
        self._count(offsets, lengths, batch.weights(packed, batch.references), "compressed data")
        compressed = batch.weigh(packed, batch.active)
        result.allocated_clusters += compressed
        result.compressed_clusters += compressed
        result.fragmented_clusters += compressed

    def _judge_copied(self, batch: "L2Batch", stored: StoredRefcounts) -> None:
        places, refcount = batch.copied_mismatches(stored)
        if places.size:
            texts = (
                batch.describe(place, f"the refcount is {int(found)}")
                for place, found in zip(places.tolist(), refcount, strict=True)
            )
            count = batch.weigh(places, batch.active)
            self._result.corrupt_each(count, texts)
            self._result.copied_errors += count

    def _count(self, offsets: _Offsets, lengths: _Offsets | int, weights: _Offsets | None, what: str) -> None:
        """Count every cluster that the regions touch, except of those that leave the file by a cluster or more."""
        if not offsets.size:
            return
        cluster_size = self._geometry.cluster_size
        one_each = isinstance(lengths, int) and not int(np.bitwise_or.reduce(offsets)) & (cluster_size - 1)
        if one_each and int(offsets.max()) + cluster_size < self._limit:  # nearly always
            self._counts.add(offsets >> self._bits, weights)
            return
        ends = offsets + lengths
        outside = ends >= self._limit
        if outside.any():
            texts = (f"{what} at {int(offset):#x}" for offset in offsets[outside])
            self._result.past_end_each(int(outside.sum()) if weights is None else int(weights[outside].sum()), texts)
            offsets, ends = offsets[~outside], ends[~outside]
            weights = None if weights is None else weights[~outside]
        first = offsets >> self._bits
        self._counts.add(first, weights)
        last = ends - 1 >> self._bits
        while (further := last > first).any():
            first, last = first[further] + 1, last[further]
            weights = None if weights is None else weights[further]
            self._counts.add(first, weights)


class L2Batch:
    """The entries that are not 0 of some L2 tables, side by side, and what they say (Q34-Q36, Q43).

    ``places`` of methods are indices among them; None stands for all.
    """

    def __init__(self, words: _Words, tables: L2Tables, rows: NDArray[np.int64], geometry: Geometry) -> None:
        """``words`` has a line for each of ``rows`` of ``tables``."""
        self._geometry = geometry
        self._tables = tables
        self._rows = rows
        self.references = tables.references[rows]
        self.active = tables.active[rows]
        if geometry.extended_l2:
            pairs = words.reshape(-1, 2)
            used = pairs.any(axis=1)
            entries, bitmaps = pairs.T
        else:
            entries = words.reshape(-1)
            used, bitmaps = entries != 0, np.zeros(1, dtype=np.uint64)
        self._used = None if used.all() else np.flatnonzero(used)
        self.entry: _Words = entries if self._used is None else entries[self._used]
        self.bitmap: _Words = bitmaps[self._used] if geometry.extended_l2 and self._used is not None else bitmaps
        self.any_bits = int(np.bitwise_or.reduce(self.entry))
        """Which bits at least one entry has."""
        self.host: _Offsets = (self.entry & OFFSET_MASK).view(np.int64)
        self.compressed = np.zeros(len(self.entry), dtype=bool)
        if self.any_bits & int(COMPRESSED):
            self.compressed = self.entry & COMPRESSED != 0
        self.placed = (self.host != 0) & ~self.compressed
        """Standard clusters with a place in the file, preallocated zeros included."""
        if geometry.has_data_file:
            known = ~self.compressed & (self.entry & COPIED != 0)
            self.placed |= known if geometry.extended_l2 else known & (self.entry & ZERO == 0)  # Q36
        self.data = None if self.placed.all() else np.flatnonzero(self.placed)
        """The places of the same."""

    def index(self, places: _Offsets | None) -> _Offsets:
        """Where in the batch, counting empty entries too."""
        if places is None:
            return np.arange(len(self.entry)) if self._used is None else self._used
        return places if self._used is None else np.asarray(self._used[places])

    def row(self, places: _Offsets | None) -> _Offsets:
        """In which of the tables."""
        return self.index(places) // self._geometry.l2_count

    def weights(self, places: _Offsets | None, weights: _Offsets) -> _Offsets | None:
        """For each of ``places`` the weight of its table; None if all are 1."""
        if (weights == 1).all():
            return None
        return np.asarray(weights[self.row(places)])

    def weigh(self, places: _Offsets | None, weights: _Offsets) -> int:
        """The sum of the same."""
        found = self.weights(places, weights)
        if found is None:
            return len(self.entry) if places is None else len(places)
        return int(found.sum())

    def guest(self) -> _Offsets:
        """Guest offsets as the active L1 table has them; negative where it does not have the table."""
        index = self.index(None)
        start = self._tables.guest_offsets[self._rows][index // self._geometry.l2_count]
        return np.where(start >= 0, start + (index % self._geometry.l2_count << self._geometry.cluster_bits), -1)

    def describe(self, place: int, what: str) -> str:
        """A line about one entry."""
        row, column = divmod(int(self.index(np.array([place]))[0]), self._geometry.l2_count)
        table = int(self._tables.offsets[self._rows[row]])
        return f"entry {column} of the L2 table at {table:#x} is {int(self.entry[place]):#x}: {what}"

    def copied_mismatches(self, refcounts: StoredRefcounts | ReferenceCounts) -> tuple[_Offsets, _Words]:
        """Entries of active tables whose COPIED bit does not say whether the refcount is 1 (Q37), and the refcounts."""
        places = self.data
        if not (self.active > 0).all():
            places = np.flatnonzero(self.placed)
            places = places[self.active[self.row(places)] > 0]
        host, entry = (self.host, self.entry) if places is None else (self.host[places], self.entry[places])
        if self._geometry.has_data_file:
            found = np.ones(len(host), dtype=np.uint64)
        else:
            found = refcounts.of(host >> self._geometry.cluster_bits).astype(np.uint64)
        wrong = (found == 1) != (entry >= COPIED)  # bit 63
        if isinstance(refcounts, StoredRefcounts) and refcounts.misplaced.size and not self._geometry.has_data_file:
            wrong &= refcounts.are_known(host >> self._geometry.cluster_bits)
        bad = np.flatnonzero(wrong)
        return (bad if places is None else np.asarray(places[bad])), found[bad]


def copied_mismatches_l1(
    storage: FileStorage, table: L1Table, refcounts: StoredRefcounts | ReferenceCounts, cluster_bits: int
) -> Iterator[tuple[_Offsets, _Words, _Words]]:
    """Indices, entries and refcounts where COPIED of an active L1 table is wrong (Q37); in pieces."""
    for begin in range(0, table.size, L1_PIECE):
        data = storage.read(table.offset + begin * 8, min(L1_PIECE, table.size - begin) * 8)
        entries = np.frombuffer(data[: len(data) // 8 * 8], dtype=">u8").astype(np.uint64)
        index = np.flatnonzero(entries & OFFSET_MASK)
        clusters = (entries[index] & OFFSET_MASK).astype(np.int64) >> cluster_bits
        if isinstance(refcounts, StoredRefcounts):
            known = refcounts.are_known(clusters)
            index, clusters = index[known], clusters[known]
        found = refcounts.of(clusters).astype(np.uint64)
        wrong = (found == 1) != (entries[index] & COPIED != 0)
        if wrong.any():
            yield index[wrong] + begin, entries[index[wrong]], found[wrong]


def compressed_ranges(entry: _Words, geometry: Geometry) -> tuple[_Offsets, _Offsets]:
    """Host offset and byte length of the data of compressed clusters (Q49, Q50)."""
    offset_bits = 62 - (geometry.cluster_bits - 8)
    descriptor = (entry & np.uint64((1 << 62) - 1)).astype(np.int64)
    offsets = descriptor & ((1 << offset_bits) - 1)
    return offsets, ((descriptor >> offset_bits) + 1) * 512 - offsets % 512

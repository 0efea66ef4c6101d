"""The auditor of one image: recounts all references and compares them with what the image stores (C1-C9).

Shares no code with the engine that writes images, because an auditor that used what it audits would repeat its
mistakes. Opens neither backing nor data files. What it calls a corruption or a leak is what ``qemu-img check`` does,
and beyond that:

- refcounts of clusters past the end of the file are leaks, if nothing references them (C9);
- metadata that something else references, too, is corrupt even where the refcounts agree with that;
- clusters of a data file that are not at their guest offset (Q77), zero clusters in version 2 (Q38), L1 entries with
  flags but no table, and a promise of bitmaps that are not there (Q16) are corrupt: QEMU fails only when it uses them.

Memory is bounded by :data:`COUNTER_BUDGET` and by the clusters that the file really occupies, time by the data in it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nbdq.errors import CorruptImage, ImageError, printable
from nbdq.qcow2.audit.mappings import L1Table, L2Tables, MappingAudit
from nbdq.qcow2.audit.reference_counts import PAGE, ReferenceCounts, TooManyPages
from nbdq.qcow2.audit.result import CheckResult
from nbdq.qcow2.audit.sparse_tables import refuse_overlaps
from nbdq.qcow2.audit.stored_refcounts import StoredRefcounts
from nbdq.qcow2.bitmaps.directory import iterate_bitmaps
from nbdq.qcow2.entries import Geometry
from nbdq.qcow2.fields import MAX_L1_TABLE
from nbdq.qcow2.format import Autoclear, CryptMethod, Header
from nbdq.qcow2.refcount_widths import max_refcount
from nbdq.qcow2.snapshot_records import SnapshotTable, read_snapshot_table
from nbdq.storage import FileStorage

#: Bytes of reference counters for an image that does not occupy what it claims: some 6 TiB in clusters of 64 KiB.
COUNTER_BUDGET = 96 << 20

_BITMAP_RESERVED = np.uint64(0xFF00_0000_0000_01FE)
_BITMAP_OFFSET = np.uint64(0x00FF_FFFF_FFFF_FE00)
_REFCOUNT_RESERVED = np.uint64(0x1FF)


@dataclass
class Audit:
    """Everything that was learnt, for who mends it."""

    result: CheckResult
    geometry: Geometry
    counts: ReferenceCounts
    """References to each host cluster; those from refcount structures only if they were to be counted."""
    stored: StoredRefcounts
    mappings: MappingAudit
    l1_tables: list[L1Table]
    """Each once; the active one is the first."""
    l2_tables: L2Tables
    snapshots: SnapshotTable
    refcount_order: int
    cluster_count: int
    """Host clusters of the file, and one more if a reference reaches into it."""

    metadata: NDArray[np.int64]
    """First and last cluster of everything that only one thing may reference, but refcount blocks; ascending."""

    def is_metadata(self, clusters: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of ``clusters`` are metadata other than L2 tables."""
        before = np.searchsorted(self.metadata[:, 0], clusters, "right")
        furthest = np.maximum.accumulate(np.concatenate([[-1], self.metadata[:, 1]]))
        return np.asarray((furthest[before] >= clusters) | self.stored.are_blocks(clusters), dtype=np.bool_)

    @property
    def active_l1(self) -> L1Table:
        return self.l1_tables[0]


def check_image(storage: FileStorage, header: Header) -> CheckResult:
    """Audit the image; nothing is written. Keeps no reference to ``storage``.

    Raises:
        CorruptImage: tables overlap so much, or references are so scattered, that checking would take for ever.
        OSError: the file cannot be read.
    """
    return audit_image(storage, header).result


def audit_image(storage: FileStorage, header: Header, *, count_refcounts: bool = True) -> Audit:
    """The same, with all that was counted; without ``count_refcounts`` as if there were no refcount structures.

    Raises:
        CorruptImage, OSError: as :func:`check_image`.
    """
    try:
        return _Auditor(storage, header).audit(count_refcounts=count_refcounts)
    except TooManyPages:
        what = "references are scattered over more host clusters than nbdq has memory to count"
        raise CorruptImage(storage.path, what, "qemu-img check may be able to") from None


class _Auditor:
    def __init__(self, storage: FileStorage, header: Header) -> None:
        self._storage = storage
        self._header = header
        self._size = storage.size()
        self._bits = header.cluster_bits
        self._result = CheckResult(total_clusters=-(-header.guest_size >> self._bits))
        occupied = self._size if storage.is_block_device else min(storage.allocated_size(), self._size)
        self._counts = ReferenceCounts(COUNTER_BUDGET + 2 * (occupied >> self._bits))
        self._metadata: list[tuple[int, int, str]] = []
        """First and last cluster of everything that only one thing may reference, and its name."""

    def audit(self, *, count_refcounts: bool) -> Audit:
        header, result = self._header, self._result
        geometry = Geometry(self._bits, header.extended_l2, header.version, header.has_data_file)
        table = self._read_refcount_table()
        stored = StoredRefcounts(self._storage, table, cluster_bits=self._bits, order=header.refcount_order)
        mappings = MappingAudit(self._storage, geometry, result, self._counts, self._size + header.cluster_size)

        self._count_area(0, header.cluster_size, "the header")
        snapshots = self._check_snapshots()
        active = L1Table(header.l1_table_offset, header.l1_size, "active ", active=True)
        l1_tables = [active, *self._snapshot_l1_tables(snapshots)]
        for l1_table in l1_tables:
            for _ in range(l1_table.weight):
                self._count_area(l1_table.offset, l1_table.size * 8, f"the {l1_table.owner}L1 table")
        l2_tables = mappings.read_l1_tables(l1_tables)
        mappings.read_l2_tables(l2_tables, stored)
        mappings.judge_l1_copied(active, stored)
        if header.crypt_method is CryptMethod.LUKS and header.encryption is None:
            self._result.fail("the image is encrypted, but does not say where its encryption header is")
            self._result.incomplete = True
        if header.encryption:
            self._count_area(header.encryption.offset, header.encryption.length, "the encryption header")
        self._check_bitmaps()
        if count_refcounts:
            self._check_refcount_structures(table, stored)

        cluster_count = max(-(-self._size >> self._bits), self._counts.highest() + 1)
        if count_refcounts:
            self._compare(stored, cluster_count)
            self._find_shared_metadata(stored, l2_tables)
        return Audit(
            result,
            geometry,
            self._counts,
            stored,
            mappings,
            l1_tables,
            l2_tables,
            snapshots,
            header.refcount_order,
            cluster_count,
            np.array(sorted(area[:2] for area in self._metadata), dtype=np.int64).reshape(-1, 2),
        )

    def _count_area(self, offset: int, length: int, name: str) -> None:
        """Count the clusters of a structure that stands alone."""
        if length <= 0:
            return
        if offset + length - self._size >= self._header.cluster_size:
            self._result.past_end_each(1, [f"{name} at {offset:#x}"])
            return
        first, last = offset >> self._bits, offset + length - 1 >> self._bits
        self._counts.add_run(first, last)
        self._metadata.append((first, last, name))

    def _check_snapshots(self) -> SnapshotTable:
        """The snapshot table as far as it can be read (C5)."""
        header, result = self._header, self._result
        table = read_snapshot_table(self._storage, header)
        if table.problem:
            result.fail(f"snapshot table: {table.problem}")
            result.incomplete |= not table.mendable
        if header.has_data_file and table.records:
            result.corrupt(f"{len(table.records)} snapshots in an image with a data file")
        if header.version >= 3:
            short = [number for number, record in enumerate(table.records) if record.is_incomplete]
            result.corrupt_each(len(short), (f"snapshot table entry {number} is incomplete" for number in short))
        self._count_area(header.snapshots_offset, table.length, "the snapshot table")
        return table

    def _snapshot_l1_tables(self, snapshots: SnapshotTable) -> Iterator[L1Table]:
        """The L1 tables that snapshots have, each once (C5, Q63)."""
        tables: Counter[tuple[int, int]] = Counter()
        names: dict[tuple[int, int], str] = {}
        for record in snapshots.records:
            place = record.l1_offset, record.l1_size
            name = f"snapshot {printable(record.id, 20)} '{printable(record.name, 60)}'"
            if record.l1_offset % self._header.cluster_size:
                self._result.corrupt(f"{name}: the L1 table at {record.l1_offset:#x} is not at a cluster")
            elif record.l1_size * 8 > MAX_L1_TABLE:
                self._result.corrupt(f"{name}: the L1 table has {record.l1_size} entries, too many")
            elif record.l1_size:
                tables[place] += 1
                names.setdefault(place, f"{name}: ")
        for (offset, size), weight in tables.items():
            if offset + size * 8 - self._size >= self._header.cluster_size:
                self._result.past_end_each(weight, [f"{names[offset, size]}the L1 table at {offset:#x}"] * weight)
            else:
                yield L1Table(offset, size, names[offset, size], active=False, weight=weight)

    def _check_bitmaps(self) -> None:
        """Directory, tables and data of bitmaps (C7)."""
        header, result = self._header, self._result
        extension = header.bitmaps
        if extension is None:
            if Autoclear.BITMAPS in header.autoclear:
                result.corrupt("autoclear_features promises bitmaps, but there is no bitmaps extension")
            return
        self._count_area(extension.directory_offset, extension.directory_size, "the bitmap directory")
        tables: Counter[tuple[int, int]] = Counter()
        try:
            for bitmap in iterate_bitmaps(self._storage, header):
                tables[bitmap.table_offset, bitmap.table_size] += 1
        except ImageError as error:
            # What an unknown bitmap holds would look like leaks: nothing may be freed (QEMU gives up, too).
            result.corrupt(f"bitmap directory: {error.what}")
            result.fail("the bitmaps could not be checked")
            result.incomplete = True
            return
        places = np.array(list(tables), dtype=np.int64).reshape(-1, 2)
        refuse_overlaps(self._storage.path, "bitmap tables", places[:, 0], places[:, 1] * 8)
        for (offset, size), weight in tables.items():
            for _ in range(weight):
                self._count_area(offset, size * 8, "a bitmap table")
            data = self._storage.read(offset, size * 8)
            entries = np.frombuffer(data[: len(data) // 8 * 8], dtype=">u8").astype(np.uint64)
            entries = entries[entries != 0]
            places_of = (entries & _BITMAP_OFFSET).astype(np.int64)
            wrong = (entries & _BITMAP_RESERVED != 0) | (places_of & (header.cluster_size - 1) != 0)
            wrong |= (places_of != 0) & (entries & np.uint64(1) != 0)
            texts = (f"bitmap table at {offset:#x}: an entry is {int(entry):#x}" for entry in entries[wrong])
            result.corrupt_each(int(wrong.sum()) * weight, texts)
            used = places_of[~wrong & (places_of != 0)]
            outside = used >= self._size
            texts = (f"bitmap data at {int(place):#x}" for place in used[outside])
            result.past_end_each(int(outside.sum()) * weight, texts)
            clusters = used[~outside] >> self._bits
            self._counts.add(clusters, np.full(len(clusters), weight, dtype=np.int64))

    def _read_refcount_table(self) -> NDArray[np.uint64]:
        """The whole table, of 8 MiB at most; what lies past the end of the file reads as zeros."""
        length = self._header.refcount_table_clusters << self._bits
        data = self._storage.read(self._header.refcount_table_offset, length).ljust(length, b"\0")
        return np.frombuffer(data, dtype=">u8").astype(np.uint64)

    def _check_refcount_structures(self, table: NDArray[np.uint64], stored: StoredRefcounts) -> None:
        """The refcount table, and blocks that nothing else may use (C3, C4)."""
        header, result = self._header, self._result
        if not len(table):
            result.corrupt("there is no refcount table", 0)  # what is counted is that every cluster misses its refcount
            result.rebuild_needed = True
        self._count_area(header.refcount_table_offset, len(table) * 8, "the refcount table")
        index = np.flatnonzero(table)
        entry = table[index]
        reserved = entry & _REFCOUNT_RESERVED != 0
        unaligned = ~reserved & (entry & np.uint64(header.cluster_size - 1) != 0)
        limit = max(-(-self._size >> self._bits), self._counts.highest() + 1) << self._bits
        outside = ~reserved & ~unaligned & (entry >= np.uint64(limit))
        sound = ~(reserved | unaligned | outside)
        clusters = (entry[sound] >> np.uint64(self._bits)).astype(np.int64)
        order = np.argsort(clusters, kind="stable")
        repeated = np.zeros(len(clusters), dtype=bool)
        repeated[order[1:]] = np.diff(clusters[order]) == 0
        shared = repeated | (self._counts.of(clusters) != 0)
        in_use = np.zeros(len(index), dtype=bool)
        in_use[sound] = shared
        for wrong, what in (
            (reserved, "has reserved bits set"),
            (unaligned, "is not at a cluster"),
            (outside, "is past the end of the file"),
            (in_use, "is also used for something else"),
        ):
            texts = (
                f"refcount block {int(i)} at {int(e):#x} {what}"
                for i, e in zip(index[wrong], entry[wrong], strict=True)
            )
            result.corrupt_each(int(wrong.sum()), texts)
        result.rebuild_needed |= bool((reserved | unaligned | outside | in_use).any())
        refuse_overlaps(self._storage.path, "refcount blocks", clusters << self._bits, header.cluster_size)
        self._counts.add(clusters)

    def _compare(self, stored: StoredRefcounts, cluster_count: int) -> None:
        """Counted references against stored refcounts (C1)."""
        result, most = self._result, np.uint64(max_refcount(self._header.refcount_order))
        highest = -1
        for block in stored.misplaced.tolist():
            first = block * stored.block_count
            unknown = min(cluster_count - first, stored.block_count)
            if unknown > 0:
                result.fail(f"the refcounts of {unknown} clusters from cluster {first} on cannot be read", unknown)
        for number in sorted({*stored.pages(), *self._counts.pages()}):
            refcounts, references = stored.page(number).astype(np.uint64), self._counts.page(number)
            if result.cut_off:
                refcounts[max(cluster_count - number * PAGE, 0) :] = 0
            used = np.flatnonzero(refcounts | references)
            if used.size:
                highest = number * PAGE + int(used[-1])
            wrong = np.flatnonzero(refcounts != references)
            if not wrong.size:
                continue
            wrong = wrong[stored.are_known(wrong + number * PAGE)]
            refcounts, references = refcounts[wrong], references[wrong]
            wrong = wrong + number * PAGE
            result.rebuild_needed |= bool(((refcounts == 0) & (references > 0)).any())
            over = references > most  # each reference too many is one (Q31)
            result.corrupt_each(
                int((references[over] - most).sum()),
                (
                    f"cluster {c} has {r} references, too many for its refcount"
                    for c, r in _pairs(wrong, references, over)
                ),
            )
            references = np.minimum(references, most)
            low = refcounts < references
            result.corrupt_each(int(low.sum()), _mismatches("cluster", wrong, refcounts, references, low))
            leaked, outside = refcounts > references, wrong >= cluster_count
            for name, chosen in (("leaked", leaked & ~outside), ("leaked outside of the file:", leaked & outside)):
                texts = _mismatches(f"{name} cluster", wrong, refcounts, references, chosen)
                result.leak_each(int(chosen.sum()), texts)
        result.image_end_offset = (highest + 1) << self._bits

    def _find_shared_metadata(self, stored: StoredRefcounts, tables: L2Tables) -> None:
        """Metadata that is something else too, and whose refcount hides that by being as high."""
        for first, last, name in self._metadata:
            for begin in range(first, last + 1, PAGE):
                clusters = np.arange(begin, min(begin + PAGE, last + 1))
                counted = self._counts.of(clusters)
                hidden = (counted > 1) & (counted == stored.of(clusters).astype(np.int64))
                texts = (f"{name} shares cluster {int(cluster)} with something else" for cluster in clusters[hidden])
                self._result.corrupt_each(int(hidden.sum()), texts)
        aligned = tables.offsets & (self._header.cluster_size - 1) == 0
        inside = np.flatnonzero(aligned & (tables.offsets < self._size))
        for begin in range(0, len(inside), PAGE):
            chosen = inside[begin : begin + PAGE]
            clusters = tables.offsets[chosen] >> self._bits
            counted = self._counts.of(clusters)
            hidden = (counted > tables.references[chosen]) & (counted == stored.of(clusters).astype(np.int64))
            texts = (f"the L2 table in cluster {int(cluster)} is also used otherwise" for cluster in clusters[hidden])
            self._result.corrupt_each(int(hidden.sum()), texts)


def _pairs(
    clusters: NDArray[np.int64], values: NDArray[np.uint64], chosen: NDArray[np.bool_]
) -> Iterator[tuple[int, int]]:
    for place in np.flatnonzero(chosen).tolist():
        yield int(clusters[place]), int(values[place])


def _mismatches(
    name: str,
    clusters: NDArray[np.int64],
    refcounts: NDArray[np.uint64],
    references: NDArray[np.uint64],
    chosen: NDArray[np.bool_],
) -> Iterator[str]:
    for place in np.flatnonzero(chosen).tolist():
        yield f"{name} {int(clusters[place])}: refcount={int(refcounts[place])} references={int(references[place])}"

"""Mending what an audit found, as far as ``qemu-img check -r`` does (C10), in an order that no crash makes worse.

Host clusters are never reused: new structures go behind the end of the file, are durable before one write of 24 bytes
in the first sector switches to them (R-54), and only then does the old space become free. Entries of tables are
changed in place, each by one aligned write of 8 bytes that a crash either shows or does not.
"""

import errno
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial

import numpy as np
from numpy.typing import NDArray

from nbdq.errors import CorruptImage
from nbdq.qcow2.audit.check import Audit, audit_image, check_image
from nbdq.qcow2.audit.damaged_header import TABLES, TABLES_OFFSET, read_header_to_check
from nbdq.qcow2.audit.mappings import COPIED, L1_PIECE, OFFSET_MASK, ZERO, L1Table, L2Batch, copied_mismatches_l1
from nbdq.qcow2.audit.reference_counts import PAGE, PAGE_BITS, ReferenceCounts
from nbdq.qcow2.audit.result import CheckResult
from nbdq.qcow2.features import Autoclear, Incompatible
from nbdq.qcow2.fields import MAX_REFCOUNT_TABLE
from nbdq.qcow2.format import Header
from nbdq.qcow2.refcount_widths import max_refcount, pack
from nbdq.qcow2.snapshot_records import SnapshotRecord, pack_snapshot_table
from nbdq.storage import FileStorage

#: The feature fields of a version 3 header, written together (Q11).
_FEATURES_OFFSET = 72
_KNOWN_AUTOCLEAR = int(Autoclear.BITMAPS | Autoclear.DATA_FILE_RAW)
_SUBCLUSTERS_ALLOCATED = np.uint64(0xFFFF_FFFF)


class Repair(Enum):
    """What may be mended, in qemu-img's words."""

    LEAKS = "leaks"
    """Refcounts that are too high, which loses nothing whatever the reason."""
    ALL = "all"


@dataclass(frozen=True)
class Repaired:
    """What became of it."""

    result: CheckResult
    """Of a second check."""
    corruptions_fixed: int
    leaks_fixed: int


def repair_image(storage: FileStorage, header: Header, what: Repair) -> Repaired:
    """Mend the image, then check it again; the dirty and corrupt bits go when nothing is corrupt any more.

    ``header`` is what :func:`~nbdq.qcow2.audit.damaged_header.read_header_to_check` read, and out of date afterwards.
    Nothing is changed if not all references can be counted, or, for leaks alone, if the refcounts need a rebuild.

    Raises:
        CorruptImage: the image cannot be checked, or no refcount table could describe it.
        OSError: it cannot be read or written; ENOSPC for a block device without room at its end.
    """
    audit = audit_image(storage, header)
    before = audit.result
    if before.incomplete or (what is Repair.LEAKS and (before.rebuild_needed or before.check_errors)):
        if before.rebuild_needed:
            before.fail("the refcount structures need to be rebuilt: -r all does so")
        return Repaired(before, 0, 0)
    after, copied_fixed = before, 0
    if not before.is_clean:
        if what is Repair.ALL:
            header, copied_fixed = _mend_all(storage, header, audit)
        else:
            copied_fixed = _mend_leaks(storage, header, audit)
        after = check_image(storage, header)
    _mend_features(storage, header, sound=not after.corruptions and not after.check_errors)
    # Like QEMU: a COPIED bit that is right as soon as the refcount is was not wrong.
    corruptions = (before.corruptions - before.copied_errors) - (after.corruptions - after.copied_errors)
    return Repaired(after, max(corruptions, 0) + copied_fixed, max(before.leaks - after.leaks, 0))


def repair_dirty(storage: FileStorage, header: Header) -> Header:
    """Make an image writable that was not closed: refcounts, then the bit (Q32, V25). Returns the new header.

    Raises:
        CorruptImage: it cannot be mended, and keeps its dirty bit.
        OSError: as :func:`repair_image`.
    """
    repaired = repair_image(storage, header, Repair.ALL)
    if repaired.result.corruptions or repaired.result.check_errors:
        what = f"is dirty, and has {repaired.result.corruptions} errors that cannot be repaired"
        raise CorruptImage(storage.path, what, "see nbdq check; the image can still be read")
    return read_header_to_check(storage)


def _mend_all(storage: FileStorage, header: Header, audit: Audit) -> tuple[Header, int]:
    punch = _may_punch(audit.result)
    if Autoclear.BITMAPS in header.autoclear and header.bitmaps is None:
        header = replace(header, autoclear=header.autoclear & ~Autoclear.BITMAPS)
        _write_features(storage, header)
    if _mend_entries(storage, header, audit):
        storage.sync()
        audit = audit_image(storage, header)
    snapshots = _mended_snapshots(header, audit)
    if audit.result.rebuild_needed or snapshots is not None:
        header = _rebuild_refcounts(storage, header, snapshots)
        audit = audit_image(storage, header)
    _mend_refcounts(storage, audit, Repair.ALL, punch=punch)
    return header, _mend_copied(storage, audit)


def _mend_leaks(storage: FileStorage, header: Header, audit: Audit) -> int:
    _mend_refcounts(storage, audit, Repair.LEAKS, punch=_may_punch(audit.result))
    between = check_image(storage, header)
    # What was shared by mistake is not so any more; but COPIED is believed only where all refcounts can be.
    if between.leaks or between.check_errors or between.corruptions > between.copied_errors:
        return 0
    return _mend_copied(storage, audit)


def _may_punch(found: CheckResult) -> bool:
    """Where anything is corrupt, what looks leaked may be what is missed elsewhere, and be wanted back one day."""
    return found.corruptions == found.copied_errors


def _mend_refcounts(storage: FileStorage, audit: Audit, what: Repair, *, punch: bool) -> None:
    """Set the refcounts that have a block, as far as ``what`` allows, and make that durable.

    Then ``punch`` the clusters that are free now, which gives their space back.
    """
    most = np.uint64(max_refcount(audit.refcount_order))
    freed: list[tuple[int, int]] = []
    for number in sorted({*audit.stored.pages(), *audit.counts.pages()}):
        stored = audit.stored.page(number).astype(np.uint64)
        wanted = np.minimum(audit.counts.page(number), most)
        if audit.result.cut_off:
            past_end = max(audit.cluster_count - number * PAGE, 0)
            wanted[past_end:] = stored[past_end:]
        if what is Repair.LEAKS:
            wanted = np.minimum(wanted, stored)
        if not np.array_equal(stored, wanted):
            audit.stored.replace_page(number, wanted)
            gone = np.flatnonzero((wanted == 0) & (stored > 0))
            gone = gone[gone + number * PAGE < audit.cluster_count]
            freed += [(number * PAGE + first, count) for first, count in _runs(gone)]
    storage.sync()
    bits = audit.geometry.cluster_bits
    for first, count in freed if punch else ():
        storage.punch(first << bits, count << bits)


def _runs(places: NDArray[np.int64]) -> list[tuple[int, int]]:
    """First and length of each stretch of consecutive numbers."""
    if not places.size:
        return []
    edges = np.flatnonzero(np.diff(places) != 1) + 1
    starts = np.concatenate([[0], edges])
    return list(zip(places[starts].tolist(), np.diff(np.append(starts, len(places))).tolist(), strict=True))


def _mend_copied(storage: FileStorage, audit: Audit) -> int:
    """Let COPIED say in the active tables whether the refcount is 1 (C2), after refcounts are right and durable.

    Returns how many bits were wrong.
    """
    table, bits = audit.active_l1, audit.geometry.cluster_bits
    fixed = 0
    for index, entry, refcount in copied_mismatches_l1(storage, table, audit.stored, bits):
        if not _stands_alone(audit, table):
            break
        right = _without_overflow(audit, (entry & OFFSET_MASK).astype(np.int64) >> bits, refcount)
        _write_l1_entries(storage, table, index[right], entry[right] ^ COPIED)
        fixed += int(right.sum())
    for rows, words in audit.mappings.batches(audit.l2_tables):
        batch = L2Batch(words, audit.l2_tables, rows, audit.geometry)
        places, refcount = batch.copied_mismatches(audit.stored)
        if not audit.geometry.has_data_file:
            places = places[_without_overflow(audit, batch.host[places] >> bits, refcount)]
        fixed += _write_entries(storage, audit, rows, words, batch, places, batch.entry[places] ^ COPIED)
    storage.sync()
    return fixed


def _without_overflow(audit: Audit, clusters: NDArray[np.int64], refcount: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """A refcount of 1 that could not be higher does not make a cluster ours alone (Q31)."""
    return np.asarray((refcount != 1) | (audit.counts.of(clusters) == 1), dtype=np.bool_)


def _mend_entries(storage: FileStorage, header: Header, audit: Audit) -> bool:
    """Clear what has no meaning in entries without a mapping: nothing that the guest reads depends on it.

    Misplaced host clusters of preallocated zeros, as in QEMU; COPIED on compressed clusters and flags of L1 entries
    without a table, which QEMU leaves.
    """
    changed = 0
    for rows, words in audit.mappings.batches(audit.l2_tables):
        batch = L2Batch(words, audit.l2_tables, rows, audit.geometry)
        places = np.flatnonzero(batch.compressed & (batch.entry & COPIED != 0))
        changed += _write_entries(storage, audit, rows, words, batch, places, batch.entry[places] ^ COPIED)
        misplaced = batch.placed & (batch.host & (header.cluster_size - 1) != 0)
        if header.extended_l2:
            places = np.flatnonzero(misplaced & (batch.bitmap & _SUBCLUSTERS_ALLOCATED == 0))
            cleared = np.zeros(len(places), dtype=np.uint64)
        else:
            places = np.flatnonzero(misplaced & (batch.entry & ZERO != 0) & np.bool_(header.version >= 3))
            cleared = np.full(len(places), ZERO)
        changed += _write_entries(storage, audit, rows, words, batch, places, cleared)
    for table in filter(partial(_stands_alone, audit), audit.l1_tables):
        for begin in range(0, table.size, L1_PIECE):
            data = storage.read(table.offset + begin * 8, min(L1_PIECE, table.size - begin) * 8)
            entries = np.frombuffer(data[: len(data) // 8 * 8], dtype=">u8").astype(np.uint64)
            empty = np.flatnonzero((entries != 0) & (entries & OFFSET_MASK == 0))
            _write_l1_entries(storage, table, empty + begin, np.zeros(len(empty), dtype=np.uint64))
            changed += len(empty)
    return changed > 0


def _stands_alone(audit: Audit, table: L1Table) -> bool:
    """Whether nothing else is in the clusters of an L1 table, so that writing its entries spoils nothing."""
    bits = audit.geometry.cluster_bits
    clusters = np.arange(table.offset >> bits, (table.offset + table.size * 8 - 1 >> bits) + 1)
    return bool((audit.counts.of(clusters) == table.weight).all())


def _write_l1_entries(
    storage: FileStorage, table: L1Table, index: NDArray[np.int64], values: NDArray[np.uint64]
) -> None:
    """Write new entries, whose ascending indices are at most ``L1_PIECE`` apart, and what is between them again."""
    if not index.size:
        return
    first, last = int(index[0]), int(index[-1])
    data = storage.read(table.offset + first * 8, (last + 1 - first) * 8)
    entries = np.frombuffer(data, dtype=">u8").copy()
    entries[index - first] = values
    storage.write(table.offset + first * 8, entries.tobytes())


def _write_entries(
    storage: FileStorage,
    audit: Audit,
    rows: NDArray[np.int64],
    words: NDArray[np.uint64],
    batch: L2Batch,
    places: NDArray[np.int64],
    values: NDArray[np.uint64],
) -> int:
    """Write new first words of the entries at ``places`` of a batch, in stretches of a table; return how many.

    A table that is not at a cluster, or in one with other metadata, is left alone: writing could spoil more.
    """
    if not places.size:
        return 0
    row = batch.row(places)
    offsets = audit.l2_tables.offsets[rows]
    sound = offsets & (audit.geometry.cluster_size - 1) == 0
    sound &= ~audit.is_metadata(offsets >> audit.geometry.cluster_bits)
    places, values, row = places[sound[row]], values[sound[row]], row[sound[row]]
    column = batch.index(places) % audit.geometry.l2_count * (audit.geometry.entry_size // 8)
    words[row, column] = values
    batch.entry[places] = values
    for number in np.unique(row).tolist():
        changed = column[row == number]
        first, last = int(changed.min()), int(changed.max())
        storage.write(int(offsets[number]) + first * 8, words[number, first : last + 1].astype(">u8").tobytes())
    return len(places)


def _mended_snapshots(header: Header, audit: Audit) -> tuple[SnapshotRecord, ...] | None:
    """The records of a new snapshot table; None if the old one will do (Q59, Q60)."""
    records = audit.snapshots.records
    if header.version >= 3 and any(record.is_incomplete for record in records):
        return tuple(record.completed(header.guest_size) for record in records)
    return records if audit.snapshots.problem else None


def _rebuild_refcounts(storage: FileStorage, header: Header, snapshots: tuple[SnapshotRecord, ...] | None) -> Header:
    """Write refcount table and blocks anew behind everything, and the snapshot table too, then switch to them."""
    audit = audit_image(storage, header, count_refcounts=False)
    if audit.result.cut_off:  # it may come back; until then its place must not be taken
        what = "the refcounts need a rebuild, for which there is no place: entries point past the end of the file"
        raise CorruptImage(storage.path, what, "restore the image from a copy")
    counts, bits = audit.counts, header.cluster_bits
    packed = b"" if snapshots is None else pack_snapshot_table(snapshots)
    snapshot_clusters = -(-len(packed) >> bits)
    if storage.is_block_device:  # it cannot grow; the old structures stay whole until the switch
        table_end = (header.refcount_table_offset >> bits) + header.refcount_table_clusters
        start = max(counts.highest() + 1, audit.stored.highest_block() + 1, table_end)
    else:
        start = audit.cluster_count

    per_block = audit.stored.block_count
    used: set[int] = set()
    for number in counts.pages():
        clusters = np.flatnonzero(counts.page(number)) + number * PAGE
        used.update(np.unique(clusters // per_block).tolist())
    total = snapshot_clusters
    while True:  # the structures describe themselves, so they grow until that fits
        blocks = sorted(used | set(range(start // per_block, (start + max(total, 1) - 1) // per_block + 1)))
        table_clusters = -(-(blocks[-1] + 1) * 8 >> bits)
        needed = snapshot_clusters + table_clusters + len(blocks)
        if needed == total:
            break
        total = needed
    if table_clusters << bits > MAX_REFCOUNT_TABLE:
        what = f"refcounts of {start + total} clusters need a table larger than {MAX_REFCOUNT_TABLE} bytes"
        raise CorruptImage(storage.path, what, "convert the image to a new one")
    if storage.is_block_device and (start + total) << bits > storage.size():
        raise OSError(errno.ENOSPC, f"new refcount structures need {total} clusters at the end", storage.path)
    counts.add_run(start, start + total - 1)

    table_offset = (start + snapshot_clusters) << bits
    table = np.zeros(table_clusters << bits - 3, dtype=">u8")
    block_offset = table_offset + (table_clusters << bits)
    most = max_refcount(header.refcount_order)
    for block in blocks:
        table[block] = block_offset
        _write_block(storage, counts, block * per_block, per_block, block_offset, header.refcount_order, most)
        block_offset += header.cluster_size
    storage.write(table_offset, table.tobytes())
    if packed:
        storage.write(start << bits, packed.ljust(snapshot_clusters << bits, b"\0"))
    storage.sync()

    header = replace(header, refcount_table_offset=table_offset, refcount_table_clusters=table_clusters)
    if snapshots is not None:
        header = replace(header, snapshot_count=len(snapshots), snapshots_offset=start << bits if packed else 0)
    pointers = TABLES.pack(table_offset, table_clusters, header.snapshot_count, header.snapshots_offset)
    storage.write(TABLES_OFFSET, pointers)
    storage.sync()
    return header


def _write_block(
    storage: FileStorage, counts: ReferenceCounts, first: int, count: int, offset: int, order: int, most: int
) -> None:
    """Write the refcounts of ``count`` clusters from ``first`` on, in pieces that fit in memory."""
    for begin in range(first, first + count, PAGE):
        skip = begin & PAGE - 1
        refcounts = counts.page(begin >> PAGE_BITS)[skip : skip + min(count, PAGE)]
        storage.write(offset + (begin - first << order >> 3), pack(np.minimum(refcounts, np.uint64(most)), order))


def _mend_features(storage: FileStorage, header: Header, *, sound: bool) -> None:
    """Clear what is not true any more: unknown autoclear bits (Q15), dirty and corrupt if the image is ``sound``."""
    if header.version < 3:
        return
    autoclear = Autoclear(int(header.autoclear) & _KNOWN_AUTOCLEAR)
    incompatible = header.incompatible & ~(Incompatible.DIRTY | Incompatible.CORRUPT) if sound else header.incompatible
    if (autoclear, incompatible) != (header.autoclear, header.incompatible):
        _write_features(storage, replace(header, autoclear=autoclear, incompatible=incompatible))


def _write_features(storage: FileStorage, header: Header) -> None:
    features = (header.incompatible, header.compatible, header.autoclear)
    storage.write(_FEATURES_OFFSET, b"".join(int(field).to_bytes(8, "big") for field in features))
    storage.sync()

"""Internal snapshots of a disk that is being served: made, deleted, and returned to (3.11, 4.5, R-56).

Each of the three is one :class:`~nbdq.qcow2.writing.switch.Switch`: atomic, with flags and refcounts that agree before
and after it. What a switch does *not* touch are the tables of existing snapshots. A new snapshot takes over the L1 and
L2 tables that the disk has had so far, as they are; the disk gets copies, without COPIED, of those that had any flag
set, so that its next write to a shared cluster goes elsewhere, and shares the others. So who reads a snapshot from the
file need not know of anything that happens to the disk, or to other snapshots.

Costs are those of reading all L2 tables two or three times and of writing those that change, and all refcount blocks:
vector operations, and some 15 bytes of memory for each cluster of the file.
"""

import errno
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from nbdq.errors import CorruptImage, NotFound, OperationError, printable
from nbdq.qcow2.entries import COPIED, OFFSET_MASK
from nbdq.qcow2.fields import MAX_SNAPSHOTS, l1_entries
from nbdq.qcow2.format import Header
from nbdq.qcow2.snapshot_records import SnapshotRecord, SnapshotTable, pack_snapshot_table, read_snapshot_table
from nbdq.qcow2.snapshots import MAX_SNAPSHOT_TABLE, Snapshot, check_snapshot, read_snapshots
from nbdq.qcow2.writing.references import State, Tally, Words
from nbdq.qcow2.writing.switch import Counts, Switch, enough_memory, metadata_of, reclaim, switching
from nbdq.qcow2.writing.tables import OFFSET_ORDER, Table
from nbdq.qcow2.writing.writable import WritableImage

Flags = NDArray[np.bool_]

#: Bytes of a name: what QEMU has room for.
_MAX_NAME = 255
_COPIED = np.uint64(COPIED)


def prepare_snapshot(image: WritableImage) -> None:
    """Write out, and bring into the page cache, what :func:`create_snapshot` would have to wait for. Requests may be in
    progress; what it finds then needs less time.

    Raises:
        OSError: as :meth:`WritableImage.flush`, or a table cannot be read.
    """
    image.flush()
    with image.lock:
        l1, blocks = image.mapping.l1.values & np.uint64(OFFSET_MASK), image.refcounts.block_offsets()
    for offset in (*l1[l1 != 0].tolist(), *blocks.tolist()):
        image.storage.read(offset, image.cluster_size)


def create_snapshot(
    image: WritableImage, name: str, *, date_seconds: int, date_nanoseconds: int, vm_clock_ns: int = 0
) -> Snapshot:
    """Keep what the disk holds now as a snapshot; names may repeat, ids do not. Durable on return.

    The caller has drained the disk: no request is under way, for a write in place would still reach what the snapshot
    holds. All that was answered before the call is in the snapshot, and nothing else.

    Raises:
        OperationError: the image has an external data file, the name is impossible, or there are too many snapshots.
        OSError: EFBIG if refcounts are too narrow (Q31), ENOSPC, EIO if tables or refcounts are corrupt; nothing has
            changed then, unless the medium has failed for good.
    """
    _refuse_data_file(image)
    try:
        raw_name = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raw_name = b""
    if not 0 < len(raw_name) <= _MAX_NAME or b"\0" in raw_name:
        raise OperationError(f"a snapshot's name has 1 to {_MAX_NAME} bytes of UTF-8, and no NUL")

    def change(switch: Switch) -> None:
        table = _snapshot_table(image)
        record = SnapshotRecord.of_disk(
            id=_next_id(table.records),
            name=name,
            l1_offset=image.header.l1_table_offset,
            l1_size=image.header.l1_size,
            disk_size=image.size,
            date_seconds=date_seconds,
            date_nanoseconds=date_nanoseconds,
            vm_clock_ns=vm_clock_ns,
        )
        disk = _disk(image, switch)
        named, flagged = _tally(disk, switch.metadata)
        named.add(disk.clusters[~flagged])
        _check_counted(named.counts, switch)
        counts = _raised(image, switch.counts, named)
        places = _rewrite(switch, disk, flagged, disk.clear_flags)
        l1 = _write_l1(switch, disk.indexes, places, own=flagged, l1_size=image.header.l1_size)
        header = _write_snapshot_table(image, switch, table, [*table.records, record])
        switch.make(counts, replace(header, l1_table_offset=l1.offset))
        image.mapping.l1 = l1
        for l1_index, loaded in image.mapping.tables.items():
            disk.clear_flags(loaded.values[np.newaxis])
            loaded.offset = l1.words[l1_index] & OFFSET_MASK
            loaded.is_own = loaded.is_own and bool(l1.words[l1_index] & COPIED)

    switching(image, change, drained=True)
    return read_snapshots(image.storage, image.header)[-1]


def delete_snapshot(image: WritableImage, snapshot: Snapshot) -> None:
    """Forget a snapshot, which nobody reads, and free what only it held. Requests may be in progress.

    Durable on return is that the snapshot is gone. Its space can be used again; that it is free is durable with the
    next flush, and before that a crash leaves leaks.

    Raises:
        NotFound: there is no such snapshot any more.
        ImageError: its L1 table is unusable.
        OperationError, OSError: as :func:`create_snapshot`.
    """
    _refuse_data_file(image)
    _position(image, snapshot)
    with enough_memory(image):  # what the snapshot holds does not change: it can be counted while others go on
        with image.lock:
            metadata = metadata_of(image)
        past = _past(image, metadata, snapshot, snapshot.l1_size)
        lost, _ = _tally(past, metadata)
        lost.add(past.clusters)

    def change(switch: Switch) -> NDArray[np.uint64]:
        table = _snapshot_table(image)
        position = _position(image, snapshot)
        disk = _disk(image, switch)
        lost.extend(len(switch.counts))  # the file may have grown
        named, _ = _tally(disk, switch.metadata)
        named.add(disk.clusters)
        _check_counted(named.counts + lost.counts, switch)
        counts = switch.counts - lost.counts.astype(switch.counts.dtype)
        # What disk and snapshot shared, and nobody else, is the disk's own now. QEMU sets the flags, too; without them
        # every cluster would be copied once more for nothing.
        alone = (counts == 1) & (lost.counts != 0) & (named.counts != 0)
        own = alone[disk.clusters.astype(np.intp)] | ((image.mapping.l1.values[disk.indexes] & _COPIED) != 0)
        flagged = np.zeros(len(own), dtype=np.bool_)
        for part, words in disk.tables():
            flagged[part] = own[part] & disk.set_flags(words, alone)
        places = _rewrite(switch, disk, flagged, lambda words: disk.set_flags(words, alone))
        l1 = _write_l1(switch, disk.indexes, places, own=own, l1_size=image.header.l1_size)
        tables, unused = _unnamed(image, past.clusters, counts), _keep_unused(counts, lost)
        kept = [record for number, record in enumerate(table.records) if number != position]
        header = _write_snapshot_table(image, switch, table, kept)
        switch.abandon(image.header.l1_table_offset, image.header.l1_size * 8)
        switch.abandon(snapshot.l1_offset, snapshot.l1_size * 8)
        for offset in disk.offsets[flagged].tolist():
            switch.abandon(offset, image.cluster_size)
        switch.make(counts, replace(header, l1_table_offset=l1.offset))
        image.mapping.l1 = l1
        for l1_index in disk.indexes[flagged].tolist():
            if (loaded := image.mapping.tables.get(l1_index)) is not None:
                loaded.offset = l1.words[l1_index] & OFFSET_MASK
                disk.set_flags(loaded.values[np.newaxis], alone)
        return _let_go(image, tables, unused)

    reclaim(image, switching(image, change, drained=False))


def apply_snapshot(image: WritableImage, snapshot: Snapshot) -> NDArray[np.uint64]:
    """Let the disk hold, and be as large as, what ``snapshot`` says; what it held before is lost. Durable on return.

    The caller has drained the disk, and has its devices notice the new size. The state of a machine that the snapshot
    may hold stays with it.

    Returns:
        The host clusters that nothing names any more, for :func:`~nbdq.qcow2.writing.switch.reclaim`.

    Raises:
        OperationError: there are dirty bitmaps, which would miss what changes; an external data file; or another size
            in an image of version 2, which cannot hold that of other snapshots.
        NotFound, ImageError, OSError: as :func:`delete_snapshot`.
    """
    _refuse_data_file(image)
    if image.header.bitmaps is not None or (image.bitmaps is not None and not image.bitmaps.is_empty):
        raise OperationError("the disk has active dirty bitmaps, which would not notice what changes; remove them")
    size = image.header.size if snapshot.disk_size is None else snapshot.disk_size
    if image.header.version < 3 and size != image.header.size:
        raise OperationError("the disk had another size then, and images of version 2 with snapshots cannot be resized")
    _end_quarantine(image)

    def change(switch: Switch) -> NDArray[np.uint64]:
        _position(image, snapshot)
        geometry = image.geometry
        l1_size = l1_entries(size, cluster_bits=geometry.cluster_bits, extended_l2=geometry.extended_l2)
        disk, past = _disk(image, switch), _past(image, switch.metadata, snapshot, l1_size)
        lost, _ = _tally(disk, switch.metadata)
        lost.add(disk.clusters)
        named, flagged = _tally(past, switch.metadata)
        named.add(past.clusters[~flagged])
        _check_counted(named.counts + lost.counts, switch)
        counts = _raised(image, switch.counts - lost.counts.astype(switch.counts.dtype), named)
        places = _rewrite(switch, past, flagged, past.clear_flags)
        l1 = _write_l1(switch, past.indexes, places, own=flagged, l1_size=l1_size)
        tables, unused = _unnamed(image, disk.clusters, counts), _keep_unused(counts, lost)
        switch.abandon(image.header.l1_table_offset, image.header.l1_size * 8)
        switch.make(counts, replace(image.header, l1_table_offset=l1.offset, l1_size=l1_size, size=size))
        image.mapping.l1 = l1
        image.mapping.tables.clear()
        image.size = image.header.guest_size
        if image.bitmaps is not None:
            image.bitmaps.resize(image.size)
        return _let_go(image, tables, unused)

    return switching(image, change, drained=True)


def _refuse_data_file(image: WritableImage) -> None:
    if image.geometry.has_data_file:
        raise OperationError("an image with an external data file has no snapshots: its data is not counted (Q29)")


def _end_quarantine(image: WritableImage) -> None:
    """Let go of all that was freed: a reference that is only waiting for its end would make flags inexact, if the disk
    came to name the same cluster again.

    Raises:
        OSError: EBUSY if somebody holds on to it; else as :meth:`WritableImage.flush`.
    """
    while waiting := image.allocator.waiting:
        image.flush()
        if image.allocator.waiting >= waiting:
            raise OSError(errno.EBUSY, "another operation on the disk still holds what was freed", image.path)


# States of the image.


def _disk(image: WritableImage, switch: Switch) -> State:
    """What the disk is now."""
    return State(image.storage, image.geometry, image.mapping.l1.values, file_clusters=len(switch.counts))


def _past(image: WritableImage, metadata: Flags, snapshot: Snapshot, l1_size: int) -> State:
    """What the disk was, to the end of an L1 table of ``l1_size`` entries; ``metadata`` is by cluster of the file."""
    check_snapshot(image.storage, image.header, snapshot)
    data = image.storage.read(snapshot.l1_offset, snapshot.l1_size * 8)
    l1 = np.zeros(l1_size, dtype=np.uint64)
    entries = np.frombuffer(data, dtype=">u8")[:l1_size]
    l1[: len(entries)] = entries
    return State(image.storage, image.geometry, l1, file_clusters=len(metadata))


def _tally(state: State, metadata: Flags) -> tuple[Tally, Flags]:
    """What the L2 tables of a state name, and which of them have COPIED anywhere.

    Raises:
        OSError: EIO if an entry is corrupt, or names metadata.
    """
    tally, flagged = Tally(len(metadata)), np.zeros(len(state.indexes), dtype=np.bool_)
    for part, words in state.tables():
        clusters = state.named(words)
        if metadata[clusters.astype(np.intp)].any():
            raise state.corrupt("an L2 entry names a cluster of metadata")
        tally.add(clusters)
        flagged[part] = state.clear_flags(words)
    return tally, flagged


# Counts.


def _check_counted(named: NDArray[np.uint16], switch: Switch) -> None:
    """Refuse to go on where refcounts lie: what they hide would be freed while it is in use (R-28)."""
    if (named > switch.counts).any():
        raise OSError(errno.EIO, "refcounts are lower than references; see nbdq check -r all", switch.path)


def _raised(image: WritableImage, counts: Counts, named: Tally) -> Counts:
    maximum = image.refcounts.maximum
    if (named.counts > maximum - counts).any():
        raise image.refcounts.too_many_references()
    raised: Counts = counts + named.counts.astype(counts.dtype)
    return raised


def _keep_unused(counts: Counts, lost: Tally) -> NDArray[np.intp]:
    """The clusters that have lost their last reference; ``counts`` leaves them one, until they are reclaimed."""
    unused = np.flatnonzero((counts == 0) & (lost.counts != 0))
    counts[unused] = 1
    return unused


def _unnamed(image: WritableImage, tables: Words, counts: Counts) -> list[int]:
    """Those of the L2 ``tables`` that no state names any more: what references they have are waiting for their end."""
    waiting = image.allocator.waiting_of(tables)
    named = counts[tables.astype(np.intp)].astype(np.int64) > waiting
    found: list[int] = tables[~named].tolist()
    return found


def _let_go(image: WritableImage, tables: Sequence[int], unused: NDArray[np.intp]) -> NDArray[np.uint64]:
    """Tables that nobody names are no metadata any longer; the clusters that can be reclaimed, by number."""
    for cluster in tables:
        image.protected.remove(cluster, 1)
    image.packing = 0  # the next compressed cluster could follow one that is free soon
    return unused.astype(np.uint64)


# New tables.


def _rewrite(switch: Switch, state: State, chosen: Flags, change: Callable[[Words], object]) -> Words:
    """Write changed copies of the ``chosen`` L2 tables of a state; where all its tables are now."""
    offsets = switch.clusters(int(chosen.sum()))
    for part, words in state.tables(np.flatnonzero(chosen)):
        change(words)
        edges = np.flatnonzero(np.diff(offsets[part]) != switch.cluster_size) + 1
        for first, tables in zip(offsets[part][[0, *edges]].tolist(), np.split(words, edges), strict=True):
            switch.write(first, tables.astype(">u8").tobytes())
    places = state.offsets.copy()
    places[chosen] = offsets
    return places


def _write_l1(switch: Switch, indexes: NDArray[np.intp], places: Words, *, own: Flags, l1_size: int) -> Table:
    """Write an L1 table; COPIED where tables are ``own``."""
    values = np.zeros(l1_size, dtype=np.uint64)
    values[indexes] = places | np.where(own, _COPIED, np.uint64(0))
    offset = 0
    if l1_size:
        offset = switch.area(values.nbytes)
        switch.write(offset, values.astype(">u8").tobytes())
    return Table(offset, values, OFFSET_ORDER, is_new=False)


# The snapshot table.


def _snapshot_table(image: WritableImage) -> SnapshotTable:
    """The records as they are, with extra data that nobody knows (Q59)."""
    table = read_snapshot_table(image.storage, image.header)
    if table.problem:
        raise CorruptImage(image.path, f"the snapshot table: {table.problem}", "repair it with nbdq check -r all")
    return table


def _position(image: WritableImage, snapshot: Snapshot) -> int:
    """Where in the table ``snapshot`` is."""
    for position, present in enumerate(read_snapshots(image.storage, image.header)):
        if present == snapshot:
            return position
    raise NotFound(f"there is no snapshot with the id '{printable(snapshot.id)}' any more")


def _next_id(records: Sequence[SnapshotRecord]) -> str:
    """Behind the highest number (Q61), and nobody's name: who shows a snapshot that is called so goes on showing it."""
    number = 1 + max((_number(record.id) for record in records), default=0)
    names = {record.name for record in records}
    while str(number).encode() in names:
        number += 1
    return str(number)


def _number(identity: bytes) -> int:
    """The number with which an id begins, as C reads it; 0 for none."""
    found = re.match(rb"\d{1,19}", identity)
    return int(found[0]) if found else 0


def _write_snapshot_table(
    image: WritableImage, switch: Switch, old: SnapshotTable, records: Sequence[SnapshotRecord]
) -> Header:
    """Write ``records`` as the next snapshot table; the header that names it."""
    switch.abandon(image.header.snapshots_offset, old.length)
    if not records:
        return replace(image.header, snapshot_count=0, snapshots_offset=0)
    data = pack_snapshot_table(tuple(record.completed(image.size) for record in records))
    if len(records) > MAX_SNAPSHOTS or len(data) > MAX_SNAPSHOT_TABLE:
        raise OperationError("the image has as many snapshots as it can have; delete some")
    offset = switch.area(len(data))
    switch.write(offset, data)
    return replace(image.header, snapshot_count=len(records), snapshots_offset=offset)

"""Where the metadata of an image lies: every host cluster that a guest must never be able to write to (O1)."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nbdq.errors import CorruptImage, UnsupportedImage
from nbdq.qcow2.bitmaps.directory import iterate_bitmaps
from nbdq.qcow2.distinct import distinct, union
from nbdq.qcow2.entries import OFFSET_MASK
from nbdq.qcow2.format import Header
from nbdq.qcow2.snapshots import iterate_snapshots, snapshot_table_length
from nbdq.storage import FileStorage

#: Entries of L1 tables of snapshots and of bitmap tables that are looked at: a fraction of a second. A thousand
#: snapshots of a disk of 16 TiB stay below.
_ENTRIES_MAX = 32 << 20
#: Bytes of a table that are in memory at a time.
_PIECE = 8 << 20


class Metadata(NamedTuple):
    """Host clusters that hold metadata, by their numbers, ascending."""

    clusters: NDArray[np.uint64]
    """All of them."""
    snapshot_tables: NDArray[np.uint64]
    """L2 tables of snapshots: to be changed by nobody, even if their refcount says that only one table names them."""


def find_metadata(
    storage: FileStorage, header: Header, l1: NDArray[np.uint64], refcount_blocks: NDArray[np.uint64]
) -> Metadata:
    """Find all metadata: header, tables, snapshots, bitmaps.

    No cluster holds two kinds of it: a table of one kind would be written over one of the other, and what bitmaps give
    up be freed. L2 tables may be shared by snapshots.

    Args:
        refcount_blocks: host offset of each, with repetitions.

    Raises:
        UnsupportedImage: there is more of it than anybody should have to look at.
        CorruptImage: two structures share a cluster.
        ImageError: the snapshot table or the bitmap directory cannot be read.
        OSError: the file cannot be read.
    """
    snapshots = [(snapshot.l1_offset, snapshot.l1_size) for snapshot in iterate_snapshots(storage, header)]
    bitmaps = [(bitmap.table_offset, bitmap.table_size) for bitmap in iterate_bitmaps(storage, header)]
    if sum(count for _, count in snapshots + bitmaps) > _ENTRIES_MAX:
        raise UnsupportedImage(
            storage.path,
            f"snapshots and bitmaps have more than {_ENTRIES_MAX} table entries to protect from writes",
            "delete some snapshots",
        )
    directory = (header.bitmaps.directory_offset, header.bitmaps.directory_size) if header.bitmaps else (0, 0)
    refcount_table = (header.refcount_table_offset, header.refcount_table_clusters * header.cluster_size)
    snapshot_table = (header.snapshots_offset, snapshot_table_length(storage, header))
    snapshot_tables = _named(storage, header, snapshots)
    bits = np.uint64(header.cluster_bits)
    kinds = {
        "the header": np.zeros(1, dtype=np.uint64),
        "the L1 table": _area(storage, header, header.l1_table_offset, header.l1_size * 8),
        "the refcount table": _area(storage, header, *refcount_table),
        "a refcount block": refcount_blocks >> bits,
        "the snapshot table": _area(storage, header, *snapshot_table),
        "the bitmap directory": _area(storage, header, *directory),
        "an L1 table of a snapshot": _tables(storage, header, snapshots),
        "a bitmap": union(_tables(storage, header, bitmaps), _named(storage, header, bitmaps)),
        "an L2 table": union(_offsets(l1) >> bits, snapshot_tables),
    }
    places = np.sort(np.concatenate(list(kinds.values())))
    shared = places[1:][places[1:] == places[:-1]]
    if shared.size:
        cluster = shared[0]
        sharing = [kind for kind, clusters in kinds.items() for _ in range(int((clusters == cluster).sum()))]
        what = f"the cluster at {int(cluster) << header.cluster_bits:#x} is both {sharing[0]} and {sharing[1]}"
        raise CorruptImage(storage.path, what, "see nbdq check; use --read-only, and copy what can be read")
    return Metadata(places, snapshot_tables)


def _area(storage: FileStorage, header: Header, offset: int, length: int) -> NDArray[np.uint64]:
    """Clusters of what lies in one piece, as far as the file goes."""
    end = min(offset + length, storage.size())
    first = min(offset, end) >> header.cluster_bits
    return np.arange(first, -(-end >> header.cluster_bits) if offset < end else first, dtype=np.uint64)


def _tables(storage: FileStorage, header: Header, tables: list[tuple[int, int]]) -> NDArray[np.uint64]:
    """Clusters of tables, given as offset and number of entries."""
    parts = [_area(storage, header, offset, count * 8) for offset, count in tables]
    return distinct(np.concatenate([np.empty(0, dtype=np.uint64), *parts]))


def _named(storage: FileStorage, header: Header, tables: list[tuple[int, int]]) -> NDArray[np.uint64]:
    """Clusters that the entries of tables name: L2 tables, or the data of bitmaps."""
    parts = [np.empty(0, dtype=np.uint64)]
    size = storage.size()
    for offset, count in tables:
        for start in range(offset, min(offset + count * 8, size), _PIECE):
            piece = storage.read(start, min(offset + count * 8 - start, _PIECE))
            parts.append(_offsets(np.frombuffer(piece[: len(piece) // 8 * 8], dtype=">u8").astype(np.uint64)))
    return distinct(np.concatenate(parts)) >> np.uint64(header.cluster_bits)


def _offsets(entries: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The host offsets that entries of a table hold."""
    offsets = entries & np.uint64(OFFSET_MASK)
    return distinct(offsets[offsets != 0])

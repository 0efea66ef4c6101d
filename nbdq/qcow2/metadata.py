"""Where the metadata of an image lies: every host cluster that a guest must never be able to write to (O1)."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from nbdq.errors import UnsupportedImage
from nbdq.qcow2.bitmaps import iterate_bitmaps
from nbdq.qcow2.entries import OFFSET_MASK
from nbdq.qcow2.format import Header
from nbdq.qcow2.snapshots import iterate_snapshots, snapshot_table_length
from nbdq.storage import FileStorage

#: Entries of L1 tables of snapshots and of bitmap tables that are looked at: 64 MiB of memory and a fraction of a
#: second. A thousand snapshots of a disk of 16 TiB stay below.
_ENTRIES_MAX = 32 << 20


def metadata_clusters(
    storage: FileStorage, header: Header, l1: NDArray[np.uint64], refcount_blocks: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Numbers of all host clusters that hold metadata, in no order: header, tables, snapshots, bitmaps.

    Raises:
        UnsupportedImage: there is more of it than anybody should have to look at.
        ImageError: the snapshot table or the bitmap directory cannot be read.
        OSError: the file cannot be read.
    """
    bits = np.uint64(header.cluster_bits)
    parts = [(l1 & np.uint64(OFFSET_MASK)) >> bits, refcount_blocks >> bits]
    parts += [
        np.arange(offset >> header.cluster_bits, -(-(offset + length) >> header.cluster_bits), dtype=np.uint64)
        for offset, length in _areas(storage, header)
        if length
    ]
    seen = 0
    for offset, count in _tables(storage, header):
        seen += count
        if seen > _ENTRIES_MAX:
            raise UnsupportedImage(
                storage.path,
                f"snapshots and bitmaps have more than {_ENTRIES_MAX} table entries to protect from writes",
                "delete some snapshots",
            )
        table = np.frombuffer(storage.read(offset, count * 8).ljust(count * 8, b"\0"), dtype=">u8")
        entries = np.unique(table & np.uint64(OFFSET_MASK)).astype(np.uint64)
        parts.append(entries >> bits)
    clusters = np.concatenate(parts)
    return np.append(clusters[clusters != 0], np.uint64(0))


def _areas(storage: FileStorage, header: Header) -> Iterator[tuple[int, int]]:
    """(offset, length) of everything that lies in one piece."""
    yield header.l1_table_offset, header.l1_size * 8
    yield header.refcount_table_offset, header.refcount_table_clusters * header.cluster_size
    yield header.snapshots_offset, snapshot_table_length(storage, header)
    if header.bitmaps is not None:
        yield header.bitmaps.directory_offset, header.bitmaps.directory_size
    for offset, count in _tables(storage, header):
        yield offset, count * 8


def _tables(storage: FileStorage, header: Header) -> Iterator[tuple[int, int]]:
    """(offset, entries) of each table whose entries name metadata: L1 tables of snapshots, tables of bitmaps."""
    for snapshot in iterate_snapshots(storage, header):
        yield snapshot.l1_offset, snapshot.l1_size
    for bitmap in iterate_bitmaps(storage, header):
        yield bitmap.table_offset, bitmap.table_size

"""The contents of persistent bitmaps: between the bits in memory and the tables and data clusters of a file (Q66, Q67).

A table has one entry for each cluster of bits: its host offset, or that all its bits are 0, or all 1. Every table is
checked as a whole before anything is read by it; what QEMU refuses is refused.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from nbdq.errors import CorruptImage, InvalidImage, printable
from nbdq.qcow2.bitmaps.bits import DirtyBits, packed_length
from nbdq.qcow2.bitmaps.directory import Bitmap, iterate_bitmaps
from nbdq.qcow2.format import Header
from nbdq.storage import FileStorage

#: A bitmap's table in memory, in native byte order.
Table = NDArray[np.uint64]

_OFFSET = np.uint64(0x00FF_FFFF_FFFF_FE00)
_ALL_ONES = np.uint64(1)
_RESERVED = np.uint64(0xFF00_0000_0000_01FE)

#: Data clusters that are allocated and written in one go: at most so many, and not more than so many bytes.
_PIECE_CLUSTERS, _PIECE_LENGTH = 1024, 16 << 20

#: How to go on with an image whose bitmaps are damaged.
LOST = "the bitmap is lost: serve the image read-only without it, or convert it with qemu-img, which drops bitmaps"


def table_size(size: int, granularity_bits: int, *, cluster_size: int) -> int:
    """Entries of the table of a bitmap for a disk of ``size`` bytes."""
    return -(-packed_length(size, granularity_bits) // cluster_size)


def load_bits(storage: FileStorage, header: Header, name: str) -> DirtyBits | None:
    """The bits of the bitmap called ``name``, for readers; None if there is no such bitmap. At most 512 MiB (Q68).

    Raises:
        ExportError: it is inconsistent.
        ImageError, OSError: as :func:`read_table` and :func:`~nbdq.qcow2.bitmaps.directory.iterate_bitmaps`.
    """
    for bitmap in iterate_bitmaps(storage, header):
        if bitmap.name == name:
            bitmap.check_consistent()
            return read_bits(storage, header, bitmap, read_table(storage, header, bitmap))
    return None


def read_table(storage: FileStorage, header: Header, bitmap: Bitmap) -> Table:
    """The table of a consistent bitmap, checked.

    Raises:
        InvalidImage: it has another size than the disk needs, or an entry has reserved bits or is no cluster (Q66).
        CorruptImage: the table or a cluster lies past the end of the file, or two entries share a cluster.
        OSError: the file cannot be read.
    """
    path, cluster_size = storage.path, header.cluster_size
    name = f"bitmap '{printable(bitmap.name)}'"
    needed = table_size(header.guest_size, bitmap.granularity_bits, cluster_size=cluster_size)
    if bitmap.table_size != needed:
        raise InvalidImage(
            path, f"{name} has a table of {bitmap.table_size} entries, but the disk needs {needed}", LOST
        )
    raw = storage.read(bitmap.table_offset, needed * 8) if bitmap.table_offset < storage.size() else b""
    if len(raw) < needed * 8:
        raise CorruptImage(path, f"{name} has a table that goes on past the end of the file", LOST)
    table = np.frombuffer(raw, dtype=">u8").astype(np.uint64)
    offsets = table & _OFFSET
    bad = (
        (table & _RESERVED != 0)
        | (offsets % np.uint64(cluster_size) != 0)
        | ((offsets != 0) & (table & _ALL_ONES != 0))
    )
    if bad.any():
        number = int(bad.argmax())
        raise InvalidImage(path, f"{name} has the invalid table entry {int(table[number]):#x} at {number}", LOST)
    # Of the last cluster only what the disk needs has to be there.
    used = np.full(needed, cluster_size, dtype=np.uint64)
    used[-1:] = packed_length(header.guest_size, bitmap.granularity_bits) - (needed - 1) * cluster_size
    past = (offsets != 0) & (offsets + used > storage.size())
    if past.any():
        raise CorruptImage(path, f"{name} has data at {int(offsets[past.argmax()]):#x}, past the end of the file", LOST)
    clusters = data_clusters(table)
    if len(np.unique(clusters)) < len(clusters):
        raise CorruptImage(path, f"{name} has two table entries for one cluster", LOST)
    return table


def data_clusters(table: Table) -> NDArray[np.uint64]:
    """Host offsets of the clusters that a table refers to."""
    offsets = table & _OFFSET
    clusters: Table = offsets[offsets != 0]
    return clusters


def read_bits(storage: FileStorage, header: Header, bitmap: Bitmap, table: Table) -> DirtyBits:
    """The bits that :func:`read_table`'s ``table`` tells where to find.

    Raises:
        CorruptImage: the file ended meanwhile.
        OSError: the file cannot be read.
    """
    bits = DirtyBits(header.guest_size, bitmap.granularity_bits)
    cluster_size = header.cluster_size
    for first, last, entry in _runs(table, cluster_size):
        part = bits.packed[first * cluster_size : last * cluster_size]
        if entry == _ALL_ONES:
            part[:] = 0xFF
        elif entry and storage.read_into(entry, part.data) < len(part):
            raise CorruptImage(
                storage.path, f"bitmap '{printable(bitmap.name)}' goes on past the end of the file", LOST
            )
    bits.clear_tail()
    return bits


def _runs(table: Table, cluster_size: int) -> Iterator[tuple[int, int, int]]:
    """(first, last + 1, entry of the first) of entries that are one piece of the file, or equal."""
    is_data = table & _OFFSET != 0
    consecutive = table[1:] == table[:-1] + np.uint64(cluster_size)
    same = np.where(is_data[1:] & is_data[:-1], consecutive, table[1:] == table[:-1])
    starts = [0, *(np.flatnonzero(~same) + 1).tolist(), len(table)]
    for first, last in pairwise(starts):
        yield first, last, int(table[first])


def write_bits(
    storage: FileStorage, bits: DirtyBits, *, cluster_size: int, allocate: Callable[[int], int]
) -> tuple[Table, int]:
    """Write ``bits`` to new clusters; return their table and its host offset. Nothing is durable yet.

    Clusters whose bits are equal take no space. ``allocate`` gives the host offset of so many contiguous clusters.

    Raises:
        OSError: no space, or the medium failed; what has been allocated is the caller's to free.
    """
    whole, rest = divmod(len(bits.packed), cluster_size)
    rows = bits.packed[: whole * cluster_size].reshape(whole, cluster_size)
    last = np.zeros(cluster_size, dtype=np.uint8)
    last[:rest] = bits.packed[whole * cluster_size :]
    table = np.zeros(whole + bool(rest), dtype=np.uint64)
    table[:whole][rows.min(axis=1, initial=0xFF) == 0xFF] = _ALL_ONES
    mixed = np.append(rows.any(axis=1), last.any())[: len(table)] & (table == 0)

    indices = np.flatnonzero(mixed)
    step = max(1, min(_PIECE_CLUSTERS, _PIECE_LENGTH // cluster_size))
    for start in range(0, len(indices), step):
        piece = indices[start : start + step]
        offset = allocate(len(piece))
        table[piece] = np.arange(len(piece), dtype=np.uint64) * np.uint64(cluster_size) + np.uint64(offset)
        storage.write_vector(offset, [(rows[index] if index < whole else last).data for index in piece])
    encoded = table.astype(">u8").tobytes()
    clusters = -(-len(encoded) // cluster_size)
    table_offset = allocate(clusters)
    storage.write(table_offset, encoded.ljust(clusters * cluster_size, b"\0"))
    return table, table_offset

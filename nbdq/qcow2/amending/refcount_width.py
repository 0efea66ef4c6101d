"""Refcounts of another width: new blocks and a new table behind everything, then one sector that names them (R-61).

The new structures already say what is so when they are in force: that they are in use themselves, and that the old ones
are free. So there is nothing to be cleaned up after the switch, and whatever a crash leaves behind the end of what the
old refcounts count is nothing to anybody.
"""

import errno
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nbdq.errors import CorruptImage, OperationError, printable
from nbdq.qcow2.amending.options import Progress
from nbdq.qcow2.fields import MAX_REFCOUNT_TABLE
from nbdq.qcow2.format import Header
from nbdq.qcow2.header_area import write_fields
from nbdq.qcow2.refcount_widths import max_refcount, pack, unpack
from nbdq.qcow2.writing.refcounts import BrokenRefcounts
from nbdq.qcow2.writing.writable import WritableImage
from nbdq.storage import FileStorage

_BLOCK_OFFSET = np.uint64(0xFFFF_FFFF_FFFF_FE00)
_REPAIR = "repair it with nbdq check -r all"
#: Refcounts that are looked at in one go.
_PIECE = 1 << 16


def change_refcount_bits(storage: FileStorage, header: Header, bits: int, progress: Progress) -> Header:
    """Store the refcounts of a quiet image of version 3 with ``bits`` bits; the header that it has then.

    Durable on return. Costs one reading of all refcounts, and room for the new ones beside the old. If ``progress``
    raises, and after any failure before the switch, the file is as long as it was.

    Raises:
        OperationError: a refcount is too large; nothing was changed.
        CorruptImage: the refcount table is damaged.
        OSError: EFBIG if the new table would exceed the format's limit, ENOSPC, or the file cannot be read or written.
    """
    order = bits.bit_length() - 1
    old = _Refcounts(storage, header)
    _check_sole_use(storage, header, old)
    progress.expect(2 * len(old.blocks) * header.cluster_size)
    survey = _survey(storage, old, order, progress)
    plan = _place(storage, header, old, survey, order)
    length_before = storage.size()
    try:
        _write(storage, header, old, plan, order, progress)
    except BaseException:
        if not storage.is_block_device:
            with suppress(OSError):  # the first failure is the news
                storage.truncate(length_before)
        raise
    return write_fields(
        storage,
        replace(
            header,
            refcount_order=order,
            refcount_table_offset=plan.table_offset,
            refcount_table_clusters=plan.table_clusters,
        ),
    )


def _check_sole_use(storage: FileStorage, header: Header, old: "_Refcounts") -> None:
    """What will be free must be nothing but refcounts, or something else would be overwritten one day (O4)."""
    try:
        image = WritableImage(storage, header)  # refuses metadata of two kinds in one place
        counts = image.refcounts.get_many(old.structures)
    except BrokenRefcounts as error:
        raise CorruptImage(storage.path, str(error), _REPAIR) from error
    if (counts != 1).any():
        cluster = int(old.structures[counts != 1][0])
        what = f"the refcounts at {cluster << header.cluster_bits:#x} are counted as something else, too"
        raise CorruptImage(storage.path, what, _REPAIR)


class _Refcounts:
    """The refcounts as they are, read in pieces."""

    def __init__(self, storage: FileStorage, header: Header) -> None:
        self._storage = storage
        self._order = header.refcount_order
        self.cluster_size = size = header.cluster_size
        self.block_clusters = size * 8 >> header.refcount_order
        data = storage.read(header.refcount_table_offset, header.refcount_table_clusters * size)
        table = np.frombuffer(data[: len(data) // 8 * 8], dtype=">u8").astype(np.uint64) & _BLOCK_OFFSET
        self.blocks: dict[int, int] = {int(number): int(table[number]) for number in np.flatnonzero(table)}
        """Host offset of each block, by the number of it."""
        offsets = np.array(list(self.blocks.values()), dtype=np.uint64)
        misplaced = (offsets % np.uint64(size) != 0) | (offsets >= np.uint64(storage.size()))
        if misplaced.any() or len(np.unique(offsets)) < len(offsets):
            raise CorruptImage(storage.path, "the refcount table is damaged", _REPAIR)
        first = header.refcount_table_offset // size
        own_table = np.arange(first, first + header.refcount_table_clusters, dtype=np.uint64)
        self.structures: NDArray[np.uint64] = np.union1d(own_table, offsets >> np.uint64(header.cluster_bits))
        """Clusters of table and blocks, which will be free."""

    def read(self, first: int, count: int) -> NDArray[np.uint64] | None:
        """Refcounts of ``count`` clusters that lie within one block; None where there is no block."""
        number, slot = divmod(first, self.block_clusters)
        offset = self.blocks.get(number)
        if offset is None:
            return None
        length = (count << self._order) // 8
        return unpack(self._storage.read(offset + (slot << self._order) // 8, length).ljust(length, b"\0"), self._order)

    def pieces(self, first: int, count: int) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """(first cluster, refcounts as they will be) of the range, where there are blocks. Powers of two, aligned."""
        step = min(count, self.block_clusters, _PIECE)
        for start in range(first, first + count, step):
            counts = self.read(start, step)
            if counts is not None:
                low, high = np.searchsorted(self.structures, (start, start + step))
                freed = (self.structures[low:high] - np.uint64(start)).astype(np.intp)
                counts[freed] = 0
                yield start, counts


@dataclass(frozen=True)
class _Survey:
    """What the new structures have to hold."""

    end: int
    """Behind the last cluster that is in use now or will be, before there are new structures."""
    blocks: set[int]
    """New blocks in which any refcount is not 0."""


@dataclass(frozen=True)
class _Plan:
    """Where the new structures lie: ``blocks`` side by side from cluster ``first``, then the table."""

    first: int
    blocks: tuple[int, ...]
    block_clusters: int
    cluster_size: int

    @property
    def table_clusters(self) -> int:
        return -(-(self.blocks[-1] + 1) * 8 // self.cluster_size)

    @property
    def table_offset(self) -> int:
        return (self.first + len(self.blocks)) * self.cluster_size

    @property
    def end(self) -> int:
        """The cluster behind the table."""
        return self.first + len(self.blocks) + self.table_clusters


def _survey(storage: FileStorage, old: _Refcounts, order: int, progress: Progress) -> _Survey:
    """Read every refcount once, and see that it fits."""
    cluster_size = old.cluster_size
    block_bits = (cluster_size * 8 >> order).bit_length() - 1
    end, blocks = 0, set[int]()
    for number in sorted(old.blocks):
        for start, counts in old.pieces(number * old.block_clusters, old.block_clusters):
            used = np.flatnonzero(counts)
            if not used.size:
                continue
            end = start + int(used[-1]) + 1
            blocks.update(np.unique(used + start >> block_bits).tolist())
            if int(counts.max()) > max_refcount(order):
                cluster = start + int(np.flatnonzero(counts > max_refcount(order))[0])
                raise OperationError(
                    f"{printable(storage.path, 1024)}: Cannot decrease refcount entry width to {1 << order} bits:"
                    f" Cluster at offset {cluster * cluster_size:#x} has a refcount of {int(counts[cluster - start])}"
                )
        progress.advance(cluster_size)
    return _Survey(end, blocks)


def _place(storage: FileStorage, header: Header, old: _Refcounts, survey: _Survey, order: int) -> _Plan:
    """Behind everything that is in use; the new blocks count themselves and the table, too."""
    size = header.cluster_size
    first = max(survey.end, int(old.structures[-1]) + 1)
    if not storage.is_block_device:
        first = max(first, -(-storage.size() // size))
    block_clusters = size * 8 >> order
    plan = _Plan(first, tuple(sorted(survey.blocks | {first // block_clusters})), block_clusters, size)
    while True:
        needed = survey.blocks | set(range(plan.first // block_clusters, -(-plan.end // block_clusters)))
        if needed == set(plan.blocks):
            break
        plan = replace(plan, blocks=tuple(sorted(needed | set(plan.blocks))))
    if plan.table_clusters * size > MAX_REFCOUNT_TABLE:
        what = f"a refcount table for {1 << order} bits would exceed the format's limit of {MAX_REFCOUNT_TABLE} bytes"
        raise OSError(errno.EFBIG, what, storage.path)
    if storage.is_block_device and plan.end * size > storage.size():
        raise OSError(errno.ENOSPC, "the device has no room for new refcounts beside the old ones", storage.path)
    return plan


def _write(storage: FileStorage, header: Header, old: _Refcounts, plan: _Plan, order: int, progress: Progress) -> None:
    """Write the new structures, durably."""
    size = header.cluster_size
    storage.reserve(plan.first * size, (plan.end - plan.first) * size)
    share = len(old.blocks) * size // len(plan.blocks)
    table = np.zeros(plan.table_clusters * size // 8, dtype=np.uint64)
    for position, number in enumerate(plan.blocks):
        offset = (plan.first + position) * size
        table[number] = offset
        _write_block(storage, old, plan, number, offset, order)
        progress.advance(share)
    storage.write(plan.table_offset, table.astype(">u8").tobytes())
    storage.sync()


def _write_block(storage: FileStorage, old: _Refcounts, plan: _Plan, number: int, offset: int, order: int) -> None:
    start, count = number * plan.block_clusters, plan.block_clusters
    block = bytearray(plan.cluster_size)
    for first, counts in old.pieces(start, count):
        at = (first - start << order) // 8
        packed = pack(counts, order)
        block[at : at + len(packed)] = packed
    low, high = max(start, plan.first), min(start + count, plan.end)
    if low < high:  # itself and its like: refcount 1, within pieces of whole bytes
        edge_low, edge_high = low - start & ~7, min(-(-(high - start) // 8) * 8, count)
        counts = unpack(bytes(block[(edge_low << order) // 8 : (edge_high << order) // 8]), order)
        counts[low - start - edge_low : high - start - edge_low] = 1
        block[(edge_low << order) // 8 : (edge_high << order) // 8] = pack(counts, order)
    storage.write(offset, block)

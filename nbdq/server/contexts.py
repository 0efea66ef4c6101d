"""Metadata contexts: from block status and dirty bitmaps to the extents of the wire (P117-P119, P6, P7, P48)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nbdq.block import BlockDevice, Kind, Offsets, Status
from nbdq.nbd.constants import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP, AllocationState

_HOLE_AND_ZERO = AllocationState.HOLE | AllocationState.ZERO
_BASE_FLAGS = np.zeros(max(Kind) + 1, dtype=np.uint32)
for _kind in (Kind.UNALLOCATED, Kind.UNALLOCATED_OFFSET, Kind.ZERO, Kind.ZERO_OFFSET, Kind.HOLE):
    _BASE_FLAGS[_kind] = _HOLE_AND_ZERO
_BASE_FLAGS[Kind.DATA_HOLE] = AllocationState.ZERO

#: Parallel arrays of starts and flags of contiguous ranges, and the end of the last one.
Ranges = tuple[Offsets, NDArray[np.uint32], int]

#: Context name → flags of each entry of a status.
_FLAGS: dict[str, Callable[[Status], NDArray[np.uint32]]] = {
    BASE_ALLOCATION: lambda status: _BASE_FLAGS[status.kind],
    ALLOCATION_DEPTH: lambda status: status.depth.astype(np.uint32),
}


class DirtyBitmap(Protocol):
    """What an export shows of a dirty bitmap. Any thread; never waits."""

    def ranges(self, offset: int, length: int) -> Iterator[tuple[Offsets, NDArray[np.uint8], int]]:
        """(starts, 1 for dirty or 0, end) of contiguous ranges, in ascending chunks that cover the range exactly."""
        ...


def encode_context(
    context: str,
    device: BlockDevice,
    offset: int,
    length: int,
    *,
    bitmaps: Mapping[str, DirtyBitmap],
    limit: int,
    number: str,
) -> bytes:
    """What the export of ``device`` says of a range in a metadata context that it offers.

    Big-endian (length, flags) pairs for the wire, at most ``limit``, neighbours with equal flags merged. The range is
    less than 4 GiB, and looked at only as far as the limit needs. ``bitmaps`` are those of the export, by name (P48).

    Raises:
        OSError: there is no status even for the beginning.
    """
    if context.startswith(DIRTY_BITMAP):
        ranges = bitmaps[context[len(DIRTY_BITMAP) :]].ranges(offset, length)
        return _encode(
            ((start, dirty.astype(np.uint32), end) for start, dirty, end in ranges), limit=limit, number=number
        )
    flags_of = _FLAGS[context]
    statuses = _as_far_as_possible(device.status(offset, length))
    return _encode(((status.start, flags_of(status), status.end) for status in statuses), limit=limit, number=number)


def _encode(chunks: Iterable[Ranges], *, limit: int, number: str) -> bytes:
    starts: list[Offsets] = []
    flags: list[NDArray[np.uint32]] = []
    count, end = 0, 0
    for start, values, stop in chunks:
        end = stop
        changes = np.flatnonzero(values[1:] != values[:-1]) + 1
        first_is_new = not flags or flags[-1][-1] != values[0]
        kept = np.concatenate(([0], changes)) if first_is_new else changes
        if len(kept):
            starts.append(start[kept])
            flags.append(values[kept])
            count += len(kept)
        if count > limit:  # the entry behind the last one says where the last one ends
            break
    bounds = np.concatenate((*starts, np.array([end], dtype=np.uint64)))
    count = min(count, limit)
    pairs = np.empty((count, 2), dtype=number)
    pairs[:, 0] = np.diff(bounds)[:count]
    pairs[:, 1] = np.concatenate(flags)[:count]
    return pairs.tobytes()


def _as_far_as_possible(statuses: Iterable[Status]) -> Iterator[Status]:
    """Stop before an error; it comes back to the client when that asks again from there (P117)."""
    found = False
    try:
        for status in statuses:
            found = True
            yield status
    except OSError:
        if not found:
            raise

"""Metadata contexts: from block status and dirty bitmaps to the extents of the wire (P117-P119, P6, P7, P48)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import inf
from time import monotonic
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

Flags = NDArray[np.uint32] | NDArray[np.uint64]
#: Parallel arrays of starts and flags of contiguous ranges, and the end of the last one.
Ranges = tuple[Offsets, Flags, int]
#: (device, offset, length) → what a context says of the range, in ascending chunks that cover it.
Context = Callable[[BlockDevice, int, int], Iterator[Ranges]]


class DirtyBitmap(Protocol):
    """What an export shows of a dirty bitmap. Any thread; never waits."""

    def ranges(self, offset: int, length: int) -> Iterator[tuple[Offsets, NDArray[np.uint8], int]]:
        """(starts, 1 for dirty or 0, end) of contiguous ranges, in ascending chunks that cover the range exactly."""
        ...


def context_of_status(flags_of: Callable[[Status], Flags]) -> Context:
    """A context that follows from block status."""

    def ranges(device: BlockDevice, offset: int, length: int) -> Iterator[Ranges]:
        for status in device.status(offset, length):
            yield status.start, flags_of(status), status.end

    return ranges


#: Those that everybody knows.
STANDARD: Mapping[str, Context] = {
    BASE_ALLOCATION: context_of_status(lambda status: _BASE_FLAGS[status.kind]),
    ALLOCATION_DEPTH: context_of_status(lambda status: status.depth.astype(np.uint32)),
}


def context_of_bitmap(name: str, bitmaps: Mapping[str, DirtyBitmap]) -> Context:
    """``qemu:dirty-bitmap:…``; ``bitmaps`` are those of the export, by their own names (P48)."""

    def ranges(device: BlockDevice, offset: int, length: int) -> Iterator[Ranges]:
        for start, dirty, end in bitmaps[name.removeprefix(DIRTY_BITMAP)].ranges(offset, length):
            yield start, dirty.astype(np.uint32), end

    return ranges


def encode(
    context: Context, device: BlockDevice, offset: int, length: int, *, limit: int, number: str, until: float = inf
) -> bytes:
    """What ``context`` says of a range of ``device``: pairs of length and flags for the wire, each a ``number``.

    Neighbours with equal flags are merged. There are at most ``limit`` pairs, and the range is looked at only as far as
    that needs. At the moment ``until`` of ``time.monotonic`` it ends where it has come to, and the client asks again
    from there (P117): a range may be a whole disk (P124), of which a table is read for every half a gigabyte.

    Raises:
        OSError: there is no status even for the beginning.
    """
    starts: list[Offsets] = []
    flags: list[Flags] = []
    count, end = 0, 0
    for start, values, stop in _as_far_as_possible(context(device, offset, length)):
        end = stop
        changes = np.flatnonzero(values[1:] != values[:-1]) + 1
        first_is_new = not flags or flags[-1][-1] != values[0]
        kept = np.concatenate(([0], changes)) if first_is_new else changes
        if len(kept):
            starts.append(start[kept])
            flags.append(values[kept])
            count += len(kept)
        if count > limit or monotonic() > until:  # the entry behind the last one says where the last one ends
            break
    bounds = np.concatenate((*starts, np.array([end], dtype=np.uint64)))
    count = min(count, limit)
    pairs = np.empty((count, 2), dtype=number)
    pairs[:, 0] = np.diff(bounds)[:count]
    pairs[:, 1] = np.concatenate(flags)[:count]
    return pairs.tobytes()


def _as_far_as_possible(chunks: Iterable[Ranges]) -> Iterator[Ranges]:
    """Stop before an error; it comes back to the client when that asks again from there (P117)."""
    found = False
    try:
        for chunk in chunks:
            found = True
            yield chunk
    except OSError:
        if not found:
            raise

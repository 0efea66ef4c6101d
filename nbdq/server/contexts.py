"""Metadata contexts: from a disk's block status to the extents of the wire (P117-P119, P6, P7)."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from nbdq.block import Kind, Status
from nbdq.nbd.constants import ALLOCATION_DEPTH, BASE_ALLOCATION, AllocationState

_HOLE_AND_ZERO = AllocationState.HOLE | AllocationState.ZERO
_BASE_FLAGS = np.zeros(max(Kind) + 1, dtype=np.uint32)
for _kind in (Kind.UNALLOCATED, Kind.UNALLOCATED_OFFSET, Kind.ZERO, Kind.ZERO_OFFSET, Kind.HOLE):
    _BASE_FLAGS[_kind] = _HOLE_AND_ZERO
_BASE_FLAGS[Kind.DATA_HOLE] = AllocationState.ZERO

#: Context name → flags of each entry of a status.
FLAGS: dict[str, Callable[[Status], NDArray[np.uint32]]] = {
    BASE_ALLOCATION: lambda status: _BASE_FLAGS[status.kind],
    ALLOCATION_DEPTH: lambda status: status.depth.astype(np.uint32),
}


def encode_extents(context: str, statuses: Iterable[Status], *, limit: int) -> bytes:
    """Big-endian (length, flags) pairs for the wire, at most ``limit``, neighbours with equal flags merged.

    ``statuses`` must cover less than 4 GiB; it is consumed only as far as the limit needs.

    Raises:
        OSError: there is no status even for the beginning.
    """
    flags_of = FLAGS[context]
    starts: list[NDArray[np.uint64]] = []
    flags: list[NDArray[np.uint32]] = []
    count, end = 0, 0
    for status in _as_far_as_possible(statuses):
        values = flags_of(status)
        changes = np.flatnonzero(values[1:] != values[:-1]) + 1
        first_is_new = not flags or flags[-1][-1] != values[0]
        kept = np.concatenate(([0], changes)) if first_is_new else changes
        end = status.end
        if len(kept):
            starts.append(status.start[kept])
            flags.append(values[kept])
            count += len(kept)
        if count > limit:  # the entry behind the last one says where the last one ends
            break
    bounds = np.concatenate((*starts, np.array([end], dtype=np.uint64)))
    count = min(count, limit)
    pairs = np.empty((count, 2), dtype=">u4")
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

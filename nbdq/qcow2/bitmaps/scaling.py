"""Packed bits at another granularity: what one bitmap says, in the units of another one (for merging)."""

import numpy as np
from numpy.typing import NDArray

#: Bytes of the longer side that are worked on at once; more only if one byte of the other side stands for more.
_PIECE = 1 << 20
#: Up to so many neighbours are looked at one after the other, for all groups at once.
_FEW = 16


def coarsened(packed: NDArray[np.uint8], shift: int) -> NDArray[np.uint8]:
    """Each bit of the result is whether any of 2^``shift`` bits of ``packed`` is set; 0 behind its end."""
    # From eight bits to one upwards a bit of the result stands for whole bytes.
    group = 1 << (shift if shift < 3 else shift - 3)
    step = max(_PIECE >> shift, 1) << shift  # bytes that make whole bytes of the result
    result = np.zeros(-(-len(packed) >> shift), dtype=np.uint8)
    for start in range(0, len(packed), step):
        piece = packed[start : start + step]
        if not piece.any():
            continue
        piece = np.pad(piece, (0, -len(piece) % (1 << shift)))
        units = np.unpackbits(piece, bitorder="little") if shift < 3 else piece
        part = np.packbits(_any_of(units, group), bitorder="little")
        result[start >> shift : (start >> shift) + len(part)] = part
    return result


def refined(packed: NDArray[np.uint8], shift: int, *, length: int) -> NDArray[np.uint8]:
    """Each bit of ``packed`` becomes 2^``shift`` bits of the result, which has ``length`` bytes."""
    result = np.zeros(length, dtype=np.uint8)
    step = max(_PIECE >> shift, 1)
    for start in range(0, len(packed), step):
        piece = packed[start : start + step]
        first = start << shift
        if first >= length:
            break
        if not piece.any():
            continue
        bits = np.unpackbits(piece, bitorder="little")
        if shift < 3:
            part = np.packbits(np.repeat(bits, 1 << shift), bitorder="little")
        else:
            part = np.repeat(bits * np.uint8(0xFF), 1 << shift - 3)
        result[first : first + len(part)] = part[: length - first]
    return result


def _any_of(units: NDArray[np.uint8], group: int) -> NDArray[np.uint8] | NDArray[np.bool_]:
    """For each ``group`` neighbours among ``units`` something that is not 0 if one of them is not."""
    if group > _FEW:
        return np.asarray(units.reshape(-1, group).any(axis=1), dtype=np.bool_)
    found = units[::group].copy()
    for number in range(1, group):
        found |= units[number::group]
    return found

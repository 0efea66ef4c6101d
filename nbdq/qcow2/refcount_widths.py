"""Refcount blocks as arrays and back: entries of 1, 2, 4, 8, 16, 32 or 64 bits (Q25, Q26). Pure: no files.

Entries narrower than a byte start at its low end; wider ones are big-endian.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def max_refcount(order: int) -> int:
    """The largest refcount that an entry of ``1 << order`` bits holds (Q31)."""
    return (1 << (1 << order)) - 1


def unpack(block: bytes | bytearray | memoryview, order: int) -> NDArray[np.uint64]:
    """The entries of a whole refcount block, or of any part of one that holds whole bytes and whole entries."""
    if order >= 3:
        return np.frombuffer(block, dtype=f">u{1 << order - 3}").astype(np.uint64)
    octets = np.frombuffer(block, dtype=np.uint8)
    shifts = np.arange(0, 8, 1 << order, dtype=np.uint8)
    entries = octets[:, np.newaxis] >> shifts & np.uint8(max_refcount(order))
    return entries.reshape(-1).astype(np.uint64)


def pack(values: ArrayLike, order: int) -> bytes:
    """The inverse of :func:`unpack`. Values must fit their width, and fill whole bytes: both are the caller's duty."""
    entries = np.asarray(values, dtype=np.uint64)
    assert not entries.size or int(entries.max()) <= max_refcount(order), "a refcount never wraps (Q31)"
    if order >= 3:
        return entries.astype(f">u{1 << order - 3}").tobytes()
    per_byte = 8 >> order
    assert entries.size % per_byte == 0, "entries fill whole bytes"
    shifts = np.arange(0, 8, 1 << order, dtype=np.uint8)
    lanes = entries.astype(np.uint8).reshape(-1, per_byte) << shifts
    return bytes(np.bitwise_or.reduce(lanes, axis=1, dtype=np.uint8))

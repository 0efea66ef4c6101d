"""The bits of one dirty bitmap in memory: set by every write, asked by backups.

Packed as QCOW2 stores them (Q67). Knows guest offsets and nothing of files. While writes are served bits are only ever
set. That is why a mark whose bits are set already needs no lock: it reads one byte, which only can gain bits. To set
one is to read and to write its byte, between which another thread could run and lose its bit to us; that needs the
lock, once for every granule of the disk.
"""

import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nbdq.block import Offsets

#: Packed bytes that are unpacked at once when somebody asks: few enough not to keep an event loop waiting.
_PIECE = 16 << 10


class DirtyRanges(NamedTuple):
    """Contiguous ranges of guest space as parallel arrays; the end of the last one is ``end``."""

    start: Offsets
    dirty: NDArray[np.uint8]
    """1: written since the bitmap was made; 0: not."""
    end: int


def packed_length(size: int, granularity_bits: int) -> int:
    """Bytes of a bitmap for a disk of ``size`` bytes."""
    return -(-size >> granularity_bits + 3)


class DirtyBits:
    """The bits of one bitmap. Safe to use from any thread."""

    def __init__(self, size: int, granularity_bits: int) -> None:
        """A clean bitmap for a disk of ``size`` bytes; takes no memory until it is marked."""
        self.size = size
        self.granularity_bits = granularity_bits
        self.packed = np.zeros(packed_length(size, granularity_bits), dtype=np.uint8)
        """The first granule is bit 0 of byte 0; bits behind the end of the disk are 0."""
        self.changed = False
        """Whether bits have been set since :attr:`packed` was loaded or stored."""
        self._bytes = self.packed.data
        self._lock = threading.Lock()

    def mark(self, offset: int, length: int) -> None:
        """Note that a range inside the disk, not empty, is about to change."""
        first = offset >> self.granularity_bits
        last = (offset + length - 1) >> self.granularity_bits
        if first >> 3 == last >> 3:
            mask = ((2 << (last - first)) - 1) << (first & 7)
            if self._bytes[first >> 3] & mask == mask:
                return
        self._set(first, last)

    def _set(self, first: int, last: int) -> None:
        head, tail = first >> 3, last >> 3
        head_mask, tail_mask = 0xFF << (first & 7) & 0xFF, (2 << (last & 7)) - 1
        with self._lock:
            self.changed = True
            if head == tail:
                self._bytes[head] |= head_mask & tail_mask
            else:
                self._bytes[head] |= head_mask
                self.packed[head + 1 : tail] = 0xFF
                self._bytes[tail] |= tail_mask

    def clear_tail(self) -> None:
        """Establish that bits behind the end of the disk are 0, after :attr:`packed` was filled from a file."""
        granules = -(-self.size >> self.granularity_bits)
        if granules & 7:
            self.packed[-1] &= (1 << (granules & 7)) - 1

    def ranges(self, offset: int, length: int) -> Iterator[DirtyRanges]:
        """The state of a range, in ascending chunks that together cover it exactly.

        What lies behind the end of the bitmap's disk is clean: a layer may be larger than the one below, whose bitmap
        this is.
        """
        end = offset + length
        stop = min(end, self.size)
        byte_bits = self.granularity_bits + 3
        while offset < stop:
            first_byte = offset >> byte_bits
            last_byte = min(-(-stop >> byte_bits), first_byte + _PIECE)
            piece_end = min(stop, last_byte << byte_bits)
            first = offset >> self.granularity_bits
            yield DirtyRanges(*self._split(self.packed[first_byte:last_byte], first, offset, piece_end), piece_end)
            offset = piece_end
        if offset < end:
            yield DirtyRanges(np.array([offset], dtype=np.uint64), np.zeros(1, dtype=np.uint8), end)

    def _split(self, piece: NDArray[np.uint8], first: int, offset: int, end: int) -> tuple[Offsets, NDArray[np.uint8]]:
        """Starts and states of the ranges in ``[offset, end)``, whose first granule is ``first``, in ``piece``."""
        granules = (-(-end >> self.granularity_bits)) - first
        if not piece.any():
            return np.array([offset], dtype=np.uint64), np.zeros(1, dtype=np.uint8)
        states = np.unpackbits(piece, count=(first & 7) + granules, bitorder="little")[first & 7 :]
        breaks = np.concatenate(([0], np.flatnonzero(states[1:] != states[:-1]) + 1)).astype(np.uint64)
        start = (breaks + np.uint64(first)) << np.uint64(self.granularity_bits)
        start[0] = offset
        return start, states[breaks]

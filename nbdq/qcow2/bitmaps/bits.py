"""The bits of one dirty bitmap in memory: set by every write, asked by backups, taken by jobs that copy.

Packed as QCOW2 stores them (Q67). Knows guest offsets and nothing of files.

Setting a bit is to read and to write its byte, and another thread must not come between; so every change of bits is
made under a lock. A mark whose bits are set already needs none: it reads one byte. That is right even though bits can
be cleared, for those who clear them promise something: what was marked before they did is theirs, and **before they
look at the disk they wait for every request that had begun** (``WritableImage.barrier``). Consider a request that marks
a granule, under its pin, and then changes the disk; and somebody who takes the granule's bit, waits, and then reads:

- The mark sees the bit cleared, or waits for the lock: it sets the bit after the taking. It will be taken again.
- The mark sees the bit set, with or without the lock, or sets it first: then the bit was set when it was taken, for
  nothing but taking clears it, and the taker knows of the granule. The request had its pin before the taking, so the
  taker waits until the change is done, and reads it.

The same argument covers a byte that is read from an array which :meth:`DirtyBits.clear` or :meth:`DirtyBits.resize` has
just replaced, because the pin is older than the reading of the array, too. It covers a bitmap that begins or ceases to
be marked at all: after the wait nobody is left who did not know.
"""

import threading
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nbdq.block import Offsets
from nbdq.qcow2.bitmaps.scaling import coarsened, refined

#: Packed bytes that are unpacked at once when somebody asks: few enough not to keep an event loop waiting.
_PIECE = 16 << 10

#: The bits of one bitmap: the first granule is bit 0 of byte 0.
Packed = NDArray[np.uint8]


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
        self.packed: Packed = np.zeros(packed_length(size, granularity_bits), dtype=np.uint8)
        """Bits behind the end of the disk are 0. Replaced by :meth:`clear` and :meth:`resize`."""
        self.changed = False
        """Whether bits have changed since :attr:`packed` was loaded or stored."""
        self._bytes = self.packed.data
        self._lock = threading.Lock()

    def mark(self, offset: int, length: int) -> None:
        """Note that a range inside the disk, not empty, is about to change. Under the pin of the request."""
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

    def take(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Clear the granules that a range, not empty, touches; (offset, length) of those that were dirty, ascending.

        Granules are whole, but for the end of the disk. The caller waits for all requests that had begun before it
        reads what it took; see the module.
        """
        bits = self.granularity_bits
        stop = min(offset + length, self.size) - 1 >> bits
        found: list[tuple[int, int]] = []
        first = offset >> bits
        while first <= stop:
            last = min(stop, (first >> 3) + _PIECE - 1 << 3 | 7)
            for start, end in self._take(first, last):
                if found and found[-1][1] == start:
                    start = found.pop()[0]
                found.append((start, end))
            first = last + 1
        return [(start << bits, min(end << bits, self.size) - (start << bits)) for start, end in found]

    def _take(self, first: int, last: int) -> list[tuple[int, int]]:
        """The same in granules: (first, last + 1) of those that were dirty."""
        head, tail = first >> 3, last >> 3
        with self._lock:
            taken = self.packed[head : tail + 1].copy()
            taken[0] &= 0xFF << (first & 7) & 0xFF
            taken[-1] &= (2 << (last & 7)) - 1
            if not taken.any():
                return []
            self.changed = True
            self.packed[head : tail + 1] &= ~taken
        steps = np.diff(np.unpackbits(taken, bitorder="little").astype(np.int8), prepend=0, append=0)
        edges = np.flatnonzero(steps) + (head << 3)  # dirty and clean take turns
        return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))

    def clear(self) -> Packed:
        """Clear all bits; what they were, for :meth:`restore`. Costs nothing, whatever the size."""
        with self._lock:
            old = self.packed
            self._replace(np.zeros(len(old), dtype=np.uint8))
        return old

    def restore(self, packed: Packed) -> None:
        """Undo a :meth:`clear` or :meth:`merge`: the bits are ``packed`` again. The caller has drained the disk."""
        with self._lock:
            assert len(packed) == len(self.packed), "bits of another bitmap, or resized since"
            self._replace(packed)

    def merge(self, sources: Iterable["DirtyBits"]) -> Packed:
        """Set all bits that any source of the same disk size has, of whatever granularity; the bits as they were.

        A source that is being marked is merged as it is at some time during the call.
        """
        merged: Packed = np.zeros(len(self.packed), dtype=np.uint8)
        for source in sources:
            assert source.size == self.size, "refused by the caller"
            merged |= source._at(self.granularity_bits)
        with self._lock:
            old = self.packed
            self._replace(old | merged)
        return old

    def _at(self, granularity_bits: int) -> Packed:
        """The bits at another granularity."""
        shift = granularity_bits - self.granularity_bits
        if shift > 0:
            return coarsened(self.packed, shift)
        if shift == 0:
            return self.packed
        length = packed_length(self.size, granularity_bits)
        return _without_tail(refined(self.packed, -shift, length=length), self.size, granularity_bits)

    def resize(self, size: int) -> None:
        """Fit a disk of ``size`` bytes. What is new is clean, as in QEMU; what is behind the new end is forgotten.

        Requests go on, but none may reach behind the old or the new end before this returns.
        """
        with self._lock:
            kept = self.packed[: packed_length(size, self.granularity_bits)]
            resized: Packed = np.zeros(packed_length(size, self.granularity_bits), dtype=np.uint8)
            resized[: len(kept)] = kept
            self._replace(_without_tail(resized, size, self.granularity_bits))
            self.size = size

    def _replace(self, packed: Packed) -> None:
        """Under the lock."""
        self.changed = True
        self.packed, self._bytes = packed, packed.data

    def clear_tail(self) -> None:
        """Establish that bits behind the end of the disk are 0, after :attr:`packed` was filled from a file."""
        _without_tail(self.packed, self.size, self.granularity_bits)

    @property
    def dirty_length(self) -> int:
        """Bytes of all dirty granules; the last one counts whole, as in QEMU."""
        pieces = (self.packed[start : start + _PIECE] for start in range(0, len(self.packed), _PIECE))
        return sum(int.from_bytes(piece.tobytes(), "little").bit_count() for piece in pieces) << self.granularity_bits

    def digest(self) -> str:
        """SHA-256 of the bits as QEMU has them in memory: padded to words of 64 bits, at least one."""
        length = len(self.packed)
        return sha256(self.packed.tobytes() + bytes(max(-length % 8, 0 if length else 8))).hexdigest()

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


class AllDirty:
    """Stands in for a bitmap whose bits nobody may believe: everything has to be copied (F2)."""

    def ranges(self, offset: int, length: int) -> Iterator[DirtyRanges]:
        """The range, dirty."""
        yield DirtyRanges(np.array([offset], dtype=np.uint64), np.ones(1, dtype=np.uint8), offset + length)


def dirty_extents(
    bits: DirtyBits | AllDirty, offset: int, length: int, *, limit: int
) -> tuple[list[dict[str, int]], int]:
    """The dirty ranges of a part of the disk, at most ``limit``, and where somebody has to go on who wants the rest."""
    found: list[dict[str, int]] = []
    for start, dirty, end in bits.ranges(offset, length):
        bounds = chain(start[1:].tolist(), (end,))
        for low, high, is_dirty in zip(start.tolist(), bounds, dirty.tolist(), strict=True):
            if not is_dirty:
                continue
            if found and found[-1]["start"] + found[-1]["length"] == low:
                found[-1]["length"] += high - low
            elif len(found) == limit:
                return found, low
            else:
                found.append({"start": low, "length": high - low})
    return found, offset + length


def _without_tail(packed: Packed, size: int, granularity_bits: int) -> Packed:
    """``packed`` itself, without bits behind the end of the disk."""
    granules = -(-size >> granularity_bits)
    if granules & 7:
        packed[-1] &= (1 << (granules & 7)) - 1
    return packed

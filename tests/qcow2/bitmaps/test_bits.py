"""The bits of a dirty bitmap in memory: every write is seen, by granule, and nothing but writes."""

import random
import sys
import threading
from itertools import pairwise

import numpy as np
import pytest

from nbdq.qcow2.bitmaps.bits import DirtyBits

SIZES = [
    (512, 9),
    (4096, 9),
    (4608, 9),
    ((1 << 20) + 512, 16),
    (3 << 20, 12),
    ((5 << 30) + 512, 31),
    (1 << 20, 31),
    ((64 << 20) + 1536, 9),
]


def states(bits: DirtyBits, offset: int, length: int) -> list[tuple[int, int, int]]:
    """(start, end, dirty) of every range; fails if they do not cover the whole, in order."""
    found = []
    position = offset
    for part in bits.ranges(offset, length):
        assert part.start[0] == position
        bounds = [*part.start.tolist(), part.end]
        assert all(a < b for a, b in pairwise(bounds))
        found += [(a, b, int(state)) for (a, b), state in zip(pairwise(bounds), part.dirty, strict=True)]
        position = part.end
    assert position == offset + length
    return found


def dirty_granules(bits: DirtyBits) -> list[int]:
    """Numbers of the granules that count as written, from :meth:`DirtyBits.ranges`."""
    granules = -(-bits.size >> bits.granularity_bits)
    found: list[int] = []
    for start, end, state in states(bits, 0, bits.size):
        if state:
            found += range(start >> bits.granularity_bits, (end - 1 >> bits.granularity_bits) + 1)
    assert all(number < granules for number in found)
    return found


def test_a_new_bitmap_is_clean() -> None:
    assert states(DirtyBits(1 << 20, 16), 0, 1 << 20) == [(0, 1 << 20, 0)]


def test_a_byte_makes_its_granule_dirty_and_no_other() -> None:
    bits = DirtyBits(1 << 20, 16)
    bits.mark(65535, 1)
    bits.mark(0x30000, 1)
    assert dirty_granules(bits) == [0, 3]


def test_the_last_granule_may_be_partial() -> None:
    bits = DirtyBits((1 << 20) + 512, 16)
    bits.mark(1 << 20, 512)
    assert states(bits, 0, (1 << 20) + 512) == [(0, 1 << 20, 0), (1 << 20, (1 << 20) + 512, 1)]


@pytest.mark.parametrize(("size", "granularity_bits"), SIZES)
def test_every_written_granule_is_dirty_and_no_other(size: int, granularity_bits: int) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chosen = random.Random(seed)
    bits, model = DirtyBits(size, granularity_bits), set[int]()
    for _ in range(60):
        offset = chosen.randrange(size)
        length = min(size - offset, chosen.choice([1, 512, 4096, 1 << granularity_bits, 9 << granularity_bits, size]))
        if length > size // 4:
            length = max(1, length // chosen.randrange(4, 64))
        bits.mark(offset, length)
        model.update(range(offset >> granularity_bits, (offset + length - 1 >> granularity_bits) + 1))
        assert bits.changed
    assert dirty_granules(bits) == sorted(model)
    stored = np.flatnonzero(np.unpackbits(bits.packed, bitorder="little"))
    assert stored.tolist() == sorted(model), "the first granule is bit 0 of byte 0 (Q67)"
    for _ in range(60):
        offset = chosen.randrange(size)
        length = chosen.randrange(1, size - offset + 1)
        for start, end, state in states(bits, offset, length):
            first, last = start >> granularity_bits, end - 1 >> granularity_bits
            assert {number in model for number in range(first, last + 1)} == {bool(state)}


def test_a_disk_written_from_end_to_end_is_dirty_from_end_to_end() -> None:
    bits = DirtyBits(1 << 40, 16)
    bits.mark(0, 1 << 40)
    assert {state for _, _, state in states(bits, 0, 1 << 40)} == {1}


def test_what_lies_behind_a_smaller_layer_is_clean() -> None:
    bits = DirtyBits(1 << 20, 16)
    bits.mark(0, 1 << 20)
    assert states(bits, (1 << 20) - 512, 4096) == [((1 << 20) - 512, 1 << 20, 1), (1 << 20, (1 << 20) + 3584, 0)]
    assert states(bits, 8 << 20, 512) == [(8 << 20, (8 << 20) + 512, 0)]


def test_a_huge_clean_bitmap_takes_no_memory_to_be_walked() -> None:
    """A disk of 2 TiB with the finest granularity has 512 MiB of bits, which QEMU allows."""
    bits = DirtyBits(2 << 40, 9)
    bits.mark((2 << 40) - 512, 512)
    assert states(bits, (2 << 40) - 1024, 1024)[1][2] == 1


def test_no_write_is_missed_when_threads_write_to_neighbouring_granules() -> None:
    bits = DirtyBits(8 << 20, 9)
    granules = (8 << 20) >> 9
    threads = 4

    def write(number: int) -> None:
        for granule in range(number, granules, threads):
            bits.mark(granule << 9, 512)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        workers = [threading.Thread(target=write, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert states(bits, 0, 8 << 20) == [(0, 8 << 20, 1)]


def test_a_bitmap_that_says_it_already_is_not_changed() -> None:
    bits = DirtyBits(1 << 20, 16)
    bits.mark(0, 1 << 20)
    bits.changed = False
    bits.mark(70000, 512)
    assert not bits.changed

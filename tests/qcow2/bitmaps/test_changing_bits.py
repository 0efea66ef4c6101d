"""Dirty bits that are taken, cleared, merged and resized, also while writes mark them."""

import random
import sys
import threading
from time import sleep

import numpy as np
import pytest

from nbdq.qcow2.bitmaps.bits import AllDirty, DirtyBits, dirty_extents
from nbdq.qcow2.writing.epochs import Epochs


def granules(bits: DirtyBits) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(bits.packed, bitorder="little")).tolist())


def test_what_is_taken_is_clean_and_everything_else_stays() -> None:
    bits = DirtyBits(100 << 16, 16)
    for granule in (0, 1, 7, 8, 9, 40, 99):
        bits.mark(granule << 16, 1)
    assert bits.take(1 << 16, 8 << 16) == [(1 << 16, 1 << 16), (7 << 16, 2 << 16)]
    assert granules(bits) == {0, 9, 40, 99}
    assert bits.take(1 << 16, 8 << 16) == []
    assert bits.take(0, 100 << 16) == [(0, 1 << 16), (9 << 16, 1 << 16), (40 << 16, 1 << 16), (99 << 16, 1 << 16)]
    assert granules(bits) == set()


def test_taking_knows_where_the_disk_ends() -> None:
    bits = DirtyBits((2 << 16) + 512, 16)
    bits.mark(0, bits.size)
    assert bits.take(1 << 16, 1 << 30) == [(1 << 16, (1 << 16) + 512)]
    assert bits.take(1 << 20, 1 << 16) == []
    assert DirtyBits(0, 16).take(0, 512) == []


def test_a_run_that_is_longer_than_what_is_looked_at_at_once_is_taken_as_one() -> None:
    bits = DirtyBits(1 << 28, 9)  # four pieces
    bits.mark(1 << 10, (1 << 28) - (1 << 11))
    assert bits.take(0, 1 << 28) == [(1 << 10, (1 << 28) - (1 << 11))]


def test_a_mark_after_a_taking_is_taken_again_even_if_the_bit_was_set_before() -> None:
    bits = DirtyBits(1 << 20, 16)
    bits.mark(0, 512)
    bits.take(0, 1 << 20)
    bits.mark(0, 512)
    assert bits.take(0, 1 << 20) == [(0, 1 << 16)]


def test_clearing_can_be_undone_without_losing_what_was_marked_since() -> None:
    bits = DirtyBits(1 << 20, 16)
    bits.mark(0, 512)
    old = bits.clear()
    assert granules(bits) == set()
    bits.mark(3 << 16, 512)
    bits.restore(old | bits.packed)
    assert granules(bits) == {0, 3}


@pytest.mark.parametrize("target_bits", [9, 10, 12, 13, 16, 20, 31])
def test_merging_marks_what_any_source_marks_in_the_units_of_the_target(target_bits: int) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chosen = random.Random(seed)
    size = chosen.randrange(1 << 20, 8 << 20) // 512 * 512
    target = DirtyBits(size, target_bits)
    sources = [DirtyBits(size, source_bits) for source_bits in (9, 11, 12, 14, 16, 19, 22)]
    for bits in [target, *sources]:
        for _ in range(chosen.randrange(20)):
            offset = chosen.randrange(size)
            bits.mark(offset, chosen.randrange(1, min(size - offset, 1 << chosen.randrange(1, 18)) + 1))
    before = granules(target)
    expected = set(before)
    for source in sources:
        for granule in granules(source):
            start, end = granule << source.granularity_bits, min(granule + 1 << source.granularity_bits, size)
            expected.update(range(start >> target_bits, (end - 1 >> target_bits) + 1))
    chosen.shuffle(sources)
    old = target.merge(sources)
    assert granules(target) == expected
    target.restore(old)
    assert granules(target) == before


def test_a_merge_between_extremes_needs_no_more_memory_than_the_larger_bitmap() -> None:
    coarse, fine = DirtyBits(1 << 34, 31), DirtyBits(1 << 34, 9)
    coarse.mark(3 << 31, 1)
    fine.mark((6 << 31) + 512, 1)
    merged = DirtyBits(1 << 34, 9)
    merged.merge([coarse])
    assert merged.dirty_length == 1 << 31
    assert merged.take(0, 1 << 34) == [(3 << 31, 1 << 31)]
    coarse.merge([fine])
    assert granules(coarse) == {3, 6}


def test_a_larger_disk_is_clean_where_it_is_new_and_a_smaller_one_forgets() -> None:
    bits = DirtyBits(10 << 16, 16)
    bits.mark(0, 10 << 16)
    bits.resize(30 << 16)
    assert granules(bits) == set(range(10))
    bits.mark(20 << 16, 1)
    bits.resize((4 << 16) + 512)
    assert granules(bits) == set(range(5))
    bits.resize(30 << 16)
    assert granules(bits) == set(range(5))


def test_the_dirty_length_counts_whole_granules_as_in_qemu() -> None:
    bits = DirtyBits((1 << 20) + 512, 16)
    bits.mark(0, 1)
    bits.mark(1 << 20, 1)
    assert bits.dirty_length == 2 << 16


def test_extents_are_given_up_to_a_limit_with_the_place_to_go_on() -> None:
    bits = DirtyBits(1 << 20, 16)
    for granule in (1, 2, 5, 9, 15):
        bits.mark(granule << 16, 1)
    first, going_on = dirty_extents(bits, 0, 1 << 20, limit=2)
    assert first == [{"start": 1 << 16, "length": 2 << 16}, {"start": 5 << 16, "length": 1 << 16}]
    rest, end = dirty_extents(bits, going_on, (1 << 20) - going_on, limit=2)
    assert rest == [{"start": 9 << 16, "length": 1 << 16}, {"start": 15 << 16, "length": 1 << 16}]
    assert end == 1 << 20


def test_what_nobody_may_believe_is_dirty_everywhere() -> None:
    assert dirty_extents(AllDirty(), 512, 4096, limit=1) == ([{"start": 512, "length": 4096}], 4608)


class Disk:
    """A disk whose every granule holds the number of the write that it saw last; requests as in the engine."""

    def __init__(self, granule_count: int) -> None:
        self.content = [0] * granule_count
        self.bits = DirtyBits(granule_count << 16, 16)
        self.epochs = Epochs()

    def write(self, granule: int, value: int) -> None:
        with self.epochs.pinned():
            self.bits.mark(granule << 16, 1 << 16)
            sleep(0)  # whatever comes between marking and writing
            self.content[granule] = value

    def barrier(self) -> None:
        self.epochs.wait_for(self.epochs.advance())


def test_a_copy_that_takes_waits_and_reads_misses_no_write() -> None:
    """The argument of the module: with every interleaving that threads come up with, the copy equals the disk."""
    disk = Disk(40)  # few granules, five bytes: everybody meets everybody
    copy = [0] * len(disk.content)
    stop = threading.Event()

    def guest(seed: int) -> None:
        chosen = random.Random(seed)
        number = seed
        while not stop.is_set():
            number += 10
            disk.write(chosen.randrange(len(copy)), number)

    def pass_over() -> None:
        taken = disk.bits.take(0, disk.bits.size)
        disk.barrier()
        for start, length in taken:
            for granule in range(start >> 16, start + length >> 16):
                copy[granule] = disk.content[granule]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    guests = [threading.Thread(target=guest, args=(seed,)) for seed in range(1, 4)]
    try:
        for each in guests:
            each.start()
        for number in range(150):
            pass_over()
            if number % 3 == 0:
                disk.bits.resize((len(copy) + number % 5) << 16)
    finally:
        stop.set()
        for each in guests:
            each.join()
        sys.setswitchinterval(interval)
    pass_over()
    assert copy == disk.content

"""Tables in memory: what a flush writes of them, and that nothing that changed is ever forgotten."""

import random

import numpy as np
import pytest

from nbdq.qcow2.refcount_widths import max_refcount, pack, unpack
from nbdq.qcow2.writing.tables import OFFSET_ORDER, Table, Taken

PAGE = 4096
ORDERS = range(7)


def apply(taken: Taken, file: bytearray) -> None:
    for offset, data in taken.writes:
        file[offset : offset + len(data)] = data


def filled(length: int, order: int = OFFSET_ORDER, *, seed: int = 0) -> bytes:
    """The bytes of a table full of random entries."""
    chance = random.Random(seed)
    return pack([chance.randrange(max_refcount(order) + 1) for _ in range(length * 8 >> order)], order)


@pytest.mark.parametrize("order", ORDERS)
def test_entries_of_any_width_are_integers_in_memory_and_big_endian_in_the_file(order: int) -> None:
    """Q25, Q26."""
    data = filled(512, order)
    table = Table.parse(8192, data, order)
    assert table.values.tolist() == unpack(data, order).tolist()
    assert not table.needs_write
    table.touch(0, len(table.values))
    assert table.take().writes == [(8192, data)]


def test_words_and_values_are_the_same_memory() -> None:
    table = Table.empty(0, 512)
    table.words[3] = (1 << 64) - 1
    table.values[5] = 77
    assert table.values[3] == (1 << 64) - 1
    assert table.words[5] == 77


def test_a_table_that_did_not_change_is_not_written() -> None:
    table = Table.parse(4096, filled(65536))
    assert not table.needs_write
    assert table.take().writes == []


@pytest.mark.parametrize(
    ("touched", "expected"),
    [
        ([(0, 1)], [(0, PAGE)]),
        ([(511, 1)], [(0, PAGE)]),
        ([(511, 2)], [(0, 2 * PAGE)]),
        ([(512, 512)], [(PAGE, PAGE)]),
        ([(0, 8192)], [(0, 65536)]),
        ([(8191, 1), (0, 1)], [(0, PAGE), (65536 - PAGE, PAGE)]),
        ([(600, 1), (1100, 1), (5000, 1)], [(PAGE, 2 * PAGE), (9 * PAGE, PAGE)]),
    ],
)
def test_only_pages_that_changed_are_written_and_neighbours_in_one_piece(
    touched: list[tuple[int, int]], expected: list[tuple[int, int]]
) -> None:
    table = Table.parse(1 << 20, filled(65536))
    for first, count in touched:
        table.touch(first, count)
    assert [(offset - (1 << 20), len(data)) for offset, data in table.take().writes] == expected


@pytest.mark.parametrize("order", ORDERS)
def test_an_entry_of_any_width_is_written_with_its_page(order: int) -> None:
    per_page = PAGE * 8 >> order
    table = Table.parse(0, bytes(4 * PAGE), order)
    table.set(per_page, 1)
    table.set(2 * per_page - 1, 1)
    assert [(offset, len(data)) for offset, data in table.take().writes] == [(PAGE, PAGE)]
    table.set(2 * per_page, 1)
    assert [(offset, len(data)) for offset, data in table.take().writes] == [(2 * PAGE, PAGE)]


def test_a_table_smaller_than_a_page_does_not_write_over_its_neighbour() -> None:
    """Clusters may be as small as 512 bytes."""
    table = Table.parse(512, filled(512))
    table.set(63, 5)
    assert [(offset, len(data)) for offset, data in table.take().writes] == [(512, 512)]


def test_a_new_table_is_written_whole_once() -> None:
    table = Table.empty(65536, 65536)
    assert table.needs_write
    table.set(8000, 7)
    ((offset, data),) = table.take().writes
    assert (offset, data) == (65536, bytes(64000) + (7).to_bytes(8, "big") + bytes(1528))
    assert not table.needs_write
    table.set(0, 1)
    assert [len(data) for _, data in table.take().writes] == [PAGE]


def test_a_table_that_moved_is_written_whole_where_it_is_now() -> None:
    """A6: the copy of a table that a snapshot shares."""
    data = filled(8192)
    table = Table.parse(4096, data)
    table.offset, table.is_new = 1 << 20, True
    assert table.take().writes == [(1 << 20, data)]


def test_what_is_being_written_does_not_change_any_more() -> None:
    """Guests go on while a flush writes: a half of their change must not get into the file."""
    table = Table.parse(0, bytes(PAGE))
    table.set(0, 1)
    taken = table.take()
    table.set(0, 2)
    table.values[1] = 3
    assert taken.writes == [(0, (1).to_bytes(8, "big") + bytes(PAGE - 8))]
    assert table.needs_write


@pytest.mark.parametrize("is_new", [True, False])
def test_what_could_not_be_written_is_written_by_the_next_flush_with_what_came_later(is_new: bool) -> None:
    table = Table.empty(0, 4 * PAGE) if is_new else Table.parse(0, bytes(4 * PAGE))
    table.set(0, 1)
    lost = table.take()
    table.set(1600, 2)
    lost.put_back()
    file = bytearray(b"\xff" * 4 * PAGE if is_new else bytes(4 * PAGE))
    apply(table.take(), file)
    assert file == pack(table.values, OFFSET_ORDER)
    assert not table.needs_write


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("order", ORDERS)
def test_whatever_changes_and_fails_the_file_catches_up(order: int, seed: int) -> None:
    chance = random.Random(seed)
    length = chance.choice((512, 4096, 3 * PAGE, 65536))
    file = bytearray(filled(length, order, seed=seed))
    table = Table.parse(0, bytes(file), order)
    count = len(table.values)
    for _ in range(60):
        match chance.randrange(4):
            case 0:
                table.set(chance.randrange(count), chance.randrange(max_refcount(order) + 1))
            case 1:
                first = chance.randrange(count)
                part = chance.randrange(1, count - first + 1)
                table.values[first : first + part] = chance.randrange(max_refcount(order) + 1)
                table.touch(first, part)
            case 2:
                apply(table.take(), file)
                assert file == pack(table.values, order), f"seed {seed}"
            case _:
                taken = table.take()
                for offset, data in taken.writes:
                    if chance.random() < 0.5:
                        file[offset : offset + len(data)] = data
                taken.put_back()
    apply(table.take(), file)
    assert file == pack(table.values, order), f"seed {seed}"
    assert np.array_equal(Table.parse(0, bytes(file), order).values, table.values)

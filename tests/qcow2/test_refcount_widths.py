"""Refcounts of every width, between bytes and numbers (Q25, Q26)."""

import numpy as np
import pytest

from nbdq.qcow2.refcount_widths import max_refcount, pack, unpack


@pytest.mark.parametrize(
    ("order", "block", "entries"),
    [
        (0, "01 80", [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
        (1, "e4", [0, 1, 2, 3]),
        (2, "21 43", [1, 2, 3, 4]),
        (3, "01 ff", [1, 255]),
        (4, "0001 ff00", [1, 0xFF00]),
        (5, "00000001 ffffffff", [1, (1 << 32) - 1]),
        (6, "0000000000000001 ffffffffffffffff", [1, (1 << 64) - 1]),
    ],
)
def test_narrow_entries_start_at_the_low_end_of_a_byte_and_wide_ones_are_big_endian(
    order: int, block: str, entries: list[int]
) -> None:
    assert unpack(bytes.fromhex(block), order).tolist() == entries
    assert pack(entries, order) == bytes.fromhex(block)


@pytest.mark.parametrize("order", range(7))
def test_a_block_survives_the_way_to_numbers_and_back(order: int) -> None:
    block = np.random.default_rng(order).bytes(4096)
    entries = unpack(block, order)
    assert entries.dtype == np.uint64
    assert len(entries) == 4096 * 8 >> order
    assert int(entries.max()) <= max_refcount(order)
    assert pack(entries, order) == block


@pytest.mark.parametrize("order", range(6))
def test_no_refcount_wraps(order: int) -> None:
    with pytest.raises(AssertionError):
        pack([max_refcount(order) + 1] * 8, order)


@pytest.mark.parametrize("order", range(7))
def test_nothing_stays_nothing(order: int) -> None:
    assert pack(unpack(b"", order), order) == b""

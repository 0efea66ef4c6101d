"""What an audit finds in an image that is broken in one place, and what it costs if the image is a trap."""

import os
import resource
import tracemalloc
from typing import Any

import numpy as np
import pytest

from nbdq.errors import CorruptImage
from nbdq.qcow2.audit.check import check_image
from nbdq.qcow2.audit.damaged_header import read_header_to_check
from nbdq.qcow2.audit.reference_counts import PAGE, ReferenceCounts, TooManyPages
from nbdq.qcow2.audit.result import MAX_FINDINGS, CheckResult
from nbdq.qcow2.features import Autoclear, Compatible, Incompatible
from nbdq.storage import FileStorage
from tests.qcow2.audit.small import BLOCK, CLUSTER, COPIED, L1, L2, TABLE, put, put_refcount, small_image
from tests.qcow2.minimal import poke, stored


def check(image: bytes | bytearray, length: int | None = None) -> CheckResult:
    storage = stored(image, length)
    try:
        return check_image(storage, read_header_to_check(storage))
    finally:
        storage.close()


def verdict(result: CheckResult) -> tuple[int, int, int]:
    return result.corruptions, result.leaks, result.check_errors


def test_a_sound_image_has_no_findings_and_its_clusters_are_counted() -> None:
    result = check(small_image())
    assert result == CheckResult(total_clusters=64, allocated_clusters=3, image_end_offset=8 * CLUSTER)
    assert result.is_clean


def _break(*pokes: tuple[int, int]) -> bytearray:
    image = small_image()
    for offset, value in pokes:
        put(image, offset, value)
    return image


@pytest.mark.parametrize(
    ("image", "expected", "words"),
    [
        (_break((L2 + 24, COPIED | 5 * CLUSTER)), (1, 0, 0), "cluster 5: refcount=1 references=2"),
        (_break((L2 + 8, 0)), (0, 1, 0), "leaked cluster 6: refcount=1 references=0"),
        (_break((L2, 5 * CLUSTER)), (1, 0, 0), "entry 0 of the L2 table at 0x800 is 0xa00: the refcount is 1"),
        (_break((L1, L2)), (1, 0, 0), "L1 entry 0 is 0x800, but the refcount of the L2 table is 1"),
        (_break((L1, COPIED | L2 | 1)), (1, 0, 0), "L1 entry 0 is 0x8000000000000801: reserved bits are set"),
        (_break((L2, COPIED | 5 * CLUSTER | 1 << 56)), (1, 0, 0), "reserved bits are set"),
        (_break((L2 + 24, COPIED | 99 * CLUSTER)), (2, 0, 0), "data cluster at 0xc600 is past the end of the file"),
        (_break((L1, COPIED)), (1, 4, 0), "flags without an L2 table"),
        (_break((L2 + 24, 1 << 62 | COPIED | 5 * CLUSTER)), (2, 0, 0), "a compressed cluster has COPIED set"),
        (_break((TABLE, BLOCK | 4)), (1, 1, 0), "refcount block 0 at 0x404 has reserved bits set"),
        (_break((TABLE, BLOCK | 64)), (1, 1, 0), "has reserved bits set"),
        (_break((TABLE + 8, 99 * CLUSTER)), (1, 0, 0), "refcount block 1 at 0xc600 is past the end of the file"),
        (_break((TABLE + 8, BLOCK)), (2, 8, 0), "refcount block 1 at 0x400 is also used for something else"),
    ],
)
def test_one_fault_is_found_and_named(image: bytearray, expected: tuple[int, int, int], words: str) -> None:
    result = check(image)
    assert verdict(result) == expected
    assert any(words in finding for finding in result.findings), result.findings


def test_a_leak_past_the_end_of_the_file_is_found() -> None:
    image = small_image()
    put_refcount(image, 100, 1)
    result = check(image)
    assert verdict(result) == (0, 1, 0)
    assert result.image_end_offset == 101 * CLUSTER


def test_what_a_cut_off_file_has_lost_does_not_count_as_leaked() -> None:
    assert verdict(check(small_image(), 7 * CLUSTER)) == (1, 0, 0)


def test_metadata_that_is_also_guest_data_is_corrupt_even_if_the_refcount_says_two() -> None:
    image = _break((L2 + 24, 3 * CLUSTER))
    put_refcount(image, 3, 2)
    result = check(image)
    assert verdict(result) == (1, 0, 0)
    assert "the active L1 table shares cluster 3 with something else" in result.findings


def test_an_l2_table_of_two_l1_entries_is_counted_twice() -> None:
    image = small_image()
    poke(image, l1_size=2, size=128 * CLUSTER)
    put(image, L1, L2)
    put(image, L1 + 8, L2)
    for number in range(3):
        put(image, L2 + 8 * number, (5 + number) * CLUSTER)
    for cluster in range(4, 8):
        put_refcount(image, cluster, 2)
    result = check(image)
    assert result.is_clean
    assert result.allocated_clusters == 6


def test_compressed_clusters_count_for_every_host_cluster_that_they_touch() -> None:
    image = small_image()
    put(image, L2 + 24, 1 << 62 | 1 << 61 | 6 * CLUSTER + 100)  # two sectors from the middle of cluster 6
    assert verdict(check(image)) == (2, 0, 0)
    put(image, L2 + 8, 6 * CLUSTER)
    put(image, L2 + 16, 7 * CLUSTER)
    for cluster in (6, 7):
        put_refcount(image, cluster, 2)
    result = check(image)
    assert result.is_clean
    assert (result.allocated_clusters, result.compressed_clusters, result.fragmented_clusters) == (4, 1, 1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"autoclear": Autoclear.BITMAPS}, "promises bitmaps"),
        ({"version": 2, "entry": COPIED | 5 * CLUSTER | 1}, "a zero cluster in an image of version 2"),
    ],
)
def test_what_qemu_trips_over_later_is_found_now(fields: dict[str, Any], words: str) -> None:
    entry = fields.pop("entry", None)
    image = small_image(**fields)
    if entry is not None:
        put(image, L2, entry)
    result = check(image)
    assert verdict(result) == (1, 0, 0)
    assert words in result.findings[0]


@pytest.mark.parametrize("field", ["refcount_table_offset", "refcount_table_clusters"])
@pytest.mark.parametrize("value", [0, 1, 1 << 31])
def test_an_image_without_a_refcount_table_can_be_checked(field: str, value: int) -> None:
    result = check(poke(small_image(), **{field: value}))
    assert result.corruptions or (field, value) == ("refcount_table_clusters", 1)


def test_a_dirty_image_is_no_error_in_itself() -> None:
    image = small_image(incompatible=Incompatible.DIRTY, compatible=Compatible.LAZY_REFCOUNTS)
    assert check(image).is_clean


def test_findings_are_a_few_lines_however_much_is_wrong() -> None:
    image = small_image()
    poke(image, l1_size=4096, size=1 << 20)
    image += (8 | COPIED).to_bytes(8, "big") * 4096
    put(image, 40, 8 * CLUSTER)
    result = check(image)
    assert result.corruptions > 4096
    assert len(result.findings) == MAX_FINDINGS
    assert result.omitted > 3000


def _trap(entries: np.ndarray[Any, np.dtype[np.uint64]], length: int) -> FileStorage:
    """A sparse file with an L1 table of these entries behind the small image; clusters of 64 KiB."""
    l1 = 1 << 30
    image = small_image()
    poke(image, cluster_bits=16, l1_size=len(entries), l1_table_offset=l1, refcount_table_offset=1 << 17)
    storage = stored(image, length)
    os.pwrite(storage.descriptor, entries.astype(">u8").tobytes(), l1)
    return storage


def _scattered_tables() -> FileStorage:
    rng = np.random.default_rng(5)
    entries = (np.arange(8, dtype=np.uint64) + np.uint64(1 << 15)) << np.uint64(16)
    storage = _trap(entries, 1 << 43)
    table = rng.integers(1, 1 << 27, size=8 * 8192, dtype=np.uint64) << np.uint64(16)
    os.pwrite(storage.descriptor, table.astype(">u8").tobytes(), 1 << 31)
    return storage


@pytest.mark.parametrize(
    ("make", "refused"),
    [
        pytest.param(lambda: _trap(np.full(1 << 20, 1 << 31, dtype=np.uint64), 1 << 32), False, id="one table"),
        pytest.param(
            lambda: _trap((np.arange(1 << 21, dtype=np.uint64) + np.uint64(1 << 16)) << np.uint64(16), 1 << 43),
            True,
            id="tables in holes",
        ),
        pytest.param(_scattered_tables, True, id="scattered data"),
    ],
)
def test_a_trap_costs_little_memory_and_time(make: Any, refused: bool) -> None:
    storage = make()
    tracemalloc.start()
    begin = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    try:
        header = read_header_to_check(storage)
        if refused:
            with pytest.raises(CorruptImage):
                check_image(storage, header)
        else:
            assert check_image(storage, header).corruptions
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()
        storage.close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - begin < 60


def test_counters_grow_with_their_counts_and_keep_to_their_budget() -> None:
    counts = ReferenceCounts(4 * PAGE)
    near = np.arange(10, dtype=np.int64)
    for _ in range(300):
        counts.add(near)
    counts.add(near, np.full(10, 70, dtype=np.int64))
    assert counts.of(np.array([0, 9, 10, 10 * PAGE])).tolist() == [370, 370, 0, 0]
    assert counts.highest() == 9
    with pytest.raises(TooManyPages):
        counts.add(np.arange(8, dtype=np.int64) * 1000 * PAGE)

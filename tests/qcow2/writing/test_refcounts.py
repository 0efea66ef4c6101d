"""Refcounts in memory: right in every width, written when they must be, and never where metadata already lies."""

import errno
import os
from collections.abc import Iterator

import numpy as np
import pytest

from nbdq.qcow2.fields import MAX_REFCOUNT_TABLE
from nbdq.qcow2.refcount_widths import max_refcount, unpack
from nbdq.qcow2.writing import refcounts as module
from nbdq.qcow2.writing.protection import ProtectedClusters
from nbdq.qcow2.writing.refcounts import BrokenRefcounts, Refcounts
from tests.qcow2.minimal import minimal_header, stored
from tests.qcow2.writing.counted import CLUSTER, Rig

ORDERS = range(7)


@pytest.fixture(params=ORDERS, ids=lambda order: f"{1 << order}bit")
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(request.param)
    yield rig
    rig.storage.close()


def test_counts_of_every_width_are_read_and_written(rig: Rig) -> None:
    """Q25, Q26."""
    refcounts = rig.refcounts
    assert refcounts.maximum == max_refcount(rig.order)
    assert [refcounts.get(cluster) for cluster in range(6)] == [1, 1, 1, 1, 0, 0]
    refcounts.set_used(5, 1)
    refcounts.set_used(8, 9)
    assert not refcounts.table.needs_write
    rig.flush()
    again = rig.reread()
    expected = [1, 1, 1, 1, 0, 1, 0, 0] + [1] * 9 + [0]
    assert [again.get(cluster) for cluster in range(18)] == expected
    assert again.get_many(np.array([16, 0, 17, 5], np.uint64)).tolist() == [1, 1, 0, 1]
    assert not refcounts.needs_flush


def test_what_no_block_and_no_table_counts_is_free(rig: Rig) -> None:
    """Q27."""
    refcounts = rig.refcounts
    beyond = refcounts.covered_clusters
    assert refcounts.get(rig.per_block) == 0
    assert refcounts.get(beyond) == refcounts.get(beyond + 10**9) == 0
    assert refcounts.get_many(np.array([beyond, 1, rig.per_block], np.uint64)).tolist() == [0, 1, 0]
    assert not refcounts.has_block(1)
    assert not refcounts.has_block(10**6)


def test_the_largest_count_is_kept(rig: Rig) -> None:
    """Q31: also one of 64 bits."""
    largest = max_refcount(rig.order)
    full = Rig(rig.order, counts={7: largest})
    assert full.refcounts.get(7) == largest
    assert full.refcounts.get_many(np.array([7], np.uint64)).tolist() == [largest]
    released = full.refcounts.lower(7, 1)
    assert full.refcounts.get(7) == largest - 1
    assert released == ([(7, 1)] if largest == 1 else [])


def test_free_runs_are_those_without_a_count() -> None:
    rig = Rig(counts={4: 1, 7: 3, 255: 1})
    assert list(rig.refcounts.free_runs(0)) == [(5, 2), (8, 247)]
    rig.refcounts.set_used(5, 2)
    rig.refcounts.set_used(8, 247)
    assert list(rig.refcounts.free_runs(0)) == []


def test_only_clusters_that_lose_their_last_reference_become_free() -> None:
    rig = Rig(counts={5: 1, 6: 1, 7: 2, 8: 1, 9: 0, 10: 1})
    assert rig.refcounts.lower(5, 6) == [(5, 2), (8, 1), (10, 1)]
    assert [rig.refcounts.get(cluster) for cluster in range(5, 11)] == [0, 0, 1, 0, 0, 0]


def test_a_count_never_falls_below_zero() -> None:
    """R-28: where refcounts lie, whoever believed in a cluster leaks what they hide."""
    rig = Rig()
    assert rig.refcounts.lower(4, 4) == []
    assert rig.refcounts.lower(10**9, 3) == []
    assert [rig.refcounts.get(cluster) for cluster in range(4, 8)] == [0] * 4


def clusters_of(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(numbers, dtype=np.uint64)


def test_references_are_added_as_often_as_a_cluster_is_named() -> None:
    rig = Rig(counts={5: 1, 6: 3, 255: 1})
    rig.refcounts.make_blocks(1)
    rig.refcounts.set_used(257, 1)
    rig.refcounts.raise_counts(clusters_of(5, 6, 6, 255, 257, 257, 257))
    rig.flush()
    assert [rig.reread().get(cluster) for cluster in (4, 5, 6, 7, 255, 256, 257)] == [0, 2, 5, 0, 2, 1, 4]
    rig.refcounts.raise_counts(clusters_of())
    assert not rig.refcounts.needs_flush


def test_a_count_that_cannot_be_raised_leaves_all_counts_as_they_were(rig: Rig) -> None:
    """Q31: never a wrap; what is refused is refused whole."""
    largest = max_refcount(rig.order)
    full = Rig(rig.order, counts={5: max(1, largest - 1), 6: largest})
    with pytest.raises(OSError, match=f"refcount_bits={1 << rig.order}") as caught:
        full.refcounts.raise_counts(clusters_of(5, 6))
    assert caught.value.errno == errno.EFBIG
    if rig.order:
        full.refcounts.raise_counts(clusters_of(5))
    with pytest.raises(OSError, match="refcount_bits"):
        full.refcounts.raise_counts(clusters_of(3, 5))
    assert [full.refcounts.get(cluster) for cluster in (3, 5, 6)] == [1, largest, largest]


@pytest.mark.parametrize("unused", [7, 300], ids=["refcount 0", "no block"])
def test_a_cluster_in_use_that_nobody_counted_means_that_refcounts_are_broken(unused: int) -> None:
    rig = Rig(counts={5: 1})
    with pytest.raises(BrokenRefcounts, match=str(unused)):
        rig.refcounts.raise_counts(clusters_of(5, unused))
    assert rig.refcounts.get(5) == 1
    assert not rig.refcounts.needs_flush


def test_counts_are_raised_even_if_their_blocks_do_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BUDGET", CLUSTER)
    rig = Rig(counts={5: 1})
    for number in range(1, 5):
        rig.refcounts.make_blocks(number)
    rig.flush()
    rig.refcounts.raise_counts(clusters_of(5, 256, 512, 768, 1024))
    rig.flush()
    assert [rig.reread().get(cluster) for cluster in (5, 256, 512, 768, 1024)] == [2] * 5


def test_references_are_taken_from_clusters_of_several_blocks() -> None:
    rig = Rig()
    rig.refcounts.make_blocks(1)
    rig.refcounts.set_used(250, 6)
    rig.refcounts.set_used(257, 4)
    assert rig.refcounts.lower(250, 11) == [(250, 6), (256, 5)]


def test_a_new_block_lies_in_the_first_cluster_that_it_counts_and_counts_itself(rig: Rig) -> None:
    """A3: so nothing else has to exist for it."""
    number = 3
    rig.refcounts.make_blocks(number)
    first = number * rig.per_block
    assert rig.refcounts.table.words[number] == first * CLUSTER
    assert rig.refcounts.get(first) == 1
    assert rig.protected.overlaps(first, 1)
    assert list(rig.refcounts.free_runs(number)) == [(first + 1, rig.per_block - 1)]
    assert [call.name for call in rig.storage.take()] == ["reserve"], "written before the flush"
    rig.flush()
    assert unpack(rig.storage.read(first * CLUSTER, CLUSTER), rig.order).tolist() == [1] + [0] * (rig.per_block - 1)
    assert rig.reread().get(first) == 1


def test_a_flush_can_write_blocks_before_the_table_that_names_them() -> None:
    rig = Rig()
    rig.refcounts.make_blocks(2)
    rig.refcounts.set_used(10, 1)
    blocks, table = rig.refcounts.take()
    assert [taken.table.offset for taken in blocks] == [2 * CLUSTER, 512 * CLUSTER]
    assert table is not None
    assert table.table is rig.refcounts.table
    rig.refcounts.settle()
    rig.refcounts.set_used(11, 1)
    assert rig.refcounts.take()[1] is None


def test_a_block_for_which_there_is_no_room_does_not_exist() -> None:
    rig = Rig()

    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    rig.storage.before = full
    with pytest.raises(OSError, match="No space left"):
        rig.refcounts.make_blocks(1)
    assert not rig.refcounts.has_block(1)
    assert not rig.refcounts.needs_flush
    assert not rig.protected.overlaps(256, 1)


def test_a_block_is_never_made_over_metadata_that_nobody_counted() -> None:
    rig = Rig()
    rig.protected.add(256, 1)
    with pytest.raises(BrokenRefcounts, match="cluster 256 is in use"):
        rig.refcounts.make_blocks(1)


@pytest.mark.parametrize("place", [4 * CLUSTER, 1 << 50])
def test_a_block_that_lies_nowhere_is_found_out(place: int) -> None:
    """1.14: behind the end of the file."""
    rig = Rig()
    rig.refcounts.table.words[1] = place
    with pytest.raises(BrokenRefcounts, match="refcount block 1 is said to be at"):
        rig.refcounts.get(300)


def test_a_block_between_clusters_is_found_out() -> None:
    """1.14; with clusters larger than the 512 bytes that the entry can say."""
    header = minimal_header()
    file = bytearray(4 << 16)
    file[1 << 16 : (1 << 16) + 8] = (0x20200).to_bytes(8, "big")
    refcounts = Refcounts(stored(file), header, ProtectedClusters(np.empty(0, np.uint64)))
    with pytest.raises(BrokenRefcounts):
        refcounts.get(0)


def test_a_block_that_the_file_ends_in_counts_nothing_behind() -> None:
    rig = Rig()
    os.truncate(rig.storage.descriptor, 2 * CLUSTER + 4)
    assert [rig.refcounts.get(cluster) for cluster in range(4)] == [1, 1, 0, 0]


def test_blocks_that_wait_to_be_written_are_never_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by forgetting what the file has, and nothing else; also not while a flush is writing it."""
    monkeypatch.setattr(module, "_BLOCK_BUDGET", 4 * CLUSTER)
    rig = Rig()
    for number in range(1, 40):
        rig.refcounts.make_blocks(number)
    blocks, table = rig.refcounts.take()
    for number in range(40):
        rig.refcounts.get(number * 256)
    assert all(rig.refcounts.get(number * 256) == 1 for number in range(40))
    assert table is not None
    for taken in (*blocks, table):
        for offset, data in taken.writes:
            rig.storage.write(offset, data)
    rig.refcounts.settle()
    for number in range(40):
        assert rig.refcounts.get(number * 256) == 1
    assert len(rig.refcounts._blocks) <= 40
    again = rig.reread()
    for number in range(40):
        assert again.get(number * 256) == 1
    assert len(again._blocks) <= 8


def test_counts_whose_flush_failed_are_written_by_the_next() -> None:
    rig = Rig()
    rig.refcounts.make_blocks(1)
    rig.refcounts.set_used(5, 1)
    rig.refcounts.put_back(*rig.refcounts.take())
    rig.refcounts.set_used(6, 1)
    assert rig.refcounts.needs_flush
    rig.flush()
    again = rig.reread()
    assert [again.get(cluster) for cluster in (5, 6, 7, 256)] == [1, 1, 0, 1]


# A longer table (A4).


def test_a_longer_table_lies_behind_all_that_was_counted_and_counts_itself(rig: Rig) -> None:
    refcounts = rig.refcounts
    before = refcounts.covered_clusters
    refcounts.make_blocks(5)
    rig.flush()
    longer = refcounts.longer_table()
    assert longer.first == before
    assert len(longer.table.words) * 2 >= 3 * 64, "less than half as long again"
    assert not refcounts.has_block(64), "changed too early"
    for offset, data in longer.writes():
        rig.storage.write(offset, data)
    old = refcounts.adopt(longer)
    assert old == (1, 1)
    assert not rig.protected.overlaps(1, 1)
    assert rig.protected.overlaps(longer.first, longer.clusters)
    rig.header = minimal_header(
        cluster_bits=9,
        size=64 * CLUSTER,
        refcount_order=rig.order,
        refcount_table_offset=longer.table.offset,
        refcount_table_clusters=len(longer.table.words) * 8 // CLUSTER,
    )
    for found in (refcounts, rig.reread()):
        assert found.covered_clusters > before + longer.clusters
        ends = [found.get(longer.first), found.get(longer.first + longer.clusters - 1)]
        assert ends == [1, 1]
        assert found.get(longer.first + longer.clusters) == 0
        assert found.get(0) == 1
        assert found.get(5 * rig.per_block) == 1


def test_a_longer_table_in_the_file_does_not_name_blocks_that_are_not_there_yet() -> None:
    """W1: the header switches to it before the next flush has written them."""
    rig = Rig()
    rig.refcounts.make_blocks(2)
    longer = rig.refcounts.longer_table()
    longer.writes()
    assert longer.table.words[2] == 0
    rig.refcounts.adopt(longer)
    assert rig.refcounts.table.words[2] == 512 * CLUSTER
    blocks, table = rig.refcounts.take()
    assert [taken.table.offset for taken in blocks] == [512 * CLUSTER]
    assert table is not None
    assert table.writes, "the entry of the new block is forgotten"


def test_a_longer_table_is_not_laid_over_metadata() -> None:
    rig = Rig()
    rig.protected.add(rig.refcounts.covered_clusters + 1, 1)
    with pytest.raises(BrokenRefcounts, match="metadata lies behind"):
        rig.refcounts.longer_table()


def test_a_table_does_not_grow_beyond_what_readers_accept() -> None:
    """R-24: QEMU opens no image whose refcount table is longer than 8 MiB."""
    clusters = MAX_REFCOUNT_TABLE // CLUSTER
    rig = Rig(table_clusters=clusters)
    with pytest.raises(OSError, match="reached its limit") as caught:
        rig.refcounts.longer_table()
    assert caught.value.errno == errno.EFBIG

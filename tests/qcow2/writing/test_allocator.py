"""Which clusters are handed out: free ones, first ones first, and freed ones only when that is safe."""

import errno
import random

import numpy as np
import pytest

from nbdq.qcow2.writing.allocator import Allocator, Run, TableFull
from nbdq.qcow2.writing.refcounts import BrokenRefcounts
from tests.qcow2.writing.counted import CLUSTER, Rig

NEVER = 1 << 63


def allocator(rig: Rig) -> Allocator:
    return Allocator(rig.storage, CLUSTER, rig.refcounts, rig.protected)


def test_the_first_free_clusters_come_first_and_in_one_piece() -> None:
    """A1."""
    rig = Rig(counts={4: 1, 7: 1})
    found = allocator(rig)
    assert found.allocate(10)[:2] == (5, 2)
    assert found.allocate(10)[:2] == (8, 10)
    assert found.allocate(1)[:2] == (18, 1)
    assert [rig.refcounts.get(cluster) for cluster in (5, 6, 7, 8, 17, 18, 19)] == [1] * 6 + [0]


def test_the_next_block_is_made_when_one_is_full() -> None:
    """A3: its first cluster is the block itself, and no data."""
    rig = Rig()
    found = allocator(rig)
    assert found.allocate(1000)[:2] == (4, 252)
    assert found.allocate(1000)[:2] == (257, 255)
    assert found.allocate(5)[:2] == (513, 5)
    assert rig.refcounts.has_block(2)


def test_the_table_has_to_grow_when_all_that_it_can_count_is_used() -> None:
    """A4: the first 64 blocks of an image with clusters of 512 bytes."""
    rig = Rig()
    found = allocator(rig)
    assert sum(found.allocate(1000).clusters for _ in range(64)) == 252 + 63 * 255
    with pytest.raises(TableFull):
        found.allocate(1)


def test_clusters_that_were_never_written_are_known_to_be_zero() -> None:
    rig = Rig()
    rig.storage.truncate(20 * CLUSTER - 100)  # up to here there may be anything
    found = allocator(rig)
    assert found.allocate(16) == Run(4, 16, is_fresh=False)
    assert found.allocate(4) == Run(20, 4, is_fresh=True)
    run = found.allocate(4)
    assert run == Run(24, 4, is_fresh=True)
    found.undo(run)
    assert not found.allocate(4).is_fresh, "somebody may have written there before he gave up"


def test_a_run_that_begins_before_the_end_of_the_file_is_not_fresh() -> None:
    rig = Rig()
    rig.storage.truncate(6 * CLUSTER)
    assert allocator(rig).allocate(4) == Run(4, 4, is_fresh=False)


def test_what_was_given_back_is_used_again() -> None:
    rig = Rig()
    found = allocator(rig)
    run = found.allocate(3)
    found.undo(run)
    assert rig.refcounts.get(run.first) == 0
    assert found.allocate(3)[:2] == run[:2]


@pytest.mark.parametrize("cluster", [0, 2, 5])
def test_metadata_that_is_said_to_be_free_is_not_handed_out(cluster: int) -> None:
    """O4; cluster 0 is the header (A1)."""
    rig = Rig(counts={cluster: 0})
    rig.protected.add(cluster, 1)
    found = allocator(rig)
    with pytest.raises(BrokenRefcounts, match="holds metadata"):
        found.allocate_neighbours(10) if cluster == 5 else found.allocate(1)


def test_nothing_is_handed_out_behind_the_end_of_a_device() -> None:
    rig = Rig()
    rig.storage.truncate(30 * CLUSTER)
    rig.storage.is_block_device = True
    found = allocator(rig)
    assert found.allocate(100) == Run(4, 26, is_fresh=False)
    with pytest.raises(OSError, match="no cluster is left") as caught:
        found.allocate(1)
    assert caught.value.errno == errno.ENOSPC
    found.undo(Run(10, 2))
    assert found.allocate(5)[:2] == (10, 2)


def test_nothing_is_looked_for_where_nobody_can_wait() -> None:
    rig = Rig(counts={6: 1})
    found = allocator(rig)
    assert found.allocate_at_once(1) is None
    found.allocate(1)  # 4; then 5, and 7 onwards
    assert found.allocate_at_once(2) is None
    run = found.allocate_at_once(1)
    assert run is not None
    assert run.first == 5


# Neighbours.


def test_neighbours_are_found_behind_runs_that_are_too_short() -> None:
    rig = Rig(counts={6: 1, 9: 1})
    found = allocator(rig)
    assert found.allocate_neighbours(3)[:2] == (10, 3)
    assert found.allocate_neighbours(2)[:2] == (4, 2)
    assert found.allocate(9)[:2] == (7, 2)


def test_neighbours_do_not_run_over_the_block_of_the_next_ones() -> None:
    rig = Rig()
    found = allocator(rig)
    assert found.allocate_neighbours(255)[:2] == (257, 255)
    assert found.allocate(300)[:2] == (4, 252)


@pytest.mark.parametrize("count", [256, 700, 5000])
@pytest.mark.parametrize("order", [4, 6])
def test_more_neighbours_than_fit_between_two_blocks_have_their_blocks_in_front_of_them(order: int, count: int) -> None:
    """As many as a long L1 table needs; without that the search would fill the medium with blocks (A5)."""
    rig = Rig(order, table_clusters=4)
    found = allocator(rig)
    found.allocate(1)
    run = found.allocate_neighbours(count)
    assert run.clusters == count
    assert run.is_fresh
    blocks = -(-count // (rig.per_block - 1))
    assert run.first == rig.per_block + blocks
    assert rig.storage.size() <= (run.first + 1) * CLUSTER, "more was made than needed"
    rig.flush()
    for refcounts in (rig.refcounts, rig.reread()):
        clusters = np.arange(rig.per_block, run.first + count + 2, dtype=np.uint64)
        assert refcounts.get_many(clusters).tolist() == [1] * (blocks + count) + [0, 0]
    assert rig.protected.overlaps(run.first - 1, 1)
    assert not rig.protected.overlaps(run.first, count)
    assert found.allocate(1).first == 5, "what was free before is forgotten"


def test_the_table_has_to_grow_for_more_neighbours_than_it_can_still_count() -> None:
    rig = Rig(order=6)
    found = allocator(rig)
    with pytest.raises(TableFull):
        found.allocate_neighbours(64 * 64)
    assert rig.storage.take() == []


def test_neighbours_are_found_across_blocks_that_lie_elsewhere() -> None:
    rig = Rig()
    rig.refcounts.make_blocks(3)
    rig.refcounts.set_used(769, 2)
    rig.refcounts.table.set(1, 769 * CLUSTER)  # blocks of 256 and 512, stored in front of everything else of block 3
    rig.refcounts.table.set(2, 770 * CLUSTER)
    rig.storage.truncate(800 * CLUSTER)
    rig.storage.write(769 * CLUSTER, bytes(2 * CLUSTER))
    found = allocator(rig)
    run = found.allocate_neighbours(600)
    assert run[:2] == (4, 600)
    clusters = np.arange(4, 604, dtype=np.uint64)
    assert (rig.refcounts.get_many(clusters) == 1).all()
    assert rig.refcounts.get(604) == 0


# Freed clusters.


def test_a_freed_cluster_waits_for_its_flush_and_for_every_older_request() -> None:
    """R-50, W2."""
    rig = Rig()
    found = allocator(rig)
    found.allocate(10)
    found.free(5, 3)
    assert found.freed_bytes == 3 * CLUSTER
    assert found.release(NEVER) == []
    freed = found.take_freed()
    assert found.freed_bytes == 0
    assert found.release(NEVER) == []
    found.retire(freed, epoch=7)
    assert found.release(7) == [], "a request of epoch 7 may know the cluster"
    assert rig.refcounts.get(5) == 1
    assert found.allocate(1).first == 14, "used again too early"
    assert [run[:2] for run in found.release(8)] == [(5, 3)]
    assert rig.refcounts.get(5) == 0
    assert found.allocate(9) == Run(5, 3, is_fresh=False)


def test_batches_leave_the_quarantine_in_their_order() -> None:
    rig = Rig()
    found = allocator(rig)
    found.allocate(10)
    for epoch, cluster in ((3, 4), (4, 8)):
        found.free(cluster)
        found.retire(found.take_freed(), epoch)
    assert [run.first for run in found.release(4)] == [4]
    assert [run.first for run in found.release(NEVER)] == [8]


def test_clusters_whose_end_could_not_be_made_durable_stay_in_use() -> None:
    rig = Rig()
    found = allocator(rig)
    found.allocate(10)
    found.free(5, 2)
    taken = found.take_freed()
    found.free(9)
    found.put_back(taken)
    assert found.freed_bytes == 3 * CLUSTER
    assert found.release(NEVER) == []
    found.retire(found.take_freed(), 0)
    assert sorted(run[:2] for run in found.release(1)) == [(5, 2), (9, 1)]


def test_a_cluster_that_somebody_else_still_refers_to_does_not_become_free() -> None:
    """K6: the old cluster of a guest cluster that a snapshot shares."""
    rig = Rig(counts={5: 2, 6: 1})
    found = allocator(rig)
    found.free(5, 2)
    found.retire(found.take_freed(), 0)
    assert [run[:2] for run in found.release(1)] == [(6, 1)]
    assert rig.refcounts.get(5) == 1


def test_what_became_free_in_a_block_that_was_not_searched_yet_is_found_by_the_search_alone() -> None:
    """Else it would be handed out twice."""
    rig = Rig()
    rig.refcounts.make_blocks(1)
    rig.refcounts.set_used(257, 20)
    found = allocator(rig)
    found.free(260, 2)
    found.retire(found.take_freed(), 0)
    found.release(1)
    first = [found.allocate(1000)[:2] for _ in range(3)]
    assert first == [(4, 252), (260, 2), (277, 235)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("order", [0, 3, 4, 6])
def test_no_cluster_is_ever_owned_twice(order: int, seed: int) -> None:
    chance = random.Random(seed)
    rig = Rig(order)
    found = allocator(rig)
    owned: list[int] = []
    busy = set(range(4))
    waiting: list[tuple[int, int]] = []
    epoch = 0
    for _ in range(300):
        match chance.randrange(6):
            case 0 | 1 | 2:
                try:
                    run = (
                        found.allocate_neighbours(chance.randrange(1, 4))
                        if chance.random() < 0.3
                        else (found.allocate(chance.randrange(1, 20)))
                    )
                except TableFull:
                    continue
                clusters = range(run.first, run.first + run.clusters)
                assert busy.isdisjoint(clusters), f"seed {seed}"
                assert not rig.protected.overlaps(run.first, run.clusters), f"seed {seed}"
                busy.update(clusters)
                owned += clusters
            case 3 | 4 if owned:
                cluster = owned.pop(chance.randrange(len(owned)))
                found.free(cluster)
                waiting.append((cluster, epoch))
            case _:
                found.retire(found.take_freed(), epoch)
                epoch += 1
                oldest = epoch - chance.randrange(3)
                released = {
                    cluster for run in found.release(oldest) for cluster in range(run.first, run.first + run.clusters)
                }
                assert released == {cluster for cluster, freed in waiting if freed < oldest}, f"seed {seed}"
                waiting = [entry for entry in waiting if entry[0] not in released]
                busy -= released
    assert all(rig.refcounts.get(cluster) == 1 for cluster in busy), f"seed {seed}"


# The threshold.


def test_the_operator_is_told_once_when_the_image_grows_past_the_threshold() -> None:
    rig = Rig()
    found = allocator(rig)
    told: list[int] = []
    found.watch(10 * CLUSTER, told.append)
    found.allocate(6)
    assert told == []
    found.allocate(3)
    assert told == [13 * CLUSTER]
    found.allocate(50)
    assert len(told) == 1
    found.watch(0, told.append)
    found.allocate(1)
    assert len(told) == 2, "a new threshold is a new one"

"""L1 and L2 tables in memory: found, made, copied, doubted, and never forgotten while they wait to be written."""

import errno
from pathlib import Path

import numpy as np
import pytest

from nbdq.qcow2.entries import COPIED, OFFSET_MASK, Geometry
from nbdq.qcow2.writing import mapping as module
from nbdq.qcow2.writing.mapping import l1_problem
from tests.support.engine import Call, Engine, K, M, check, make_image
from tests.support.tools import requires, run

CLUSTER = 4 * K
COVERAGE = 2 * M  # of one table
GEOMETRY = Geometry(12, extended_l2=False, version=3, has_data_file=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_image(tmp_path / "top.qcow2", 16 * COVERAGE, cluster_size=CLUSTER)


def poke(path: Path, offset: int, value: int, width: int = 8) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value.to_bytes(width, "big"))


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([], None),
        ([0, 0], None),
        ([COPIED | 0x4000, 0x5000], None),
        ([COPIED], None),  # a flag on nothing
        ([0x4000 | 1], "reserved"),
        ([0x4000 | 1 << 56], "reserved"),
        ([0x4000 | 1 << 62], "reserved"),
        ([0x4200], "between clusters"),
        ([0x4000, 0, COPIED | 0x4000], "one L2 table"),
    ],
)
def test_an_l1_table_that_cannot_be_trusted_is_found_out(entries: list[int], problem: str | None) -> None:
    """Q33 and the HARD list."""
    found = l1_problem(np.array(entries, dtype=np.uint64), GEOMETRY)
    assert found is None if problem is None else problem in str(found)


def test_where_nothing_was_written_there_is_no_table(path: Path) -> None:
    with Engine(path) as engine:
        assert engine.image.mapping.get(3) is None
        assert engine.image.mapping.get(10**6) is None
        assert engine.contents() == bytes(16 * COVERAGE)
        assert engine.take() == []


@pytest.mark.parametrize("place", [1 << 40, 16 * COVERAGE])
def test_a_table_that_lies_nowhere_costs_its_range_and_no_other(place: int, path: Path) -> None:
    """QEMU reads it as an empty one, and the guest sees a blank disk."""
    with Engine(path) as engine:
        data = engine.write(0, CLUSTER)
    poke(path, 3 * CLUSTER + 8, COPIED | place)
    with Engine(path) as engine:
        for access in (lambda: engine.read(COVERAGE, 512), lambda: engine.write(COVERAGE, 512)):
            with pytest.raises(OSError, match="corrupt L1 entry 1") as caught:
                access()
            assert caught.value.errno == errno.EIO
        assert engine.read(0, CLUSTER) == data
        engine.write(0, CLUSTER)
        engine.disk.flush()


def test_a_new_table_is_counted_protected_reserved_and_named_in_memory_only(path: Path) -> None:
    with Engine(path) as engine, engine.image.lock:
        table = engine.image.mapping.own(5)
        assert engine.take() == [Call("reserve", table.offset, CLUSTER)]
        assert engine.image.mapping.l1.words[5] == table.offset | COPIED
        assert engine.refcount(table.offset) == 1
        assert engine.image.protected.overlaps(table.offset // CLUSTER, 1)
        assert engine.image.mapping.own(5) is table
        assert not table.values.any()
    check(path)


def test_a_table_for_which_there_is_no_room_is_not_made(path: Path) -> None:
    with Engine(path) as engine:

        def full(call: Call) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        engine.storage.before = full
        with pytest.raises(OSError, match="No space"), engine.image.lock:
            engine.image.mapping.own(5)
        engine.storage.before = lambda call: None
        assert engine.image.mapping.l1.words[5] == 0
        assert engine.image.mapping.get(5) is None
        assert not engine.image.mapping.needs_flush
    check(path)


@requires("qemu-img")
def test_a_table_that_a_snapshot_shares_is_copied_and_the_old_one_lowered(path: Path) -> None:
    """A6."""
    with Engine(path) as engine:
        data = engine.write(0, 4 * CLUSTER)
    run("qemu-img", "snapshot", "-c", "one", path)
    with Engine(path) as engine:
        old = engine.image.mapping.l1.words[0]
        assert not old & COPIED
        assert engine.refcount(old) == 2
        engine.write(0, 512)
        new = engine.image.mapping.l1.words[0]
        assert new & COPIED
        assert new & OFFSET_MASK != old
        assert engine.read(512, 4 * CLUSTER - 512) == data[512:]
        engine.settle()
        assert engine.refcount(old) == 1
        assert engine.storage.read(old & OFFSET_MASK, CLUSTER)[8:16] == engine.entry(1).to_bytes(8, "big")
    check(path)


def test_a_table_that_is_said_to_be_ours_but_has_two_references_is_copied_and_not_lowered(path: Path) -> None:
    """R-28: where refcounts lie, a leak is the smaller damage."""
    with Engine(path) as engine:
        data = engine.write(0, CLUSTER)
        old = engine.image.mapping.l1.words[0] & OFFSET_MASK
    poke(path, 2 * CLUSTER + 2 * (old // CLUSTER), 2, 2)
    with Engine(path) as engine:
        engine.write(CLUSTER, CLUSTER)
        assert engine.image.mapping.l1.words[0] & OFFSET_MASK != old
        engine.settle()
        assert engine.refcount(old) == 2
        assert engine.read(0, CLUSTER) == data


def test_ownership_is_believed_only_where_count_and_place_agree(path: Path) -> None:
    """R-28, O4: clusters with another count, between clusters, of two owners, or of metadata."""
    with Engine(path) as engine:
        engine.write(0, 8 * CLUSTER)
        l2 = engine.image.mapping.l1.words[0] & OFFSET_MASK
        hosts = [engine.host(number) for number in range(8)]
    poke(path, 2 * CLUSTER + 2 * (hosts[1] // CLUSTER), 3, 2)
    poke(path, l2 + 2 * 8, COPIED | hosts[2] | 512)
    poke(path, l2 + 3 * 8, COPIED | hosts[4])
    poke(path, l2 + 5 * 8, COPIED | 3 * CLUSTER)
    with Engine(path) as engine, engine.image.lock:
        table = engine.image.mapping.own(0)
        owned = [number for number in range(8) if table.words[number] & COPIED]
        assert owned == [0, 6, 7]
        assert table.forbidden == {5}


def test_two_guest_clusters_of_one_host_cluster_are_separated_by_a_write(path: Path) -> None:
    with Engine(path) as engine:
        data = engine.write(0, 2 * CLUSTER)
        l2 = engine.image.mapping.l1.words[0] & OFFSET_MASK
        host = engine.host(0)
    poke(path, l2 + 8, COPIED | host)
    with Engine(path) as engine:
        new = engine.write(CLUSTER, 512, seed=2)
        assert engine.read(0, CLUSTER) == data[:CLUSTER]
        assert engine.read(CLUSTER, CLUSTER) == new + data[512:CLUSTER]
        engine.settle()
        assert engine.refcount(host) == 1, "the other one still has it"


def test_tables_that_wait_to_be_written_are_never_forgotten(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by forgetting what the file has."""
    monkeypatch.setattr(module, "_L2_BUDGET", 4 * CLUSTER)
    with Engine(path) as engine:
        expected = bytearray(16 * COVERAGE)
        for turn in range(3):
            for number in range(16):
                offset = number * COVERAGE + turn * 10 * CLUSTER
                expected[offset : offset + 512] = engine.write(offset, 512, seed=turn)
            assert engine.contents() == expected
            engine.disk.flush()
            assert engine.contents() == expected
    check(path)
    with Engine(path) as engine:
        assert engine.contents() == expected
        assert len(engine.image.mapping.tables) <= 5


def test_a_table_that_a_flush_is_writing_is_not_forgotten(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads meanwhile would load the old one, and all later changes would be made to that."""
    monkeypatch.setattr(module, "_L2_BUDGET", 4 * CLUSTER)
    expected = bytearray(16 * COVERAGE)
    with Engine(path) as engine:
        for number in range(16):
            offset = number * COVERAGE
            expected[offset : offset + 512] = engine.write(offset, 512)
    with Engine(path) as engine:
        for number in range(6):
            offset = number * COVERAGE + 10 * CLUSTER
            expected[offset : offset + 512] = engine.write(offset, 512, seed=2)
        seen: list[bytes] = []

        def look_around(call: Call) -> None:
            engine.storage.before = lambda call: None
            for number in (*range(6, 16), *range(6)):
                seen.append(engine.read(number * COVERAGE, 11 * CLUSTER))

        engine.storage.before = look_around
        engine.disk.flush()
        for number, data in zip((*range(6, 16), *range(6)), seen, strict=True):
            assert data == expected[number * COVERAGE :][: 11 * CLUSTER]
        assert engine.contents() == expected
    check(path)


def test_a_flush_separates_new_tables_from_those_that_name_them(path: Path) -> None:
    with Engine(path) as engine:
        engine.write(0, CLUSTER)
        engine.settle()
        engine.write(5 * CLUSTER, CLUSTER)
        engine.write(COVERAGE, CLUSTER)
        mapping = engine.image.mapping
        with engine.image.lock:
            new, old = mapping.take()
            assert [taken.table for taken in new] == [mapping.tables[1]]
            assert [taken.table for taken in old] == [mapping.tables[0], mapping.l1]
            assert not mapping.needs_flush
            mapping.put_back([*new, *old])
            assert mapping.needs_flush
            again, rest = mapping.take()
            assert ([taken.table for taken in again], [taken.table for taken in rest]) == (
                [mapping.tables[1]],
                [mapping.tables[0], mapping.l1],
            )
            mapping.put_back([*again, *rest])
    check(path)

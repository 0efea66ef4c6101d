"""Zeros and discards: what they change in the tables, what they do not touch, and what the guest sees (3.5, 3.6)."""

import errno
import random
from pathlib import Path

import pytest

from nbdq.chain import index
from nbdq.qcow2.entries import COPIED, OFFSET_MASK, READS_ZERO
from nbdq.qcow2.writing import writable
from tests.support.engine import Call, Engine, K, M, T, check, make_image, make_raw, shown
from tests.support.tools import requires, run

CLUSTER = 4 * K


def image(directory: Path, size: int = 1 * M, **options: object) -> Path:
    return make_image(directory / "top.qcow2", size, **{"cluster_size": CLUSTER, **options})


def base(directory: Path, size: int = 1 * M, *ranges: tuple[int, int]) -> Path:
    """A raw disk below; data everywhere unless told otherwise."""
    return make_raw(directory / "base.raw", size, *(ranges or ((0, size),)))


def zero_fast(engine: Engine, offset: int, length: int) -> int:
    """The errno of fast zeros; 0 for success."""
    try:
        engine.disk.zero(offset, length, unmap=True, fast=True)
    except OSError as error:
        return error.errno or -1
    return 0


# Cost (Z5).


@pytest.mark.parametrize("unmap", [True, False])
def test_zeros_over_nothing_are_nothing_however_large(unmap: bool, tmp_path: Path) -> None:
    """vdsm saw the zeroing of an empty disk of 8 TiB take 700 times too long."""
    with Engine(make_image(tmp_path / "top.qcow2", 1 * T)) as engine:
        engine.disk.zero(0, 1 * T, unmap=unmap)
        engine.disk.discard(0, 1 * T)
        assert engine.take() == []
        assert engine.image.mapping.tables == {}
        engine.disk.flush()
        assert engine.story() == ["sync"]


def test_zeros_over_a_base_write_tables_where_the_base_has_data_and_nothing_else(tmp_path: Path) -> None:
    below = base(tmp_path, 1 * T, (0, 64 * K), (T - 64 * K, 64 * K))
    with Engine(make_image(tmp_path / "top.qcow2", 1 * T, cluster_size=2 * M), below=below) as engine:
        assert engine.below is not None
        engine.disk.zero(0, 1 * T, unmap=True)
        engine.disk.flush()
        written = [call for call in engine.take() if call.name == "write"]
        assert {engine.role(call.offset) for call in written} <= {"refcounts", "L1", "L2"}
        assert engine.below.reads == []
        assert engine.read(0, 64 * K) == engine.read(T - 64 * K, 64 * K) == bytes(64 * K)
    check(engine.path)


def test_where_the_base_holds_nothing_no_table_is_made(tmp_path: Path) -> None:
    below = base(tmp_path, 32 * M, (0, 64 * K))
    with Engine(image(tmp_path, 32 * M), below=below) as engine:
        engine.disk.zero(0, 32 * M, unmap=True)
        assert len(engine.image.mapping.tables) == 1, "2 MiB each"
        assert engine.read(0, 64 * K) == bytes(64 * K)


def test_what_is_asked_of_the_base_grows_with_what_is_there_and_not_with_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = base(tmp_path, 1 * T, (0, 4 * K), (T // 2, 4 * K), (T - 4 * K, 4 * K))
    with Engine(make_image(tmp_path / "top.qcow2", 1 * T), below=below) as engine:
        assert engine.below is not None
        for number in range(64):
            engine.write(number * (T // 64) + M, 512)
        asked, reads_zero = 0, engine.below.reads_zero

        def count(offset: int, length: int) -> bool:
            nonlocal asked
            asked += 1
            return reads_zero(offset, length)

        monkeypatch.setattr(engine.below, "reads_zero", count)
        engine.disk.discard(0, 1 * T)
        assert asked < 400, "of 2048 tables 65 are looked at, and the way to each island"
        assert len(engine.image.mapping.present(0, 2048)) <= 66


@pytest.mark.parametrize("requests", [8, 1])
def test_zeroing_a_large_disk_over_a_base_flushes_on_its_way(
    requests: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed tables must not fill the memory, however much one request changes."""
    monkeypatch.setattr(writable, "_DIRTY_BUDGET", 4 * CLUSTER)
    below = base(tmp_path, 16 * M)
    most = 0

    def watch(_: Call) -> None:
        nonlocal most
        most = max(most, engine.image.mapping.dirty_bytes)

    with Engine(image(tmp_path, 16 * M), below=below) as engine:
        engine.storage.before = watch
        part = 16 * M // requests
        for start in range(0, 16 * M, part):
            engine.disk.zero(start, part, unmap=True)
        assert 0 < most <= 5 * CLUSTER
        assert engine.contents() == bytes(16 * M)
    check(engine.path)


@pytest.mark.parametrize("seed", range(12))
def test_zeros_hide_everything_below_and_only_where_something_shows_a_table_is_made(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables that are there and others alternate; the base begins and ends anywhere in them, and so do requests."""
    chance = random.Random(seed)
    monkeypatch.setattr(index, "_WINDOW_GRANULES", chance.choice((32, 256)))
    monkeypatch.setattr(index, "_OCCUPANCY_WINDOWS", 4)
    cluster, table = 512, 32 * K
    size = 30 * table + chance.choice((0, 512, 20 * K))
    below_size = chance.choice((size, 40 * table, 20 * table, 13 * table + 1536))
    below = make_image(tmp_path / "base.qcow2", below_size, cluster_size=512)
    with Engine(below) as lower:
        for number in chance.sample(range(below_size // table), 8):
            offset = number * table + chance.choice((0, 512, 17 * K, table - 512))
            lower.write(offset, min(chance.choice((512, 3 * K, 2 * table)), below_size - offset), seed=number)
    with Engine(image(tmp_path, size, cluster_size=cluster), below=below) as engine:
        for number in chance.sample(range(30), chance.choice((0, 3, 12))):
            engine.write(number * table + chance.randrange(0, table, 512), 512, seed=number)
        expected = bytearray(engine.contents())
        for turn in range(12):
            present = set(engine.image.mapping.present(0, 31))
            start = chance.randrange(size // cluster) * cluster
            length = min(size - start, chance.choice((cluster, 3 * table, chance.randrange(1, size), size)))
            verb = chance.choice(("zero", "unmap", "discard"))
            if verb == "discard":
                engine.disk.discard(start, length)
                length = length if start + length == size else length // cluster * cluster
            else:
                engine.disk.zero(start, length, unmap=verb == "unmap")
            hidden = {at // table for at in range(start, start + length, 512) if any(expected[at : at + 512])}
            expected[start : start + length] = bytes(length)
            assert engine.contents() == expected, f"seed {seed}, turn {turn}: {verb} {start} {length}"
            made = set(engine.image.mapping.present(0, 31)) - present
            assert made <= hidden, f"seed {seed}, turn {turn}: {verb} {start} {length}"
    check(engine.path)


# What becomes of entries (Z1, T2, Q35).


def test_unmapped_zeros_give_clusters_back_and_others_keep_them(tmp_path: Path) -> None:
    with Engine(image(tmp_path)) as engine:
        engine.write(0, 4 * CLUSTER)
        engine.settle()
        hosts = [engine.host(number) for number in range(4)]
        engine.disk.zero(0, 2 * CLUSTER, unmap=True)
        engine.disk.zero(2 * CLUSTER, 2 * CLUSTER, unmap=False)
        assert engine.entries(0, 5) == [
            READS_ZERO,
            READS_ZERO,
            COPIED | hosts[2] | READS_ZERO,
            COPIED | hosts[3] | READS_ZERO,
            0,
        ]
        assert engine.contents() == bytes(1 * M)
        engine.settle()
        assert [engine.refcount(host) for host in hosts] == [0, 0, 1, 1]
    check(engine.path)


@pytest.mark.parametrize("verb", ["zero", "unmap", "discard"])
def test_a_base_is_hidden_and_what_was_never_there_stays_unallocated(verb: str, tmp_path: Path) -> None:
    """T2, P95: a discarded cluster over a base is zero, never unallocated."""
    below = base(tmp_path, 512 * K)
    with Engine(image(tmp_path), below=below) as engine:
        engine.write(600 * K, CLUSTER)
        engine.take()
        for offset in (64 * K, 700 * K):
            if verb == "discard":
                engine.disk.discard(offset, 16 * K)
            else:
                engine.disk.zero(offset, 16 * K, unmap=verb == "unmap")
        assert engine.entry(16) & READS_ZERO
        assert engine.entry(15) == engine.entry(20) == 0
        assert engine.entry(175) == 0, "there is nothing to hide"
        assert engine.take() == []
        assert engine.read(64 * K, 16 * K) == bytes(16 * K)
        assert any(engine.read(60 * K, 4 * K))
    check(engine.path)


@requires("qemu-img")
def test_clusters_that_a_snapshot_shares_are_let_go_of_and_stay_the_snapshots(tmp_path: Path) -> None:
    path = image(tmp_path)
    with Engine(path) as engine:
        before = engine.write(0, 8 * CLUSTER).ljust(1 * M, b"\0")
    run("qemu-img", "snapshot", "-c", "one", path)
    with Engine(path) as engine:
        hosts = [engine.host(number) for number in range(8)]
        engine.disk.zero(0, 4 * CLUSTER, unmap=False)
        engine.disk.zero(4 * CLUSTER, 2 * CLUSTER, unmap=True)
        engine.disk.discard(6 * CLUSTER, 2 * CLUSTER)
        assert engine.entries(0, 8) == [READS_ZERO] * 8, "zeros on a cluster that is not ours"
        engine.settle()
        assert [engine.refcount(host) for host in hosts] == [1] * 8
        assert "punch data" not in engine.story()
    check(path)
    assert shown(path, "-l", "one") == before
    assert shown(path) == bytes(1 * M)


@requires("qemu-io")
@pytest.mark.parametrize("unmap", [True, False])
def test_compressed_clusters_are_always_given_up(unmap: bool, tmp_path: Path) -> None:
    """Z1: each of them lowers every host cluster that it touches (Q54)."""
    path = image(tmp_path)
    run("qemu-io", "-f", "qcow2", "-c", "write -q -c -P 5 0 4k", "-c", "write -q -c -P 6 4k 4k", path)
    with Engine(path) as engine:
        engine.disk.zero(0, CLUSTER, unmap=unmap)
        assert engine.entry(0) == READS_ZERO
        assert engine.read(0, 2 * CLUSTER) == bytes(CLUSTER) + b"\6" * CLUSTER
    check(path)


# Version 2 (Z3, M2).


def test_version_2_without_a_base_unmaps(tmp_path: Path) -> None:
    with Engine(image(tmp_path, version=2)) as engine:
        engine.write(0, 4 * CLUSTER)
        engine.take()
        engine.disk.zero(0, 2 * CLUSTER, unmap=False)
        engine.disk.discard(2 * CLUSTER, CLUSTER)
        assert engine.entries(0, 3) == [0, 0, 0]
        assert engine.take() == []
        assert engine.read(0, 3 * CLUSTER) == bytes(3 * CLUSTER)
    check(engine.path)


def test_version_2_over_a_base_writes_zeros_and_does_not_discard(tmp_path: Path) -> None:
    below = base(tmp_path)
    with Engine(image(tmp_path, version=2), below=below) as engine:
        old = engine.contents()
        engine.disk.discard(0, 4 * CLUSTER)
        assert engine.contents() == old, "a discard of what cannot be hidden is no change"
        assert zero_fast(engine, 0, CLUSTER) == errno.EOPNOTSUPP
        assert engine.contents() == old
        engine.disk.zero(512, 2 * CLUSTER, unmap=True)
        assert engine.contents() == old[:512] + bytes(2 * CLUSTER) + old[512 + 2 * CLUSTER :]
        assert engine.entry(1) & COPIED
    check(engine.path)


# Edges (Z2, Z4, T1).


def test_edges_of_zeros_are_written_and_edges_of_discards_stay(tmp_path: Path) -> None:
    with Engine(image(tmp_path)) as engine:
        data = engine.write(0, 8 * CLUSTER)
        engine.disk.discard(100, 2 * CLUSTER)
        assert engine.read(0, 8 * CLUSTER) == data[:CLUSTER] + bytes(CLUSTER) + data[2 * CLUSTER :]
        engine.disk.discard(5 * CLUSTER + 1, CLUSTER)
        assert engine.read(5 * CLUSTER, 2 * CLUSTER) == data[5 * CLUSTER : 7 * CLUSTER]
        engine.disk.zero(4 * CLUSTER + 100, 2 * CLUSTER, unmap=True)
        assert engine.read(4 * CLUSTER, 4 * CLUSTER) == (
            data[4 * CLUSTER : 4 * CLUSTER + 100] + bytes(2 * CLUSTER) + data[6 * CLUSTER + 100 :]
        )
        assert engine.entry(5) == READS_ZERO
    check(engine.path)


def test_an_edge_whose_cluster_reads_as_zeros_is_not_touched(tmp_path: Path) -> None:
    """Z2."""
    with Engine(image(tmp_path)) as engine:
        engine.write(10 * CLUSTER, CLUSTER)
        engine.settle()
        engine.disk.zero(100, 4 * CLUSTER, unmap=False)
        engine.disk.zero(20 * CLUSTER + 512, 512, unmap=True)
        engine.disk.flush()
        assert "data" not in engine.story()
        assert engine.entry(0) == engine.entry(4) == engine.entry(20) == 0


def test_the_last_cluster_counts_as_whole_although_the_disk_ends_in_it(tmp_path: Path) -> None:
    size = 10 * CLUSTER + 512
    for verb in ("zero", "discard"):
        (tmp_path / verb).mkdir()
        with Engine(image(tmp_path / verb, size)) as engine:
            engine.write(0, size)
            engine.take()
            if verb == "zero":
                engine.disk.zero(9 * CLUSTER, CLUSTER + 512, unmap=True)
            else:
                engine.disk.discard(9 * CLUSTER, CLUSTER + 512)
            assert engine.entries(9, 2) == [READS_ZERO, READS_ZERO]
            assert engine.take() == []
            assert not any(engine.read(9 * CLUSTER, CLUSTER + 512))
        check(engine.path)


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, 4 * CLUSTER, 0),
        (CLUSTER, CLUSTER, 0),
        (512, CLUSTER, errno.EOPNOTSUPP),
        (0, CLUSTER + 512, errno.EOPNOTSUPP),
        (100 * CLUSTER + 512, CLUSTER, 0),  # there is nothing
    ],
)
def test_fast_zeros_change_entries_only_or_nothing(offset: int, length: int, expected: int, tmp_path: Path) -> None:
    """Z4."""
    with Engine(image(tmp_path)) as engine:
        engine.write(0, 8 * CLUSTER)
        engine.settle()
        old = bytearray(engine.contents())
        assert zero_fast(engine, offset, length) == expected
        assert engine.take() == []
        if not expected:
            old[offset : offset + length] = bytes(length)
        assert engine.contents() == old


# Subclusters.


def test_zeros_of_subclusters_set_their_bits_and_keep_the_others(tmp_path: Path) -> None:
    below = base(tmp_path)
    with Engine(image(tmp_path, cluster_size=64 * K, extended_l2=True), below=below) as engine:
        expected = bytearray(engine.contents())
        expected[8 * K : 16 * K] = engine.write(8 * K, 8 * K)
        engine.take()
        engine.disk.zero(10 * K, 12 * K, unmap=True)
        expected[10 * K : 22 * K] = bytes(12 * K)
        assert engine.take() == []
        bitmap = engine.entries(0, 1)[1]
        assert (bitmap & 0xFFFF_FFFF, bitmap >> 32) == (1 << 4, 0b111_1110_0000)
        assert engine.contents() == expected
        engine.disk.zero(30 * K, 200 * K, unmap=True)
        expected[30 * K : 230 * K] = bytes(200 * K)
        assert engine.contents() == expected
        assert engine.entries(1, 1) == [0, 0xFFFF_FFFF << 32]
        engine.disk.discard(0, 64 * K)
        assert engine.entries(0, 1) == [0, 0xFFFF_FFFF << 32]
    check(engine.path)


@requires("qemu-io")
def test_zeros_of_a_part_of_a_compressed_cluster_are_written(tmp_path: Path) -> None:
    """Q46: it has no bits for its parts."""
    path = image(tmp_path, cluster_size=64 * K, extended_l2=True)
    run("qemu-io", "-f", "qcow2", "-c", "write -q -c -P 5 0 64k", path)
    with Engine(path) as engine:
        engine.disk.zero(4 * K, 8 * K, unmap=True)
        assert engine.read(0, 64 * K) == b"\5" * 4 * K + bytes(8 * K) + b"\5" * 52 * K
    check(path)


# External data files (Z1, Q80).


@requires("qemu-img")
@pytest.mark.parametrize("raw", [True, False])
def test_a_data_file_that_is_the_disk_by_itself_is_zeroed_too(raw: bool, tmp_path: Path) -> None:
    path = image(tmp_path, data_file_name="data.raw", data_file_raw=raw)
    data = make_raw(tmp_path / "data.raw", 1 * M)
    with Engine(path, data=data) as engine:
        engine.write(0, 20 * CLUSTER)
        engine.disk.zero(0, 2 * CLUSTER, unmap=True)
        engine.disk.zero(4 * CLUSTER + 512, 2 * CLUSTER, unmap=False)
        engine.disk.discard(8 * CLUSTER, 2 * CLUSTER)
        expected = engine.contents()
        assert expected[: 2 * CLUSTER] == expected[8 * CLUSTER : 10 * CLUSTER] == bytes(2 * CLUSTER)
        if raw:
            assert zero_fast(engine, 0, CLUSTER) == errno.EOPNOTSUPP
            assert data.read_bytes() == expected
    run("qemu-img", "check", "-f", "qcow2", path, cwd=tmp_path)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "top.qcow2", "shown", cwd=tmp_path)
    assert (tmp_path / "shown").read_bytes() == expected


# At random.


@requires("qemu-img")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["plain", "extended", "version 2", "over a base", "extended over a base"])
def test_whatever_is_zeroed_reads_as_zeros_and_nothing_else_changes(kind: str, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    extended = kind.startswith("extended")
    cluster = 16 * K if extended else CLUSTER
    size = 30 * cluster + 1536
    below = base(tmp_path, 20 * cluster, (0, 9 * cluster), (11 * cluster, 9 * cluster)) if "base" in kind else None
    options = {"cluster_size": cluster, "extended_l2": extended, "version": 2 if kind == "version 2" else 3}
    with Engine(image(tmp_path, size, **options), below=below) as engine:
        expected = bytearray(engine.contents())
        for turn in range(100):
            offset = chance.randrange(size)
            if chance.random() < 0.6:
                offset -= offset % chance.choice((512, cluster))
            length = min(size - offset, chance.choice((1, 512, cluster, chance.randrange(1, 8 * cluster))))
            match chance.randrange(5):
                case 0 | 1:
                    engine.disk.zero(offset, length, unmap=turn % 2 == 0)
                    expected[offset : offset + length] = bytes(length)
                case 2:
                    engine.disk.discard(offset, length)
                    low, high = -(-offset // cluster) * cluster, (offset + length) // cluster * cluster
                    if offset + length == size:
                        high = size
                    if low < high:
                        expected[low:high] = bytes(high - low)
                case _:
                    expected[offset : offset + length] = engine.write(offset, length, seed=turn)
            if turn % 10 == 0:
                engine.disk.flush()
                assert engine.contents() == expected, f"seed {seed}, turn {turn}"
        hidden = [number for number in range(31) if engine.entry(number) & OFFSET_MASK]
        assert hidden, "nothing was ever written"
    check(engine.path)
    if below is None:
        assert shown(engine.path) == expected, f"seed {seed}"

"""A guest's writes: where the data goes, what is copied around it, and what others see meanwhile (3.3, 3.4)."""

import errno
import random
import threading
from pathlib import Path

import pytest

from nbdq.qcow2.create import Preallocation
from nbdq.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK, READS_ZERO
from tests.support.engine import Call, Engine, K, M, check, make_image, make_raw, shown
from tests.support.images import content
from tests.support.tools import requires, run

CLUSTER = 4 * K


def image(directory: Path, size: int = 1 * M, **options: object) -> Path:
    return make_image(directory / "top.qcow2", size, **{"cluster_size": CLUSTER, **options})


def base(directory: Path, size: int = 1 * M, *ranges: tuple[int, int]) -> Path:
    """A raw disk below; data everywhere unless told otherwise."""
    return make_raw(directory / "base.raw", size, *(ranges or ((0, size),)))


def data_writes(engine: Engine) -> list[Call]:
    return [call for call in engine.take() if call.name == "write" and engine.role(call.offset) == "data"]


# Where data goes.


def test_what_the_image_owns_is_overwritten_in_place(tmp_path: Path) -> None:
    with Engine(image(tmp_path)) as engine:
        engine.write(0, 4 * CLUSTER)
        engine.settle()
        host = engine.host(0)
        engine.write(1000, 3 * CLUSTER, seed=2)
        assert engine.take() == [Call("write", host + 1000, 3 * CLUSTER)], "neighbours are one write"
        assert engine.host(0) == host
    check(engine.path)


def test_a_write_over_many_tables_and_states_is_all_there(tmp_path: Path) -> None:
    with Engine(image(tmp_path, 32 * M, cluster_size=512)) as engine:
        for position in range(0, 1 * M, 100 * K):
            engine.write(position + 700, 3000)
        engine.disk.zero(50 * K, 60 * K, unmap=False)
        engine.disk.discard(200 * K, 60 * K)
        data = engine.write(777, 1 * M, seed=3)
        assert engine.read(777, 1 * M) == data
        assert engine.read(0, 700) == bytes(700)
    check(engine.path)


def test_a_huge_write_is_done_in_parts_that_others_do_not_wait_for_long(tmp_path: Path) -> None:
    with Engine(image(tmp_path, 16 * M)) as engine:
        data = engine.write(0, 10 * M)
        assert max(call.length for call in data_writes(engine)) <= 4 * M
        assert engine.read(0, 10 * M) == data
    check(engine.path)


# Around the data (K1-K3, K5).


def test_nothing_is_read_or_written_around_the_data_where_zeros_are_below_a_fresh_cluster(tmp_path: Path) -> None:
    """K1: the end of the file has never been written."""
    below = base(tmp_path, 1 * M, (0, 64 * K))
    with Engine(image(tmp_path), below=below) as engine:
        assert engine.below is not None
        engine.write(256 * K + 1024, 512)
        assert [call.length for call in data_writes(engine)] == [512]
        assert engine.below.reads == []
        assert engine.read(256 * K, CLUSTER) == bytes(1024) + content(1 << 20, 256 * K + 1024, 512) + bytes(2560)
    check(engine.path)


def test_a_cluster_that_was_used_before_is_filled_up_with_zeros(tmp_path: Path) -> None:
    with Engine(image(tmp_path)) as engine:
        engine.write(0, 8 * CLUSTER)
        engine.disk.discard(0, 8 * CLUSTER)
        engine.settle()
        data = engine.write(100 * CLUSTER + 1024, 512)
        (call,) = data_writes(engine)
        assert call.length == CLUSTER
        assert engine.read(100 * CLUSTER, CLUSTER) == bytes(1024) + data + bytes(2560)
        assert engine.storage.read(engine.host(100), CLUSTER) == bytes(1024) + data + bytes(2560)
    check(engine.path)


@pytest.mark.parametrize(("offset", "length"), [(512, 512), (0, 512), (3584, 512), (1, 4094), (5000, 9000), (4095, 2)])
def test_only_what_the_guest_does_not_write_is_copied_and_all_goes_out_in_one_write(
    offset: int, length: int, tmp_path: Path
) -> None:
    """K1."""
    below = base(tmp_path)
    with Engine(image(tmp_path), below=below) as engine:
        assert engine.below is not None
        old = engine.contents()
        engine.below.reads.clear()
        data = engine.write(offset, length)
        first, last = offset // CLUSTER * CLUSTER, -(-(offset + length) // CLUSTER) * CLUSTER
        assert sum(count for _, count in engine.below.reads) == last - first - length
        assert all(start + count <= offset or start >= offset + length for start, count in engine.below.reads)
        (call,) = data_writes(engine)
        assert call.length == last - first
        assert engine.contents() == old[:offset] + data + old[offset + length :]
    check(engine.path)


def test_whole_clusters_are_written_without_reading_anything(tmp_path: Path) -> None:
    below = base(tmp_path)
    with Engine(image(tmp_path), below=below) as engine:
        assert engine.below is not None
        engine.write(8 * CLUSTER, 16 * CLUSTER)
        assert engine.below.reads == []
        assert [call.length for call in data_writes(engine)] == [16 * CLUSTER]


def test_a_cluster_of_zeros_that_kept_its_space_is_used_again_and_shows_nothing_old(tmp_path: Path) -> None:
    """K5."""
    with Engine(image(tmp_path)) as engine:
        engine.write(0, 2 * CLUSTER)
        engine.settle()
        host = engine.host(1)
        engine.disk.zero(0, 2 * CLUSTER, unmap=False)
        data = engine.write(CLUSTER + 512, 512)
        assert engine.host(1) == host
        assert engine.read(0, 2 * CLUSTER) == bytes(CLUSTER + 512) + data + bytes(CLUSTER - 1024)
        engine.disk.flush()
        assert "refcounts" not in engine.story()
    check(engine.path)


@requires("qemu-io")
@pytest.mark.parametrize("whole", [False, True])
def test_a_compressed_cluster_is_unpacked_when_a_part_is_written_and_not_when_all_is(
    whole: bool, tmp_path: Path
) -> None:
    """K4; its neighbours in the same host cluster stay."""
    path = image(tmp_path)
    for cluster in range(4):
        run("qemu-io", "-f", "qcow2", "-c", f"write -q -c -P {cluster + 1} {cluster * CLUSTER} {CLUSTER}", path)
    with Engine(path) as engine:
        assert engine.entry(1) & COMPRESSED
        expected = bytearray(engine.contents())
        engine.storage.reads.clear()
        offset, length = (CLUSTER, CLUSTER) if whole else (CLUSTER + 512, 512)
        expected[offset : offset + length] = engine.write(offset, length)
        assert not engine.entry(1) & COMPRESSED
        assert engine.entry(2) & COMPRESSED
        assert engine.contents() == expected
    check(path)
    assert shown(path) == expected


# Subclusters.


@pytest.mark.parametrize(
    ("offset", "length", "written"),
    [
        (5 * K, 512, (4 * K, 2 * K)),
        (4 * K, 2 * K, (4 * K, 2 * K)),
        (0, 1, (0, 2 * K)),
        (3 * K, 4 * K, (2 * K, 6 * K)),
        (63 * K, 1 * K, (62 * K, 2 * K)),
    ],
)
def test_only_subclusters_that_are_touched_are_copied(
    offset: int, length: int, written: tuple[int, int], tmp_path: Path
) -> None:
    """K3: 2 KiB instead of 64."""
    below = base(tmp_path)
    with Engine(image(tmp_path, cluster_size=64 * K, extended_l2=True), below=below) as engine:
        assert engine.below is not None
        old = engine.contents()
        engine.below.reads.clear()
        data = engine.write(offset, length)
        (call,) = data_writes(engine)
        assert (call.offset - engine.host(0), call.length) == written
        assert sum(count for _, count in engine.below.reads) == written[1] - length
        first, count = written[0] // (2 * K), written[1] // (2 * K)
        assert engine.entries(0, 1)[1] == ((1 << count) - 1) << first
        assert engine.contents() == old[:offset] + data + old[offset + length :]
    check(engine.path)


def test_a_second_subcluster_goes_into_the_cluster_that_is_there(tmp_path: Path) -> None:
    below = base(tmp_path)
    with Engine(image(tmp_path, cluster_size=64 * K, extended_l2=True), below=below) as engine:
        expected = bytearray(engine.contents())
        for offset, length in ((10 * K, 100), (40 * K, 5000), (11 * K, 3 * K), (0, 64 * K), (100, 65436)):
            expected[offset : offset + length] = engine.write(offset, length, seed=length)
            assert engine.contents() == expected
        assert engine.refcount(engine.host(0)) == 1
        assert engine.entries(0, 1)[1] == 0xFFFF_FFFF
        engine.disk.flush()
        assert engine.contents() == expected
    check(engine.path)
    assert shown(engine.path)[: 64 * K] == expected[: 64 * K]


def test_subclusters_of_zeros_become_data_where_they_are_written(tmp_path: Path) -> None:
    below = base(tmp_path)
    with Engine(image(tmp_path, cluster_size=64 * K, extended_l2=True), below=below) as engine:
        expected = bytearray(engine.contents())
        engine.disk.zero(4 * K, 12 * K, unmap=True)
        expected[4 * K : 16 * K] = bytes(12 * K)
        expected[9 * K : 9 * K + 512] = engine.write(9 * K, 512)
        bitmap = engine.entries(0, 1)[1]
        assert bitmap & 0xFFFF_FFFF == 1 << 4
        assert bitmap >> 32 == 0b1110_1100
        assert engine.contents() == expected
    check(engine.path)
    assert shown(engine.path)[4 * K : 16 * K] == expected[4 * K : 16 * K]


@requires("qemu-img")
def test_a_cluster_that_a_snapshot_shares_moves_with_all_its_subclusters(tmp_path: Path) -> None:
    """K6."""
    path = image(tmp_path, cluster_size=64 * K, extended_l2=True)
    with Engine(path) as engine:
        engine.write(6 * K, 3 * K)
        engine.write(50 * K, 512)
        engine.disk.zero(20 * K, 4 * K, unmap=True)
        before = engine.contents()
    run("qemu-img", "snapshot", "-c", "one", path)
    with Engine(path) as engine:
        old = engine.host(0)
        expected = bytearray(before)
        expected[30 * K : 31 * K] = engine.write(30 * K, 1 * K, seed=4)
        assert engine.host(0) != old
        assert engine.contents() == expected
    check(path)
    assert shown(path) == expected
    assert shown(path, "-l", "one") == before


# The end of the disk and of what is below.


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("below_size", [0, 500 * K, 1 * M + 512, 2 * M])
@pytest.mark.parametrize("recycled", [False, True])
def test_the_last_cluster_is_copied_as_far_as_the_disk_and_what_is_below_reach(
    recycled: bool, below_size: int, extended: bool, tmp_path: Path
) -> None:
    """S1, S2: behind the end of either there are zeros, also when the disk grows one day."""
    cluster = 64 * K if extended else CLUSTER
    size = 1 * M + 1536
    below = base(tmp_path, below_size) if below_size else None
    with Engine(image(tmp_path, size, cluster_size=cluster, extended_l2=extended), below=below) as engine:
        if recycled:
            engine.write(0, 10 * cluster)
            engine.disk.discard(0, 10 * cluster)
            engine.settle()
        expected = bytearray(engine.contents())
        expected[size - 512 :] = engine.write(size - 512, 512)
        expected[500 * K - 100 : 500 * K + 100] = engine.write(500 * K - 100, 200)
        assert engine.contents() == expected
        host = engine.host(1 * M // cluster)
        assert not any(engine.storage.read(host + 1536, cluster - 1536)), "something may show up when the disk grows"
    check(engine.path)


def test_what_a_longer_base_has_behind_the_end_of_the_disk_is_not_copied_inline_either(tmp_path: Path) -> None:
    """S2."""
    size = 1 * M + 1536
    with Engine(image(tmp_path, size), below=base(tmp_path, 2 * M)) as engine:
        engine.write(0, CLUSTER)
        old = engine.read(1 * M, 1536)
        assert engine.write_cached(1 * M, 512)
        assert engine.read(1 * M + 512, 1024) == old[512:]
        host = engine.host(1 * M // CLUSTER)
        assert not any(engine.storage.read(host + 1536, CLUSTER - 1536))
    check(engine.path)


# Others at the same time (A7).


def test_readers_and_writers_of_other_clusters_do_not_wait_for_an_allocation(tmp_path: Path) -> None:
    below = base(tmp_path)
    with Engine(image(tmp_path), below=below) as engine:
        engine.write(100 * CLUSTER, CLUSTER)
        old = engine.read(0, CLUSTER)
        seen: list[bytes] = []

        def meanwhile(call: Call) -> None:
            engine.storage.before = lambda call: None
            if call.name == "write":
                seen.append(engine.read(0, CLUSTER))
                other = threading.Thread(target=engine.write, args=(50 * CLUSTER, 512))
                other.start()
                other.join(30)
                assert not other.is_alive(), "a write elsewhere waits"
                assert not engine.image.lock.locked()

        engine.storage.before = meanwhile
        data = engine.write(512, 512)
        assert seen == [old]
        assert engine.read(0, CLUSTER) == old[:512] + data + old[1024:]
    check(engine.path)


def test_a_second_write_to_a_cluster_in_flight_waits_and_both_are_there(tmp_path: Path) -> None:
    """A7: without that the later one to be published would lose the other's data."""
    below = base(tmp_path)
    with Engine(image(tmp_path), below=below) as engine:
        old = engine.read(0, CLUSTER)
        others: list[threading.Thread] = []

        def meanwhile(call: Call) -> None:
            if not others:
                others.append(threading.Thread(target=engine.write, args=(2048, 512)))
                others[0].start()
                others[0].join(0.05)
                assert others[0].is_alive()

        engine.storage.before = meanwhile
        data = engine.write(512, 512)
        others[0].join()
        expected = old[:512] + data + old[1024:2048] + content(1 << 20, 2048, 512) + old[2560:]
        assert engine.read(0, CLUSTER) == expected
        assert engine.image.in_flight == set()
    check(engine.path)


# Failures (A8).


@pytest.mark.parametrize("what", ["full", "base unreadable"])
def test_a_write_that_fails_leaves_nothing_but_the_old_contents(what: str, tmp_path: Path) -> None:
    below = base(tmp_path)
    with Engine(image(tmp_path), below=below) as engine:
        assert engine.below is not None
        engine.write(100 * CLUSTER, CLUSTER)
        engine.settle()
        old = engine.contents()
        real = engine.below.read_into

        def unreadable(offset: int, view: memoryview) -> None:
            raise OSError(errno.EIO, "Input/output error")

        def full(call: Call) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        if what == "full":
            engine.storage.before = full
        else:
            engine.below.read_into = unreadable  # type: ignore[method-assign]
        with pytest.raises(OSError, match="No space" if what == "full" else "Input/output"):
            engine.write(512, 3 * CLUSTER)
        engine.storage.before = lambda call: None
        engine.below.read_into = real  # type: ignore[method-assign]
        assert engine.image.in_flight == set()
        assert engine.contents() == old
        data = engine.write(512, 3 * CLUSTER)
        assert engine.contents() == old[:512] + data + old[512 + 3 * CLUSTER :]
    check(engine.path)


# Inline (5.2 of the design: only what needs no waiting).


@pytest.mark.parametrize("extended", [False, True])
def test_writes_in_place_are_done_without_waiting(extended: bool, tmp_path: Path) -> None:
    cluster = 64 * K if extended else CLUSTER
    with Engine(image(tmp_path, cluster_size=cluster, extended_l2=extended)) as engine:
        engine.write(0, 8 * cluster)
        engine.take()
        with engine.image.lock:  # somebody else holds it
            assert engine.write_cached(1000, 500, seed=3)
            assert engine.write_cached(cluster - 100, 2 * cluster, seed=4)
        assert engine.read(cluster - 100, 2 * cluster) == content(4 << 20, cluster - 100, 2 * cluster)
        assert engine.read(1000, 500) == content(3 << 20, 1000, 500)
    check(engine.path)


def test_new_clusters_are_made_without_waiting_where_everything_is_at_hand(tmp_path: Path) -> None:
    below = base(tmp_path)
    with Engine(image(tmp_path), below=below) as engine:
        expected = bytearray(engine.contents())
        assert not engine.write_cached(0, 512), "the table is not there yet"
        expected[:512] = engine.write(0, 512)
        for offset, length in ((5 * CLUSTER + 512, 512), (9 * CLUSTER, CLUSTER), (20 * CLUSTER + 7, 2 * CLUSTER)):
            assert engine.write_cached(offset, length, seed=2)
            expected[offset : offset + length] = content(2 << 20, offset, length)
        assert engine.contents() == expected
        with engine.image.lock:
            assert not engine.write_cached(30 * CLUSTER, 512), "the lock is somebody's"
        engine.image.in_flight.add(40)
        assert not engine.write_cached(40 * CLUSTER, 512), "another write is about to give it a place"
        engine.image.in_flight.clear()
        assert engine.contents() == expected
        engine.take()
        engine.disk.flush()
        assert engine.story() == ["refcounts", "L2", "sync", "L1", "sync"]
    check(engine.path)


def test_an_inline_write_that_fails_gives_its_clusters_back(tmp_path: Path) -> None:
    with Engine(image(tmp_path)) as engine:
        engine.write(0, CLUSTER)

        def full(call: Call) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        engine.storage.before = full
        with pytest.raises(OSError, match="No space"):
            engine.write_cached(10 * CLUSTER, 512)
        engine.storage.before = lambda call: None
        assert engine.entry(10) == 0
        assert not engine.image.lock.locked()
        assert engine.write_cached(10 * CLUSTER, 512)
    check(engine.path)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["plain", "extended", "data file", "version 2", "preallocated"])
def test_inline_and_other_writes_make_the_same_disk(kind: str, seed: int, tmp_path: Path) -> None:
    """Each random request is tried inline on one disk, and takes the long way on the other."""
    chance = random.Random(seed)
    cluster = 16 * K if kind == "extended" else CLUSTER
    size = 24 * cluster + 512
    options: dict[str, object] = {"cluster_size": cluster, "extended_l2": kind == "extended"}
    data, below = {}, None
    if kind == "version 2":
        options["version"] = 2
    if kind == "preallocated":
        options["preallocation"] = Preallocation.METADATA
    elif kind == "data file":
        options["data_file_name"] = "data.raw"
    else:
        below = base(tmp_path, 20 * cluster, (0, 8 * cluster), (12 * cluster, 8 * cluster))
    engines = []
    for name in ("inline", "waiting"):
        (tmp_path / name).mkdir()
        if kind == "data file":
            data = {"data": make_raw(tmp_path / name / "data.raw", size)}
        path = make_image(tmp_path / name / "top.qcow2", size, **options)
        engines.append(Engine(path, below=below, **data))
    inline, waiting = engines
    expected = bytearray(inline.contents())
    with inline, waiting:
        for turn in range(120):
            offset = chance.randrange(size)
            if chance.random() < 0.5:
                offset -= offset % cluster
            length = min(size - offset, chance.choice((1, 512, cluster, chance.randrange(1, 4 * cluster))))
            match chance.randrange(8):
                case 0:
                    for engine in engines:
                        engine.disk.zero(offset, length, unmap=turn % 2 == 0)
                    expected[offset : offset + length] = bytes(length)
                case 1:
                    for engine in engines:
                        engine.disk.discard(offset, length)
                    expected = bytearray(inline.contents())
                case 2:
                    for engine in engines:
                        engine.disk.flush()
                case _:
                    expected[offset : offset + length] = content(turn << 20, offset, length)
                    view = memoryview(expected)[offset : offset + length]
                    if not inline.disk.write_cached(offset, view):
                        inline.disk.write(offset, view)
                    waiting.disk.write(offset, view)
            if turn % 8 == 0:
                assert inline.contents() == expected, f"seed {seed}, turn {turn}"
                assert waiting.contents() == expected, f"seed {seed}, turn {turn}"
    if kind != "data file":
        check(inline.path)


def test_entries_say_what_they_are(tmp_path: Path) -> None:
    """Q35-Q37: owned, at a cluster's start, without reserved bits."""
    with Engine(image(tmp_path)) as engine:
        engine.write(0, 4 * CLUSTER)
        engine.disk.zero(CLUSTER, CLUSTER, unmap=False)
        for cluster in range(4):
            entry = engine.entry(cluster)
            assert entry & COPIED
            assert entry & OFFSET_MASK
            assert (entry & OFFSET_MASK) % CLUSTER == 0
            assert entry & ~(COPIED | OFFSET_MASK) == (READS_ZERO if cluster == 1 else 0)

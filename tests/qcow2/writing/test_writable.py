"""What one image does to its file, and in which order: the crash argument, step by step (design section 6)."""

import errno
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nbdq.errors import CorruptImage
from nbdq.qcow2.features import Autoclear, Incompatible
from nbdq.qcow2.format import read_header
from nbdq.qcow2.writing import writable
from nbdq.qcow2.writing.epochs import NEVER
from nbdq.storage import FileStorage
from tests.support.engine import Call, Engine, K, M, check, make_image, make_raw, shown
from tests.support.tools import requires, run

CLUSTER = 4 * K


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_image(tmp_path / "top.qcow2", 4 * M, cluster_size=CLUSTER)


def small(directory: Path, size: int = 1 * M, **options: object) -> Path:
    """An image of clusters of 512 bytes."""
    return make_image(directory / "top.qcow2", size, cluster_size=512, **options)


def failure(call: Callable[[], object]) -> int:
    """The errno that ``call`` fails with; 0 if it does not."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


def full_behind(engine: Engine, end: int) -> None:
    """Let the file system have no room for anything behind ``end``."""

    def refuse(call: Call) -> None:
        if call.name in ("write", "reserve", "zero", "truncate") and call.end > end:
            raise OSError(errno.ENOSPC, "No space left on device")

    engine.storage.before = refuse


def roomy(engine: Engine) -> None:
    engine.storage.before = lambda call: None


# The order of a flush (W1-W3, R-51..R-53).


def test_a_flush_after_nothing_is_one_sync(path: Path) -> None:
    with Engine(path) as engine:
        engine.disk.flush()
        assert engine.story() == ["sync"]


def test_a_flush_after_writes_in_place_is_one_sync(path: Path) -> None:
    with Engine(path) as engine:
        engine.write(0, 8 * CLUSTER)
        engine.settle()
        engine.write(1000, 100)
        engine.write(CLUSTER, 3 * CLUSTER)
        assert engine.story() == ["data"]
        engine.disk.flush()
        assert engine.story() == ["sync"]


def test_a_flush_after_an_allocation_is_two_syncs_with_the_entries_between_them(path: Path) -> None:
    with Engine(path) as engine:
        engine.write(0, 1)
        engine.settle()
        engine.write(CLUSTER, 10 * CLUSTER)
        assert engine.story() == ["data"]
        engine.disk.flush()
        assert engine.story() == ["refcounts", "sync", "L2", "sync"]
        engine.disk.flush()
        assert engine.story() == ["sync"], "something was written twice"


def test_a_new_l2_table_is_durable_before_the_l1_entry_that_names_it(path: Path) -> None:
    """R-52: and goes out with the refcounts, since nothing in the file names it yet."""
    with Engine(path) as engine:
        engine.write(0, CLUSTER)
        assert engine.story() == ["data"]
        engine.disk.flush()
        assert engine.story() == ["refcounts", "L2", "sync", "L1", "sync"]


def test_a_new_refcount_block_is_durable_before_the_table_that_names_it_and_that_before_the_entries(
    tmp_path: Path,
) -> None:
    """A3, A4."""
    with Engine(small(tmp_path)) as engine:
        engine.write(0, 16 * K)
        engine.settle()
        engine.write(16 * K, 14 * K)
        engine.take()
        engine.disk.flush()
        assert engine.story() == ["refcounts", "sync", "L2", "sync"]
        for position in range(32 * K, 256 * K, 32 * K):
            engine.write(position, 32 * K)
        assert len(engine.image.refcounts.block_offsets()) == 3
        assert set(engine.story()) == {"data"}
        engine.disk.flush()
        assert engine.story() == ["refcounts", "L2", "sync", "refcount table", "sync", "L1", "sync"]


def test_zeros_that_free_clusters_need_one_sync_and_their_refcounts_fall_with_the_next_flush(path: Path) -> None:
    """W2, R-53: nothing new is named, so the entries can be written at once."""
    with Engine(path) as engine:
        engine.write(0, 4 * CLUSTER)
        engine.settle()
        host = engine.host(1)
        engine.disk.zero(CLUSTER, 2 * CLUSTER, unmap=True)
        assert engine.story() == []
        assert engine.refcount(host) == 1
        engine.disk.flush()
        assert engine.story() == ["L2", "sync", "punch data"]
        assert engine.refcount(host) == 0
        engine.disk.flush()
        assert engine.story() == ["refcounts", "sync"]


def test_zeros_that_keep_their_clusters_change_entries_only(path: Path) -> None:
    with Engine(path) as engine:
        engine.write(0, 4 * CLUSTER)
        engine.settle()
        engine.disk.zero(0, 4 * CLUSTER, unmap=False)
        engine.disk.flush()
        engine.disk.flush()
        assert engine.story() == ["L2", "sync", "sync"]


def test_a_longer_refcount_table_is_durable_before_the_header_names_it(tmp_path: Path) -> None:
    """A4, R-54: and the header has changed durably before the old table is freed."""
    with Engine(small(tmp_path, 16 * M, refcount_bits=64)) as engine:
        old = engine.image.header
        position = 0
        while engine.image.header.refcount_table_offset == old.refcount_table_offset:
            engine.take()
            before = engine.image.refcounts.covered_clusters * 512
            engine.write(position, 64 * K)
            position += 64 * K
        calls = engine.take()
        switch = next(number for number, call in enumerate(calls) if call.name == "write" and call.offset == 0)
        assert calls[switch].length <= 512, "a torn header"
        assert calls[switch + 1].name == "sync"
        assert calls[switch - 1].name == "sync"
        table = [call for call in calls[:switch] if call.name == "write" and call.offset >= before]
        assert table, "no table was written behind what the old one counts"
        engine.disk.flush()
        assert engine.refcount(old.refcount_table_offset) == 0
        assert engine.image.refcounts.covered_clusters * 512 > before
        expected = engine.contents()
    check(engine.path)
    assert shown(engine.path) == expected


@requires("qemu-img")
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_an_image_grows_through_blocks_and_tables_of_every_width(bits: int, tmp_path: Path) -> None:
    """A3, A4; iotests 026, 044, 121. The check sees every count, and that none is missing."""
    # 64 blocks fit in the first table; each counts 4096 / bits clusters of 512 bytes.
    size = {64: 12 * M, 32: 12 * M, 16: 12 * M}.get(bits, 6 * M)
    with Engine(small(tmp_path, size, refcount_bits=bits)) as engine:
        chance = random.Random(bits)
        for position in range(0, size, 256 * K):
            engine.write(position, 256 * K)
            if chance.random() < 0.2:
                engine.disk.flush()
            if chance.random() < 0.2:
                engine.disk.discard(chance.randrange(position + 1), 32 * K)
        blocks = len(engine.image.refcounts.block_offsets())
        table = engine.image.header.refcount_table_clusters
    assert blocks >= {1: 3, 2: 6, 4: 12, 8: 24}.get(bits, 40)
    assert table > 1 or bits < 32, "the table never grew"
    check(engine.path)


def test_no_metadata_is_written_between_flushes(tmp_path: Path) -> None:
    """W1-W3 would be in the hands of the page cache."""
    below = make_raw(tmp_path / "below.raw", 1 * M, (0, 1 * M))
    with Engine(small(tmp_path), below=below) as engine:
        chance = random.Random(5)
        for turn in range(200):
            offset = chance.randrange(2040) * 512
            length = chance.randrange(1, 1 * M - offset + 1) % (8 * K) or 1
            match turn % 4:
                case 0 | 1:
                    engine.write(offset, length)
                case 2:
                    engine.disk.zero(offset, length, unmap=turn % 8 == 2)
                case _:
                    engine.disk.discard(offset, length)
            story = engine.story()
            assert set(story) <= {"data"}, f"turn {turn}"
            if turn % 20 == 0:
                engine.disk.flush()
                engine.take()
    check(engine.path)


def test_a_new_cluster_is_written_before_its_entry_is_seen(path: Path) -> None:
    with Engine(path) as engine:
        seen: list[int] = []
        engine.storage.before = lambda call: seen.append(engine.entry(0)) if call.name == "write" else None
        engine.write(0, CLUSTER)
        assert seen == [0]
        roomy(engine)
        assert engine.entry(0)


# Quarantine.


def recycle(engine: Engine) -> int:
    """Fill the image so that only what is freed can be had; the host offset of guest cluster 0, which is freed."""
    engine.write(0, 8 * CLUSTER)
    engine.settle()
    host = engine.host(0)
    engine.disk.discard(0, CLUSTER)
    return host


def test_a_freed_cluster_is_used_again_only_after_the_flush(path: Path) -> None:
    with Engine(path) as engine:
        host = recycle(engine)
        engine.write(100 * CLUSTER, 20 * CLUSTER)
        assert all(engine.host(100 + number) != host for number in range(20))
        engine.disk.flush()
        engine.write(200 * CLUSTER, 20 * CLUSTER)
        assert host in [engine.host(200 + number) for number in range(20)]
        assert engine.contents()[:CLUSTER] == bytes(CLUSTER)
    check(path)


def test_a_freed_cluster_is_not_used_again_while_a_request_may_still_read_it(path: Path) -> None:
    with Engine(path) as engine:
        engine.write(0, 8 * CLUSTER)
        engine.settle()
        host = engine.host(0)
        pinned, done = threading.Event(), threading.Event()

        def slow_request() -> None:
            with engine.image.epochs.pinned():
                pinned.set()
                done.wait(60)

        request = threading.Thread(target=slow_request)
        request.start()
        pinned.wait(60)
        engine.disk.discard(0, CLUSTER)
        for _ in range(3):
            engine.disk.flush()
        assert [call for call in engine.take() if call.name == "punch"] == []
        assert engine.refcount(host) == 1
        engine.write(100 * CLUSTER, 40 * CLUSTER)
        assert all(engine.host(100 + number) != host for number in range(40))
        done.set()
        request.join()
        engine.disk.flush()
        assert [call for call in engine.take() if call.name == "punch"] == [Call("punch", host, CLUSTER)]
        assert engine.refcount(host) == 0
    check(path)


def test_a_request_that_began_after_the_flush_does_not_hold_what_was_freed_before(path: Path) -> None:
    """It cannot have found it in any table."""
    with Engine(path) as engine:
        host = recycle(engine)
        engine.storage.before = lambda call: None
        with engine.image.epochs.pinned():
            engine.disk.flush()
            assert engine.refcount(host) == 1
        engine.disk.flush()
        with engine.image.epochs.pinned():
            assert engine.refcount(host) == 0


def test_a_pin_within_a_pin_keeps_the_older_one(path: Path) -> None:
    with Engine(path) as engine, engine.image.epochs.pinned():
        host = recycle(engine)
        with engine.image.epochs.pinned():
            pass
        engine.disk.flush()
        engine.disk.flush()
        assert engine.refcount(host) == 1


def test_the_thread_that_never_waits_holds_what_it_may_have_found(path: Path) -> None:
    with Engine(path) as engine:
        host = recycle(engine)
        engine.image.epochs.inline = engine.image.epochs.current
        engine.disk.flush()
        assert engine.refcount(host) == 1
        engine.image.epochs.inline = NEVER
        engine.disk.flush()
        assert engine.refcount(host) == 0


@pytest.mark.parametrize("punch", [True, False])
def test_space_is_given_back_when_the_loss_is_durable_and_only_if_that_is_wanted(punch: bool, path: Path) -> None:
    """T3, T4."""
    with Engine(path, punch=punch) as engine:
        engine.write(0, 8 * CLUSTER)
        engine.settle()
        hosts = [engine.host(number) for number in range(8)]
        engine.disk.discard(0, 8 * CLUSTER)
        assert engine.take() == []
        engine.disk.flush()
        calls = engine.take()
        punched = [call for call in calls if call.name == "punch"]
        assert punched == ([Call("punch", hosts[0], 8 * CLUSTER)] if punch else [])
        assert "sync" in [call.name for call in calls[: calls.index(punched[0])]] if punch else True
    check(path)


def test_so_much_waits_for_a_flush_that_there_is_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R-50: the list is bounded."""
    monkeypatch.setattr(writable, "_FREED_BUDGET", 8 * CLUSTER)
    with Engine(path) as engine:
        engine.write(0, 64 * CLUSTER)
        engine.settle()
        engine.disk.discard(0, 8 * CLUSTER)
        assert engine.story() == []
        engine.disk.discard(8 * CLUSTER, CLUSTER)
        assert engine.story() == ["L2", "sync", "punch data"]


def test_closing_leaves_no_leaks_although_counts_fall_one_flush_later(path: Path) -> None:
    with Engine(path) as engine:
        recycle(engine)
    check(path)


# Failures.


@pytest.mark.parametrize("step", range(5))
def test_a_flush_that_finds_the_medium_full_is_done_again_later(step: int, path: Path) -> None:
    with Engine(path) as engine:
        engine.write(0, 2 * CLUSTER)
        data = engine.contents()
        count = 0

        def refuse(call: Call) -> None:
            nonlocal count
            if call.name == "write":
                if count == step:
                    raise OSError(errno.ENOSPC, "No space left on device")
                count += 1

        engine.storage.before = refuse
        outcome = failure(engine.disk.flush)
        roomy(engine)
        assert outcome == (errno.ENOSPC if step < 3 else 0)
        assert engine.contents() == data
        engine.take()
        engine.disk.flush()
        assert engine.story() == (["refcounts", "L2", "sync", "L1", "sync"] if step < 3 else ["sync"])
    check(path)
    assert shown(path) == data


def test_a_flush_that_failed_frees_nothing(path: Path) -> None:
    with Engine(path) as engine:
        host = recycle(engine)

        def refuse(call: Call) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        engine.storage.before = refuse
        assert failure(engine.disk.flush) == errno.ENOSPC
        roomy(engine)
        assert engine.refcount(host) == 1
        engine.disk.flush()
        assert engine.refcount(host) == 0
    check(path)


@pytest.mark.parametrize("name", ["write", "sync"])
def test_after_a_failed_medium_nothing_is_written_and_everything_is_readable(name: str, path: Path) -> None:
    """R-63."""
    engine = Engine(path)
    data = engine.write(0, CLUSTER)

    def fail(call: Call) -> None:
        if call.name == name:
            raise OSError(errno.EIO, "Input/output error")

    engine.storage.before = fail
    assert failure(engine.disk.flush) == errno.EIO
    roomy(engine)
    engine.take()
    assert failure(engine.disk.flush) == errno.EIO
    assert failure(lambda: engine.write(0, 512)) == errno.EIO
    assert failure(lambda: engine.write(10 * CLUSTER, 512)) == errno.EIO
    assert engine.take() == []
    assert engine.read(0, CLUSTER) == data
    assert failure(engine.disk.close) == errno.EIO  # what was written last may be lost
    assert engine.storage.descriptor == -1
    engine.clusters.close()


@pytest.mark.parametrize("room", range(8))
def test_a_full_medium_costs_the_request_that_met_it_and_nothing_else(room: int, path: Path) -> None:
    """A8: the image stays clean, whatever was missing: data, the table, both."""
    with Engine(path) as engine:
        full_behind(engine, path.stat().st_size + room * CLUSTER)
        done = []
        for cluster in range(0, 1000, 100):
            if failure(lambda cluster=cluster: engine.write(cluster * CLUSTER, 2 * CLUSTER)) == 0:
                done.append(cluster)
        assert len(done) < 10
        assert failure(engine.disk.flush) == 0
        expected = engine.contents()
        assert [cluster for cluster in range(0, 1000, 100) if any(expected[cluster * CLUSTER :][: 2 * CLUSTER])] == done
        roomy(engine)
        engine.write(3 * CLUSTER, CLUSTER)
        expected = engine.contents()
    check(path)
    assert shown(path) == expected


@pytest.mark.parametrize("room", [0, 1, 5, 40, 100])
def test_a_medium_that_is_full_while_tables_grow_leaves_a_clean_image(room: int, tmp_path: Path) -> None:
    with Engine(small(tmp_path, 8 * M, refcount_bits=64)) as engine:
        engine.write(0, 1900 * K)  # the refcount table is about to be full
        engine.disk.flush()
        full_behind(engine, engine.storage.size() + room * 512)
        outcomes = {failure(lambda turn=turn: engine.write((2 + turn) * M, 64 * K)) for turn in range(5)}
        assert outcomes == {errno.ENOSPC}
        engine.disk.flush()
        roomy(engine)
        for turn in range(5):
            engine.write((2 + turn) * M, 256 * K)
        assert engine.image.header.refcount_table_clusters > 1
        expected = engine.contents()
    check(engine.path)
    assert shown(engine.path) == expected


# Damage (R-27, R-28, W6).


def test_corruption_is_marked_at_once_and_ends_all_writing(path: Path) -> None:
    with Engine(path) as engine:
        engine.write(0, CLUSTER)
        engine.settle()
        engine.disk.close()
    with path.open("r+b") as file:  # the L1 entry of a table that lies on the refcount block
        header = read_header(FileStorage.open(str(path)))
        file.seek(header.l1_table_offset)
        l2 = int.from_bytes(file.read(8), "big") & ~(1 << 63)
        file.seek(l2 + 8)
        file.write((1 << 63 | 2 * CLUSTER).to_bytes(8, "big"))
    before = path.read_bytes()
    with Engine(path) as engine:
        data = engine.read(0, CLUSTER)
        assert failure(lambda: engine.write(CLUSTER, 512)) == errno.EIO
        calls = [call for call in engine.take() if call.name != "reserve"]
        assert [call.name for call in calls] == ["write", "sync"]
        assert (calls[0].offset, calls[0].length <= 512) == (0, True)
        assert len(engine.events) == 1
        assert "read-only" in engine.events[0]
        for change in (
            lambda: engine.write(0, 512),
            lambda: engine.disk.zero(0, CLUSTER, unmap=True),
            lambda: engine.disk.discard(0, CLUSTER),
        ):
            assert failure(change) == errno.EROFS
        assert failure(engine.disk.flush) == errno.EIO
        assert engine.read(0, CLUSTER) == data
        assert not engine.write_cached(0, 512)
    assert engine.take() == []
    after = path.read_bytes()
    assert after[512:] == before[512:]
    assert read_header(FileStorage.open(str(path))).is_corrupt


def test_a_version_2_image_that_is_corrupt_has_no_flag_for_it_but_is_left_alone(tmp_path: Path) -> None:
    path = make_image(tmp_path / "top.qcow2", 1 * M, version=2)
    before = path.read_bytes()
    with Engine(path) as engine:
        with engine.image.lock:
            engine.image.corruption("a test")
        assert failure(lambda: engine.write(0, 512)) == errno.EROFS
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (1 << 63 | 5 * CLUSTER | 1 << 57, "reserved bits"),
        (1 << 63 | 5 * CLUSTER | 512, "between clusters"),
        (1 << 63 | 4 * CLUSTER, "two L1 entries"),
    ],
)
def test_tables_that_contradict_each_other_are_refused(entry: int, message: str, tmp_path: Path) -> None:
    path = make_image(tmp_path / "top.qcow2", 4 * M, cluster_size=CLUSTER)
    with path.open("r+b") as file:
        file.seek(3 * CLUSTER)
        file.write((1 << 63 | 4 * CLUSTER).to_bytes(8, "big") + entry.to_bytes(8, "big"))
    storage = FileStorage.open(str(path), writable=True)
    with pytest.raises(CorruptImage, match=message):
        writable.WritableImage(storage, read_header(storage))
    storage.read(0, 1)  # stays the caller's
    storage.close()


# Snapshots.


@requires("qemu-img")
@pytest.mark.parametrize("bits", [2, 16, 64])
@pytest.mark.parametrize("extended", [False, True])
def test_flags_stay_exact_while_snapshots_share_clusters(extended: bool, bits: int, tmp_path: Path) -> None:
    """Q37, A6, K6: qemu-img check compares every COPIED flag with the count; the snapshots keep their contents."""
    cluster = 16 * K if extended else 4 * K
    options = {"cluster_size": cluster, "extended_l2": extended, "refcount_bits": bits}
    path = make_image(tmp_path / "top.qcow2", 256 * cluster, **options)
    kept = {}
    chance = random.Random(bits)
    for name in ("one", "two"):
        with Engine(path) as engine:
            for _ in range(20):
                engine.write(chance.randrange(200) * cluster, chance.randrange(1, 5 * cluster), seed=len(kept))
            kept[name] = engine.contents()
        check(path)
        run("qemu-img", "snapshot", "-c", name, path)
    with Engine(path) as engine:
        for turn in range(40):
            offset = chance.randrange(250) * cluster
            match turn % 4:
                case 0 | 1:
                    engine.write(offset + 512, cluster, seed=9)
                case 2:
                    engine.disk.zero(offset, 3 * cluster, unmap=turn % 8 == 2)
                case _:
                    engine.disk.discard(offset, 2 * cluster)
            if turn == 20:
                engine.disk.flush()
        expected = engine.contents()
    check(path)
    assert shown(path) == expected
    for name, contents in kept.items():
        assert shown(path, "-l", name) == contents


def test_a_flag_that_the_refcount_contradicts_is_not_believed(tmp_path: Path) -> None:
    """R-28: the cluster is copied; the count, which may be right, is left alone."""
    path = make_image(tmp_path / "top.qcow2", 1 * M, cluster_size=CLUSTER)
    with Engine(path) as engine:
        data = engine.write(0, CLUSTER)
        host = engine.host(0)
    with path.open("r+b") as file:
        file.seek(2 * CLUSTER + 2 * (host // CLUSTER))
        file.write((2).to_bytes(2, "big"))
    with Engine(path) as engine:
        new = engine.write(512, 512, seed=2)
        assert engine.host(0) != host
        assert engine.read(0, CLUSTER) == data[:512] + new + data[1024:]
        assert engine.storage.read(host, CLUSTER) == data


# Metadata of others.


def test_metadata_of_others_is_counted_and_protected_until_it_is_given_back(path: Path) -> None:
    with Engine(path) as engine:
        engine.write(0, CLUSTER)
        offset = engine.image.allocate_metadata(3)
        assert [engine.refcount(offset + number * CLUSTER) for number in range(3)] == [1, 1, 1]
        assert engine.image.protected.overlaps(offset // CLUSTER, 3)
        engine.disk.flush()
        again = Engine(path)
        assert [again.refcount(offset + number * CLUSTER) for number in range(3)] == [1, 1, 1]
        again.storage.close()
        again.clusters.close()
        engine.image.free_metadata(offset, 3)
        engine.write(100 * CLUSTER, 10 * CLUSTER)
        assert all(not offset <= engine.host(100 + number) < offset + 3 * CLUSTER for number in range(10))
        engine.disk.flush()
        assert engine.refcount(offset) == 0
        assert not engine.image.protected.overlaps(offset // CLUSTER, 3)
    check(path)


def test_metadata_for_which_there_is_no_room_is_not_allocated(path: Path) -> None:
    with Engine(path) as engine:
        full_behind(engine, path.stat().st_size)
        assert failure(lambda: engine.image.allocate_metadata(2)) == errno.ENOSPC
        roomy(engine)
        engine.image.free_metadata(engine.image.allocate_metadata(2), 2)
    check(path)


def test_a_field_of_the_header_changes_with_its_first_sector_and_nothing_else_does(tmp_path: Path) -> None:
    """R-54, R-55: a crash leaves either header; a name that reaches into the next sector stays whole."""
    path = make_image(tmp_path / "top.qcow2", 1 * M, cluster_size=CLUSTER, backing_name="b" * 600, backing_format="raw")
    before = path.read_bytes()
    with Engine(path) as engine:
        header = replace(engine.image.header, size=2 * M)
        engine.image.update_header(header)
        calls = engine.take()
        assert [call.name for call in calls] == ["write", "sync"]
        assert (calls[0].offset, calls[0].length <= 512) == (0, True)
        assert engine.image.header is header
    after = path.read_bytes()
    assert after == before[:24] + (2 * M).to_bytes(8, "big") + before[32:]


def test_the_header_keeps_what_it_says_when_it_is_marked(tmp_path: Path) -> None:
    path = make_image(tmp_path / "top.qcow2", 1 * M, backing_name="b" * 600, backing_format="qcow2")
    with Engine(path) as engine, engine.image.lock:
        engine.image.corruption("a test")
    header = read_header(FileStorage.open(str(path)))
    assert header.incompatible == Incompatible.CORRUPT
    assert header.autoclear == Autoclear.NONE
    assert header.backing_name == "b" * 600


# External data files (1.12).


@requires("qemu-img")
@pytest.mark.parametrize("raw", [False, True])
def test_an_external_data_file_holds_the_guest_data_and_is_durable_before_the_tables(raw: bool, tmp_path: Path) -> None:
    """Q29, Q77, Q80: guest and host offsets are equal; the data file alone is the disk if it promises that."""
    path = make_image(tmp_path / "top.qcow2", 4 * M, cluster_size=CLUSTER, data_file_name="disk.raw", data_file_raw=raw)
    data = make_raw(tmp_path / "disk.raw", 4 * M)
    with Engine(path, data=data) as engine:
        order: list[str] = []
        engine.storage.before = lambda call: order.append(call.name)
        assert isinstance(engine.data, type(engine.storage))
        engine.data.before = lambda call: order.append(f"data {call.name}")
        engine.write(CLUSTER + 512, 3 * CLUSTER)
        assert {step.split()[0] for step in order} <= {"data", "reserve"}
        engine.disk.flush()
        assert order[-1] == "sync"
        if "write" in order:
            entries = len(order) - 1 - order[::-1].index("write")
            assert order.index("data sync") < entries
            assert "sync" in order[order.index("data sync") : entries]
        engine.disk.zero(CLUSTER, CLUSTER, unmap=False)
        engine.disk.zero(2 * CLUSTER, CLUSTER, unmap=True)
        engine.disk.discard(3 * CLUSTER, CLUSTER)
        engine.write(20 * CLUSTER, CLUSTER)
        engine.write(2 * CLUSTER + 100, 100)
        expected = engine.contents()
        assert engine.refcount(0) == 1
        counted = sum(engine.refcount(number * CLUSTER) for number in range(100))
        assert counted <= 6, "guest data has counts"
    run("qemu-img", "check", "-f", "qcow2", path, cwd=tmp_path)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "top.qcow2", "shown", cwd=tmp_path)
    assert (tmp_path / "shown").read_bytes() == expected
    if raw:
        assert data.read_bytes() == expected


# The threshold.


def test_the_operator_is_told_once_that_the_image_passed_its_threshold(path: Path) -> None:
    with Engine(path) as engine:
        told: list[int] = []
        engine.image.allocator.watch(20 * CLUSTER, told.append)
        engine.write(0, 10 * CLUSTER)
        assert told == []
        engine.write(10 * CLUSTER, 10 * CLUSTER)
        assert len(told) == 1
        assert told[0] > 20 * CLUSTER
        engine.write(100 * CLUSTER, 100 * CLUSTER)
        assert len(told) == 1


def test_a_flush_that_runs_out_of_memory_while_it_writes_forgets_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends a flush, the next one writes all that this one had in hand."""
    with Engine(path) as engine:
        data = engine.write(0, CLUSTER)
        with monkeypatch.context() as patch:
            patch.setattr(writable, "_writes", lambda changes: (_ for _ in ()).throw(MemoryError))
            with pytest.raises(MemoryError):
                engine.disk.flush()
        engine.disk.flush()
    check(path)
    assert shown(path)[:CLUSTER] == data


def test_a_flush_that_cannot_even_copy_what_has_changed_is_the_last_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes that nobody has in hand any more must not be taken for written by a later flush (R-63)."""
    engine = Engine(path)
    engine.write(0, CLUSTER)

    def take(mapping: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(type(engine.disk.top.mapping), "take", take)
        assert failure(engine.disk.flush) == errno.EIO
    assert failure(engine.disk.flush) == errno.EIO
    assert failure(lambda: engine.write(0, 512)) == errno.EIO
    assert failure(engine.disk.close) == errno.EIO
    engine.clusters.close()
    check(path)

"""Internal snapshots of a running disk: QEMU finds them, reads them, and finds every flag and refcount exact (3.11)."""

import errno
import random
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from nbdq.errors import NotFound, OperationError
from nbdq.qcow2.audit.check import check_image
from nbdq.qcow2.entries import COPIED
from nbdq.qcow2.format import read_header
from nbdq.qcow2.image import Qcow2Image
from nbdq.qcow2.snapshots import Snapshot, find_snapshot, read_snapshots
from nbdq.qcow2.writing import mapping, refcounts
from nbdq.qcow2.writing.internal_snapshots import (
    apply_snapshot,
    create_snapshot,
    delete_snapshot,
)
from nbdq.qcow2.writing.switch import reclaim
from nbdq.storage import FileStorage
from tests.qcow2.minimal import FIELDS
from tests.support.engine import Engine, K, M, check, make_image, make_raw, shown
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io")

CLUSTER = 4 * K
DATE = 1_700_000_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_image(tmp_path / "top.qcow2", 4 * M, cluster_size=CLUSTER)


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    with Engine(path) as engine:
        yield engine


def create(engine: Engine, name: str = "one") -> Snapshot:
    return create_snapshot(engine.image, name, date_seconds=DATE, date_nanoseconds=5)


def go_back(engine: Engine, snapshot: Snapshot) -> None:
    reclaim(engine.image, engine.disk.apply_snapshot(snapshot))


def snapshots(engine: Engine) -> tuple[Snapshot, ...]:
    return read_snapshots(engine.storage, read_header(engine.storage))


def sound(engine: Engine) -> None:
    """QEMU finds neither leaks nor damage once everything is written."""
    for _ in range(3):
        engine.disk.flush()
    run("qemu-img", "check", "-U", "-f", "qcow2", engine.path)


def held(path: Path, snapshot: Snapshot) -> bytes:
    """What QEMU reads from a snapshot."""
    return shown(path, "-l", f"snapshot.id={snapshot.id}")


# Making.


def test_a_snapshot_holds_what_was_answered_before_and_nothing_after(engine: Engine) -> None:
    engine.write(0, 64 * K)
    engine.write(100 * K + 512, 1536)
    before = engine.contents()
    snapshot = create(engine)
    engine.write(0, 8 * K, seed=2)
    engine.disk.zero(16 * K, 64 * K, unmap=True)
    engine.disk.discard(96 * K, 8 * K)
    engine.write(2 * M, 8 * K, seed=3)
    after = engine.contents()
    sound(engine)
    assert held(engine.path, snapshot) == before
    assert shown(engine.path) == after != before


def test_qemu_lists_a_snapshot_as_it_was_named(engine: Engine) -> None:
    """Q58-Q61: disk size and date, ids that go on, names that repeat."""
    create(engine, "früh")
    engine.disk.grow(8 * M)
    create(engine, "früh")
    delete_snapshot(engine.image, snapshots(engine)[0])
    create(engine, "spät")
    engine.disk.flush()
    listed = run("qemu-img", "snapshot", "-U", "-l", engine.path).splitlines()[2:]
    assert [re.split(r" {2,}", line)[:2] for line in listed] == [["2", "früh"], ["3", "spät"]]
    assert [(each.disk_size, each.date_seconds, each.date_nanoseconds) for each in snapshots(engine)] == [
        (8 * M, DATE, 5)
    ] * 2


def test_the_next_id_follows_the_highest_number(path: Path) -> None:
    """Q61: also behind ids that others chose."""
    run("qemu-img", "snapshot", "-c", "first", path)
    run("qemu-img", "snapshot", "-c", "second", path)
    run("qemu-img", "snapshot", "-d", "first", path)
    with Engine(path) as engine:
        assert create(engine).id == "3"


@pytest.mark.parametrize("name", ["", "x" * 256, "a\0b", "\ud800"])
def test_a_name_that_qemu_has_no_room_for_is_refused(engine: Engine, name: str) -> None:
    with pytest.raises(OperationError, match="name"):
        create(engine, name)
    assert snapshots(engine) == ()


def test_the_table_is_complete_and_durable_before_the_header_names_it(engine: Engine) -> None:
    """R-54, R-56: one sync for all that is new, then one sector."""
    engine.write(0, 64 * K)
    engine.settle()
    create(engine)
    calls = engine.take()
    headers = [number for number, call in enumerate(calls) if call.name == "write" and call.offset == 0]
    assert len(headers) == 1
    assert calls[headers[0]].length == 512
    assert [calls[headers[0] + step].name for step in (-1, 1)] == ["sync", "sync"]
    assert all(call.name != "write" for call in calls[headers[0] + 1 :])


def test_nothing_that_the_file_names_is_touched_before_the_header(engine: Engine) -> None:
    engine.write(0, 64 * K)
    create(engine)
    engine.write(0, 16 * K)
    engine.settle()
    before = engine.path.read_bytes()
    create(engine, "two")
    delete_snapshot(engine.image, snapshots(engine)[0])
    writes = [call for call in engine.take() if call.name == "write" and call.offset]
    first = next(call for call in writes)
    assert first
    with closing(FileStorage.open(str(engine.path))) as storage:
        header = read_header(storage)
    assert header.l1_table_offset not in (int.from_bytes(before[40:48], "big"), 0)
    named = {int.from_bytes(before[offset : offset + width], "big") for offset, width in (FIELDS["l1_table_offset"],)}
    assert not named & {call.offset for call in writes}


def test_the_disk_goes_on_in_place_where_nothing_is_shared(engine: Engine) -> None:
    """A table of its own stays its own; a shared cluster is copied once (A6, K6)."""
    engine.write(0, 64 * K)
    create(engine)
    assert not engine.entry(0) & COPIED
    engine.write(0, 512, seed=2)
    place = engine.host(0)
    assert engine.entry(0) & COPIED
    engine.write(1024, 512, seed=3)
    assert engine.host(0) == place


def test_a_table_without_own_clusters_is_shared_until_it_changes(path: Path, tmp_path: Path) -> None:
    """Two snapshots of a disk at rest share all tables."""
    with Engine(path) as engine:
        engine.write(0, 64 * K)
        create(engine)
        tables = [engine.image.mapping.l1.words[0]]
        create(engine, "two")
        tables.append(engine.image.mapping.l1.words[0])
        assert tables[0] == tables[1] | COPIED
        assert engine.image.refcounts.get((tables[1] & ~COPIED) // CLUSTER) == 2
        before = engine.contents()
        engine.write(0, 512, seed=9)
        sound(engine)
    check(path)
    for name in ("one", "two"):
        assert shown(path, "-l", name) == before


def test_a_snapshot_is_refused_where_refcounts_cannot_count_it(tmp_path: Path) -> None:
    """Q31: and everything is as it was."""
    path = make_image(tmp_path / "narrow.qcow2", 1 * M, cluster_size=CLUSTER, refcount_bits=1)
    with Engine(path) as engine:
        written = engine.write(0, 64 * K)
        with pytest.raises(OSError, match="refcount_bits=1") as caught:
            create(engine)
        assert caught.value.errno == errno.EFBIG
        assert snapshots(engine) == ()
        engine.write(64 * K, 64 * K)
        assert engine.read(0, 64 * K) == written
        sound(engine)
    check(path)


def test_two_bits_are_enough_for_two_snapshots_and_no_third(tmp_path: Path) -> None:
    path = make_image(tmp_path / "narrow.qcow2", 1 * M, cluster_size=CLUSTER, refcount_bits=2)
    with Engine(path) as engine:
        engine.write(0, 64 * K)
        create(engine)
        create(engine, "two")
        with pytest.raises(OSError, match="refcount_bits=2"):
            create(engine, "three")
        delete_snapshot(engine.image, snapshots(engine)[0])
        create(engine, "three")
        sound(engine)
    check(path)


def test_an_image_with_a_data_file_has_no_snapshots(tmp_path: Path) -> None:
    """4.5: its clusters are not counted."""
    data = tmp_path / "data.raw"
    path = tmp_path / "top.qcow2"
    run("qemu-img", "create", "-f", "qcow2", "-o", f"data_file={data}", path, "1M")
    with Engine(path, data=data) as engine, pytest.raises(OperationError, match="external data file"):
        create(engine)


def test_where_refcounts_lie_no_snapshot_is_made(path: Path) -> None:
    """R-28: a cluster in use that nobody counted would soon be somebody else's."""
    with Engine(path) as engine:
        engine.write(0, 64 * K)
        engine.settle()
        block = engine.image.refcounts.block(0)
        cluster = engine.host(3) // CLUSTER
        block.set(cluster, 0)
        with pytest.raises(OSError, match="refcounts are lower") as caught:
            create(engine)
        assert caught.value.errno == errno.EIO
        block.set(cluster, 1)
        create(engine)
        sound(engine)


def test_no_room_for_a_snapshot_is_an_answer_like_any_other(engine: Engine) -> None:
    written = engine.write(0, 64 * K)
    engine.settle()
    end = engine.storage.size()

    def full(call: object) -> None:
        if getattr(call, "name", "") in ("write", "reserve") and getattr(call, "end", 0) > end:
            raise OSError(errno.ENOSPC, "No space left on device")

    engine.storage.before = full
    with pytest.raises(OSError, match="No space left"):
        create(engine)
    engine.storage.before = lambda call: None
    engine.write(64 * K, 4 * K)
    create(engine)
    engine.write(0, 4 * K, seed=2)
    assert engine.read(4 * K, 60 * K) == written[4 * K :]
    sound(engine)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("verb", ["create", "delete", "apply"])
def test_whatever_fails_the_file_has_the_old_state_or_the_new_one(tmp_path: Path, verb: str, number: int) -> None:
    """Every system call that changes the file fails once; what can be tried again succeeds then."""
    prepared = make_image(tmp_path / "prepared.qcow2", 256 * K, cluster_size=512, refcount_bits=64)
    with Engine(prepared) as engine:
        engine.write(0, 128 * K)
        first = create(engine)
        engine.write(64 * K, 128 * K, seed=2)
        create(engine, "two")
        engine.write(0, 32 * K, seed=3)
        current = engine.contents()
    past = held(prepared, first)
    for failing in range(10_000):
        path = Path(shutil.copy(prepared, tmp_path / "top.qcow2"))
        engine = Engine(path)
        calls = iter(range(failing + 1))

        def fail(call: object, calls: Iterator[int] = calls, last: int = failing) -> None:
            if next(calls, -1) == last:
                raise OSError(number, "it failed")

        engine.storage.before = fail
        has_failed = False
        try:
            _do(engine, verb, first)
        except OSError:
            has_failed = True
        engine.storage.before = lambda call: None
        if engine.storage.failure is not None:
            with pytest.raises(OSError, match="after a failure"):
                engine.__exit__()
        else:
            if has_failed:
                assert engine.contents() == current
                _do(engine, verb, first)
            engine.__exit__()
        if not has_failed and next(calls, -1) >= 0:  # it makes fewer calls than that
            break
        with closing(FileStorage.open(str(path))) as storage:
            result = check_image(storage, read_header(storage))
            names = [each.name for each in read_snapshots(storage, read_header(storage))]
        assert not result.corruptions, result.findings
        assert names in (["one", "two"], {"create": ["one", "two", "three"], "delete": ["two"]}.get(verb))
        if failing % 9 == 0:
            assert shown(path) in ((past, current) if verb == "apply" else (current,))
    else:
        pytest.fail("it never ended")


def _do(engine: Engine, verb: str, first: Snapshot) -> None:
    if verb == "create":
        create(engine, "three")
    elif verb == "delete":
        delete_snapshot(engine.image, first)
    else:
        go_back(engine, first)


def test_a_disk_without_any_size_has_snapshots_too(tmp_path: Path) -> None:
    """Q41: no L1 table."""
    path = tmp_path / "top.qcow2"
    run("qemu-img", "create", "-f", "qcow2", path, "0")
    with Engine(path) as engine:
        empty = create(engine)
        engine.disk.grow(1 * M)
        engine.write(0, 64 * K)
        go_back(engine, empty)
        assert engine.disk.size == 0
        delete_snapshot(engine.image, empty)
        engine.disk.grow(1 * M)
        assert engine.contents() == bytes(1 * M)
    check(path)


def test_what_is_being_copied_up_meanwhile_is_waited_for(engine: Engine) -> None:
    """A job that works beside the guest may have clusters in flight though the disk is drained."""
    engine.write(0, 8 * K)
    with engine.image.lock:
        engine.image.in_flight.add(5)
    made = threading.Thread(target=create, args=(engine,))
    made.start()
    made.join(0.1)
    assert made.is_alive()
    with engine.image.lock:
        engine.image.in_flight.discard(5)
        engine.image.changed.notify_all()
    made.join()
    assert len(snapshots(engine)) == 1


def test_a_refcount_table_that_is_full_grows_for_a_snapshot(tmp_path: Path) -> None:
    """A4: 64 entries of 64 counters of 8 bytes."""
    path = make_image(tmp_path / "top.qcow2", 3 * M, cluster_size=512, refcount_bits=64)
    with Engine(path) as engine:
        engine.write(0, 1900 * K)
        before = engine.contents()
        old = len(engine.image.refcounts.table.words)
        for number in range(3):
            create(engine, str(number))
            engine.write(number * 64 * K, 64 * K, seed=2)
        assert len(engine.image.refcounts.table.words) > old
        sound(engine)
        assert shown(path, "-l", "0") == before
    check(path)


# Deleting.


def test_what_only_a_deleted_snapshot_held_is_free_and_given_back(engine: Engine) -> None:
    engine.write(0, 1 * M)
    snapshot = create(engine)
    engine.write(0, 1 * M, seed=2)
    engine.settle()
    after = engine.contents()
    delete_snapshot(engine.image, snapshot)
    punched = sum(call.length for call in engine.take() if call.name == "punch")
    assert punched >= 1 * M
    size = engine.storage.size()
    engine.write(2 * M, 1 * M - 64 * K, seed=3)
    assert engine.storage.size() <= size + 64 * K, "free clusters were not used"
    sound(engine)
    assert shown(engine.path)[: 1 * M] == after[: 1 * M]


def test_what_only_the_disk_holds_afterwards_is_written_in_place(engine: Engine) -> None:
    """Q37: without the flags every cluster would be copied for nothing, for ever."""
    engine.write(0, 64 * K)
    snapshot = create(engine)
    places = [engine.host(cluster) for cluster in range(16)]
    engine.write(4 * K, 512, seed=2)
    delete_snapshot(engine.image, snapshot)
    engine.write(0, 64 * K, seed=3)
    assert [engine.host(cluster) for cluster in (0, *range(2, 16))] == [places[0], *places[2:]]
    sound(engine)


def test_a_cluster_that_another_snapshot_holds_is_not_written_in_place(engine: Engine) -> None:
    engine.write(0, 64 * K)
    first, second = create(engine), create(engine, "two")
    before = engine.contents()
    delete_snapshot(engine.image, first)
    assert not engine.entry(0) & COPIED
    engine.write(0, 64 * K, seed=3)
    sound(engine)
    assert held(engine.path, second) == before


def test_the_guest_may_write_in_place_only_when_the_snapshot_is_gone_for_good(engine: Engine) -> None:
    """A crash could bring the snapshot back before."""
    engine.write(0, 64 * K)
    snapshot = create(engine)
    engine.settle()
    seen: list[int] = []

    def look(call: object) -> None:
        if getattr(call, "name", "") == "write" and getattr(call, "offset", 1) == 0:
            seen.append(engine.image.mapping.tables[0].words[0] & COPIED)

    engine.storage.before = look
    delete_snapshot(engine.image, snapshot)
    assert seen == [0]
    assert engine.entry(0) & COPIED


def test_a_snapshot_cannot_be_deleted_twice(engine: Engine) -> None:
    snapshot = create(engine)
    delete_snapshot(engine.image, snapshot)
    with pytest.raises(NotFound, match="any more"):
        delete_snapshot(engine.image, snapshot)


def test_extra_data_that_nobody_knows_stays_with_the_other_snapshots(path: Path) -> None:
    """Q59."""
    run("qemu-img", "snapshot", "-c", "old", path)
    with closing(FileStorage.open(str(path), writable=True)) as storage:
        table = read_header(storage).snapshots_offset
        entry = storage.read(table, 72)
        extra = entry[40:64] + b"whatever"
        storage.write(table, entry[:36] + len(extra).to_bytes(4, "big") + extra + entry[64:].ljust(8, b"\0"))
    with Engine(path) as engine:
        create(engine)
        offset = engine.image.header.snapshots_offset
        assert engine.storage.read(offset, 120)[40:72] == extra
    check(path)


def test_reads_of_a_replaced_cluster_end_before_it_is_used_again(engine: Engine) -> None:
    """R-50: a request that looked a cluster up keeps it, though the snapshot that shared it is deleted meanwhile."""
    engine.write(0, 64 * K)
    snapshot = create(engine)
    old = engine.host(0)
    with engine.image.epochs.pinned():
        writer = threading.Thread(target=engine.write, args=(0, 64 * K), kwargs={"seed": 2})
        writer.start()
        writer.join()
        delete_snapshot(engine.image, snapshot)
        engine.disk.flush()
        assert engine.refcount(old) == 1
    engine.settle()
    assert engine.refcount(old) == 0
    sound(engine)


def test_a_table_whose_last_reference_is_only_waiting_is_metadata_no_more(engine: Engine) -> None:
    """The disk has just replaced the table that it shared with two snapshots."""
    engine.write(0, 64 * K)
    both = create(engine), create(engine, "two")
    with engine.image.epochs.pinned():
        writer = threading.Thread(target=engine.write, args=(0, 4 * K), kwargs={"seed": 2})
        writer.start()
        writer.join()
        for snapshot in both:
            delete_snapshot(engine.image, snapshot)
    engine.settle()
    engine.write(1 * M, 1 * M, seed=3)
    sound(engine)
    assert not engine.image.is_corrupt


# Going back.


def test_the_disk_goes_back_to_what_a_snapshot_holds(engine: Engine) -> None:
    engine.write(0, 256 * K)
    before = engine.contents()
    snapshot = create(engine)
    engine.write(128 * K, 2 * M, seed=2)
    engine.disk.zero(0, 64 * K, unmap=True)
    go_back(engine, snapshot)
    assert engine.contents() == before
    sound(engine)
    engine.write(4 * K, 32 * K, seed=3)
    after = engine.contents()
    sound(engine)
    assert held(engine.path, snapshot) == before
    assert shown(engine.path) == after


@pytest.mark.parametrize("size", [1 * M, 16 * M])
def test_the_disk_gets_the_size_that_it_had_then(tmp_path: Path, size: int) -> None:
    """Q64."""
    base = make_raw(tmp_path / "base.raw", 32 * M, (0, 32 * M))
    path = tmp_path / "top.qcow2"
    run("qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "raw", "-o", "cluster_size=4k", path, str(size))
    with Engine(path, below=base) as engine:
        engine.write(100 * K, 20 * K)
        before = engine.contents()
        snapshot = create(engine)
        if size < 4 * M:
            engine.disk.grow(4 * M)
        else:
            engine.disk.shrink(4 * M)
        assert engine.disk.size == 4 * M
        go_back(engine, snapshot)
        assert engine.disk.size == size
        assert engine.contents() == before
        sound(engine)
        engine.disk.grow(24 * M)
        assert engine.contents() == before + bytes(24 * M - size)
    check(path)
    assert shown(path) == before + bytes(24 * M - size)


def test_bitmaps_hinder_going_back(tmp_path: Path) -> None:
    """4.5: they would not notice what changes."""
    path = make_image(tmp_path / "top.qcow2", 1 * M, cluster_size=CLUSTER)
    run("qemu-img", "snapshot", "-c", "one", path)
    run("qemu-img", "bitmap", "--add", path, "b")
    with Engine(path) as engine:
        with pytest.raises(OperationError, match="active dirty bitmaps"):
            apply_snapshot(engine.image, snapshots(engine)[0])
        create(engine, "two")


def test_another_size_of_version_2_is_refused(tmp_path: Path) -> None:
    """R3: nobody resizes such an image while it has snapshots, but somebody may have."""
    path = make_image(tmp_path / "top.qcow2", 1 * M, cluster_size=CLUSTER, version=2)
    with Engine(path) as engine:
        snapshot = create(engine)
        go_back(engine, snapshot)
    with path.open("r+b") as file:
        file.seek(FIELDS["size"][0])
        file.write((M // 2).to_bytes(8, "big"))
    with Engine(path) as engine, pytest.raises(OperationError, match="version 2"):
        apply_snapshot(engine.image, snapshots(engine)[0])


def test_what_another_operation_holds_is_waited_for_by_trying_again(engine: Engine) -> None:
    """A reference that ends later would leave flags behind that are not exact."""
    engine.write(0, 64 * K)
    snapshot = create(engine)
    with engine.image.hold():
        engine.write(0, 64 * K, seed=2)
        with pytest.raises(OSError, match="still holds") as caught:
            apply_snapshot(engine.image, snapshot)
        assert caught.value.errno == errno.EBUSY
    go_back(engine, snapshot)
    delete_snapshot(engine.image, snapshot)
    sound(engine)


# Names and ids.


def test_no_snapshot_gets_an_id_that_is_the_name_of_another(engine: Engine) -> None:
    """Or who shows the one by its name would suddenly show the other."""
    first = create(engine, "2")
    assert create(engine, "x").id == "3"
    assert find_snapshot(snapshots(engine), "2") == first


# With QEMU.

_IMAGES = {
    "plain": "cluster_size=4k",
    "64k": "cluster_size=64k",
    "tiny": "cluster_size=512,refcount_bits=64",
    "subclusters": "cluster_size=16k,extended_l2=on",
    "wide refcounts": "cluster_size=4k,refcount_bits=32",
    "version 2": "cluster_size=4k,compat=0.10",
}


@pytest.mark.parametrize("compressed", [False, True], ids=["", "compressed"])
@pytest.mark.parametrize("kind", _IMAGES)
def test_snapshots_come_and_go_at_random_beside_writes(tmp_path: Path, kind: str, compressed: bool) -> None:
    """Every snapshot keeps what it held, whoever made it, and QEMU finds nothing wrong at any time."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    generator = random.Random(seed)
    base = make_raw(tmp_path / "base.raw", 1 * M, (0, 300 * K), (600 * K, 100 * K))
    path = tmp_path / "top.qcow2"
    run("qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "raw", "-o", _IMAGES[kind], path, "1M")
    if compressed:
        run("qemu-io", "-f", "qcow2", "-c", "write -c -P 5 64k 256k", "-c", "write -c -P 6 512k 128k", path)
    expected: dict[str, bytes] = {}
    for _ in range(3):
        with Engine(path, below=base) as engine:
            for _ in range(12):
                _disturb(engine, generator)
                found = snapshots(engine)
                choice = generator.random()
                if choice < 0.45:
                    expected[create(engine, generator.choice("abc")).id] = engine.contents()
                elif choice < 0.7 and found:
                    gone = generator.choice(found)
                    now = engine.contents()
                    delete_snapshot(engine.image, gone)
                    del expected[gone.id]
                    assert engine.contents() == now
                elif found:
                    chosen = generator.choice(found)
                    go_back(engine, chosen)
                    assert engine.contents() == expected[chosen.id]
            sound(engine)
            now = engine.contents()
            found = snapshots(engine)
        check(path)
        assert shown(path) == now
        assert {each.id: held(path, each) for each in found} == expected
        if found:  # and QEMU goes on
            run("qemu-img", "snapshot", "-a", found[0].id, path)
            names = [each.name for each in found]
            if names.count(names[-1]) == 1:
                run("qemu-img", "snapshot", "-d", names[-1], path)
                del expected[found[-1].id]
        run("qemu-img", "snapshot", "-c", "qemu", path)
        check(path)
        with Engine(path, below=base) as engine:
            expected[snapshots(engine)[-1].id] = engine.contents()


def _disturb(engine: Engine, generator: random.Random) -> None:
    size = engine.disk.size
    for _ in range(generator.randrange(8)):
        offset = generator.randrange(0, size, 512)
        length = min(size - offset, generator.choice((512, 4 * K, 30 * K, 100 * K)))
        kind = generator.random()
        if kind < 0.7:
            engine.write(offset, length, seed=generator.randrange(1000))
        elif kind < 0.85:
            engine.disk.zero(offset, length, unmap=generator.random() < 0.5)
        else:
            engine.disk.discard(offset, length)
    if generator.random() < 0.3:
        engine.disk.flush()


def test_qemu_does_the_same_to_a_twin(tmp_path: Path) -> None:
    """Contents, map and space: what one snapshot shares or frees, the other does."""
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    make_image(ours, 4 * M, cluster_size=CLUSTER)
    shutil.copy(ours, theirs)

    def write(offset: int, length: int, pattern: int) -> None:
        with Engine(ours) as engine:
            engine.disk.write(offset, memoryview(bytes([pattern]) * length))
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} {offset} {length}", theirs)

    def both(verb: str, name: str) -> None:
        run("qemu-img", "snapshot", verb, name, theirs)
        with Engine(ours) as engine:
            if verb == "-c":
                create(engine, name)
            elif verb == "-d":
                delete_snapshot(engine.image, find_snapshot(snapshots(engine), name))
            else:
                go_back(engine, find_snapshot(snapshots(engine), name))

    write(0, 1 * M, 1)
    both("-c", "a")
    write(512 * K, 1 * M, 2)
    both("-c", "b")
    write(0, 64 * K, 3)
    both("-a", "a")
    write(256 * K, 8 * K, 4)
    both("-d", "a")
    assert run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", ours, theirs)
    assert shown(ours, "-l", "b") == shown(theirs, "-l", "b")
    for image in (ours, theirs):
        check(image)
    # Both images hold the same clusters; where, and in which order, is up to each.
    free = [re.search(r"([\d]+)/", run("qemu-img", "check", image)) for image in (ours, theirs)]
    assert free[0]
    assert free[1]
    assert free[0][1] == free[1][1]


def test_an_exported_snapshot_stays_readable_while_others_come_and_go(engine: Engine) -> None:
    engine.write(0, 512 * K)
    kept, other = create(engine, "kept"), create(engine, "other")
    before = engine.contents()
    reader = Qcow2Image(FileStorage.open(str(engine.path)), engine.image.header, snapshot=kept)

    def read() -> list[tuple[int, int]]:
        found = reader.map(0, 4 * M)
        assert found is not None
        return list(zip(found.position.tolist(), found.host.tolist(), strict=True))

    with closing(reader):
        mapped = read()
        engine.write(0, 256 * K, seed=2)
        delete_snapshot(engine.image, other)
        go_back(engine, kept)
        engine.write(64 * K, 512 * K, seed=3)
        create(engine, "later")
        engine.write(64 * K, 512 * K, seed=4)
        engine.settle()
        assert read() == mapped
        content = b"".join(reader.storage.read(host, CLUSTER) for _, host in mapped)
    assert content == before[: len(content)]


def test_writers_go_on_while_a_snapshot_is_deleted(path: Path) -> None:
    """No request is lost, and none writes where another snapshot reads."""
    with Engine(path) as engine:
        engine.write(0, 2 * M)
        kept, gone = create(engine, "kept"), [create(engine, str(number)) for number in range(6)]
        before = engine.contents()
        stop = threading.Event()
        failures: list[BaseException] = []

        def work(start: int) -> None:
            generator = random.Random(start)
            try:
                while not stop.is_set():
                    offset = start + generator.randrange(0, 1 * M - 16 * K, 512)
                    engine.write(offset, 8 * K, seed=7)
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(start * M,)) for start in range(2)]
        for worker in workers:
            worker.start()
        for snapshot in gone:
            delete_snapshot(engine.image, snapshot)
        stop.set()
        for worker in workers:
            worker.join()
        assert not failures
        after = engine.contents()
        sound(engine)
        assert held(path, kept) == before
        assert shown(path) == after


def test_little_memory_for_tables_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "_L2_BUDGET", 8 << 9)
    monkeypatch.setattr(refcounts, "_BLOCK_BUDGET", 4 << 9)
    path = make_image(tmp_path / "top.qcow2", 1 * M, cluster_size=512, refcount_bits=64)
    with Engine(path) as engine:
        engine.write(0, 600 * K)
        first = create(engine)
        before = engine.contents()
        engine.write(100 * K, 800 * K, seed=2)
        create(engine, "two")
        go_back(engine, first)
        assert engine.contents() == before
        delete_snapshot(engine.image, first)
        sound(engine)
        assert engine.contents() == before
    check(path)


def test_every_fifth_cluster_of_the_file_may_be_free(tmp_path: Path) -> None:
    """New tables and blocks find places one by one."""
    path = make_image(tmp_path / "top.qcow2", 4 * M, cluster_size=512)
    with Engine(path) as engine:
        engine.write(0, 3 * M)
        for offset in range(0, 3 * M, 2560):
            engine.disk.discard(offset, 512)
        engine.settle()
        engine.disk.flush()
        before = engine.contents()
        snapshot = create(engine)
        engine.write(0, 1 * M, seed=5)
        sound(engine)
        assert held(path, snapshot) == before
        go_back(engine, snapshot)
        sound(engine)
        assert np.array_equal(np.frombuffer(engine.contents(), np.uint8), np.frombuffer(before, np.uint8))
    check(path)

"""Larger disks: what is new reads as zeros, and a crash leaves the old size or the new one (R2, R-54, R-62)."""

import errno
from pathlib import Path

import pytest

from nbdq.qcow2.format import read_header
from nbdq.storage import FileStorage
from tests.support.engine import Call, Engine, K, M, T, check, make_image, make_raw, shown
from tests.support.tools import requires

CLUSTER = 4 * K


def image(directory: Path, size: int, **options: object) -> Path:
    return make_image(directory / "top.qcow2", size, **{"cluster_size": CLUSTER, **options})


def stored_size(path: Path) -> int:
    storage = FileStorage.open(str(path))
    size = read_header(storage).guest_size
    storage.close()
    return size


def refused(engine: Engine, size: int) -> int:
    with pytest.raises(OSError, match=r"\w") as caught:
        engine.disk.grow(size)
    return caught.value.errno or 0


@requires("qemu-img")
@pytest.mark.parametrize("cluster", [512, 4 * K])
def test_a_disk_grows_and_keeps_what_was_on_it(cluster: int, tmp_path: Path) -> None:
    path = image(tmp_path, 1 * M, cluster_size=cluster)
    with Engine(path) as engine:
        data = engine.write(0, 1 * M)
        for size in (1 * M + 512, 3 * M, 40 * M):
            engine.disk.grow(size)
            assert engine.disk.size == stored_size(path) == size
            assert engine.contents() == data.ljust(size, b"\0")
        tail = engine.write(40 * M - 100, 100)
    check(path)
    assert shown(path) == data.ljust(40 * M - 100, b"\0") + tail


def test_an_l1_table_longer_than_a_refcount_block_counts_is_made(tmp_path: Path) -> None:
    """A5: 32768 entries are more clusters of 512 bytes than lie between two blocks."""
    path = image(tmp_path, 1 * M, cluster_size=512)
    with Engine(path) as engine:
        data = engine.write(0, 64 * K)
        engine.disk.grow(1 << 30)
        assert engine.storage.size() < 4 * M
        last = engine.write((1 << 30) - 512, 512)
        assert engine.read(0, 64 * K) == data
        assert engine.read((1 << 30) - 512, 512) == last
    check(path)


def test_what_the_last_cluster_hid_does_not_show_up(tmp_path: Path) -> None:
    """S2: the file may hold anything behind the end of the disk."""
    path = image(tmp_path, 1 * M + 512)
    with Engine(path) as engine:
        data = engine.write(1 * M, 512)
        host = engine.host(256)
        engine.storage.write(host + 512, b"\xee" * (CLUSTER - 512))
        engine.disk.grow(2 * M)
        assert engine.read(1 * M, 1 * M) == data + bytes(1 * M - 512)
    check(path)


@pytest.mark.parametrize("extended", [False, True])
def test_a_longer_base_does_not_show_through(extended: bool, tmp_path: Path) -> None:
    """S2."""
    below = make_raw(tmp_path / "base.raw", 4 * M, (0, 4 * M))
    cluster = 16 * K if extended else CLUSTER
    path = image(tmp_path, 1 * M + 512, cluster_size=cluster, extended_l2=extended)
    with Engine(path, below=below) as engine:
        old = engine.contents()
        engine.disk.grow(3 * M)
        assert engine.contents() == old + bytes(3 * M - len(old))
        engine.disk.grow(8 * M)
        assert engine.contents() == old + bytes(8 * M - len(old))
    check(path)


def test_the_size_changes_last_and_one_sector_names_a_longer_table(tmp_path: Path) -> None:
    """R-54, R-62."""
    path = image(tmp_path, 1 * M)
    below = make_raw(tmp_path / "base.raw", 4 * M, (0, 4 * M))
    with Engine(path, below=below) as engine:
        engine.write(0, CLUSTER)
        engine.settle()
        old_table = engine.image.mapping.l1.offset
        sizes: list[int] = []

        def look(call: Call) -> None:
            if call.name in ("write", "sync"):
                sizes.append(stored_size(path))

        engine.storage.before = look
        engine.disk.grow(16 << 30)  # 8192 entries: 16 clusters
        calls = [call for call in engine.take() if call.name in ("write", "sync")]
        headers = [number for number, call in enumerate(calls) if call.name == "write" and call.offset == 0]
        assert len(headers) == 2
        assert all(calls[number].length <= 512 for number in headers)
        assert all(calls[number - 1].name == calls[number + 1].name == "sync" for number in headers)
        assert set(sizes[: headers[1] + 1]) == {1 * M}
        assert all(call.name != "write" for call in calls[headers[1] + 1 :])
        assert engine.image.mapping.l1.offset != old_table
        engine.storage.before = lambda call: None
        engine.disk.flush()
        assert engine.refcount(old_table) == 0
    check(path)


def test_a_disk_that_cannot_grow_so_stays_as_it_is(tmp_path: Path) -> None:
    path = image(tmp_path, 1 * M)
    with Engine(path) as engine:
        engine.write(0, CLUSTER)
        for size, expected in (
            (1 * M, errno.EINVAL),
            (512, errno.EINVAL),
            (2 * M + 1, errno.EINVAL),
            (9 * T, errno.EFBIG),
        ):
            assert refused(engine, size) == expected
        assert engine.disk.size == 1 * M
    assert stored_size(path) == 1 * M
    check(path)


@pytest.mark.parametrize("room", [0, 1, 5, 16, 17])
def test_a_disk_that_finds_no_room_to_grow_keeps_its_size_and_can_try_again(room: int, tmp_path: Path) -> None:
    path = image(tmp_path, 1 * M)
    below = make_raw(tmp_path / "base.raw", 16 * M, (0, 16 * M))
    with Engine(path, below=below) as engine:
        engine.write(0, CLUSTER)
        engine.disk.flush()
        old = engine.contents()
        end = engine.storage.size() + room * CLUSTER

        def full(call: Call) -> None:
            if call.name in ("write", "reserve", "zero") and call.end > end:
                raise OSError(errno.ENOSPC, "No space left on device")

        engine.storage.before = full
        assert refused(engine, 16 << 30) == errno.ENOSPC
        engine.storage.before = lambda call: None
        assert engine.disk.size == stored_size(path) == 1 * M
        assert engine.contents() == old
        engine.disk.grow(16 << 30)
        assert engine.read(0, 32 * M) == old + bytes(31 * M)
    check(path)

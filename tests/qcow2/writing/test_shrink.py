"""Smaller disks: what is behind the end is given up, and a crash leaves the old size or the new one (R3, R-62)."""

import errno
from pathlib import Path
from typing import Any

import pytest

from nbdq.qcow2.bitmaps.takeover import DirtyBitmaps, take_over_bitmaps
from nbdq.qcow2.create import Preallocation
from nbdq.qcow2.format import read_header
from nbdq.storage import FileStorage
from tests.support.engine import Call, Engine, K, M, check, make_image, make_raw, shown
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io")

CLUSTER = 4 * K

VARIANTS: dict[str, dict[str, Any]] = {
    "v3": {"cluster_size": CLUSTER},
    "v2": {"cluster_size": CLUSTER, "version": 2},
    "512": {"cluster_size": 512, "refcount_bits": 64},
    "one bit": {"cluster_size": 512, "refcount_bits": 1},
    "extended": {"cluster_size": 16 * K, "extended_l2": True},
    "64k": {},
    "preallocated": {"cluster_size": CLUSTER, "preallocation": Preallocation.METADATA},
}
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def image(directory: Path, size: int = 4 * M, **options: Any) -> Path:
    return make_image(directory / "top.qcow2", size, **{"cluster_size": CLUSTER, **options})


def stored_size(path: Path) -> int:
    storage = FileStorage.open(str(path))
    size = read_header(storage).guest_size
    storage.close()
    return size


@every_variant
def test_a_disk_shrinks_and_nothing_comes_back_when_it_grows(options: dict[str, Any], tmp_path: Path) -> None:
    below = make_raw(tmp_path / "base.raw", 3 * M, (0, 3 * M))
    path = image(tmp_path, **options)
    with Engine(path, below=below) as engine:
        engine.write(0, 1 * M)
        engine.disk.zero(1 * M, 100 * K, unmap=False)
        engine.write(2 * M, 2 * M)
        old = engine.contents()
        for size in (3 * M + 512, 3 * M, 2 * M + 1536, 700 * K, 512):
            engine.disk.shrink(size)
            assert engine.disk.size == stored_size(path) == size
            assert engine.contents() == old[:size]
        engine.disk.grow(4 * M)
        assert engine.contents() == old[:512].ljust(4 * M, b"\0")
    check(path)
    assert shown(path)[:512] == old[:512]


@every_variant
def test_the_space_behind_the_end_is_free_again(options: dict[str, Any], tmp_path: Path) -> None:
    path = image(tmp_path, **{**options, "preallocation": Preallocation.OFF})
    with Engine(path) as engine:
        engine.write(0, 4 * M)
        engine.settle()
        end = engine.storage.size()
        engine.disk.shrink(engine.cluster_size)
        engine.disk.flush()
        engine.disk.grow(4 * M)
        engine.write(0, 4 * M)
        engine.disk.flush()
        assert engine.storage.size() <= end
    check(path)


def test_qemu_shrinks_and_grows_to_the_same_disk(tmp_path: Path) -> None:
    paths = [make_image(tmp_path / name, 4 * M, cluster_size=CLUSTER) for name in ("ours.qcow2", "theirs.qcow2")]
    for path in paths:
        run("qemu-io", "-f", "qcow2", "-c", "write -P 3 0 4M", path)
    with Engine(paths[0]) as engine:
        engine.disk.shrink(1 * M)
        engine.disk.grow(2 * M)
    run("qemu-img", "resize", "-q", "--shrink", paths[1], "1M")
    run("qemu-img", "resize", "-q", paths[1], "2M")
    run("qemu-img", "compare", "-s", "-f", "qcow2", "-F", "qcow2", *paths)
    check(paths[0])


def test_the_size_is_durable_before_anything_behind_it_goes(tmp_path: Path) -> None:
    path = image(tmp_path)
    with Engine(path) as engine:
        engine.write(0, 4 * M)
        engine.settle()
        sizes: list[tuple[str, int]] = []

        def look(call: Call) -> None:
            if call.name in ("write", "punch"):
                sizes.append((engine.role(call.offset), stored_size(path)))

        engine.storage.before = look
        engine.disk.shrink(1 * M)
        assert sizes[0] == ("header", 4 * M)
        assert {size for _, size in sizes[1:]} == {1 * M}
        assert engine.take()[1].name == "sync"
        engine.storage.before = lambda call: None
    check(path)


def test_what_an_interrupted_shrinking_left_does_not_show_up_when_the_disk_grows(tmp_path: Path) -> None:
    """R-62: a crash right after the size."""
    path = image(tmp_path)
    with Engine(path) as engine:
        data = engine.write(0, 4 * M)
    with path.open("r+b") as file:
        file.seek(24)
        file.write((1 * M + 512).to_bytes(8, "big"))
    check(path)
    with Engine(path) as engine:
        engine.disk.grow(4 * M)
        assert engine.contents() == data[: 1 * M + 512].ljust(4 * M, b"\0")
    check(path)
    assert shown(path) == data[: 1 * M + 512].ljust(4 * M, b"\0")


@pytest.mark.parametrize("extended", [False, True])
def test_a_snapshot_keeps_what_the_disk_loses(extended: bool, tmp_path: Path) -> None:
    path = image(tmp_path, cluster_size=16 * K, extended_l2=extended)
    with Engine(path) as engine:
        data = engine.write(0, 4 * M)
    run("qemu-img", "snapshot", "-c", "kept", path)
    with Engine(path) as engine:
        engine.write(3 * M, 4 * K, seed=4)
        engine.disk.shrink(1 * M + 512)
        assert engine.contents() == data[: 1 * M + 512]
    check(path)
    run("qemu-img", "snapshot", "-a", "kept", path)
    check(path)
    assert shown(path) == data


def test_bitmaps_shrink_and_grow_along(tmp_path: Path) -> None:
    path = image(tmp_path, 4 * M)
    run("qemu-img", "bitmap", "--add", "-g", "64k", path, "b0")
    with Engine(path) as engine:
        with_bitmaps(engine)
        engine.write(0, 64 * K)
        engine.write(3 * M, 64 * K)
        engine.disk.shrink(1 * M)
        engine.disk.grow(16 * M)
        engine.write(9 * M, 512)
    check(path)
    with Engine(path) as engine:
        bits = with_bitmaps(engine).find("b0")
        assert bits is not None
        dirty = [
            (start, end)
            for part in bits.ranges(0, 16 * M)
            for start, end, is_dirty in zip(
                part.start.tolist(), [*part.start.tolist()[1:], part.end], part.dirty.tolist(), strict=True
            )
            if is_dirty
        ]
    assert dirty == [(0, 64 * K), (9 * M, 9 * M + 64 * K)]


def with_bitmaps(engine: Engine) -> DirtyBitmaps:
    """Bitmaps of the image in use, as when it is opened for writing."""
    taken = take_over_bitmaps(engine.storage, engine.image.header)
    assert taken.bitmaps is not None
    engine.image.header, engine.image.bitmaps = taken.header, taken.bitmaps
    return taken.bitmaps


def test_a_bitmap_that_nobody_believes_keeps_a_disk_from_being_resized(tmp_path: Path) -> None:
    """R3: as in QEMU."""
    path = image(tmp_path, 4 * M)
    run("qemu-img", "bitmap", "--add", path, "b0")
    with Engine(path) as engine:
        with_bitmaps(engine)
        crashed = tmp_path / "crashed.qcow2"
        crashed.write_bytes(path.read_bytes())
    with Engine(crashed) as engine:
        with_bitmaps(engine)
        data = engine.write(0, 4 * M)
        for resize, size in ((engine.disk.shrink, 1 * M), (engine.disk.grow, 8 * M)):
            with pytest.raises(OSError, match="'b0' is inconsistent") as caught:
                resize(size)
            assert caught.value.errno == errno.EOPNOTSUPP
        assert engine.contents() == data
        assert engine.disk.size == stored_size(crashed) == 4 * M


def test_a_disk_that_fails_to_shrink_forgets_nothing_of_its_bitmaps(tmp_path: Path) -> None:
    path = image(tmp_path, 4 * M)
    run("qemu-img", "bitmap", "--add", "-g", "64k", path, "b0")
    with Engine(path) as engine:
        bits = with_bitmaps(engine).find("b0")
        assert bits is not None
        engine.write(3 * M, 64 * K)

        def broken(call: Call) -> None:
            if call == Call("write", 0, 512):
                raise OSError(errno.ENOSPC, "No space left on device")

        engine.storage.before = broken
        with pytest.raises(OSError, match="No space"):
            engine.disk.shrink(1 * M)
        engine.storage.before = lambda call: None
        assert engine.disk.size == 4 * M
        assert bits.dirty_length == 64 * K
    check(path)


@pytest.mark.parametrize("raw", [False, True])
def test_a_data_file_is_as_long_as_its_disk(raw: bool, tmp_path: Path) -> None:
    """As with QEMU; a raw one is the disk, so that what is new is mapped at once (Q80)."""
    data = tmp_path / "data.raw"
    data.touch()
    path = image(tmp_path, 4 * M, cluster_size=64 * K, data_file_name="data.raw", data_file_raw=raw)
    with Engine(path, data=data) as engine:
        written = engine.write(0, 4 * M)
        engine.disk.shrink(1 * M + 512)
        assert data.read_bytes() == written[: 1 * M + 512]
        engine.disk.grow(3 * M)
        expected = written[: 1 * M + 512].ljust(3 * M, b"\0")
        assert engine.contents() == expected
        assert data.stat().st_size == 3 * M
        assert not raw or data.read_bytes() == expected
    run("qemu-img", "check", "top.qcow2", cwd=tmp_path)
    if raw:
        with data.open("r+b") as file:
            file.seek(2 * M)
            file.write(b"others")
        run("qemu-img", "convert", "-O", "raw", "top.qcow2", "flat", cwd=tmp_path)
        assert (tmp_path / "flat").read_bytes() == data.read_bytes()


def test_a_disk_that_cannot_shrink_so_stays_as_it_is(tmp_path: Path) -> None:
    with Engine(image(tmp_path)) as engine:
        data = engine.write(0, 4 * M)
        for size in (4 * M, 5 * M, 0, -512, 1 * M + 1):
            with pytest.raises(OSError, match="cannot shrink") as caught:
                engine.disk.shrink(size)
            assert caught.value.errno == errno.EINVAL
        assert engine.contents() == data
    check(engine.path)


def test_a_version_2_image_with_snapshots_keeps_its_size(tmp_path: Path) -> None:
    """Its snapshots do not say how large the disk was (R3)."""
    path = image(tmp_path, version=2)
    run("qemu-img", "snapshot", "-c", "kept", path)
    with Engine(path) as engine:
        for resize, size in ((engine.disk.shrink, 1 * M), (engine.disk.grow, 8 * M)):
            with pytest.raises(OSError, match="v2 image which has snapshots") as caught:
                resize(size)
            assert caught.value.errno == errno.EOPNOTSUPP
        assert engine.disk.size == 4 * M
    check(path)


def test_a_medium_that_is_full_does_not_keep_a_disk_from_shrinking(tmp_path: Path) -> None:
    path = image(tmp_path)
    with Engine(path) as engine:
        data = engine.write(0, 4 * M)
        engine.settle()
        end = engine.storage.size()

        def full(call: Call) -> None:
            if call.name in ("write", "reserve") and call.end > end:
                raise OSError(errno.ENOSPC, "No space left on device")

        engine.storage.before = full
        engine.disk.shrink(1 * M + 512)
        assert engine.contents() == data[: 1 * M + 512]
        engine.storage.before = lambda call: None
    check(path)


# Giving everything up.


@every_variant
def test_an_emptied_disk_shows_what_is_below(options: dict[str, Any], tmp_path: Path) -> None:
    below = make_raw(tmp_path / "base.raw", 3 * M, (0, 3 * M))
    path = image(tmp_path, **options)
    with Engine(path, below=below) as engine:
        engine.write(0, 4 * M)
        engine.disk.discard(1 * M, 1 * M)
        engine.disk.make_empty()
        assert engine.contents() == below.read_bytes().ljust(4 * M, b"\0")
        engine.disk.flush()
        assert list(engine.image.mapping.present(0, 1 << 20)) == []
        engine.write(100, 1000)
    check(path)


def test_a_snapshot_of_an_emptied_disk_stays(tmp_path: Path) -> None:
    path = image(tmp_path)
    with Engine(path) as engine:
        data = engine.write(0, 2 * M)
    run("qemu-img", "snapshot", "-c", "kept", path)
    with Engine(path) as engine:
        engine.write(0, 100 * K, seed=2)
        engine.disk.make_empty()
        assert engine.contents() == bytes(4 * M)
    check(path)
    assert shown(path, "-l", "kept") == data.ljust(4 * M, b"\0")

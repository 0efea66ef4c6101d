"""Emptying an image offline: QEMU finds it empty and sound, and a crash leaves what was there, or nothing (3.8)."""

import errno
import os
from pathlib import Path

import pytest

from nbdq.qcow2.create import CreateOptions, plan_image
from nbdq.qcow2.format import Header, read_header
from nbdq.qcow2.writing.emptying import can_make_empty, make_empty
from nbdq.storage import FileStorage
from tests.support.engine import Call, Engine, K, M, WatchedStorage, check, make_image, make_raw, shown
from tests.support.tools import execute, requires, run

pytestmark = requires("qemu-img", "qemu-io")

GEOMETRIES = {
    "64k": {},
    "512": {"cluster_size": 512},
    "refcounts of 64 bits": {"cluster_size": 512, "refcount_bits": 64},
    "refcounts of one bit": {"cluster_size": 512, "refcount_bits": 1},
    "version 2": {"cluster_size": 4 * K, "version": 2},
    "extended": {"cluster_size": 16 * K, "extended_l2": True},
    "2M": {"cluster_size": 2 * M},
}


def emptied(path: Path) -> Header:
    storage = FileStorage.open(str(path), writable=True)
    header = read_header(storage)
    assert can_make_empty(storage, header)
    header = make_empty(storage, header)
    assert header == read_header(storage)
    storage.close()
    return header


@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("size", [3 * M + 512, 40 * M])
def test_an_emptied_image_shows_its_backing_file_and_is_as_short_as_a_new_one(
    options: dict[str, int], size: int, tmp_path: Path
) -> None:
    below = make_raw(tmp_path / "base.raw", size, (0, 1 * M))
    path = make_image(tmp_path / "top.qcow2", size, backing_name=str(below), backing_format="raw", **options)
    with Engine(path, below=below) as engine:
        engine.write(100 * K, 2 * M)
        engine.disk.zero(0, 70 * K, unmap=True)
    header = emptied(path)
    check(path)
    assert shown(path) == below.read_bytes()
    layout = plan_image(CreateOptions(size=size, **options))
    assert path.stat().st_size == layout.cluster_count * header.cluster_size
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 3M", path)
    check(path)


def test_an_empty_image_can_be_emptied_again_and_again(tmp_path: Path) -> None:
    path = make_image(tmp_path / "top.qcow2", 1 * M)
    for _ in range(3):
        emptied(path)
        check(path)
    assert shown(path) == bytes(1 * M)


def test_tables_longer_than_a_refcount_block_counts_are_counted(tmp_path: Path) -> None:
    """A disk of 1 GiB has 32768 L1 entries of 32 KiB: 512 clusters, and 64 bits count only 64 in a block."""
    path = make_image(tmp_path / "top.qcow2", 1 << 30, cluster_size=512, refcount_bits=64)
    run("qemu-io", "-f", "qcow2", "-c", "write 500M 3M", path)
    emptied(path)
    check(path)
    assert (
        execute(
            "qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", path, make_image(tmp_path / "new.qcow2", 1 << 30)
        ).returncode
        == 0
    )


def test_the_dirty_bit_goes_with_the_wrong_refcounts(tmp_path: Path) -> None:
    path = make_image(tmp_path / "top.qcow2", 1 * M, lazy_refcounts=True)
    killed = execute("qemu-io", "-f", "qcow2", "-c", "write 0 64k", "-c", "sigraise 9", path)
    assert killed.returncode < 0
    emptied(path)
    check(path)
    assert "true" not in [line.split()[-1] for line in run("qemu-img", "info", path).splitlines() if "dirty" in line]


@pytest.mark.parametrize("command", ["snapshot -c kept {}", "bitmap --add {} kept"])
def test_an_image_with_more_than_guest_data_is_not_emptied_so(command: str, tmp_path: Path) -> None:
    path = make_image(tmp_path / "top.qcow2", 1 * M)
    run("qemu-img", *command.format(path).split())
    storage = FileStorage.open(str(path))
    assert not can_make_empty(storage, read_header(storage))
    storage.close()


@pytest.mark.parametrize("room", [0, 1, 2])
def test_a_full_medium_leaves_the_image_as_it_was(room: int, tmp_path: Path) -> None:
    path = make_image(tmp_path / "top.qcow2", 1 * M, cluster_size=4 * K)
    with Engine(path) as engine:
        engine.write(0, 1 * M)
    before = shown(path)
    storage = WatchedStorage.open(str(path), writable=True)
    end = storage.size() + room * 4 * K

    def full(call: Call) -> None:
        if call.name in ("write", "zero", "truncate") and max(call.end, call.offset) > end:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    storage.before = full
    with pytest.raises(OSError, match="No space") as caught:
        make_empty(storage, read_header(storage))
    assert caught.value.errno == errno.ENOSPC
    storage.close()
    check(path)
    assert shown(path) == before

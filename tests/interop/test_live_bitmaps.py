"""Bitmaps that are changed while a disk is written to: QEMU, doing the same things, ends up with the same bitmaps."""

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdq.chain.bitmaps import bitmaps_of, find_source
from nbdq.chain.clusters import ClusterCache
from nbdq.chain.open import open_writable
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.policy import Policy
from nbdq.errors import OperationError
from nbdq.qcow2.bitmaps.tracking import DirtyBitmaps
from tests.support.oracles import Status, block_status
from tests.support.serving import serve
from tests.support.storage_daemon import StorageDaemon
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon", "nbdinfo")

M = 1 << 20


def create(path: Path, size: int, options: str = "cluster_size=64k") -> Path:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(size))
    return path


@contextmanager
def writable(path: Path) -> Iterator[tuple[OverlayDisk, DirtyBitmaps]]:
    """The image and its bitmaps, open for writing by us and closed properly."""
    clusters = ClusterCache(budget=M)
    with (
        closing(clusters),
        closing(open_writable(str(path), format="qcow2", policy=Policy(), clusters=clusters)) as disk,
    ):
        assert isinstance(disk, OverlayDisk)
        yield disk, bitmaps_of(disk.top)


def qemu_says(path: Path, name: str) -> list[Status]:
    """The bitmap as qemu-nbd exports it."""
    command = ["[", "qemu-nbd", "-r", "-f", "qcow2", "-B", name, str(path), "]"]
    return block_status(command, f"qemu:dirty-bitmap:{name}")


def described(path: Path) -> list[dict[str, Any]]:
    data = json.loads(run("qemu-img", "info", "--output=json", path))["format-specific"]["data"]
    return data.get("bitmaps", [])  # type: ignore[no-any-return]


def our_states(bitmaps: DirtyBitmaps) -> dict[str, tuple[int, int, bool, bool]]:
    return {each.name: (each.dirty_length, each.granularity, each.is_recording, each.is_persistent) for each in bitmaps}


@pytest.mark.parametrize(
    ("size", "options"),
    [(10 * M + 1536, "cluster_size=64k"), (3 * M + 512, "cluster_size=512"), (64 * M, "cluster_size=2M")],
)
def test_qemu_has_the_same_bitmaps_after_the_same_changes(size: int, options: str, tmp_path: Path) -> None:
    """Adding, removing, clearing, enabling, disabling and merging at random, between writes; messages are compared."""
    ours, theirs = create(tmp_path / "ours", size, options), create(tmp_path / "theirs", size, options)
    export = tmp_path / "socket"
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chosen = random.Random(seed)
    with closing(StorageDaemon(theirs)) as daemon, writable(ours) as (disk, bitmaps):
        daemon.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(export)}})
        daemon.execute("block-export-add", type="nbd", id="e", **{"node-name": "d"}, name="e", writable=True)
        for _ in range(60):
            verb = chosen.choice(["write", "write", "write", "add", "remove", "clear", "enable", "disable", "merge"])
            name, other = chosen.choice("abcd"), chosen.choice("abcd")
            if verb == "write":
                offset = chosen.randrange(size // 512) * 512
                length = min(size - offset, chosen.choice([512, 4096, 70 * 1024, M]))
                disk.write(offset, memoryview(b"\1" * length))
                run("qemu-io", "-f", "raw", "-c", f"write -P 1 {offset} {length}", f"nbd+unix:///e?socket={export}")
                continue
            if verb == "add":
                bits = chosen.choice([9, 12, 16, 20])
                options_ = {"persistent": chosen.random() < 0.7, "disabled": chosen.random() < 0.2}
                said = daemon.bitmap("add", name, granularity=1 << bits, **options_)
                refusal = attempt(lambda: bitmaps.add(name, granularity_bits=bits, **options_))  # noqa: B023
            elif verb == "merge":
                said = daemon.execute("block-dirty-bitmap-merge", node="d", target=name, bitmaps=[other])
                refusal = attempt(lambda: merge(disk, bitmaps, name, other))  # noqa: B023
            else:
                said = daemon.bitmap(verb, name)
                refusal = attempt(lambda: getattr(bitmaps, verb)(name))  # noqa: B023
            assert refusal == (said or None)
            assert our_states(bitmaps) == daemon.states()
            for name in our_states(bitmaps):
                assert bitmaps.usable(name).digest() == daemon.digest(name)
        kept = [each.name for each in bitmaps if each.is_persistent]
        daemon.execute("block-export-del", id="e")
    assert sorted(described(ours), key=str) == sorted(described(theirs), key=str)
    for name in kept:
        assert qemu_says(ours, name) == qemu_says(theirs, name)
    assert run("qemu-img", "compare", "-q", ours, theirs) == ""
    assert "No errors were found" in run("qemu-img", "check", ours)


def merge(disk: OverlayDisk, bitmaps: DirtyBitmaps, target: str, source: str) -> None:
    bitmaps.usable(target)
    bitmaps.merge(target, [find_source(disk, source)])


def attempt(change: Any) -> str | None:
    """What is said against a change; None if it was done."""
    try:
        change()
    except OperationError as error:
        return str(error)
    return None


@pytest.mark.parametrize("new_size", [40 * M, 1024 * M, 5 * M + 512])
def test_bitmaps_follow_the_size_of_the_disk_as_in_qemu(new_size: int, tmp_path: Path) -> None:
    ours = create(tmp_path / "ours", 10 * M)
    for granularity in (512, 65536):
        run("qemu-img", "bitmap", "--add", "-g", str(granularity), ours, str(granularity))
    run("qemu-io", "-f", "qcow2", "-c", "write 0 64k", "-c", "write 9M 1M", "-c", "write 4M 3M", ours)
    theirs = shutil.copy(ours, tmp_path / "theirs")
    with writable(ours) as (disk, _):
        (disk.grow if new_size > disk.size else disk.shrink)(new_size)
        disk.write(new_size - 512, memoryview(b"\1" * 512))
    run("qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", theirs, str(new_size))
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 1 {new_size - 512} 512", theirs)
    for name in ("512", "65536"):
        assert qemu_says(ours, name) == qemu_says(theirs, name)
    assert run("qemu-img", "compare", "-q", ours, theirs) == ""
    assert "No errors were found" in run("qemu-img", "check", ours)


def test_a_bitmap_of_a_layer_below_can_be_merged(tmp_path: Path) -> None:
    base, top = create(tmp_path / "base", 10 * M), tmp_path / "top"
    run("qemu-img", "bitmap", "--add", "-g", "65536", base, "b0")
    run("qemu-io", "-f", "qcow2", "-c", "write 5M 64k", base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    with writable(top) as (disk, bitmaps):
        bitmaps.add("both", persistent=True)
        disk.write(M, memoryview(b"\1" * 512))
        bitmaps.merge("both", [find_source(disk, "b0")])
    assert [status for status in qemu_says(top, "both") if status.value] == [
        Status(M, 65536, 1),
        Status(5 * M, 65536, 1),
    ]


def test_an_inconsistent_bitmap_is_shown_as_all_dirty_and_somebody_is_told(tmp_path: Path) -> None:
    path, after = create(tmp_path / "disk", 10 * M), tmp_path / "after"
    run("qemu-img", "bitmap", "--add", path, "b0")
    with writable(path):
        shutil.copy(path, after)
    assert "in-use" in described(after)[0]["flags"]
    with serve("-r", "-B", "b0", after) as server:
        assert block_status([server.uri()], "qemu:dirty-bitmap:b0") == [Status(0, 10 * M, 1)]
        assert "Bitmap 'b0' is inconsistent" in server.stderr


def test_an_inconsistent_bitmap_that_is_removed_leaves_a_clean_image(tmp_path: Path) -> None:
    path, after = create(tmp_path / "disk", 10 * M), tmp_path / "after"
    for name in ("b0", "b1"):
        run("qemu-img", "bitmap", "--add", path, name)
    run("qemu-io", "-f", "qcow2", "-c", "write 0 1M", path)
    with writable(path):
        shutil.copy(path, after)
    with writable(after) as (disk, bitmaps):
        bitmaps.remove("b0")
        bitmaps.forget_removed(disk.top)
    assert [each["name"] for each in described(after)] == ["b1"]
    assert "No errors were found" in run("qemu-img", "check", after)

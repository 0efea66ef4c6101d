"""Persistent dirty bitmaps shared with QEMU: what it stored we read, what we stored it reads, and exports agree.

The referee is the metadata context that qemu-nbd shows of a bitmap.
"""

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nbdq.chain.bitmaps import find_bitmaps
from nbdq.chain.clusters import ClusterCache
from nbdq.chain.open import open_disk, open_writable
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.policy import Policy
from nbdq.errors import ExportError
from tests.support.oracles import Status, block_status, merged
from tests.support.serving import refusal, serve
from tests.support.tools import execute, requires, run

pytestmark = requires("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")

M, G = 1 << 20, 1 << 30


class Shape(NamedTuple):
    """A disk, and the granularity of each of its bitmaps, which are called by it."""

    size: int
    cluster_size: int
    granularities: tuple[int, ...]
    options: str = ""

    def __str__(self) -> str:
        return f"{self.size} in {self.cluster_size}"


SHAPES = [
    Shape(3 * M + 512, 512, (512, 65536)),
    Shape(512, 65536, (512, 2 * G)),
    Shape(10 * M + 1536, 65536, (512, 4096, 65536, M)),
    Shape(100 * M + 512, 2 * M, (512, 4 * M)),
    Shape(5 * G + 512, 65536, (512, 65536, 2 * G)),
    Shape(9 * M, 16384, (4096, 32768), ",extended_l2=on"),
]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def create(path: Path, shape: Shape, *more: str) -> list[str]:
    """An image with its bitmaps; their names."""
    run(
        *("qemu-img", "create", "-q", "-f", "qcow2", *more),
        *("-o", f"cluster_size={shape.cluster_size}{shape.options}", path, str(shape.size)),
    )
    for granularity in shape.granularities:
        run("qemu-img", "bitmap", "--add", "-g", str(granularity), path, str(granularity))
    return [str(granularity) for granularity in shape.granularities]


def operations(shape: Shape, count: int) -> Iterator[tuple[str, int, int]]:
    """Random (verb of qemu-io, offset, length); discards of whole clusters, because others may change nothing."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chosen = random.Random(seed)
    for _ in range(count):
        verb = chosen.choice(["write", "write -z", "write -zu", "discard"])
        unit = shape.cluster_size if verb == "discard" else 512
        units = shape.size // unit
        if units:
            first = chosen.randrange(units)
            length = chosen.randrange(1, min(units - first, max(1, M // unit)) + 1)
            yield verb, first * unit, length * unit


def perform_by_qemu(path: Path, work: list[tuple[str, int, int]]) -> None:
    words = [word for verb, offset, length in work for word in ("-c", f"{verb} {offset} {length}")]
    run("qemu-io", "-t", "unsafe", "-d", "unmap", "-f", "qcow2", *words, path)


def perform(disk: OverlayDisk, work: list[tuple[str, int, int]]) -> None:
    for verb, offset, length in work:
        if verb == "write":
            view = memoryview(b"\xcd" * length)
            if not disk.write_cached(offset, view):
                disk.write(offset, view)
        elif verb == "discard":
            disk.discard(offset, length)
        else:
            disk.zero(offset, length, unmap=verb == "write -zu")


@contextmanager
def writable(path: Path) -> Iterator[OverlayDisk]:
    """The image, open for writing by us and closed properly."""
    clusters = ClusterCache(budget=M)
    with (
        closing(clusters),
        closing(open_writable(str(path), format="qcow2", policy=Policy(), clusters=clusters)) as disk,
    ):
        assert isinstance(disk, OverlayDisk)
        yield disk


def qemu_says(path: Path, name: str) -> list[Status]:
    """The bitmap as qemu-nbd exports it."""
    command = ["[", "qemu-nbd", "-r", "-f", "qcow2", "-B", name, str(path), "]"]
    return block_status(command, f"qemu:dirty-bitmap:{name}")


def we_say(path: Path, name: str) -> list[Status]:
    """The bitmap as we load it."""
    clusters = ClusterCache(budget=M)
    with closing(clusters), closing(open_disk(str(path), format="qcow2", policy=Policy(), clusters=clusters)) as disk:
        return live(disk, name)


def live(disk: Any, name: str) -> list[Status]:
    bits = find_bitmaps(disk, [name])[name]
    found = []
    for start, dirty, end in bits.ranges(0, disk.size):
        bounds = [*start.tolist(), end]
        found += [
            Status(low, high - low, int(state)) for low, high, state in zip(bounds, bounds[1:], dirty, strict=False)
        ]
    return merged(found)


def flags(path: Path) -> dict[str, set[str]]:
    """What ``qemu-img info`` says of each bitmap."""
    described = json.loads(run("qemu-img", "info", "--output=json", path))["format-specific"]["data"]["bitmaps"]
    return {each["name"]: set(each["flags"]) for each in described}


@every_shape
def test_bitmaps_that_qemu_stored_are_read_bit_for_bit(shape: Shape, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    names = create(path, shape)
    for _ in range(2):
        perform_by_qemu(path, list(operations(shape, 6)))
        for name in names:
            assert we_say(path, name) == qemu_says(path, name)


@every_shape
def test_bitmaps_that_we_stored_are_those_that_qemu_would_have_stored(shape: Shape, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    names = create(ours, shape)
    perform_by_qemu(ours, list(operations(shape, 2)))
    run("qemu-img", "bitmap", "--disable", ours, names[0])
    shutil.copy(ours, theirs)
    for _ in range(3):
        work = list(operations(shape, 8))
        with writable(ours) as disk:
            perform(disk, work)
            marked = {name: live(disk, name) for name in names}
        perform_by_qemu(theirs, work)
        for name in names:
            assert qemu_says(ours, name) == qemu_says(theirs, name) == marked[name]
        assert flags(ours) == flags(theirs) == {name: {"auto"} for name in names} | {names[0]: set()}
        run("qemu-img", "check", "-q", ours)
    assert run("qemu-img", "compare", "-q", ours, theirs) == ""


@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_a_disk_that_was_written_from_end_to_end_is_dirty_from_end_to_end_to_qemu(
    cluster_size: int, tmp_path: Path
) -> None:
    """Table entries that say "all ones", which QEMU reads and never writes (Q66)."""
    path = tmp_path / "disk"
    size = 9 * cluster_size * 8 * 512 // 2 + 512  # four whole clusters of bits, and a part of a fifth
    create(path, Shape(size, cluster_size, (512,)))
    with writable(path) as disk:
        disk.zero(0, size, unmap=True)
    assert qemu_says(path, "512") == we_say(path, "512") == [Status(0, size, 1)]
    run("qemu-img", "check", "-q", path)
    run("qemu-io", "-f", "qcow2", "-c", "write 0 512", path)
    assert we_say(path, "512") == [Status(0, size, 1)]


def test_qemu_goes_on_with_the_bitmaps_that_we_stored(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    create(path, Shape(64 * M, 65536, (65536, M)))
    with writable(path) as disk:
        disk.write(5 * M, memoryview(bytes(512)))
    run("qemu-io", "-f", "qcow2", "-c", "write 9M 64k", path)
    run("qemu-img", "bitmap", "--add", "-g", "65536", "--merge", "65536", "--merge", str(M), path, "both")
    run("qemu-img", "bitmap", "--clear", path, "65536")
    run("qemu-img", "bitmap", "--remove", path, str(M))
    with writable(path) as disk:
        disk.write(64 * M - 512, memoryview(bytes(512)))
    dirty = [status for status in qemu_says(path, "both") if status.value]
    assert dirty == [Status(5 * M, M, 1), Status(9 * M, M, 1), Status(64 * M - 65536, 65536, 1)]
    assert [status for status in qemu_says(path, "65536") if status.value] == [Status(64 * M - 65536, 65536, 1)]
    run("qemu-img", "check", "-q", path)


def test_a_writer_that_died_leaves_bitmaps_that_nobody_uses(tmp_path: Path) -> None:
    path, after = tmp_path / "disk", tmp_path / "after"
    create(path, Shape(64 * M, 65536, (65536, M)))
    with writable(path) as disk:
        disk.write(0, memoryview(bytes(512)))
        shutil.copy(path, after)
    assert flags(after) == {"65536": {"auto", "in-use"}, str(M): {"auto", "in-use"}}
    with pytest.raises(ExportError, match="Bitmap '65536' is inconsistent and cannot be used"):
        we_say(after, "65536")
    command = ["qemu-nbd", "-r", "-f", "qcow2", "-k", tmp_path / "socket", "-B", "65536", after]
    assert "is inconsistent" in execute(*command).stderr
    with writable(after) as disk:  # and writing goes on without them
        disk.write(0, memoryview(bytes(512)))
    run("qemu-img", "bitmap", "--remove", after, "65536")
    assert flags(after) == {str(M): {"auto", "in-use"}}
    run("qemu-img", "check", "-q", after)


def test_a_bitmap_is_found_in_the_topmost_layer_that_has_one_of_the_name(tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    create(base, Shape(6 * M, 65536, (4096, 65536)))
    run("qemu-io", "-f", "qcow2", "-c", "write 5M 1M", base)
    create(top, Shape(8 * M, 65536, (65536,)), "-b", str(base), "-F", "qcow2")
    run("qemu-io", "-f", "qcow2", "-c", "write 1M 64k", top)
    for name in ["4096", "65536"]:
        with serve("-r", "-B", name, top) as server:
            assert block_status([server.uri()], f"qemu:dirty-bitmap:{name}") == qemu_says(top, name)
    with writable(top) as disk:
        assert live(disk, "4096") == [*qemu_says(base, "4096"), Status(6 * M, 2 * M, 0)]
        disk.write(7 * M, memoryview(bytes(512)))
        assert [status.offset for status in live(disk, "65536") if status.value] == [M, 7 * M]


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[4]], ids=str)
def test_an_export_shows_its_bitmaps_as_qemu_nbd_does(shape: Shape, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    names = create(path, shape)
    perform_by_qemu(path, list(operations(shape, 12)))
    with serve("-r", "-A", *(word for name in names for word in ("-B", name)), path) as server:
        for name in names:
            assert block_status([server.uri()], f"qemu:dirty-bitmap:{name}") == qemu_says(path, name)
        found = json.loads(run("nbdinfo", "--json", server.uri()))["exports"][0]["contexts"]
    bitmaps = [f"qemu:dirty-bitmap:{name}" for name in names]
    public = [name for name in found if not name.startswith("x-nbdq:")]
    assert public == ["base:allocation", "qemu:allocation-depth", *bitmaps]


def test_a_bitmap_that_is_nowhere_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    create(path, Shape(M, 65536, (65536,)))
    assert "Bitmap 'b0' is not found" in refusal("-B", "b0", path)
    command = ["qemu-nbd", "-r", "-f", "qcow2", "-k", tmp_path / "socket", "-B", "b0", path]
    assert "Bitmap 'b0' is not found" in execute(*command).stderr


def test_what_clients_write_is_dirty_at_once_and_still_after_the_server_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    create(path, Shape(64 * M, 65536, (65536, M)))
    expected = [Status(0, 3 * M, 0), Status(3 * M, 65536, 1), Status(3 * M + 65536, 61 * M - 65536, 0)]
    with serve("-B", "65536", path) as server:
        run("qemu-io", "-f", "raw", "-c", "write 3M 512", server.uri())
        assert block_status([server.uri()], "qemu:dirty-bitmap:65536") == expected
    assert qemu_says(path, "65536") == expected
    assert [status for status in qemu_says(path, str(M)) if status.value] == [Status(3 * M, M, 1)]
    assert flags(path) == {"65536": {"auto"}, str(M): {"auto"}}
    run("qemu-img", "check", "-q", path)

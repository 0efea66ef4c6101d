"""From a path to a disk that can be written: what is locked, refused, mended, and left alone."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdq.chain.clusters import ClusterCache
from nbdq.chain.open import open_disk, open_writable
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.policy import Policy
from nbdq.chain.raw_disk import RawDisk
from nbdq.errors import ChainError, CorruptImage, ImageError, ImageLocked
from tests.support.engine import K, M, check, make_image, make_raw
from tests.support.images import content
from tests.support.tools import execute, requires, run


@pytest.fixture
def clusters() -> Iterator[ClusterCache]:
    with contextlib.closing(ClusterCache(budget=1 << 20)) as found:
        yield found


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """An image over a raw base full of data."""
    make_raw(tmp_path / "base.raw", 1 * M, (0, 1 * M))
    return make_image(tmp_path / "top.qcow2", 1 * M, backing_name="base.raw", backing_format="raw")


def writable(path: Path, clusters: ClusterCache, *, format: str = "qcow2", **options: object) -> RawDisk | OverlayDisk:
    policy = Policy(allow_data_file=True)
    return open_writable(str(path), **{"format": format, "policy": policy, "clusters": clusters, **options})  # type: ignore[arg-type]


def read(disk: RawDisk | OverlayDisk, offset: int, length: int) -> bytes:
    view = memoryview(bytearray(length))
    disk.read_into(offset, view)
    return bytes(view)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def poke(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@requires("qemu-img")
def test_a_chain_is_written_at_its_top_only(top: Path, clusters: ClusterCache) -> None:
    base = top.with_name("base.raw")
    before = base.read_bytes()
    with contextlib.closing(writable(top, clusters)) as disk:
        assert isinstance(disk, OverlayDisk)
        assert disk.layer_count == 2
        disk.write(512, memoryview(b"x" * 512))
        disk.discard(64 * K, 64 * K)
        disk.zero(128 * K, 64 * K, unmap=True)
        expected = before[:512] + b"x" * 512 + before[1024 : 64 * K] + bytes(128 * K) + before[192 * K :]
        assert read(disk, 0, 1 * M) == expected
    assert base.read_bytes() == before
    check(top)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", top, top.with_name("shown"))
    assert top.with_name("shown").read_bytes() == expected


def test_a_raw_top_is_written_itself(tmp_path: Path, clusters: ClusterCache) -> None:
    path = make_raw(tmp_path / "disk.raw", 1 * M)
    with contextlib.closing(writable(path, clusters, format="raw")) as disk:
        assert isinstance(disk, RawDisk)
        disk.write(100, memoryview(b"abc"))
    assert path.read_bytes()[100:103] == b"abc"


def test_a_raw_top_that_looks_like_an_image_is_still_raw(top: Path, clusters: ClusterCache) -> None:
    """Formats are never guessed."""
    with contextlib.closing(writable(top, clusters, format="raw")) as disk:
        assert read(disk, 0, 4) == b"QFI\xfb"


def test_what_is_written_is_there_when_it_is_opened_again(top: Path, clusters: ClusterCache) -> None:
    data = content(5 << 20, 0, 100 * K)
    with contextlib.closing(writable(top, clusters)) as disk:
        disk.write(300 * K, memoryview(data))
    with contextlib.closing(writable(top, clusters)) as disk:
        assert read(disk, 300 * K, 100 * K) == data
    with contextlib.closing(open_disk(str(top), format="qcow2", policy=Policy(), clusters=clusters)) as reader:
        view = memoryview(bytearray(100 * K))
        reader.read_into(300 * K, view)
        assert view == data


# Locks.


@requires("qemu-img", "qemu-io")
def test_a_writer_keeps_everybody_else_away_until_it_closes(top: Path, clusters: ClusterCache) -> None:
    with contextlib.closing(writable(top, clusters)):
        with pytest.raises(ImageLocked):
            writable(top, clusters)
        with pytest.raises(ImageLocked):
            open_disk(str(top), format="qcow2", policy=Policy(), clusters=clusters)
        assert "lock" in execute("qemu-io", "-f", "qcow2", "-c", "write 0 512", top).stderr
        assert "lock" in execute("qemu-img", "info", top).stderr
    run("qemu-io", "-f", "qcow2", "-c", "write -q 0 512", top)


def test_readers_keep_writers_away_from_the_top_and_from_every_layer(top: Path, clusters: ClusterCache) -> None:
    with contextlib.closing(open_disk(str(top), format="qcow2", policy=Policy(), clusters=clusters)):
        for path, format in ((top, "qcow2"), (top.with_name("base.raw"), "raw")):
            with pytest.raises(ImageLocked):
                writable(path, clusters, format=format)


def test_a_base_under_a_written_top_can_be_shared_but_not_written(top: Path, clusters: ClusterCache) -> None:
    base = top.with_name("base.raw")
    other = make_image(top.with_name("other.qcow2"), 1 * M, backing_name="base.raw", backing_format="raw")
    with contextlib.ExitStack() as stack:
        for path in (top, other):
            stack.enter_context(contextlib.closing(writable(path, clusters)))
        with pytest.raises(ImageLocked):
            writable(base, clusters, format="raw")


# What is refused; nothing stays open, and nothing changes.


@pytest.mark.parametrize(
    "damage", ["corrupt bit", "no base", "base is the top", "unknown feature", "L1 entry", "snapshots"]
)
def test_what_cannot_be_written_safely_is_refused_and_left_alone(
    damage: str, top: Path, clusters: ClusterCache
) -> None:
    match damage:
        case "corrupt bit":
            poke(top, 79, b"\2")
        case "no base":
            top.with_name("base.raw").unlink()
        case "base is the top":
            top.with_name("base.raw").unlink()
            top.with_name("base.raw").symlink_to(top)
        case "unknown feature":
            poke(top, 72, b"\x80")
        case "L1 entry":
            poke(top, 3 * 64 * K, (1 << 63 | 0x50200).to_bytes(8, "big"))
        case "snapshots":
            poke(top, 60, (3).to_bytes(4, "big") + (1 << 40).to_bytes(8, "big"))
    before, open_before = top.read_bytes(), descriptors()
    with pytest.raises((ImageError, OSError)):
        writable(top, clusters)
    assert top.read_bytes() == before
    assert descriptors() == open_before


def test_a_corrupt_image_says_how_to_mend_it(top: Path, clusters: ClusterCache) -> None:
    poke(top, 79, b"\2")
    with pytest.raises(CorruptImage, match="repair"):
        writable(top, clusters)


def test_a_file_that_may_not_be_written_is_refused(top: Path, clusters: ClusterCache) -> None:
    real = os.open

    def refuse(path: object, flags: int, *rest: object, **named: object) -> int:
        if flags & os.O_RDWR and str(path) == str(top):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *rest, **named)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises((ImageError, OSError), match=r"[Pp]ermission"):
            writable(top, clusters)


def test_a_name_in_the_header_leads_out_of_the_directory_only_with_permission(
    tmp_path: Path, clusters: ClusterCache
) -> None:
    """R-35."""
    (tmp_path / "a").mkdir()
    make_raw(tmp_path / "base.raw", 1 * M)
    path = make_image(tmp_path / "a" / "top.qcow2", 1 * M, backing_name="../base.raw", backing_format="raw")
    with pytest.raises(ChainError):
        writable(path, clusters)
    policy = Policy(roots=(str(tmp_path),))
    writable(path, clusters, policy=policy).close()


def test_a_chain_that_the_operator_names_replaces_what_headers_say(top: Path, clusters: ClusterCache) -> None:
    other = make_raw(top.with_name("other.raw"), 1 * M, (0, 1 * M), seed=3)
    top.with_name("base.raw").unlink()
    with contextlib.closing(writable(top, clusters, backing=[("raw", str(other))])) as disk:
        assert read(disk, 0, 1 * M) == other.read_bytes()
    with contextlib.closing(writable(top, clusters, backing=[])) as disk:
        assert read(disk, 0, 1 * M) == bytes(1 * M)


# What is done before the first write.


@requires("qemu-img")
def test_a_dirty_image_is_repaired_and_unknown_promises_are_withdrawn(top: Path, clusters: ClusterCache) -> None:
    """Q15, V25."""
    with contextlib.closing(writable(top, clusters)) as disk:
        disk.write(0, memoryview(content(0, 0, 64 * K)))
    poke(top, 79, b"\1")
    poke(top, 88, b"\x40")
    poke(top, 2 * 64 * K, bytes(64 * K))
    disk = writable(top, clusters)
    head = top.read_bytes()[72:96]
    assert (head[7], head[16]) == (0, 0), "not before the first write"
    disk.write(256 * K, memoryview(b"x" * 512))
    assert read(disk, 0, 64 * K) == content(0, 0, 64 * K)
    disk.close()
    check(top)


@requires("qemu-img")
def test_bitmaps_are_in_use_while_the_disk_is_open_and_true_afterwards(top: Path, clusters: ClusterCache) -> None:
    """R-57, Q69."""
    run("qemu-img", "bitmap", "--add", "-f", "qcow2", top, "b")
    disk = writable(top, clusters)
    info = run("qemu-img", "info", "-U", "-f", "qcow2", top)
    assert "in-use" in info
    disk.write(0, memoryview(b"x" * 512))
    disk.close()
    assert "in-use" not in run("qemu-img", "info", "-f", "qcow2", top)
    check(top)


def test_events_are_told_to_who_asked(top: Path, clusters: ClusterCache) -> None:
    told: list[str] = []
    with contextlib.closing(writable(top, clusters, on_event=told.append)) as disk:
        assert isinstance(disk, OverlayDisk)
        with disk.top.lock:
            disk.top.corruption("a test")
    assert len(told) == 1
    assert "a test" in told[0]


@requires("qemu-img")
def test_space_is_given_back_unless_the_operator_wants_to_keep_it(tmp_path: Path, clusters: ClusterCache) -> None:
    """T3."""
    for punch in (True, False):
        path = make_image(tmp_path / f"{punch}.qcow2", 4 * M)
        with contextlib.closing(writable(path, clusters, punch=punch)) as disk:
            disk.write(0, memoryview(content(0, 0, 2 * M)))
            disk.flush()
            before = path.stat().st_blocks * 512
            disk.discard(0, 2 * M)
            disk.flush()
            given_back = before - path.stat().st_blocks * 512
        assert (given_back >= 2 * M - 64 * K) if punch else given_back <= 64 * K
        check(path)


@requires("qemu-img")
def test_a_data_file_beside_the_image_is_written_and_locked(tmp_path: Path, clusters: ClusterCache) -> None:
    path = make_image(tmp_path / "top.qcow2", 1 * M, data_file_name="data.raw", data_file_raw=True)
    data = make_raw(tmp_path / "data.raw", 1 * M)
    with pytest.raises(ImageError):
        writable(path, clusters, policy=Policy())
    with contextlib.closing(writable(path, clusters)) as disk:
        disk.write(12345, memoryview(b"abc"))
        assert data.read_bytes()[12345:12348] == b"abc"
        with pytest.raises(ImageLocked):
            writable(data, clusters, format="raw")
    run("qemu-img", "check", "-f", "qcow2", path, cwd=tmp_path)

"""A raw image that is written to: what was written is read, holes are told as they are, sizes change on demand only."""

import errno
import os
import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from nbdq.block import FilePiece, Kind, WritableBlockDevice
from nbdq.chain.raw_disk import RawDisk
from nbdq.storage import Data, FileStorage
from tests.chain.model import MemoryFile

PAGE = 4096
SIZE = 1 << 20


class Medium(FileStorage):
    """A file that notes what is done to it, and fails as it is told."""

    def __init__(self, descriptor: int, path: str) -> None:
        super().__init__(descriptor, path)
        self.log: list[str] = []
        self.fallocate_errno = self.write_errno = self.sync_errno = 0

    def _pwritev(self, buffers: Sequence[Data], offset: int) -> int:
        _fail_with(self.write_errno)
        self.log.append("write")
        return super()._pwritev(buffers, offset)

    def _fdatasync(self) -> None:
        _fail_with(self.sync_errno)
        self.log.append("sync")

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        _fail_with(self.fallocate_errno)
        self.log.append("fallocate")
        super()._fallocate(mode, offset, length)


def _fail_with(number: int) -> None:
    if number:
        raise OSError(number, os.strerror(number))


@pytest.fixture
def medium(tmp_path: Path) -> Iterator[Medium]:
    """A file full of ones on the file system of the tests."""
    (tmp_path / "disk.raw").write_bytes(b"\1" * SIZE)
    storage = Medium.open(str(tmp_path / "disk.raw"), writable=True)
    yield storage
    storage.close()


@pytest.fixture
def disk(medium: Medium) -> RawDisk:
    return RawDisk(medium)


def read(disk: WritableBlockDevice, offset: int, length: int) -> bytes:
    view = memoryview(bytearray(b"\xee" * length))
    disk.read_into(offset, view)
    return bytes(view)


def gather(disk: RawDisk, offset: int, length: int) -> bytes:
    pieces = disk.gather(offset, length)
    assert all(isinstance(piece, memoryview) for piece in pieces)
    return b"".join(piece for piece in pieces if isinstance(piece, memoryview))


def extents(disk: WritableBlockDevice, offset: int, length: int) -> list[tuple[int, int, Kind]]:
    """(start, end, kind) of each entry of the status, which must cover the range exactly."""
    found: list[tuple[int, int, Kind]] = []
    for status in disk.status(offset, length):
        ends = [*status.start.tolist()[1:], status.end]
        found += zip(status.start.tolist(), ends, map(Kind, status.kind.tolist()), strict=True)
        assert status.depth.tolist() == [1] * len(ends)
    assert (found[0][0], found[-1][1]) == (offset, offset + length)
    assert all(before[1] == after[0] for before, after in pairwise(found))
    return found


def test_a_raw_disk_is_a_writable_block_device(disk: RawDisk) -> None:
    device: WritableBlockDevice = disk
    assert device.size == SIZE


@pytest.mark.parametrize("length", [SIZE, SIZE - 1, SIZE - 511, 700])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_a_guest_does_its_disk_reads_as_it_should(tmp_path: Path, length: int, seed: int) -> None:
    print(f"seed {seed}")
    chance = random.Random(seed)
    path = tmp_path / "disk.raw"
    path.write_bytes(chance.randbytes(length))
    expected = bytearray(path.read_bytes().ljust(-(-length // 512) * 512, b"\0"))
    storage = FileStorage.open(str(path), writable=True)
    disk = RawDisk(storage)
    assert disk.size == len(expected)
    for _ in range(60):
        align = chance.choice((1, 512, PAGE))
        start, end = sorted(chance.randrange(disk.size // align + 1) * align for _ in range(2))
        end = min(max(end, start + 1), disk.size, start + chance.choice((512, 3 * PAGE, SIZE)))
        if end <= start:
            continue
        span = slice(start, end)
        match chance.randrange(5):
            case 0 | 1:
                content = memoryview(chance.randbytes(end - start))
                if chance.randrange(2) or not disk.write_cached(start, content):
                    disk.write(start, content)
                expected[span] = content
            case 2:
                disk.zero(start, end - start, unmap=chance.random() < 0.5)
                expected[span] = bytes(end - start)
            case 3:
                disk.discard(start, end - start)
                now = read(disk, start, end - start)
                assert all(after in (0, before) for after, before in zip(now, expected[span], strict=True))
                expected[span] = now
            case 4:
                for low, high, kind in extents(disk, start, end - start):
                    assert kind == Kind.DATA or not any(expected[low:high])
        assert read(disk, start, end - start) == expected[span]
        view = memoryview(bytearray(end - start))
        assert not disk.read_cached(start, view) or view == expected[span]
        assert gather(disk, start, end - start) == expected[span]
    disk.flush()
    disk.close()
    assert path.read_bytes().ljust(len(expected), b"\0") == expected
    assert length <= path.stat().st_size <= len(expected)


def test_the_tail_of_the_last_sector_reads_as_zeros_until_it_is_written(medium: Medium) -> None:
    """As in QEMU: the file gets the bytes that it lacks of its last sector, and the disk stays as large as it was."""
    medium.truncate(SIZE - 100)
    disk = RawDisk(medium)
    tail = b"\1" * 412 + bytes(100)
    assert disk.size == SIZE
    assert read(disk, SIZE - 512, 512) == tail
    assert gather(disk, SIZE - 512, 512) == tail
    assert not disk.read_cached(SIZE - 512, memoryview(bytearray(512)))  # what is not in the file is not in its cache
    assert disk.gather_cached(SIZE - 512, 512) is None  # a piece of the file would come too short (P101)
    assert extents(disk, SIZE - 512, 512)[-1] == (SIZE - 100, SIZE, Kind.HOLE)
    disk.discard(SIZE - 512, 512)
    assert medium.size() == SIZE - 100
    disk.write(SIZE - 50, memoryview(b"x"))
    assert read(disk, SIZE - 100, 100) == bytes(50) + b"x" + bytes(49)
    disk.write(SIZE - 512, memoryview(b"y" * 512))
    assert (medium.size(), disk.size) == (SIZE, SIZE)
    assert read(disk, SIZE - 512, 512) == b"y" * 512


def test_cached_data_are_sent_from_the_file_itself(disk: RawDisk, medium: Medium) -> None:
    read(disk, 0, SIZE)
    assert disk.gather_cached(3 * PAGE + 5, 64 << 10) == [FilePiece(medium, 3 * PAGE + 5, 64 << 10)]


def test_a_write_that_would_have_to_read_first_is_left_to_a_thread_that_may_wait() -> None:
    """Only pages that it covers in part must be in the cache."""
    storage = MemoryFile(0, SIZE)
    disk = RawDisk(storage)
    storage.cached = False
    page = memoryview(b"x" * PAGE)
    assert disk.write_cached(2 * PAGE, page)
    for offset, length in ((2 * PAGE + 512, PAGE - 512), (2 * PAGE, 512), (2 * PAGE - 1, 2), (3 * PAGE - 1, 1)):
        before = storage.read(0, SIZE)
        assert not disk.write_cached(offset, page[:length])
        assert storage.read(0, SIZE) == before
    storage.cached = True
    assert disk.write_cached(4 * PAGE + 100, page)
    assert storage.read(4 * PAGE + 100, PAGE) == page
    disk.close()


def test_what_is_zeroed_or_discarded_gives_its_space_back_if_it_may(disk: RawDisk, medium: Medium) -> None:
    full = medium.allocated_size()
    disk.zero(0, SIZE // 4, unmap=False)
    assert medium.allocated_size() == full
    disk.zero(0, SIZE // 4, unmap=True)
    assert medium.allocated_size() == full * 3 // 4
    disk.discard(SIZE // 4, SIZE // 4)
    assert medium.allocated_size() == full // 2
    assert read(disk, 0, SIZE // 2) == bytes(SIZE // 2)
    assert read(disk, SIZE // 2, SIZE // 2) == b"\1" * (SIZE // 2)
    assert medium.size() == SIZE
    assert "write" not in medium.log


def test_zeroing_what_a_discard_gave_back_gets_the_space_again(disk: RawDisk, medium: Medium) -> None:
    """P96: NBD_CMD_FLAG_NO_HOLE."""
    full = medium.allocated_size()
    disk.discard(0, SIZE)
    disk.zero(0, SIZE, unmap=False)
    assert medium.allocated_size() == full
    assert read(disk, 0, SIZE) == bytes(SIZE)


@pytest.mark.parametrize("unmap", [False, True])
def test_a_file_system_that_can_make_no_holes_gets_zeros_and_no_discards(
    disk: RawDisk, medium: Medium, unmap: bool
) -> None:
    medium.fallocate_errno = errno.EOPNOTSUPP
    disk.discard(0, SIZE)
    assert read(disk, 0, SIZE) == b"\1" * SIZE
    disk.zero(512, SIZE - 1024, unmap=unmap)
    assert read(disk, 0, SIZE) == b"\1" * 512 + bytes(SIZE - 1024) + b"\1" * 512
    disk.flush()


@pytest.mark.parametrize("unmap", [True, False])
def test_zeroing_in_haste_is_done_where_the_file_system_does_it(disk: RawDisk, unmap: bool) -> None:
    """P96: NBD_CMD_FLAG_FAST_ZERO."""
    disk.zero(512, SIZE // 2, unmap=unmap, fast=True)
    assert read(disk, 0, SIZE) == b"\1" * 512 + bytes(SIZE // 2) + b"\1" * (SIZE // 2 - 512)


@pytest.mark.parametrize("unmap", [True, False])
def test_zeroing_in_haste_is_refused_and_changes_nothing_where_zeros_would_be_written(
    disk: RawDisk, medium: Medium, unmap: bool
) -> None:
    """P96: the client then zeroes at leisure or writes everything."""
    medium.fallocate_errno = errno.EOPNOTSUPP
    with pytest.raises(OSError, match="zeros would have to be written") as caught:
        disk.zero(0, SIZE, unmap=unmap, fast=True)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert read(disk, 0, SIZE) == b"\1" * SIZE


def test_a_new_hole_shows_at_once_to_every_client(disk: RawDisk) -> None:
    """Nothing is remembered, so nothing must be forgotten."""
    assert extents(disk, 0, SIZE) == [(0, SIZE, Kind.DATA)]
    disk.discard(16 * PAGE, 16 * PAGE)
    expected = [(0, 16 * PAGE, Kind.DATA), (16 * PAGE, 32 * PAGE, Kind.HOLE), (32 * PAGE, SIZE, Kind.DATA)]
    assert extents(disk, 0, SIZE) == expected
    assert extents(disk, 16 * PAGE + 512, 512) == [(16 * PAGE + 512, 16 * PAGE + 1024, Kind.HOLE)]
    disk.write(16 * PAGE, memoryview(bytes(16 * PAGE)))
    assert extents(disk, 0, SIZE) == [(0, SIZE, Kind.DATA)]
    assert not disk.status_cached(0, 512)


def test_who_asks_for_one_extent_of_a_file_full_of_holes_does_not_wait_for_all() -> None:
    class Counting(MemoryFile):
        answers = 0

        def data_ranges(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
            for answer in super().data_ranges(start, end):
                self.answers += 1
                yield answer

    storage = Counting(0, 8 << 20, holes=[page % 2 == 1 for page in range(2 << 10)])
    disk = RawDisk(storage)
    first = next(disk.status(0, disk.size))
    assert first.start.tolist() == [0, PAGE]
    assert storage.answers == 2
    assert extents(disk, 0, disk.size) == [
        (page * PAGE, (page + 1) * PAGE, Kind.HOLE if page % 2 else Kind.DATA) for page in range(2 << 10)
    ]
    disk.close()


def test_a_full_file_system_fails_the_write_that_it_has_no_room_for_and_no_other(disk: RawDisk, medium: Medium) -> None:
    medium.write_errno = errno.ENOSPC
    for attempt in (disk.write, disk.write_cached):
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            attempt(0, memoryview(b"x" * PAGE))
    medium.write_errno = 0
    disk.write(PAGE, memoryview(b"x" * PAGE))
    disk.flush()
    assert read(disk, 0, 2 * PAGE) == b"\1" * PAGE + b"x" * PAGE


def test_a_flush_makes_durable_what_was_written_before(disk: RawDisk, medium: Medium) -> None:
    disk.write(0, memoryview(b"x" * PAGE))
    disk.zero(0, 512, unmap=True)
    disk.flush()
    assert medium.log == ["write", "fallocate", "sync"]


def test_after_a_failed_flush_nothing_is_written_any_more_and_reads_go_on(disk: RawDisk, medium: Medium) -> None:
    """R-63: a second flush would succeed and mean nothing."""
    disk.write(0, memoryview(b"x" * PAGE))
    medium.sync_errno = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        disk.flush()
    medium.sync_errno = 0
    for attempt in (
        disk.flush,
        lambda: disk.write(0, memoryview(b"y")),
        lambda: disk.write_cached(0, memoryview(b"y" * PAGE)),
        lambda: disk.zero(0, 512, unmap=True),
        lambda: disk.discard(0, 512),
    ):
        with pytest.raises(OSError, match="reopen the image") as caught:
            attempt()
        assert caught.value.errno == errno.EIO
    assert read(disk, 0, PAGE) == b"x" * PAGE


def test_closing_twice_closes_once(disk: RawDisk, medium: Medium) -> None:
    descriptor = medium.descriptor
    disk.close()
    disk.close()
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(descriptor)


def test_a_raw_disk_changes_its_size_durably_and_what_is_new_reads_as_zeros(medium: Medium, disk: RawDisk) -> None:
    old = bytes(medium.read(0, SIZE))
    disk.shrink(SIZE - 512)
    assert (disk.size, medium.size()) == (SIZE - 512, SIZE - 512)
    assert medium.log[-1] == "sync"
    disk.grow(SIZE + PAGE)
    assert (disk.size, medium.size()) == (SIZE + PAGE, SIZE + PAGE)
    assert medium.log[-1] == "sync"
    assert medium.read(0, SIZE + PAGE) == old[:-512] + bytes(512 + PAGE)
    view = memoryview(bytearray(PAGE))
    disk.read_into(SIZE, view)
    assert view == bytes(PAGE)


def test_a_raw_disk_that_cannot_have_a_size_keeps_its_own(medium: Medium, disk: RawDisk) -> None:
    for resize, sizes in ((disk.grow, (SIZE, SIZE - 512, SIZE + 1)), (disk.shrink, (SIZE, SIZE + 512, 0, -512, 511))):
        for size in sizes:
            with pytest.raises(OSError, match="cannot") as caught:
                resize(size)
            assert caught.value.errno == errno.EINVAL
    medium.is_block_device = True
    for resize, size in ((disk.grow, SIZE + 512), (disk.shrink, SIZE - 512)):
        with pytest.raises(OSError, match="block device") as caught:
            resize(size)
        assert caught.value.errno == errno.EOPNOTSUPP
    assert (disk.size, medium.size()) == (SIZE, SIZE)


def test_a_finished_raw_disk_is_durable_and_still_open(medium: Medium, disk: RawDisk) -> None:
    disk.write(0, memoryview(b"x" * 512))
    disk.finish()
    assert medium.log == ["write", "sync"]
    assert medium.read(0, 1) == b"x"

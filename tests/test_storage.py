"""Positional file I/O: short reads are told, waiting is never done where it was not asked for, nothing leaks."""

import errno
import os
import random
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nbdq.storage import Data, FileStorage, sync_directory_of

CONTENT = random.Random(0).randbytes(300_000)


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = tmp_path / "disk"
    path.write_bytes(CONTENT)
    return str(path)


@pytest.fixture
def storage(path: str) -> Iterator[FileStorage]:
    found = FileStorage.open(path)
    yield found
    found.close()


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


# Opening and closing.


def test_an_open_file_knows_what_it_is(storage: FileStorage, path: str) -> None:
    status = os.stat(path)
    assert storage.path == path
    assert storage.identity == (status.st_dev, status.st_ino)
    assert not storage.is_block_device
    assert storage.size() == len(CONTENT)
    assert storage.allocated_size() == status.st_blocks * 512


def test_a_program_that_the_server_starts_does_not_get_the_file(storage: FileStorage) -> None:
    assert not os.get_inheritable(storage.descriptor)


@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_what_is_neither_file_nor_block_device_is_refused_without_waiting(kind: str, tmp_path: Path) -> None:
    """R-36: a FIFO without a writer would hang the server; and nothing stays open."""
    path = tmp_path / kind
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path = Path("/dev/null")
    before = descriptors()
    with pytest.raises(OSError, match="not a regular file or block device") as caught:
        FileStorage.open(str(path))
    assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, str(path))
    assert descriptors() == before


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        FileStorage.open(str(tmp_path / "none"))
    assert caught.value.filename == str(tmp_path / "none")


def test_closing_twice_closes_only_our_descriptor(storage: FileStorage) -> None:
    """The number may belong to somebody else the second time."""
    number = storage.descriptor
    storage.close()
    other = os.open("/dev/null", os.O_RDONLY)
    storage.close()
    os.fstat(other)
    os.close(other)
    assert other == number  # else this proved nothing


def test_the_size_of_a_block_device_is_where_it_ends(storage: FileStorage) -> None:
    """fstat says 0 for a device, so the end is sought; a file can stand in for one here."""
    storage.is_block_device = True
    assert storage.size() == len(CONTENT)


# Reading.


@pytest.mark.parametrize(
    ("offset", "length", "count"),
    [
        (0, 0, 0),
        (0, 1, 1),
        (100_001, 4097, 4097),
        (0, 300_000, 300_000),
        (299_999, 1, 1),
        (299_000, 4096, 1000),
        (300_000, 1, 0),
        (1 << 55, 512, 0),
    ],
)
def test_a_read_is_short_only_at_the_end_of_the_file(
    storage: FileStorage, offset: int, length: int, count: int
) -> None:
    view = memoryview(bytearray(b"\xaa") * length)
    assert storage.read_into(offset, view) == count
    assert view[:count] == CONTENT[offset : offset + count]
    assert view[count:] == b"\xaa" * (length - count)
    assert storage.read(offset, length) == CONTENT[offset : offset + count]


def test_a_read_that_the_system_answers_in_parts_is_completed(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux returns at most 2 GiB at once, and less on a signal."""
    preadv, pread = os.preadv, os.pread
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:777]], offset))
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: pread(fd, min(length, 777), offset))
    for offset in (1000, 299_000):
        view = memoryview(bytearray(10_000))
        expected = CONTENT[offset : offset + 10_000]
        assert view[: storage.read_into(offset, view)] == expected
        assert storage.read(offset, 10_000) == expected


def test_a_failing_medium_raises(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(OSError, match="Input/output error"):
        storage.read(0, 512)
    with pytest.raises(OSError, match="Input/output error"):
        storage.read_into(0, memoryview(bytearray(512)))


def test_threads_read_without_moving_each_other(storage: FileStorage) -> None:
    """Also not by asking for holes, which moves the file's own position."""
    wrong = []

    def read(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(300):
            offset, length = chance.randrange(len(CONTENT)), chance.randrange(1, 5000)
            if storage.read(offset, length) != CONTENT[offset : offset + length]:
                wrong.append((offset, length))
            list(storage.data_ranges(offset, offset + length))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Reading what is cached.


class Kernel:
    """``preadv`` that answers RWF_NOWAIT as it is told: with an errno, or with so many bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: int, *, count: int = -1) -> None:
        self.calls: list[tuple[int, int]] = []
        real = os.preadv

        def preadv(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
            if not flags:
                return real(descriptor, buffers, offset)
            assert flags == os.RWF_NOWAIT
            self.calls.append((offset, len(buffers[0])))
            if answer:
                raise OSError(answer, os.strerror(answer))
            return real(descriptor, buffers, offset) if count < 0 else count

        monkeypatch.setattr(os, "preadv", preadv)


def test_a_cached_read_fills_the_buffer(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    Kernel(monkeypatch, 0)
    view = memoryview(bytearray(1000))
    assert storage.read_cached(5000, view)
    assert view == CONTENT[5000:6000]


def test_a_cached_read_past_the_end_is_left_to_the_slow_path(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    Kernel(monkeypatch, 0)
    assert not storage.read_cached(299_500, memoryview(bytearray(501)))
    assert storage.read_cached(299_500, memoryview(bytearray(500)))


def test_a_read_that_is_cached_in_part_is_not_cached(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    Kernel(monkeypatch, 0, count=512)
    assert not storage.read_cached(0, memoryview(bytearray(1000)))
    assert storage.read_cached(0, memoryview(bytearray(512)))


def test_what_is_not_cached_now_may_be_later(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, errno.EAGAIN)
    for _ in range(3):
        assert not storage.read_cached(0, memoryview(bytearray(512)))
    assert len(kernel.calls) == 3


def test_an_error_is_left_to_the_read_that_may_wait(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, errno.EIO)
    for _ in range(2):
        assert not storage.read_cached(0, memoryview(bytearray(512)))
    assert len(kernel.calls) == 2
    assert storage.read(0, 512) == CONTENT[:512]


@pytest.mark.parametrize("answer", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_that_cannot_say_is_asked_once(
    storage: FileStorage, answer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(monkeypatch, answer)
    for _ in range(3):
        assert not storage.read_cached(0, memoryview(bytearray(512)))
        assert not storage.is_cached(0, 512)
    assert len(kernel.calls) == 1


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (5, 65536), (5, 65537), (100, 200_000), (299_999, 1)])
def test_a_range_is_cached_if_its_ends_and_points_between_are(
    storage: FileStorage, offset: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(monkeypatch, 0)
    assert storage.is_cached(offset, length)
    probes = [probe for probe, _ in kernel.calls]
    assert (probes[0], probes[-1]) == (offset, offset + length - 1)
    assert max((high - low for low, high in pairwise(probes)), default=0) <= 64 << 10
    assert {size for _, size in kernel.calls} == {1}


def test_a_range_is_not_cached_if_one_point_is_not(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    Kernel(monkeypatch, errno.EAGAIN)
    assert not storage.is_cached(0, 200_000)


def test_prefetching_is_only_a_hint(storage: FileStorage) -> None:
    storage.prefetch(0, len(CONTENT))
    storage.prefetch(1 << 50, 1 << 20)


def test_file_bytes_go_to_a_socket_by_reference(storage: FileStorage) -> None:
    """As many as it takes; a full socket says so, and a file that ends too early sends nothing."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert storage.send(ours.fileno(), 1000, 5000) == 5000
        assert theirs.recv(9000, socket.MSG_WAITALL | socket.MSG_DONTWAIT) == CONTENT[1000:6000]
        assert storage.send(ours.fileno(), 299_900, 5000) == 100
        assert storage.send(ours.fileno(), 300_000, 5000) == 0
        ours.setblocking(False)
        with suppress(BlockingIOError):
            while storage.send(ours.fileno(), 0, 300_000):
                pass
        with pytest.raises(BlockingIOError):
            storage.send(ours.fileno(), 0, 300_000)


# Holes.


def sparse(tmp_path: Path, size: int, *data: tuple[int, int]) -> FileStorage:
    """A file with data in these (offset, length) ranges."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in data:
            os.pwrite(file.fileno(), b"x" * length, offset)
    return FileStorage.open(str(path))


M = 1 << 20


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 8 * M, [(0, 2 * M, False), (2 * M, 4 * M, True), (4 * M, 7 * M, False), (7 * M, 8 * M, True)]),
        (3 * M, 5 * M, [(3 * M, 4 * M, True), (4 * M, 5 * M, False)]),
        (M, 3 * M, [(M, 2 * M, False), (2 * M, 3 * M, True)]),
        (0, M, [(0, M, False)]),
        (0, 2 * M, [(0, 2 * M, False)]),
        (3 * M + 5, 3 * M + 6, [(3 * M + 5, 3 * M + 6, True)]),
        (7 * M, 9 * M, [(7 * M, 8 * M, True), (8 * M, 9 * M, False)]),
        (8 * M, 9 * M, [(8 * M, 9 * M, False)]),
        (50 * M, 90 * M, [(50 * M, 90 * M, False)]),
        (5 * M, 5 * M, []),
    ],
)
def test_data_and_holes_cover_the_range(
    tmp_path: Path, start: int, end: int, expected: list[tuple[int, int, bool]]
) -> None:
    storage = sparse(tmp_path, 8 * M, (2 * M, 2 * M), (7 * M, M))
    assert list(storage.data_ranges(start, end)) == expected
    storage.close()


def test_a_file_of_nothing_but_a_hole_is_one_hole(tmp_path: Path) -> None:
    storage = sparse(tmp_path, 8 * M)
    assert list(storage.data_ranges(M, 20 * M)) == [(M, 20 * M, False)]
    storage.close()


def test_a_file_system_that_knows_no_holes_has_data_everywhere(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lseek(*_: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "lseek", lseek)
    assert list(storage.data_ranges(100, 900_000)) == [(100, 900_000, True)]


@pytest.mark.parametrize("answer", [errno.ENXIO, errno.EINVAL])
def test_a_file_that_shrinks_while_it_is_asked_does_not_fail(
    tmp_path: Path, answer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may cut it between the two questions; it then ends where the data began."""
    storage = sparse(tmp_path, 8 * M, (2 * M, M))
    real = os.lseek

    def lseek(descriptor: int, offset: int, whence: int) -> int:
        if whence == os.SEEK_HOLE:
            raise OSError(answer, os.strerror(answer))
        return real(descriptor, offset, whence)

    monkeypatch.setattr(os, "lseek", lseek)
    assert list(storage.data_ranges(0, 8 * M)) == [(0, 8 * M, answer != errno.ENXIO)]
    storage.close()


@pytest.mark.parametrize(("data", "hole"), [(0, 0), (2 * M, 2 * M), (2 * M, M), (0, -1), (-1, 5)])
def test_a_file_system_that_talks_nonsense_is_not_asked_for_ever(
    storage: FileStorage, data: int, hole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "lseek", lambda _, offset, whence: data if whence == os.SEEK_DATA else hole)
    assert list(storage.data_ranges(0, 8 * M)) == [(0, 8 * M, True)]


# Writing.


class Disk(FileStorage):
    """The four system calls that change files: recorded, made to fail, or to do less than they should."""

    def __init__(self, descriptor: int, path: str) -> None:
        super().__init__(descriptor, path)
        self.calls: list[tuple[Any, ...]] = []
        self.failures: list[int] = []
        """Errno of the next calls; 0 for success."""
        self.longest = 1 << 40
        """Bytes that one write takes at most."""

    def _next(self, *call: Any) -> None:
        self.calls.append(call)
        if self.failures and (number := self.failures.pop(0)):
            raise OSError(number, os.strerror(number))

    def _pwritev(self, buffers: Sequence[Data], offset: int) -> int:
        self._next("write", offset, [len(buffer) for buffer in buffers])
        left, short = self.longest, []
        for buffer in buffers:
            short.append(memoryview(buffer)[:left])
            left -= len(short[-1])
        return super()._pwritev(short, offset)

    def _fdatasync(self) -> None:
        self._next("sync")
        super()._fdatasync()

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        self._next("fallocate", mode, offset, length)
        super()._fallocate(mode, offset, length)

    def _ftruncate(self, size: int) -> None:
        self._next("truncate", size)
        super()._ftruncate(size)


@pytest.fixture
def written(path: str) -> Iterator[Disk]:
    found = Disk.open(path, writable=True)
    yield found
    found.close()


def bytes_of(storage: FileStorage) -> bytes:
    return Path(storage.path).read_bytes()


def failure(call: Callable[[], object]) -> int:
    """The errno that ``call`` fails with, 0 if it does not fail, -1 for a failure that names no file."""
    try:
        call()
    except OSError as error:
        return error.errno or -1 if error.filename else -1
    return 0


def test_what_was_opened_for_reading_cannot_be_written(storage: FileStorage) -> None:
    assert failure(lambda: storage.write(0, b"x")) == errno.EBADF
    assert bytes_of(storage) == CONTENT


@pytest.mark.parametrize("longest", [1, 7, 512, 1000, 1 << 40])
@pytest.mark.parametrize("offset", [0, 1001, 299_000, 400_000])
def test_a_write_that_the_system_takes_in_parts_is_completed(written: Disk, longest: int, offset: int) -> None:
    """Linux writes at most 2 GiB at once, and less on a signal or when the medium is nearly full."""
    written.longest = longest
    data = random.Random(offset).randbytes(3001)
    expected = bytearray(CONTENT.ljust(offset + len(data), b"\0"))
    expected[offset : offset + len(data)] = data
    written.write(offset, memoryview(data))
    assert bytes_of(written) == expected


@pytest.mark.parametrize("seed", range(20))
def test_a_vector_that_the_system_takes_in_parts_is_completed(written: Disk, seed: int) -> None:
    """Wherever one call ends: within a buffer, between two, or before empty ones."""
    chance = random.Random(seed)
    buffers = [chance.randbytes(chance.choice((0, 1, 511, 512, chance.randrange(3000)))) for _ in range(6)]
    whole = b"".join(buffers)
    written.longest = chance.choice((1, 100, 512, 1024, len(whole) // 2 + 1))
    written.write_vector(5000, buffers)
    assert bytes_of(written) == CONTENT[:5000] + whole + CONTENT[5000 + len(whole) :]


def test_a_vector_is_one_system_call_unless_it_has_more_buffers_than_the_system_takes(storage: FileStorage) -> None:
    written = Disk.open(storage.path, writable=True)
    written.write_vector(10, [b"ab", b"c", b"def"])
    assert written.calls == [("write", 10, [2, 1, 3])]
    many = [bytes([number % 256]) for number in range(2500)]
    written.write_vector(100, many)
    assert bytes_of(written) == CONTENT[:10] + b"abcdef" + CONTENT[16:100] + b"".join(many) + CONTENT[2600:]
    written.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EBADF, errno.ENXIO])
@pytest.mark.parametrize("how", ["write", "vector", "truncate", "punch", "zero", "reserve"])
def test_after_a_failed_change_nothing_is_written_any_more(written: Disk, how: str, number: int) -> None:
    """R-63: the kernel has forgotten what it could not write; whoever goes on builds on sand."""
    written.failures = [number]
    change: dict[str, Callable[[], object]] = {
        "write": lambda: written.write(0, b"x"),
        "vector": lambda: written.write_vector(0, [b"x", b"y"]),
        "truncate": lambda: written.truncate(5),
        "punch": lambda: written.punch(0, 4096),
        "zero": lambda: written.write_zeros(0, 4096),
        "reserve": lambda: written.reserve(0, 4096),
    }
    assert failure(change[how]) == number
    assert written.failure is not None
    done = len(written.calls)
    for again in (*change.values(), written.sync):
        assert failure(again) == errno.EIO
    assert len(written.calls) == done, "the system was asked again"
    assert bytes_of(written) == CONTENT
    assert written.read(0, 10) == CONTENT[:10]  # what is there can still be read


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_sync_that_failed_once_never_succeeds(written: Disk, number: int) -> None:
    """R-63: a second fdatasync would return 0 without having saved anything. ENOSPC is no better here."""
    written.write(0, b"x")
    written.failures = [number]
    assert failure(written.sync) == number
    for _ in range(2):
        assert failure(written.sync) == errno.EIO
        assert failure(lambda: written.write(0, b"x")) == errno.EIO
    assert [call[0] for call in written.calls] == ["write", "sync"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_medium_is_told_and_forgotten(written: Disk, number: int) -> None:
    """Nothing that was there before is lost, and there may be room again."""
    written.failures = [number] * 4
    assert failure(lambda: written.write(0, b"x")) == number
    assert failure(lambda: written.write_vector(0, [b"x"])) == number
    assert failure(lambda: written.truncate(400_000)) == number
    assert failure(lambda: written.reserve(300_000, 4096)) == number
    assert written.failure is None
    written.write(0, b"abc")
    written.sync()
    assert bytes_of(written) == b"abc" + CONTENT[3:]


def test_a_medium_that_becomes_full_in_the_middle_of_a_write_says_so(written: Disk) -> None:
    written.longest, written.failures = 1000, [0, 0, errno.ENOSPC]
    assert failure(lambda: written.write(0, bytes(4000))) == errno.ENOSPC
    assert bytes_of(written) == bytes(2000) + CONTENT[2000:]
    assert written.failure is None


def test_the_first_failure_is_the_one_that_is_told(written: Disk) -> None:
    written.failures = [errno.EROFS]
    failure(lambda: written.write(0, b"x"))
    with pytest.raises(OSError, match=r"Read-only file system.*reopen"):
        written.sync()


# Space.


def test_reserved_space_reads_as_zeros_and_changes_no_contents(written: Disk) -> None:
    written.reserve(299_000, 200_000)
    found = bytes_of(written)
    assert found == CONTENT + bytes(499_000 - len(CONTENT))
    assert written.allocated_size() >= 499_000 - 4096


def test_nothing_is_reserved_on_a_device(written: Disk) -> None:
    """It has its space, and would zero what is there."""
    written.is_block_device = True
    written.reserve(0, 4096)
    assert written.calls == []


def test_punching_gives_space_back_and_makes_no_file_shorter_or_longer(written: Disk) -> None:
    written.sync()
    before = written.allocated_size()
    written.punch(0, 128 << 10)
    assert written.allocated_size() <= before - (64 << 10)
    written.punch(1 << 20, 4096)
    assert written.size() == len(CONTENT)
    assert bytes_of(written)[128 << 10 :] == CONTENT[128 << 10 :]


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.EBUSY])
def test_a_file_system_without_holes_loses_space_but_nothing_else(written: Disk, number: int) -> None:
    written.failures = [number, number, number]
    written.punch(0, 4096)
    written.reserve(0, 4096)
    assert written.failure is None
    assert bytes_of(written) == CONTENT
    written.write_zeros(1000, 3_000)
    assert bytes_of(written) == CONTENT[:1000] + bytes(3000) + CONTENT[4000:]


@pytest.mark.parametrize("allocated", [False, True])
@pytest.mark.parametrize("can", [True, False])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 1), (4096, 8192), (1001, 70_001), (299_999, 1), (299_000, 9000), (350_000, 1), (0, 3 << 20)],
)
def test_zeros_are_zeros_however_they_are_made(
    written: Disk, offset: int, length: int, allocated: bool, can: bool
) -> None:
    """Aligned or not, behind the end of the file too, with or without help from the file system."""
    if not can:

        def refuse(mode: int, offset: int, length: int) -> None:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

        written._fallocate = refuse  # type: ignore[method-assign]
    expected = bytearray(CONTENT.ljust(offset + length, b"\0"))
    expected[offset : offset + length] = bytes(length)
    written.write_zeros(offset, length, allocated=allocated)
    assert bytes_of(written) == expected
    wrote = any(call[0] == "write" for call in written.calls)
    assert wrote == (not can), "zeros were written although the file system makes them" if can else "no zeros"


def test_zeros_that_keep_their_space_have_it_afterwards(written: Disk) -> None:
    written.write_zeros(0, 256 << 10, allocated=True)
    assert written.allocated_size() >= 256 << 10


def test_fast_zeros_are_refused_before_anything_changes_where_they_would_have_to_be_written(written: Disk) -> None:
    """Z4."""
    written.failures = [errno.EOPNOTSUPP]
    assert failure(lambda: written.write_zeros(0, 4096, fast=True)) == errno.EOPNOTSUPP
    assert bytes_of(written) == CONTENT
    written.write_zeros(0, 4096, fast=True)
    assert bytes_of(written) == bytes(4096) + CONTENT[4096:]


def test_a_file_is_cut_and_grows_by_zeros(written: Disk) -> None:
    written.truncate(1000)
    assert bytes_of(written) == CONTENT[:1000]
    written.truncate(2000)
    assert bytes_of(written) == CONTENT[:1000] + bytes(1000)


def test_a_file_system_that_is_full_says_so_when_zeros_have_to_be_written(written: Disk) -> None:
    written.failures = [errno.EOPNOTSUPP, errno.ENOSPC]
    assert failure(lambda: written.write_zeros(0, 4096)) == errno.ENOSPC
    assert written.failure is None


# New files.


def test_a_new_file_is_empty_and_can_be_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "new"
    storage = FileStorage.create(str(path), mode=0o600)
    storage.write(5, b"abc")
    assert storage.read(0, 100) == b"\0\0\0\0\0abc"
    assert path.stat().st_mode & 0o777 == 0o600
    assert not os.get_inheritable(storage.descriptor)
    storage.close()


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "directory"])
def test_nothing_that_exists_is_taken_for_a_new_file(kind: str, tmp_path: Path) -> None:
    """Nor what a link of that name leads to, which somebody else may have put there."""
    path, target = tmp_path / "new", tmp_path / "target"
    if kind == "file":
        path.write_bytes(b"old")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(target)
        if kind == "link":
            target.write_bytes(b"old")
    before = descriptors()
    with pytest.raises(FileExistsError):
        FileStorage.create(str(path))
    assert descriptors() == before
    assert not target.exists() or target.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["new", "./new", "sub/new"])
def test_the_directory_that_holds_a_new_name_is_synced(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    before = descriptors()
    sync_directory_of(name)
    sync_directory_of(str(tmp_path / name))
    assert synced == [str((tmp_path / name).parent)] * 2
    assert descriptors() == before


def test_a_directory_that_cannot_be_synced_is_told_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    before = descriptors()
    with pytest.raises(OSError, match="Input/output error"):
        sync_directory_of(str(tmp_path / "new"))
    assert descriptors() == before
    with pytest.raises(FileNotFoundError):
        sync_directory_of(str(tmp_path / "none" / "new"))

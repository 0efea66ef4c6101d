"""Positional file I/O: short reads are told, waiting is never done where it was not asked for, nothing leaks."""

import errno
import os
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nbdq.storage import FileStorage

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

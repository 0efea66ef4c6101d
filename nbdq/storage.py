"""Positional file I/O: the only module that reads image files.

Knows file descriptors. Must not know image formats. Everything is positional and thread-safe; a short read is
returned, not hidden, because its meaning (zeros for guest data, damage for a table) is the caller's to decide.
"""

import ctypes
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import Self

from nbdq.durations import Durations

#: What identifies a file or device, under whatever name.
Identity = tuple[int, int]

#: What a write accepts: bytes, or a contiguous view of bytes.
Data = bytes | bytearray | memoryview

#: ``RWF_NOWAIT`` answers EAGAIN instead of waiting for the disk; file systems without it say EOPNOTSUPP.
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)

#: Distance of the probes that decide whether a range is in the page cache. Read-ahead and eviction work on
#: neighbouring pages, so one page in this many bytes stands for the rest; a wrong guess costs time, not truth.
_PROBE_STRIDE = 64 << 10

#: Modes of ``fallocate``, which the standard library does not offer.
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16
#: Answers that say no more than that a range cannot be treated so.
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.EBUSY)

#: The medium is full, not broken: nothing that was written before is lost, and a later write may succeed.
FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_ZEROS = memoryview(bytes(1 << 20))
#: The kernel takes no more buffers in one call (IOV_MAX is 1024).
_BUFFERS_MAX = 1024


_M_ARENA_MAX = -8
_libc = ctypes.CDLL(None, use_errno=True)


class SyncTimes:
    """How long syncs of all files took, those included that failed. Any thread."""

    def __init__(self) -> None:
        self.durations = Durations()
        self.failures = 0
        self._lock = threading.Lock()

    def add(self, seconds: float, *, failed: bool) -> None:
        """A sync is over."""
        with self._lock:
            self.durations.add(seconds)
            self.failures += failed


#: Those of this process: how the disks do that everything durable waits for.
SYNC_TIMES = SyncTimes()


class FileStorage:
    """One open image file or block device. Owns its descriptor until :meth:`close`.

    Nothing that is written is durable before :meth:`sync` returns. After the first write or sync that failed for
    another reason than a full medium, every further one fails with EIO: the kernel has forgotten which pages it could
    not write, so that a second sync would succeed without having saved anything (R-63). Only reopening mends that.
    """

    def __init__(self, descriptor: int, path: str) -> None:
        """Take ownership of ``descriptor``, opened on ``path``.

        Raises:
            OSError: EINVAL for anything but a regular file or a block device.
        """
        self.descriptor = descriptor
        self.path = path
        self.failure: OSError | None = None
        """The first failed write or sync; nothing is written after it."""
        self._cached_reads = bool(_NOWAIT)
        self._probe = memoryview(bytearray(1))
        status = os.fstat(descriptor)
        self.is_block_device = stat.S_ISBLK(status.st_mode)
        self.identity = _identity(status)
        """Equal for two storages of one file or device, by whatever name they were opened."""
        if not self.is_block_device and not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file or block device", path)

    @classmethod
    def open(cls, path: str, *, writable: bool = False) -> Self:
        """Open ``path``. Never waits: a FIFO or a dead device node cannot hang the server (R-36).

        Raises:
            OSError: as from ``open``, or EINVAL for something that is neither a file nor a block device.
        """
        access = os.O_RDWR if writable else os.O_RDONLY
        return cls._adopt(os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY), path)

    @classmethod
    def create(cls, path: str, *, mode: int = 0o644) -> Self:
        """Make a new file at ``path``, for reading and writing; durable with :func:`sync_directory_of`.

        Raises:
            OSError: as from ``open``; FileExistsError if anything has that name.
        """
        return cls._adopt(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), path)

    @classmethod
    def _adopt(cls, descriptor: int, path: str) -> Self:
        try:
            return cls(descriptor, path)
        except BaseException:
            os.close(descriptor)
            raise

    def become_writable(self, prepare: Callable[[int], object]) -> None:
        """Open the same file for writing as well. The descriptor keeps its number: readers go on undisturbed.

        Locks of an open file description do not move along: ``prepare`` gets the descriptor of the new one, to lock it
        before the old one and its locks go.

        Raises:
            OSError: the file cannot be opened for writing; nothing has changed.
        """
        path = f"/proc/self/fd/{self.descriptor}"  # the file that is open, whatever has its name by now
        writable = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            prepare(writable)
            os.dup2(writable, self.descriptor, inheritable=False)
        finally:
            os.close(writable)

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from ``offset``; return the bytes read, fewer than asked only at the end of the file."""
        done = 0
        while done < len(view):
            count = os.preadv(self.descriptor, [view[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def read(self, offset: int, length: int) -> bytes:
        """At most ``length`` bytes from ``offset``; fewer only at the end of the file."""
        data = os.pread(self.descriptor, length, offset)
        while 0 < len(data) < length and (more := os.pread(self.descriptor, length - len(data), offset + len(data))):
            data += more
        return data

    def read_cached(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` from the page cache without ever waiting; False if that cannot be done in full.

        The bytes of ``view`` are undefined after False.
        """
        if not self._cached_reads:
            return False
        try:
            return os.preadv(self.descriptor, (view,), offset, _NOWAIT) == len(view)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                self._cached_reads = False  # learnt once for this file
            return False

    def is_cached(self, offset: int, length: int) -> bool:
        """Whether ``length`` bytes at ``offset`` very probably are in the page cache."""
        last = offset + length - 1
        return all(self.read_cached(position, self._probe) for position in (*range(offset, last, _PROBE_STRIDE), last))

    def send(self, socket_descriptor: int, offset: int, length: int) -> int:
        """Send file bytes to a socket by reference; return how many the socket took.

        Raises:
            BlockingIOError: the socket takes nothing now.
        """
        return os.sendfile(socket_descriptor, self.descriptor, offset, length)

    def prefetch(self, offset: int, length: int) -> None:
        """Ask the kernel to read a range into the page cache. A hint: returns at once."""
        os.posix_fadvise(self.descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def data_ranges(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Ascending, contiguous (start, end, is data) over ``[start, end)``; holes from SEEK_HOLE.

        Everything past the end of the file is a hole. A file system that cannot tell, or talks nonsense, has data.
        """
        position = start
        while position < end:
            try:
                data = os.lseek(self.descriptor, position, os.SEEK_DATA)
                hole = os.lseek(self.descriptor, data, os.SEEK_HOLE)
            except OSError as error:
                yield position, end, error.errno != errno.ENXIO  # ENXIO: no data from here to the end of the file
                return
            if not position <= data < hole:
                yield position, end, True
                return
            if position < data:
                yield position, min(data, end), False
            if data < end:
                yield data, min(hole, end), True
            position = hole

    def write(self, offset: int, data: Data) -> None:
        """Write all of ``data``, which stays the caller's.

        Raises:
            OSError: ENOSPC and its like when the medium is full; then some of ``data`` may have been written. Anything
                else is final for this storage.
        """
        self._check_alive()
        try:
            count = self._pwritev((data,), offset)
            if count < len(data):
                self._write_rest(offset, (data,), count)
        except OSError as error:
            raise self._failed(error) from error

    def write_vector(self, offset: int, buffers: Sequence[Data]) -> None:
        """Write the buffers one behind the other from ``offset``.

        Raises:
            OSError: as :meth:`write`.
        """
        self._check_alive()
        try:
            count = self._pwritev(buffers, offset)
            left = sum(map(len, buffers)) - count
            if left:
                self._write_rest(offset, buffers, count)
        except OSError as error:
            raise self._failed(error) from error

    def _write_rest(self, offset: int, buffers: Sequence[Data], done: int) -> None:
        for buffer in buffers:
            view = memoryview(buffer)
            if done >= len(view):
                done -= len(view)
            else:
                while done < len(view):
                    done += self._pwritev((view[done:],), offset + done)
                done = 0
            offset += len(view)

    def sync(self) -> None:
        """Make everything durable whose write ended before this call.

        Raises:
            OSError: it may be lost; final for this storage (R-63).
        """
        self._check_alive()
        begun = monotonic()
        try:
            self._fdatasync()
        except OSError as error:
            SYNC_TIMES.add(monotonic() - begun, failed=True)
            raise self._failed(error, final=True) from error
        SYNC_TIMES.add(monotonic() - begun, failed=False)

    def reserve(self, offset: int, length: int) -> None:
        """See to it that writing the range will not find the medium full, where the file system can promise that.

        What the file does not have yet of the range reads as zeros.

        Raises:
            OSError: ENOSPC if there is no room.
        """
        if not self.is_block_device:
            self._try_fallocate(0, offset, length)

    def punch(self, offset: int, length: int) -> None:
        """Give the range back to the file system, if it can take it. What is read there afterwards is undefined.

        Raises:
            OSError: the medium failed; final for this storage.
        """
        self._try_fallocate(_PUNCH_HOLE | _KEEP_SIZE, offset, length)

    def write_zeros(self, offset: int, length: int, *, allocated: bool = False, fast: bool = False) -> None:
        """Make the range read as zeros; with ``allocated`` it keeps or gets space of its own.

        Raises:
            OSError: EOPNOTSUPP, and nothing changed, if ``fast`` and zeros would have to be written; else as
                :meth:`write`.
        """
        if not self.is_block_device and offset + length > self.size():
            self.truncate(offset + length)  # punching cannot make a file longer
        # A device may write zeros itself where it is asked to keep the space.
        slow_device = fast and allocated and self.is_block_device
        if not slow_device and self._try_fallocate(
            _ZERO_RANGE if allocated else _PUNCH_HOLE | _KEEP_SIZE, offset, length
        ):
            return
        if fast:
            raise OSError(errno.EOPNOTSUPP, "zeros would have to be written", self.path)
        whole, rest = divmod(length, len(_ZEROS))
        for number in range(whole):
            self.write(offset + number * len(_ZEROS), _ZEROS)
        if rest:
            self.write(offset + length - rest, _ZEROS[:rest])

    def truncate(self, size: int) -> None:
        """Set the length of a file; what is new reads as zeros.

        Raises:
            OSError: as :meth:`write`.
        """
        self._check_alive()
        try:
            self._ftruncate(size)
        except OSError as error:
            raise self._failed(error) from error

    def _try_fallocate(self, mode: int, offset: int, length: int) -> bool:
        """False where the file system cannot do that."""
        self._check_alive()
        try:
            self._fallocate(mode, offset, length)
        except OSError as error:
            if error.errno in _NO_FALLOCATE:
                return False
            raise self._failed(error) from error
        return True

    def give_up(self, reason: str) -> OSError:
        """Write nothing any more, because the caller has lost what it had to write; EIO, for it to raise."""
        if self.failure is None:
            self.failure = OSError(errno.EIO, reason, self.path)
        return OSError(errno.EIO, reason, self.path)

    def _check_alive(self) -> None:
        if self.failure is not None:
            reason = self.failure.strerror
            raise OSError(errno.EIO, f"nothing is written after a failure ({reason}); reopen the image", self.path)

    def _failed(self, error: OSError, *, final: bool = False) -> OSError:
        """Note a failure, unless the medium is only full; the same with our path."""
        if self.failure is None and (final or error.errno not in FULL_ERRORS):
            self.failure = error
        return OSError(error.errno, error.strerror, self.path)

    # The four system calls that change files, each alone: tests record them here and make them fail.

    def _pwritev(self, buffers: Sequence[Data], offset: int) -> int:
        if len(buffers) > _BUFFERS_MAX:
            buffers = buffers[:_BUFFERS_MAX]
        return os.pwritev(self.descriptor, buffers, offset)

    def _fdatasync(self) -> None:
        os.fdatasync(self.descriptor)

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        if _libc.fallocate(self.descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def _ftruncate(self, size: int) -> None:
        os.ftruncate(self.descriptor, size)

    def size(self) -> int:
        """Length of the file or device in bytes."""
        if self.is_block_device:
            return os.lseek(self.descriptor, 0, os.SEEK_END)
        return os.fstat(self.descriptor).st_size

    def allocated_size(self) -> int:
        """Bytes that the file really occupies on its file system."""
        return os.fstat(self.descriptor).st_blocks * 512

    def close(self) -> None:
        """Close the descriptor. Idempotent; no other call may follow."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def share_one_heap() -> None:
    """Let all threads allocate from one heap, where the C library offers that (glibc's M_ARENA_MAX).

    Payloads and replies of many sizes are allocated by one thread and freed by another. With a heap for each thread,
    freed memory stays in heaps that do not need it: a server under mixed load grew to 168 MiB in minutes, with one heap
    to 136.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def identity_of(path: str) -> Identity:
    """What a storage opened on ``path`` would have as its identity.

    Raises:
        OSError: nothing is there.
    """
    return _identity(os.stat(path))


def _identity(status: os.stat_result) -> Identity:
    return (0, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)


def sync_directory_of(path: str) -> None:
    """Make the name of a new, renamed or removed file durable.

    Raises:
        OSError: the directory cannot be opened or synced.
    """
    descriptor = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

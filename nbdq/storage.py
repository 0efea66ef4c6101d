"""Positional file I/O: the only module that reads image files.

Knows file descriptors. Must not know image formats. Everything is positional and thread-safe; a short read is
returned, not hidden, because its meaning (zeros for guest data, damage for a table) is the caller's to decide.
"""

import errno
import os
import stat
from collections.abc import Iterator
from typing import Self

#: ``RWF_NOWAIT`` answers EAGAIN instead of waiting for the disk; file systems without it say EOPNOTSUPP.
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)

#: Distance of the probes that decide whether a range is in the page cache. Read-ahead and eviction work on
#: neighbouring pages, so one page in this many bytes stands for the rest; a wrong guess costs time, not truth.
_PROBE_STRIDE = 64 << 10


class FileStorage:
    """One open image file or block device. Owns its descriptor until :meth:`close`."""

    def __init__(self, descriptor: int, path: str) -> None:
        """Take ownership of ``descriptor``, opened on ``path``.

        Raises:
            OSError: EINVAL for anything but a regular file or a block device.
        """
        self.descriptor = descriptor
        self.path = path
        self._cached_reads = bool(_NOWAIT)
        self._probe = memoryview(bytearray(1))
        status = os.fstat(descriptor)
        self.is_block_device = stat.S_ISBLK(status.st_mode)
        #: Equal for two storages of one file or device, by whatever name they were opened.
        self.identity = (0, status.st_rdev) if self.is_block_device else (status.st_dev, status.st_ino)
        if not self.is_block_device and not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file or block device", path)

    @classmethod
    def open(cls, path: str) -> Self:
        """Open ``path`` for reading. Never waits: a FIFO or a dead device node cannot hang the server (R-36).

        Raises:
            OSError: as from ``open``, or EINVAL for something that is neither a file nor a block device.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            return cls(descriptor, path)
        except BaseException:
            os.close(descriptor)
            raise

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

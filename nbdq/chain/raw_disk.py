"""A raw file or block device as a disk that can be written to (``-f raw``): guest offset and host offset are one.

Nothing is kept in memory, neither data nor where the holes are: the kernel answers each question anew, so that several
clients, and programs that write to the file beside us, see one disk. Must not know NBD or event loops.
"""

import errno
from collections.abc import Iterator

import numpy as np

from nbdq.block import FilePiece, Kind, Piece, Status
from nbdq.chain.raw import size_of_raw
from nbdq.qcow2.bitmaps.tracking import DirtyBitmaps
from nbdq.storage import FileStorage

#: The unit of the page cache. A write to a part of a page that is not cached waits until the rest has been read.
_PAGE = 4096
#: Extents in one chunk of a status; the first is for those who want one extent, which ends where the second begins.
_FIRST_CHUNK, _CHUNK = 2, 512


class RawDisk:
    """A :class:`~nbdq.block.WritableBlockDevice` over one raw image. Owns its storage until :meth:`close`.

    The disk never grows by itself. A file that ends inside its last sector gets the missing bytes when they are written
    to, as in QEMU.
    """

    def __init__(self, storage: FileStorage) -> None:
        """Take ownership of ``storage``, open for writing; its length is asked once."""
        self.size = size_of_raw(storage)
        self.path = storage.path
        self.bitmaps: DirtyBitmaps | None = None
        """Marked by every request before it changes anything; they end with the disk. As there are no pins here, they
        are changed only while the disk is drained."""
        self._storage = storage

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``; may wait for a disk.

        Raises:
            OSError: EIO where the medium fails.
        """
        count = self._storage.read_into(offset, view)
        view[count:] = bytes(len(view) - count)

    def read_cached(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` without ever waiting; False if only :meth:`read_into` can."""
        return self._storage.read_cached(offset, view)

    def gather(self, offset: int, length: int) -> list[Piece]:
        """The range as memory; may wait for a disk.

        Raises:
            OSError: EIO where the medium fails.
        """
        view = memoryview(bytearray(length))
        self.read_into(offset, view)
        return [view]

    def gather_cached(self, offset: int, length: int) -> list[Piece] | None:
        """The range as a piece of the file, if it is in the page cache; never waits.

        What is written to the range before a reply has left may show in it, which is right: who writes while a read is
        under way has asked for either. The file never holds another guest's or another offset's data there.
        """
        if not self._storage.is_cached(offset, length):  # as a range is that reaches past the end of the file (P101)
            return None
        return [FilePiece(self._storage, offset, length)]

    def status_cached(self, offset: int, length: int) -> bool:
        """False: only the file system knows its holes."""
        return False

    def status(self, offset: int, length: int) -> Iterator[Status]:
        """Block status of the range, in ascending chunks that together cover it exactly; holes as they are now (M4)."""
        starts: list[int] = []
        kinds: list[Kind] = []
        chunk = _FIRST_CHUNK
        end = offset + length
        for start, stop, is_data in self._storage.data_ranges(offset, end):
            starts.append(start)
            kinds.append(Kind.DATA if is_data else Kind.HOLE)
            if len(starts) == chunk or stop == end:
                depth = np.ones(len(starts), dtype=np.uint16)
                offsets = np.array(starts, dtype=np.uint64)
                yield Status(offsets, np.array(kinds, dtype=np.uint8), depth, stop, offsets)
                starts, kinds, chunk = [], [], _CHUNK

    def prefetch(self, offset: int, length: int) -> None:
        """Ask the kernel to read the range into the page cache. A hint."""
        self._storage.prefetch(offset, length)

    def write_cached(self, offset: int, view: memoryview) -> bool:
        """Write ``view`` if nothing must be read for that; False, and nothing done, if it must.

        Raises:
            OSError: as :meth:`write`.
        """
        end = offset + len(view)
        if offset % _PAGE and not self._storage.is_cached(offset, 1):
            return False
        if end % _PAGE and not self._storage.is_cached(end - 1, 1):
            return False
        if self.bitmaps is not None:
            self.bitmaps.mark(offset, len(view))
        self._storage.write(offset, view)
        return True

    def write(self, offset: int, view: memoryview) -> None:
        """Write ``view``; may wait for a disk.

        Raises:
            OSError: ENOSPC if a sparse file finds its file system full, else EIO and final (R-63).
        """
        if self.bitmaps is not None:
            self.bitmaps.mark(offset, len(view))
        self._storage.write(offset, view)

    def zero(self, offset: int, length: int, *, unmap: bool, fast: bool = False) -> None:
        """Make the range read as zeros (P96): a hole with ``unmap``, else with space of its own.

        Raises:
            OSError: EOPNOTSUPP if ``fast``, and only writing zeros would do it; else as :meth:`write`.
        """
        if self.bitmaps is not None:
            self.bitmaps.mark(offset, length)
        self._storage.write_zeros(offset, length, allocated=not unmap, fast=fast)

    def discard(self, offset: int, length: int) -> None:
        """Give the space of the range back, where file system or device take it; it may read as before (P95).

        Raises:
            OSError: the medium failed; final (R-63).
        """
        if self.bitmaps is not None:
            self.bitmaps.mark(offset, length)
        self._storage.punch(offset, length)

    def grow(self, size: int) -> None:
        """Make the file, and so the disk, larger; what is new reads as zeros. Durable on return.

        Requests must stay inside the old size until then.

        Raises:
            OSError: EINVAL if ``size`` is not larger, or no multiple of 512; EOPNOTSUPP for a block device; ENOSPC.
        """
        if size <= self.size or size % 512:
            raise OSError(errno.EINVAL, f"cannot grow a disk of {self.size} bytes to {size}", self._storage.path)
        self._resize(size)

    def shrink(self, size: int) -> None:
        """Make the file, and so the disk, smaller; the caller has drained it. Durable on return.

        Raises:
            OSError: EINVAL if ``size`` is not smaller, or no multiple of 512; EOPNOTSUPP for a block device.
        """
        if not 0 < size < self.size or size % 512:
            raise OSError(errno.EINVAL, f"cannot shrink a disk of {self.size} bytes to {size}", self._storage.path)
        self._resize(size)

    def _resize(self, size: int) -> None:
        if self._storage.is_block_device:
            text = f"has {self.size} bytes, {size} are wanted, and a block device has the size that it has"
            raise OSError(errno.EOPNOTSUPP, text, self._storage.path)
        if self.bitmaps is not None and size > self.size:
            self.bitmaps.resize(size)
        self._storage.truncate(size)
        self._storage.sync()
        if self.bitmaps is not None:
            self.bitmaps.resize(size)
        self.size = size

    def flush(self) -> None:
        """Make durable everything that was written by calls that have returned.

        Raises:
            OSError: it could not be; final (R-63).
        """
        self._storage.sync()

    def finish(self) -> None:
        """:meth:`flush`: a raw image is complete at any time."""
        self.flush()

    def close(self) -> None:
        """Close the file. Idempotent; what was not flushed is left to the kernel."""
        self._storage.close()

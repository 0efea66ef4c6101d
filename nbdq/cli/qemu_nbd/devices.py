"""Disks with the habits that an option of qemu-nbd asks for, on top of the disk as it is."""

import errno
import threading

from nbdq.block import WritableBlockDevice
from nbdq.chain.window import WritableWindow
from nbdq.qcow2.fields import MAGIC

#: Beginnings by which QEMU tells formats that nbdq does not have: qed, vmdk, luks, vhdx, vpc.
FOREIGN_MAGICS = (b"QED\0", b"KDMV", b"COWD", b"# Disk DescriptorFile", b"LUKS\xba\xbe", b"vhdxfile", b"conectix")
_SECTOR = 512


class WriteThrough(WritableWindow):
    """Every change is durable when it is answered (``--cache=writethrough``, ``directsync``)."""

    def write_cached(self, offset: int, view: memoryview) -> bool:
        """False: a flush has to wait."""
        return False

    def write(self, offset: int, view: memoryview) -> None:
        """Write ``view``, durably."""
        super().write(offset, view)
        self.flush()

    def zero(self, offset: int, length: int, *, unmap: bool, fast: bool = False) -> None:
        """Make the range read as zeros (P96), durably."""
        super().zero(offset, length, unmap=unmap, fast=fast)
        self.flush()

    def discard(self, offset: int, length: int) -> None:
        """Give up the contents of the range (P95), durably."""
        super().discard(offset, length)
        self.flush()


class GuardedRaw(WritableWindow):
    """A raw disk that must never begin like an image: nobody said that it is raw, and who looks at it the next time
    would take it for what a guest has made of it (R-34). As QEMU does where it guesses raw."""

    def __init__(self, device: WritableBlockDevice) -> None:
        super().__init__(device, 0)
        self._first_sector = threading.Lock()  # held from the look at it to the change of it

    def write_cached(self, offset: int, view: memoryview) -> bool:
        """As :class:`WritableWindow`, but for the first sector, at which we have a look."""
        return offset >= _SECTOR and super().write_cached(offset, view)

    def write(self, offset: int, view: memoryview) -> None:
        """Write ``view``.

        Raises:
            OSError: EPERM if the disk would begin like an image.
        """
        if offset >= _SECTOR:
            super().write(offset, view)
            return
        with self._first_sector:
            self._check(offset, bytes(view[: _SECTOR - offset]))
            super().write(offset, view)

    def zero(self, offset: int, length: int, *, unmap: bool, fast: bool = False) -> None:
        """Make the range read as zeros (P96); one of them could complete a beginning."""
        if offset >= _SECTOR:
            super().zero(offset, length, unmap=unmap, fast=fast)
            return
        with self._first_sector:
            self._check(offset, bytes(min(length, _SECTOR - offset)))
            super().zero(offset, length, unmap=unmap, fast=fast)

    def discard(self, offset: int, length: int) -> None:
        """Give up the contents of the range (P95), but for the first sector, of which nothing is given up."""
        start = max(offset, _SECTOR)
        if start < offset + length:
            super().discard(start, offset + length - start)

    def _check(self, offset: int, data: bytes) -> None:
        head = bytearray(_SECTOR)
        self.read_into(0, memoryview(head))
        head[offset : offset + len(data)] = data
        if head.startswith((MAGIC, *FOREIGN_MAGICS)):
            raise OSError(errno.EPERM, "would make a raw disk look like an image; serve it with -f raw")

"""Disks with the habits that an option of qemu-nbd asks for, on top of the disk as it is."""

import errno

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

    def write_cached(self, offset: int, view: memoryview) -> bool:
        """As :class:`WritableWindow`, but for the first sector, at which we have a look."""
        return offset >= _SECTOR and super().write_cached(offset, view)

    def write(self, offset: int, view: memoryview) -> None:
        """Write ``view``.

        Raises:
            OSError: EPERM if the disk would begin like an image.
        """
        if offset < _SECTOR:
            head = bytearray(min(_SECTOR, self.size))
            self.read_into(0, memoryview(head))
            part = bytes(view[: len(head) - offset])
            head[offset : offset + len(part)] = part
            if head.startswith((MAGIC, *FOREIGN_MAGICS)):
                raise OSError(errno.EPERM, "would make a raw disk look like an image; serve it with -f raw")
        super().write(offset, view)

"""A part of a disk as a disk of its own: what ``qemu-nbd -o`` and the raw driver's ``offset`` and ``size`` show.

Adds one number to every offset, and nothing else. Must not know formats, NBD or event loops.
"""

from collections.abc import Iterator

import numpy as np

from nbdq.block import BlockDevice, Piece, Status, WritableBlockDevice
from nbdq.errors import ExportError


class Window:
    """A :class:`~nbdq.block.BlockDevice` over ``[offset, offset + size)`` of another, which stays the caller's."""

    def __init__(self, device: BlockDevice, offset: int, size: int | None = None) -> None:
        """Show ``size`` bytes of ``device`` from ``offset`` on, both multiples of 512; all that is there unless told.

        Raises:
            ExportError: the range does not lie inside the device, or is not one of sectors.
        """
        if offset > device.size:
            raise ExportError(f"Offset ({offset}) cannot be greater than size of the containing file ({device.size})")
        size = device.size - offset if size is None else size
        if offset + size > device.size:
            raise ExportError(
                f"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the actual size "
                f"of the containing file ({device.size})"
            )
        if offset % 512 or size % 512:
            raise ExportError(f"offset {offset} and size {size} have to be multiples of 512")
        self.size = size
        self._device = device
        self._offset = offset

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``; may wait for a disk and inflate."""
        self._device.read_into(self._offset + offset, view)

    def read_cached(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` without ever waiting; False if only :meth:`read_into` can."""
        return self._device.read_cached(self._offset + offset, view)

    def gather_cached(self, offset: int, length: int) -> list[Piece] | None:
        """The range as pieces, in order, if all of it is in memory or the page cache; never waits."""
        return self._device.gather_cached(self._offset + offset, length)

    def gather(self, offset: int, length: int) -> list[Piece]:
        """The range as pieces of memory; may wait for a disk and inflate."""
        return self._device.gather(self._offset + offset, length)

    def status_cached(self, offset: int, length: int) -> bool:
        """Whether :meth:`status` can answer for the range from memory."""
        return self._device.status_cached(self._offset + offset, length)

    def status(self, offset: int, length: int) -> Iterator[Status]:
        """Block status of the range, in ascending chunks that together cover it exactly."""
        shift = np.uint64(self._offset)
        for status in self._device.status(self._offset + offset, length):
            yield status._replace(start=status.start - shift, end=status.end - self._offset)

    def prefetch(self, offset: int, length: int) -> None:
        """Bring the range nearer, as far as that is cheap. A hint."""
        self._device.prefetch(self._offset + offset, length)

    def close(self) -> None:
        """Nothing: the device is the caller's."""


class WritableWindow(Window):
    """A :class:`Window` that can be written to, as :class:`~nbdq.block.WritableBlockDevice` says."""

    def __init__(self, device: WritableBlockDevice, offset: int, size: int | None = None) -> None:
        super().__init__(device, offset, size)
        self._writable = device

    def write_cached(self, offset: int, view: memoryview) -> bool:
        """Write ``view`` if that needs nothing but a copy into the page cache; False, and nothing done, if not."""
        return self._writable.write_cached(self._offset + offset, view)

    def write(self, offset: int, view: memoryview) -> None:
        """Write ``view``; may allocate, copy and wait for a disk."""
        self._writable.write(self._offset + offset, view)

    def zero(self, offset: int, length: int, *, unmap: bool, fast: bool = False) -> None:
        """Make the range read as zeros (P96)."""
        self._writable.zero(self._offset + offset, length, unmap=unmap, fast=fast)

    def discard(self, offset: int, length: int) -> None:
        """Give up the contents of the range (P95)."""
        self._writable.discard(self._offset + offset, length)

    def flush(self) -> None:
        """Make durable everything that was written by calls that have returned."""
        self._writable.flush()

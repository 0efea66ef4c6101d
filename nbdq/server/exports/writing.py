"""The writable side of an export: what the operator wants of discards and zeros, flushes shared, writes watched."""

from enum import StrEnum

import numpy as np

from nbdq.block import WritableBlockDevice
from nbdq.server.exports.commits import Commits
from nbdq.server.transmission.pace import Pace


class DetectZeroes(StrEnum):
    """What becomes of a WRITE of nothing but zeros, as qemu-nbd's option of that name says."""

    OFF = "off"
    """It is written."""
    ON = "on"
    """The range is zeroed, and keeps its space."""
    UNMAP = "unmap"
    """The range is zeroed, and gives up its space."""


class Writing:
    """How requests change one device, for all clients of its export. The device stays the creator's."""

    def __init__(
        self, device: WritableBlockDevice, *, discard: bool = True, detect_zeroes: DetectZeroes = DetectZeroes.OFF
    ) -> None:
        """Without ``discard`` nothing that a client does gives up space (qemu-nbd's ``--discard=ignore``)."""
        self.discards = discard
        self.detect_zeroes = detect_zeroes
        self.commits = Commits(lambda: self._device.flush())
        self.pace = Pace()
        self.adopt(device)

    def adopt(self, device: WritableBlockDevice) -> None:
        """Change ``device`` from now on; no request is in progress."""
        self._device = device
        self._choose()

    def set(self, *, discard: bool, detect_zeroes: DetectZeroes) -> None:
        """Treat discards and zeros so from now on."""
        self.discards, self.detect_zeroes = discard, detect_zeroes
        self._choose()

    def _choose(self) -> None:
        self.write_cached = self._device.write_cached if self.detect_zeroes is DetectZeroes.OFF else self._write_cached
        """As in :class:`~nbdq.block.WritableBlockDevice`. Loop thread only."""

    def _write_cached(self, offset: int, view: memoryview) -> bool:
        return not _is_zero(view) and self._device.write_cached(offset, view)

    # Pool threads; failures are those of the device.

    def write(self, offset: int, view: memoryview) -> None:
        """Write ``view``, or zero its range if it has nothing else and the operator wants that found out."""
        if self.detect_zeroes is not DetectZeroes.OFF and _is_zero(view):
            self.zero(offset, len(view), unmap=self.detect_zeroes is DetectZeroes.UNMAP)
        else:
            self._device.write(offset, view)

    def zero(self, offset: int, length: int, *, unmap: bool, fast: bool = False) -> None:
        """Make the range read as zeros (P96)."""
        self._device.zero(offset, length, unmap=unmap and self.discards, fast=fast)

    def discard(self, offset: int, length: int) -> None:
        """Give up the range, or do nothing, which a TRIM permits (P95)."""
        if self.discards:
            self._device.discard(offset, length)


def _is_zero(view: memoryview) -> bool:
    return not view[0] and not view[-1] and not np.frombuffer(view, dtype=np.uint8).any()

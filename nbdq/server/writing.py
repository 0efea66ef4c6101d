"""The writable side of an export: what the operator wants of discards and zeros, flushes shared, writes watched."""

from enum import StrEnum

import numpy as np

from nbdq.block import WritableBlockDevice
from nbdq.server.commits import Commits
from nbdq.server.pace import Pace


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
        self._device = device
        self._discard = discard
        self._detect_zeroes = detect_zeroes
        self.write_cached = device.write_cached if detect_zeroes is DetectZeroes.OFF else self._write_cached
        """As in :class:`~nbdq.block.WritableBlockDevice`. Loop thread only."""
        self.commits = Commits(device.flush)
        self.pace = Pace()

    def _write_cached(self, offset: int, view: memoryview) -> bool:
        return not _is_zero(view) and self._device.write_cached(offset, view)

    # Pool threads; failures are those of the device.

    def write(self, offset: int, view: memoryview) -> None:
        """Write ``view``, or zero its range if it has nothing else and the operator wants that found out."""
        if self._detect_zeroes is not DetectZeroes.OFF and _is_zero(view):
            self.zero(offset, len(view), unmap=self._detect_zeroes is DetectZeroes.UNMAP)
        else:
            self._device.write(offset, view)

    def zero(self, offset: int, length: int, *, unmap: bool, fast: bool = False) -> None:
        """Make the range read as zeros (P96)."""
        self._device.zero(offset, length, unmap=unmap and self._discard, fast=fast)

    def discard(self, offset: int, length: int) -> None:
        """Give up the range, or do nothing, which a TRIM permits (P95)."""
        if self._discard:
            self._device.discard(offset, length)


def _is_zero(view: memoryview) -> bool:
    return not view[0] and not view[-1] and not np.frombuffer(view, dtype=np.uint8).any()

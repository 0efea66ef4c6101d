"""What can still be read of a range that cannot be read as a whole: a bad place costs itself, not its surroundings.

Only clients with structured replies can be told of both (P113). Pool threads.
"""

from time import monotonic
from typing import NamedTuple

import numpy as np

from nbdq.block import BlockDevice

#: Where a range is cut: the kernel reads whole pages, and fails whole pages.
_UNIT = 4096
#: Reads that one range is worth, enough for half a dozen bad places in 32 MiB; and after so many seconds no further one
#: is begun, for a dying disk may take seconds over each. What was not tried by then counts as bad.
_READS = 128
_SECONDS = 5.0


class BadRange(NamedTuple):
    """A part that cannot be read, and why."""

    offset: int
    length: int
    error: OSError


class Salvage:
    """Parts of one range of a disk, ascending: the good ones with their data, and the bad ones."""

    def __init__(self, device: BlockDevice, offset: int, length: int, error: OSError) -> None:
        """Read the range piece by piece, which as a whole fails with ``error``."""
        self.good: list[tuple[int, memoryview]] = []
        """Offset and data; neighbours are joined."""
        self.bad: list[BadRange] = []
        self._device = device
        self._start = offset
        self._view = np.empty(length, dtype=np.uint8).data
        self._reads = _READS
        self._deadline = monotonic() + _SECONDS
        self._split(offset, offset + length, error)

    def _split(self, start: int, end: int, error: OSError) -> None:
        """Read what fails as a whole in two parts, if it is long enough for that."""
        middle = (start + end) // 2 // _UNIT * _UNIT
        if middle <= start:
            middle = start // _UNIT * _UNIT + _UNIT
        if middle >= end or not self._reads or monotonic() > self._deadline:
            self._is_bad(start, end, error)
            return
        self._read(start, middle, error)
        self._read(middle, end, error)

    def _read(self, start: int, end: int, error: OSError) -> None:
        if not self._reads or monotonic() > self._deadline:
            self._is_bad(start, end, error)
            return
        self._reads -= 1
        try:
            self._device.read_into(start, self._view[start - self._start : end - self._start])
        except OSError as cause:
            self._split(start, end, cause)
        else:
            self._is_good(start, end)

    def _is_good(self, start: int, end: int) -> None:
        if self.good and self.good[-1][0] + len(self.good[-1][1]) == start:
            start = self.good.pop()[0]
        self.good.append((start, self._view[start - self._start : end - self._start]))

    def _is_bad(self, start: int, end: int, error: OSError) -> None:
        if self.bad and self.bad[-1].offset + self.bad[-1].length == start and self.bad[-1].error.errno == error.errno:
            start, _, error = self.bad.pop()
        self.bad.append(BadRange(start, end - start, error))

"""Stamped sectors: every one that a guest writes says which write it is of and where it belongs."""

import numpy as np
from numpy.typing import NDArray

from tests.crash.recorder import SECTOR

MAGIC = b"\xc5STAMPED"
_MAGIC = np.frombuffer(MAGIC, dtype=np.uint64)[0]
_MIX = np.uint64(0x9E37_79B9_7F4A_7C15)
_WORDS = SECTOR // 8

#: What a sector was found to hold: the number of a write, or one of these.
Values = NDArray[np.int64]
ZEROS = 0
GARBAGE = -1
"""Neither zeros nor a stamp: torn inside, or metadata."""
ELSEWHERE = -2
"""A stamp that belongs to another sector."""


def stamped(number: int, first_sector: int, sector_count: int) -> bytes:
    """The bytes that write ``number`` puts into the sectors."""
    words = np.empty((sector_count, 4), dtype=np.uint64)
    words[:, 0] = _MAGIC
    words[:, 1] = number
    words[:, 2] = np.arange(first_sector, first_sector + sector_count)
    words[:, 3] = (words[:, 1] ^ (words[:, 2] << np.uint64(32))) * _MIX
    return np.tile(words, (1, _WORDS // 4)).tobytes()


def whole_stamps(rows: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which rows of 64 words are an unbroken stamp of any write and place."""
    found = np.asarray((rows[:, 0] == _MAGIC) & (rows[:, 3] == (rows[:, 1] ^ (rows[:, 2] << np.uint64(32))) * _MIX))
    candidates = np.flatnonzero(found)
    found[candidates] = (rows[candidates, 4:] == rows[candidates, :-4]).all(axis=1)
    return found


def as_rows(content: bytes | bytearray | memoryview) -> NDArray[np.uint64]:
    """Whole sectors as rows of 64 words."""
    return np.frombuffer(content, dtype=np.uint64).reshape(-1, _WORDS)


def read_stamps(content: bytes | bytearray | memoryview) -> Values:
    """What each sector of a disk holds."""
    rows = as_rows(content)
    good = whole_stamps(rows)
    values = np.full(len(rows), GARBAGE, dtype=np.int64)
    values[~rows.any(axis=1)] = ZEROS
    here = rows[:, 2] == np.arange(len(rows), dtype=np.uint64)
    values[good] = np.where(here[good], rows[good, 1].astype(np.int64), ELSEWHERE)
    return values

"""Stamped sectors: every one that a guest writes says which write it is of and where it belongs."""

import numpy as np
from numpy.typing import NDArray

from tests.crash.recorder import SECTOR

MAGIC = b"\xc5STAMPED"
_MAGIC = np.frombuffer(MAGIC, dtype=np.uint64)[0]
_MIX = np.uint64(0x9E37_79B9_7F4A_7C15)
_WORDS = SECTOR // 8
#: Half of a stamp does not compress, so that few compressed clusters share a host cluster.
_NOISE = slice(4, 36)
_FACTORS = np.arange(1, 65, 2, dtype=np.uint64) * _MIX

#: What a sector was found to hold: the number of a write, or one of these.
Values = NDArray[np.int64]
ZEROS = 0
GARBAGE = -1
"""Neither zeros nor a stamp: torn inside, or metadata."""
ELSEWHERE = -2
"""A stamp that belongs to another sector."""


def stamped(number: int, first_sector: int, sector_count: int) -> bytes:
    """The bytes that write ``number`` puts into the sectors."""
    words = np.zeros((sector_count, _WORDS), dtype=np.uint64)
    words[:, 0] = _MAGIC
    words[:, 1] = number
    words[:, 2] = np.arange(first_sector, first_sector + sector_count)
    words[:, 3] = _mixed(words)
    words[:, _NOISE] = words[:, 3:4] * _FACTORS
    return words.tobytes()


def _mixed(rows: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mixed: NDArray[np.uint64] = (rows[:, 1] ^ (rows[:, 2] << np.uint64(32))) * _MIX
    return mixed


def whole_stamps(rows: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which rows of 64 words are an unbroken stamp of any write and place."""
    found = np.asarray((rows[:, 0] == _MAGIC) & (rows[:, 3] == _mixed(rows)))
    candidates = np.flatnonzero(found)
    suspects = rows[candidates]
    noise = (suspects[:, _NOISE] == suspects[:, 3:4] * _FACTORS).all(axis=1)
    found[candidates] = noise & ~suspects[:, _NOISE.stop :].any(axis=1)
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

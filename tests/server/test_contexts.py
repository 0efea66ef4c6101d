"""What a client is told of a range in each metadata context, whatever pieces the disk knows it in (P117-P119, P48)."""

import struct
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from nbdq.block import Kind, Status
from nbdq.nbd.constants import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP
from nbdq.server.exports.contexts import STANDARD, DirtyBitmap, context_of_bitmap, encode
from tests.server.harness import MemoryDisk

K = 1024


class PieceDisk(MemoryDisk):
    """A disk whose status comes in chunks of (kind, depth, length) entries; after the last one it fails."""

    def __init__(self, *chunks: list[tuple[Kind, int, int]]) -> None:
        super().__init__(b"")
        self.chunks = chunks
        self.asked = 0

    def status(self, offset: int, length: int) -> Iterator[Status]:
        position = offset
        for chunk in self.chunks:
            self.asked += 1
            kinds, depths, lengths = zip(*chunk, strict=True)
            starts = [position + sum(lengths[:number]) for number in range(len(lengths))]
            position += sum(lengths)
            start = np.array(starts, np.uint64)
            yield Status(start, np.array(kinds, np.uint8), np.array(depths, np.uint16), position, start)
        if position < offset + length:
            raise OSError(5, "corrupt table")


class Bitmap:
    """A bitmap that knows its bits in chunks of (dirty, length)."""

    def __init__(self, *chunks: list[tuple[int, int]]) -> None:
        self.chunks = chunks

    def ranges(self, offset: int, length: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        for chunk in self.chunks:
            bounds = [offset]
            for _, count in chunk:
                bounds.append(bounds[-1] + count)
            yield np.array(bounds[:-1], np.uint64), np.array([state for state, _ in chunk], np.uint8), bounds[-1]
            offset = bounds[-1]


def extents(
    name: str, disk: PieceDisk, length: int, *, limit: int = 100, bitmaps: dict[str, DirtyBitmap] | None = None
) -> list[tuple[int, int]]:
    """(length, flags) pairs as the client decodes them; neighbours must differ."""
    context = context_of_bitmap(name, bitmaps) if bitmaps else STANDARD[name]
    pairs = list(struct.iter_unpack(">II", encode(context, disk, 4 * K, length, limit=limit, number=">u4")))
    wide = encode(context, disk, 4 * K, length, limit=limit, number=">u8")
    assert list(struct.iter_unpack(">QQ", wide)) == pairs
    assert all(a[1] != b[1] for a, b in pairwise(pairs))
    return pairs


def test_what_reads_alike_is_one_extent_across_the_pieces_in_which_it_is_known() -> None:
    disk = PieceDisk([(Kind.DATA, 1, 4 * K), (Kind.DATA, 2, 4 * K)], [(Kind.COMPRESSED, 1, K), (Kind.ZERO, 1, K)])
    assert extents(BASE_ALLOCATION, disk, 10 * K) == [(9 * K, 0), (K, 3)]
    assert extents(ALLOCATION_DEPTH, disk, 10 * K) == [(4 * K, 1), (4 * K, 2), (2 * K, 1)]


def test_dirty_is_1_and_clean_is_0() -> None:
    bitmaps: dict[str, DirtyBitmap] = {"b0": Bitmap([(0, K), (1, K)], [(1, K), (0, K)], [(0, K)])}
    assert extents(f"{DIRTY_BITMAP}b0", PieceDisk(), 5 * K, bitmaps=bitmaps) == [(K, 0), (2 * K, 1), (2 * K, 0)]


def test_the_bitmap_is_the_one_of_the_whole_name() -> None:
    """Names may have colons."""
    bitmaps: dict[str, DirtyBitmap] = {"b:0": Bitmap([(1, K)]), "b": Bitmap([(0, K)])}
    assert extents(f"{DIRTY_BITMAP}b:0", PieceDisk(), K, bitmaps=bitmaps) == [(K, 1)]
    assert extents(f"{DIRTY_BITMAP}b", PieceDisk(), K, bitmaps=bitmaps) == [(K, 0)]


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_no_more_extents_than_asked_for_and_the_last_one_is_whole(limit: int) -> None:
    bitmaps: dict[str, DirtyBitmap] = {"b0": Bitmap([(0, K), (1, K)], [(1, 3 * K)], [(0, K), (1, K)])}
    whole = [(K, 0), (4 * K, 1), (K, 0), (K, 1)]
    assert extents(f"{DIRTY_BITMAP}b0", PieceDisk(), 7 * K, bitmaps=bitmaps, limit=limit) == whole[:limit]


def test_a_disk_is_not_walked_further_than_the_client_wants_to_know() -> None:
    disk = PieceDisk(*[[(Kind.DATA, 1, K), (Kind.ZERO, 1, K)]] * 8)
    assert extents(BASE_ALLOCATION, disk, 16 * K, limit=2) == [(K, 0), (K, 3)]
    assert disk.asked == 2 * 2


def test_what_is_known_before_damage_is_told_and_the_damage_itself_is_an_error() -> None:
    assert extents(BASE_ALLOCATION, PieceDisk([(Kind.DATA, 1, K)]), 2 * K) == [(K, 0)]
    with pytest.raises(OSError, match="corrupt table"):
        extents(BASE_ALLOCATION, PieceDisk(), 2 * K)

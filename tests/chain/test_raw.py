"""A raw image as a layer: its size, and its holes as the file system knows them (M4)."""

import errno
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from nbdq.chain.raw import RawImage
from nbdq.storage import FileStorage
from tests.chain.model import MemoryFile

_PAGE = 4096


@contextmanager
def raw(size: int, *, holes: list[bool] | None = None) -> Iterator[RawImage]:
    image = RawImage(MemoryFile(0, size, holes=holes or []))
    yield image
    image.close()


@pytest.mark.parametrize(
    ("length", "size"), [(0, 0), (1, 512), (511, 512), (512, 512), (513, 1024), (1 << 20, 1 << 20)]
)
def test_a_partial_last_sector_counts_as_a_whole_one(length: int, size: int) -> None:
    """As in QEMU; what the file does not hold of it reads as zeros."""
    with raw(length) as image:
        assert image.size == size


def test_ranges_end_with_the_last_byte_of_the_file() -> None:
    with raw(_PAGE + 100) as image:
        assert image.ranges(0, 2 * _PAGE) == [(0, _PAGE + 100, True), (_PAGE + 100, 2 * _PAGE, False)]
        assert image.ranges(_PAGE, _PAGE + 512) == [(_PAGE, _PAGE + 100, True), (_PAGE + 100, _PAGE + 512, False)]
        assert image.ranges(_PAGE + 100, _PAGE + 512) == [(_PAGE + 100, _PAGE + 512, False)]
        assert image.ranges(0, 512) == [(0, 512, True)]


@pytest.mark.parametrize("step", [512, _PAGE, 3 * 512, 1 << 16, 1 << 20])
def test_occupancy_finds_every_step_with_data(step: int) -> None:
    seed = step
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(10):
        pages = chance.randint(1, 200)
        with raw(
            pages * _PAGE - chance.randrange(_PAGE), holes=chance.choices([False, True], [1, 9], k=pages)
        ) as image:
            start = chance.randrange(0, pages * _PAGE, step)
            end = start + step * chance.randint(1, 2 * pages * _PAGE // step + 1)
            assert isinstance(image.data, MemoryFile)
            expected = [
                any(image.data.is_data(at) for at in range(low, low + step, 256)) for low in range(start, end, step)
            ]
            found = image.occupancy(start, end, step)
            assert found.dtype == np.bool_
            assert found.tolist() == expected


def test_occupancy_of_a_huge_file_asks_once_for_each_hole_and_each_step_with_data() -> None:
    """Two system calls for each, whatever lies between."""

    class Counting(MemoryFile):
        questions = 0

        def data_ranges(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
            self.questions += 1
            return super().data_ranges(start, end)

    storage = Counting(0, 16 << 20, holes=[page % 256 != 7 for page in range(4 << 10)])
    image = RawImage(storage)
    assert image.occupancy(0, 16 << 20, 256 << 10).sum() == 16
    assert storage.questions <= 2 * 16 + 2
    image.close()


def test_the_file_system_tells_the_holes() -> None:
    descriptor = os.memfd_create("raw", os.MFD_CLOEXEC)
    os.truncate(descriptor, 16 << 20)
    os.pwrite(descriptor, b"x", 8 << 20)
    image = RawImage(FileStorage(descriptor, "disk.raw"))
    hole, data, tail = image.ranges(0, image.size)
    assert (hole, data[:1], data[2:], tail[1:]) == ((0, 8 << 20, False), (8 << 20,), (True,), (16 << 20, False))
    assert image.occupancy(0, 16 << 20, 4 << 20).tolist() == [False, False, True, False]
    image.close()


def test_closing_twice_closes_once() -> None:
    with raw(512) as image:
        descriptor = image.data.descriptor
        image.close()
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.fstat(descriptor)

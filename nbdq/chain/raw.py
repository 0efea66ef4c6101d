"""A raw image as a layer: the guest offset is the host offset, holes come from the file system (M4)."""

import numpy as np
from numpy.typing import NDArray

from nbdq.storage import FileStorage


def size_of_raw(storage: FileStorage) -> int:
    """Bytes of a raw disk, a multiple of 512: a partial last sector counts as a whole one, as in QEMU.

    What the file does not hold of that sector reads as zeros.
    """
    return -(-storage.size() // 512) * 512


class RawImage:
    """A raw file or device. Owns its storage until :meth:`close`."""

    def __init__(self, storage: FileStorage) -> None:
        self.data = storage
        self.path = storage.path
        self.size = size_of_raw(storage)

    def ranges(self, start: int, end: int) -> list[tuple[int, int, bool]]:
        """Contiguous (start, end, is data) over ``[start, end)``; to the byte at the end of the file, as in QEMU."""
        return list(self.data.data_ranges(start, end))

    def occupancy(self, start: int, end: int, step: int) -> NDArray[np.bool_]:
        """For each ``step`` bytes of ``[start, end)``: may there be data?"""
        occupied = np.zeros(-(-(end - start) // step), dtype=bool)
        position = start
        while position < end:
            low, high, is_data = next(self.data.data_ranges(position, end))
            if is_data:
                occupied[(low - start) // step] = True
                position = low + step - (low - start) % step
            else:
                position = high
        return occupied

    def close(self) -> None:
        """Close the file. Idempotent."""
        self.data.close()

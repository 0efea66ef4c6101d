"""Reading many tables of an image without believing where they are: holes are skipped, overlaps limited.

In a sound image no two tables share a byte, so reading all of them once takes no longer than the data in the file
allows. What breaks that rule is refused before it can cost more.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from nbdq.errors import CorruptImage
from nbdq.storage import FileStorage

#: Bytes that tables of one kind may share with each other; small damage is judged, large traps are refused.
MAX_SHARED = 64 << 20

#: Bytes of tables that are decoded at once: what it takes to do so is a dozen times as much.
_BATCH = 1 << 20


def refuse_overlaps(path: str, name: str, offsets: NDArray[np.int64], lengths: NDArray[np.int64] | int) -> None:
    """Refuse tables of one kind that share more than :data:`MAX_SHARED` bytes.

    Raises:
        CorruptImage: they do; ``name`` begins the message.
    """
    order = np.argsort(offsets, kind="stable")
    starts = offsets[order]
    ends = starts + (lengths[order] if isinstance(lengths, np.ndarray) else lengths)
    if len(starts) > 1:
        furthest = np.maximum.accumulate(ends)[:-1]
        shared = np.clip(np.minimum(furthest, ends[1:]) - starts[1:], 0, None)
        if float(shared.sum(dtype=np.float64)) > MAX_SHARED:
            mend = "restore the image from a copy"
            raise CorruptImage(path, f"{name} lie over each other, in more than {MAX_SHARED >> 20} MiB", mend)


def lies_in_data(storage: FileStorage, offsets: NDArray[np.int64], length: int) -> NDArray[np.bool_]:
    """Which of the tables of ``length`` bytes at ``offsets``, all within the file, are more than a hole of it.

    Raises:
        OSError: the file cannot be read.
    """
    if storage.is_block_device or storage.allocated_size() * 2 > storage.size():
        return np.ones(len(offsets), dtype=bool)  # not worth asking
    found = np.zeros(len(offsets), dtype=bool)
    order = np.argsort(offsets, kind="stable")
    ascending = offsets[order]
    end_of_file = storage.size()
    at = 0
    while at < len(ascending):
        start = int(ascending[at])
        _, end, is_data = next(storage.data_ranges(start, max(end_of_file, start + 1)))
        if is_data:
            following = int(np.searchsorted(ascending, end, "left"))
            found[order[at:following]] = True
        else:
            following = int(np.searchsorted(ascending, end - length, "right"))
            if end >= end_of_file:
                following = len(ascending)
        if following == at:  # it begins in a hole and ends in data
            found[order[at]] = True
            following = at + 1
        at = following
    return found


def read_tables(
    storage: FileStorage, offsets: NDArray[np.int64], length: int
) -> Iterator[tuple[slice, NDArray[np.uint64]]]:
    """The tables of ``length`` bytes at ascending ``offsets``, in batches: which of them, and a row of words for each.

    What lies past the end of the file is zero.

    Raises:
        OSError: the file cannot be read.
    """
    step = max(_BATCH // length, 1)
    for begin in range(0, len(offsets), step):
        chosen = offsets[begin : begin + step]
        buffer = memoryview(bytearray(len(chosen) * length))
        # Neighbours are read at once.
        edges = (np.flatnonzero(np.diff(chosen) != length) + 1).tolist()
        for first, last in zip([0, *edges], [*edges, len(chosen)], strict=True):
            storage.read_into(int(chosen[first]), buffer[first * length : last * length])
        words = np.frombuffer(buffer, dtype=">u8").astype(np.uint64)
        yield slice(begin, begin + len(chosen)), words.reshape(len(chosen), -1)

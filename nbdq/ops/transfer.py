"""Copying from layers of a chain into another one: the loops inside commits and streams.

Data goes in large pieces, zeros go as zeros, and compressed clusters as they are where both images understand them.
Must not know why something is copied, or what becomes of the layers afterwards.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

import numpy as np

from nbdq.chain.disk import ChainDisk, new_buffer
from nbdq.chain.live import WritableDisk
from nbdq.chain.overlay import OverlayDisk
from nbdq.ops.control import Control
from nbdq.ops.parallel import in_order
from nbdq.ops.stretches import Content, Stretch, Stretches

#: Bytes read and written at once; pieces begin at multiples of it, so that they are whole clusters.
_PIECE = 2 << 20
#: Guest bytes made zero at once: a change of tables, or one system call.
_ZEROS = 1 << 30


class Transfer:
    """From the top ``layer_count`` layers of one disk into another one, which lies below them: for commits."""

    def __init__(
        self, source: ChainDisk | OverlayDisk, layer_count: int, target: WritableDisk, *, workers: int = 1
    ) -> None:
        """``target`` is as large as ``source`` or larger; if ``source`` changes meanwhile, the caller notices.

        Args:
            workers: threads that copy at once; one leaves most of the machine to the guests.
        """
        header = target.top.header if isinstance(target, OverlayDisk) else None
        self._stretches = Stretches(source, range(layer_count), copied_to=header)
        self._source = source
        self._target = target
        self._workers = workers
        self._buffers: list[memoryview] = []
        """Not in use; from any thread."""

    def measure(self, start: int = 0) -> int:
        """Bytes that there are to copy from the guest offset ``start`` on.

        Raises:
            OSError: a table cannot be read.
        """
        return self._stretches.measure(start)

    def copy(self, start: int, end: int, control: Control) -> Iterator[int]:
        """Copy what lies between two guest offsets, piece by piece; gives the offset up to which that has been done.

        Nothing is durable before the target is flushed.

        Raises:
            Cancelled: ``control`` said so.
            OSError: EIO where the source is corrupt or cannot be read; or the target cannot be written.
        """
        with closing(in_order(self._pieces(start, end), workers=self._workers)) as ends:
            for low, high, cost in ends:
                control.advance(high - low, cost=cost)
                yield high

    def _pieces(self, start: int, end: int) -> Iterator[tuple[tuple[int, int, int], Callable[[], object]]]:
        """(guest range and what it costs, how to copy it) of each piece."""
        for stretch in self._stretches.within(start, end):
            if stretch.content == Content.ZEROS:
                for low, high in _cut(stretch, _ZEROS):
                    yield (low, high, 0), partial(self._target.zero, low, high - low, unmap=True)
            elif stretch.content == Content.COMPRESSED and (data := _compressed(self._stretches, stretch)):
                assert isinstance(self._target, OverlayDisk)
                for low, high in _cut(stretch, self._target.top.cluster_size):
                    yield (low, high, len(data)), partial(self._target.write_compressed, low, data)
            else:
                for low, high in _cut(stretch, _PIECE):
                    yield (low, high, high - low), partial(self._copy_data, low, high)

    def _copy_data(self, start: int, end: int) -> None:
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = new_buffer(_PIECE)
        view = buffer[: end - start]
        self._source.read_into(start, view)
        self._target.write(start, view)
        self._buffers.append(buffer)

    def copy_short(self, offset: int, length: int, control: Control) -> None:
        """Copy a short range that the layers decide, or that reads the same in the target; zeros are found by looking.

        Raises:
            Cancelled, OSError: as :meth:`copy`.
        """
        view = new_buffer(length)
        self._source.read_into(offset, view)
        if np.frombuffer(view, dtype=np.uint8).any():
            self._target.write(offset, view)
        else:
            self._target.zero(offset, length, unmap=True)
        control.advance(length)


class Fill:
    """From the layers under the top of a disk into that top, where it decides nothing itself: for streams.

    The guest may write to it meanwhile; what it reads does not change.
    """

    def __init__(self, source: ChainDisk | OverlayDisk, layers: range, target: OverlayDisk, *, zeros_end: int) -> None:
        """Layer 0 of ``source`` is the top of ``target``; from ``zeros_end`` on nothing will show through zeros later.

        ``zeros_end`` is where a layer of ``source`` ends, or 0.
        """
        self._stretches = Stretches(source, layers, zeros_end=zeros_end, copied_to=target.top.header)
        self._target = target

    def measure(self) -> int:
        """As :meth:`Transfer.measure`."""
        return self._stretches.measure()

    def copy(self, start: int, end: int, control: Control) -> Iterator[int]:
        """As :meth:`Transfer.copy`."""
        for stretch in self._stretches.within(start, end):
            if stretch.content == Content.COMPRESSED and (data := _compressed(self._stretches, stretch)):
                for low, high in _cut(stretch, self._target.top.cluster_size):
                    if not self._target.write_compressed(low, data, if_open=True):
                        self._target.populate(low, high - low)  # the guest has decided some subclusters meanwhile
                    control.advance(high - low, cost=len(data))
                    yield high
                continue
            is_zero = stretch.content == Content.ZEROS
            for low, high in _cut(stretch, _ZEROS if is_zero else _PIECE):
                self._target.populate(low, high - low)
                control.advance(high - low, cost=0 if is_zero else None)
                yield high


def _cut(stretch: Stretch, length: int) -> Iterator[tuple[int, int]]:
    """Parts of a stretch that end at multiples of ``length``."""
    start = stretch.start
    while start < stretch.end:
        end = min(stretch.end, start - start % length + length)
        yield start, end
        start = end


def _compressed(stretches: Stretches, stretch: Stretch) -> bytes:
    """A compressed cluster as it is in its file; nothing if it is longer than an image that stores it would take."""
    image = stretches.image(stretch)
    offset, length = image.geometry.compressed_range(stretch.host)
    # Whole sectors, of which the last may be cut short (Q51); what follows the stream in it does not matter.
    data = image.storage.read(offset, length)
    return data if len(data) <= image.cluster_size else b""

"""Which parts of a disk some of its layers decide, and as what: the plan of every copy from layer to layer.

Looks at the runs of the chain index, never at data.
"""

from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nbdq.block import Kind
from nbdq.chain.disk import ChainDisk
from nbdq.chain.index import Layer, Runs
from nbdq.chain.overlay import OverlayDisk
from nbdq.qcow2.format import Header
from nbdq.qcow2.image import Qcow2Image

_READS_ZERO = (
    *(Kind.UNALLOCATED, Kind.UNALLOCATED_OFFSET, Kind.ZERO, Kind.ZERO_OFFSET, Kind.HOLE),
    Kind.DATA_HOLE,
)


class Content(IntEnum):
    """How a stretch is to be copied."""

    OTHERS = 0
    """Not at all: layers that do not count decide it."""
    DATA = 1
    """By reading it; that fails where tables are corrupt."""
    ZEROS = 2
    COMPRESSED = 3
    """As compressed clusters, byte for byte; in one stretch all are the same."""


class Stretch(NamedTuple):
    """A range of guest space whose contents are all alike."""

    start: int
    end: int
    content: Content
    layer: int
    host: int
    """The descriptor of a compressed cluster."""


class Stretches:
    """The stretches that some layers of a disk decide: ``layers``, counted from its top.

    A layer decides what it has allocated, or holds as zeros. The zeros behind the end of a layer that is shorter than
    those above it (S1) are decided by the last layer that is long enough, whichever that is.
    """

    def __init__(
        self,
        source: ChainDisk | OverlayDisk,
        layers: range,
        *,
        zeros_end: int | None = None,
        copied_to: Header | None = None,
    ) -> None:
        """Over ``source``, which may change if it is an :class:`OverlayDisk`; the caller has to notice what does.

        Args:
            zeros_end: what reads as zeros counts before this guest offset only; None: everywhere.
            copied_to: header of an image that could hold the compressed clusters of the layers as they are, if cluster
                size and compression are the same; None if none shall.
        """
        self._source = source
        self._layers = layers
        self._zeros_end = source.size if zeros_end is None else zeros_end
        # What the top of a running disk holds can be gone before its bytes are read.
        images: Sequence[Layer | None] = [None]
        if isinstance(source, ChainDisk):
            images = source.layers
        elif source.below is not None:
            images = [None, *source.below.layers]
        self._images = images
        self._cluster_size = copied_to.cluster_size if copied_to is not None else 0
        self._is_understood = np.array([_is_understood(image, copied_to) for image in images], dtype=np.bool_)

    def image(self, stretch: Stretch) -> Qcow2Image:
        """Where the compressed clusters of a stretch are."""
        image = self._images[stretch.layer]
        assert isinstance(image, Qcow2Image)
        return image

    def measure(self, start: int = 0) -> int:
        """Bytes of all stretches from the guest offset ``start`` on.

        Raises:
            OSError: a table cannot be read.
        """
        total = 0
        for runs, end in self._runs(start, self._source.size):
            lengths = np.append(runs.start[1:], np.uint64(end)) - runs.start
            total += int(lengths[self._contents(runs, end) != Content.OTHERS].sum())
        return total

    def within(self, start: int, end: int) -> Iterator[Stretch]:
        """The stretches between two guest offsets, ascending, as long as they can be.

        Raises:
            OSError: a table cannot be read.
        """
        pending: Stretch | None = None
        for stretch in self._pieces(self._runs(start, min(end, self._source.size))):
            joins = pending is not None and stretch.start == pending.end and stretch.content == pending.content
            if pending is not None and joins and stretch.content != Content.COMPRESSED:
                pending = pending._replace(end=stretch.end)
            else:
                if pending is not None:
                    yield pending
                pending = stretch
        if pending is not None:
            yield pending

    def _runs(self, start: int, end: int) -> Iterable[tuple[Runs, int]]:
        return self._source.runs(start, end - start) if start < end else ()

    def _pieces(self, chunks: Iterable[tuple[Runs, int]]) -> Iterator[Stretch]:
        for runs, end in chunks:
            content = self._contents(runs, end)
            first = np.append(True, content[1:] != content[:-1]) | (content == Content.COMPRESSED)
            cut, content = runs.where(first), content[first]
            wanted = content != Content.OTHERS
            columns = (cut.start, np.append(cut.start[1:], np.uint64(end)), content, cut.layer, cut.host)
            yield from map(Stretch, *(column[wanted].tolist() for column in columns))

    def _contents(self, runs: Runs, end: int) -> NDArray[np.uint8]:
        first, stop = self._layers.start, self._layers.stop
        zero = np.isin(runs.kind, _READS_ZERO)
        ours = (runs.layer < stop) & ((runs.layer >= first) | (runs.kind <= Kind.UNALLOCATED_OFFSET))
        content = np.where(zero, np.uint8(Content.ZEROS), np.uint8(Content.DATA))
        content[~ours | zero & (runs.start >= self._zeros_end)] = Content.OTHERS
        compressed = ours & (runs.kind == Kind.COMPRESSED)
        if self._cluster_size and compressed.any():
            compressed[compressed] = self._is_understood[runs.layer[compressed]]
            inside = np.uint64(self._cluster_size - 1)
            ends = np.append(runs.start[1:], np.uint64(end))
            # A part of a cluster, whose other parts a layer above decides, has to be inflated.
            whole = (runs.start & inside == 0) & ((ends & inside == 0) | (ends == self._source.size))
            content[compressed & whole] = Content.COMPRESSED
        return content


def _is_understood(image: Layer | None, target: Header | None) -> bool:
    if not isinstance(image, Qcow2Image) or target is None or target.has_data_file:
        return False
    header = image.header
    return header.cluster_bits == target.cluster_bits and header.compression_type == target.compression_type

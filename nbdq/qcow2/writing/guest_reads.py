"""What a guest range of a writable image reads as: from its tables in memory, or from the disk below."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from nbdq.block import Granules, Kind
from nbdq.qcow2.entries import decode_l2
from nbdq.qcow2.writing.writable import WritableImage

_UNALLOCATED = (Kind.UNALLOCATED, Kind.UNALLOCATED_OFFSET)
_ZERO = (Kind.ZERO, Kind.ZERO_OFFSET)


class Piece(NamedTuple):
    """A guest range of one kind."""

    start: int
    end: int
    kind: int
    host: int
    """Host offset of ``start``; for COMPRESSED the descriptor of its cluster."""


class GuestReads:
    """Reads of one image; for callers that may wait. Pins what it looks up."""

    def __init__(self, image: WritableImage, inflate: Callable[[int], bytes]) -> None:
        """``inflate`` gives the cluster of a descriptor."""
        self._image = image
        self._inflate = inflate

    def granules(self, start: int, end: int) -> Granules | None:
        """The allocated granules of ``[start, end)``, which begins at a cluster; None if there are none.

        Raises:
            OSError: a table cannot be read.
        """
        image = self._image
        found = []
        for l1_index, first, count in image.mapping.by_tables(start, end):
            entries = image.entries(l1_index, first, count)
            if entries is not None:
                guest = l1_index * image.geometry.l2_coverage + (first << image.geometry.cluster_bits)
                part = decode_l2(entries.byteswap().tobytes(), guest, image.geometry)
                if len(part.position):
                    found.append(part._replace(position=part.position + (guest - start) // image.geometry.granule))
        if len(found) <= 1:
            return found[0] if found else None
        return Granules(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))

    def pieces(self, offset: int, length: int) -> Iterator[Piece]:
        """The range in order; neighbours that continue each other are one."""
        image = self._image
        granule = image.geometry.granule
        start = offset - offset % image.cluster_size
        end = offset + length
        found = self.granules(start, end)
        pending = Piece(offset, offset, Kind.UNALLOCATED, 0)
        if found is not None:
            for position, kind, host in zip(*(array.tolist() for array in found), strict=True):
                low, high = max(start + position * granule, offset), min(start + (position + 1) * granule, end)
                if low >= high:
                    continue
                host = host if kind == Kind.COMPRESSED else host + low - start - position * granule
                if pending.end < low:  # nothing is allocated in between
                    if pending.kind != Kind.UNALLOCATED:
                        yield pending
                        pending = Piece(pending.end, low, Kind.UNALLOCATED, 0)
                    else:
                        pending = pending._replace(end=low)
                continues = host if kind in (Kind.COMPRESSED, Kind.ZERO) else host - (pending.end - pending.start)
                if kind == pending.kind and continues == pending.host:
                    pending = pending._replace(end=high)
                else:
                    if pending.start < pending.end:
                        yield pending
                    pending = Piece(low, high, kind, host)
        if pending.end < end:
            if pending.kind == Kind.UNALLOCATED:
                pending = pending._replace(end=end)
            else:
                yield pending
                pending = Piece(pending.end, end, Kind.UNALLOCATED, 0)
        if pending.start < pending.end:
            yield pending

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``.

        Raises:
            OSError: EIO where metadata is corrupt or the medium fails.
        """
        image = self._image
        if self._is_untouched(offset, len(view)):
            self.read_below(offset, view)
            return
        with image.epochs.pinned():
            for start, end, kind, host in self.pieces(offset, len(view)):
                self._read_piece(start, kind, host, view[start - offset : end - offset])

    def _read_piece(self, start: int, kind: int, host: int, view: memoryview) -> None:
        image = self._image
        if kind == Kind.DATA:
            count = image.data.read_into(host, view)
            view[count:] = bytes(len(view) - count)
        elif kind == Kind.COMPRESSED:
            cluster = self._inflate(host)
            while view:
                inside = start % len(cluster)
                count = min(len(cluster) - inside, len(view))
                view[:count] = memoryview(cluster)[inside : inside + count]
                start, view = start + count, view[count:]
        elif kind in _UNALLOCATED:
            self.read_below(start, view)
        elif kind in _ZERO:
            view[:] = bytes(len(view))
        else:
            raise image.corrupt_entry(start)

    def read_below(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with what shows through from below; zeros where nothing does (S4)."""
        below = self._image.below
        count = 0 if below is None else max(0, min(len(view), below.size - offset))
        if below is not None and count:
            below.read_into(offset, view[:count])
        view[count:] = bytes(len(view) - count)

    def reads_zero(self, offset: int, length: int) -> bool:
        """Whether tables alone say that the range reads as zeros.

        Raises:
            OSError: a table cannot be read.
        """
        if self._is_untouched(offset, length):
            return self.zero_below(offset, offset + length)
        return all(
            kind in _ZERO or (kind in _UNALLOCATED and self.zero_below(start, end))
            for start, end, kind, _ in self.pieces(offset, length)
        )

    def _is_untouched(self, offset: int, length: int) -> bool:
        """Whether a range inside one cluster is allocated nowhere in this image: the quick way for a copy on write."""
        image = self._image
        bits = image.geometry.cluster_bits
        cluster = offset >> bits
        if offset + length - 1 >> bits != cluster:
            return False
        l1_index, index = divmod(cluster, image.geometry.l2_count)
        table = image.mapping.tables.get(l1_index)
        if table is None:
            return False
        if image.geometry.extended_l2:
            return not table.words[2 * index] and not table.words[2 * index + 1]
        return not table.words[index]

    def zero_below(self, start: int, end: int) -> bool:
        """Whether what shows through from below reads as zeros, as far as metadata tells."""
        below = self._image.below
        if below is None or start >= below.size:
            return True
        return below.reads_zero(start, min(end, below.size) - start)

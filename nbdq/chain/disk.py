"""A whole chain as one disk: every read, status query and map is a loop over the runs of the chain index.

Knows layers, the index and the inflated-cluster cache. Must not know NBD, sockets or event loops.
"""

import errno
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial

import numpy as np

from nbdq.block import Extent, FilePiece, Kind, Piece, Status
from nbdq.chain.clusters import ClusterCache
from nbdq.chain.index import ChainIndex, Layer, Runs, Window, runs_at
from nbdq.qcow2.image import Qcow2Image

#: Memory for the index windows of a disk, unless its owner says otherwise.
INDEX_BUDGET = 32 << 20
_FIRST_CHUNK = 32
#: Guest bytes inflated ahead of a sequential reader: a deep queue of small reads spans more than one cluster.
_READ_AHEAD = 256 << 10

#: Inflated bytes that a reply may keep alive without being counted.
_UNCOUNTED = 256 << 10
_ZEROS = memoryview(bytes(256 << 10))

_HAS_DATA = frozenset((Kind.DATA, Kind.DATA_HOLE, Kind.COMPRESSED))
_READS_ZERO = frozenset((Kind.UNALLOCATED, Kind.UNALLOCATED_OFFSET, Kind.ZERO, Kind.ZERO_OFFSET, Kind.HOLE))
_ZERO = frozenset((*_READS_ZERO, Kind.DATA_HOLE))
_HAS_OFFSET = frozenset((Kind.UNALLOCATED_OFFSET, Kind.ZERO_OFFSET, Kind.HOLE, Kind.DATA, Kind.DATA_HOLE))
_UNALLOCATED = frozenset((Kind.UNALLOCATED, Kind.UNALLOCATED_OFFSET))

_DATA = int(Kind.DATA)
_COMPRESSED = int(Kind.COMPRESSED)
_CORRUPT = int(Kind.CORRUPT)


class ChainDisk:
    """A read-only :class:`~nbdq.block.BlockDevice` over an immutable chain. Owns its layers until :meth:`close`."""

    def __init__(self, layers: Sequence[Layer], *, clusters: ClusterCache, index_budget: int = INDEX_BUDGET) -> None:
        """Take ownership of ``layers``, top first; ``clusters`` is shared with other disks and stays the caller's."""
        self.layers = layers
        self.size = layers[0].size
        self._files = [layer.data for layer in layers]
        self.index = ChainIndex(layers, budget=index_budget)
        """Where everything is; others may ask it how large it is."""
        self._windows = self.index.windows
        self._window_bits = self.index.window_bits
        self._clusters = clusters
        self._next_compressed = -1  # guest offset at which a sequential reader would enter the next cluster
        self._holes = FileHoles(layers)

    def read_cached(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` without ever waiting; False if only :meth:`read_into` can."""
        window = self._windows.get(offset >> self._window_bits)
        if window is None:
            return False
        run = window.find(offset)
        starts = window.starts
        length = len(view)
        if starts[run + 1] - offset >= length:
            kind = window.kinds[run]
            if kind == _DATA:
                host = window.hosts[run] + offset - starts[run]
                return self._files[window.layers[run]].read_cached(host, view)
            return self._read_piece_cached(window, run, offset, view)
        if offset + length > window.end:
            return False
        done = 0
        while done < length:
            count = min(length - done, starts[run + 1] - offset - done)
            if not self._read_piece_cached(window, run, offset + done, view[done : done + count]):
                return False
            done += count
            run += 1
        return True

    def _read_piece_cached(self, window: Window, run: int, offset: int, view: memoryview) -> bool:
        kind = window.kinds[run]
        if kind == _DATA:
            host = window.hosts[run] + offset - window.starts[run]
            return self._files[window.layers[run]].read_cached(host, view)
        if kind == _COMPRESSED:
            cluster = self._clusters.peek(self._compressed_at(window, run))
            if cluster is None or offset % len(cluster) + len(view) > len(cluster):
                return False
            self._read_from_cluster(cluster, offset, view)
            return True
        if kind == _CORRUPT:
            return False
        view[:] = bytes(len(view))
        return True

    def _read_ahead(self, start: int, cluster_size: int) -> None:
        """Note a use of the compressed cluster at guest ``start``; inflate the next ones for a sequential reader."""
        following = start + cluster_size
        if start == self._next_compressed:
            for position in range(following, following + _READ_AHEAD, cluster_size):
                window = self._windows.get(position >> self._window_bits)
                if window is None or position >= window.end:
                    break
                run = window.find(position)
                if window.kinds[run] != _COMPRESSED:
                    break
                image, descriptor = key = self._compressed_at(window, run)
                self._clusters.get_ahead(key, partial(image.read_compressed, descriptor))
        self._next_compressed = following

    def gather_cached(self, offset: int, length: int) -> list[Piece] | None:
        """The range as pieces of files and of memory, if all of it is in memory; never waits.

        The pieces keep little memory alive that caches would let go, so that nobody needs to count it.
        """
        end = offset + length
        window = self._windows.get(offset >> self._window_bits)
        if window is None or end > window.end:
            return None
        pieces: list[Piece] = []
        inflated = 0
        run = window.find(offset)
        while offset < end:
            count = min(end, window.starts[run + 1]) - offset
            kind = window.kinds[run]
            if kind == _DATA:
                storage = self._files[window.layers[run]]
                host = window.hosts[run] + offset - window.starts[run]
                if not storage.is_cached(host, count):  # as a range is that reaches past the end of the file (P101)
                    return None
                pieces.append(FilePiece(storage, host, count))
            elif kind == _COMPRESSED:
                inflated += count
                cluster = self._clusters.peek(self._compressed_at(window, run)) if inflated <= _UNCOUNTED else None
                if cluster is None or offset % len(cluster) + count > len(cluster):
                    return None
                pieces.append(_part(cluster, offset, count))
            elif kind == _CORRUPT:
                return None
            else:
                pieces += zero_pieces(count)
            offset += count
            run += 1
        return pieces

    def gather(self, offset: int, length: int) -> list[Piece]:
        """The range as pieces of memory, of which inflated clusters are shared and not copied; may wait.

        Raises:
            OSError: EIO where metadata is corrupt or the medium fails.
        """
        end = offset + length
        pieces: list[Piece] = []
        while offset < end:
            window = self.index.window(offset)
            run = window.find(offset)
            count = min(end, window.starts[run + 1]) - offset
            kind = window.kinds[run]
            if kind == _COMPRESSED:
                cluster = self._inflate(window, run)
                count = min(count, len(cluster) - offset % len(cluster))
                pieces.append(_part(cluster, offset, count))
            elif kind in _READS_ZERO:
                pieces += zero_pieces(count)
            else:
                view = new_buffer(count)
                self._read_piece(window, run, offset, view)
                pieces.append(view)
            offset += count
        return pieces

    def _compressed_at(self, window: Window, run: int) -> tuple[Qcow2Image, int]:
        """Image and descriptor of a compressed run; also its key in the cluster cache."""
        image = self.layers[window.layers[run]]
        assert isinstance(image, Qcow2Image)
        return image, window.hosts[run]

    def _inflate(self, window: Window, run: int) -> bytes:
        image, descriptor = key = self._compressed_at(window, run)
        return self._clusters.get(key, lambda: image.read_compressed(descriptor))

    def _read_from_cluster(self, cluster: bytes, offset: int, view: memoryview) -> None:
        """Copy what ``view`` wants from an inflated cluster; such reads are small enough to be some of a sequence."""
        self._read_ahead(offset - offset % len(cluster), len(cluster))
        view[:] = _part(cluster, offset, len(view))

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``; may wait for a disk and inflate.

        Raises:
            OSError: EIO where metadata is corrupt or the medium fails.
        """
        done, length = 0, len(view)
        while done < length:
            window = self.index.window(offset + done)
            run = window.find(offset + done)
            count = min(length - done, window.starts[run + 1] - offset - done)
            self._read_piece(window, run, offset + done, view[done : done + count])
            done += count

    def _read_piece(self, window: Window, run: int, offset: int, view: memoryview) -> None:
        kind, depth, host = window.kinds[run], window.layers[run], window.hosts[run]
        if kind == _DATA:
            count = self._files[depth].read_into(host + offset - window.starts[run], view)
            view[count:] = bytes(len(view) - count)
        elif kind == _COMPRESSED:
            cluster = self._inflate(window, run)
            while view:  # equal descriptors of neighbouring clusters are one run
                count = min(len(cluster) - offset % len(cluster), len(view))
                self._read_from_cluster(cluster, offset, view[:count])
                offset, view = offset + count, view[count:]
        elif kind == _CORRUPT:
            raise OSError(errno.EIO, f"corrupt table entry for guest offset {offset}", self.layers[depth].path)
        else:
            view[:] = bytes(len(view))

    def reads_zero(self, offset: int, length: int) -> bool:
        """Whether metadata alone says that the range reads as zeros; False is no promise of the contrary.

        Raises:
            OSError: a table cannot be read.
        """
        end = offset + length
        return all(_reads_zero(window, offset, end) for window in self.index.spans(offset, end))

    def reads_zero_cached(self, offset: int, length: int) -> bool:
        """The same without ever waiting: False also if it is not known."""
        position, end = offset, offset + length
        while position < end:
            window = self._windows.get(position >> self._window_bits)
            if window is None or not _reads_zero(window, offset, end):
                return False
            position = window.end
        return True

    def runs(self, offset: int, length: int) -> Iterator[tuple[Runs, int]]:
        """(runs, end) chunks that cover the range exactly, with holes of preallocated files made visible (P5).

        The first chunk is short, for those who want no more than the first extent.

        Raises:
            OSError: a table cannot be read.
        """
        end = offset + length
        chunk = _FIRST_CHUNK
        for window in self.index.spans(offset, end):
            stop = min(window.end, end)
            first, last = window.find(offset), window.find(stop - 1) + 1
            while first < last:
                following = min(first + chunk, last)
                chunk_end = stop if following == last else window.starts[following]
                runs = window.runs
                if following - first < len(window.kinds) or window.starts[first] < offset:
                    start = runs.start[first:following].copy()
                    start[0] = max(window.starts[first], offset)
                    runs = runs_at(runs.where(slice(first, following)), start)
                yield self._holes.split(runs, chunk_end), chunk_end
                first, chunk = following, sys.maxsize
            offset = stop

    def status_cached(self, offset: int, length: int) -> bool:
        """Whether :meth:`status` can answer for the range from memory, without a question to a file system."""
        if not self._holes.are_none:
            return False
        last = (offset + length - 1) >> self._window_bits
        return all(number in self._windows for number in range(offset >> self._window_bits, last + 1))

    def status(self, offset: int, length: int) -> Iterator[Status]:
        """Block status of the range, in ascending chunks that together cover it exactly.

        Raises:
            OSError: EIO where metadata is corrupt, after everything before it; or a table cannot be read.
        """
        return statuses(self._sound_runs(offset, length), len(self.layers))

    def _sound_runs(self, offset: int, length: int) -> Iterator[tuple[Runs, int]]:
        return sound_runs(self.runs(offset, length), lambda layer: self.layers[layer].path)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """What ``qemu-img map`` says of the range: merged where nothing but the position differs (4.1).

        Raises:
            OSError: EIO where metadata is corrupt, after everything before it; or a table cannot be read.
        """
        return extents_of(self._sound_runs(offset, length), lambda layer: self._files[layer].path)

    def prefetch(self, offset: int, length: int) -> None:
        """Ask the kernel for the file ranges behind a guest range. A hint: what cannot be found out is left out."""
        with suppress(OSError):
            for runs, end in self.runs(offset, length):
                for low, high, kind, depth, host in runs.each(end):
                    if kind == _DATA:
                        self._files[depth].prefetch(host, high - low)

    def close(self) -> None:
        """Close every layer. No call may be in progress."""
        for layer in self.layers:
            layer.close()


def _reads_zero(window: Window, offset: int, end: int) -> bool:
    """Whether metadata says that the part of the range inside ``window`` reads as zeros."""
    first, last = window.find(max(offset, window.start)), window.find(min(end, window.end) - 1)
    return _READS_ZERO.issuperset(window.kinds[first : last + 1])


class FileHoles:
    """Holes of files whose metadata was preallocated: data that is known to read as zeros (P5)."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._preallocated: frozenset[int] | None = None

    @property
    def are_none(self) -> bool:
        """Whether it is known already that no file has to be asked."""
        return self._preallocated is not None and not self._preallocated

    def split(self, runs: Runs, end: int) -> Runs:
        """The runs, with their holes as runs of their own; the last one reaches to ``end``."""
        depths = self._depths()
        if not depths or depths.isdisjoint(runs.layer[runs.kind == _DATA].tolist()):
            return runs
        starts: list[int] = []
        holes: list[bool] = []
        for low, high, kind, depth, host in runs.each(end):
            if kind == _DATA and depth in depths:
                for start, _, is_data in self._layers[depth].data.data_ranges(host, host + high - low):
                    starts.append(low + start - host)
                    holes.append(not is_data)
            else:
                starts.append(low)
                holes.append(False)
        split = runs_at(runs, np.array(starts, dtype=np.uint64))
        return split._replace(kind=np.where(holes, np.uint8(Kind.DATA_HOLE), split.kind))

    def _depths(self) -> frozenset[int]:
        """The layers whose files must be asked; looked up once, when first asked."""
        if self._preallocated is None:
            self._preallocated = frozenset(
                depth
                for depth, layer in enumerate(self._layers)
                if isinstance(layer, Qcow2Image) and layer.is_metadata_preallocated()
            )
        return self._preallocated


def sound_runs(chunks: Iterable[tuple[Runs, int]], path_of: Callable[[int], str]) -> Iterator[tuple[Runs, int]]:
    """The chunks up to the first corrupt run; ``path_of`` gives a layer's file for the message.

    Raises:
        OSError: EIO where metadata is corrupt, after everything before it; or as ``chunks`` raises.
    """
    for runs, end in chunks:
        corrupt = np.flatnonzero(runs.kind == _CORRUPT)
        if not len(corrupt):
            yield runs, end
            continue
        first = int(corrupt[0])
        start = int(runs.start[first])
        if first:
            yield runs.where(slice(first)), start
        raise OSError(errno.EIO, f"corrupt table entry for guest offset {start}", path_of(int(runs.layer[first])))


def extents_of(chunks: Iterable[tuple[Runs, int]], path_of: Callable[[int], str]) -> Iterator[Extent]:
    """What ``qemu-img map`` says of runs; ``path_of`` gives the file that the offsets of a layer point into."""
    pending: Extent | None = None
    for runs, end in chunks:
        for low, high, kind, depth, host in runs.each(end):
            extent = Extent(
                low,
                high - low,
                depth,
                present=kind not in _UNALLOCATED,
                zero=kind in _ZERO,
                data=kind in _HAS_DATA,
                compressed=kind == _COMPRESSED,
                offset=host if kind in _HAS_OFFSET else None,
                path=path_of(depth),
            )
            if pending is not None and _continues(pending, extent):
                pending = pending._replace(length=extent.start + extent.length - pending.start)
            else:
                if pending is not None:
                    yield pending
                pending = extent
    if pending is not None:
        yield pending


def statuses(chunks: Iterable[tuple[Runs, int]], layer_count: int) -> Iterator[Status]:
    """Block status of runs of a chain of so many layers."""
    bottom = layer_count - 1
    for runs, end in chunks:
        depth = runs.layer + np.uint16(1)
        unallocated = runs.kind <= Kind.UNALLOCATED_OFFSET
        # A layer that ends too early counts as the one that provides the zeros behind its end (P7).
        depth[unallocated] = np.where(runs.layer[unallocated] == bottom, 0, runs.layer[unallocated] + np.uint16(2))
        yield Status(runs.start, runs.kind, depth, end, runs.host)


def _part(cluster: bytes, offset: int, length: int) -> memoryview:
    """What an inflated cluster holds of the guest range."""
    inside = offset % len(cluster)
    return memoryview(cluster)[inside : inside + length]


def new_buffer(length: int) -> memoryview:
    """Memory to read into; its bytes are whatever was there, because clearing large buffers takes a third of a read."""
    return np.empty(length, dtype=np.uint8).data


def zero_pieces(length: int) -> list[memoryview]:
    """Zeros, without memory of their own."""
    whole, rest = divmod(length, len(_ZEROS))
    return [_ZEROS] * whole + ([_ZEROS[:rest]] if rest else [])


def _continues(extent: Extent, following: Extent) -> bool:
    if extent[2:7] != following[2:7] or (extent.offset is None) != (following.offset is None):
        return False
    return extent.offset is None or extent.offset + extent.length == following.offset

"""A whole chain as one disk: every read, status query and map is a loop over the runs of the chain index.

Knows layers, the index and the inflated-cluster cache. Must not know NBD, sockets or event loops.
"""

import errno
import sys
from collections.abc import Iterator, Sequence
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
        self._file_sizes = [file.size() for file in self._files]
        self._index = ChainIndex(layers, budget=index_budget)
        self._windows = self._index.windows
        self._window_bits = self._index.window_bits
        self._clusters = clusters
        self._next_compressed = -1  # guest offset at which a sequential reader would enter the next cluster
        self._preallocated: frozenset[int] | None = None

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
            image = self.layers[window.layers[run]]
            cluster = self._clusters.peek((image, window.hosts[run]))
            if cluster is None or offset % len(cluster) + len(view) > len(cluster):
                return False
            view[:] = self._cluster_piece(cluster, offset, len(view))
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
                image, descriptor = self.layers[window.layers[run]], window.hosts[run]
                assert isinstance(image, Qcow2Image)
                self._clusters.get_ahead((image, descriptor), partial(image.read_compressed, descriptor))
        self._next_compressed = following

    def gather_cached(self, offset: int, length: int) -> list[Piece] | None:
        """The range as pieces of files and of memory, if all of it is in memory; never waits."""
        end = offset + length
        window = self._windows.get(offset >> self._window_bits)
        if window is None or end > window.end:
            return None
        pieces: list[Piece] = []
        run = window.find(offset)
        while offset < end:
            count = min(end, window.starts[run + 1]) - offset
            kind = window.kinds[run]
            if kind == _DATA:
                piece = self._file_piece(window, run, offset, count)
                if piece is None or not piece.storage.is_cached(piece.offset, count):
                    return None
                pieces.append(piece)
            elif kind == _COMPRESSED:
                cluster = self._clusters.peek((self.layers[window.layers[run]], window.hosts[run]))
                if cluster is None or offset % len(cluster) + count > len(cluster):
                    return None
                inside = offset % len(cluster)
                pieces.append(memoryview(cluster)[inside : inside + count])
            elif kind == _CORRUPT:
                return None
            else:
                pieces.append(memoryview(bytes(count)))
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
            window = self._index.window(offset)
            run = window.find(offset)
            count = min(end, window.starts[run + 1]) - offset
            if window.kinds[run] == _COMPRESSED:
                image = self.layers[window.layers[run]]
                assert isinstance(image, Qcow2Image)
                count = min(count, image.cluster_size - offset % image.cluster_size)
                inside = offset % image.cluster_size
                pieces.append(memoryview(self._inflate(image, window.hosts[run]))[inside : inside + count])
            else:
                view = memoryview(bytearray(count))
                self._read_piece(window, run, offset, view)
                pieces.append(view)
            offset += count
        return pieces

    def _file_piece(self, window: Window, run: int, offset: int, length: int) -> FilePiece | None:
        layer = window.layers[run]
        host = window.hosts[run] + offset - window.starts[run]
        # A file that ends inside the range reads as zeros there; a short sendfile would break the reply (P101).
        return FilePiece(self._files[layer], host, length) if host + length <= self._file_sizes[layer] else None

    def _cluster_piece(self, cluster: bytes, offset: int, length: int) -> memoryview:
        """Part of an inflated cluster, for a read that is small enough to be one of a sequence."""
        inside = offset % len(cluster)
        self._read_ahead(offset - inside, len(cluster))
        return memoryview(cluster)[inside : inside + length]

    def _inflate(self, image: Qcow2Image, descriptor: int) -> bytes:
        return self._clusters.get((image, descriptor), lambda: image.read_compressed(descriptor))

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``; may wait for a disk and inflate.

        Raises:
            OSError: EIO where metadata is corrupt or the medium fails.
        """
        done, length = 0, len(view)
        while done < length:
            window = self._index.window(offset + done)
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
            image = self.layers[depth]
            assert isinstance(image, Qcow2Image)
            size = image.cluster_size
            done = 0
            while done < len(view):  # equal descriptors of neighbouring clusters are one run
                count = min(size - (offset + done) % size, len(view) - done)
                view[done : done + count] = self._cluster_piece(self._inflate(image, host), offset + done, count)
                done += count
        elif kind == _CORRUPT:
            raise OSError(errno.EIO, f"corrupt table entry for guest offset {offset}", self.layers[depth].path)
        else:
            view[:] = bytes(len(view))

    def runs(self, offset: int, length: int) -> Iterator[tuple[Runs, int]]:
        """(runs, end) chunks that cover the range exactly, with holes of preallocated files made visible (P5).

        The first chunk is short, for those who want no more than the first extent.

        Raises:
            OSError: a table cannot be read.
        """
        end = offset + length
        chunk = _FIRST_CHUNK
        for window in self._index.spans(offset, end):
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
                yield self._split_at_file_holes(runs, chunk_end), chunk_end
                first, chunk = following, sys.maxsize
            offset = stop

    def _split_at_file_holes(self, runs: Runs, end: int) -> Runs:
        depths = self._preallocated_layers()
        if not depths or depths.isdisjoint(runs.layer[runs.kind == _DATA].tolist()):
            return runs
        starts: list[int] = []
        holes: list[bool] = []
        for low, high, kind, depth, host in runs.each(end):
            if kind == _DATA and depth in depths:
                for start, _, is_data in self._files[depth].data_ranges(host, host + high - low):
                    starts.append(low + start - host)
                    holes.append(not is_data)
            else:
                starts.append(low)
                holes.append(False)
        split = runs_at(runs, np.array(starts, dtype=np.uint64))
        return split._replace(kind=np.where(holes, np.uint8(Kind.DATA_HOLE), split.kind))

    def _sound_runs(self, offset: int, length: int) -> Iterator[tuple[Runs, int]]:
        """As :meth:`runs`, up to the first corrupt one.

        Raises:
            OSError: EIO where metadata is corrupt, after everything before it; or a table cannot be read.
        """
        for runs, end in self.runs(offset, length):
            corrupt = np.flatnonzero(runs.kind == _CORRUPT)
            if not len(corrupt):
                yield runs, end
                continue
            first = int(corrupt[0])
            start = int(runs.start[first])
            if first:
                yield runs.where(slice(first)), start
            path = self.layers[int(runs.layer[first])].path
            raise OSError(errno.EIO, f"corrupt table entry for guest offset {start}", path)

    def _preallocated_layers(self) -> frozenset[int]:
        """The layers whose files must be asked for holes (P5); looked up once, when first asked."""
        if self._preallocated is None:
            self._preallocated = frozenset(
                depth
                for depth, layer in enumerate(self.layers)
                if isinstance(layer, Qcow2Image) and layer.is_metadata_preallocated()
            )
        return self._preallocated

    def status_cached(self, offset: int, length: int) -> bool:
        """Whether :meth:`status` can answer for the range from memory, without a question to a file system."""
        if self._preallocated is None or self._preallocated:
            return False
        last = (offset + length - 1) >> self._window_bits
        return all(number in self._windows for number in range(offset >> self._window_bits, last + 1))

    def status(self, offset: int, length: int) -> Iterator[Status]:
        """Block status of the range, in ascending chunks that together cover it exactly.

        Raises:
            OSError: EIO where metadata is corrupt, after everything before it; or a table cannot be read.
        """
        bottom = len(self.layers) - 1
        for runs, end in self._sound_runs(offset, length):
            depth = runs.layer + np.uint16(1)
            unallocated = runs.kind <= Kind.UNALLOCATED_OFFSET
            # A layer that ends too early counts as the one that provides the zeros behind its end (P7).
            depth[unallocated] = np.where(runs.layer[unallocated] == bottom, 0, runs.layer[unallocated] + np.uint16(2))
            yield Status(runs.start, runs.kind, depth, end)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """What ``qemu-img map`` says of the range: merged where nothing but the position differs (4.1).

        Raises:
            OSError: EIO where metadata is corrupt, after everything before it; or a table cannot be read.
        """
        pending: Extent | None = None
        for runs, end in self._sound_runs(offset, length):
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
                    path=self._files[depth].path,
                )
                if pending is not None and _continues(pending, extent):
                    pending = pending._replace(length=extent.start + extent.length - pending.start)
                else:
                    if pending is not None:
                        yield pending
                    pending = extent
        if pending is not None:
            yield pending

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


def _continues(extent: Extent, following: Extent) -> bool:
    if extent[2:7] != following[2:7] or (extent.offset is None) != (following.offset is None):
        return False
    return extent.offset is None or extent.offset + extent.length == following.offset

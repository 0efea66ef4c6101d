"""The chain index: guest space → runs over all layers, so that a look-up costs the same at any depth.

Guest space is cut into *windows* of one size. A window is built when it is first asked for, from those layers whose
tables cover it, top first, each layer filling only what the layers above left open; then it is immutable, like the
layers. Windows are kept within a byte budget, from which the oldest is dropped first: keeping order by use would cost
every look-up a lock. Nothing here depends on the virtual size.

A layer that is shorter than the disk ends the chain there (S1): guest space falls into *segments*, delimited by the
layers' sizes, in each of which a constant number of layers takes part.
"""

import threading
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nbdq.block import Granules, Kind
from nbdq.chain.raw import RawImage
from nbdq.qcow2.distinct import union
from nbdq.qcow2.image import Qcow2Image

Layer = Qcow2Image | RawImage

#: Granules per window: what an L2 table of 64 KiB clusters maps, and little enough to build in well under 1 ms a layer.
_WINDOW_GRANULES = 8192
#: Granule that an all-raw chain is cut by; only the window size follows from it.
_RAW_GRANULE = 64 << 10
#: Windows per occupancy map, so that a map of an empty 16 TiB disk is a handful of vector operations.
_OCCUPANCY_WINDOWS = 4096
#: Maps kept, at 4 KiB each; only disks beyond 8 TiB, or 1 EiB with clusters of 64 KiB, ever have more.
_OCCUPANCY_MAPS = 512
#: A run costs 8 + 8 + 2 + 1 bytes; array.append makes it a little more.
_RUN_BYTES = 20
_WINDOW_BYTES = 2000

_POINTS_INTO_FILE = (Kind.UNALLOCATED_OFFSET, Kind.ZERO_OFFSET, Kind.HOLE, Kind.DATA, Kind.DATA_HOLE)


class Runs(NamedTuple):
    """Merged, contiguous mappings: parallel arrays, ascending by guest offset."""

    start: NDArray[np.uint64]
    kind: NDArray[np.uint8]
    layer: NDArray[np.uint16]
    """The layer that decides; for UNALLOCATED the lowest one that is long enough (P2)."""
    host: NDArray[np.uint64]

    def where(self, mask: NDArray[np.bool_] | slice) -> "Runs":
        """Some of the runs, with their ends where they were."""
        return Runs(self.start[mask], self.kind[mask], self.layer[mask], self.host[mask])

    def each(self, end: int) -> Iterator[tuple[int, int, int, int, int]]:
        """(start, end, kind, layer, host) of each run; the last one reaches to ``end``."""
        starts = self.start.tolist()
        return zip(starts, [*starts[1:], end], self.kind.tolist(), self.layer.tolist(), self.host.tolist(), strict=True)


class Segment(NamedTuple):
    """``[start, end)`` of guest space, in which the top ``layer_count`` layers take part."""

    start: int
    end: int
    layer_count: int


class Window:
    """The runs of one window of guest space, ready for scalar look-ups. Immutable."""

    __slots__ = ("cost", "end", "hosts", "kinds", "layers", "runs", "start", "starts")

    def __init__(self, start: int, end: int, runs: Runs) -> None:
        self.start = start
        self.end = end
        self.starts = array("Q", runs.start.tobytes())
        self.starts.append(end)
        self.kinds = runs.kind.tobytes()
        self.layers = array("H", runs.layer.tobytes())
        self.hosts = array("Q", runs.host.tobytes())
        # The same memory once more, for vector operations.
        self.runs = Runs(
            np.frombuffer(memoryview(self.starts)[:-1], np.uint64),
            np.frombuffer(self.kinds, np.uint8),
            np.frombuffer(self.layers, np.uint16),
            np.frombuffer(self.hosts, np.uint64),
        )
        self.cost = _WINDOW_BYTES + len(self.kinds) * _RUN_BYTES

    def find(self, offset: int) -> int:
        """Number of the run that holds guest ``offset``."""
        return bisect_right(self.starts, offset) - 1


class ChainIndex:
    """Look-up over an immutable chain, top layer first. Thread-safe."""

    def __init__(self, layers: Sequence[Layer], *, budget: int) -> None:
        """``budget`` bounds the memory of cached windows, in bytes."""
        self.layers = layers
        self.size = layers[0].size
        granules = [layer.granule for layer in layers if isinstance(layer, Qcow2Image)] or [_RAW_GRANULE]
        self._granule = min(granules)
        self.window_bits = (self._granule * _WINDOW_GRANULES).bit_length() - 1
        self.windows: dict[int, Window] = {}
        """The cached windows by number; readers may look here without the lock."""
        self.windows_built = 0
        """How many, those included that were dropped. Look-ups are not counted: that would cost every one of them."""
        self._budget = budget
        self._cost = 0
        self._occupancy: dict[int, NDArray[np.bool_]] = {}
        self._lock = threading.Lock()
        self.segments = list(_segments([layer.size for layer in layers]))

    def window(self, offset: int) -> Window:
        """The window that holds guest ``offset``, built if it is not cached.

        Raises:
            OSError: a table of a layer cannot be read.
        """
        number = offset >> self.window_bits
        window = self.windows.get(number)
        if window is None:
            start = number << self.window_bits
            end = min(start + (1 << self.window_bits), self.size)
            window = Window(start, end, self._build(start, end))
            with self._lock:
                # Two threads may have built the same window; both results are equal, the first one stays.
                if number in self.windows:
                    return self.windows[number]
                self.windows[number] = window
                self.windows_built += 1
                self._cost += window.cost
                while self._cost > self._budget and len(self.windows) > 1:
                    self._cost -= self.windows.pop(next(iter(self.windows))).cost
        return window

    @property
    def cached_bytes(self) -> int:
        """Memory of the windows that are kept."""
        return self._cost

    def spans(self, offset: int, end: int) -> Iterator[Window]:
        """Windows from the one that holds ``offset`` up to ``end``; a stretch without data comes as one."""
        while offset < end:
            empty = self._empty_until(offset)
            if empty > offset:
                start = offset >> self.window_bits << self.window_bits
                yield Window(start, empty, self._untouched(start, empty))
                offset = empty
            else:
                window = self.window(offset)
                yield window
                offset = window.end

    def _empty_until(self, offset: int) -> int:
        """First guest offset at or after ``offset`` whose window may hold something; at most one occupancy map on."""
        number = offset >> self.window_bits
        if number in self.windows:
            return offset
        part, position = divmod(number, _OCCUPANCY_WINDOWS)
        occupied = self._occupancy.get(part)
        if occupied is None:
            if len(self._occupancy) >= _OCCUPANCY_MAPS:
                self._occupancy.clear()
            occupied = self._occupancy[part] = self._measure_occupancy(part)
        following = np.flatnonzero(occupied[position:])
        stop = number + (int(following[0]) if len(following) else len(occupied) - position)
        return max(offset, min(stop << self.window_bits, self.size))

    def _measure_occupancy(self, part: int) -> NDArray[np.bool_]:
        step = 1 << self.window_bits
        start = part * _OCCUPANCY_WINDOWS * step
        end = min(start + _OCCUPANCY_WINDOWS * step, self.size)
        occupied = np.zeros(-(-(end - start) // step), dtype=bool)
        for layer in self.layers:
            covered = min(end, -(-layer.size // step) * step)
            if covered > start:
                found = layer.occupancy(start, -(-covered // step) * step, step)
                occupied[: len(found)] |= found
        return occupied

    def _untouched(self, start: int, end: int) -> Runs:
        """Runs of a stretch without data: unallocated, or one hole where a raw layer is at the bottom (M4)."""
        parts = [part for part in self.segments if part.start < end and part.end > start]
        starts = np.array([max(part.start, start) for part in parts], dtype=np.uint64)
        owner = np.array([part.layer_count - 1 for part in parts], dtype=np.uint16)
        raw = np.array([isinstance(self.layers[part.layer_count - 1], RawImage) for part in parts])
        kind = np.where(raw, np.uint8(Kind.HOLE), np.uint8(Kind.UNALLOCATED))
        return Runs(starts, kind, owner, np.where(raw, starts, np.uint64(0)))

    def _build(self, start: int, end: int) -> Runs:
        parts = [
            self._compose(max(segment.start, start), min(segment.end, end), self.layers[: segment.layer_count])
            for segment in self.segments
            if segment.start < end and segment.end > start
        ]
        return parts[0] if len(parts) == 1 else Runs(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def _compose(self, start: int, end: int, layers: Sequence[Layer]) -> Runs:
        """Runs of ``[start, end)``, inside one segment, whose layers all reach beyond it."""
        granule = self._granule
        base = start // granule * granule
        count = -(-(end - base) // granule)
        bottom = len(layers) - 1
        kind = np.zeros(count, dtype=np.uint8)
        owner = np.full(count, bottom, dtype=np.uint16)
        host = np.zeros(count, dtype=np.uint64)
        open_ = np.ones(count, dtype=bool)
        for depth, layer in enumerate(layers):
            if isinstance(layer, RawImage):
                break  # a raw layer is always the last one, and fills in what is open below
            align = layer.cluster_size
            low = base // align * align
            found = layer.map(low, -(-end // align) * align)
            if found is None:
                continue
            index, kinds, hosts = _to_granules(found, (base - low) // granule, layer.granule // granule, granule)
            wanted = (index >= 0) & (index < count)
            if depth < bottom:
                wanted &= kinds != Kind.UNALLOCATED_OFFSET
            wanted[wanted] = open_[index[wanted]]
            index = index[wanted]
            kind[index], host[index], owner[index] = kinds[wanted], hosts[wanted], depth
            open_[index] = False
            if not open_.any():
                break
        runs = merge_granules(base, kind, owner, host, granule)
        if isinstance(layers[-1], RawImage):
            runs = _fill_from_raw(runs, base, base + count * granule, layers[-1], bottom)
        return clip_runs(runs, start, end)


def _segments(sizes: Sequence[int]) -> Iterator[Segment]:
    """Cut guest space where a layer ends and hides everything below it (S1); short layers first seen from the top."""
    end = sizes[0]
    cuts = []
    shortest = sizes[0]
    for depth, size in enumerate(sizes[1:], 1):
        if size < shortest:
            cuts.append((size, depth))
            shortest = size
    # Below the smallest size all layers take part; each cut, going up, takes away the layers from its depth on.
    start, count = 0, len(sizes)
    for size, depth in reversed(cuts):
        if size > start:
            yield Segment(start, size, count)
        start, count = size, depth
    if end > start:
        yield Segment(start, end, count)


def _to_granules(
    found: Granules, skip: int, ratio: int, granule: int
) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.uint64]]:
    """Spread a layer's granules over the index's smaller ones; ``skip`` of those lie before the range."""
    if ratio == 1:
        return (found.position - skip if skip else found.position), found.kind, found.host
    step = np.arange(ratio, dtype=np.int64)
    index = (found.position[:, np.newaxis] * ratio + step).reshape(-1) - skip
    into_file = np.isin(found.kind, _POINTS_INTO_FILE)[:, np.newaxis]
    host = found.host[:, np.newaxis] + np.where(into_file, (step * granule).astype(np.uint64), np.uint64(0))
    return index, np.repeat(found.kind, ratio), host.reshape(-1)


def merge_granules(
    base: int, kind: NDArray[np.uint8], owner: NDArray[np.uint16], host: NDArray[np.uint64], granule: int
) -> Runs:
    """Join neighbouring granules that continue each other. One compressed cluster is one run."""
    step = np.where(np.isin(kind[1:], _POINTS_INTO_FILE), np.uint64(granule), np.uint64(0))
    joined = (kind[1:] == kind[:-1]) & (owner[1:] == owner[:-1]) & (host[1:] == host[:-1] + step)
    first = np.concatenate(([0], np.flatnonzero(~joined) + 1))
    start = first.astype(np.uint64) * np.uint64(granule) + np.uint64(base)
    return Runs(start, kind[first], owner[first], host[first])


def _fill_from_raw(runs: Runs, base: int, end: int, layer: RawImage, depth: int) -> Runs:
    """Replace what no QCOW2 layer decided by the data and holes of the raw layer at the bottom."""
    ranges = layer.ranges(base, end)
    cuts = np.array([low for low, _, _ in ranges], dtype=np.uint64)
    is_data = np.array([data for _, _, data in ranges], dtype=bool)
    start = union(runs.start, cuts)
    above = runs_at(runs, start)
    undecided = above.kind == Kind.UNALLOCATED
    below = is_data[np.searchsorted(cuts, start, side="right") - 1]
    kind = np.where(undecided, np.where(below, np.uint8(Kind.DATA), np.uint8(Kind.HOLE)), above.kind)
    owner = np.where(undecided, np.uint16(depth), above.layer)
    host = np.where(undecided, start, above.host)
    filled = Runs(start, kind, owner, host)
    new_run = np.ones(len(start), dtype=bool)
    # Cuts of the raw file inside a run of a layer above are no boundaries.
    new_run[1:] = undecided[1:] | np.isin(start[1:], runs.start)
    return filled.where(new_run)


def runs_at(runs: Runs, start: NDArray[np.uint64]) -> Runs:
    """The runs cut anew at ``start``, which begins with the first run's start; host offsets follow."""
    number = np.searchsorted(runs.start, start, side="right") - 1
    kind = runs.kind[number]
    into_file = np.isin(kind, _POINTS_INTO_FILE)
    host = runs.host[number] + np.where(into_file, start - runs.start[number], np.uint64(0))
    return Runs(start, kind, runs.layer[number], host)


def clip_runs(runs: Runs, start: int, end: int) -> Runs:
    """Only ``[start, end)``; granules at the edges may reach beyond it."""
    inside = runs.start < end
    if not inside.all():
        runs = runs.where(inside)
    first = int(np.searchsorted(runs.start, start, side="right")) - 1
    if first == 0 and int(runs.start[0]) == start:
        return runs
    kept = np.concatenate((np.array([start], dtype=np.uint64), runs.start[first + 1 :]))
    return runs_at(runs, kept)

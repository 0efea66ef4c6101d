"""The index over a chain: whatever the layers are, its runs say of each sector what a walk down the layers says."""

import random
import threading
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray

from nbdq.block import Granules, Kind
from nbdq.chain import index as index_module
from nbdq.chain.index import ChainIndex, Layer, Window
from nbdq.chain.raw import RawImage
from nbdq.qcow2.image import Qcow2Image
from tests.chain.model import SECTOR, MemoryFile, Model, Sector, TableImage, random_chain

_INTO_FILE = (Kind.UNALLOCATED_OFFSET, Kind.ZERO_OFFSET, Kind.HOLE, Kind.DATA)

#: Granules per window, and windows per occupancy map: as in the product, and so small that small disks have many.
every_scale = pytest.mark.parametrize("scale", [(8192, 4096), (64, 2), (8, 3)], ids=["real", "small", "tiny"])


@contextmanager
def scaled(monkeypatch: pytest.MonkeyPatch, scale: tuple[int, int]) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "_WINDOW_GRANULES", scale[0])
        patch.setattr(index_module, "_OCCUPANCY_WINDOWS", scale[1])
        yield


def sectors(window: Window, start: int, end: int) -> list[Sector]:
    """What a window says of each sector of ``[start, end)``."""
    runs = window.runs
    starts = runs.start.tolist()
    assert starts[0] == window.start
    assert starts == sorted(set(starts))
    assert starts[-1] < window.end
    found = []
    for offset in range(start, end, SECTOR):
        number = window.find(offset)
        kind, host = Kind(window.kinds[number]), window.hosts[number]
        if kind in _INTO_FILE:
            host += offset - window.starts[number]
        found.append(Sector(kind, window.layers[number], 0 if kind is Kind.CORRUPT else host))
    return found


def assert_whole(index: ChainIndex, model: Model) -> None:
    """Every window of the disk says what the model says."""
    offset = 0
    while offset < index.size:
        window = index.window(offset)
        assert window.start == offset
        assert sectors(window, offset, window.end) == model.sectors[offset // SECTOR : window.end // SECTOR]
        assert index.window(offset) is window
        offset = window.end
    assert offset == index.size


def close(layers: Sequence[Layer]) -> None:
    for layer in layers:
        layer.close()


@every_scale
def test_any_chain_resolves_as_a_walk_down_its_layers(scale: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """S1, P2-P4, M4: mixed cluster sizes, subclusters, sizes of any sector, raw bases with holes."""
    with scaled(monkeypatch, scale):
        for seed in range(60):
            print(f"seed {seed}")
            layers = random_chain(random.Random(seed))
            assert_whole(ChainIndex(layers, budget=1 << 20), Model(layers))
            close(layers)


@every_scale
def test_any_range_is_covered_by_spans_without_gap(scale: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    with scaled(monkeypatch, scale):
        for seed in range(40):
            print(f"seed {seed}")
            chance = random.Random(f"spans {seed}")
            layers = random_chain(chance)
            model = Model(layers)
            index = ChainIndex(layers, budget=chance.choice((1, 1 << 20)))
            for _ in range(5 if index.size else 0):
                offset, end = sorted(chance.sample(range(index.size + 1), 2))
                position = offset
                for window in index.spans(offset, end):
                    assert window.start <= position < window.end <= index.size
                    stop = min(end, window.end)
                    first, last = position // SECTOR * SECTOR, -(-stop // SECTOR) * SECTOR
                    assert sectors(window, first, last) == model.sectors[first // SECTOR : last // SECTOR]
                    position = stop
                assert position == end
            close(layers)


def test_neighbours_that_continue_each_other_are_one_run() -> None:
    kinds = np.full(64, Kind.DATA, dtype=np.uint8)
    kinds[40:] = Kind.COMPRESSED
    hosts = np.arange(64, dtype=np.uint64) * np.uint64(4096)
    hosts[16:] += np.uint64(1 << 20)
    hosts[40:44] = 7  # four clusters that share one descriptor
    layer = TableImage(MemoryFile(0, 0), size=64 * 4096, cluster_size=4096, granule=4096, kinds=kinds, hosts=hosts)
    window = ChainIndex([layer], budget=1).window(0)
    assert window.runs.start.tolist() == [0, 16 * 4096, 40 * 4096, *range(44 * 4096, 64 * 4096, 4096)]
    layer.close()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([0], []),
        ([0, 5], []),
        ([5], [(0, 5, 1)]),
        ([5, 5, 5], [(0, 5, 3)]),
        ([5, 9], [(0, 5, 2)]),
        ([9, 5], [(0, 5, 2), (5, 9, 1)]),
        ([9, 0], [(0, 9, 1)]),
        ([9, 5, 9], [(0, 5, 3), (5, 9, 1)]),
        ([9, 5, 5], [(0, 5, 3), (5, 9, 1)]),
        ([9, 5, 3], [(0, 3, 3), (3, 5, 2), (5, 9, 1)]),
        ([9, 3, 5], [(0, 3, 3), (3, 9, 1)]),
        ([9, 12, 5], [(0, 5, 3), (5, 9, 2)]),
    ],
)
def test_a_short_layer_ends_the_chain_at_its_size(sizes: list[int], expected: list[tuple[int, int, int]]) -> None:
    """S1, in sectors: (start, end, layers that take part)."""
    assert segments_of(sizes) == [(start * SECTOR, end * SECTOR, count) for start, end, count in expected]


def test_segments_of_any_sizes_hold_the_layers_that_reach_into_them() -> None:
    seed = 23
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(300):
        sizes = [chance.randint(0, 12) for _ in range(chance.randint(1, 8))]
        found = segments_of(sizes)
        counts = []
        position = 0
        for start, end, count in found:
            assert position == start < end
            counts += [count] * ((end - start) // SECTOR)
            position = end
        assert [count for _, _, count in found] == sorted({count for _, _, count in found}, reverse=True)
        expected = []
        for sector in range(sizes[0]):
            reaching = 0
            while reaching < len(sizes) and sizes[reaching] > sector:
                reaching += 1
            expected.append(reaching)
        assert counts == expected


def segments_of(sizes: list[int]) -> list[tuple[int, int, int]]:
    layers = [RawImage(MemoryFile(n, size * SECTOR)) for n, size in enumerate(sizes)]
    found = [tuple(segment) for segment in ChainIndex(layers, budget=1).segments]
    close(layers)
    return found  # type: ignore[return-value]


def test_what_a_raw_layer_holds_behind_the_end_of_the_disk_is_not_seen() -> None:
    """The disk may end inside of a cluster, and the raw file change from hole to data behind that."""
    zero = np.zeros(1, dtype=np.uint8)
    top = TableImage(
        MemoryFile(0, 0),
        size=3 * 4096 + 512,
        cluster_size=65536,
        granule=65536,
        kinds=zero,
        hosts=zero.astype(np.uint64),
    )
    raw = RawImage(MemoryFile(1, 65536, holes=[True, False] * 8))
    index = ChainIndex([top, raw], budget=1000)
    assert_whole(index, Model([top, raw]))
    assert index.window(0).runs.start.tolist() == [0, 4096, 8192, 12288]
    close([top, raw])


# Budget and threads.


@every_scale
def test_windows_are_dropped_and_built_anew_under_a_tiny_budget(
    scale: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with scaled(monkeypatch, scale):
        for seed in range(20):
            print(f"seed {seed}")
            chance = random.Random(f"budget {seed}")
            layers = random_chain(chance)
            model = Model(layers)
            index = ChainIndex(layers, budget=1)
            for _ in range(40 if index.size else 0):
                offset = chance.randrange(index.size)
                window = index.window(offset)
                assert (
                    sectors(window, window.start, window.end)
                    == model.sectors[window.start // SECTOR : window.end // SECTOR]
                )
                assert list(index.windows.values()) == [window]
            close(layers)


def test_cached_windows_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    with scaled(monkeypatch, (64, 2)):
        chance = random.Random(1)
        layers = [layer for layer in random_chain(chance) if isinstance(layer, TableImage)]
        index = ChainIndex(layers, budget=20_000)
        most = 0
        for _ in range(300):
            index.window(chance.randrange(index.size))
            most = max(most, len(index.windows))
            assert sum(window.cost for window in index.windows.values()) <= 20_000 or len(index.windows) == 1
        assert most > 2
        close(layers)


def test_threads_that_build_the_same_windows_all_see_the_same_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    with scaled(monkeypatch, (64, 2)):
        layers = random_chain(random.Random(4))
        model = Model(layers)
        index = ChainIndex(layers, budget=30_000)
        wrong: list[object] = []
        start = threading.Barrier(6)

        def look(seed: int) -> None:
            chance = random.Random(seed)
            start.wait()
            for _ in range(150):
                offset = chance.randrange(index.size)
                window = index.window(offset)
                place = offset // SECTOR * SECTOR
                if sectors(window, place, place + SECTOR) != [model.at(offset)]:
                    wrong.append((seed, offset))
                end = min(index.size, offset + chance.randrange(1, 100_000))
                if sum(1 for _ in index.spans(offset, end)) == 0:
                    wrong.append((seed, offset, end))

        threads = [threading.Thread(target=look, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert sum(window.cost for window in index.windows.values()) <= 30_000
        close(layers)


def test_two_threads_that_build_one_window_at_once_get_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is counted once: else the cache would shrink with every such race."""
    both = threading.Barrier(2, timeout=30)

    class Slow(TableImage):
        def map(self, start: int, end: int) -> Granules | None:
            if start == 0:
                both.wait()
            return super().map(start, end)

    with scaled(monkeypatch, (8, 2)):
        kinds = np.full(64, Kind.ZERO, dtype=np.uint8)
        hosts = np.zeros(64, dtype=np.uint64)
        layer = Slow(MemoryFile(0, 0), size=64 * 512, cluster_size=512, granule=512, kinds=kinds, hosts=hosts)
        index = ChainIndex([layer], budget=10_000)
        found: list[Window] = []
        threads = [threading.Thread(target=lambda: found.append(index.window(0))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found[0] is found[1] is index.window(0)
        for offset in range(4096, 64 * 512, 4096):
            index.window(offset)
        assert (len(index.windows) + 1) * found[0].cost > 10_000  # as many as there is room for
        layer.close()


def test_a_window_that_could_not_be_read_is_asked_again() -> None:
    """A failing disk may come back; nothing of the failure stays."""

    class Failing(TableImage):
        def map(self, start: int, end: int) -> Granules | None:
            self.map_calls += 1
            if self.map_calls == 1:
                raise OSError(5, "Input/output error")
            return super().map(start, end)

    kinds = np.full(8, Kind.ZERO, dtype=np.uint8)
    layer = Failing(
        MemoryFile(0, 0), size=4096, cluster_size=512, granule=512, kinds=kinds, hosts=np.zeros(8, dtype=np.uint64)
    )
    index = ChainIndex([layer], budget=1000)
    with pytest.raises(OSError, match="Input/output error"):
        index.window(0)
    assert list(index.window(0).kinds) == [Kind.ZERO]
    layer.close()


# Huge disks.


class SparseImage(Qcow2Image):
    """A layer of any size with data in a few clusters, which counts what it is asked."""

    def __init__(self, size: int, cluster_size: int, allocated: Sequence[int]) -> None:
        self.size, self.cluster_size, self.granule = size, cluster_size, cluster_size
        self.allocated = np.array(sorted(offset // cluster_size for offset in allocated), dtype=np.int64)
        self.calls = 0

    def map(self, start: int, end: int) -> Granules | None:
        self.calls += 1
        first, last = np.searchsorted(self.allocated, (start // self.granule, end // self.granule))
        found = self.allocated[first:last]
        if not len(found):
            return None
        kinds = np.full(len(found), Kind.DATA, dtype=np.uint8)
        return Granules(found - start // self.granule, kinds, found.astype(np.uint64) * np.uint64(self.granule))

    def occupancy(self, start: int, end: int, step: int) -> NDArray[np.bool_]:
        self.calls += 1
        occupied = np.zeros(-(-(end - start) // step), dtype=bool)
        steps = self.allocated * self.granule // step - start // step
        occupied[steps[(steps >= 0) & (steps < len(occupied))]] = True
        return occupied


@pytest.mark.parametrize(("size", "cluster_size"), [(16 << 40, 64 << 10), (1 << 60, 2 << 20)], ids=["16 TiB", "1 EiB"])
def test_the_whole_of_a_huge_empty_disk_is_seen_in_a_few_steps(size: int, cluster_size: int) -> None:
    """What is asked of the layers grows with what they hold, and far slower with the size."""
    allocated = [0, size // 3, size - cluster_size]
    layers = [SparseImage(size, cluster_size, allocated), SparseImage(size, cluster_size, [size // 2])]
    index = ChainIndex(layers, budget=1 << 20)
    data, position, steps = [], 0, 0
    for window in index.spans(0, size):
        assert window.start <= position
        data += window.runs.start[window.runs.kind == Kind.DATA].tolist()
        position = window.end
        steps += 1
    assert position == size
    assert data == sorted(offset // cluster_size * cluster_size for offset in (*allocated, size // 2))
    assert steps < 20 + size // (2 << 40)
    assert sum(layer.calls for layer in layers) < 3 * steps


def test_a_walk_over_a_huge_disk_does_not_fill_the_memory() -> None:
    size = 1 << 57
    index = ChainIndex([SparseImage(size, 2 << 20, [])], budget=1 << 20)
    tracemalloc.start()
    assert sum(window.end - window.start for window in index.spans(0, size)) == size
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20  # a byte for every window would be 8 MiB


def test_a_hole_of_a_raw_layer_is_one_hole_whatever_its_length() -> None:
    """M4: it has an offset and belongs to its layer, also where whole windows hold nothing but it."""
    size = 3 << 40

    class Sparse(MemoryFile):
        def size(self) -> int:
            return size

        def data_ranges(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
            for low, high, kind in (
                (0, 1 << 40, False),
                (1 << 40, 4096 + (1 << 40), True),
                (4096 + (1 << 40), size, False),
            ):
                if low < end and high > start:
                    yield max(low, start), min(high, end), kind

    raw = RawImage(Sparse(0, 0))
    top = SparseImage(4 << 40, 64 << 10, [2 << 40])
    found = []
    for window in ChainIndex([top, raw], budget=1 << 20).spans(0, 4 << 40):
        for start, kind, layer, host in zip(*(column.tolist() for column in window.runs), strict=True):
            if not found or found[-1][1:3] != (kind, layer) or kind == Kind.DATA:
                found.append((start, kind, layer, host))
    assert found == [
        (0, Kind.HOLE, 1, 0),
        (1 << 40, Kind.DATA, 1, 1 << 40),
        (4096 + (1 << 40), Kind.HOLE, 1, 4096 + (1 << 40)),
        (2 << 40, Kind.DATA, 0, 2 << 40),
        ((2 << 40) + (64 << 10), Kind.HOLE, 1, (2 << 40) + (64 << 10)),
        (3 << 40, Kind.UNALLOCATED, 0, 0),
    ]
    raw.close()

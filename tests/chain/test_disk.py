"""A chain as one disk: reads, block status and map agree with a walk down the layers, however they are asked."""

import errno
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from nbdq.block import Extent, FilePiece, Kind, Piece
from nbdq.chain import index as index_module
from nbdq.chain.clusters import ClusterCache, Load
from nbdq.chain.disk import ChainDisk
from nbdq.chain.index import Layer
from nbdq.chain.open import open_disk
from nbdq.chain.policy import Policy
from nbdq.chain.raw import RawImage
from nbdq.errors import ExportError
from tests.chain.model import DAMAGED, SECTOR, MemoryFile, Model, Sector, TableImage, inflated, random_chain
from tests.support.tools import requires, run

CLUSTER = 4096


class CountingCache(ClusterCache):
    """Notes what is inflated ahead instead of doing it in other threads."""

    def __init__(self, budget: int = 1 << 20) -> None:
        super().__init__(budget=budget)
        self.loaded: list[int] = []
        self.ahead: list[int] = []

    def get(self, key: object, load: Load) -> bytes:  # type: ignore[override]
        def counted() -> bytes:
            self.loaded.append(key[1])  # type: ignore[index]
            return load()

        return super().get(key, counted)

    def get_ahead(self, key: object, load: Load) -> None:  # type: ignore[override]
        self.ahead.append(key[1])  # type: ignore[index]


@contextmanager
def disk_of(layers: Sequence[Layer], *, index_budget: int = 1 << 20) -> Iterator[tuple[ChainDisk, CountingCache]]:
    clusters = CountingCache()
    disk = ChainDisk(layers, clusters=clusters, index_budget=index_budget)
    try:
        yield disk, clusters
    finally:
        disk.close()
        clusters.close()


@pytest.fixture(params=[(8192, 4096), (64, 2)], ids=["real windows", "small windows"])
def random_disks(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Iterator[tuple[random.Random, ChainDisk, Model]]]:
    """Random chains, one after the other, each with its model; small windows put many of them into small disks."""
    monkeypatch.setattr(index_module, "_WINDOW_GRANULES", request.param[0])
    monkeypatch.setattr(index_module, "_OCCUPANCY_WINDOWS", request.param[1])

    def make(name: str) -> Iterator[tuple[random.Random, ChainDisk, Model]]:
        for seed in range(40):
            print(f"seed {seed}")
            chance = random.Random(f"{name} {seed}")
            layers = random_chain(chance)
            with disk_of(layers, index_budget=chance.choice((1, 1 << 20))) as (disk, _):
                if disk.size:
                    yield chance, disk, Model(layers)

    return make


def ranges(chance: random.Random, size: int, count: int, *, unit: int = 1) -> Iterator[tuple[int, int]]:
    """(offset, length) of every kind: whole disk, single units, both ends, anything between."""
    yield 0, size
    units = size // unit
    for _ in range(count):
        first = chance.randrange(units)
        last = min(units, first + chance.choice((1, 2, 8, chance.randint(1, units))))
        yield first * unit, (last - first) * unit
    yield size - unit, unit


def joined(pieces: list[Piece]) -> bytes:
    """The bytes that a client gets of these pieces."""
    found = []
    for piece in pieces:
        if isinstance(piece, FilePiece):
            found.append(piece.storage.read(piece.offset, piece.length))
            assert len(found[-1]) == piece.length  # a short sendfile breaks the connection (P101)
        else:
            found.append(bytes(piece))
    return b"".join(found)


# Reading.


def test_every_read_returns_what_the_layers_hold(random_disks: Callable[..., Iterator]) -> None:
    """And fails where, and only where, an entry or a cluster of the range is corrupt."""
    for chance, disk, model in random_disks("read"):
        for offset, length in ranges(chance, disk.size, 12):
            buffer = bytearray(length)
            expected = model.read(offset, length)
            if expected is None:
                with pytest.raises(OSError, match=rf"^\[Errno {errno.EIO}\] "):
                    disk.read_into(offset, memoryview(buffer))
            else:
                disk.read_into(offset, memoryview(buffer))
                assert buffer == expected, (offset, length)


def test_gathered_pieces_are_what_a_read_returns(random_disks: Callable[..., Iterator]) -> None:
    for chance, disk, model in random_disks("gather"):
        for offset, length in ranges(chance, disk.size, 12):
            expected = model.read(offset, length)
            if expected is None:
                with pytest.raises(OSError, match=rf"^\[Errno {errno.EIO}\] "):
                    disk.gather(offset, length)
            else:
                assert joined(disk.gather(offset, length)) == expected, (offset, length)


def test_what_memory_answers_is_what_a_read_returns(random_disks: Callable[..., Iterator]) -> None:
    """Both ways to answer without waiting may decline, but never lie."""
    answered = 0
    for chance, disk, model in random_disks("cached"):
        for offset, length in ranges(chance, disk.size, 12):
            if chance.randrange(2):
                with suppress(OSError):
                    disk.read_into(offset, memoryview(bytearray(length)))
            for file in (layer.data for layer in disk.layers):
                file.cached = chance.randrange(4) > 0  # type: ignore[attr-defined]
            buffer = bytearray(b"\xaa") * length
            if disk.read_cached(offset, memoryview(buffer)):
                assert buffer == model.read(offset, length), (offset, length)
                answered += 1
            pieces = disk.gather_cached(offset, length)
            if pieces is not None:
                assert joined(pieces) == model.read(offset, length), (offset, length)
                answered += 1
    assert answered > 100


def test_what_is_known_to_read_as_zeros_is_what_the_layers_say_over_any_number_of_windows(
    random_disks: Callable[..., Iterator],
) -> None:
    """Without waiting it may not be known, but never is it wrong."""
    zeros = {Kind.UNALLOCATED, Kind.UNALLOCATED_OFFSET, Kind.ZERO, Kind.ZERO_OFFSET, Kind.HOLE}
    found = {True: 0, False: 0}
    for chance, disk, model in random_disks("zeros"):
        for offset, length in ranges(chance, disk.size, 24, unit=SECTOR):
            sectors = model.sectors[offset // SECTOR : (offset + length) // SECTOR]
            expected = all(sector.kind in zeros for sector in sectors)
            for _ in range(2):
                assert disk.reads_zero_cached(offset, length) in (False, expected), (offset, length)
                assert disk.reads_zero(offset, length) == expected, (offset, length)
                with suppress(OSError):  # every window is built
                    disk.read_into(offset, memoryview(bytearray(length)))
            found[expected] += 1
    assert min(found.values()) > 50


def simple_disk(kinds: list[Kind], *, file_size: int | None = None, **layer: bool) -> TableImage:
    """One layer of clusters of 4 KiB; each has the host offset or the descriptor of its number."""
    hosts = np.arange(len(kinds), dtype=np.uint64)
    hosts[np.isin(kinds, (Kind.DATA, Kind.ZERO_OFFSET))] *= np.uint64(CLUSTER)
    return TableImage(
        MemoryFile(0, len(kinds) * CLUSTER if file_size is None else file_size),
        size=len(kinds) * CLUSTER,
        cluster_size=CLUSTER,
        granule=CLUSTER,
        kinds=np.array(kinds, dtype=np.uint8),
        hosts=hosts,
        **layer,
    )


def test_a_read_needs_no_disk_once_its_window_is_known() -> None:
    with disk_of([simple_disk([Kind.DATA, Kind.ZERO, Kind.DATA, Kind.COMPRESSED])]) as (disk, _):
        whole, part = memoryview(bytearray(4 * CLUSTER)), memoryview(bytearray(3 * CLUSTER))
        assert not disk.read_cached(0, part)
        assert disk.gather_cached(0, 3 * CLUSTER) is None
        disk.read_into(0, part[:1])
        assert disk.read_cached(0, part)
        assert disk.gather_cached(0, 3 * CLUSTER) is not None
        assert not disk.read_cached(0, whole)  # the compressed cluster is not inflated yet
        assert disk.gather_cached(0, 4 * CLUSTER) is None
        disk.read_into(0, whole)
        assert disk.read_cached(0, whole)
        assert disk.gather_cached(0, 4 * CLUSTER) is not None


def test_data_that_is_not_in_the_page_cache_is_left_to_the_slow_path() -> None:
    with disk_of([simple_disk([Kind.DATA])]) as (disk, _):
        disk.read_into(0, memoryview(bytearray(1)))
        disk.layers[0].data.cached = False  # type: ignore[attr-defined]
        assert not disk.read_cached(0, memoryview(bytearray(512)))
        assert disk.gather_cached(0, 512) is None
        disk.read_into(0, memoryview(bytearray(512)))


def test_a_file_that_ends_inside_a_cluster_reads_as_zeros_there() -> None:
    """1.13: as QEMU, for data; and it is never sent by reference, which would come out short (P101)."""
    with disk_of([simple_disk([Kind.DATA, Kind.DATA], file_size=CLUSTER + 1000)]) as (disk, _):
        buffer = bytearray(b"\xaa") * (2 * CLUSTER)
        disk.read_into(0, memoryview(buffer))
        assert buffer == disk.layers[0].data.content + bytes(CLUSTER - 1000)  # type: ignore[attr-defined]
        assert joined(disk.gather(0, 2 * CLUSTER)) == buffer
        assert disk.gather_cached(0, CLUSTER) is not None
        assert disk.gather_cached(0, CLUSTER + 1001) is None


def test_a_corrupt_entry_fails_its_own_cluster_and_no_other() -> None:
    """1.14."""
    with disk_of([simple_disk([Kind.DATA, Kind.CORRUPT, Kind.DATA])]) as (disk, _):
        for offset in (0, 2 * CLUSTER):
            disk.read_into(offset, memoryview(bytearray(CLUSTER)))
            assert len(list(disk.status(offset, CLUSTER))) == 1
            assert len(list(disk.extents(offset, CLUSTER))) == 1
        failure = rf"^\[Errno {errno.EIO}\] corrupt table entry for guest offset {CLUSTER}: 'layer0'$"
        for fails in (
            lambda: disk.read_into(CLUSTER, memoryview(bytearray(1))),
            lambda: disk.read_into(0, memoryview(bytearray(3 * CLUSTER))),
            lambda: disk.gather(0, 3 * CLUSTER),
            lambda: list(disk.status(0, 3 * CLUSTER)),
            lambda: list(disk.extents(0, 3 * CLUSTER)),
        ):
            with pytest.raises(OSError, match=failure):
                fails()
        assert not disk.read_cached(0, memoryview(bytearray(CLUSTER + 1)))
        assert disk.gather_cached(0, CLUSTER + 1) is None


# Compressed clusters.


def reads(disk: ChainDisk, offsets: Iterator[int] | range, length: int = 512) -> None:
    """Read as a server does: from memory if possible."""
    for offset in offsets:
        view = memoryview(bytearray(length))
        if not disk.read_cached(offset, view):
            disk.read_into(offset, view)


def test_a_sequential_reader_finds_the_next_clusters_inflated() -> None:
    kinds = [Kind.COMPRESSED] * 200 + [Kind.DATA] * 4 + [Kind.COMPRESSED] * 4
    with disk_of([simple_disk(kinds)]) as (disk, clusters):
        reads(disk, range(0, CLUSTER, 512))
        assert clusters.ahead == []  # one cluster is no sequence
        reads(disk, range(CLUSTER, CLUSTER + 512, 512))
        assert clusters.ahead == list(range(2, 2 + (256 << 10) // CLUSTER))
        clusters.ahead.clear()
        reads(disk, range(CLUSTER + 512, 2 * CLUSTER, 512))
        assert clusters.ahead == []  # once for each cluster that is entered
        reads(disk, range(198 * CLUSTER, 204 * CLUSTER, 512))
        assert clusters.ahead == []  # the run of compressed clusters ends
        reads(disk, range(204 * CLUSTER, 208 * CLUSTER, 512))
        assert clusters.ahead == [206, 207, 207]  # and so does the disk


def test_a_random_reader_inflates_nothing_ahead() -> None:
    seed = 8
    print(f"seed {seed}")
    order = random.Random(seed).sample(range(0, 64, 2), 32)
    with disk_of([simple_disk([Kind.COMPRESSED] * 64)]) as (disk, clusters):
        reads(disk, (n * CLUSTER for n in order))
        assert clusters.ahead == []
        assert clusters.loaded == order


def test_a_backward_reader_inflates_nothing_ahead() -> None:
    with disk_of([simple_disk([Kind.COMPRESSED] * 64)]) as (disk, clusters):
        reads(disk, range(63 * CLUSTER, -CLUSTER, -CLUSTER))
        assert clusters.ahead == []


def test_a_cluster_is_inflated_once_for_all_reads_of_it() -> None:
    with disk_of([simple_disk([Kind.COMPRESSED] * 4)]) as (disk, clusters):
        for _ in range(3):
            reads(disk, range(0, 4 * CLUSTER, 512))
            disk.gather(0, 4 * CLUSTER)
        assert clusters.loaded == [0, 1, 2, 3]


def test_gathered_clusters_are_shared_with_the_cache() -> None:
    """A reply of compressed data copies nothing."""
    with disk_of([simple_disk([Kind.COMPRESSED] * 2)]) as (disk, clusters):
        pieces = [piece for piece in disk.gather(100, CLUSTER) if isinstance(piece, memoryview)]
        assert [piece.obj for piece in pieces] == [inflated(0, CLUSTER), inflated(1, CLUSTER)]
        image = disk.layers[0]
        assert all(piece.obj is clusters.peek((image, number)) for number, piece in enumerate(pieces))


def test_a_cluster_that_does_not_inflate_fails_its_reader_every_time_and_nobody_else() -> None:
    layer = simple_disk([Kind.COMPRESSED] * 3)
    layer.hosts[1] = DAMAGED
    with disk_of([layer]) as (disk, clusters):
        for _ in range(2):
            with pytest.raises(OSError, match="damaged cluster"):
                disk.read_into(CLUSTER, memoryview(bytearray(512)))
        assert clusters.loaded == [DAMAGED, DAMAGED]
        reads(disk, range(0, CLUSTER, 512))
        reads(disk, range(2 * CLUSTER, 3 * CLUSTER, 512))


# Block status and map.


def test_block_status_says_of_each_sector_what_the_layers_say(random_disks: Callable[..., Iterator]) -> None:
    """Kinds, and depths as in P7; in chunks that cover the range exactly."""
    for chance, disk, model in random_disks("status"):
        for offset, length in ranges(chance, disk.size, 8, unit=SECTOR):
            expected = model.sectors[offset // SECTOR : (offset + length) // SECTOR]
            if any(sector.kind is Kind.CORRUPT for sector in expected):
                with pytest.raises(OSError, match=rf"^\[Errno {errno.EIO}\] "):
                    list(disk.status(offset, length))
                continue
            found = []
            position = offset
            for status in disk.status(offset, length):
                starts = status.start.tolist()
                assert starts[0] == position
                bounds = [*starts, status.end]
                assert bounds == sorted(set(bounds))
                for low, high, kind, depth in zip(
                    starts, bounds[1:], status.kind.tolist(), status.depth.tolist(), strict=True
                ):
                    found += [(Kind(kind), depth)] * ((high - low) // SECTOR)
                position = status.end
            assert position == offset + length
            assert found == [(model.status_kind(sector), model.allocation_depth(sector)) for sector in expected]


def naive_extents(model: Model, offset: int, length: int) -> list[Extent]:
    """Chapter 4.1, from single sectors: neighbours join when nothing but the position differs."""
    found: list[Extent] = []
    for start in range(offset, offset + length, SECTOR):
        extent = extent_of(model, start, model.at(start))
        last = found[-1] if found else None
        if last is not None and (
            last[2:7] == extent[2:7]
            and last.path == extent.path
            and (None if last.offset is None else last.offset + last.length) == extent.offset
        ):
            found[-1] = last._replace(length=last.length + SECTOR)
        else:
            found.append(extent)
    return found


def extent_of(model: Model, start: int, sector: Sector) -> Extent:
    kind = model.status_kind(sector)
    unallocated = kind in (Kind.UNALLOCATED, Kind.UNALLOCATED_OFFSET)
    data = kind in (Kind.DATA, Kind.DATA_HOLE, Kind.COMPRESSED)
    return Extent(
        start,
        SECTOR,
        sector.layer,
        present=not unallocated,
        zero=kind not in (Kind.DATA, Kind.COMPRESSED),
        data=data,
        compressed=kind is Kind.COMPRESSED,
        offset=None if kind in (Kind.UNALLOCATED, Kind.ZERO, Kind.COMPRESSED) else sector.host,
        path=model.layers[sector.layer].data.path,
    )


def test_map_lists_the_fewest_extents_that_tell_the_truth(random_disks: Callable[..., Iterator]) -> None:
    """P2-P5, 4.1."""
    for chance, disk, model in random_disks("map"):
        for offset, length in ranges(chance, disk.size, 8, unit=SECTOR):
            expected = model.sectors[offset // SECTOR : (offset + length) // SECTOR]
            if any(sector.kind is Kind.CORRUPT for sector in expected):
                with pytest.raises(OSError, match=rf"^\[Errno {errno.EIO}\] "):
                    list(disk.extents(offset, length))
            else:
                assert list(disk.extents(offset, length)) == naive_extents(model, offset, length)


def test_status_comes_from_memory_once_every_window_of_the_range_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_WINDOW_GRANULES", 2)
    with disk_of([simple_disk([Kind.DATA, Kind.ZERO] * 3)]) as (disk, _):
        assert not disk.status_cached(0, 512)
        list(disk.status(0, 4 * CLUSTER))
        assert disk.status_cached(0, 4 * CLUSTER)
        assert not disk.status_cached(0, 4 * CLUSTER + 1)


def test_status_that_must_ask_a_file_for_its_holes_never_comes_from_memory() -> None:
    """P5: the question can wait for a disk, and there may be thousands."""
    with disk_of([simple_disk([Kind.DATA])]) as (disk, _):
        disk.read_into(0, memoryview(bytearray(1)))
        assert not disk.status_cached(0, 512)  # nobody has looked yet whether it must
        list(disk.status(0, 512))
        assert disk.status_cached(0, 512)
    with disk_of([simple_disk([Kind.ZERO]), simple_disk([Kind.DATA], preallocated=True)]) as (disk, _):
        list(disk.status(0, 512))
        assert not disk.status_cached(0, 512)


def test_map_of_a_raw_file_ends_its_last_data_at_the_last_byte() -> None:
    """As qemu-img and qemu-nbd: the rest of the last sector is a hole that reads as zeros."""
    with disk_of([RawImage(MemoryFile(0, 1000))]) as (disk, _):
        assert disk.size == 1024
        data, hole = disk.extents(0, 1024)
        assert (data.start, data.length, data.data, data.zero) == (0, 1000, True, False)
        assert (hole.start, hole.length, hole.data, hole.zero, hole.present, hole.offset) == (
            *(1000, 24, False, True, True, 1000),
        )
        buffer = bytearray(b"\xaa") * 1024
        disk.read_into(0, memoryview(buffer))
        assert buffer[1000:] == bytes(24)


def test_prefetch_reaches_every_byte_of_data_and_nothing_else(random_disks: Callable[..., Iterator]) -> None:
    """Holes, and compressed clusters, which would have to be inflated, are left alone."""

    class Noting(MemoryFile):
        asked: list[tuple[int, int]]

        def prefetch(self, offset: int, length: int) -> None:
            self.asked.append((offset, length))

    for chance, disk, model in random_disks("prefetch"):
        for layer in disk.layers:
            layer.data.__class__ = Noting
            layer.data.asked = []  # type: ignore[attr-defined]
        for offset, length in ranges(chance, disk.size, 3, unit=SECTOR):
            for layer in disk.layers:
                layer.data.asked.clear()  # type: ignore[attr-defined]
            disk.prefetch(offset, length)
            found = {
                (depth, host)
                for depth, layer in enumerate(disk.layers)
                for low, count in layer.data.asked  # type: ignore[attr-defined]
                for host in range(low, low + count, SECTOR)
            }
            wanted = model.sectors[offset // SECTOR : (offset + length) // SECTOR]
            assert found == {(s.layer, s.host) for s in wanted if model.status_kind(s) is Kind.DATA}


def test_a_real_prefetch_asks_the_kernel() -> None:
    with disk_of([simple_disk([Kind.DATA, Kind.COMPRESSED])]) as (disk, _):
        disk.prefetch(0, disk.size)


# Metadata preallocation, with QEMU's own images.


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize(
    ("options", "cut"),
    [
        ("preallocation=metadata", None),
        ("preallocation=metadata,cluster_size=4k", None),
        ("preallocation=metadata,extended_l2=on", None),
        ("preallocation=metadata", 6 << 20),
        ("preallocation=metadata", (6 << 20) + 777),
        ("preallocation=metadata", (1 << 20) + (300 << 10) + 1000),
        ("preallocation=falloc", None),
        ("preallocation=full", None),
    ],
)
def test_a_preallocated_image_is_mapped_as_by_qemu_img(options: str, cut: int | None, tmp_path: Path) -> None:
    """P5; also with the end of the file, which need not lie on any boundary, cut off."""
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "8M")
    run("qemu-io", "-f", "qcow2", "-c", "write -q 1M 300k", "-c", "write -q 4M 4k", "-c", "write -q -z 5M 64k", path)
    if cut is not None:
        os.truncate(path, cut)
    theirs = json.loads(run("qemu-img", "map", "-f", "qcow2", "--output=json", path))
    clusters = ClusterCache(budget=0)
    disk = open_disk(str(path), format="qcow2", policy=Policy(), clusters=clusters)
    ours = [
        {
            **{name: getattr(extent, name) for name in ("start", "length", "depth", "present", "zero", "data")},
            **({} if extent.offset is None else {"offset": extent.offset}),
        }
        for extent in disk.extents(0, disk.size)
    ]
    disk.close()
    clusters.close()
    assert ours == theirs


# Opening and closing.


@requires("qemu-img")
def test_a_disk_that_cannot_be_opened_leaves_no_file_open(tmp_path: Path) -> None:
    """Whatever of its chain, data files included, was open already."""
    run("qemu-img", "create", "-q", "-f", "raw", "base.raw", "1M", cwd=tmp_path)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=guest.data", "a.qcow2", "1M", cwd=tmp_path)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "b.qcow2", cwd=tmp_path)
    clusters = ClusterCache(budget=0)
    before = os.listdir("/proc/self/fd")
    for name in ("a.qcow2", "b.qcow2"):
        with pytest.raises(ExportError, match="no internal snapshot 'monday'"):
            open_disk(
                str(tmp_path / name),
                format="qcow2",
                policy=Policy(allow_data_file=True),
                clusters=clusters,
                snapshot="monday",
            )
        assert os.listdir("/proc/self/fd") == before
    clusters.close()


def test_closing_a_disk_closes_every_layer() -> None:
    layers = [simple_disk([Kind.DATA]), simple_disk([Kind.DATA])]
    with disk_of(layers) as (disk, _):
        disk.close()
        assert [layer.data.descriptor for layer in layers] == [-1, -1]

"""Chains made of nothing but tables in memory, and a naive reader of them that looks at one sector at a time.

The layers behave as real ones do towards the chain modules. :class:`Model` resolves each sector by walking the layers
from the top, as the format's rules are told (S1, P2-P7), and knows no run, window or granule.
"""

import errno
import os
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from nbdq.block import Granules, Kind
from nbdq.chain.index import Layer
from nbdq.chain.raw import RawImage
from nbdq.qcow2.image import Qcow2Image
from nbdq.storage import FileStorage

_T = TypeVar("_T")

SECTOR = 512
#: Descriptors with this bit name clusters that do not inflate.
DAMAGED = 1 << 20
_PAGE = 4096
_INTO_FILE = (Kind.DATA, Kind.ZERO_OFFSET, Kind.UNALLOCATED_OFFSET)


class MemoryFile(FileStorage):
    """A file in memory, whose pages are data or holes as it is told; every word of the data is different."""

    def __init__(self, number: int, size: int, *, holes: Sequence[bool] = ()) -> None:
        """``holes`` says for each page of 4 KiB from the start whether it is one."""
        super().__init__(os.memfd_create("layer", os.MFD_CLOEXEC), f"layer{number}")
        self.cached = True
        words = np.arange(-(-size // 8), dtype=np.uint64) + (np.uint64(number + 1) << np.uint64(40))
        content = bytearray(words.tobytes()[:size])
        self._is_data = [True] * -(-size // _PAGE)
        for page, hole in enumerate(holes[: len(self._is_data)]):
            if hole:
                self._is_data[page] = False
                length = len(content[page * _PAGE : (page + 1) * _PAGE])
                content[page * _PAGE : (page + 1) * _PAGE] = bytes(length)
        self.content = bytes(content)
        os.pwrite(self.descriptor, self.content, 0)

    def is_data(self, offset: int) -> bool:
        return offset < len(self.content) and self._is_data[offset // _PAGE]

    def data_ranges(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        while start < end:
            kind = self.is_data(start)
            stop = start
            while stop < end and self.is_data(stop) == kind:
                stop = (stop // _PAGE + 1) * _PAGE
                if kind:
                    stop = min(stop, len(self.content))
                elif stop > len(self.content):
                    stop = end
            yield start, min(stop, end), kind
            start = min(stop, end)

    def read_cached(self, offset: int, view: memoryview) -> bool:
        return self.cached and self.read_into(offset, view) == len(view)


class TableImage(Qcow2Image):
    """A QCOW2 layer whose tables are two arrays: kind and host value of each granule."""

    def __init__(
        self,
        data: MemoryFile,
        *,
        size: int,
        cluster_size: int,
        granule: int,
        kinds: NDArray[np.uint8],
        hosts: NDArray[np.uint64],
        preallocated: bool = False,
    ) -> None:
        self.data = self.storage = data
        self.path = data.path
        self.size, self.cluster_size, self.granule = size, cluster_size, granule
        self.kinds, self.hosts = kinds, hosts
        self.preallocated = preallocated
        self.map_calls = 0

    def map(self, start: int, end: int) -> Granules | None:
        assert start % self.cluster_size == end % self.cluster_size == 0
        self.map_calls += 1
        first, last = start // self.granule, end // self.granule
        positions = np.flatnonzero(self.kinds[first:last])
        if not len(positions):
            return None
        return Granules(positions, self.kinds[first:last][positions], self.hosts[first:last][positions])

    def occupancy(self, start: int, end: int, step: int) -> NDArray[np.bool_]:
        per_step = max(step, self.granule) // self.granule
        starts = range(start, end, step)
        return np.array([self.kinds[at // self.granule : at // self.granule + per_step].any() for at in starts])

    def read_compressed(self, descriptor: int) -> bytes:
        if descriptor & DAMAGED:
            raise OSError(errno.EIO, "damaged cluster", self.path)
        return inflated(descriptor, self.cluster_size)

    def is_metadata_preallocated(self) -> bool:
        return self.preallocated

    def close(self) -> None:
        self.data.close()


def inflated(descriptor: int, cluster_size: int) -> bytes:
    """What the compressed cluster of that descriptor holds."""
    words = np.arange(cluster_size // 8, dtype=np.uint64) + (np.uint64(descriptor + 1) << np.uint64(40))
    return words.tobytes()


class Sector(NamedTuple):
    """What one sector of the disk is."""

    kind: Kind
    layer: int
    host: int
    """Host offset or descriptor; 0 where there is none."""


class Model:
    """The naive reader."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.size = layers[0].size
        self.sectors = [self._resolve(offset) for offset in range(0, self.size, SECTOR)]

    def _resolve(self, offset: int) -> Sector:
        found = Sector(Kind.UNALLOCATED, 0, 0)
        for depth, layer in enumerate(self.layers):
            if offset >= layer.size:
                break  # S1: nothing deeper shines through; P2: the layer above the short one keeps the sector
            if isinstance(layer, RawImage):
                kind = Kind.DATA if layer.data.is_data(offset) else Kind.HOLE  # type: ignore[attr-defined]
                return Sector(kind, depth, offset)
            assert isinstance(layer, TableImage)
            number = offset // layer.granule
            kind, host = Kind(int(layer.kinds[number])), int(layer.hosts[number])
            if kind in _INTO_FILE:
                host += offset % layer.granule
            found = Sector(kind, depth, 0 if kind is Kind.CORRUPT else host)
            if kind not in (Kind.UNALLOCATED, Kind.UNALLOCATED_OFFSET):
                break
        return found

    def at(self, offset: int) -> Sector:
        return self.sectors[offset // SECTOR]

    def status_kind(self, sector: Sector) -> Kind:
        """The kind that block status gives: data that is a hole of a preallocated file is known to be zero (P5)."""
        layer = self.layers[sector.layer]
        if sector.kind is Kind.DATA and isinstance(layer, TableImage) and layer.preallocated:
            assert isinstance(layer.data, MemoryFile)
            return Kind.DATA if layer.data.is_data(sector.host) else Kind.DATA_HOLE
        return sector.kind

    def allocation_depth(self, sector: Sector) -> int:
        """P7."""
        if sector.kind not in (Kind.UNALLOCATED, Kind.UNALLOCATED_OFFSET):
            return sector.layer + 1
        return 0 if sector.layer == len(self.layers) - 1 else sector.layer + 2

    def read(self, offset: int, length: int) -> bytes | None:
        """The guest's bytes; None if the guest must get EIO."""
        parts = []
        position, end = offset, offset + length
        while position < end:
            count = min(SECTOR - position % SECTOR, end - position)
            kind, depth, host = self.at(position)
            layer = self.layers[depth]
            if kind is Kind.CORRUPT or (kind is Kind.COMPRESSED and host & DAMAGED):
                return None
            if kind is Kind.DATA:
                place = host + position % SECTOR
                parts.append(layer.data.content[place : place + count].ljust(count, b"\0"))  # type: ignore[attr-defined]
            elif kind is Kind.COMPRESSED:
                assert isinstance(layer, TableImage)
                inside = position % layer.cluster_size
                parts.append(inflated(host, layer.cluster_size)[inside : inside + count])
            else:
                parts.append(bytes(count))
            position += count
        return b"".join(parts)


def random_chain(chance: random.Random, *, largest: int = 640 << 10) -> list[Layer]:
    """One to five layers of any geometry and of sizes up to ``largest`` that need not fit each other; top first."""
    count = chance.randint(1, 5)
    common = chance.randrange(SECTOR, largest, SECTOR)
    layers: list[Layer] = []
    for depth in range(count):
        size = chance.choice((common, common, chance.randrange(0, largest, SECTOR)))
        if depth == count - 1 and chance.randrange(3) == 0:
            holes = _spread(chance, -(-size // _PAGE), [False, True])
            layers.append(RawImage(MemoryFile(depth, size, holes=holes)))
        else:
            layers.append(_random_image(chance, depth, size))
    return layers


def _random_image(chance: random.Random, number: int, size: int) -> TableImage:
    cluster_size = 512 << chance.randrange(0, 8)
    granule = cluster_size // 32 if cluster_size >= 16 << 10 and chance.randrange(2) else cluster_size
    per_cluster = cluster_size // granule
    clusters = -(-size // cluster_size) + 4  # tables go on behind the end of the disk (Q39)
    file_size = chance.randrange(0, 600 << 10, SECTOR)
    data = MemoryFile(number, file_size, holes=_spread(chance, 200, [False, True]))
    kinds = np.zeros(clusters * per_cluster, dtype=np.uint8)
    hosts = np.zeros(clusters * per_cluster, dtype=np.uint64)
    usual = [Kind.UNALLOCATED] * 4 + [Kind.DATA] * 3 + [Kind.ZERO, Kind.ZERO_OFFSET, Kind.COMPRESSED]
    usual += [Kind.CORRUPT] * (chance.randrange(4) == 0)
    host = descriptor = 0
    for cluster, kind in enumerate(_spread(chance, clusters, usual)):
        host += cluster_size
        descriptor += 1
        if chance.randrange(4) == 0:  # somewhere else, perhaps where another cluster is already
            host = chance.randrange(0, 700 << 10, cluster_size)
            descriptor = chance.randrange(1 << 20) | chance.choice((0,) * 9 + (DAMAGED,))
        at = slice(cluster * per_cluster, (cluster + 1) * per_cluster)
        if kind in (Kind.COMPRESSED, Kind.CORRUPT):
            kinds[at], hosts[at] = kind, descriptor
            if chance.randrange(3) == 0:
                descriptor -= 1  # the next cluster may have the same descriptor
        elif granule == cluster_size:
            kinds[at], hosts[at] = kind, host if kind in _INTO_FILE else 0
        elif kind in _INTO_FILE:
            states = _spread(chance, per_cluster, list(_INTO_FILE))
            kinds[at], hosts[at] = (
                states,
                np.arange(per_cluster, dtype=np.uint64) * np.uint64(granule) + np.uint64(host),
            )
        else:
            kinds[at] = _spread(chance, per_cluster, [Kind.UNALLOCATED, Kind.ZERO])
    return TableImage(
        data,
        size=size,
        cluster_size=cluster_size,
        granule=granule,
        kinds=kinds,
        hosts=hosts,
        preallocated=chance.randrange(3) == 0,
    )


def _spread(chance: random.Random, count: int, choices: list[_T]) -> list[_T]:
    """``count`` values in stretches of equal ones."""
    found: list[_T] = []
    while len(found) < count:
        found += [chance.choice(choices)] * chance.randint(1, 12)
    return found[:count]

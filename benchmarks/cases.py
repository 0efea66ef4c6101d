"""The cases of the race, by the names that reports use, with the targets of the design.

`at_least` is what our figure must be, as a ratio to the better of qemu-nbd's two; `at_most` bounds our figure itself. A
case without either is there to be looked at.
"""

from dataclasses import dataclass
from pathlib import Path

from images import (
    CHAIN1,
    CHAIN64,
    CHAIN256,
    CLUSTER_SIZE,
    EMPTY,
    EMPTY_1T,
    FRAGMENTED,
    OVER_CHAIN,
    OVER_PLAIN,
    PLAIN,
    ZLIB,
    ZSTD,
    Image,
)
from workloads import (
    Fio,
    NbdCopy,
    NbdCopyIn,
    NbdinfoMap,
    OneCore,
    PeakRss,
    Startup,
    StatusLoop,
    Workload,
    ZeroLoop,
)

KIB = 1024


@dataclass(frozen=True)
class Case:
    id: str
    image: Image
    workload: Workload
    at_least: float | None = None
    at_most: float | None = None
    fresh: bool = False
    """Every measurement gets a server that was just started."""
    writes: bool = False
    """Every measurement gets such a server, and a copy of the image."""
    own_rival: Image | None = None
    """Race ourselves on `image` against ourselves on this one, instead of against qemu-nbd."""


def _compressed(image: Image, *, sequential: float, random: float, copy: float) -> list[Case]:
    return [
        Case(f"{image.name}-4k-seq", image, Fio("read", 4 * KIB, 16), at_least=sequential),
        Case(f"{image.name}-4k-rand", image, Fio("randread", 4 * KIB, 16), at_least=random),
        Case(f"{image.name}-nbdcopy", image, NbdCopy(), at_least=copy),
    ]


def _block_status(image: Image) -> list[Case]:
    return [
        Case(f"{image.name}-blockstatus", image, StatusLoop(), at_least=5),
        Case(f"{image.name}-blockstatus-nbdinfo", image, NbdinfoMap(), at_least=5),
        Case(f"{image.name}-blockstatus-first", image, StatusLoop(first_only=True), fresh=True),
    ]


RANDOM_4K_QD16 = Fio("randread", 4 * KIB, 16)


def _writing(id: str, image: Image, workload: Workload, at_least: float | None = None) -> Case:
    return Case(id, image, workload, at_least=at_least, writes=True)


def _new_clusters(requests: int) -> Fio:
    """Most requests meet a cluster that no request before them has met."""
    return Fio("randwrite", 4 * KIB, 16, requests=requests, align=CLUSTER_SIZE)


# Cases of one image stand together: they share its servers.
CASES = [
    Case("4k-randread-qd1", PLAIN, Fio("randread", 4 * KIB, 1), at_least=1.0),
    Case("4k-randread-qd1-one-core", PLAIN, OneCore(Fio("randread", 4 * KIB, 1))),
    Case("4k-randread-qd16", PLAIN, RANDOM_4K_QD16, at_least=2.0),
    Case("4k-randread-qd64", PLAIN, Fio("randread", 4 * KIB, 64), at_least=2.0),
    Case("64k-randread-qd16", PLAIN, Fio("randread", 64 * KIB, 16), at_least=1.5),
    Case("256k-seqread", PLAIN, Fio("read", 256 * KIB, 16), at_least=1.3),
    Case("nbdcopy-out", PLAIN, NbdCopy(), at_least=1.2),
    Case("start-to-listening", PLAIN, Startup(), at_most=150, fresh=True),
    Case("chain64-4k-qd16", CHAIN64, RANDOM_4K_QD16, at_least=8),
    Case("chain256-4k-qd16", CHAIN256, RANDOM_4K_QD16, at_least=50),
    Case("chain256-vs-own-1", CHAIN256, RANDOM_4K_QD16, at_least=1 / 1.3, own_rival=CHAIN1),
    Case("chain256-nbdcopy", CHAIN256, NbdCopy(), at_least=5),
    *_block_status(CHAIN256),
    Case("chain256-start", CHAIN256, Startup(), fresh=True),
    Case("chain256-rss", CHAIN256, PeakRss(), at_most=150, fresh=True),
    *_block_status(FRAGMENTED),
    *_compressed(ZLIB, sequential=10, random=2, copy=1.2),
    Case("zlib-rss", ZLIB, PeakRss(), at_most=150, fresh=True),
    *_compressed(ZSTD, sequential=5, random=1.5, copy=1.2),
    _writing("write-4k-qd1", PLAIN, Fio("randwrite", 4 * KIB, 1), 1.0),
    _writing("write-4k-qd16", PLAIN, Fio("randwrite", 4 * KIB, 16), 1.8),
    _writing("write-256k-seq", PLAIN, Fio("write", 256 * KIB, 16)),
    _writing("write-4k-flush-every-8", PLAIN, Fio("randwrite", 4 * KIB, 16, flush_every=8)),
    _writing("allocate-4k-qd16", EMPTY, _new_clusters(100_000), 1.5),
    _writing("allocate-256k-seq", EMPTY, Fio("write", 256 * KIB, 16, requests=8192), 1.3),
    _writing("nbdcopy-in", EMPTY, NbdCopyIn(Path(PLAIN.name) / "disk.raw"), 1.1),
    _writing("cow-4k-qd16", OVER_PLAIN, _new_clusters(8_000), 1.5),
    _writing("cow-chain64-4k-qd16", OVER_CHAIN, _new_clusters(8_000), 1.5),
    _writing("zero-1T", EMPTY_1T, ZeroLoop(), 10),
]

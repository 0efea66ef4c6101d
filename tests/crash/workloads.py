"""What is done to disks before the power is cut: kinds of images, habits of guests; each run is one seed.

Images are small, so that states are cheap, and have tables that are smaller still, so that they grow all the time.
"""

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from tests.crash.guest import Habits
from tests.crash.recorder import SECTOR
from tests.crash.stamps import Values, read_stamps, stamped
from tests.support.tools import execute, run

KIB = 1024
#: How far the numbers in a guest's stamps are from those of what was there before, which are those of the layers.
FIRST_NUMBER = 100
_SNAPSHOT_FILL = 50
SNAPSHOT = "before"


@dataclass(frozen=True)
class Layer:
    """One image of a chain and what lies in it."""

    options: str = "cluster_size=4k"
    filled: float = 0.0
    """The share of it that is written, in pieces."""
    compressed: bool = False
    format: str = "qcow2"
    snapshot: bool = False
    """Everything written is also held by an internal snapshot."""
    dirty: bool = False
    """Whoever used it last was killed and left refcounts that are wrong."""
    bitmap: bool = False
    """It has a persistent bitmap, enabled."""
    share: float = 1.0
    """How large it is, of the disk."""

    def sectors_of(self, workload: "Workload") -> int:
        """How many it has."""
        return int(workload.size * self.share) // SECTOR


@dataclass(frozen=True)
class Workload:
    """A chain, and a guest that works on it."""

    name: str
    layers: tuple[Layer, ...] = (Layer(),)
    """Bottom first."""
    habits: Habits = field(default_factory=Habits)
    size: int = 512 * KIB
    requests: int = 120
    threads: int = 1
    sessions: int = 1
    """How often the disk is opened and closed."""
    crowded: bool = False
    """The engine has next to no memory for tables."""
    room: int | None = None
    """Bytes that each file may be longer than at the begin."""

    def __str__(self) -> str:
        return self.name

    @property
    def data_file(self) -> str | None:
        return "data.raw" if "data_file" in self.layers[-1].options else None

    @property
    def data_file_is_disk(self) -> bool:
        """The data file alone reads like the disk (Q80)."""
        return "data_file_raw=on" in self.layers[-1].options


@dataclass(frozen=True)
class Prepared:
    """The files of a workload before the guest begins; the same for every seed."""

    directory: Path
    written: tuple[str, ...]
    """Names of the files that change: the top, then its data file."""
    initial: Values
    snapshot: Values | None = None
    """What the internal snapshot holds, for ever."""

    def copy_to(self, directory: Path) -> "Prepared":
        """The same files elsewhere."""
        shutil.copytree(self.directory, directory, dirs_exist_ok=True)
        return replace(self, directory=directory)

    @property
    def top(self) -> Path:
        return self.directory / self.written[0]

    def contents(self) -> list[bytes]:
        """The bytes of the files that change."""
        return [(self.directory / name).read_bytes() for name in self.written]


def prepare(workload: Workload, directory: Path) -> Prepared:
    """Make the files of ``workload`` in the existing, empty ``directory``, which must keep its place."""
    below = ""
    for depth, layer in enumerate(workload.layers):
        name = "top" if depth == len(workload.layers) - 1 else f"layer{depth}"
        options = [*(["-o", layer.options] if layer.options else [])]
        if below:
            options += ["-b", below, "-F", workload.layers[depth - 1].format]
        command = ["qemu-img", "create", "-q", "-f", layer.format, *options, name]
        command.append(str(layer.sectors_of(workload) * SECTOR))
        run(*command, cwd=directory)
        _fill(layer, name, depth, workload, directory)
        below = name
    written = ("top", *((workload.data_file,) if workload.data_file else ()))
    snapshot = _flat(directory, "-l", SNAPSHOT) if workload.layers[-1].snapshot else None
    return Prepared(directory, written, _flat(directory), snapshot)


def _flat(directory: Path, *options: str) -> Values:
    """What QEMU reads from the whole chain."""
    run("qemu-img", "convert", "-O", "raw", *options, "top", "flat", cwd=directory)
    values = read_stamps((directory / "flat").read_bytes())
    (directory / "flat").unlink()
    assert values.min() >= 0
    return values


def _fill(layer: Layer, name: str, depth: int, workload: Workload, directory: Path) -> None:
    generator = random.Random(depth)
    piece = 64 if layer.compressed or workload.size < 1 << 20 else 256
    sectors = layer.sectors_of(workload)
    starts = sorted(generator.sample(range(0, sectors - piece + 1, piece), int(layer.filled * sectors / piece)))
    _write(starts, piece, depth + 1, layer, name, directory)
    if layer.snapshot:
        run("qemu-img", "snapshot", "-q", "-c", SNAPSHOT, name, cwd=directory)
        again = [start for start in starts if generator.random() < 0.3]
        _write(again, piece, depth + _SNAPSHOT_FILL, replace(layer, compressed=False), name, directory)
    if layer.dirty:
        killed = execute(
            "qemu-io", "-f", layer.format, "-c", "write -P 0 0 64k", "-c", "sigraise 9", name, cwd=directory
        )
        assert killed.returncode < 0, killed.stderr
    if layer.bitmap:
        run("qemu-img", "bitmap", "--add", "-g", "4k", "--enable", name, "bitmap", cwd=directory)


def _write(starts: Sequence[int], sector_count: int, number: int, layer: Layer, name: str, directory: Path) -> None:
    if not starts:
        return
    commands = []
    for start in starts:
        (directory / f"fill{start}").write_bytes(stamped(number, start, sector_count))
        verb = "write -c" if layer.compressed else "write"
        commands += ["-c", f"{verb} -s fill{start} {start * SECTOR} {sector_count * SECTOR}"]
    run("qemu-io", "-t", "unsafe", "-f", layer.format, *commands, name, cwd=directory)
    for start in starts:
        (directory / f"fill{start}").unlink()


_SMALL = Habits(largest=16, aligned_to=8)
_TRIMMING = Habits(write=45, zero=12, zero_mapped=6, discard=25, flush=12, largest=48, aligned_to=8, hot=0.4)
_ZEROING = Habits(write=30, zero=22, zero_mapped=14, discard=22, largest=700, aligned_to=64)
_RUDE = Habits(write=40, zero=4, zero_mapped=4, discard=24, flush=28, largest=16, aligned_to=8, rude=0.9)
_BUSY = Habits(largest=24, aligned_to=8, hot=0.3)
_POPULATING = Habits(write=35, discard=6, populate=30, largest=64, aligned_to=8)
_PACKING = Habits(write=20, zero=5, discard=15, compress=45, largest=24, aligned_to=8, hot=0.5)

WORKLOADS = (
    Workload("small requests", habits=_SMALL),
    Workload("a new disk of 64 KiB clusters", (Layer("cluster_size=64k"),), size=2048 * KIB, requests=80),
    Workload("over a base", (Layer(filled=0.7), Layer()), _SMALL),
    Workload(
        "allocating in sequence",
        habits=Habits(write=85, zero=0, zero_mapped=0, discard=2, flush=13, largest=64, sequential=True),
        size=1024 * KIB,
    ),
    Workload("trimming", (Layer(filled=0.8),), _TRIMMING, requests=200),
    Workload("trimming over a base", (Layer(filled=0.7), Layer(filled=0.5)), _TRIMMING, requests=160),
    Workload(
        "zeroing many tables over a shorter base",
        (Layer("cluster_size=1k", filled=0.4, share=0.6), Layer("cluster_size=512", filled=0.2, snapshot=True)),
        _ZEROING,
    ),
    Workload(
        "zeroing many tables over a longer base, crowded",
        (Layer(filled=0.3, share=1.3), Layer("cluster_size=512,refcount_bits=64", filled=0.2)),
        _ZEROING,
        crowded=True,
    ),
    Workload("a full medium", habits=_TRIMMING, requests=160, room=120 * KIB),
    Workload(
        "a full medium, tiny clusters",
        (Layer(filled=0.5), Layer("cluster_size=512,refcount_bits=64")),
        _TRIMMING,
        size=256 * KIB,
        requests=160,
        room=60 * KIB,
    ),
    Workload("preallocated", (Layer("cluster_size=4k,preallocation=metadata", filled=0.2),), _TRIMMING),
    Workload(
        # The table of 64 entries counts 2 MiB, of which the fill leaves a little.
        "a growing refcount table",
        (Layer("cluster_size=512,refcount_bits=64", filled=0.625),),
        Habits(largest=48, discard=4, zero=4),
        size=3072 * KIB,
        requests=40,
    ),
    Workload(
        "a growing refcount table on a medium soon full",
        (Layer("cluster_size=512,refcount_bits=64", filled=0.625),),
        _BUSY,
        size=3072 * KIB,
        requests=60,
        room=90 * KIB,
    ),
    Workload(
        "several at once, a growing refcount table",
        (Layer("cluster_size=512,refcount_bits=64", filled=0.625),),
        _BUSY,
        size=3072 * KIB,
        requests=80,
        threads=4,
    ),
    Workload(
        "refcounts of one bit",
        (Layer("cluster_size=512,refcount_bits=1"),),
        Habits(largest=64, discard=10, zero=8),
        requests=100,
    ),
    Workload(
        "compressed clusters overwritten",
        (Layer("cluster_size=4k", filled=0.9, compressed=True),),
        Habits(write=60, discard=12, zero=10, flush=14, largest=24, aligned_to=8),
    ),
    Workload(
        "extended L2",
        (Layer("cluster_size=16k,extended_l2=on", filled=0.4),),
        Habits(largest=48, discard=12, zero=14, flush=14),
        size=1024 * KIB,
    ),
    Workload(
        "extended L2 over a base",
        (Layer(filled=0.6), Layer("cluster_size=32k,extended_l2=on", filled=0.2)),
        Habits(largest=48, discard=12, zero=14, flush=14),
        size=1024 * KIB,
    ),
    Workload("version 2", (Layer("cluster_size=4k,compat=0.10", filled=0.3),), _TRIMMING),
    Workload(
        "version 2 over a base",
        (Layer(filled=0.6), Layer("cluster_size=4k,compat=0.10", filled=0.3)),
        _TRIMMING,
    ),
    Workload(
        "three layers",
        (
            Layer("", filled=0.5, format="raw"),
            Layer("cluster_size=2k", filled=0.4),
            Layer("cluster_size=8k", filled=0.2),
        ),
        _SMALL,
    ),
    Workload("shared with a snapshot", (Layer(filled=0.8, snapshot=True),), _BUSY),
    Workload(
        "many tables shared with a snapshot",
        (Layer("cluster_size=512", filled=0.8, snapshot=True),),
        _BUSY,
        size=256 * KIB,
    ),
    Workload(
        "compressed and shared with a snapshot",
        (Layer(filled=0.8, snapshot=True, compressed=True),),
        _BUSY,
    ),
    Workload("with a bitmap", (Layer(filled=0.4, bitmap=True),), _SMALL, requests=60, sessions=5),
    Workload(
        "with a bitmap on a full medium",
        (Layer(filled=0.4, bitmap=True),),
        _SMALL,
        requests=90,
        sessions=3,
        room=48 * KIB,
    ),
    Workload("left dirty", (Layer("cluster_size=4k,lazy_refcounts=on", filled=0.4, dirty=True),), _SMALL, requests=30),
    Workload("opened and closed", (Layer(filled=0.4),), _TRIMMING, requests=80, sessions=5),
    Workload(
        "an external data file",
        (Layer("cluster_size=4k,data_file=data.raw", filled=0.5),),
        _TRIMMING,
    ),
    Workload(
        "an external data file that is the disk",
        (Layer("cluster_size=4k,data_file=data.raw,data_file_raw=on", filled=0.5),),
        _TRIMMING,
    ),
    Workload(
        "crowded",
        (Layer("cluster_size=512,refcount_bits=64", filled=0.5, snapshot=True),),
        Habits(largest=64, discard=12, hot=0.5),
        requests=100,
        crowded=True,
    ),
    Workload(
        "several at once, crowded",
        (Layer(filled=0.5), Layer("cluster_size=512,refcount_bits=64", filled=0.3)),
        Habits(largest=48, discard=12, hot=0.5, rude=0.3),
        size=256 * KIB,
        requests=200,
        threads=4,
        crowded=True,
    ),
    Workload("several at once", habits=_BUSY, threads=4, requests=160),
    Workload("several at once over a base", (Layer(filled=0.7), Layer()), _BUSY, threads=4, requests=160),
    Workload(
        "several at once, trimming",
        (Layer(filled=0.7, snapshot=True),),
        _TRIMMING,
        threads=3,
        requests=160,
    ),
    Workload(
        "several at once, overlapping",
        (Layer(filled=0.5),),
        _RUDE,
        size=32 * KIB,
        threads=6,
        requests=1200,
    ),
    Workload(
        "several at once, overlapping subclusters",
        (Layer(filled=0.6), Layer("cluster_size=32k,extended_l2=on", filled=0.3)),
        replace(_RUDE, largest=96, aligned_to=16),
        size=512 * KIB,
        threads=3,
        requests=200,
    ),
    Workload(
        "several at once, tiny clusters",
        (Layer("cluster_size=512,refcount_bits=64", filled=0.1),),
        Habits(largest=24, discard=10),
        threads=4,
        requests=120,
    ),
    Workload("populating", (Layer(filled=0.7), Layer(filled=0.3)), _POPULATING),
    Workload("populating, with a snapshot", (Layer(filled=0.7), Layer(filled=0.5, snapshot=True)), _POPULATING),
    Workload(
        "populating version 2",
        (Layer(filled=0.6), Layer("cluster_size=4k,compat=0.10", filled=0.3)),
        _POPULATING,
    ),
    Workload(
        "populating subclusters",
        (Layer(filled=0.6), Layer("cluster_size=32k,extended_l2=on", filled=0.2)),
        _POPULATING,
        size=1024 * KIB,
    ),
    Workload(
        "populating on a full medium",
        (Layer(filled=0.8), Layer("cluster_size=512,refcount_bits=64")),
        _POPULATING,
        size=256 * KIB,
        room=60 * KIB,
    ),
    Workload(
        "several at once, populating",
        (Layer(filled=0.6), Layer("cluster_size=16k,extended_l2=on", filled=0.3)),
        replace(_POPULATING, rude=0.5),
        size=256 * KIB,
        threads=4,
        requests=200,
    ),
    Workload("storing compressed clusters", (Layer(filled=0.4),), _PACKING, requests=160),
    Workload(
        "storing compressed clusters with refcounts of two bits",
        (Layer("cluster_size=4k,refcount_bits=2", filled=0.5, compressed=True),),
        _PACKING,
    ),
    Workload(
        "several at once, storing compressed clusters",
        (Layer(filled=0.7), Layer(filled=0.3, snapshot=True)),
        replace(_PACKING, populate=10, rude=0.5),
        size=128 * KIB,
        threads=4,
        requests=240,
    ),
)


@cache
def by_name() -> dict[str, Workload]:
    """Every workload by its name."""
    return {workload.name: workload for workload in WORKLOADS}

"""The images that are raced: what each one holds, how it is made, and how it is kept warm.

Images are made by qemu-img and qemu-io only, so that no server is measured on a file that it wrote itself. Every image
has a directory of its own with a `recipe` file in it, written last: a directory whose recipe reads differently, or that
has none because an earlier build was cut short, is built again.
"""

import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
CLUSTER_SIZE = 64 * KIB
GUEST_SIZE = GIB
SEED = 20240229

FRAGMENTED_CLUSTERS = 51_200  # lone allocated clusters, about 25 in the reach of every L2 table
RECIPE_FILE = "recipe"


@dataclass(frozen=True)
class Image:
    """One disk to serve. `name` is its directory below the work directory, `path` of the top file follows from it."""

    name: str
    recipe: str
    build: Callable[[Path, Path], None]
    """Called with the empty directory to build in and the work directory, where `needs` are built already."""

    size: int = GUEST_SIZE
    needs: tuple[str, ...] = ()

    def path(self, work_dir: Path) -> Path:
        return work_dir / self.name / "disk.qcow2"

    def scratch_path(self, work_dir: Path) -> Path:
        """A copy of the top file for servers that write to it, beside the original, where its layers are found."""
        return work_dir / self.name / "scratch"

    def copy(self, work_dir: Path) -> None:
        """Make the scratch copy anew, and let the disk come to rest."""
        _run("cp", "--sparse=always", self.path(work_dir), self.scratch_path(work_dir))
        os.sync()

    def raw_path(self, work_dir: Path) -> Path:
        """The same disk as a raw file, for servers that know no qcow2. Only the plain image has one."""
        return work_dir / self.name / "disk.raw"

    def is_made(self, work_dir: Path) -> bool:
        recipe_path = work_dir / self.name / RECIPE_FILE
        return recipe_path.exists() and recipe_path.read_text() == self.recipe

    def make(self, work_dir: Path) -> None:
        """Build the image, in place of whatever is there."""
        directory = work_dir / self.name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        self.build(directory, work_dir)
        (directory / RECIPE_FILE).write_text(self.recipe)

    def warm(self, work_dir: Path) -> None:
        """Read every byte that the image's files hold, so that no server is the one that waits for the disk.

        Ranges that are allocated on the host but were never written are left out: nothing reads them, and reading them
        would fill the page cache with zeros.
        """
        buffer = bytearray(MIB)
        for path in sorted((work_dir / self.name).iterdir()):
            with path.open("rb", buffering=0) as file:
                for start, end in _data_ranges(file.fileno()):
                    file.seek(start)
                    while file.tell() < end and file.readinto(memoryview(buffer)[: end - file.tell()]):
                        pass


def _data_ranges(fd: int) -> list[tuple[int, int]]:
    size = os.fstat(fd).st_size
    ranges = []
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            break
        end = os.lseek(fd, start, os.SEEK_HOLE)
        ranges.append((start, end))
    return ranges


def _run(*argv: str | Path) -> None:
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


def _create(path: Path, size: int) -> None:
    _run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={CLUSTER_SIZE}", path, str(size))


def _qemu_io(path: Path, commands: Sequence[str]) -> None:
    """Run qemu-io commands as arguments: read from stdin, a command that fails would not fail the process."""
    arguments = [word for command in commands for word in ("-c", command)]
    _run("qemu-io", "-f", "qcow2", "-t", "unsafe", *arguments, path)


def _build_plain(directory: Path, _work_dir: Path) -> None:
    """Random bytes, every cluster allocated, in guest order: the friendliest qcow2 there is. The raw twin is kept."""
    randomness = random.Random(SEED)
    raw = directory / "disk.raw"
    with raw.open("wb") as file:
        for _ in range(GUEST_SIZE // MIB):
            file.write(randomness.randbytes(MIB))
    _run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, directory / "disk.qcow2")


def _scatter(depth: int) -> list[list[int]]:
    """Which clusters each of `depth` layers holds, base first, in the order in which they are written.

    A tenth of the disk is in no layer. Every other cluster is in one layer chosen at random, and one in ten of those in
    a second one as well, so that upper layers also hide data. The clusters of a layer are written in random order.
    """
    randomness = random.Random(SEED)
    layers: list[list[int]] = [[] for _ in range(depth)]
    for cluster_index in range(GUEST_SIZE // CLUSTER_SIZE):
        if randomness.random() < 0.1:
            continue
        copies = 2 if randomness.random() < 0.1 else 1
        for layer_index in randomness.sample(range(depth), copies):
            layers[layer_index].append(cluster_index)
    for clusters in layers:
        randomness.shuffle(clusters)
    return layers


def _build_chain(depth: int) -> Callable[[Path, Path], None]:
    """Layers are written whole clusters at a time, without a backing file, and linked afterwards: no copy-on-write."""

    def build(directory: Path, _work_dir: Path) -> None:
        below: Path | None = None
        for layer_index, clusters in enumerate(_scatter(depth)):
            name = "disk.qcow2" if layer_index == depth - 1 else f"layer{layer_index:03}.qcow2"
            path = directory / name
            _create(path, GUEST_SIZE)
            _qemu_io(
                path,
                [
                    f"write -q -P {(index + layer_index) % 255 + 1} {index * CLUSTER_SIZE} {CLUSTER_SIZE}"
                    for index in clusters
                ],
            )
            if below is not None:
                _run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", below.name, path)
            below = path

    return build


def _build_flattened(directory: Path, work_dir: Path) -> None:
    """The disk of the chain of 256, in one file."""
    _run("qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", CHAIN256.path(work_dir), directory / "disk.qcow2")


def _compressible_pools(randomness: random.Random) -> list[tuple[bytes, int]]:
    """Kinds of data with their share in percent: prose, log lines, binary records, and bytes that do not compress."""
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(randomness.choices(letters, range(26, 0, -1), k=randomness.randint(2, 11))) for _ in range(6000)]
    frequencies = [1 / rank for rank in range(1, len(words) + 1)]
    prose = " ".join(randomness.choices(words, frequencies, k=1_000_000))
    log = "".join(
        f"2024-02-29T{second // 3600 % 24:02}:{second // 60 % 60:02}:{second % 60:02} host{randomness.randrange(40)} "
        f"{words[randomness.randrange(50)]}[{randomness.randrange(30000)}]: {words[randomness.randrange(6000)]} "
        f"request {100_000 + second} took {randomness.random():.3f} s\n"
        for second in range(60_000)
    )
    records = b"".join(
        struct.pack("<QIIdQ", 1 << 40 | index, randomness.randrange(1000), 7, randomness.randrange(4096) / 16, 0)
        for index in range(200_000)
    )
    return [(prose.encode(), 35), (log.encode(), 30), (records, 25), (randomness.randbytes(8 * MIB), 10)]


def _build_compressed(compression: str) -> Callable[[Path, Path], None]:
    """Pieces of a quarter of a cluster, cut at random places of their kind's pool, so that every cluster compresses."""

    def build(directory: Path, _work_dir: Path) -> None:
        randomness = random.Random(SEED)
        pools = _compressible_pools(randomness)
        shares = [share for _, share in pools]
        piece_size = CLUSTER_SIZE // 4
        raw = directory / "disk.raw"
        with raw.open("wb") as file:
            for _ in range(GUEST_SIZE // piece_size):
                ((pool, _),) = randomness.choices(pools, shares)
                start = randomness.randrange(len(pool) - piece_size)
                file.write(pool[start : start + piece_size])
        options = f"compression_type={compression},cluster_size={CLUSTER_SIZE}"
        _run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, directory / "disk.qcow2")
        raw.unlink()

    return build


def _build_fragmented(directory: Path, _work_dir: Path) -> None:
    """Lone clusters in random places all over the disk. Only 4 KiB of each are written; QEMU reserves the rest."""
    path = directory / "disk.qcow2"
    _create(path, TIB)
    pairs = sorted(random.Random(SEED).sample(range(TIB // CLUSTER_SIZE // 2), FRAGMENTED_CLUSTERS))
    batch = 256
    for first in range(0, len(pairs), batch):
        _qemu_io(path, [f"write -q -P 85 {pair * 2 * CLUSTER_SIZE} 4k" for pair in pairs[first : first + batch]])


def _build_empty(size: int) -> Callable[[Path, Path], None]:
    return lambda directory, _work_dir: _create(directory / "disk.qcow2", size)


def _build_overlay(lower: Callable[[], Image]) -> Callable[[Path, Path], None]:
    """An empty layer over another image, whose files are linked into the same directory."""

    def build(directory: Path, work_dir: Path) -> None:
        for path in (work_dir / lower().name).glob("*.qcow2"):
            (directory / path.name.replace("disk", "lower")).hardlink_to(path)
        top = directory / "disk.qcow2"
        _run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", directory / "lower.qcow2", top)
        _run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "lower.qcow2", top)

    return build


PLAIN = Image("plain", "1 GiB, random bytes, all 64 KiB clusters allocated in order, with a raw twin; 1", _build_plain)
CHAIN64 = Image("chain64", "1 GiB, 64 layers, 10 % holes, 10 % hidden, random order; 1", _build_chain(64))
CHAIN256 = Image("chain256", "1 GiB, 256 layers, 10 % holes, 10 % hidden, random order; 1", _build_chain(256))
CHAIN1 = Image("chain1", f"one file out of: {CHAIN256.recipe}", _build_flattened, needs=("chain256",))
ZLIB = Image("zlib", "1 GiB, zlib, 35 % prose, 30 % log, 25 % records, 10 % random; 3", _build_compressed("zlib"))
ZSTD = Image("zstd", "1 GiB, zstd, 35 % prose, 30 % log, 25 % records, 10 % random; 3", _build_compressed("zstd"))
FRAGMENTED = Image(
    "frag1T",
    f"1 TiB, {FRAGMENTED_CLUSTERS} lone clusters in random places; 2",
    _build_fragmented,
    size=TIB,
)
EMPTY = Image("empty64G", "64 GiB, nothing allocated; 1", _build_empty(64 * GIB), size=64 * GIB)
EMPTY_1T = Image("empty1T", "1 TiB, nothing allocated; 1", _build_empty(TIB), size=TIB)
OVER_PLAIN = Image("over-plain", "an empty layer over plain; 1", _build_overlay(lambda: PLAIN), needs=("plain",))
OVER_CHAIN = Image(
    "over-chain64", "an empty layer over chain64; 1", _build_overlay(lambda: CHAIN64), needs=("chain64",)
)

IMAGES = {
    image.name: image
    for image in (
        *(PLAIN, CHAIN64, CHAIN256, CHAIN1, ZLIB, ZSTD, FRAGMENTED),
        *(EMPTY, EMPTY_1T, OVER_PLAIN, OVER_CHAIN),
    )
}

"""The valid images that mutations start from: one of everything, and small, so that thousands of runs stay cheap.

Most are variants of the table that the oracle tests run over. Those whose files would have many megabytes are made anew
here, and those with dirty bitmaps, which only qemu-img can put in.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.hostile.anatomy import Anatomy
from tests.support.images import Layer, Variant, build
from tests.support.tools import run
from tests.support.variants import SUBCLUSTERS, VARIANTS, single

_NAMES = (
    "clusters-1k",
    "clusters-4k",
    "clusters-16k",
    "extended-l2-16k",
    "extended-l2-64k",
    "refcount-bits-1",
    "refcount-bits-8",
    "refcount-bits-64",
    "zlib-mixed",
    "zstd-mixed",
    "zlib-partial-last-cluster",
    "zlib-clusters-4k",
    "zstd-clusters-4k",
    "zlib-extended-l2",
    "zstd-extended-l2",
    "zlib-v2",
    "zlib-clusters-512",
    "zeros-preallocated",
    "lazy-refcounts",
    "corrupt",
    "preallocation-metadata",
    "preallocation-extended-l2",
    "data-file-raw-off",
    "data-file-raw-on",
    "data-file-extended-l2",
    "odd-number-of-sectors",
    "one-cluster-and-a-sector",
    "snapshots",
    "snapshots-v2",
    "snapshots-compressed",
    "snapshots-extended-l2",
    "snapshots-over-backing",
    "raw-base",
    "raw-base-odd-length",
    "v2-over-v3",
    "2M-over-512",
    "extended-l2-middle",
    "backing-shorter",
    "short-in-the-middle",
    "compressed-overlay",
    "zlib-over-zstd",
    "data-file-in-the-middle",
)
#: Only the visible part of the last cluster is compressed: QEMU is asked for each sector of a bad one, and inflates it.
_LARGE = ("write 0 512", "compress 1c 64k")
_OWN = (
    single("small-v2", "compat=0.10"),
    single("small-v3"),
    single(
        "small-clusters-512",
        "cluster_size=512",
        ("write 0 3c", "write 60c 10c", "zero 66c 2c", "discard 61c 1c"),
        "100c",
    ),
    single("small-clusters-2M", "cluster_size=2M", ("write 1c 512", "zero 2c 1c"), "4c"),
    single("small-zlib-clusters-2M", "cluster_size=2M", _LARGE, "1c+64k"),
    single("small-zstd-clusters-2M", "cluster_size=2M,compression_type=zstd", _LARGE, "1c+64k"),
    single(
        "small-extended-l2-2M", "extended_l2=on,cluster_size=2M", ("write 3s 2s", "zero 9s 1s", "write 1c+4s 1s"), "3c"
    ),
    single("bitmaps", steps=("write 0 2c", "write 5c 1c", "zero 9c 1c")),
    Variant("bitmaps-over-backing", (Layer("1M", SUBCLUSTERS[:3]), Layer("2M", ("write 2c 1c", "zero 0 1c")))),
)
_KNOWN = {variant.name: variant for variant in VARIANTS}
VARIANTS_TO_MUTATE: list[Variant] = [*(_KNOWN[name] for name in _NAMES), *_OWN]


@dataclass(frozen=True)
class StoredFile:
    """An image file kept in memory: its length, and its data without the holes, which block status would show."""

    length: int
    segments: tuple[tuple[int, bytes], ...]

    @classmethod
    def load(cls, path: Path) -> "StoredFile":
        """Read the file at ``path``."""
        segments = []
        with path.open("rb") as file:
            length = end = os.fstat(file.fileno()).st_size
            start = 0
            while start < length:
                try:
                    start = os.lseek(file.fileno(), start, os.SEEK_DATA)
                except OSError:  # a hole up to the end
                    break
                end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                segments.append((start, os.pread(file.fileno(), end - start, start)))
                start = end
        return cls(length, tuple(segments))

    def store(self, path: Path) -> None:
        """Write the file anew, with its holes."""
        with path.open("wb", buffering=0) as file:
            for offset, data in self.segments:
                file.seek(offset)
                file.write(data)
            file.truncate(self.length)


@dataclass(frozen=True)
class Seed:
    """A variant on disk, ready to be copied and damaged."""

    variant: Variant
    directory: str
    """Where it was built. Names of data files lead there: they are never damaged."""
    files: dict[str, StoredFile]
    """By name relative to the variant's directory; all layers and data files."""
    images: tuple[str, ...]
    """The QCOW2 layers among them, base first."""
    top: str

    @cached_property
    def anatomies(self) -> dict[str, Anatomy]:
        """Where things are in each QCOW2 layer."""
        found = {}
        for name in self.images:
            content = bytearray(self.files[name].length)
            for offset, data in self.files[name].segments:
                content[offset : offset + len(data)] = data
            found[name] = Anatomy(bytes(content))
        return found


def make_seed(variant: Variant, directory: Path) -> Seed:
    """Build ``variant`` in the empty ``directory``."""
    image = build(variant, directory)
    if variant.name.startswith("bitmaps"):
        for name in ("first", "second"):
            run("qemu-img", "bitmap", "--add", "-g", "64k", image.top, name)
        run("qemu-io", "-f", "qcow2", "-c", "write -q 256k 64k", image.top)
        run("qemu-img", "bitmap", "--disable", image.top, "first")
    formats = {path: layer.format for path, layer in zip(image.paths, variant.layers, strict=True)}
    return Seed(
        variant,
        str(directory),
        files={
            str(path.relative_to(directory)): StoredFile.load(path) for path in directory.rglob("*") if path.is_file()
        },
        images=tuple(str(path.relative_to(directory)) for path in image.paths if formats[path] == "qcow2"),
        top=str(image.top.relative_to(directory)),
    )

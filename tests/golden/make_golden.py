"""Make the golden images and their MANIFEST.json anew: ``python -m tests.golden.make_golden`` in the project's root.

Needs QEMU's tools; what they say about the images is recorded, so that ``test_golden.py`` needs none of them. These are
the cases that broke good readers. Made once and kept: an image of yesterday's QEMU must be readable tomorrow.
"""

import gzip
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tests.support import oracles
from tests.support.images import Image, Layer, Variant, build
from tests.support.tools import run
from tests.support.variants import SUBCLUSTERS, single

HERE = Path(__file__).parent

#: Small pieces of every kind, in 4 KiB clusters so that the files stay small.
PIECES = ("write 0 1c", "write 3c+512 512", "zero 5c 1c", "write 6c 2c", "unmap 6c 1c", "zero 7c 1c", "write 11c 512")
SMALL = "cluster_size=4k"

IMAGES = [
    single("v2", f"compat=0.10,{SMALL}", PIECES, "12c"),
    single("clusters-512", "cluster_size=512", (*PIECES, "write 63c 2c", "write 200c 1c"), "201c"),
    single("clusters-2M", "cluster_size=2M", ("write 2M-512 1k",), "6M"),
    single("size-not-of-clusters", SMALL, PIECES, "11c+512"),
    single("refcount-bits-1", f"refcount_bits=1,{SMALL}", PIECES, "12c"),
    single("refcount-bits-64", f"refcount_bits=64,{SMALL}", PIECES, "12c"),
    single("zeros-plain-and-preallocated", SMALL, ("write 0 4c", "zero 1c 1c", "unmap 2c 1c", "zero 8c 1c"), "12c"),
    single("zlib", SMALL, ("compress 0 3c", "write 1c 1c", "compress 11c 1c"), "12c"),
    single("zstd", f"compression_type=zstd,{SMALL}", ("compress 0 3c", "write 1c 1c", "compress 11c 1c"), "12c"),
    single("extended-l2-gaps", "extended_l2=on,cluster_size=16k", SUBCLUSTERS, "20c"),
    single("last-l1-entry", SMALL, ("write 0 512", "write 1G-4k 4k"), "1G"),
    single("snapshot", SMALL, (*PIECES, "snapshot then", "write 0 1c", "zero 3c 1c"), "12c", snapshots=("then",)),
    single("unknown-compatible-bit", "cluster_size=8k", ("write 0 512", "poke 80 8 0x40000000"), "16k"),
    # The first entry of the feature name table, "dirty bit", then names the bit that is set.
    single("unknown-incompatible-bit", "cluster_size=8k", ("poke 120 2 0x0028", "poke 72 8 0x10000000000"), "16k"),
    Variant("short-backing", (Layer("5c+512", ("write 2c 3c+512",), SMALL), Layer("12c", ("write 9c 512",), SMALL))),
    Variant(
        "short-in-the-middle",
        (Layer("12c", ("write 0 12c",), SMALL), Layer("4c", (), SMALL), Layer("12c", ("zero 1c 1c",), SMALL)),
    ),
]

#: What nbdq must say about an image that it must not serve.
REFUSED = {"unknown-incompatible-bit": "dirty bit"}

#: A disk that is larger is recorded by pieces of this size around its data.
READ_LENGTH = 64 << 10


def main() -> None:
    manifest = {}
    for variant in IMAGES:
        directory = HERE / variant.name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        with tempfile.TemporaryDirectory() as scratch:
            image = build(variant, Path(scratch))
            for path in image.paths:
                content = path.read_bytes()
                (directory / f"{path.name}.gz").write_bytes(gzip.compress(content, 9, mtime=0))
                path.write_bytes(content)  # without holes, as a test will unpack it
            manifest[variant.name] = describe(image)
    (HERE / "MANIFEST.json").write_text(json.dumps(manifest, indent=1) + "\n")


def describe(image: Image) -> dict[str, Any]:
    """What QEMU says about an image."""
    entry: dict[str, Any] = {"layers": [path.name for path in image.paths]}
    if image.variant.name in REFUSED:
        return {**entry, "refused": REFUSED[image.variant.name]}
    raw = image.directory / "raw"
    run("qemu-img", "convert", "-O", "raw", image.top, raw)
    entry["size"] = image.size
    entry["map"] = oracles.map_text(image)
    entry["reads"] = reads(raw, [extent["start"] for extent in oracles.map_extents(image) if extent["data"]])
    entry["snapshots"] = {}
    for name in image.variant.snapshots:
        run("qemu-img", "convert", "-l", name, "-O", "raw", image.top, raw)
        entry["snapshots"][name] = reads(raw, [])
    return entry


def reads(raw: Path, data: list[int]) -> list[tuple[int, int, str]]:
    """(offset, length, sha256) of the whole disk, or of what is around the data of a large one."""
    size = raw.stat().st_size
    pieces = [(0, size)] if size <= 8 << 20 else [(start // READ_LENGTH * READ_LENGTH, READ_LENGTH) for start in data]
    found = []
    with raw.open("rb") as file:
        for offset, length in pieces:
            file.seek(offset)
            found.append((offset, length, hashlib.sha256(file.read(length)).hexdigest()))
    return found


if __name__ == "__main__":
    main()

"""Images to order: a :class:`Variant` says what a chain of layers is and what was done to it; :func:`build` makes it.

QEMU's own tools do the making, so what nbdq is tested on is what the field has. Content is a function of (seed, guest
offset), different in every sector, so that a sector served from the wrong place or layer is always seen.

Offsets and lengths in steps are sums of numbers with a unit: ``k M G T`` bytes, ``c`` clusters and ``s`` subclusters of
that layer, as in ``"write 3c+512 64k"``. The steps:

=====================  =====================================================================
``write OFF LEN``      data
``compress OFF LEN``   compressed clusters (whole clusters)
``noise OFF LEN``      incompressible data, through the compressing path
``zero OFF LEN``       write zeroes; an allocated cluster keeps its host offset
``unmap OFF LEN``      write zeroes, and give the space back
``discard OFF LEN``    discard
``snapshot NAME``      internal snapshot
``resize SIZE``        grow or shrink
``commit``             copy into the layer below, and keep what was copied here, too
``amend OPTIONS``      ``qemu-img amend -o``
``truncate LEN``       cut or extend the file itself
``poke OFF WIDTH N``   overwrite a big-endian integer of WIDTH bytes at a file offset
=====================  =====================================================================
"""

import json
import os
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.support.tools import run

_UNITS = {"": 1, "k": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_QEMU_IO = {
    "write": "write -q",
    "compress": "write -q -c",
    "noise": "write -q -c",
    "zero": "write -q -z",
    "unmap": "write -q -z -u",
    "discard": "discard -q",
}
_CARRY_DATA = {"write", "compress", "noise"}


@dataclass(frozen=True)
class Layer:
    """One image file of a chain: how it is created, then what happens to it, in order."""

    size: str
    steps: tuple[str, ...] = ()
    options: str = ""
    """As for ``qemu-img create -o``, comma separated; ``{directory}`` is replaced."""
    format: str = "qcow2"
    name: str = ""
    """File name, relative to the variant's directory; numbered by default."""
    backing: str = ""
    """The backing name to record, if it is not simply the path of the layer below. ``{directory}`` is replaced."""

    @property
    def cluster_size(self) -> int:
        found = re.search(r"cluster_size=(\w+)", self.options)
        return _number(found[1], cluster=0) if found else 64 << 10

    def bytes(self, text: str) -> int:
        """A size expression of the module's docstring, in bytes."""
        return _number(text, cluster=self.cluster_size)


@dataclass(frozen=True)
class Variant:
    """A named chain, base first, with what the server must be told to serve it."""

    name: str
    layers: tuple[Layer, ...]
    serve: tuple[str, ...] = ()
    """Further options of ``nbdq serve`` and ``nbdq map``; ``{directory}`` is replaced."""
    snapshots: tuple[str, ...] = ()
    """Internal snapshots of the top image that an export can show."""
    huge: bool = False
    """Too large to copy out whole, even as a sparse file."""

    def __str__(self) -> str:
        return self.name


@dataclass
class Image:
    """A variant on disk."""

    variant: Variant
    directory: Path
    paths: list[Path] = field(default_factory=list)
    """Base first."""

    @property
    def top(self) -> Path:
        return self.paths[-1]

    @property
    def size(self) -> int:
        """Guest bytes, as QEMU rounds them."""
        return int(
            json.loads(run("qemu-img", "info", "-f", self.format, "--output=json", self.top, cwd=self.directory))[
                "virtual-size"
            ]
        )

    @property
    def format(self) -> str:
        return self.variant.layers[-1].format

    @property
    def options(self) -> list[str]:
        return [option.format(directory=self.directory) for option in self.variant.serve]


def build(variant: Variant, directory: Path) -> Image:
    """Make every layer of ``variant`` in the empty ``directory``; the same variant always gives the same guest data."""
    image = Image(variant, directory)
    for depth, layer in enumerate(variant.layers):
        path = directory / (layer.name or f"{depth}.{layer.format}")
        path.parent.mkdir(parents=True, exist_ok=True)
        _create(layer, path, image)
        image.paths.append(path)
        _perform(layer, path, seed=depth << 16)
    _settle(directory)
    return image


def content(seed: int, offset: int, length: int) -> bytes:
    """What a ``write`` puts at ``offset``: every sector differs from all others, and deflates to about a fifth."""
    first, last = offset // 512, (offset + length + 511) // 512
    labels = np.arange(first, last, dtype=np.uint64) + (np.uint64(seed + 1) << np.uint64(40))
    sectors = np.repeat(labels[:, None], 64, axis=1)
    mixed = labels[:, None] * (np.uint64(0x9E3779B97F4A7C15) * np.arange(1, 25, 2, dtype=np.uint64))
    sectors[:, 8:20] = mixed ^ (mixed >> np.uint64(29))
    return sectors.tobytes()[offset - first * 512 :][:length]


def noise(seed: int, offset: int, length: int) -> bytes:
    """Bytes that no compressor makes smaller."""
    return random.Random(f"{seed}:{offset}").randbytes(length)


def _number(text: str, *, cluster: int) -> int:
    units = {**_UNITS, "c": cluster, "s": cluster // 32}
    terms = re.findall(r"([+-]?\d+)([a-zA-Z]?)", text)
    assert "".join(map("".join, terms)) == text, f"not a size: {text!r}"
    return sum(int(value) * units[unit] for value, unit in terms)


def _settle(directory: Path) -> None:
    """Bring every file into the page cache.

    Linux calls preallocated, unwritten space a hole until it is cached, and data from then on; QEMU's answers change
    with that (P5). Two tools can only be compared once nothing is left to change.
    """
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 20):
                    pass


def _create(layer: Layer, path: Path, image: Image) -> None:
    command: list[str | Path] = ["qemu-img", "create", "-q", "-f", layer.format]
    if layer.options:
        command += ["-o", layer.options.format(directory=image.directory)]
    if image.paths:
        below = image.paths[-1]
        name = layer.backing.format(directory=image.directory) or os.path.relpath(below, path.parent)
        command += ["-u", "-b", name, "-F", image.variant.layers[len(image.paths) - 1].format]
    run(*command, path, str(layer.bytes(layer.size)), cwd=image.directory)


def _perform(layer: Layer, path: Path, *, seed: int) -> None:
    """Do the layer's steps; consecutive guest operations share one qemu-io process."""
    batch: list[str] = []
    scratch: list[Path] = []

    def flush() -> None:
        if batch:
            run("qemu-io", "-t", "unsafe", "-f", layer.format, *batch, path, cwd=path.parent)
        for used in scratch:
            used.unlink()
        batch.clear()
        scratch.clear()

    for number, step in enumerate(layer.steps):
        verb, *words = step.split()
        if verb not in _QEMU_IO:
            flush()
            _administer(layer, path, verb, words)
            continue
        offset, length = map(layer.bytes, words)
        source = ""
        if verb in _CARRY_DATA:
            make = noise if verb == "noise" else content
            payload = path.with_name(f"{path.name}.step{number}")
            payload.write_bytes(make(seed + number, offset, length))
            scratch.append(payload)
            source = f"-s {payload.name} "
        batch += ["-c", f"{_QEMU_IO[verb]} {source}{offset} {length}"]
    flush()


def _administer(layer: Layer, path: Path, verb: str, words: list[str]) -> None:
    match verb, words:
        case "snapshot", [name]:
            run("qemu-img", "snapshot", "-q", "-c", name, path)
        case "resize", [size]:
            run(
                "qemu-img",
                "resize",
                "-q",
                "-f",
                layer.format,
                "--shrink",
                path,
                str(layer.bytes(size)),
                cwd=path.parent,
            )
        case "commit", []:
            run("qemu-img", "commit", "-q", "-t", "unsafe", "-d", "-f", layer.format, path)
        case "amend", [options]:
            run("qemu-img", "amend", "-q", "-t", "unsafe", "-f", layer.format, "-o", options, path)
        case "truncate", [length]:
            os.truncate(path, layer.bytes(length))
        case "poke", [offset, width, value]:
            with path.open("r+b") as file:
                file.seek(int(offset))
                file.write(int(value, 0).to_bytes(int(width), "big"))
        case _:
            raise AssertionError(f"unknown step {verb} {words}")

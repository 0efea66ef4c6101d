"""Chains of small images, made by QEMU, full of stamps."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.crash.recorder import SECTOR
from tests.crash.stamps import Values, read_stamps, stamped
from tests.support.tools import run

KIB = 1024


@dataclass(frozen=True)
class Layer:
    """One image of a chain, and what lies in it."""

    options: str = "cluster_size=4k"
    filled: float = 0.5
    """The share of it that is written, in pieces."""
    zeroed: float = 0.0
    """The share that is made zero, after that."""
    compressed: bool = False
    piece: int = 16
    """Sectors that are written at once."""
    format: str = "qcow2"
    size: int = 256 * KIB
    snapshot: bool = False
    """An internal snapshot holds what was written, of which a part is written again."""
    bitmap: bool = False
    """It has a persistent bitmap, enabled."""


def build(directory: Path, stem: str, layers: Sequence[Layer], *, number: int) -> str:
    """Make a chain of ``layers``, bottom first, and return the name of its top.

    Layer ``n`` is called ``stem`` and its number; its stamps are ``number`` + its number.
    """
    for depth, layer in enumerate(layers):
        name = f"{stem}{depth}"
        backing = ["-b", f"{stem}{depth - 1}", "-F", layers[depth - 1].format] if depth else []
        options = ["-o", layer.options] if layer.format == "qcow2" else []
        run("qemu-img", "create", "-q", "-f", layer.format, *options, *backing, name, str(layer.size), cwd=directory)
        _fill(directory, name, layer, random.Random(f"{name} {number}"), number + depth)
    return f"{stem}{len(layers) - 1}"


def _fill(directory: Path, name: str, layer: Layer, generator: random.Random, number: int) -> None:
    unit = layer.piece
    places = range(0, layer.size // SECTOR, unit)
    chosen = sorted(generator.sample(places, int(layer.filled * len(places))))
    _write(directory, name, layer, chosen, unit, number, compressed=layer.compressed)
    if layer.snapshot:
        run("qemu-img", "snapshot", "-q", "-c", "before", name, cwd=directory)
        again = [place for place in chosen if generator.random() < 0.3]
        _write(directory, name, layer, again, unit, number + 50, compressed=False)
    zeros = generator.sample(places, int(layer.zeroed * len(places)))
    commands = [f"write -z -u {place * SECTOR} {unit * SECTOR}" for place in zeros]
    _qemu_io(directory, name, layer, commands)
    if layer.bitmap:
        run("qemu-img", "bitmap", "--add", "-g", "4k", "--enable", name, "bitmap", cwd=directory)


def _write(
    directory: Path, name: str, layer: Layer, places: Sequence[int], unit: int, number: int, *, compressed: bool
) -> None:
    commands = []
    for place in places:
        (directory / f"fill{place}").write_bytes(stamped(number, place, unit))
        verb = "write -c" if compressed else "write"
        commands.append(f"{verb} -s fill{place} {place * SECTOR} {unit * SECTOR}")
    _qemu_io(directory, name, layer, commands)
    for place in places:
        (directory / f"fill{place}").unlink()


def _qemu_io(directory: Path, name: str, layer: Layer, commands: Sequence[str]) -> None:
    if commands:
        options = [word for command in commands for word in ("-c", command)]
        run("qemu-io", "-t", "unsafe", "-f", layer.format, *options, name, cwd=directory)


def read_by_qemu(path: Path, *, format: str, snapshot: str | None = None) -> Values:
    """What QEMU reads from the whole chain."""
    flat = path.with_name("flat.tmp")
    options = ["-l", snapshot] if snapshot is not None else []
    run("qemu-img", "convert", "-t", "unsafe", "-f", format, "-O", "raw", *options, path, flat, cwd=path.parent)
    try:
        return read_stamps(flat.read_bytes())
    finally:
        flat.unlink()


def padded(values: Values, count: int) -> Values:
    """The same disk with ``count`` sectors, zeros behind its end."""
    assert len(values) <= count
    return np.pad(values, (0, count - len(values)))

"""Everything that the engine does to an image, in any order, against a model; QEMU has the last word.

A run is its seed: ``NBDQ_SEED=n NBDQ_RUNS=100 pytest tests/qcow2/writing/test_everything.py`` explores others.
"""

import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdq.qcow2.features import CompressionType
from tests.support.engine import Engine, K, check, make_image, make_raw, shown
from tests.support.images import content
from tests.support.tools import requires, run

pytestmark = requires("qemu-img")

_SEED = int(os.environ.get("NBDQ_SEED", "1"))
_RUNS = int(os.environ.get("NBDQ_RUNS", "2"))
_STEPS = 120
_LARGEST = 700 * K

VARIANTS: dict[str, dict[str, Any]] = {
    "4k": {"cluster_size": 4 * K},
    "64k": {"cluster_size": 64 * K},
    "512, 64 bits": {"cluster_size": 512, "refcount_bits": 64},
    "512, one bit": {"cluster_size": 512, "refcount_bits": 1},
    "two bits": {"cluster_size": 4 * K, "refcount_bits": 2},
    "version 2": {"cluster_size": 4 * K, "version": 2},
    "subclusters of 512": {"cluster_size": 16 * K, "extended_l2": True},
    "subclusters of 2k": {"cluster_size": 64 * K, "extended_l2": True, "refcount_bits": 8},
    "zstd": {"cluster_size": 8 * K, "compression_type": CompressionType.ZSTD},
    "data file": {"cluster_size": 4 * K, "data_file_name": "data.raw"},
}


class Run:
    """One image over a base, or over nothing, and what it should read as."""

    def __init__(self, directory: Path, options: dict[str, Any], seed: int) -> None:
        self.chance = random.Random(seed)
        self.has_data_file = "data_file_name" in options
        self.can_compress = not self.has_data_file and "compression_type" not in options
        self.data = directory / "data.raw" if self.has_data_file else None
        if self.data is not None:
            self.data.touch()
        size = self.chance.randrange(1, _LARGEST // 512) * 512
        self.path = make_image(directory / "top.qcow2", size, **options)
        self.base: Path | None = make_raw(directory / "base.raw", 300 * K + 512, (0, 100 * K), (150 * K, 99 * K))
        self.model = self.below(size)
        self.number = 0
        self.did: list[str] = []
        self.open()

    def below(self, size: int) -> bytearray:
        found = self.base.read_bytes() if self.base is not None else b""
        return bytearray(found[:size].ljust(size, b"\0"))

    def open(self) -> None:
        self.engine = Engine(self.path, below=self.base, data=self.data)
        self.disk = self.engine.disk
        self.cluster = self.engine.cluster_size

    def place(self) -> tuple[int, int]:
        unit = self.chance.choice((512, 512, self.cluster, 4 * self.cluster))
        first = self.chance.randrange(-(-len(self.model) // unit)) * unit
        length = min(int(2 ** self.chance.uniform(0, 7)) * unit, 200 * K, len(self.model) - first)
        return first, length

    def step(self) -> None:
        """Do something, and let the model follow."""
        actions: dict[Callable[[], None], int] = {
            self.write: 30,
            self.write_cached: 15,
            self.zero: 8,
            self.discard: 8,
            self.populate: 15,
            self.store_compressed: 15 if self.can_compress else 0,
            self.flush: 8,
            self.shrink: 3,
            self.grow: 3,
            self.make_empty: 1,
            self.stand_alone: 1,
            self.reopen: 3,
        }
        action = self.chance.choices(list(actions), list(actions.values()))[0]
        self.number += 1
        self.did.append(action.__name__)
        action()

    def write(self) -> None:
        offset, length = self.place()
        self.model[offset : offset + length] = self.engine.write(offset, length, seed=self.number)

    def write_cached(self) -> None:
        offset, length = self.place()
        length = min(length, 2 * self.cluster)
        if not self.engine.write_cached(offset, length, seed=self.number):
            self.engine.write(offset, length, seed=self.number)
        self.model[offset : offset + length] = content(self.number << 20, offset, length)

    def zero(self) -> None:
        offset, length = self.place()
        self.disk.zero(offset, length, unmap=self.chance.random() < 0.5)
        self.model[offset : offset + length] = bytes(length)

    def discard(self) -> None:
        """Each sector stays or becomes zeros (P95)."""
        offset, length = self.place()
        self.disk.discard(offset, length)
        found = self.engine.read(offset, length)
        for start in range(0, length, 512):
            sector = found[start : start + 512]
            assert sector == bytes(512) or sector == self.model[offset + start : offset + start + 512]
        self.model[offset : offset + length] = found

    def populate(self) -> None:
        self.disk.populate(*self.place())

    def store_compressed(self) -> None:
        number = self.chance.randrange(-(-len(self.model) // self.cluster))
        start, end = number * self.cluster, min((number + 1) * self.cluster, len(self.model))
        noise = self.chance.randrange(self.cluster * 3 // 4)
        data = random.Random(self.number).randbytes(noise).ljust(self.cluster, b"\x07")
        only_if_open = self.chance.random() < 0.3
        if only_if_open:  # as a stream does: it is what shows already
            data = bytes(self.model[start:end]).ljust(self.cluster, b"\0")
        stream = zlib.compressobj(wbits=-12)
        deflated = stream.compress(data) + stream.flush()
        if len(deflated) <= self.cluster:
            self.disk.write_compressed(start, deflated, if_open=only_if_open)
            self.model[start:end] = data[: end - start]

    def flush(self) -> None:
        self.disk.flush()

    def shrink(self) -> None:
        size = self.chance.randrange(1, len(self.model) // 512 + 1) * 512
        if size < len(self.model):
            self.disk.shrink(size)
            del self.model[size:]

    def grow(self) -> None:
        size = len(self.model) + self.chance.randrange(1, _LARGEST // 512) * 512
        if size <= 2 * _LARGEST:
            self.disk.grow(size)
            self.model.extend(bytes(size - len(self.model)))

    def make_empty(self) -> None:
        self.disk.make_empty()
        self.model = self.below(len(self.model))

    def stand_alone(self) -> None:
        self.disk.populate(0, len(self.model))
        self.disk.replace_below(None)
        self.base = None

    def reopen(self) -> None:
        self.close()
        self.open()

    def close(self) -> None:
        self.disk.close()
        if not self.has_data_file:
            check(self.path)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("seed", range(_SEED, _SEED + _RUNS))
def test_whatever_is_done_the_disk_reads_as_it_should(options: dict[str, Any], seed: int, tmp_path: Path) -> None:
    state = Run(tmp_path, options, seed)
    for number in range(_STEPS):
        state.step()
        if number % 8 == 0:
            assert state.engine.contents() == state.model, f"seed {seed}, after {state.did[-10:]}"
    assert state.engine.contents() == state.model, f"seed {seed}, after {state.did[-10:]}"
    state.disk.populate(0, len(state.model))
    state.disk.replace_below(None)
    assert state.engine.contents() == state.model, f"seed {seed}, populated"
    state.close()
    if state.has_data_file:
        run("qemu-img", "check", "top.qcow2", cwd=tmp_path)
        run("qemu-img", "convert", "-O", "raw", "top.qcow2", "top.shown", cwd=tmp_path)
        assert (tmp_path / "top.shown").read_bytes() == state.model
    else:
        assert shown(state.path) == state.model, f"seed {seed}, by QEMU"

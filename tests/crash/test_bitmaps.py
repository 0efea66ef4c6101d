"""Power cuts while bitmaps are stored, come to the file, or leave it: nobody believes one that misses a write (R-57).

The disk itself is as it was all the time: bitmaps are metadata that the guest does not see.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nbdq.chain.bitmaps import bitmaps_of
from nbdq.chain.clusters import ClusterCache
from nbdq.chain.open import open_writable
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.policy import Policy
from nbdq.qcow2.bitmaps.directory import read_bitmaps
from nbdq.qcow2.bitmaps.tables import load_bits
from nbdq.qcow2.features import Autoclear
from nbdq.qcow2.format import read_header
from nbdq.storage import FileStorage
from tests.crash.operations import crash_states
from tests.support.tools import execute, requires, run

pytestmark = requires("qemu-img", "qemu-io")

K, M = 1 << 10, 1 << 20
#: What a bitmap says: dirty granules of 4 KiB, or None if it is not to be believed. No entry: it is not there.
Bits = dict[str, set[int] | None]


def image(path: Path, *bitmaps: str) -> Path:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "4M")
    for name in bitmaps:
        run("qemu-img", "bitmap", "--add", "-g", "4k", path, name)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", path)  # marks 256 granules
    return path


def opened(path: Path) -> OverlayDisk:
    disk = open_writable(str(path), format="qcow2", policy=Policy(locking=False), clusters=ClusterCache(budget=M))
    assert isinstance(disk, OverlayDisk)
    return disk


def believed(path: Path) -> Bits:
    """What a backup would believe that opens the image."""
    storage = FileStorage.open(str(path))
    try:
        header = read_header(storage)
        if Autoclear.BITMAPS not in header.autoclear:
            return {}
        found: Bits = {}
        for entry in read_bitmaps(storage, header):
            bits = None if entry.is_inconsistent else load_bits(storage, header, entry.name)
            found[entry.name] = bits and set(np.flatnonzero(np.unpackbits(bits.packed, bitorder="little")).tolist())
        return found
    finally:
        storage.close()


def check(path: Path) -> dict[str, int]:
    """What qemu-img check finds but leaks."""
    report = json.loads(execute("qemu-img", "check", "-f", "qcow2", "--output=json", path).stdout)
    return {name: report[name] for name in ("corruptions", "check-errors") if report.get(name)}


def write(disk: OverlayDisk, offset: int, length: int) -> None:
    disk.write(offset, memoryview(b"\2" * length))


def add_and_store(disk: OverlayDisk) -> None:
    bitmaps_of(disk.top).add("new", granularity_bits=12, persistent=True)
    write(disk, 2 * M, 8 * K)
    disk.finish()


def remove_and_store(disk: OverlayDisk) -> None:
    bitmaps_of(disk.top).remove("b0")
    write(disk, 2 * M, 8 * K)
    disk.finish()


def remove_at_once(disk: OverlayDisk) -> None:
    bitmaps_of(disk.top).remove("b0")
    bitmaps_of(disk.top).forget_removed(disk.top)
    write(disk, 2 * M, 8 * K)
    disk.flush()


def clear_and_store(disk: OverlayDisk) -> None:
    bitmaps_of(disk.top).clear("b0")
    write(disk, 2 * M, 8 * K)
    disk.finish()


def grow_and_store(disk: OverlayDisk) -> None:
    disk.grow(40 * M)  # the bits do not fit into their cluster any more
    write(disk, 30 * M, 8 * K)
    disk.finish()


BEFORE = set(range(256))
WRITTEN = {512, 513}

#: (bitmaps of the image, what is done, what each bitmap may say if it is believed, which are there at the end)
CASES: dict[str, tuple[tuple[str, ...], Callable[[OverlayDisk], None], Bits]] = {
    "the first": ((), add_and_store, {"new": WRITTEN}),
    "one more": (("b0",), add_and_store, {"b0": BEFORE | WRITTEN, "new": WRITTEN}),
    "one less": (("b0", "b1"), remove_and_store, {"b1": BEFORE | WRITTEN}),
    "the last": (("b0",), remove_and_store, {}),
    "one less at once": (("b0", "b1"), remove_at_once, {"b1": None}),
    "the last at once": (("b0",), remove_at_once, {}),
    "one cleared": (("b0", "b1"), clear_and_store, {"b0": WRITTEN, "b1": BEFORE | WRITTEN}),
    "one that grows": (("b0",), grow_and_store, {"b0": BEFORE | {7680, 7681}}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_cut_leaves_bitmaps_that_nobody_believes_or_right_ones(case: str, tmp_path: Path) -> None:
    names, operate, final = CASES[case]
    path = image(tmp_path / "disk", *names)
    disk = opened(path)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rebuilt = tmp_path / "state"
    states = list(crash_states([path], lambda: operate(disk), seed=seed, per_cut=12))
    for number, (content,) in enumerate(states):
        rebuilt.write_bytes(content)
        found = believed(rebuilt)
        for name, bits in found.items():
            assert bits is None or bits == final.get(name), f"state {number} of {len(states)}: {name}"
        if number % 8 == 0 or number == len(states) - 1:
            assert not check(rebuilt), f"state {number} of {len(states)}"
    assert found == final
    disk.close()


def test_a_removed_bitmap_does_not_come_back_after_a_crash(tmp_path: Path) -> None:
    path = image(tmp_path / "disk", "b0", "b1")
    disk = opened(path)
    bitmaps_of(disk.top).remove("b0")
    bitmaps_of(disk.top).forget_removed(disk.top)
    assert believed(path) == {"b1": None}
    described = json.loads(run("qemu-img", "info", "-U", "--output=json", path))["format-specific"]["data"]["bitmaps"]
    assert [each["name"] for each in described] == ["b1"]
    disk.close()
    assert believed(path) == {"b1": BEFORE}
    assert "Leaked" not in execute("qemu-img", "check", path).stdout

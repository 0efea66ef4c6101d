"""Power cuts while a disk becomes larger, smaller or empty: it has its old size or its new one, and its contents.

Nothing of what a smaller disk has lost comes back when it grows again, wherever the power was cut.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdq.chain.clusters import ClusterCache
from nbdq.chain.open import open_writable
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.policy import Policy
from nbdq.locks import Locking
from nbdq.qcow2.format import read_header
from nbdq.qcow2.writing.emptying import make_empty
from nbdq.storage import FileStorage
from tests.crash.operations import crash_states
from tests.support.tools import execute, requires, run

pytestmark = requires("qemu-img", "qemu-io")

K, M = 1 << 10, 1 << 20
SIZE = 512 * K + 512
#: What the options of an image are, and whether an internal snapshot shares its clusters.
VARIANTS = {
    "4k": ("cluster_size=4k", False),
    "512, 64 bits": ("cluster_size=512,refcount_bits=64", False),
    "512, one bit": ("cluster_size=512,refcount_bits=1", False),
    "version 2": ("cluster_size=4k,compat=0.10", False),
    "subclusters": ("cluster_size=16k,extended_l2=on", False),
    "with a snapshot": ("cluster_size=4k", True),
}
every_variant = pytest.mark.parametrize(("options", "snapshot"), VARIANTS.values(), ids=VARIANTS)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[OverlayDisk]:
    with contextlib.closing(ClusterCache(budget=M)) as clusters:
        policy = Policy(locking=Locking.OFF)
        disk = open_writable(str(path), format="qcow2", policy=policy, clusters=clusters)
        assert isinstance(disk, OverlayDisk)
        with contextlib.closing(disk):
            yield disk


def contents(path: Path) -> bytes:
    """What QEMU reads."""
    flat = path.with_name("flat")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, flat)
    return flat.read_bytes()


def image(directory: Path, options: str, *, snapshot: bool) -> Path:
    """A top that holds three quarters of the disk, some of it as zeros, over a base that is longer."""
    run("qemu-io", "-f", "raw", "-c", "write -P 9 0 1M", make_base(directory))
    path = directory / "top.qcow2"
    backing = ["-b", directory / "base.raw", "-F", "raw"]
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *backing, path, str(SIZE))
    commands = ["write -P 1 0 200k", "write -P 2 300k 100k", "write -z 200k 20k", "write -P 3 450k 62k"]
    run("qemu-io", "-f", "qcow2", *(part for each in commands for part in ("-c", each)), path)
    if snapshot:
        run("qemu-img", "snapshot", "-c", "kept", path)
        run("qemu-io", "-f", "qcow2", "-c", "write -P 4 310k 8k", "-c", "write -P 5 500k 4k", path)
    return path


def make_base(directory: Path) -> Path:
    path = directory / "base.raw"
    with path.open("wb") as file:
        file.truncate(1 * M)
    return path


def states(path: Path, operate: Callable[[], object], *, may_read: tuple[bytes, bytes], seed: int = 1) -> Iterator[int]:
    """Judge each state of a cut during ``operate``: it is sound but for leaks, and reads as one of ``may_read``.

    Gives the size of the disk in every one of them, while the file at ``path`` is in that state.
    """
    for number, (state,) in enumerate(crash_states([path], operate, seed=seed, per_cut=6)):
        path.write_bytes(state)
        done = execute("qemu-img", "check", "-f", "qcow2", path)
        assert done.returncode in (0, 3), f"state {number}: {done.stdout}{done.stderr}"
        found = contents(path)
        assert found in may_read, f"state {number} of {len(found)} bytes is neither"
        yield len(found)


@every_variant
def test_a_cut_leaves_the_old_disk_or_the_smaller_one_and_the_rest_never_comes_back(
    options: str, snapshot: bool, tmp_path: Path
) -> None:
    path = image(tmp_path, options, snapshot=snapshot)
    old = contents(path)
    new = 130 * K + 512

    def operate() -> None:
        with opened(path) as disk:
            disk.shrink(new)

    sizes = set()
    for number, size in enumerate(states(path, operate, may_read=(old, old[:new]))):
        sizes.add(size)
        if size == new and number % 4 == 0:
            with opened(path) as disk:
                disk.grow(SIZE)
            assert contents(path) == old[:new].ljust(SIZE, b"\0")
    assert sizes == {SIZE, new}


@every_variant
def test_a_cut_leaves_the_old_disk_or_the_larger_one(options: str, snapshot: bool, tmp_path: Path) -> None:
    path = image(tmp_path, options, snapshot=snapshot)
    old = contents(path)
    new = 3 * M

    def operate() -> None:
        with opened(path) as disk:
            disk.grow(new)

    assert set(states(path, operate, may_read=(old, old.ljust(new, b"\0")))) == {SIZE, new}


@pytest.mark.parametrize("options", [options for options, snapshot in VARIANTS.values() if not snapshot])
def test_a_cut_leaves_an_image_as_it_was_or_empty(options: str, tmp_path: Path) -> None:
    path = image(tmp_path, options, snapshot=False)
    old, below = contents(path), (tmp_path / "base.raw").read_bytes()[:SIZE]

    def operate() -> None:
        storage = FileStorage.open(str(path), writable=True)
        make_empty(storage, read_header(storage))
        storage.close()

    lengths = []
    for _ in states(path, operate, may_read=(old, below)):
        lengths.append(path.stat().st_size)
    assert len(lengths) > 8
    assert lengths[-1] == min(lengths)


@every_variant
def test_a_cut_while_a_disk_is_emptied_leaves_each_part_in_front_or_below(
    options: str, snapshot: bool, tmp_path: Path
) -> None:
    """As after a commit: the base reads the same, so that it does not matter which parts are left in front."""
    path = image(tmp_path, options, snapshot=snapshot)
    old = contents(path)
    base = tmp_path / "base.raw"
    base.write_bytes(old + base.read_bytes()[SIZE:])

    def operate() -> None:
        with opened(path) as disk:
            disk.make_empty()

    for _ in states(path, operate, may_read=(old, old)):
        pass

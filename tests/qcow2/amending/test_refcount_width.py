"""Refcounts of every width, from every other: nothing leaks, nothing is lost, wherever the power fails (R-61)."""

import errno
import random
from pathlib import Path
from unittest.mock import patch

import pytest

from nbdq.errors import CorruptImage, OperationError
from nbdq.ops.control import Cancelled, Control
from nbdq.qcow2.amending.amend import amend_image
from nbdq.qcow2.amending.options import AmendOptions
from nbdq.qcow2.format import read_header
from nbdq.storage import FileStorage
from tests.crash.operations import crash_states
from tests.qcow2.amending.images import amend, busy_image, check, contents, info, io, make
from tests.support.tools import execute, requires, run

pytestmark = requires("qemu-img", "qemu-io")

WIDTHS = (1, 2, 4, 8, 16, 32, 64)


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_an_image_goes_through_all_widths_and_stays_what_it_was(tmp_path: Path, cluster_size: int) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    path = busy_image(tmp_path / "disk.qcow2", f"cluster_size={cluster_size}", seed=seed)
    before = contents(path)
    generator = random.Random(seed)
    for bits in (*generator.sample(WIDTHS, len(WIDTHS)), 16):
        amend(path, refcount_bits=bits)
        assert info(path)["refcount-bits"] == bits
        check(path)
    assert contents(path) == before


def test_snapshots_and_bitmaps_are_counted_as_before(tmp_path: Path) -> None:
    path = busy_image(tmp_path / "disk.qcow2", "cluster_size=4k", seed=3)
    run("qemu-img", "snapshot", "-c", "one", path)
    io(path, "write -P 7 0 1M")
    run("qemu-img", "snapshot", "-c", "two", path)
    run("qemu-img", "bitmap", "--add", "-f", "qcow2", path, "b")
    one, now = contents(path, "-l", "one"), contents(path)
    for bits in (2, 64, 8):
        amend(path, refcount_bits=bits)
        check(path)
    assert (contents(path, "-l", "one"), contents(path)) == (one, now)
    assert [bitmap["name"] for bitmap in info(path)["bitmaps"]] == ["b"]


def test_a_count_that_does_not_fit_is_refused_in_the_words_of_qemu_and_nothing_changes(tmp_path: Path) -> None:
    path = busy_image(tmp_path / "disk.qcow2", "cluster_size=4k", seed=4)
    run("qemu-img", "snapshot", "-c", "one", path)
    before = path.read_bytes()
    theirs = execute("qemu-img", "amend", "-f", "qcow2", "-o", "refcount_bits=1", path).stderr
    path.write_bytes(before)
    with pytest.raises(OperationError) as caught:
        amend(path, refcount_bits=1)
    assert str(caught.value).partition(": ")[2] in theirs
    assert path.read_bytes() == before


def test_a_sparse_image_needs_no_more_blocks_than_before(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", "cluster_size=512,refcount_bits=64", size="32M")
    io(path, *(f"write {offset} 512" for offset in range(0, 32 << 20, 1 << 20)))
    for bits in (1, 64, 16):
        amend(path, refcount_bits=bits)
        check(path)


def test_the_same_width_is_nothing_to_do(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", "compat=1.1")
    before = path.read_bytes()
    amend(path, refcount_bits=16)
    assert path.read_bytes() == before


def test_a_cancelled_change_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = busy_image(tmp_path / "disk.qcow2", "cluster_size=512", seed=8)
    before = path.read_bytes()
    for after in (0, 4, 8):
        storage = FileStorage.open(str(path), writable=True)
        with pytest.raises(Cancelled):
            amend_image(storage, read_header(storage), AmendOptions(refcount_bits=64), _Impatient(after))
        storage.close()
        assert path.read_bytes() == before


class _Impatient(Control):
    """Cancels itself after so many pieces."""

    def __init__(self, pieces: int) -> None:
        super().__init__()
        self._pieces = pieces

    def advance(self, length: int = 0) -> None:
        self._pieces -= 1
        if self._pieces < 0:
            self.cancel()
        super().advance(length)


def test_a_full_disk_leaves_the_image_as_it_was(tmp_path: Path) -> None:
    path = busy_image(tmp_path / "disk.qcow2", "cluster_size=4k", seed=6)
    before = path.read_bytes()
    full = OSError(errno.ENOSPC, "No space left on device")
    with patch.object(FileStorage, "_fallocate", side_effect=full), pytest.raises(OSError, match="No space"):
        amend(path, refcount_bits=64)
    assert path.read_bytes() == before


@pytest.mark.parametrize("block", [0x24600, 0x30000, 0x40000, 0x7000000])
def test_a_damaged_refcount_table_is_refused(tmp_path: Path, block: int) -> None:
    """What is no refcount block must not be taken for one, counted as free and overwritten one day."""
    path = make(tmp_path / "disk.qcow2", "compat=1.1")
    io(path, "write -P 1 0 64k")
    with path.open("r+b") as file:
        file.seek(65536)
        file.write(block.to_bytes(8, "big"))
    before = path.read_bytes()
    with pytest.raises(CorruptImage, match="nbdq check"):
        amend(path, refcount_bits=32)
    assert path.read_bytes() == before


def test_a_block_that_is_counted_as_something_else_too_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", "compat=1.1")
    with path.open("r+b") as file:
        file.seek(0x20000 + 2 * 2)
        file.write((2).to_bytes(2, "big"))
    with pytest.raises(CorruptImage, match="counted as something else"):
        amend(path, refcount_bits=32)


def test_the_space_of_the_old_refcounts_is_used_again(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", "cluster_size=512")
    for bits in (8, 16, 8, 16):
        amend(path, refcount_bits=bits)
    length = path.stat().st_size
    io(path, "write -P 1 512k 1k")
    assert path.stat().st_size == length


@pytest.mark.parametrize(("cluster_size", "bits"), [(512, 64), (512, 1), (4096, 8), (65536, 32)])
def test_a_power_cut_leaves_a_clean_image_of_the_old_width_or_the_new(
    tmp_path: Path, cluster_size: int, bits: int
) -> None:
    path = busy_image(tmp_path / "disk.qcow2", f"cluster_size={cluster_size}", seed=7)
    before = contents(path)
    states = crash_states([path], lambda: amend(path, refcount_bits=bits), seed=7, per_cut=4)
    crashed = tmp_path / "crashed.qcow2"
    headers = set()
    chosen = [content for (content,) in states]
    picks = {0, len(chosen) - 1, *random.Random(7).sample(range(len(chosen)), min(30, len(chosen)))}
    for number in sorted(picks):
        crashed.write_bytes(chosen[number])
        check(crashed)
        headers.add(info(crashed)["refcount-bits"])
    assert headers == {16, bits}
    assert contents(crashed) == before

"""Metadata preallocation: nbdq looks for holes in the same files as QEMU (P5)."""

import os
import random
from pathlib import Path

import pytest

from nbdq.qcow2.format import Header, read_header
from nbdq.qcow2.preallocation import is_metadata_preallocated
from nbdq.storage import FileStorage
from tests.qcow2.minimal import minimal_header
from tests.support.tools import requires, run

CLUSTER = 4096


class SparseFile(FileStorage):
    """A file in memory that says what its file system would: how much of it is really there."""

    def __init__(self, size: int, allocated_clusters: int) -> None:
        super().__init__(os.memfd_create("image", os.MFD_CLOEXEC), "disk.qcow2")
        os.truncate(self.descriptor, size)
        self.allocated_clusters = allocated_clusters

    def allocated_size(self) -> int:
        return self.allocated_clusters * CLUSTER

    def place(self, offset: int, data: bytes) -> None:
        os.pwrite(self.descriptor, data, offset)


def header(refcount_order: int, table_clusters: int = 1) -> Header:
    return minimal_header(cluster_bits=12, refcount_order=refcount_order, refcount_table_clusters=table_clusters)


def image(refcounts: list[int], refcount_order: int, *, allocated_clusters: int) -> SparseFile:
    """A file of ``len(refcounts)`` clusters: table in cluster 1, blocks from cluster 2 on, left out where all is 0."""
    storage = SparseFile(len(refcounts) * CLUSTER, allocated_clusters)
    per_block = CLUSTER * 8 >> refcount_order
    for number in range(-(-len(refcounts) // per_block)):
        counts = refcounts[number * per_block : (number + 1) * per_block]
        if any(counts):
            block = 0  # Q26: entries narrower than a byte start at its low end, wider ones are big-endian
            width = 1 << refcount_order
            for index, count in enumerate(counts):
                if width < 8:
                    block |= count << index * width
                else:
                    bytes_ = count.to_bytes(width // 8, "big")
                    block |= int.from_bytes(bytes_, "little") << index * width
            storage.place((2 + number) * CLUSTER, block.to_bytes(CLUSTER, "little"))
            storage.place(CLUSTER + number * 8, ((2 + number) * CLUSTER).to_bytes(8, "big"))
    return storage


def qemu_judges(refcounts: list[int], allocated_clusters: int) -> bool:
    """qcow2_detect_metadata_preallocation: referenced clusters against really allocated ones."""
    threshold = max(allocated_clusters * 10 // 9, allocated_clusters + 2)
    return sum(count != 0 for count in refcounts) >= threshold


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("options", ["", "extended_l2=on,", "refcount_bits=1,", "refcount_bits=64,", "compat=0.10,"])
@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
def test_only_metadata_preallocation_looks_like_it(mode: str, options: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"{options}preallocation={mode}", path, "8M")
    run("qemu-io", "-f", "qcow2", "-c", "write -q 1M 1M", path)
    storage = FileStorage.open(str(path))
    assert is_metadata_preallocated(storage, read_header(storage)) is (mode == "metadata")
    storage.close()


@pytest.mark.parametrize("refcount_order", range(7))
def test_clusters_are_counted_at_every_width_as_qemu_counts_them(refcount_order: int) -> None:
    seed = 11 + refcount_order
    print(f"seed {seed}")
    chance = random.Random(seed)
    largest = (1 << (1 << refcount_order)) - 1
    verdicts = set()
    for _ in range(60):
        count = chance.choice((5, 600, 5000))
        filled = chance.random()
        refcounts = [chance.choice((1, largest)) if chance.random() < filled else 0 for _ in range(count)]
        referenced = sum(map(bool, refcounts))
        allocated = max(0, chance.choice((referenced, referenced * 9 // 10)) + chance.randint(-3, 3))
        storage = image(refcounts, refcount_order, allocated_clusters=allocated)
        verdict = is_metadata_preallocated(storage, header(refcount_order))
        assert verdict is qemu_judges(refcounts, allocated)
        verdicts.add(verdict)
        storage.close()
    assert verdicts == {False, True}


def test_counts_beyond_the_end_of_the_file_are_not_counted() -> None:
    storage = image([0] * 50 + [1] * 50, 4, allocated_clusters=20)
    assert is_metadata_preallocated(storage, header(4))
    os.truncate(storage.descriptor, 50 * CLUSTER)
    assert not is_metadata_preallocated(storage, header(4))
    storage.close()


@pytest.mark.parametrize("entry", [2 * CLUSTER + 512, 1 << 63 | 512, 1 << 63, (1 << 63) - CLUSTER, -CLUSTER % 2**64])
def test_a_refcount_block_that_cannot_be_hinders_nobody(entry: int) -> None:
    """Misaligned, or at an offset that no file has: the guest's data does not depend on it."""
    storage = image([1] * 100, 4, allocated_clusters=20)
    assert is_metadata_preallocated(storage, header(4))
    storage.place(CLUSTER, entry.to_bytes(8, "big"))
    assert not is_metadata_preallocated(storage, header(4))
    storage.close()


def test_a_block_that_the_file_ends_in_counts_as_far_as_it_goes() -> None:
    storage = image([1] * 100, 4, allocated_clusters=3)
    os.truncate(storage.descriptor, 2 * CLUSTER + 100)
    storage.allocated_clusters = 0  # three clusters, all referenced
    assert is_metadata_preallocated(storage, header(4))
    os.truncate(storage.descriptor, 2 * CLUSTER + 2)  # one whole entry is left
    assert not is_metadata_preallocated(storage, header(4))
    storage.close()

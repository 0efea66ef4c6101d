"""What refcounts that are scattered over a damaged image cost (R-33)."""

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nbdq.qcow2.format import build_header
from nbdq.qcow2.refcount_widths import unpack
from nbdq.qcow2.writing.protection import ProtectedClusters
from nbdq.qcow2.writing.refcounts import Refcounts
from tests.hostile.anatomy import COPIED
from tests.hostile.write_images import opened
from tests.qcow2.minimal import minimal_header, minimal_image, stored

#: Clusters of 64 KiB; a block of refcounts of one bit takes eight times as much memory as in the file.
BITS = 16
BLOCKS = 1000


@pytest.mark.parametrize("order", range(7))
def test_refcounts_are_the_same_whether_their_block_is_in_memory_or_not(order: int) -> None:
    rng = np.random.default_rng(order)
    header = minimal_header(cluster_bits=16, refcount_order=order)
    image = minimal_image(header)
    image[2 << 16 : 3 << 16] = rng.bytes(1 << 16)
    expected = unpack(image[2 << 16 : 3 << 16], order)
    storage = stored(bytes(image))
    for span in (1, 2, 9, 300, len(expected)):
        first = int(rng.integers(len(expected) - span + 1))
        clusters = rng.integers(first, first + span, 20).astype(np.uint64)
        fresh = Refcounts(storage, header, ProtectedClusters(np.empty(0, dtype=np.uint64)))
        assert fresh.get_many(clusters).tolist() == expected[clusters].tolist()
        fresh.block(0)
        assert fresh.get_many(clusters).tolist() == expected[clusters].tolist()
    storage.close()


def scattered_image(path: Path, *, refcounts: bytes, inside: int) -> None:
    """Entry ``n`` names the cluster ``inside`` refcount block ``n + 1``, whose refcounts there are ``refcounts``."""
    table, l1, l2, first = 1, 9, 10, 16
    fields = {"refcount_table_clusters": 8, "l1_table_offset": l1 << BITS, "refcount_order": 0}
    with path.open("wb") as file:
        file.write(build_header(minimal_header(cluster_bits=BITS, size=2000 << BITS, **fields)))
        file.seek(table << BITS)
        file.write(struct.pack(f">{BLOCKS}Q", *((first + number) << BITS for number in range(BLOCKS))))
        file.seek(l1 << BITS)
        file.write((COPIED | l2 << BITS).to_bytes(8, "big"))
        file.seek(l2 << BITS)
        hosts = ((number * (8 << BITS) + inside) << BITS for number in range(1, BLOCKS))
        file.write(struct.pack(f">{BLOCKS - 1}Q", *(COPIED | host for host in hosts)))
        for number in range(1, BLOCKS):
            file.seek(((first + number) << BITS) + inside // 8)
            file.write(refcounts)
        file.seek(first << BITS)
        file.write(b"\xff" * 200)
        file.truncate((first + BLOCKS) << BITS)


def peak_of(action: Callable[[], None]) -> int:
    """Bytes of memory that ``action`` needs at most."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_entries_that_lead_to_a_thousand_refcount_blocks_load_none_of_them(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    scattered_image(path, refcounts=b"", inside=0)
    with opened(path) as disk:
        assert peak_of(lambda: disk.write(1500 << BITS, memoryview(b"\xee" * 512))) < 16 << 20


def test_giving_up_clusters_of_a_thousand_refcount_blocks_changes_a_part_of_them_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    scattered_image(path, refcounts=b"\x01", inside=8000)

    def give_up() -> None:
        disk.discard(0, 1500 << BITS)
        disk.flush()

    with opened(path, punch=False) as disk:
        assert peak_of(give_up) < 160 << 20
    content = path.read_bytes()
    assert not any(content[((16 + number) << BITS) + 1000] for number in range(1, BLOCKS)), "none is left behind"

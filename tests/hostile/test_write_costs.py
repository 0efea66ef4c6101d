"""What refcounts that are scattered over a damaged image cost (R-33)."""

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from nbdq.qcow2.format import build_header
from nbdq.qcow2.protection import ProtectedClusters
from nbdq.qcow2.refcount_widths import unpack
from nbdq.qcow2.refcounts import Refcounts
from tests.hostile.anatomy import COPIED
from tests.hostile.write_images import opened
from tests.qcow2.minimal import minimal_header, minimal_image, stored


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


def test_entries_that_lead_to_a_thousand_refcount_blocks_load_none_of_them(tmp_path: Path) -> None:
    """A block of refcounts of one bit takes eight times as much memory as in the file (R-33)."""
    bits, blocks = 16, 1000
    size, per_block = 1 << bits, 8 << bits
    table, l1, l2, first = 1, 9, 10, 16
    fields = {"refcount_table_clusters": 8, "l1_table_offset": l1 << bits, "refcount_order": 0}
    header = minimal_header(cluster_bits=bits, size=size * 2000, **fields)
    path = tmp_path / "disk.qcow2"
    with path.open("wb") as file:
        file.write(build_header(header))
        file.seek(table << bits)
        file.write(struct.pack(f">{blocks}Q", *((first + number) << bits for number in range(blocks))))
        file.seek(l1 << bits)
        file.write((COPIED | l2 << bits).to_bytes(8, "big"))
        file.seek(l2 << bits)
        file.write(
            struct.pack(f">{blocks}Q", *(COPIED | (number * per_block) << bits for number in range(1, blocks + 1)))
        )
        file.seek(first << bits)
        file.write(b"\xff" * 200)
        file.truncate((first + blocks) << bits)
    with opened(path) as disk:
        tracemalloc.start()
        disk.write(1500 * size, memoryview(b"\xee" * 512))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 << 20

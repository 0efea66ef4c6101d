"""Images within every limit of the format that are made to cost as much as they can: none costs more than R-33 allows.

Each is opened, mapped and read by nbdq in a process with limits; a job that breaks one of them fails by name.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdq.qcow2.extensions import BitmapsExtension
from nbdq.qcow2.format import Autoclear, Header, Incompatible
from tests.hostile.anatomy import COPIED, ZERO
from tests.hostile.laboratory import Reader
from tests.hostile.reader import CPU_LIMIT, MEMORY_LIMIT
from tests.qcow2.minimal import minimal_header, minimal_image

#: What the image has behind its first four clusters of 64 KiB begins here.
PLACE = 4 << 16


class Trap:
    """An image file, to be opened in a process with limits."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "trap.qcow2"
        self._content = directory / "content"
        self._reader = Reader()

    def write(self, header: Header, parts: dict[int, bytes], *, length: int = 0) -> None:
        """Make the file: the minimal image of ``header``, then ``parts`` by offset, sparse up to ``length``."""
        with self.path.open("wb") as file:
            file.write(minimal_image(header))
            for offset, data in parts.items():
                file.seek(offset)
                file.write(data)
            file.truncate(max(length, file.seek(0, os.SEEK_END)))

    def spring(self) -> dict[str, Any]:
        """The report of the reader, which is within the limits."""
        report = self._reader.examine(self.path, self._content, allow=self.path.parent)
        assert report is not None, "hang: no answer within the limits"
        assert report["outcome"] in ("opened", "refused"), f"{report['outcome']}: {report['error']}"
        assert report["memory"] <= MEMORY_LIMIT
        assert report["cpu"] <= CPU_LIMIT
        return report

    def close(self) -> None:
        """End the process."""
        self._reader.close()


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Trap]:
    found = Trap(tmp_path)
    yield found
    found.close()


def snapshot_entry(name: bytes, extra_length: int = 0) -> bytes:
    entry = struct.pack(">QIHHIIQII", 3 << 16, 1, 1, len(name), 0, 0, 0, 0, extra_length) + bytes(extra_length)
    entry += b"1" + name
    return entry + bytes(-len(entry) % 8)


def bitmap_entry(name: bytes) -> bytes:
    entry = struct.pack(">QIIBBHI", 3 << 16, 1, 0, 1, 16, len(name), 0) + name
    return entry + bytes(-len(entry) % 8)


#: Python keeps a text with one such character in four bytes for each.
WIDE = "\N{GRINNING FACE}".encode()


@pytest.mark.parametrize(
    ("name", "extra_length"),
    [
        (b"x" * 65000 + WIDE, 0),
        (b"x" * 65000 + b"\xff", 0),
        (b"x", 980),
        (b"x", 0),
    ],
    ids=["the longest names", "the longest names that are no text", "the most snapshots", "small snapshots"],
)
def test_a_full_snapshot_table(name: bytes, extra_length: int, trap: Trap) -> None:
    """Q60: 65536 snapshots, and 64 MiB of them."""
    entry = snapshot_entry(name, extra_length)
    count = min(65536, (64 << 20) // len(entry))
    trap.write(minimal_header(snapshot_count=count, snapshots_offset=PLACE), {PLACE: entry * count})
    assert trap.spring()["outcome"] == "opened"


@pytest.mark.parametrize("filling", [b"", b"x" * 990, b"x" * 988 + WIDE], ids=["short", "long", "wide"])
def test_a_full_bitmap_directory(filling: bytes, trap: Trap) -> None:
    """Q68: 65535 bitmaps, of which no two may have the same name."""
    directory = b"".join(bitmap_entry(b"%08d" % number + filling) for number in range(65535))
    extension = BitmapsExtension(65535, len(directory), PLACE)
    trap.write(minimal_header(bitmaps=extension, autoclear=Autoclear.BITMAPS), {PLACE: directory})
    assert trap.spring()["outcome"] == "opened"


@pytest.mark.parametrize(("cluster_bits", "length"), [(9, 1 << 40), (12, 1 << 42), (16, 1 << 43), (21, 1 << 43)])
def test_a_sparse_file_with_a_full_refcount_table(cluster_bits: int, length: int, trap: Trap) -> None:
    """Whoever asks whether clusters are preallocated counts references; here in a million blocks, all the same one."""
    size = 1 << cluster_bits
    table, block, l2, data = (place << 24 for place in (1, 2, 3, 4))
    header = minimal_header(
        cluster_bits=cluster_bits, size=size, refcount_table_offset=table, refcount_table_clusters=(8 << 20) // size
    )
    l1_entry, l2_entry = struct.pack(">Q", COPIED | l2), struct.pack(">Q", COPIED | data)
    parts = {header.l1_table_offset: l1_entry, table: struct.pack(">Q", block) * (1 << 20), l2: l2_entry, data: b"x"}
    trap.write(header, parts, length=length)
    report = trap.spring()
    assert report["outcome"] == "opened"
    assert report["map"][0][-1] == data


@pytest.mark.parametrize(
    ("cluster_bits", "size"), [(21, (1 << 61) - 512), (16, 1 << 51), (9, 1 << 37)], ids=["2 EiB", "2 PiB", "128 GiB"]
)
def test_the_largest_disk(cluster_bits: int, size: int, trap: Trap) -> None:
    """Q5: an L1 table of 32 MiB, which takes nothing in a sparse file."""
    header = minimal_header(cluster_bits=cluster_bits, size=size, l1_size=1 << 22, l1_table_offset=8 << 20)
    trap.write(header, {}, length=40 << 20)
    report = trap.spring()
    assert report["size"] == size
    assert [extent[:2] for extent in report["map"]] == [[0, min(size, 1 << 40)]]


def test_the_largest_disk_whose_tables_are_all_one(trap: Trap) -> None:
    """The L1 table names one L2 table four million times: memory follows what is asked for, not what is promised."""
    header = minimal_header(cluster_bits=16, size=1 << 51, l1_size=1 << 22, l1_table_offset=8 << 20)
    l1_table = struct.pack(">Q", COPIED | PLACE) * (1 << 22)
    trap.write(header, {PLACE: struct.pack(">Q", ZERO) * 8192, 8 << 20: l1_table})
    assert trap.spring()["map"] == [[0, 1 << 40, 0, True, True, False, None]]


def test_a_huge_disk_of_large_clusters_over_a_tiny_one_of_small_clusters(trap: Trap) -> None:
    """One table of 2 MiB clusters maps 512 GiB, or a million times what one of 512-byte clusters in the base does."""
    base = trap.path.with_name("base.qcow2")
    base.write_bytes(minimal_image(minimal_header(cluster_bits=9, size=32768)))
    size, l2 = 1 << 39, 4 << 21
    header = minimal_header(cluster_bits=21, size=size, backing_name=base.name, backing_format="qcow2")
    parts = {header.l1_table_offset: struct.pack(">Q", COPIED | l2), l2 + (1 << 20): struct.pack(">Q", ZERO)}
    trap.write(header, parts, length=5 << 21)
    report = trap.spring()
    assert [extent[:2] for extent in report["map"] if extent[3]] == [[1 << 38, 1 << 21]]


@pytest.mark.parametrize("count", [1024, 1025, 262000])
def test_a_header_full_of_extensions(count: int, trap: Trap) -> None:
    extensions = b"".join(struct.pack(">II", 0x1000_0000 + number, 0) for number in range(count))
    trap.write(minimal_header(cluster_bits=21), {112: extensions})
    report = trap.spring()
    assert report["outcome"] == ("opened" if count <= 1024 else "refused")


def test_names_for_features_that_nobody_knows(trap: Trap) -> None:
    """Q13: the names in the message are the image's, which may write anything there, as often as it likes."""
    names = b"".join(struct.pack(">BB46s", 0, number % 64, b"\x1b[2J\r\n" * 7) for number in range(43000))
    unknown = Incompatible(((1 << 64) - 1) ^ 0x1F)
    extension = struct.pack(">II", 0x6803F857, len(names)) + names
    trap.write(minimal_header(cluster_bits=21, incompatible=unknown), {112: extension})
    report = trap.spring()
    assert report["outcome"] == "refused"
    assert report["error"].isprintable()
    assert len(report["error"]) < 65536

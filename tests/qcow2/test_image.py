"""One image: where its tables say that guest data lies, with every byte of them made by hand."""

import errno
import os
import random
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from nbdq.block import Kind
from nbdq.qcow2.format import CompressionType, Incompatible
from nbdq.qcow2.image import Qcow2Image
from nbdq.qcow2.snapshots import Snapshot
from nbdq.storage import FileStorage
from tests.qcow2.minimal import minimal_header, stored

#: Clusters of 512 bytes: an L2 table maps 64 of them.
BITS, CLUSTER, ENTRIES, COVERAGE = 9, 512, 64, 32 << 10
COPIED = 1 << 63

Found = dict[int, tuple[Kind, int]]


@contextmanager
def opened(
    l1: list[int],
    tables: dict[int, list[int]],
    *,
    length: int | None = None,
    data: FileStorage | None = None,
    snapshot: Snapshot | None = None,
    **fields: Any,
) -> Iterator[Qcow2Image]:
    """An image with these L1 entries and L2 tables, by offset, in a file of ``length`` bytes."""
    header = minimal_header(**({"cluster_bits": BITS, "size": len(l1) * COVERAGE, "l1_size": len(l1)} | fields))
    storage = stored(b"", 1 << 20)
    for offset, entries in {header.l1_table_offset: l1, **tables}.items():
        os.pwrite(storage.descriptor, struct.pack(f">{len(entries)}Q", *entries), offset)
    if length is not None:
        os.truncate(storage.descriptor, length)
    image = Qcow2Image(storage, header, data=data, snapshot=snapshot)
    try:
        yield image
    finally:
        image.close()


def found(image: Qcow2Image, start: int, end: int) -> Found:
    """Everything allocated in a range, by granule counted from its start."""
    granules = image.map(start, end)
    if granules is None:
        return {}
    positions, kinds, hosts = (column.tolist() for column in granules)
    assert positions == sorted(set(positions))
    return {position: (Kind(kind), host) for position, kind, host in zip(positions, kinds, hosts, strict=True)}


def taken(**fields: Any) -> Snapshot:
    """An internal snapshot."""
    plain = {"id": "1", "name": "s", "l1_offset": 0, "l1_size": 0, "disk_size": None, "icount": None}
    numbers = dict.fromkeys(("date_seconds", "date_nanoseconds", "vm_clock_ns", "vm_state_size"), 0)
    return Snapshot(**(plain | numbers | fields))


def test_a_new_disk_holds_nothing() -> None:
    with opened([0, 0, 0], {}) as image:
        assert found(image, 0, image.size) == {}
        assert image.map(0, image.size) is None


def test_positions_count_from_the_start_of_the_range_across_tables() -> None:
    with opened([COPIED | 0x2000, 0, 0x4000], {0x2000: [0, COPIED | 0x9000], 0x4000: [0xA000]}) as image:
        assert found(image, 0, image.size) == {1: (Kind.DATA, 0x9000), 2 * ENTRIES: (Kind.DATA, 0xA000)}
        assert found(image, CLUSTER, 2 * CLUSTER) == {0: (Kind.DATA, 0x9000)}
        assert found(image, 2 * CLUSTER, 2 * COVERAGE) == {}
        assert found(image, COVERAGE, image.size) == {ENTRIES: (Kind.DATA, 0xA000)}


def test_a_range_reads_only_its_part_of_each_table() -> None:
    """A wrong slice would show a neighbour's cluster."""
    tables = {0x2000: [(1 + n) << 20 for n in range(ENTRIES)], 0x4000: [(100 + n) << 20 for n in range(ENTRIES)]}
    hosts = [entry for table in tables.values() for entry in table]
    seed = 2
    print(f"seed {seed}")
    chance = random.Random(seed)
    with opened(list(tables), tables) as image:
        for _ in range(200):
            first, last = sorted(chance.sample(range(2 * ENTRIES + 1), 2))
            expected = {n: (Kind.DATA, host) for n, host in enumerate(hosts[first:last])}
            assert found(image, first * CLUSTER, last * CLUSTER) == expected


def test_what_lies_behind_the_l1_table_is_unallocated() -> None:
    """Q39, Q40: ranges are rounded up to clusters and windows, and go on where no entry exists."""
    with opened([0, 0x2000], {0x2000: [0] * 63 + [0x9000]}) as image:
        assert found(image, COVERAGE, 9 * COVERAGE) == {63: (Kind.DATA, 0x9000)}
        assert found(image, 2 * COVERAGE, 9 * COVERAGE) == {}
        assert found(image, 8 * COVERAGE, 9 * COVERAGE) == {}


def test_flags_and_reserved_bits_of_an_l1_entry_make_no_table() -> None:
    """Q33; with either kind of L2 entry."""
    for extended in (Incompatible.NONE, Incompatible.EXTENDED_L2):
        with opened([COPIED | 0x1FF | 0x7F << 56], {}, cluster_bits=14, incompatible=extended) as image:
            assert found(image, 0, 4 * image.cluster_size) == {}


@pytest.mark.parametrize("entry", [0x2000 + 8 << 6, 1 << 55, 0x20000], ids=["unaligned", "far away", "at the end"])
@pytest.mark.parametrize("granules", [1, 32], ids=["clusters", "subclusters"])
def test_a_table_that_cannot_be_spoils_what_it_maps_and_nothing_else(entry: int, granules: int) -> None:
    """QEMU reads a table past the end of the file as empty: a blank disk instead of an error (1.13)."""
    extended = Incompatible.EXTENDED_L2 if granules == 32 else Incompatible.NONE
    with opened([0, entry, 0], {}, cluster_bits=14, incompatible=extended, length=0x20000) as image:
        coverage = image.geometry.l2_coverage
        assert found(image, 0, coverage) == {}
        assert found(image, 2 * coverage, 3 * coverage) == {}
        around = found(image, coverage - image.cluster_size, coverage + 2 * image.cluster_size)
        assert list(around) == list(range(granules, 3 * granules))
        assert {kind for kind, _ in around.values()} == {Kind.CORRUPT}


def test_the_missing_end_of_a_partial_last_cluster_is_empty() -> None:
    """Q2: the file need not fill its last cluster, also when that holds a table."""
    with opened([0x2000], {0x2000: [0x9000, 0xA000]}, length=0x2000 + 8) as image:
        assert found(image, 0, image.size) == {0: (Kind.DATA, 0x9000)}


def test_a_corrupt_entry_is_one_cluster() -> None:
    with opened([0x2000], {0x2000: [0x9000, 0x9200, 0xA000]}, cluster_bits=10) as image:
        kinds = [kind for kind, _ in found(image, 0, 4096).values()]
        assert kinds == [Kind.DATA, Kind.CORRUPT, Kind.DATA]


def test_subclusters_count_as_granules() -> None:
    table = [COPIED | 0x40000, 1 << 3 | 1 << 32 + 5]
    with opened([0x4000], {0x4000: [0, 0, *table]}, cluster_bits=14, incompatible=Incompatible.EXTENDED_L2) as image:
        assert image.granule == 512
        granules = found(image, 0, 3 * image.cluster_size)
        assert list(granules) == list(range(32, 64))
        assert granules[32 + 3] == (Kind.DATA, 0x40000 + 3 * 512)
        assert granules[32 + 5] == (Kind.ZERO_OFFSET, 0x40000 + 5 * 512)
        assert granules[32] == (Kind.UNALLOCATED_OFFSET, 0x40000)


def test_the_size_is_in_whole_sectors() -> None:
    """Q4."""
    with opened([0], {}, size=1000) as image:
        assert image.size == 512


# Occupancy: the map of where a look into L2 tables is worth it.


@pytest.mark.parametrize("step", [1 << 9, 1 << 12, COVERAGE, 4 * COVERAGE, 64 * COVERAGE])
def test_occupancy_tells_every_step_with_something_from_every_one_without(step: int) -> None:
    """By tables where a step is at least as large as what one maps, else by their entries."""
    seed = step
    print(f"seed {seed}")
    chance = random.Random(seed)
    l1 = [chance.choice((0, 0, 0, 0x40000, COPIED | 0x40000)) for _ in range(300)]
    table = [chance.choice((0, 0, 0, 0x9000)) for _ in range(COVERAGE >> 9)]

    def is_set(cluster: int) -> bool:
        number, entry = divmod(cluster, len(table))
        return number < 300 and l1[number] != 0 and (step >= COVERAGE or table[entry] != 0)

    with opened(l1, {0x40000: table}) as image:
        for _ in range(50):
            start = chance.randrange(0, 300 * COVERAGE, step)
            end = start + step * chance.randint(1, 600)  # also past the L1 table
            expected = [any(map(is_set, range(low >> 9, low + step >> 9))) for low in range(start, end, step)]
            assert image.occupancy(start, end, step).tolist() == expected


def test_a_step_under_a_table_that_is_not_there_counts_as_occupied() -> None:
    """Its clusters are corrupt, which a look must not pass over."""
    with opened([0x4000_0000], {}) as image:
        assert image.occupancy(0, COVERAGE, 1 << 9).all()


# Internal snapshots.


def test_a_snapshot_shows_its_own_tables_and_size() -> None:
    """Q64: the disk may have had another size."""
    tables = {0x2000: [0x9000], 0x4000: [0, 0xA000], 0x6000: [0x4000]}
    chosen = taken(l1_offset=0x6000, l1_size=1, disk_size=CLUSTER * 2 + 100)
    with opened([0x2000, 0], tables, snapshot=chosen) as image:
        assert image.size == 2 * CLUSTER
        assert found(image, 0, 2 * COVERAGE) == {1: (Kind.DATA, 0xA000)}
    with opened([0x2000, 0], tables) as image:
        assert image.size == 2 * COVERAGE
        assert found(image, 0, 2 * COVERAGE) == {0: (Kind.DATA, 0x9000)}


def test_a_snapshot_that_does_not_say_has_the_size_of_the_image() -> None:
    """Q59: what its L1 table does not reach is unallocated."""
    with opened([0x2000, 0x2000], {0x2000: [0x9000]}, snapshot=taken(l1_offset=3 * CLUSTER, l1_size=1)) as image:
        assert image.size == 2 * COVERAGE
        assert found(image, 0, image.size) == {0: (Kind.DATA, 0x9000)}


# Compressed clusters.


def deflated(data: bytes) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -12)
    return stream.compress(data) + stream.flush()


def test_a_compressed_cluster_is_read_from_where_its_descriptor_says() -> None:
    """Q49-Q51: at any byte, across host clusters, and with foreign bytes behind it."""
    cluster = random.Random(1).randbytes(100) * 10 + bytes(24)
    packed = deflated(cluster)
    with opened([], {}, cluster_bits=10, length=0x10000) as image:
        for offset in (0x2000, 0x2001, 0x2400 - 7, 0x10000 - len(packed)):
            os.pwrite(image.storage.descriptor, packed + b"\xff" * 600, offset)
            os.truncate(image.storage.descriptor, 0x10000)
            sectors = (offset + len(packed) - 1) // 512 - offset // 512
            assert image.read_compressed(sectors << 62 - 2 | offset) == cluster


def test_a_compressed_cluster_that_the_file_cuts_short_goes_on_with_zeros() -> None:
    """Q51: as QEMU reads it. A stored block that ends in zeros is whole again."""
    cluster = b"x" * 100 + bytes(412)
    packed = b"\x01" + struct.pack("<HH", 512, 512 ^ 0xFFFF) + cluster
    with opened([], {}, length=0x2000 + 200) as image:
        os.pwrite(image.storage.descriptor, packed[:200], 0x2000)
        assert image.read_compressed(1 << 61 | 0x2000) == cluster


def test_a_compressed_cluster_past_the_end_of_the_file_is_an_error() -> None:
    with opened([], {}, length=0x2000) as image:
        for offset in (0x2000, 0x2001, (1 << 61) - 1):
            with pytest.raises(OSError, match=rf"^\[Errno {errno.EIO}\] [^\n]*'disk.qcow2'$"):
                image.read_compressed(offset)


def test_the_header_says_how_clusters_are_compressed() -> None:
    with opened([], {}, length=0x2000 + 512, compression_type=CompressionType.ZSTD) as image:
        os.pwrite(image.storage.descriptor, deflated(bytes(CLUSTER)), 0x2000)
        with pytest.raises(OSError, match="zstd"):
            image.read_compressed(0x2000)


# Ownership.


def test_guest_data_of_an_image_with_a_data_file_is_in_that_file() -> None:
    data = stored(b"guest")
    with opened([0x2000], {0x2000: [COPIED, COPIED | 0x200]}, incompatible=Incompatible.DATA_FILE, data=data) as image:
        assert found(image, 0, image.size) == {0: (Kind.DATA, 0), 1: (Kind.DATA, 0x200)}
        assert image.data is data
        assert image.storage is not data
    assert data.descriptor < 0


def test_closing_twice_closes_once() -> None:
    with opened([0], {}) as image:
        assert image.data is image.storage
        descriptor = image.storage.descriptor
        image.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
        image.close()

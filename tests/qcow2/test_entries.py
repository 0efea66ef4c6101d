"""Entries: the vectorised decoder against the format's table, and against a slow reading of QEMU's rules (Q33-Q57).

The reference below is qcow2_get_subcluster_type and the checks of qcow2_get_host_offset, one entry at a time.
"""

import random
import struct
from collections.abc import Iterator

import pytest

from nbdq.block import Kind
from nbdq.qcow2.entries import Geometry, decode_l2

COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
CLUSTER = 64 << 10

V2 = Geometry(cluster_bits=16, extended_l2=False, version=2, has_data_file=False)
V3 = Geometry(cluster_bits=16, extended_l2=False, version=3, has_data_file=False)
V3_DATA_FILE = Geometry(cluster_bits=16, extended_l2=False, version=3, has_data_file=True)
EXTENDED = Geometry(cluster_bits=16, extended_l2=True, version=3, has_data_file=False)
EXTENDED_DATA_FILE = Geometry(cluster_bits=16, extended_l2=True, version=3, has_data_file=True)

GEOMETRIES = [
    *(Geometry(bits, False, version, False) for bits in range(9, 22) for version in (2, 3)),
    *(Geometry(bits, False, 3, True) for bits in range(9, 22)),
    *(Geometry(bits, True, 3, data_file) for bits in range(14, 22) for data_file in (False, True)),
]


def decoded(table: bytes, guest_offset: int, geometry: Geometry) -> list[tuple[Kind, int]]:
    """What the decoder says of every granule; (UNALLOCATED, 0) for those it leaves out."""
    positions, kinds, hosts = decode_l2(table, guest_offset, geometry)
    granules = [(Kind.UNALLOCATED, 0)] * (len(table) // geometry.entry_size * (32 if geometry.extended_l2 else 1))
    assert positions.tolist() == sorted(set(positions.tolist()))
    for position, kind, host in zip(positions.tolist(), kinds.tolist(), hosts.tolist(), strict=True):
        granules[position] = (Kind(kind), host)
    return granules


def standard(entry: int, geometry: Geometry, guest_offset: int = 0) -> tuple[Kind, int]:
    """One standard entry."""
    return decoded(struct.pack(">Q", entry), guest_offset, geometry)[0]


def extended(entry: int, bitmap: int, geometry: Geometry = EXTENDED, guest_offset: int = 0) -> list[tuple[Kind, int]]:
    """The 32 subclusters of one extended entry."""
    return decoded(struct.pack(">QQ", entry, bitmap), guest_offset, geometry)


def kinds(granules: list[tuple[Kind, int]]) -> set[Kind]:
    return {kind for kind, _ in granules}


def reference(entry: int, bitmap: int, guest_offset: int, geometry: Geometry) -> Iterator[tuple[Kind, int]]:
    """(kind, host) of each granule that the entry at ``guest_offset`` describes, by QEMU's rules."""
    host = entry & OFFSET_MASK
    for subcluster in range(32 if geometry.extended_l2 else 1):
        if entry & COMPRESSED:
            kind, value = Kind.COMPRESSED, entry & ~(COPIED | COMPRESSED)
            if geometry.has_data_file:
                kind = Kind.CORRUPT
        elif not geometry.extended_l2:
            if entry & ZERO:
                kind = Kind.ZERO_OFFSET if host else Kind.ZERO
                if geometry.version < 3:
                    kind = Kind.CORRUPT
            elif host or (geometry.has_data_file and entry & COPIED):
                kind = Kind.DATA
            else:
                kind = Kind.UNALLOCATED
            value = host
        else:
            allocated, zero = bitmap >> subcluster & 1, bitmap >> subcluster + 32 & 1
            if host or (geometry.has_data_file and entry & COPIED):
                if bitmap & bitmap >> 32 & 0xFFFF_FFFF:
                    kind = Kind.CORRUPT
                else:
                    kind = Kind.ZERO_OFFSET if zero else Kind.DATA if allocated else Kind.UNALLOCATED_OFFSET
            elif bitmap & 0xFFFF_FFFF:
                kind = Kind.CORRUPT
            else:
                kind = Kind.ZERO if zero else Kind.UNALLOCATED
            value = host + subcluster * geometry.granule
        if kind in (Kind.DATA, Kind.ZERO_OFFSET, Kind.UNALLOCATED_OFFSET) and (
            host % geometry.cluster_size or (geometry.has_data_file and host != guest_offset)
        ):
            kind = Kind.CORRUPT
        yield kind, 0 if kind in (Kind.UNALLOCATED, Kind.ZERO) else value


# The table of chapter 1.6, row by row.


@pytest.mark.parametrize("geometry", [V2, V3], ids=["v2", "v3"])
@pytest.mark.parametrize(
    ("entry", "kind", "host"),
    [
        (0, Kind.UNALLOCATED, 0),
        (COPIED, Kind.UNALLOCATED, 0),  # offset 0 is no place without a data file (Q36)
        (0x3F << 56 | 0x1FE, Kind.UNALLOCATED, 0),  # reserved bits only
        (5 * CLUSTER, Kind.DATA, 5 * CLUSTER),
        (COPIED | 5 * CLUSTER, Kind.DATA, 5 * CLUSTER),
        (COPIED | 0x3F << 56 | 5 * CLUSTER | 0x1FE, Kind.DATA, 5 * CLUSTER),  # QEMU ignores reserved bits (1.13)
        (OFFSET_MASK & -CLUSTER, Kind.DATA, OFFSET_MASK & -CLUSTER),
        (COPIED | 5 * CLUSTER + 512, Kind.CORRUPT, None),
        (1 << 9, Kind.CORRUPT, None),
        (COMPRESSED | 0x12345, Kind.COMPRESSED, 0x12345),  # bit 0 belongs to the descriptor, it is no zero flag
        (COPIED | COMPRESSED | 0x12345, Kind.COMPRESSED, 0x12345),
        (COMPRESSED, Kind.COMPRESSED, 0),
        (2**64 - 1, Kind.COMPRESSED, 2**62 - 1),
    ],
)
def test_a_standard_entry_means_what_the_format_says(
    entry: int, kind: Kind, host: int | None, geometry: Geometry
) -> None:
    """Q34-Q36, Q41."""
    found = standard(entry, geometry)
    assert found[0] is kind
    assert host is None or found[1] == host


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (ZERO, (Kind.ZERO, 0)),
        (COPIED | ZERO, (Kind.ZERO, 0)),
        (COPIED | 5 * CLUSTER | ZERO, (Kind.ZERO_OFFSET, 5 * CLUSTER)),
        (5 * CLUSTER | ZERO, (Kind.ZERO_OFFSET, 5 * CLUSTER)),
    ],
)
def test_the_zero_flag_hides_what_is_below_and_keeps_preallocated_space(entry: int, expected: tuple[Kind, int]) -> None:
    """Q35, Q41."""
    assert standard(entry, V3) == expected


def test_a_preallocated_zero_cluster_must_be_aligned_too() -> None:
    assert standard(5 * CLUSTER + 512 | ZERO, V3)[0] is Kind.CORRUPT


@pytest.mark.parametrize("entry", [ZERO, COPIED | ZERO, 5 * CLUSTER | ZERO, COPIED | 5 * CLUSTER | ZERO])
def test_version_2_knows_no_zero_clusters(entry: int) -> None:
    """Q38."""
    assert standard(entry, V2)[0] is Kind.CORRUPT


@pytest.mark.parametrize(
    ("guest_offset", "entry", "expected"),
    [
        (0, COPIED, (Kind.DATA, 0)),  # Q36: the first byte of a data file is a place
        (0, 0, (Kind.UNALLOCATED, 0)),
        (3 * CLUSTER, COPIED | 3 * CLUSTER, (Kind.DATA, 3 * CLUSTER)),
        (3 * CLUSTER, 3 * CLUSTER, (Kind.DATA, 3 * CLUSTER)),
        (3 * CLUSTER, 0, (Kind.UNALLOCATED, 0)),
        (3 * CLUSTER, COPIED | 3 * CLUSTER | ZERO, (Kind.ZERO_OFFSET, 3 * CLUSTER)),
        (3 * CLUSTER, ZERO, (Kind.ZERO, 0)),
        (0, COPIED | ZERO, (Kind.ZERO, 0)),
        (3 * CLUSTER, COPIED | ZERO, (Kind.ZERO, 0)),  # the zero flag wins over bit 63
    ],
)
def test_a_data_file_holds_every_cluster_at_its_guest_offset(
    guest_offset: int, entry: int, expected: tuple[Kind, int]
) -> None:
    """Q36, Q77."""
    assert standard(entry, V3_DATA_FILE, guest_offset) == expected


@pytest.mark.parametrize(
    ("guest_offset", "entry"),
    [
        (3 * CLUSTER, COPIED | 4 * CLUSTER),
        (3 * CLUSTER, COPIED),  # offset 0 is a place, but the wrong one
        (0, COPIED | CLUSTER),
        (3 * CLUSTER, 4 * CLUSTER | ZERO),
        (0, COMPRESSED | 0x12345),  # Q57, Q78
        (0, COMPRESSED),
    ],
)
def test_a_cluster_elsewhere_in_a_data_file_is_corrupt(guest_offset: int, entry: int) -> None:
    """Q77, Q78: the guest would read another cluster's data."""
    assert standard(entry, V3_DATA_FILE, guest_offset)[0] is Kind.CORRUPT


def test_each_entry_of_a_slice_is_judged_by_its_own_guest_offset() -> None:
    first = 1000 * CLUSTER
    table = struct.pack(">3Q", first, 0, first + 2 * CLUSTER)
    assert decoded(table, first, V3_DATA_FILE) == [
        (Kind.DATA, first),
        (Kind.UNALLOCATED, 0),
        (Kind.DATA, first + 2 * CLUSTER),
    ]


# Chapter 1.7, extended L2 entries.


def test_each_subcluster_has_its_own_state() -> None:
    """Q43, Q44: bit x allocates subcluster x, bit 32 + x zeroes it."""
    granules = extended(COPIED | 5 * CLUSTER, 1 << 0 | 1 << 31 | 1 << 32 + 1 | 1 << 32 + 30)
    step = CLUSTER // 32
    assert granules[0] == (Kind.DATA, 5 * CLUSTER)
    assert granules[1] == (Kind.ZERO_OFFSET, 5 * CLUSTER + step)
    assert granules[2] == (Kind.UNALLOCATED_OFFSET, 5 * CLUSTER + 2 * step)
    assert granules[30] == (Kind.ZERO_OFFSET, 5 * CLUSTER + 30 * step)
    assert granules[31] == (Kind.DATA, 5 * CLUSTER + 31 * step)
    assert kinds(granules[2:30]) == {Kind.UNALLOCATED_OFFSET}


def test_zero_subclusters_need_no_cluster() -> None:
    """Q45."""
    granules = extended(0, 1 << 32 + 7)
    assert granules.pop(7) == (Kind.ZERO, 0)
    assert set(granules) == {(Kind.UNALLOCATED, 0)}


@pytest.mark.parametrize(
    ("entry", "bitmap"),
    [
        (COPIED | 5 * CLUSTER, 1 << 4 | 1 << 32 + 4),  # Q44: both allocated and zero
        (COPIED | 5 * CLUSTER, 0xFFFF_FFFF_FFFF_FFFF),
        (0, 1 << 4),  # Q45: allocated, but nowhere
        (COPIED, 1 << 4),
        (0, 1 << 4 | 1 << 32 + 4),
        (0, 1 << 4 | 1 << 32 + 9),
        (COPIED | 5 * CLUSTER + 512, 1),
        (COPIED | 5 * CLUSTER + 512, 0),  # QEMU checks the place even where nothing is allocated
    ],
)
def test_an_invalid_subcluster_bitmap_spoils_the_whole_cluster(entry: int, bitmap: int) -> None:
    """QEMU says EIO for every subcluster of such an entry."""
    assert kinds(extended(entry, bitmap)) == {Kind.CORRUPT}


def test_an_invalid_entry_spoils_no_other() -> None:
    table = struct.pack(">6Q", 0, 1, COPIED | 5 * CLUSTER, 1, 0, 0)
    assert [kind for kind, _ in decoded(table, 0, EXTENDED)[32:]] == [
        Kind.DATA,
        *[Kind.UNALLOCATED_OFFSET] * 31,
        *[Kind.UNALLOCATED] * 32,
    ]


@pytest.mark.parametrize("bitmap", [0, 1, 0xFFFF_FFFF_FFFF_FFFF])
def test_a_compressed_cluster_ignores_its_bitmap(bitmap: int) -> None:
    """Q46 wants it to be 0, but QEMU reads the cluster whatever it is."""
    assert set(extended(COMPRESSED | 0x12345, bitmap)) == {(Kind.COMPRESSED, 0x12345)}


def test_bit_0_of_an_extended_entry_is_reserved() -> None:
    """Q43: there is no zero flag for the whole cluster."""
    assert extended(ZERO, 0) == [(Kind.UNALLOCATED, 0)] * 32
    assert kinds(extended(COPIED | 5 * CLUSTER | ZERO, 0xFFFF_FFFF)) == {Kind.DATA}


def test_extended_entries_of_a_data_file_are_held_to_their_guest_offset() -> None:
    """Q77, and Q36 for the first cluster."""
    assert kinds(extended(COPIED, 0xFFFF_FFFF, EXTENDED_DATA_FILE, 0)) == {Kind.DATA}
    assert kinds(extended(COPIED, 0xFFFF_FFFF, EXTENDED_DATA_FILE, CLUSTER)) == {Kind.CORRUPT}
    assert kinds(extended(0, 0xFFFF_FFFF, EXTENDED_DATA_FILE, 0)) == {Kind.CORRUPT}
    assert kinds(extended(COPIED | CLUSTER, 0, EXTENDED_DATA_FILE, CLUSTER)) == {Kind.UNALLOCATED_OFFSET}
    assert kinds(extended(COMPRESSED | 0x12345, 0, EXTENDED_DATA_FILE, 0)) == {Kind.CORRUPT}


# Everything else that 64 or 128 bits can say.


def entries(chance: random.Random, geometry: Geometry, guest_offset: int) -> Iterator[tuple[int, int]]:
    """(entry, bitmap) at ascending guest offsets: boundary values of every field in every mix, and noise."""
    while True:
        host = chance.choice(
            (
                0,
                guest_offset,
                guest_offset ^ geometry.cluster_size,
                geometry.cluster_size,
                geometry.cluster_size >> 1,
                1 << 9,
                1 << 55,
                OFFSET_MASK,
                chance.getrandbits(56) & -geometry.cluster_size,
                chance.getrandbits(62),
            )
        )
        entry = host & (1 << 62) - 1
        for flag, odds in ((ZERO, 3), (COPIED, 2), (COMPRESSED, 6), (0x1FE, 9), (0x3F << 56, 9)):
            if chance.randrange(odds) == 0:
                entry |= flag
        allocated = chance.choice((0, 0, 1, 1 << 31, 0xFFFF_FFFF, chance.getrandbits(32)))
        zero = chance.choice((0, 0, 1, 1 << 31, 0xFFFF_FFFF, chance.getrandbits(32)))
        if chance.randrange(4):
            zero &= ~allocated
        yield entry, zero << 32 | allocated
        guest_offset += geometry.cluster_size


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_entry_is_decoded_as_qemu_would(geometry: Geometry) -> None:
    seed = 17
    print(f"seed {seed}")
    chance = random.Random(f"{seed} {geometry}")
    for guest_offset in (0, geometry.cluster_size, geometry.l2_coverage * 3, (1 << 55) & -geometry.cluster_size):
        drawn = [pair for _, pair in zip(range(200), entries(chance, geometry, guest_offset), strict=False)]
        words = [word for entry, bitmap in drawn for word in ((entry, bitmap) if geometry.extended_l2 else (entry,))]
        found = decoded(struct.pack(f">{len(words)}Q", *words), guest_offset, geometry)
        width = 32 if geometry.extended_l2 else 1
        for number, (entry, bitmap) in enumerate(drawn):
            place = guest_offset + number * geometry.cluster_size
            expected = [
                (kind, None if kind is Kind.CORRUPT else host)
                for kind, host in reference(entry, bitmap, place, geometry)
            ]
            ours = [
                (kind, None if kind is Kind.CORRUPT else host)
                for kind, host in found[number * width : (number + 1) * width]
            ]
            assert ours == expected, f"{entry:#018x} {bitmap:#018x} at {place:#x}"


def test_an_empty_slice_holds_nothing() -> None:
    for geometry in GEOMETRIES:
        assert decoded(b"", 0, geometry) == []


# Geometry.


@pytest.mark.parametrize(
    ("cluster_size", "coverage"),
    [
        (512, 32 << 10),
        (4 << 10, 2 << 20),
        (16 << 10, 32 << 20),
        (64 << 10, 512 << 20),
        (256 << 10, 8 << 30),
        (1 << 20, 128 << 30),
        (2 << 20, 512 << 30),
    ],
)
def test_an_l2_table_covers_what_the_format_says(cluster_size: int, coverage: int) -> None:
    """Q5; half of it with extended L2 (Q3), whose subclusters are a 32nd of a cluster (Q42)."""
    bits = cluster_size.bit_length() - 1
    plain = Geometry(bits, extended_l2=False, version=3, has_data_file=False)
    halved = Geometry(bits, extended_l2=True, version=3, has_data_file=False)
    assert (plain.cluster_size, plain.l2_coverage, plain.granule) == (cluster_size, coverage, cluster_size)
    assert (halved.cluster_size, halved.l2_coverage, halved.granule) == (
        cluster_size,
        coverage // 2,
        cluster_size // 32,
    )


@pytest.mark.parametrize(("cluster_bits", "offset_bits"), [(9, 61), (12, 58), (16, 54), (20, 50), (21, 49)])
def test_a_compressed_descriptor_splits_where_the_format_says(cluster_bits: int, offset_bits: int) -> None:
    """Q49, Q50: the sector count takes one bit more for each doubling of the cluster."""
    geometry = Geometry(cluster_bits, extended_l2=False, version=3, has_data_file=False)
    most = (1 << 62 - offset_bits) - 1
    assert geometry.compressed_range(0) == (0, 512)
    assert geometry.compressed_range(0x12345) == (0x12345, 512 - 0x12345 % 512)
    assert geometry.compressed_range(1 << offset_bits | 511) == (511, 513)
    assert geometry.compressed_range(most << offset_bits) == (0, (most + 1) * 512)
    assert geometry.compressed_range((1 << 62) - 1) == ((1 << offset_bits) - 1, most * 512 + 1)

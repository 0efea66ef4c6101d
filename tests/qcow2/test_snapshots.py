"""The snapshot table: every layout that versions of QEMU have written, and every one that it refuses (Q58-Q64)."""

import os
import struct
from dataclasses import replace

import pytest

from nbdq.errors import CorruptImage, ExportError, ImageError, InvalidImage
from nbdq.qcow2.format import Header
from nbdq.qcow2.snapshots import MAX_SNAPSHOT_TABLE, Snapshot, check_snapshot, find_snapshot, read_snapshots
from nbdq.storage import FileStorage
from tests.qcow2.minimal import minimal_header, minimal_image, stored

CLUSTER = 1 << 16
TABLE = 4 * CLUSTER


def entry(
    identity: bytes = b"1",
    name: bytes = b"first",
    extra: bytes = struct.pack(">QQQ", 0, 1 << 20, 0),
    *,
    l1_offset: int = 3 * CLUSTER,
    l1_size: int = 1,
    vm_state_size: int = 0,
    extra_length: int | None = None,
) -> bytes:
    """One table entry, padded to 8 bytes; ``extra_length`` may lie."""
    fixed = struct.pack(
        ">QIHHIIQII",
        l1_offset,
        l1_size,
        len(identity),
        len(name),
        1_700_000_000,
        123_456_789,
        3_723_000_000_001,
        vm_state_size,
        len(extra) if extra_length is None else extra_length,
    )
    record = fixed + extra + identity + name
    return record + bytes(-len(record) % 8)


def image_with(*entries: bytes, count: int | None = None, version: int = 3) -> tuple[FileStorage, Header]:
    """An image whose file ends with its snapshot table."""
    header = minimal_header(
        version=version, snapshot_count=len(entries) if count is None else count, snapshots_offset=TABLE
    )
    return stored(minimal_image(header) + b"".join(entries)), header


def snapshots_of(*entries: bytes, count: int | None = None, version: int = 3) -> tuple[Snapshot, ...]:
    storage, header = image_with(*entries, count=count, version=version)
    try:
        return read_snapshots(storage, header)
    finally:
        storage.close()


def test_an_image_without_snapshots_has_none() -> None:
    assert snapshots_of() == ()


def test_every_field_of_an_entry_is_read() -> None:
    (found,) = snapshots_of(entry(b"7", "zwölf".encode(), struct.pack(">QQQ", 5 << 30, 2 << 20, 99), l1_size=4))
    assert found == Snapshot(
        id="7",
        name="zwölf",
        l1_offset=3 * CLUSTER,
        l1_size=4,
        date_seconds=1_700_000_000,
        date_nanoseconds=123_456_789,
        vm_clock_ns=3_723_000_000_001,
        vm_state_size=5 << 30,
        disk_size=2 << 20,
        icount=99,
    )


@pytest.mark.parametrize("version", [2, 3])
def test_an_entry_of_old_qemu_without_extra_data_has_the_disk_size_of_the_image(version: int) -> None:
    (found,) = snapshots_of(entry(extra=b"", vm_state_size=77), version=version)
    assert (found.vm_state_size, found.disk_size, found.icount) == (77, None, None)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (struct.pack(">Q", 1 << 40), (1 << 40, None, None)),
        (struct.pack(">QI", 1 << 40, 5), (1 << 40, None, None)),
        (struct.pack(">QQ", 1 << 40, 512), (1 << 40, 512, None)),
        (struct.pack(">QQQ", 1 << 40, 512, (1 << 64) - 1), (1 << 40, 512, None)),
        (struct.pack(">QQQ", 1 << 40, 512, 0) + b"from the future" * 60, (1 << 40, 512, 0)),
        (b"\0\0\0\7", (77, None, None)),
    ],
    ids=["state", "half a size", "size", "no icount", "unknown data", "less than a field"],
)
def test_extra_data_counts_as_far_as_it_goes(extra: bytes, expected: tuple[int, int | None, int | None]) -> None:
    (found, following) = snapshots_of(entry(extra=extra, vm_state_size=77), entry(b"2", b"next"))
    assert (found.vm_state_size, found.disk_size, found.icount) == expected
    assert (following.id, following.name) == ("2", "next")


def test_entries_begin_at_multiples_of_eight() -> None:
    entries = [entry(str(n).encode(), b"x" * n) for n in range(20)]
    assert [s.name for s in snapshots_of(*entries)] == ["x" * n for n in range(20)]


def test_the_last_entry_may_end_with_the_file() -> None:
    last = entry(b"2", b"xyz").rstrip(b"\0")
    assert [s.name for s in snapshots_of(entry(), last)] == ["first", "xyz"]


def test_an_entry_may_lie_across_the_pieces_in_which_the_table_is_read() -> None:
    entries = [entry(str(n).encode(), b"n" * 60_000, b"e" * 1024) for n in range(5)]
    assert [(s.id, len(s.name)) for s in snapshots_of(*entries)] == [(str(n), 60_000) for n in range(5)]


def test_a_name_ends_at_a_nul_and_need_not_be_utf_8() -> None:
    first, second = snapshots_of(entry(name=b"a\0b"), entry(b"2", b"\xff"))
    assert first.name == "a"
    assert second.name == "\udcff"


def test_more_than_1024_bytes_of_extra_data_are_refused() -> None:
    assert len(snapshots_of(entry(extra=bytes(1024)))) == 1
    with pytest.raises(InvalidImage, match=r"entry 1 has 1025 bytes of extra data, more than 1024; .*check -r all"):
        snapshots_of(entry(), entry(extra=bytes(1025)))
    with pytest.raises(InvalidImage, match="entry 0 has 4294967295 bytes of extra data"):
        snapshots_of(entry(extra_length=0xFFFF_FFFF))


@pytest.mark.parametrize("length", [0, 39, 40, 63, 64, 65, 69])
def test_a_table_that_was_cut_off_is_refused(length: int) -> None:
    with pytest.raises(CorruptImage, match="the snapshot table at 0x40000 goes on past the end of the file"):
        snapshots_of(entry()[:length], count=1)
    with pytest.raises(CorruptImage):
        snapshots_of(entry(), entry(b"2")[:length], count=2)


def test_a_table_of_more_than_64_mib_is_refused() -> None:
    header = minimal_header(snapshot_count=65536, snapshots_offset=TABLE)
    storage = stored(minimal_image(header), TABLE + MAX_SNAPSHOT_TABLE + CLUSTER)
    head = struct.pack(">QIHHIIQII", 0, 0, 0xFFFF, 0xFFFF, 0, 0, 0, 0, 0)
    step = -(-(40 + 2 * 0xFFFF) // 8) * 8
    for number in range(MAX_SNAPSHOT_TABLE // step + 1):
        os.pwrite(storage.descriptor, head, TABLE + number * step)
    with pytest.raises(InvalidImage, match="the snapshot table is larger than 67108864 bytes"):
        read_snapshots(storage, header)
    storage.close()


def test_a_table_of_65536_empty_entries_is_read() -> None:
    header = minimal_header(snapshot_count=65536, snapshots_offset=TABLE)
    storage = stored(minimal_image(header), TABLE + 65536 * 40)
    assert len(read_snapshots(storage, header)) == 65536
    storage.close()


# --- finding one, as qemu-nbd -l does -----------------------------------------------------------------------------

(FIRST, SECOND, TWIN, ODD) = snapshots_of(entry(b"1", b"2"), entry(b"2", b"b"), entry(b"3", b"b"), entry(b"4", b"c,d"))
ALL = (FIRST, SECOND, TWIN, ODD)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("1", FIRST),
        ("2", SECOND),  # an id goes before a name
        ("b", SECOND),  # the first of equal names
        ("c,d", ODD),
        ("snapshot.id=3", TWIN),
        ("snapshot.name=2", FIRST),
        ("snapshot.name=b,snapshot.id=3", TWIN),
        ("snapshot.name=c,,d", ODD),
    ],
)
def test_a_snapshot_is_found_by_id_or_name(wanted: str, found: Snapshot) -> None:
    assert find_snapshot(ALL, wanted) is found


@pytest.mark.parametrize("wanted", ["", "c", "snapshot.id=b", "snapshot.id=1,snapshot.name=b", "x\x1b[2J"])
def test_a_snapshot_that_does_not_exist_is_answered_with_those_that_do(wanted: str) -> None:
    with pytest.raises(ExportError) as caught:
        find_snapshot(ALL, wanted)
    assert "the image has 1 '2', 2 'b', 3 'b', 4 'c,d'" in str(caught.value)
    assert str(caught.value).isprintable()


def test_an_image_without_snapshots_says_so() -> None:
    with pytest.raises(ExportError, match="the image has none"):
        find_snapshot((), "1")


def test_the_list_of_what_exists_is_short() -> None:
    with pytest.raises(ExportError, match=r"'first', …$") as caught:
        find_snapshot([FIRST, *snapshots_of(*[entry()] * 5000)], "gone")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("wanted", ["snapshot.", "snapshot.size=1", "snapshot.id=1,b", "snapshot.id"])
def test_a_malformed_wish_says_how_to_write_one(wanted: str) -> None:
    with pytest.raises(ExportError, match=r"say snapshot\.id=ID, snapshot\.name=NAME or both"):
        find_snapshot(ALL, wanted)


# --- using one ------------------------------------------------------------------------------------------------------


def check(record: bytes) -> None:
    storage, header = image_with(record)
    try:
        check_snapshot(storage, header, read_snapshots(storage, header)[0])
    finally:
        storage.close()


@pytest.mark.parametrize(
    "record",
    [
        entry(),
        entry(extra=struct.pack(">QQ", 0, 512 << 20)),
        entry(extra=b"", l1_size=1),
        entry(extra=struct.pack(">QQ", 0, 0), l1_size=0, l1_offset=0),
    ],
    ids=["usual", "largest disk", "size not stored", "empty disk"],
)
def test_a_snapshot_with_a_sound_l1_table_can_be_used(record: bytes) -> None:
    check(record)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (entry(l1_offset=3 * CLUSTER + 8), "the L1 table of snapshot 'first' offset 0x30008"),
        (entry(l1_offset=(1 << 64) - CLUSTER), "the L1 table of snapshot 'first' offset"),
        (entry(l1_size=(4 << 20) + 1), "the L1 table of snapshot 'first' has 33554440 bytes"),
        (entry(l1_offset=5 * CLUSTER), "the L1 table of snapshot 'first' lies outside of the file"),
        (entry(extra=struct.pack(">QQ", 0, (512 << 20) + 512)), "has 1 entries, but 536871424 bytes need 2"),
        (entry(extra=struct.pack(">QQ", 0, (1 << 64) - 1)), "has 1 entries, but"),
    ],
    ids=["unaligned", "far away", "too large", "after the file", "too small", "absurd disk"],
)
def test_a_snapshot_with_an_unsound_l1_table_is_refused(record: bytes, words: str) -> None:
    with pytest.raises(ImageError) as caught:
        check(record)
    assert words in str(caught.value)


def test_a_snapshot_of_an_extended_l2_image_needs_a_longer_l1_table() -> None:
    storage, header = image_with(entry(extra=struct.pack(">QQ", 0, 512 << 20)))
    extended = replace(header, incompatible=header.incompatible | 16)
    with pytest.raises(InvalidImage, match="need 2"):
        check_snapshot(storage, extended, read_snapshots(storage, header)[0])
    storage.close()

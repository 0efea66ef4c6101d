"""The bitmap directory: what QEMU writes is read, and what makes QEMU refuse an image is refused (Q65-Q68)."""

import struct

import pytest

from nbdq.errors import CorruptImage, ImageError, InvalidImage, UnsupportedImage
from nbdq.qcow2.bitmaps.directory import Bitmap, BitmapFlags, read_bitmaps
from nbdq.qcow2.extensions import BitmapsExtension
from nbdq.qcow2.features import Autoclear
from tests.qcow2.minimal import minimal_header, minimal_image, stored

CLUSTER = 1 << 16
DIRECTORY = 4 * CLUSTER


def entry(
    name: bytes = b"b0",
    *,
    table_offset: int = 2 * CLUSTER,
    table_size: int = 1,
    flags: int = 0,
    kind: int = 1,
    granularity_bits: int = 16,
    extra: bytes = b"",
) -> bytes:
    fixed = struct.pack(">QIIBBHI", table_offset, table_size, flags, kind, granularity_bits, len(name), len(extra))
    record = fixed + extra + name
    return record + bytes(-len(record) % 8)


def bitmaps_of(
    *entries: bytes, count: int | None = None, size: int | None = None, disk: int = 1 << 20
) -> tuple[Bitmap, ...]:
    """What an image of ``disk`` bytes lists, whose file ends with this directory."""
    directory = b"".join(entries)
    extension = BitmapsExtension(
        len(entries) if count is None else count, len(directory) if size is None else size, DIRECTORY
    )
    header = minimal_header(autoclear=Autoclear.BITMAPS, bitmaps=extension, size=disk, l1_size=4096)
    storage = stored(minimal_image(header) + directory)
    try:
        return read_bitmaps(storage, header)
    finally:
        storage.close()


def test_an_image_without_bitmaps_has_none() -> None:
    storage = stored(minimal_image())
    assert read_bitmaps(storage, minimal_header()) == ()
    storage.close()


def test_every_field_of_an_entry_is_read() -> None:
    (found,) = bitmaps_of(entry("ü".encode(), table_size=3, flags=2, granularity_bits=9))
    assert found == Bitmap("ü", 9, BitmapFlags.AUTO, 2 * CLUSTER, 3)
    assert found.granularity == 512


def test_entries_follow_each_other_at_multiples_of_eight() -> None:
    names = [b"n" * length for length in range(1, 30)]
    assert [b.name.encode() for b in bitmaps_of(*map(entry, names))] == names


def test_the_last_entry_may_lack_its_padding_at_the_end_of_the_file() -> None:
    cut = entry(b"abc").rstrip(b"\0")
    assert bitmaps_of(cut, size=32)[0].name == "abc"


def test_a_bitmap_that_was_not_saved_may_be_too_small_for_a_grown_disk() -> None:
    too_small = {"table_size": 1, "granularity_bits": 9, "name": b"b"}
    disk = (CLUSTER * 8 << 9) + 512
    assert bitmaps_of(entry(flags=1, **too_small), disk=disk)[0].flags is BitmapFlags.IN_USE
    assert bitmaps_of(entry(**too_small), disk=disk - 512)
    with pytest.raises(InvalidImage, match="bitmap 'b' has a table of 1 entries, too small for the disk"):
        bitmaps_of(entry(**too_small), disk=disk)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (entry(b""), "has a name of 0 bytes"),
        (entry(b"n" * 1024), "has a name of 1024 bytes"),
        (entry(kind=2), "bitmap 'b0' has type 2"),
        (entry(flags=4), "bitmap 'b0' has flags 0x4"),
        (entry(flags=0x8000_0001), "bitmap 'b0' has flags 0x80000001"),
        (entry(granularity_bits=8), "granularity_bits 8"),
        (entry(granularity_bits=32), "granularity_bits 32"),
        (entry(table_size=0), "table of 0 entries"),
        (entry(table_size=8193), "table of 8193 entries"),
        (entry(table_size=0xFFFF_FFFF), "table of 4294967295 entries"),
        (entry(table_offset=0), "its table at 0x0"),
        (entry(table_offset=CLUSTER + 512), "its table at 0x10200"),
        (entry(b"\x1b]0;\n", kind=0), "bitmap '\\x1b]0;\\n' has type 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_entry_that_qemu_would_refuse_is_refused_by_name_and_value(record: bytes, words: str) -> None:
    with pytest.raises(ImageError) as caught:
        bitmaps_of(record)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()


def test_extra_data_of_an_entry_is_refused() -> None:
    with pytest.raises(UnsupportedImage, match="8 bytes of extra data"):
        bitmaps_of(entry(extra=bytes(8)))


def test_two_bitmaps_of_one_name_are_refused() -> None:
    with pytest.raises(InvalidImage, match="two bitmaps have the name 'b0'"):
        bitmaps_of(entry(), entry(b"b1"), entry())


@pytest.mark.parametrize(("count", "words"), [(1, "more than nb_bitmaps=1"), (3, "has 2 entries, but nb_bitmaps is 3")])
def test_the_directory_has_as_many_entries_as_the_header_says(count: int, words: str) -> None:
    with pytest.raises(InvalidImage, match=words):
        bitmaps_of(entry(), entry(b"b1"), count=count)


def test_an_empty_directory_is_refused() -> None:
    with pytest.raises(InvalidImage, match="has 0 entries, but nb_bitmaps is 1"):
        bitmaps_of(count=1)


@pytest.mark.parametrize("size", [1, 23, 24, 31, 40, 55])
def test_a_directory_that_ends_within_an_entry_is_refused(size: int) -> None:
    with pytest.raises(InvalidImage, match=f"the bitmap directory of {size} bytes ends within an entry"):
        bitmaps_of(entry(), entry(b"b1"), size=size)


def test_a_directory_past_the_end_of_the_file_is_refused() -> None:
    with pytest.raises(CorruptImage, match="the bitmap directory at 0x40000 goes on past the end of the file"):
        bitmaps_of(entry()[:20], count=1, size=32)


def test_a_directory_may_be_longer_than_the_pieces_in_which_it_is_read() -> None:
    names = [b"%04d" % n + b"x" * 1000 for n in range(200)]
    assert [b.name.encode() for b in bitmaps_of(*map(entry, names))] == names

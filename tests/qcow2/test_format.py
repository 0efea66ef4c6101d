"""The header: what is accepted, what is refused in which words (section 1.13), and that building inverts reading."""

import errno
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdq.errors import CorruptImage, ImageError, InvalidImage, UnsupportedImage
from nbdq.qcow2.extensions import MAX_EXTENSIONS, BitmapsExtension, EncryptionPointer, ExtensionType, UnknownExtension
from nbdq.qcow2.format import (
    Autoclear,
    Compatible,
    CompressionType,
    CryptMethod,
    Header,
    Incompatible,
    build_header,
    read_header,
    update_fields,
)
from nbdq.storage import FileStorage
from tests.qcow2.minimal import minimal_header, minimal_image, poke, stored

CLUSTER = 1 << 16
BACKED = minimal_header(backing_name="base.qcow2", backing_format="qcow2")


def read(content: bytes | bytearray, length: int | None = None, *, describe: bool = False) -> Header:
    storage = stored(content, length)
    try:
        return read_header(storage, describe=describe)
    finally:
        storage.close()


def with_extensions(*records: tuple[int, bytes], header: Header | None = None, end: bool = True) -> bytearray:
    """An image whose extension area holds exactly these raw records."""
    header = header or minimal_header()
    image = minimal_image(header)
    area = b"".join(struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8) for kind, data in records)
    area += bytes(8) if end else b""
    image[header.header_length : header.header_length + len(area)] = area
    return image


def refusal(content: bytes | bytearray, length: int | None = None) -> str:
    """The message with which ``content`` is refused: one line that names the file and says how to mend it."""
    with pytest.raises(ImageError) as caught:
        read(content, length)
    message = str(caught.value)
    assert message.startswith("disk.qcow2: ")
    assert message.isprintable()
    assert caught.value.mend
    return message


# --- what QEMU refuses, in its order -----------------------------------------------------------------------------

#: What is poked into a valid image → the error and what its message must say (V2-V19).
REFUSED: list[tuple[dict[str, int], type[ImageError], str]] = [
    ({"magic": 0x514649FA}, InvalidImage, "magic is 514649fa"),
    ({"version": 1}, UnsupportedImage, "version is 1"),
    ({"version": 4}, UnsupportedImage, "version is 4"),
    ({"cluster_bits": 8}, InvalidImage, "cluster_bits is 8"),
    ({"cluster_bits": 22}, InvalidImage, "cluster_bits is 22"),
    ({"cluster_bits": 0xFFFF_FFFF}, InvalidImage, "cluster_bits is 4294967295"),
    ({"header_length": 0}, InvalidImage, "header_length is 0"),
    ({"header_length": 103}, InvalidImage, "header_length is 103"),
    ({"header_length": CLUSTER + 8}, InvalidImage, "header_length is 65544"),
    ({"header_length": 0xFFFF_FFF8}, InvalidImage, "header_length is 4294967288"),
    ({"backing_file_offset": CLUSTER + 1}, InvalidImage, "backing_file_offset is 65537"),
    ({"backing_file_offset": 1 << 63}, InvalidImage, "backing_file_offset is 9223372036854775808"),
    ({"incompatible_features": 1 << 5}, UnsupportedImage, "incompatible_features has bit 5"),
    ({"incompatible_features": 1 << 63 | 1 << 6 | 1}, UnsupportedImage, "has bit 6, bit 63,"),
    ({"compression_type": 2}, UnsupportedImage, "compression_type is 2"),
    ({"compression_type": 2, "incompatible_features": 8}, UnsupportedImage, "compression_type is 2"),
    ({"compression_type": 1}, InvalidImage, "compression_type is 1, but incompatible_features is 0x0"),
    ({"incompatible_features": 8}, InvalidImage, "compression_type is 0, but incompatible_features is 0x8"),
    (
        {"incompatible_features": 8, "compression_type": 1, "header_length": 104},
        InvalidImage,
        "compression_type is 0, but incompatible_features is 0x8",
    ),
    ({"incompatible_features": 16, "cluster_bits": 13}, InvalidImage, "cluster_bits is 13"),
    ({"refcount_order": 7}, InvalidImage, "refcount_order is 7"),
    ({"crypt_method": 3}, InvalidImage, "crypt_method is 3"),
    ({"refcount_table_clusters": 0}, InvalidImage, "refcount_table_clusters is 0"),
    ({"refcount_table_clusters": 129}, InvalidImage, "refcount table has 8454144 bytes"),
    ({"refcount_table_clusters": 0xFFFF_FFFF}, InvalidImage, "refcount table has"),
    ({"refcount_table_offset": CLUSTER + 512}, InvalidImage, "refcount table offset 0x10200"),
    ({"refcount_table_offset": (1 << 63) - CLUSTER}, InvalidImage, "refcount table offset 0x7fffffffffff0000"),
    ({"nb_snapshots": 65537}, InvalidImage, "snapshot table has 2621480 bytes"),
    ({"nb_snapshots": 0xFFFF_FFFF}, InvalidImage, "snapshot table has"),
    ({"snapshots_offset": 512}, InvalidImage, "snapshot table offset 0x200"),
    ({"nb_snapshots": 1, "snapshots_offset": 0xFFFF_FFFF_FFFF_0000}, InvalidImage, "snapshot table offset"),
    ({"l1_size": (32 << 20) // 8 + 1}, InvalidImage, "L1 table has 33554440 bytes"),
    ({"l1_table_offset": 3 * CLUSTER + 8}, InvalidImage, "L1 table offset 0x30008"),
    ({"l1_table_offset": (1 << 63) - CLUSTER, "l1_size": 8192}, InvalidImage, "L1 table offset"),
    ({"size": 1 << 63}, InvalidImage, "size is 9223372036854775808"),
    ({"size": (1 << 64) - 1}, InvalidImage, "size is 18446744073709551615"),
    ({"size": 1 << 62}, InvalidImage, "size is 4611686018427387904"),
    ({"size": (512 << 20) + 512}, InvalidImage, "l1_size is 1, but size 536871424 needs 2 entries"),
    ({"l1_size": 0}, InvalidImage, "l1_size is 0"),
    ({"autoclear_features": 2}, InvalidImage, "autoclear_features says raw external data"),
]


@pytest.mark.parametrize(("fields", "kind", "words"), REFUSED, ids=lambda value: str(value) if value else "")
def test_an_impossible_field_is_refused_by_name_and_value(
    fields: dict[str, int], kind: type[ImageError], words: str
) -> None:
    image = poke(minimal_image(), **fields)
    assert words in refusal(image)
    with pytest.raises(kind):
        read(image)


@pytest.mark.parametrize(
    "fields",
    [
        {"refcount_table_clusters": 128},
        {"l1_size": (32 << 20) // 8, "size": 2 << 50},
        {"nb_snapshots": 65536, "snapshots_offset": 1 << 30},
        {"cluster_bits": 9, "l1_size": 32},
        {"refcount_order": 6},
        {"refcount_order": 0},
        {"compatible_features": (1 << 64) - 2},
        {"autoclear_features": (1 << 64) - 4},
        {"incompatible_features": 3},
        {"l1_size": 0, "l1_table_offset": 0, "size": 0},
    ],
    ids=str,
)
def test_a_field_at_its_limit_is_accepted(fields: dict[str, int]) -> None:
    assert read(poke(minimal_image(), **fields), 2 << 30).version == 3


@pytest.mark.parametrize("bits", [9, 12, 16, 21])
def test_every_disk_is_accepted_up_to_what_the_largest_l1_table_maps(bits: int) -> None:
    entries = (32 << 20) // 8
    largest = entries << 2 * bits - 3
    image = poke(minimal_image(minimal_header(cluster_bits=bits)), l1_size=entries, size=largest)
    assert read(image, 64 << 20).guest_size == largest
    assert "size is" in refusal(poke(image, size=largest + 512), 64 << 20)


def test_a_short_file_reads_as_if_zeros_followed() -> None:
    assert "magic is 00000000" in refusal(b"")
    assert "magic is 51464900" in refusal(minimal_image()[:3])
    assert "cluster_bits is 0" in refusal(minimal_image()[:8])


def test_a_raw_file_is_told_how_to_be_opened() -> None:
    assert "if it is raw, say -f raw" in refusal(bytes(4096))


def test_an_unknown_feature_is_named_by_the_image_itself() -> None:
    table = struct.pack(">BB46s", 0, 7, b"telepathy") + struct.pack(">BB46s", 1, 7, b"not this one")
    image = with_extensions((ExtensionType.FEATURE_NAMES, table))
    assert "'telepathy' (bit 7), bit 9," in refusal(poke(image, incompatible_features=1 << 7 | 1 << 9))


def test_a_hostile_feature_name_cannot_reach_the_terminal() -> None:
    table = struct.pack(">BB46s", 0, 7, b"\x1b[2J\n\xff")
    message = refusal(poke(with_extensions((ExtensionType.FEATURE_NAMES, table)), incompatible_features=1 << 7))
    assert "\\x1b[2J\\n\\xff" in message


def test_an_unknown_feature_is_the_news_even_if_the_extensions_are_broken() -> None:
    image = with_extensions((0x1234, b"x" * 8))
    image[116:120] = b"\xff\xff\xff\xff"
    assert "has bit 5" in refusal(poke(image, incompatible_features=1 << 5))


def test_version_2_has_no_fields_behind_byte_72() -> None:
    image = minimal_image(minimal_header(version=2, backing_name="base", backing_format="raw"))
    header = read(image)
    assert (header.version, header.header_length, header.refcount_order) == (2, 72, 4)
    assert not header.incompatible
    assert (header.backing_name, header.backing_format) == ("base", "raw")


def test_a_short_version_3_header_has_no_compression_type() -> None:
    image = minimal_image(minimal_header(header_length=104))
    image[104:112] = struct.pack(">II", 0, 0)
    assert read(image).compression_type is CompressionType.DEFLATE


# --- what QEMU does not look at (HARD list) ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"header_length": 108}, "header_length is 108, not a multiple of 8"),
        ({"padding": 1}, "header padding is not zero: 00000000000001"),
        ({"size": 1000}, "size is 1000, not a multiple of 512"),
        ({"l1_table_offset": 0}, "the header overlaps the L1 table at 0x0"),
        ({"l1_table_offset": CLUSTER}, "overlaps the refcount table at 0x10000"),
        ({"refcount_table_offset": 0}, "the header overlaps the refcount table at 0x0"),
        ({"nb_snapshots": 1, "snapshots_offset": 3 * CLUSTER}, "the L1 table overlaps the snapshot table"),
        ({"autoclear_features": 1}, "promises bitmaps, but the image has no bitmaps extension"),
    ],
    ids=str,
)
def test_what_does_not_hinder_reading_is_a_warning(fields: dict[str, int], words: str) -> None:
    warnings = read(poke(with_extensions(), **fields)).warnings
    assert len(warnings) == 1
    assert words in warnings[0]


def test_a_clean_image_has_no_warnings() -> None:
    assert read(minimal_image(BACKED)).warnings == ()


def test_the_guest_sees_whole_sectors_only() -> None:
    header = read(poke(minimal_image(), size=1000))
    assert (header.size, header.guest_size) == (1000, 512)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"l1_table_offset": 4 * CLUSTER}, "the L1 table at 0x40000 ends at 0x40008"),
        ({"l1_size": 8193}, "the L1 table at 0x30000 ends at 0x40008"),
        ({"l1_table_offset": 1 << 55}, "the L1 table at 0x80000000000000"),
        ({"refcount_table_offset": 4 * CLUSTER}, "the refcount table at 0x40000"),
        ({"refcount_table_clusters": 4}, "the refcount table at 0x10000 ends at 0x50000"),
        ({"nb_snapshots": 1, "snapshots_offset": 4 * CLUSTER}, "the snapshot table at 0x40000"),
    ],
    ids=str,
)
def test_a_table_past_the_end_of_the_file_is_refused(fields: dict[str, int], words: str) -> None:
    image = poke(minimal_image(), **fields)
    assert words in refusal(image)
    with pytest.raises(CorruptImage):
        read(image)


def test_a_disk_is_not_served_empty_because_its_l1_table_was_cut_off() -> None:
    assert "the file was cut off" in refusal(minimal_image(), 3 * CLUSTER + 7)
    assert read(minimal_image(), 3 * CLUSTER + 8).l1_size == 1  # the last cluster of a file may be partial (Q2)


def test_a_bitmap_directory_past_the_end_of_the_file_is_refused() -> None:
    header = minimal_header(autoclear=Autoclear.BITMAPS, bitmaps=BitmapsExtension(1, 32, 4 * CLUSTER))
    assert "the bitmap directory at 0x40000" in refusal(minimal_image(header))


# --- extensions and names ----------------------------------------------------------------------------------------


def bitmaps(count: int = 1, reserved: int = 0, size: int = 32, offset: int = 2 * CLUSTER) -> tuple[int, bytes]:
    return ExtensionType.BITMAPS, struct.pack(">IIQQ", count, reserved, size, offset)


def pointer(offset: int, length: int = 592) -> tuple[int, bytes]:
    return ExtensionType.ENCRYPTION_HEADER, struct.pack(">QQ", offset, length)


WITH_BITMAPS = minimal_header(autoclear=Autoclear.BITMAPS)
LUKS = minimal_header(crypt_method=CryptMethod.LUKS)
AES = minimal_header(crypt_method=CryptMethod.AES)


@pytest.mark.parametrize(
    ("records", "header", "words"),
    [
        ([(ExtensionType.BACKING_FORMAT, b"x" * 16)], BACKED, "backing format has 16 bytes"),
        ([(ExtensionType.BACKING_FORMAT, b"qc\0w2")], BACKED, "backing format is not a word: 'qc\\x00w2'"),
        ([(ExtensionType.BACKING_FORMAT, "qcöw2".encode())], BACKED, "backing format is not a word"),
        ([(ExtensionType.BACKING_FORMAT, b"raw")] * 2, BACKED, "header extension 0xe2792aca appears twice"),
        ([(ExtensionType.DATA_FILE, b"a"), (0x99, b""), (ExtensionType.DATA_FILE, b"a")], None, "0x44415441 appears"),
        ([(ExtensionType.DATA_FILE, b"da\0ta")], None, "the data file name has a control character: 'da\\x00ta'"),
        ([bitmaps(), bitmaps()], WITH_BITMAPS, "header extension 0x23852875 appears twice"),
        ([(ExtensionType.BITMAPS, bytes(23))], None, "the bitmaps extension has length 23"),
        ([bitmaps(reserved=7)], WITH_BITMAPS, "reserved field is 0x7"),
        ([bitmaps(count=0)], WITH_BITMAPS, "nb_bitmaps is 0"),
        ([bitmaps(count=65536)], WITH_BITMAPS, "nb_bitmaps is 65536"),
        ([bitmaps(offset=CLUSTER + 8)], WITH_BITMAPS, "bitmap_directory_offset 0x10008"),
        ([bitmaps(offset=(1 << 64) - CLUSTER)], WITH_BITMAPS, "bitmap_directory_offset 0xffffffffffff0000"),
        ([bitmaps(size=1024 * 65535 + 1)], WITH_BITMAPS, "bitmap_directory_size is 67107841"),
        ([pointer(CLUSTER)], None, "an encryption header extension with crypt_method 0"),
        ([pointer(CLUSTER)], AES, "an encryption header extension with crypt_method 1"),
        ([(ExtensionType.ENCRYPTION_HEADER, bytes(15))], LUKS, "encryption header extension has length 15"),
        ([pointer(CLUSTER + 512)], LUKS, "encryption header offset 0x10200"),
        ([], LUKS, "crypt_method is 2 (LUKS), but there is no encryption header extension"),
        ([(0x1000 + n, b"") for n in range(MAX_EXTENSIONS + 1)], None, "more than 1024 header extensions"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_extension_that_makes_no_sense_is_refused(
    records: list[tuple[int, bytes]], header: Header | None, words: str
) -> None:
    image = with_extensions(*records, header=header)
    if header is BACKED:
        poke(image, backing_file_offset=1024)
    assert words in refusal(image)


def test_an_extension_longer_than_its_area_is_refused() -> None:
    image = with_extensions((0x1234, b"abc"))
    image[116:120] = struct.pack(">I", CLUSTER - 120 + 1)
    assert "header extension 0x1234 has length 65417, but 65416 bytes are left" in refusal(image)
    image[116:120] = struct.pack(">I", CLUSTER - 120)
    assert [extension.type for extension in read(image).unknown_extensions] == [0x1234]


def test_even_the_end_mark_must_not_be_longer_than_its_area() -> None:
    image = with_extensions()
    image[112:120] = struct.pack(">II", 0, CLUSTER)
    assert "header extension 0x0 has length 65536" in refusal(image)


def test_extensions_end_where_the_backing_name_begins() -> None:
    image = with_extensions((0x1234, b"abcdefgh"), header=BACKED, end=False)
    poke(image, backing_file_offset=127)
    assert "has length 8, but 7 bytes are left" in refusal(image)


def test_fewer_than_eight_bytes_before_the_backing_name_are_no_extension() -> None:
    image = with_extensions((0x1234, b"abcdefgh"), header=BACKED, end=False)
    image[128:145] = b"\xff" * 7 + b"base.qcow2"
    header = read(poke(image, backing_file_offset=135, backing_file_size=10))
    assert header.backing_name == "base.qcow2"
    assert header.unknown_extensions == (UnknownExtension(0x1234, b"abcdefgh"),)


def test_nothing_behind_the_end_mark_counts() -> None:
    header = read(with_extensions((0, b""), (ExtensionType.DATA_FILE, b"x"), (0x1234, b"y")))
    assert header.data_file_name is None
    assert header.unknown_extensions == ()


def test_unknown_extensions_keep_their_order_and_bytes() -> None:
    records = [(0x434C4233, b"hash"), (0x2, b""), (0x434C4233, b"again")]
    found = read(with_extensions(*records)).unknown_extensions
    assert [(extension.type, extension.data) for extension in found] == records


def test_as_many_extensions_as_allowed_are_read() -> None:
    records = [(0x1000 + n, b"") for n in range(MAX_EXTENSIONS)]
    assert len(read(with_extensions(*records)).unknown_extensions) == MAX_EXTENSIONS


def test_bitmaps_that_the_last_writer_did_not_maintain_are_ignored_with_a_warning() -> None:
    header = read(with_extensions(bitmaps(count=0, reserved=9)))  # not even looked at
    assert header.bitmaps is None
    assert "a program without bitmap support wrote it" in header.warnings[0]


def test_bitmaps_in_version_2_are_ignored_with_a_warning() -> None:
    header = read(with_extensions(bitmaps(), header=minimal_header(version=2)))
    assert header.bitmaps is None
    assert "version 2" in header.warnings[0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (b"base\0.qcow2", "the backing file name has a control character: 'base\\x00.qcow2'"),
        (b"base\n.qcow2", "the backing file name has a control character: 'base\\n.qcow2'"),
        (b"\x1b[31m", "the backing file name has a control character"),
    ],
)
def test_a_backing_name_with_control_characters_is_refused(name: bytes, words: str) -> None:
    image = minimal_image(minimal_header(backing_name="x" * len(name), backing_format="raw"))
    at = image.index(b"x" * len(name))
    image[at : at + len(name)] = name
    assert words in refusal(image)


def test_a_backing_name_need_not_be_utf_8() -> None:
    header = minimal_header(backing_name=b"b\xffse".decode("utf-8", "surrogateescape"), backing_format="raw")
    assert read(minimal_image(header)) == header


def test_a_backing_name_is_limited_to_1023_bytes_and_the_first_cluster() -> None:
    image = minimal_image(BACKED)
    assert "backing_file_size is 1024, more than 1023" in refusal(poke(image, backing_file_size=1024))
    image = poke(image, backing_file_offset=CLUSTER - 10, backing_file_size=11)
    assert "backing_file_size is 11, more than 10" in refusal(image)
    longest = minimal_header(backing_name="x" * 1023, backing_format="raw")
    assert read(minimal_image(longest)).backing_name == "x" * 1023


def test_a_backing_name_inside_the_header_is_refused() -> None:
    assert "backing_file_offset is 8, inside the header" in refusal(poke(minimal_image(), backing_file_offset=8))


def test_an_empty_backing_name_is_none() -> None:
    assert read(poke(minimal_image(BACKED), backing_file_size=0)).backing_name is None


# --- images whose data cannot be read, but which can be described --------------------------------------------------


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (AES, "the image is encrypted (legacy AES)"),
        (
            minimal_header(crypt_method=CryptMethod.LUKS, encryption=EncryptionPointer(2 * CLUSTER, 592)),
            "the image is encrypted (LUKS)",
        ),
        (minimal_header(incompatible=Incompatible.DATA_FILE), "has an external data file, but does not name it"),
    ],
    ids=["aes", "luks", "data file"],
)
def test_an_image_that_cannot_be_read_is_refused_by_name_but_can_be_described(header: Header, words: str) -> None:
    assert words in refusal(minimal_image(header))
    described = read(minimal_image(header), describe=True)
    assert described.crypt_method is header.crypt_method


# --- building ------------------------------------------------------------------------------------------------------

HEADERS = {
    "v3": minimal_header(),
    "v3 without compression type": minimal_header(header_length=104),
    "v3 of the future": minimal_header(header_length=128, unknown_fields=b"tomorrow's field"),
    "v2": minimal_header(version=2),
    "v2 with backing": minimal_header(version=2, backing_name="../base.raw", backing_format="raw"),
    "small clusters": minimal_header(cluster_bits=9, size=32 << 10, backing_name="b" * 300, backing_format="qcow2"),
    "large clusters": minimal_header(cluster_bits=21),
    "zstd, extended L2, lazy refcounts": minimal_header(
        incompatible=Incompatible.COMPRESSION_TYPE | Incompatible.EXTENDED_L2,
        compatible=Compatible.LAZY_REFCOUNTS,
        compression_type=CompressionType.ZSTD,
        refcount_order=6,
    ),
    "data file": minimal_header(
        incompatible=Incompatible.DATA_FILE, autoclear=Autoclear.DATA_FILE_RAW, data_file_name="guest.data"
    ),
    "everything else": minimal_header(
        backing_name="/a/ü.qcow2",
        backing_format="qcow2",
        autoclear=Autoclear.BITMAPS | Autoclear(1 << 40),
        compatible=Compatible(1 << 63),
        bitmaps=BitmapsExtension(3, 96, 2 * CLUSTER),
        unknown_extensions=(UnknownExtension(0x1234, b"abc"), UnknownExtension(5, b"")),
    ),
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_a_header_that_was_built_reads_back_equal(header: Header) -> None:
    assert read(minimal_image(header)) == header


def test_a_backing_name_that_does_not_fit_the_first_cluster_is_refused() -> None:
    header = minimal_header(cluster_bits=9, size=32 << 10, backing_name="b" * 500, backing_format="qcow2")
    with pytest.raises(OSError, match="do not fit into the first cluster") as caught:
        build_header(header)
    assert caught.value.errno == errno.ENOSPC


# --- cost and robustness -------------------------------------------------------------------------------------------


class CountingStorage(FileStorage):
    """Counts what is read."""

    def __init__(self, descriptor: int, path: str) -> None:
        super().__init__(descriptor, path)
        self.reads: list[int] = []

    def read(self, offset: int, length: int) -> bytes:
        self.reads.append(length)
        return super().read(offset, length)


@pytest.mark.parametrize(("header", "limit"), [(BACKED, 2048), (minimal_header(cluster_bits=21), 2 << 20)])
def test_opening_reads_little_and_rarely(header: Header, limit: int) -> None:
    plain = stored(minimal_image(header))
    storage = CountingStorage(plain.descriptor, plain.path)
    read_header(storage)
    assert len(storage.reads) <= 2
    assert sum(storage.reads) <= limit
    storage.close()


_ANY_WORD = st.one_of(
    st.integers(0, 2**64 - 1), st.integers(0, 300), st.integers(0, 63).map(lambda bit: 1 << bit), st.just(2**64 - 1)
)


@settings(max_examples=400, deadline=None)
@given(
    base=st.sampled_from(list(HEADERS.values())),
    words=st.dictionaries(st.integers(0, 70), _ANY_WORD, max_size=4),
    length=st.one_of(st.none(), st.integers(0, 4 * CLUSTER)),
)
def test_no_bytes_in_cluster_0_break_the_reader(base: Header, words: dict[int, int], length: int | None) -> None:
    """Whatever the image says, it is described or refused with an error of ours; hypothesis prints a failing case."""
    image = minimal_image(base)
    for position, word in words.items():
        struct.pack_into(">Q", image, 8 + 4 * position, word)
    for describe in (False, True):
        try:
            header = read(image, length, describe=describe)
        except ImageError as error:
            message = str(error)
        else:
            message = ""
            assert 0 <= header.guest_size < 1 << 63
            assert header.l1_size <= 4 << 20
        assert message.isprintable()


def test_changing_fields_leaves_extensions_and_name_where_another_program_put_them() -> None:
    """R-55: a header without feature name table, as other writers lay it out, must not lose its backing file."""
    name = b"base.qcow2"
    laid_out = bytearray(build_header(minimal_header(size=1 << 20)).ljust(512, b"\0"))
    laid_out[112:136] = bytes.fromhex("e2792aca00000005") + b"qcow2\0\0\0" + bytes(8)
    laid_out[136 : 136 + len(name)] = name
    laid_out[8:20] = (136).to_bytes(8, "big") + len(name).to_bytes(4, "big")
    changed = update_fields(bytes(laid_out), minimal_header(size=2 << 20))
    assert len(changed) == 512
    assert changed[24:32] == (2 << 20).to_bytes(8, "big")
    assert changed[:24] + changed[32:] == laid_out[:24] + laid_out[32:]

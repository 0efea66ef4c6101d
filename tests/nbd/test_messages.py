"""Payloads of option haggling, against bytes written by hand."""

import pytest

from nbdq.nbd import messages
from nbdq.nbd.constants import InfoType, OptionReply, TransmissionFlag
from nbdq.nbd.messages import OptionRefused
from tests.nbd.wire import text, u16, u32

INVALID = OptionReply.ERR_INVALID
TOO_BIG = OptionReply.ERR_TOO_BIG


@pytest.mark.parametrize(
    ("data", "export", "types"),
    [
        (b"\0\0\0\0\0\0", "", set()),
        (b"\0\0\0\1a\0\0", "a", set()),
        (b"\0\0\0\2\xc3\xbc\0\2\0\3\xff\xff", "ü", {3, 0xFFFF}),
        (b"\0\0\0\0\0\3\0\1\0\1\0\1", "", {1}),
        (text("n" * 4096) + b"\0\0", "n" * 4096, set()),
    ],
)
def test_a_client_may_ask_about_any_name_and_any_types(data: bytes, export: str, types: set[int]) -> None:
    """P33."""
    assert messages.parse_info_request(data) == (export, types)


@pytest.mark.parametrize(
    ("data", "export", "queries"),
    [
        (b"\0\0\0\0\0\0\0\0", "", ()),
        (b"\0\0\0\1a\0\0\0\1\0\0\0\2b:", "a", ("b:",)),
        (text("") + u32(64) + text("x:") * 64, "", ("x:",) * 64),
        (text("") + u32(2) + text("a:") + text("q" * 4096), "", ("a:", "q" * 4096)),
    ],
)
def test_a_client_may_query_metadata_contexts(data: bytes, export: str, queries: tuple[str, ...]) -> None:
    """P41, P46."""
    assert messages.parse_meta_context_request(data) == (export, queries)


@pytest.mark.parametrize(
    ("data", "reply"),
    [
        (b"", INVALID),
        (b"\0\0\0", INVALID),
        (b"\0\0\0\0", INVALID),
        (b"\0\0\0\0\0", INVALID),
        (b"\0\0\0\1", INVALID),
        (b"\0\0\0\1\0\0", INVALID),
        (u32(2**31) + b"a\0\0", INVALID),
        (u32(2**32 - 1) + b"a\0\0", INVALID),
        (b"\0\0\0\0\0\1", INVALID),
        (b"\0\0\0\0\0\1\0", INVALID),
        (b"\0\0\0\0\xff\xff" + b"\0" * 100, INVALID),
        (b"\0\0\0\0\0\0\0", INVALID),
        (b"\0\0\0\0\0\1\0\0\0", INVALID),
        (text("n" * 4095) + b"\0", INVALID),
        (text("n" * 4097) + b"\0\0", TOO_BIG),
        (text(b"a\0b") + b"\0\0", INVALID),
        (text(b"\xff") + b"\0\0", INVALID),
        (text(b"\xed\xa0\x80") + b"\0\0", INVALID),
    ],
)
def test_lengths_that_disagree_and_names_that_are_none_are_refused(data: bytes, reply: OptionReply) -> None:
    """P2, P27, P31, R-04: for INFO and GO."""
    with pytest.raises(OptionRefused) as refused:
        messages.parse_info_request(data)
    assert refused.value.reply == reply
    assert refused.value.text


@pytest.mark.parametrize(
    ("data", "reply"),
    [
        (b"", INVALID),
        (b"\0\0\0\0", INVALID),
        (b"\0\0\0\0\0\0\0", INVALID),
        (b"\0\0\0\0\0\0\0\1", INVALID),
        (b"\0\0\0\0\0\0\0\1\0\0\0\1", INVALID),
        (b"\0\0\0\0\0\0\0\0\0", INVALID),
        (b"\0\0\0\0\0\0\0\1\0\0\0\1a\0", INVALID),
        (b"\0\0\0\0\0\0\0\1" + u32(2**32 - 1), INVALID),
        (b"\0\0\0\0\0\0\0\1\0\0\0\1\xff", INVALID),
        (b"\0\0\0\0\0\0\0\1\0\0\0\1\0", INVALID),
        (b"\0\0\0\0\0\0\0\1" + text("q" * 4097), TOO_BIG),
        (b"\0\0\0\0" + u32(65) + text("x:") * 65, TOO_BIG),
        (b"\0\0\0\0" + u32(2**31), TOO_BIG),
        (b"\0\0\0\0" + u32(2**32 - 1), TOO_BIG),
        (text("n" * 4097) + u32(0), TOO_BIG),
    ],
)
def test_queries_that_do_not_fit_their_option_or_are_too_many_are_refused(data: bytes, reply: OptionReply) -> None:
    """P2, P27, P46, R-04: for LIST_META_CONTEXT and SET_META_CONTEXT."""
    with pytest.raises(OptionRefused) as refused:
        messages.parse_meta_context_request(data)
    assert refused.value.reply == reply
    assert refused.value.text


def test_replies_are_the_bytes_of_the_specification() -> None:
    """P21, P29, P30, P32, P35, P44."""
    magic = b"\x00\x03\xe8\x89\x04\x55\x65\xa9"
    flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.CAN_MULTI_CONN
    assert messages.ack(0xFFFFFFFE) == magic + b"\xff\xff\xff\xfe\0\0\0\1\0\0\0\0"
    assert messages.server("ü", "why") == magic + b"\0\0\0\3\0\0\0\2\0\0\0\x09\0\0\0\2\xc3\xbcwhy"
    assert messages.info_export(7, size=0x0102030405060708, flags=flags) == (
        magic + b"\0\0\0\7\0\0\0\3\0\0\0\x0c\0\0\1\2\3\4\5\6\7\x08\1\1"
    )
    assert messages.info_text(6, InfoType.NAME, "n") == magic + b"\0\0\0\6\0\0\0\3\0\0\0\3\0\1n"
    assert messages.info_text(6, InfoType.DESCRIPTION, "ü") == magic + b"\0\0\0\6\0\0\0\3\0\0\0\4\0\2\xc3\xbc"
    assert messages.info_block_size(7, minimum=1, preferred=0x1000, maximum=0x2000000) == (
        magic + b"\0\0\0\7\0\0\0\3\0\0\0\x0e\0\3\0\0\0\1\0\0\x10\0\2\0\0\0"
    )
    assert messages.meta_context(10, 5, "a:b") == magic + b"\0\0\0\x0a\0\0\0\4\0\0\0\7\0\0\0\5a:b"
    assert messages.error(99, OptionRefused(INVALID, "no")) == magic + b"\0\0\0\x63\x80\0\0\3\0\0\0\2no"
    assert messages.export_name(size=1, flags=flags, padded=False) == b"\0\0\0\0\0\0\0\1\1\1"
    assert messages.export_name(size=1, flags=flags, padded=True) == b"\0\0\0\0\0\0\0\1\1\1" + bytes(124)


@pytest.mark.parametrize("character", ["a", "é", "€", "💾"])
@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 5, 999, 1000, 4096])
def test_a_text_is_cut_between_characters(character: str, limit: int) -> None:
    """P28, R-06."""
    cut = messages.bounded_text(character * 5000, limit)
    width = len(character.encode())
    assert cut.decode() == character * (limit // width)


def test_a_short_text_is_not_cut_and_an_unspeakable_one_is_escaped() -> None:
    assert messages.bounded_text("é" * 2048) == ("é" * 2048).encode()
    assert messages.bounded_text("\udcff") == b"\\udcff"


def test_an_error_reply_is_short_enough_for_nbd_client() -> None:
    """N2: below 1 KiB with its header, whatever the text."""
    assert len(messages.error(7, OptionRefused(INVALID, "💾" * 5000))) < 1024


def test_the_longest_list_of_types_is_read() -> None:
    count = 30000
    data = text("") + u16(count) + b"\0\3" * count
    assert messages.parse_info_request(data).types == {3}

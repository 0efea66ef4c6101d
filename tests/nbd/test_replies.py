"""The bytes of replies, in the three formats of the protocol, by hand from the specification."""

import errno as system_errno
from collections.abc import Callable

import pytest

from nbdq.nbd.constants import Errno, TransmissionFlag
from nbdq.nbd.exports import ExportInfo, Negotiated
from nbdq.nbd.replies import ExtendedReplies, SimpleReplies, StructuredReplies, replies_for, wire_errno

COOKIE = 0x1112131415161718
COOKIE_BYTES = b"\x11\x12\x13\x14\x15\x16\x17\x18"
OFFSET = 0x0A0B0C0D0E0F
OFFSET_BYTES = b"\0\0\x0a\x0b\x0c\x0d\x0e\x0f"
MAGIC = b"\x66\x8e\x33\xef"
EXTENDED_MAGIC = b"\x6e\x8a\x27\x8c"

SIMPLE, STRUCTURED, EXTENDED = SimpleReplies(), StructuredReplies(), ExtendedReplies()


def compact(kind: bytes, length: int, *, done: bool = True) -> bytes:
    """A chunk header (P110)."""
    return MAGIC + (b"\0\1" if done else b"\0\0") + kind + COOKIE_BYTES + length.to_bytes(4, "big")


def extended(kind: bytes, length: int, *, done: bool = True) -> bytes:
    return (
        EXTENDED_MAGIC + (b"\0\1" if done else b"\0\0") + kind + COOKIE_BYTES + OFFSET_BYTES + length.to_bytes(8, "big")
    )


def test_simple_replies_are_the_bytes_of_the_specification() -> None:
    """P100, K1."""
    assert SIMPLE.success(COOKIE, OFFSET) == b"\x67\x44\x66\x98\0\0\0\0" + COOKIE_BYTES
    assert SIMPLE.error(COOKIE, OFFSET, Errno.ESHUTDOWN, "why") == b"\x67\x44\x66\x98\0\0\0\x6c" + COOKIE_BYTES


@pytest.mark.parametrize(("replies", "header"), [(STRUCTURED, compact), (EXTENDED, extended)])
def test_chunks_are_the_bytes_of_the_specification(replies: StructuredReplies, header: Callable[..., bytes]) -> None:
    """P110, P111, P86: a READ of no bytes ends in NONE, for an empty data chunk is an error to QEMU's client."""
    assert replies.success(COOKIE, OFFSET) == header(b"\0\0", 0)
    assert replies.data_header(COOKIE, OFFSET, at=512, length=4096) == (
        header(b"\0\1", 4104, done=False) + b"\0\0\0\0\0\0\2\0"
    )
    assert replies.error(COOKIE, OFFSET, Errno.EIO, "n\u00e9") == header(b"\x80\1", 9) + b"\0\0\0\5\0\3n\xc3\xa9"
    assert replies.error(COOKIE, OFFSET, Errno.EIO, "", at=512, done=False) == (
        header(b"\x80\2", 14, done=False) + b"\0\0\0\5\0\0\0\0\0\0\0\0\2\0"
    )


def test_block_status_has_narrow_pairs_or_counted_wide_ones() -> None:
    """P111, P122."""
    assert STRUCTURED.status_number == ">u4"
    assert EXTENDED.status_number == ">u8"
    assert STRUCTURED.status(COOKIE, OFFSET, b"12345678" * 2, context_id=3, done=False) == (
        compact(b"\0\5", 20, done=False) + b"\0\0\0\3" + b"12345678" * 2
    )
    assert EXTENDED.status(COOKIE, OFFSET, b"12345678" * 4, context_id=3, done=True) == (
        extended(b"\0\6", 40) + b"\0\0\0\3\0\0\0\2" + b"12345678" * 4
    )


@pytest.mark.parametrize(
    ("replies", "header"),
    [
        (SIMPLE, b"\x67\x44\x66\x98\0\0\0\0" + COOKIE_BYTES),
        (STRUCTURED, compact(b"\0\1", 4104) + OFFSET_BYTES),
        (EXTENDED, extended(b"\0\1", 4104) + OFFSET_BYTES),
    ],
)
def test_what_the_hot_path_writes_into_its_buffer_is_the_whole_reply(
    replies: SimpleReplies | StructuredReplies, header: bytes
) -> None:
    """P100, P111, P114: between what else is there."""
    assert len(header) == replies.header_size
    buffer = bytearray(b"." * (len(header) + 4))
    replies.pack_header(buffer, 2, COOKIE, OFFSET, 4096)
    assert buffer == b".." + header + b".."
    success = replies.success(COOKIE, OFFSET)
    assert len(success) == replies.success_size
    buffer = bytearray(b"." * (len(success) + 4))
    replies.pack_success(buffer, 2, COOKIE, OFFSET, 4096)
    assert buffer == b".." + success + b".."


@pytest.mark.parametrize("text", ["x" * 10000, "\u00e9" * 3000, "\U0001f4be" * 5000])
def test_the_text_of_an_error_is_cut_to_what_the_protocol_permits(text: str) -> None:
    """P121, R-06."""
    chunk = STRUCTURED.error(COOKIE, OFFSET, Errno.EIO, text)
    length = int.from_bytes(chunk[16:20], "big")
    message = int.from_bytes(chunk[24:26], "big")
    assert len(chunk) == 20 + length
    assert length == 6 + message
    assert 4000 < message <= 4096
    assert text.startswith(chunk[26:].decode())


def test_a_client_gets_the_replies_that_were_agreed_on() -> None:
    """P102, P122."""
    export = ExportInfo("disk", 512, TransmissionFlag(0))
    assert type(replies_for(Negotiated(export, False, ()))) is SimpleReplies
    assert type(replies_for(Negotiated(export, True, ()))) is StructuredReplies
    assert type(replies_for(Negotiated(export, True, (), extended=True))) is ExtendedReplies


# Errors of the operating system.


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        ("EPERM", 1),
        ("EACCES", 1),
        ("EROFS", 1),
        ("EINVAL", 22),
        ("EOPNOTSUPP", 22),
        ("ENOSPC", 28),
        ("EDQUOT", 28),
        ("EFBIG", 28),
        ("ESHUTDOWN", 108),
        ("EIO", 5),
        ("ENOMEM", 5),
        ("EOVERFLOW", 5),
        ("ENOENT", 5),
        ("ESTALE", 5),
        ("EAGAIN", 5),
    ],
)
def test_an_error_of_the_system_has_one_number_on_the_wire(number: str, expected: int) -> None:
    """P98."""
    error = OSError(getattr(system_errno, number), "why")
    assert wire_errno(error) == expected
    assert wire_errno(error, fast_zero=True) == (95 if number == "EOPNOTSUPP" else expected)


def test_an_error_without_a_number_is_an_input_output_error() -> None:
    assert wire_errno(OSError("why")) == 5

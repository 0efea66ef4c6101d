"""The payloads of option haggling: declarations of what clients send, and builders of what they are answered.

Knows bytes only: not the order in which options may come (that is ``handshake``), nor sockets. Everything a client
sends is bounded here before it is used (P27, R-04), and construct's errors end here, as :class:`OptionRefused`.
"""

import struct
from typing import Any, NamedTuple

from construct import (
    Array,
    Bytes,
    Const,
    ConstructError,
    ExprAdapter,
    GreedyBytes,
    If,
    Int16ub,
    Int32ub,
    Int64ub,
    Padding,
    Prefixed,
    Struct,
    Terminated,
    this,
)

from nbdq.nbd.constants import MAXIMUM_STRING, OPTION_REPLY_MAGIC, InfoType, Option, OptionReply, TransmissionFlag

#: Queries in one META_CONTEXT option (P46; reliability 3.2).
MAXIMUM_QUERIES = 64

#: Bytes of text in an option's error reply. Far below what the protocol permits, because nbd-client reads that text
#: into a small buffer and loses its place in the stream when it does not fit (N2).
MAXIMUM_ERROR_TEXT = 1000


class OptionRefused(Exception):
    """An option to be answered with the error ``reply`` and ``text``; the handshake goes on, unless the protocol has no
    such answer. A directory of exports raises it, too; it never comes out of the handshake."""

    def __init__(self, reply: OptionReply, text: str) -> None:
        super().__init__(text)
        self.reply = reply
        self.text = text


class InfoRequest(NamedTuple):
    """What INFO and GO ask."""

    export: str
    types: frozenset[int]
    """Information asked for; unknown types and duplicates are harmless (P33)."""


class MetaContextRequest(NamedTuple):
    """What LIST_META_CONTEXT and SET_META_CONTEXT ask."""

    export: str
    queries: tuple[str, ...]


def bounded_text(text: str, limit: int = MAXIMUM_STRING) -> bytes:
    """``text`` as UTF-8 in at most ``limit`` bytes, cut between two characters (P28, R-06)."""
    return text[:limit].encode("utf-8", "backslashreplace")[:limit].decode("utf-8", "ignore").encode()


def decode_text(raw: bytes) -> str:
    """A string of the wire: UTF-8 without NUL, at most 4096 bytes (P2, P31).

    Raises:
        OptionRefused: TOO_BIG for a longer one, INVALID for bytes that are no such string.
    """
    if len(raw) > MAXIMUM_STRING:
        raise OptionRefused(OptionReply.ERR_TOO_BIG, f"a string of {len(raw)} bytes; the limit is {MAXIMUM_STRING}")
    if b"\0" in raw:
        raise OptionRefused(OptionReply.ERR_INVALID, "a string contains a NUL byte")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise OptionRefused(OptionReply.ERR_INVALID, "a string is not valid UTF-8") from None


def _query_count(context: Any) -> int:
    count: int = context.count
    if count > MAXIMUM_QUERIES:
        raise OptionRefused(OptionReply.ERR_TOO_BIG, f"{count} queries in one option; the limit is {MAXIMUM_QUERIES}")
    return count


# Text that fills what is left, and text behind its length. A length that reaches past the option's data ends in a
# ConstructError before anything of that size is allocated (P25).
_REST = ExprAdapter(GreedyBytes, lambda raw, _: decode_text(raw), lambda text, _: text.encode())
_TEXT = Prefixed(Int32ub, _REST)

# What clients send. ``types`` stays one string of bytes, as construct would take 0.1 s for the most that fit.
_INFO_REQUEST = Struct("export" / _TEXT, "count" / Int16ub, "types" / Bytes(this.count * 2), Terminated)
_META_CONTEXT_REQUEST = Struct("export" / _TEXT, "count" / Int32ub, "queries" / Array(_query_count, _TEXT), Terminated)

# What we answer (P30, P35, P44). The two pieces that LIST repeats for every export are struct's: 1 µs instead of 26.
_OPTION_REPLY = struct.Struct(">QIII")
_LENGTH = struct.Struct(">I")
_INFO_EXPORT = Struct("type" / Const(InfoType.EXPORT, Int16ub), "size" / Int64ub, "flags" / Int16ub)
_INFO_TEXT = Struct("type" / Int16ub, "text" / _REST)
_INFO_BLOCK_SIZE = Struct(
    "type" / Const(InfoType.BLOCK_SIZE, Int16ub), "minimum" / Int32ub, "preferred" / Int32ub, "maximum" / Int32ub
)
_META_CONTEXT = Struct("id" / Int32ub, "name" / _REST)
_EXPORT_NAME = Struct("size" / Int64ub, "flags" / Int16ub, "zeroes" / If(this.padded, Padding(124)))


def _parse(declaration: Any, data: bytes) -> Any:
    """``data`` taken apart; every inner length has to agree with the outer one exactly (P27)."""
    try:
        return declaration.parse(data)
    except ConstructError:
        text = "the lengths inside the option do not add up to its length"
        raise OptionRefused(OptionReply.ERR_INVALID, text) from None


def parse_info_request(data: bytes) -> InfoRequest:
    """The payload of INFO or GO (P33).

    Raises:
        OptionRefused: INVALID where lengths disagree, or as :func:`decode_text`.
    """
    request = _parse(_INFO_REQUEST, data)
    return InfoRequest(request.export, frozenset(struct.unpack(f">{request.count}H", request.types)))


def parse_meta_context_request(data: bytes) -> MetaContextRequest:
    """The payload of LIST_META_CONTEXT or SET_META_CONTEXT (P41, P42).

    Raises:
        OptionRefused: INVALID where lengths disagree, TOO_BIG for too many queries (P46), or as :func:`decode_text`.
    """
    request = _parse(_META_CONTEXT_REQUEST, data)
    return MetaContextRequest(request.export, tuple(request.queries))


def _reply(option: int, reply: OptionReply, data: bytes = b"") -> bytes:
    return _OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data  # P21


def ack(option: int) -> bytes:
    """The final reply to an option that succeeded; always empty, as QEMU insists (P29)."""
    return _reply(option, OptionReply.ACK)


def error(option: int, refused: OptionRefused) -> bytes:
    """The final reply to an option that failed, with a text for humans (P28)."""
    return _reply(option, refused.reply, bounded_text(refused.text, MAXIMUM_ERROR_TEXT))


def server(name: str, description: str) -> bytes:
    """One export of LIST (P32)."""
    encoded = name.encode()
    return _reply(Option.LIST, OptionReply.SERVER, _LENGTH.pack(len(encoded)) + encoded + description.encode())


def info_export(option: int, *, size: int, flags: TransmissionFlag) -> bytes:
    """The INFO that every successful INFO and GO contains (P34, P35)."""
    return _reply(option, OptionReply.INFO, _INFO_EXPORT.build({"size": size, "flags": flags}))


def info_text(option: int, kind: InfoType, text: str) -> bytes:
    """The NAME or DESCRIPTION of an export (P35)."""
    return _reply(option, OptionReply.INFO, _INFO_TEXT.build({"type": kind, "text": text}))


def info_block_size(option: int, *, minimum: int, preferred: int, maximum: int) -> bytes:
    """The block size constraints of an export, in bytes (P35, P126)."""
    sizes = {"minimum": minimum, "preferred": preferred, "maximum": maximum}
    return _reply(option, OptionReply.INFO, _INFO_BLOCK_SIZE.build(sizes))


def meta_context(option: int, context_id: int, name: str) -> bytes:
    """One metadata context (P44)."""
    return _reply(option, OptionReply.META_CONTEXT, _META_CONTEXT.build({"id": context_id, "name": name}))


def export_name(*, size: int, flags: TransmissionFlag, padded: bool) -> bytes:
    """The answer to EXPORT_NAME, which is no option reply; ``padded`` unless both sides set NO_ZEROES (P30)."""
    built: bytes = _EXPORT_NAME.build({"size": size, "flags": flags, "padded": padded, "zeroes": None})
    return built

"""The handshake as a client sees it: options to be sent, and what servers answer, taken apart without trusting it.

Pure functions of bytes, written from the specification and not from ``nbdq.nbd``, with which they share numbers only:
a client that is to find fault with a server must not repeat its mistakes. Everything a server sends is bounded before
it is used (R-21); what breaks the protocol is a :class:`~nbdq.errors.ProtocolError` that names the rule.
"""

import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

from nbdq.errors import ExportError, ProtocolError, printable
from nbdq.nbd.constants import (
    IHAVEOPT,
    MAXIMUM_STRING,
    NBDMAGIC,
    OPTION_REPLY_MAGIC,
    InfoType,
    Option,
    OptionReply,
    TransmissionFlag,
)

#: Bytes of one option reply that we take, twice what two strings of the longest kind need; replies to one option; and
#: bytes of all these, or a server could fill a GiB with them.
MAXIMUM_OPTION_REPLY: Final = 16 << 10
MAXIMUM_OPTION_REPLIES: Final = 100_000
MAXIMUM_ANSWER: Final = 32 << 20

HELLO: Final = struct.Struct(">QQH")
OPTION: Final = struct.Struct(">QII")
OPTION_REPLY: Final = struct.Struct(">QIII")
_LENGTH: Final = struct.Struct(">I")
_ERROR_BIT: Final = 1 << 31

#: Bytes after an accepted EXPORT_NAME: size, transmission flags, and what nobody needs (P30).
EXPORT_NAME_REPLY: Final = struct.Struct(">QH")
EXPORT_NAME_ZEROES: Final = 124


class OptionFailed(ExportError):
    """The server refused an option; the connection is as usable as before."""

    def __init__(self, option: int, reply: int, text: str) -> None:
        super().__init__(f"{option_name(option)}: {reply_name(reply)}" + (f" ({text})" if text else ""))
        self.option = option
        self.reply = reply
        self.text = text


class Reply(NamedTuple):
    """One option reply."""

    type: int
    data: bytes

    @property
    def is_error(self) -> bool:
        return bool(self.type & _ERROR_BIT)

    @property
    def is_final(self) -> bool:
        return self.type == OptionReply.ACK or self.is_error


class Listed(NamedTuple):
    """One export of LIST."""

    name: str
    description: str


class BlockSizes(NamedTuple):
    """In bytes; the maximum bounds payloads only (P126, P128)."""

    minimum: int
    preferred: int
    maximum: int


@dataclass(frozen=True)
class ExportDetails:
    """What INFO, GO or EXPORT_NAME tell of an export."""

    size: int
    flags: TransmissionFlag
    name: str | None = None
    description: str | None = None
    block_sizes: BlockSizes | None = None


def option_name(option: int) -> str:
    """An option as people call it."""
    return Option(option).name if option in set(Option) else f"option {option:#x}"


def reply_name(reply: int) -> str:
    """The type of an option reply as people call it."""
    return OptionReply(reply).name if reply in set(OptionReply) else f"reply {reply:#x}"


def pack_option(option: int, data: bytes = b"") -> bytes:
    """One option (P20)."""
    return OPTION.pack(IHAVEOPT, option, len(data)) + data


def pack_text(text: str | bytes) -> bytes:
    """A string behind its length; ``bytes`` go out as they are, for those who mean to break the rules."""
    raw = text.encode() if isinstance(text, str) else text
    return _LENGTH.pack(len(raw)) + raw


def pack_info_request(name: str | bytes, types: tuple[int, ...] = ()) -> bytes:
    """The data of INFO and GO (P33)."""
    return pack_text(name) + struct.pack(f">H{len(types)}H", len(types), *types)


def pack_context_request(name: str | bytes, queries: tuple[str | bytes, ...]) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT (P41)."""
    return pack_text(name) + _LENGTH.pack(len(queries)) + b"".join(map(pack_text, queries))


def parse_hello(data: bytes) -> int:
    """The handshake flags of a hello (P10).

    Raises:
        ProtocolError: it is none of fixed or plain newstyle.
    """
    magic, style, flags = HELLO.unpack(data)
    if magic != NBDMAGIC:
        raise ProtocolError(f"the server's first bytes are {data[:8]!r}: it does not speak NBD")
    if style != IHAVEOPT:
        raise ProtocolError("the server speaks the old style of NBD, or none (P14)")
    return int(flags)


def parse_reply_header(option: int, header: bytes) -> tuple[int, int]:
    """The type of a reply to ``option`` and the length of its data, which is bounded (P21).

    Raises:
        ProtocolError: it is no reply, or none to that option, or of a type that nobody knows.
    """
    magic, answered, kind, length = OPTION_REPLY.unpack(header)
    if magic != OPTION_REPLY_MAGIC:
        raise ProtocolError(f"a reply to {option_name(option)} begins with {magic:#018x} (P21)")
    if answered != option:
        raise ProtocolError(f"a reply to {option_name(answered)} where one to {option_name(option)} was due (P21, P22)")
    if not kind & _ERROR_BIT and kind not in set(OptionReply):
        raise ProtocolError(f"a reply to {option_name(option)} of the unknown type {kind:#x} (P23)")
    if length > MAXIMUM_OPTION_REPLY:
        raise ProtocolError(f"a reply to {option_name(option)} of {length} bytes (P2)")
    if kind == OptionReply.ACK and length:
        raise ProtocolError(f"an ACK of {option_name(option)} with {length} bytes of data (P29)")
    return kind, length


def parse_text(raw: bytes, what: str) -> str:
    """A string of the wire.

    Raises:
        ProtocolError: it breaks a rule for strings (P2).
    """
    if len(raw) > MAXIMUM_STRING:
        raise ProtocolError(f"{what} has {len(raw)} bytes; strings have at most {MAXIMUM_STRING} (P2)")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise ProtocolError(f"{what} is not UTF-8: {printable(raw)!r} (P2)") from None
    if "\0" in text:
        raise ProtocolError(f"{what} contains a NUL (P2)")
    return text


def parse_failure(option: int, reply: Reply) -> OptionFailed:
    """The error that an error reply means (P28)."""
    return OptionFailed(option, reply.type, printable(parse_text(reply.data, "the text of an error")))


def parse_server(data: bytes) -> Listed:
    """One SERVER reply to LIST (P32)."""
    if len(data) < 4 or (length := _LENGTH.unpack_from(data)[0]) > len(data) - 4:
        raise ProtocolError("a SERVER reply whose name is longer than itself (P27, P32)")
    return Listed(
        parse_text(data[4 : 4 + length], "the name of an export"), parse_text(data[4 + length :], "a description")
    )


def parse_meta_context(data: bytes) -> tuple[int, str]:
    """Id and name of one META_CONTEXT reply (P44)."""
    if len(data) < 4:
        raise ProtocolError("a META_CONTEXT reply without an id (P44)")
    name = parse_text(data[4:], "the name of a metadata context")
    if name.find(":") < 1:
        raise ProtocolError(f"the metadata context {printable(name)!r} has no namespace (P45)")
    return _LENGTH.unpack_from(data)[0], name


def parse_details(replies: list[Reply]) -> ExportDetails:
    """What the INFO replies before an ACK say together (P34, P35).

    Raises:
        ProtocolError: one is malformed, EXPORT is missing, or a reply is none of INFO.
    """
    found: dict[int, bytes] = {}
    for reply in replies:
        if reply.type != OptionReply.INFO or len(reply.data) < 2:
            raise ProtocolError(f"a {reply_name(reply.type)} of {len(reply.data)} bytes among the INFO replies (P23)")
        (kind,) = struct.unpack_from(">H", reply.data)
        if (length := {InfoType.EXPORT: 12, InfoType.BLOCK_SIZE: 14}.get(kind)) and len(reply.data) != length:
            raise ProtocolError(f"an INFO of type {InfoType(kind).name} with {len(reply.data)} bytes (P35)")
        found[kind] = reply.data[2:]
    if InfoType.EXPORT not in found:
        raise ProtocolError("no INFO_EXPORT before the ACK (P34)")
    size, flags = EXPORT_NAME_REPLY.unpack(found[InfoType.EXPORT])
    sizes = found.get(InfoType.BLOCK_SIZE)
    name, description = found.get(InfoType.NAME), found.get(InfoType.DESCRIPTION)
    return ExportDetails(
        check_size(size),
        TransmissionFlag(flags),
        None if name is None else parse_text(name, "the name of the export"),
        None if description is None else parse_text(description, "the description of the export"),
        None if sizes is None else BlockSizes(*struct.unpack(">III", sizes)),
    )


def check_size(size: int) -> int:
    """``size`` of an export, below 2^63 (R-21)."""
    if size >> 63:
        raise ProtocolError(f"the export has {size} bytes; a signed offset does not reach so far")
    return size

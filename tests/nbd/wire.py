"""The client's side of the wire for the tests of ``nbdq.nbd``: bytes by hand, on purpose not made by ``nbdq``."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from nbdq.errors import ProtocolError
from nbdq.nbd.constants import TransmissionFlag
from nbdq.nbd.exports import ExportInfo, Negotiated
from nbdq.nbd.handshake import Handshake

FIXED = b"\x00\x00\x00\x01"
NO_ZEROES = b"\x00\x00\x00\x03"

EXPORT_NAME, ABORT, LIST, PEEK_EXPORT, STARTTLS, INFO, GO = 1, 2, 3, 4, 5, 6, 7
STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT, EXTENDED_HEADERS = 8, 9, 10, 11

ACK, SERVER, INFO_REPLY, META_CONTEXT = 1, 2, 3, 4
UNSUP, POLICY, INVALID = 0x80000001, 0x80000002, 0x80000003
UNKNOWN, SHUTDOWN, TOO_BIG = 0x80000006, 0x80000007, 0x80000009
EXT_HEADER_REQD = 0x8000000A


def u16(number: int) -> bytes:
    return number.to_bytes(2, "big")


def u32(number: int) -> bytes:
    return number.to_bytes(4, "big")


def u64(number: int) -> bytes:
    return number.to_bytes(8, "big")


def text(string: str | bytes) -> bytes:
    raw = string.encode() if isinstance(string, str) else string
    return u32(len(raw)) + raw


def option(code: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + u32(code) + u32(len(data)) + data


def info(code: int, name: str | bytes, *types: int) -> bytes:
    return option(code, text(name) + u16(len(types)) + b"".join(map(u16, types)))


def meta(code: int, name: str, *queries: str) -> bytes:
    return option(code, text(name) + u32(len(queries)) + b"".join(map(text, queries)))


def reply(code: int, kind: int, data: bytes = b"") -> bytes:
    return b"\x00\x03\xe8\x89\x04\x55\x65\xa9" + u32(code) + u32(kind) + u32(len(data)) + data


def request(operation: int, cookie: int = 0, offset: int = 0, length: int = 0) -> bytes:
    return b"\x25\x60\x95\x13" + u32(operation) + u64(cookie) + u64(offset) + u32(length)


@dataclass
class Directory:
    """Exports by name; ``aliases`` are further names, as of a default export."""

    exports: Sequence[ExportInfo]
    aliases: dict[str, str]

    def list(self) -> Sequence[ExportInfo]:
        return self.exports

    def find(self, name: str) -> ExportInfo | None:
        name = self.aliases.get(name, name)
        return next((export for export in self.exports if export.name == name), None)

    def check_room_for_tls(self) -> None: ...


READ_ONLY = TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY | TransmissionFlag.SEND_FLUSH

DISK = ExportInfo(
    "disk",
    0x123456789,
    READ_ONLY,
    description="a désk",
    preferred_block=65536,
    contexts=("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1"),
)
OTHER = ExportInfo("a/other", 512, TransmissionFlag(0), contexts=("base:allocation",))
EXPORTS = Directory([DISK, OTHER], {"": "disk"})


@dataclass(frozen=True)
class Outcome:
    """All that a peer and the shell can see of a handshake."""

    replies: tuple[bytes, ...]
    negotiated: Negotiated | None
    finished: bool
    reason: str
    leftover: bytes

    @property
    def kinds(self) -> list[int]:
        """The type of every option reply."""
        return [int.from_bytes(each[12:16], "big") for each in self.replies]


def shake(data: Iterable[bytes], make: Callable[[], Handshake] = lambda: Handshake(EXPORTS)) -> Outcome:
    """Feed a handshake piece by piece as the shell does; what follows transmission is the shell's."""
    handshake = make()
    replies: list[bytes] = []
    rest = b""
    for piece in data:
        if handshake.negotiated is not None:
            rest += piece
            continue
        with suppress(ProtocolError):  # which ``finished`` and ``ending`` tell of as well
            replies += handshake.receive(piece)
            while handshake.has_more:
                replies += handshake.receive(b"")
    leftover, ending = handshake.leftover + rest, handshake.ending
    return Outcome(tuple(replies), handshake.negotiated, handshake.finished, ending.text if ending else "", leftover)


#: The start of a further option: it must change nothing before the rest has come.
TRAILING = b"IHAVEO"


def shake_three_ways(data: bytes, make: Callable[[], Handshake] = lambda: Handshake(EXPORTS)) -> Outcome:
    """The outcome of a conversation, which is the same whole, byte by byte, and with more bytes behind it (P5)."""
    whole = shake([data], make)
    assert shake((data[i : i + 1] for i in range(len(data))), make) == whole
    trailing = shake([data + TRAILING], make)
    if whole.negotiated is not None:
        assert trailing.leftover == whole.leftover + TRAILING
        trailing = Outcome(trailing.replies, trailing.negotiated, trailing.finished, trailing.reason, whole.leftover)
    assert trailing == whole
    return whole


def replies_to(data: bytes, client: bytes = NO_ZEROES) -> list[bytes]:
    """What a client is answered to its options, in a handshake that goes on."""
    outcome = shake_three_ways(client + data)
    assert not outcome.finished
    assert outcome.negotiated is None
    return list(outcome.replies)

"""What must be true of the parsers for any bytes at all: replies and valid requests, or a protocol error, nothing else.

A case is a byte string: a mode, a seed for how the rest is cut, and the rest, which is what a client sends. The rest is
fed whole, byte by byte and in random pieces, with the same outcome each time. Requests are found a second time by a
slow and obvious reading of the specification.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from nbdq.errors import ProtocolError
from nbdq.nbd.constants import TransmissionFlag
from nbdq.nbd.exports import ExportInfo, Negotiated
from nbdq.nbd.handshake import Handshake, TlsMode
from nbdq.nbd.transmission import Refusal, Transmission
from tests.nbd.wire import EXPORTS

#: Bytes that a connection hands to the handshake at once.
_RECEIVE = 4096
_OPTION_MAX = 64 << 10
_PAYLOAD_MAX = 64 << 20

_WRITABLE = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_FAST_ZERO
    | TransmissionFlag.SEND_CACHE
)
_DISK = ExportInfo("disk", 1 << 20, _WRITABLE, contexts=("base:allocation", "qemu:allocation-depth"))
_CONTEXTS = ((0, "base:allocation"), (1, "qemu:allocation-depth"))
_ALIGNED = replace(_DISK, minimum_block=512, maximum_block=64 << 10)
_READ_ONLY = replace(_DISK, flags=TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY)

NEGOTIATED = (
    Negotiated(_DISK, structured=False, contexts=()),
    Negotiated(_DISK, structured=True, contexts=_CONTEXTS),
    Negotiated(_READ_ONLY, structured=True, contexts=_CONTEXTS[:1]),
    Negotiated(_DISK, structured=True, contexts=_CONTEXTS, extended=True),
    Negotiated(_ALIGNED, structured=True, contexts=_CONTEXTS[1:], extended=True),
)
HANDSHAKES = (TlsMode.OFF, TlsMode.ALLOW, TlsMode.REQUIRE)
#: The first byte of a case, modulo this, says what it is for: first the handshakes, then the transmissions.
MODES = len(HANDSHAKES) + len(NEGOTIATED)


def judge(case: bytes) -> None:
    """Fail if anything about this case is wrong."""
    if len(case) < 3:
        return
    mode, chance, data = case[0] % MODES, random.Random(case[1:3]), case[3:]
    if mode < len(HANDSHAKES):
        _judge_all(data, chance, lambda pieces: _shake(pieces, HANDSHAKES[mode]))
    else:
        negotiated = NEGOTIATED[mode - len(HANDSHAKES)]
        seen = _judge_all(data, chance, lambda pieces: _transmit(pieces, negotiated))
        expected = obvious(data, negotiated)
        assert seen == expected, f"{seen} instead of {expected}"


def _judge_all(data: bytes, chance: random.Random, run: "Callable[[Iterable[bytes]], Outcome]") -> "Outcome":
    whole = run([data[start : start + _RECEIVE] for start in range(0, len(data), _RECEIVE)])
    assert run(cut(data, chance)) == whole, "not the same when it comes in pieces"
    if len(data) < 1000:
        assert run(data[at : at + 1] for at in range(len(data))) == whole, "not the same byte by byte"
    return whole


def cut(data: bytes, chance: random.Random) -> Iterator[bytes]:
    """``data`` in random pieces, of a random scale."""
    most = max(chance.choice([1, 3, 30, 300, _RECEIVE]), len(data) // 500)
    position = 0
    while position < len(data):
        length = chance.randint(1, min(most, _RECEIVE))
        yield data[position : position + length]
        position += length


@dataclass(frozen=True)
class Request:
    """A request, and why it is refused."""

    operation: int
    cookie: int
    offset: int
    length: int
    selected: int
    """Ids of the contexts of a BLOCK_STATUS that says which, as bits."""
    payload: bytes
    """Of a WRITE that is not refused."""
    is_refused: bool


@dataclass(frozen=True)
class Outcome:
    """All that a client can notice, and that the server goes on with."""

    replies: tuple[bytes, ...] = ()
    negotiated: Negotiated | None = None
    requests: tuple[Request, ...] = ()
    over: str = ""
    """How it ended, if it did."""
    rest: bytes = b""


# The handshake.


def _shake(pieces: Iterable[bytes], tls: TlsMode) -> Outcome:
    handshake = Handshake(EXPORTS, tls=tls)
    replies: list[bytes] = []
    rest = b""
    for piece in pieces:
        if handshake.negotiated is not None:
            rest += piece
            continue
        if handshake.starting_tls:  # what comes now is for TLS; whether it came together with STARTTLS is chance
            replies.pop()
            break
        with suppress(ProtocolError):  # which ``ending`` tells of as well
            replies += handshake.receive(piece)
            while handshake.has_more:
                replies += handshake.receive(b"")
        assert len(handshake._buffer) <= _OPTION_MAX + 16 + _RECEIVE, "more is kept than one option"
    assert handshake.finished == (handshake.ending is not None)
    assert not (handshake.finished and handshake.negotiated)
    over = handshake.ending.text if handshake.ending else ""
    assert len(over) < 1000
    assert not over or over.isprintable()
    if handshake.starting_tls or "STARTTLS before it was answered" in over:
        over = "TLS"
        replies = [reply for reply in replies if reply[8:16] != (5 << 32 | 1).to_bytes(8, "big")]
    _judge_replies(replies, handshake.negotiated)
    return Outcome(tuple(replies), handshake.negotiated, over=over, rest=handshake.leftover + rest)


def _judge_replies(replies: Sequence[bytes], negotiated: Negotiated | None) -> None:
    assert sum(map(len, replies)) < 4 << 20, "a client gets much for little"
    for number, reply in enumerate(replies):
        if negotiated is not None and number == len(replies) - 1 and len(reply) in (10, 134):
            continue  # to EXPORT_NAME
        assert reply[:8] == b"\x00\x03\xe8\x89\x04\x55\x65\xa9"
        assert len(reply) == 20 + int.from_bytes(reply[16:20], "big")
        kind = int.from_bytes(reply[12:16], "big")
        assert kind in (1, 2, 3, 4) or 0x80000001 <= kind <= 0x8000000A, hex(kind)
    if negotiated is not None:
        assert negotiated.export in EXPORTS.exports
        assert negotiated.structured or not negotiated.extended
        assert negotiated.structured or not negotiated.contexts
        assert {name for _, name in negotiated.contexts} <= set(negotiated.export.contexts)


# Transmission.


def _transmit(pieces: Iterable[bytes], negotiated: Negotiated) -> Outcome:
    transmission = Transmission(negotiated)
    requests: list[Request] = []
    with suppress(ProtocolError):  # which ``failure`` tells of as well
        for piece in pieces:
            view = memoryview(piece)
            while view:
                if transmission.wanted:
                    assert transmission.wanted <= _PAYLOAD_MAX
                    transmission.provide(memoryview(bytearray(transmission.wanted)))
                buffer = transmission.buffer()
                count = min(len(buffer), len(view))
                buffer[:count] = view[:count]
                view = view[count:]
                requests += _taken(transmission, count)
    over = "lost" if transmission.failure else "disconnected" if transmission.disconnected else ""
    return Outcome(requests=tuple(requests), over=over)


def _taken(transmission: Transmission, count: int) -> Iterator[Request]:
    for raw in transmission.received(count):
        selected, operation, cookie, offset, length = raw
        refusal = transmission.refusal(raw)
        payload = b""
        if operation & 0xFFFF == 1:
            view = transmission.payloads.popleft()
            if refusal is None:
                assert len(view) == length
                payload = bytes(view)
        _judge_refusal(refusal, operation & 0xFFFF, offset, length, transmission.negotiated.export)
        if operation & 0xFFFF != 7 or not operation & 0x00200000:
            selected = 0  # the magic, for all others
        if refusal is not None:
            length = selected = 0  # it is not carried out, so it may be anything
        yield Request(operation, cookie, offset, length, selected, payload, refusal is not None)
    assert not transmission.payloads, "a payload without a request"


def _judge_refusal(refusal: Refusal | None, command: int, offset: int, length: int, export: ExportInfo) -> None:
    if refusal is not None:
        assert refusal.errno in (1, 22, 28)
        assert refusal.text.isprintable()
        return
    assert command in (0, 1, 3, 4, 5, 6, 7)
    if command != 3:
        assert offset + length <= export.size
        assert not (offset | length) & (export.minimum_block - 1)
    if command in (0, 1):
        assert length <= export.maximum_block


def obvious(data: bytes, negotiated: Negotiated) -> Outcome:
    """The requests of a stream as the specification has them, read without haste."""
    requests: list[Request] = []
    size, magic = (32, 0x21E41C71) if negotiated.extended else (28, 0x25609513)
    while len(data) >= size:
        operation, cookie, offset, length = (
            int.from_bytes(data[start:end], "big") for start, end in ((4, 8), (8, 16), (16, 24), (24, size))
        )
        if int.from_bytes(data[:4], "big") != magic:  # P80
            return Outcome(requests=tuple(requests), over="lost")
        command = operation & 0xFFFF
        if command == 2:  # P93
            return Outcome(requests=tuple(requests), over="disconnected")
        has_payload = command == 1 or (negotiated.extended and operation & 0x00200000)  # P84, P123
        if has_payload and length > _PAYLOAD_MAX:  # P85
            return Outcome(requests=tuple(requests), over="lost")
        end = size + (length if has_payload else 0)
        if len(data) < end:
            break
        payload, data = data[size:end], data[end:]
        selected, is_wrong = 0, False
        if command == 7 and has_payload:  # P120
            ids = [int.from_bytes(payload[at : at + 4], "big") for at in range(8, len(payload), 4)]
            known = {number for number, _ in negotiated.contexts}
            if len(payload) > 8 and not len(payload) % 4 and len(ids) == len(set(ids)) and set(ids) <= known:
                selected, length = sum(1 << number for number in ids), int.from_bytes(payload[:8], "big")
            else:
                is_wrong = True
        refused = is_wrong or _is_refused(operation, offset, length, negotiated)
        requests.append(
            Request(
                operation,
                cookie,
                offset,
                0 if refused else length,
                0 if refused else selected,
                payload if command == 1 and not refused else b"",
                refused,
            )
        )
    return Outcome(requests=tuple(requests))


#: Command → the flags that apply to it on an export that offers everything (P83): FUA 1, NO_HOLE 2, DF 4, REQ_ONE 8,
#: FAST_ZERO 16, PAYLOAD_LEN 32.
_FLAGS = {0: 5, 1: 1, 3: 1, 4: 1, 5: 1, 6: 19, 7: 9}


def _is_refused(operation: int, offset: int, length: int, negotiated: Negotiated) -> bool:
    """P82, P83, P85-P88."""
    command, flags, export = operation & 0xFFFF, operation >> 16, negotiated.export
    if command not in _FLAGS:
        return True
    read_only = TransmissionFlag.READ_ONLY in export.flags
    if read_only and command in (1, 3, 4, 5, 6):  # of which this one offers nothing
        return True
    if command == 7 and not negotiated.contexts:
        return True
    allowed = _FLAGS[command]
    if read_only:
        allowed &= ~1
    if not negotiated.structured:
        allowed &= ~4
    if negotiated.extended and command in (1, 7):
        allowed |= 32
    if flags & ~allowed:
        return True
    if command == 3:
        return False
    if offset + length > export.size or (offset | length) % export.minimum_block:
        return True
    return (command in (0, 1) and length > export.maximum_block) or (command == 7 and not length)

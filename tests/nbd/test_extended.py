"""Requests with extended headers out of a byte stream (P80, P120, P122-P124)."""

import random
from contextlib import suppress

import pytest

from nbdq.errors import ProtocolError
from nbdq.nbd.constants import TransmissionFlag
from nbdq.nbd.exports import ExportInfo, Negotiated
from nbdq.nbd.transmission import BUFFER_SIZE, RawRequest, Transmission
from tests.nbd.wire import u32, u64

MAGIC = 0x21E41C71
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in (16, 18, 19, 20, 21))
EVERYTHING = TransmissionFlag(0xD6D)
SIZE = 1 << 62
MIB = 1 << 20
CONTEXTS = ((0, "base:allocation"), (2, "x-a:b"), (700, "x-a:c"))
EINVAL, ENOSPC = 22, 28


def request(operation: int, cookie: int = 0, offset: int = 0, length: int = 0) -> bytes:
    return u32(MAGIC) + u32(operation) + u64(cookie) + u64(offset) + u64(length)


def begin(*, contexts: tuple[tuple[int, str], ...] = CONTEXTS, size: int = SIZE) -> Transmission:
    return Transmission(Negotiated(ExportInfo("disk", size, EVERYTHING), True, contexts, extended=True))


Seen = tuple[list[RawRequest], list[bytes], bool, str]
"""Requests, payloads of WRITEs, whether the client disconnected, and why the stream failed."""


def receive_in(pieces: list[bytes], transmission: Transmission, *, settled: bool = False) -> Seen:
    requests: list[RawRequest] = []
    payloads: list[bytes] = []
    with suppress(ProtocolError):
        for piece in pieces:
            while piece:
                if transmission.wanted:
                    transmission.provide(memoryview(bytearray(transmission.wanted)))
                view = transmission.buffer()
                count = min(len(view), len(piece))
                view[:count] = piece[:count]
                piece = piece[count:]
                requests += transmission.received(count)
                if settled:
                    transmission.settle()
                    transmission._buffer[:] = b"\xee" * BUFFER_SIZE
                payloads += map(bytes, transmission.payloads)
                transmission.payloads.clear()
    return requests, payloads, transmission.disconnected, str(transmission.failure or "")


def see(data: bytes, *, contexts: tuple[tuple[int, str], ...] = CONTEXTS) -> Seen:
    """What comes out is the same whole, byte by byte, and in a buffer that others use (P5)."""
    whole = receive_in([data], begin(contexts=contexts))
    torn = [data[at : at + 1] for at in range(len(data))]
    assert receive_in(torn, begin(contexts=contexts)) == whole
    assert receive_in(torn, begin(contexts=contexts), settled=True) == whole
    assert receive_in([data + u32(MAGIC)], begin(contexts=contexts)) == whole
    return whole


def refused(*raw: RawRequest) -> list[int]:
    """The error number of each request; 0 if it is to be carried out."""
    transmission = begin()
    return [refusal.errno if (refusal := transmission.refusal(each)) else 0 for each in raw]


def test_a_request_is_taken_apart_as_the_specification_says() -> None:
    """P80."""
    data = (
        b"\x21\xe4\x1c\x71\0\x08\0\7\x11\x12\x13\x14\x15\x16\x17\x18\x21\x22\x23\x24\x25\x26\x27\x28"
        b"\x31\x32\x33\x34\x35\x36\x37\x38"
    )
    expected = (MAGIC, REQ_ONE | BLOCK_STATUS, 0x1112131415161718, 0x2122232425262728, 0x3132333435363738)
    assert see(data) == ([expected], [], False, "")


def test_a_compact_request_ends_the_connection_after_what_came_before() -> None:
    requests, _, _, failure = see(request(READ, 1, 0, 512) + b"\x25\x60\x95\x13" + bytes(28))
    assert len(requests) == 1
    assert "0x25609513" in failure


@pytest.mark.parametrize("flags", [PAYLOAD_LEN, PAYLOAD_LEN | FUA, 0], ids=["flag", "fua", "no flag"])
def test_a_write_has_its_payload_whether_it_says_so_or_not(flags: int) -> None:
    """P123: as newest QEMU does."""
    data = request(flags | WRITE, 1, 4096, 5) + b"hello" + request(READ, 2, 0, 1)
    requests, payloads, _, failure = see(data)
    assert requests == [(MAGIC, flags | WRITE, 1, 4096, 5), (MAGIC, READ, 2, 0, 1)]
    assert payloads == [b"hello"]
    assert not failure
    assert refused(*requests) == [0, 0]


@pytest.mark.parametrize("command", [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, 8, 0xFFFF])
@pytest.mark.parametrize("length", [0, 1, 70, 300_000])
def test_the_payload_of_any_other_command_is_read_and_the_request_refused(command: int, length: int) -> None:
    """P82, P123."""
    data = request(PAYLOAD_LEN | command, 1, 0, length) + bytes(length) + request(READ, 2, 0, 1)
    pieces = [data] if length > 1000 else None
    requests, payloads, _, failure = receive_in(pieces, begin()) if pieces else see(data)
    assert requests == [(MAGIC, PAYLOAD_LEN | command, 1, 0, length), (MAGIC, READ, 2, 0, 1)]
    assert not payloads
    assert not failure
    assert refused(*requests) == [EINVAL, 0]


def test_without_the_flag_a_length_is_that_of_the_range() -> None:
    """P124."""
    commands = [TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS]
    requests, _, _, failure = see(b"".join(request(command, command, 0, SIZE) for command in commands))
    assert [each[4] for each in requests] == [SIZE] * 4
    assert not failure
    assert refused(*requests) == [0, 0, 0, 0]


@pytest.mark.parametrize("command", [READ, WRITE, BLOCK_STATUS, 99])
@pytest.mark.parametrize("length", [(64 << 20) + 1, 1 << 32, 1 << 63, (1 << 64) - 1])
def test_a_payload_too_long_to_be_read_ends_the_connection(command: int, length: int) -> None:
    """P85, P123."""
    requests, _, _, failure = see(request(READ, 1, 0, 1) + request(PAYLOAD_LEN | command, 2, 0, length) + bytes(99))
    assert requests == [(MAGIC, READ, 1, 0, 1)]
    assert "limit" in failure


def test_what_follows_a_disconnect_is_ignored_whatever_that_carries() -> None:
    assert see(request(PAYLOAD_LEN | DISC, 1, 0, 1 << 40) + b"xyz") == ([], [], True, "")


def test_bounds_are_those_of_all_64_bits() -> None:
    """P87."""
    top = (1 << 64) - 1
    for command, error in [(READ, EINVAL), (TRIM, EINVAL), (CACHE, EINVAL), (BLOCK_STATUS, EINVAL)]:
        assert refused((MAGIC, command, 0, SIZE, 1), (MAGIC, command, 0, top, top)) == [error] * 2
    for operation in (WRITE | PAYLOAD_LEN, WRITE_ZEROES):
        assert refused((MAGIC, operation, 0, SIZE, 1), (MAGIC, operation, 0, 1, SIZE)) == [ENOSPC] * 2
    assert refused((MAGIC, READ, 0, 0, (32 << 20) + 1), (MAGIC, READ, 0, 0, SIZE)) == [EINVAL] * 2


# BLOCK_STATUS with a payload.


def ask(length: int, *ids: int) -> bytes:
    return u64(length) + b"".join(map(u32, ids))


@pytest.mark.parametrize("ids", [(0,), (2, 0), (700, 0, 2)])
def test_a_block_status_with_payload_says_there_what_it_asks_for(ids: tuple[int, ...]) -> None:
    """P120."""
    payload = ask(SIZE, *ids)
    data = request(PAYLOAD_LEN | REQ_ONE | BLOCK_STATUS, 7, 0, len(payload)) + payload + request(READ, 8, 0, 1)
    requests, payloads, _, failure = see(data)
    selected = sum(1 << number for number in ids)
    assert requests == [(selected, PAYLOAD_LEN | REQ_ONE | BLOCK_STATUS, 7, 0, SIZE), (MAGIC, READ, 8, 0, 1)]
    assert (payloads, failure) == ([], "")
    assert refused(*requests) == [0, 0]


@pytest.mark.parametrize(
    "payload",
    [
        *(b"", b"x", u64(512), ask(512, 0)[:-1], ask(512, 0) + b"x"),
        *(ask(512, 1), ask(512, 0, 0), ask(512, 0, 2, 700, 0), ask(512, *range(100)), bytes(70_000)),
        *(ask(0, 0), ask(SIZE + 1, 0), ask((1 << 64) - 1, 0)),
    ],
)
def test_a_wrong_payload_is_read_and_the_request_refused(payload: bytes) -> None:
    """P120: too short or long, unknown or repeated ids, and ranges that are none."""
    data = request(PAYLOAD_LEN | BLOCK_STATUS, 7, 0, len(payload)) + payload + request(READ, 8, 0, 1)
    requests, _, _, failure = see(data) if len(data) < 1000 else receive_in([data], begin())
    assert [each[2] for each in requests] == [7, 8]
    assert not failure
    assert refused(*requests) == [EINVAL, 0]


def test_without_a_selected_context_there_is_nothing_to_ask_for() -> None:
    payload = ask(512, 0)
    data = request(PAYLOAD_LEN | BLOCK_STATUS, 7, 0, len(payload)) + payload + request(READ, 8, 0, 1)
    requests, _, _, failure = see(data, contexts=())
    transmission = begin(contexts=())
    assert not failure
    assert [bool(transmission.refusal(each)) for each in requests] == [True, False]


@pytest.mark.parametrize("seed", range(20))
def test_every_request_of_a_stream_is_found_however_it_is_cut(seed: int) -> None:
    chance = random.Random(f"extended {seed}")
    data, expected, written = b"", [], []
    for cookie in range(60):
        command = chance.choice([READ, WRITE, FLUSH, TRIM, BLOCK_STATUS, 42])
        flags = chance.choice([0, PAYLOAD_LEN, FUA | PAYLOAD_LEN])
        has_payload = command == WRITE or flags & PAYLOAD_LEN
        length = chance.choice([0, 1, 12, 500, 9000, 150_000]) if has_payload else chance.getrandbits(64)
        payload = chance.randbytes(length) if has_payload else b""
        data += request(flags | command, cookie, 512, length) + payload
        expected.append((flags | command, cookie))
        written += [payload] if command == WRITE else []
    cuts = sorted(chance.randrange(len(data)) for _ in range(40))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    for way in ([data], pieces):
        requests, payloads, _, failure = receive_in(way, begin(), settled=way is pieces)
        assert [each[1:3] for each in requests] == expected, f"seed {seed}"
        assert payloads == written, f"seed {seed}"
        assert not failure

"""The transmission phase: requests out of a byte stream, and reasons to refuse them."""

import random
from collections.abc import Iterable, Iterator
from contextlib import suppress

import pytest

from nbdq.errors import ProtocolError
from nbdq.nbd.constants import TransmissionFlag
from nbdq.nbd.exports import ExportInfo, Negotiated
from nbdq.nbd.transmission import BUFFER_SIZE, RawRequest, Transmission
from tests.nbd.wire import request

MAGIC = 0x25609513
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(16, 22))
KIB, MIB = 1 << 10, 1 << 20
SIZE = 100 * MIB

EVERYTHING = TransmissionFlag(0xD6D)  # what qemu-nbd says of a writable export (P70)
READ_ONLY = TransmissionFlag(0x50F)  # … and of a read-only one


def begin(
    flags: TransmissionFlag = EVERYTHING, *, structured: bool = True, size: int = SIZE, minimum_block: int = 1
) -> Transmission:
    export = ExportInfo("disk", size, flags, minimum_block=minimum_block, contexts=("base:allocation",))
    return Transmission(Negotiated(export, structured, ((0, "base:allocation"),) if structured else ()))


def receive_each(
    transmission: Transmission, data: bytes, *, settled: bool = False, payloads: list[bytes] | None = None
) -> Iterator[list[RawRequest]]:
    """What a shell gets that receives ``data``, in pieces only where the buffer is too small.

    ``settled``: others receive into the same buffer in between. ``payloads`` gets those of the WRITEs.
    """
    while data:
        if transmission.wanted:
            transmission.provide(memoryview(bytearray(transmission.wanted)))
        view = transmission.buffer()
        count = min(len(view), len(data))
        view[:count] = data[:count]
        data = data[count:]
        requests = transmission.received(count)
        if settled:
            transmission.settle()
            transmission._buffer[:] = b"\xee" * BUFFER_SIZE
        if payloads is not None:
            payloads += map(bytes, transmission.payloads)
            transmission.payloads.clear()
        yield requests


def receive(transmission: Transmission, data: bytes) -> list[RawRequest]:
    return [request for requests in receive_each(transmission, data) for request in requests]


Seen = tuple[list[RawRequest], bool, str, list[bytes]]
"""All that is visible of a stream: the requests, whether the client disconnected, why it failed, and payloads."""


def receive_in(pieces: Iterable[bytes], *, settled: bool = False, flags: TransmissionFlag = EVERYTHING) -> Seen:
    transmission = begin(flags)
    requests: list[RawRequest] = []
    payloads: list[bytes] = []
    with suppress(ProtocolError):
        for piece in pieces:
            for each in receive_each(transmission, piece, settled=settled, payloads=payloads):
                requests += each
    assert len(payloads) == sum(each[1] & 0xFFFF == WRITE for each in requests)
    return requests, transmission.disconnected, str(transmission.failure or ""), payloads


TRAILING = b"\x25\x60"


def see_three_ways(data: bytes) -> Seen:
    """Whole, byte by byte, and with the start of a further request behind it (P5)."""
    whole = receive_in([data])
    assert receive_in([data], settled=True) == whole
    assert receive_in(data[i : i + 1] for i in range(len(data))) == whole
    assert receive_in([data + TRAILING]) == whole
    return whole


def receive_three_ways(data: bytes) -> tuple[list[RawRequest], bool, str]:
    """The requests, whether the client disconnected, and why it failed."""
    return see_three_ways(data)[:3]


# Requests.


def test_a_request_is_taken_apart_as_the_specification_says() -> None:
    """P80."""
    data = b"\x25\x60\x95\x13\0\x08\0\7\x11\x12\x13\x14\x15\x16\x17\x18\x21\x22\x23\x24\x25\x26\x27\x28\x31\x32\x33\x34"
    requests, disconnected, failure = receive_three_ways(data)
    assert requests == [(MAGIC, REQ_ONE | BLOCK_STATUS, 0x1112131415161718, 0x2122232425262728, 0x31323334)]
    assert not disconnected
    assert not failure


def test_every_complete_request_of_a_batch_is_returned_in_order() -> None:
    """P81: cookies are opaque, and may even repeat."""
    cookies = [0, 2**64 - 1, 7, 7, 1 << 63]
    data = b"".join(request(READ, cookie, 4096 * i, i) for i, cookie in enumerate(cookies))
    requests, _, _ = receive_three_ways(data)
    assert requests == [(MAGIC, READ, cookie, 4096 * i, i) for i, cookie in enumerate(cookies)]


def test_a_plain_read_is_operation_zero() -> None:
    (only,) = receive(begin(), request(0))
    assert only[1] == 0


def test_an_incomplete_header_waits_for_the_rest() -> None:
    transmission = begin()
    data = request(READ, 1) + request(READ, 2)
    assert receive(transmission, data[:40]) == [(MAGIC, READ, 1, 0, 0)]
    assert len(transmission.buffer()) == BUFFER_SIZE - 12
    assert receive(transmission, data[40:55]) == []
    assert receive(transmission, data[55:]) == [(MAGIC, READ, 2, 0, 0)]
    assert len(transmission.buffer()) == BUFFER_SIZE


def test_a_buffer_full_of_requests_loses_none() -> None:
    data = b"".join(request(READ, i) for i in range(2 * BUFFER_SIZE // 28))
    assert [each[2] for each in receive(begin(), data)] == list(range(2 * BUFFER_SIZE // 28))


def test_unknown_commands_have_no_payload() -> None:
    """P82; PAYLOAD_LEN means nothing here either (P123)."""
    data = request(8, 1, 0, 100) + request(PAYLOAD_LEN | READ, 2, 0, 100) + request(0xFFFFFFFF, 3, 0, 100)
    requests, _, failure = receive_three_ways(data)
    assert [each[1:3] for each in requests] == [(8, 1), (PAYLOAD_LEN, 2), (0xFFFFFFFF, 3)]
    assert not failure


# Payloads.


def noise(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


@pytest.mark.parametrize("length", [0, 1, 27, 28, 29, 512, 1000])
def test_every_write_has_its_own_payload(length: int) -> None:
    """R-71, P5: however it comes, even if it looks like requests."""
    contents = [noise(length), (request(READ, 99) * 40)[:length], noise(length, 2)]
    data = b"".join(request(WRITE, i, i * 4096, length) + each + request(READ, 9) for i, each in enumerate(contents))
    requests, _, failure, payloads = see_three_ways(data)
    assert [each[2] for each in requests] == [0, 9, 1, 9, 2, 9]
    assert payloads == contents
    assert not failure


@pytest.mark.parametrize("first", [0, 1, 100, BUFFER_SIZE - 28 - 28, BUFFER_SIZE - 28 - 29, BUFFER_SIZE - 28])
@pytest.mark.parametrize("length", [1, 4096, 128 << 10, BUFFER_SIZE, 700_001])
def test_a_payload_that_begins_anywhere_in_the_buffer_is_whole(first: int, length: int) -> None:
    contents = [noise(first), noise(length, 1), noise(4096, 2), noise(length, 3)]
    data = b"".join(request(WRITE, i, 0, len(each)) + each for i, each in enumerate(contents)) + request(READ, 9)
    cuts = (
        [data],
        [data[:30], data[30:]],
        [data[:-29], data[-29:]],
        [data[: BUFFER_SIZE + 5], data[BUFFER_SIZE + 5 :]],
    )
    for pieces in cuts:
        for settled in (False, True):
            requests, _, failure, payloads = receive_in(pieces, settled=settled)
            assert [each[2] for each in requests] == [0, 1, 2, 3, 9]
            assert payloads == contents
            assert not failure


def test_a_payload_that_came_with_its_request_is_not_copied() -> None:
    transmission = begin()
    receive(transmission, request(WRITE, 1, 0, 4096) + noise(4096))
    (payload,) = transmission.payloads
    assert payload.obj is transmission._buffer
    transmission.settle()
    (payload,) = transmission.payloads
    assert payload.obj is not transmission._buffer
    assert payload == noise(4096)
    transmission.settle()
    assert transmission.payloads[0].obj is payload.obj


def test_the_rest_of_a_large_payload_is_received_where_it_stays() -> None:
    transmission = begin()
    content = noise(MIB)
    assert receive(transmission, request(WRITE, 1, 0, MIB) + content[:1000]) == []
    assert transmission.wanted == MIB
    memory = memoryview(bytearray(MIB))
    transmission.provide(memory)
    assert transmission.wanted == 0
    assert transmission.missing == len(transmission.buffer()) == MIB - 1000
    assert receive(transmission, content[1000:]) == [(MAGIC, WRITE, 1, 0, MIB)]
    (payload,) = transmission.payloads
    assert payload.obj is memory.obj
    assert payload == content


def test_nothing_holds_the_memory_of_a_payload_that_was_taken() -> None:
    transmission = begin()
    payload = noise(1 << 20)
    transmission.buffer()[:28] = request(WRITE, 1, 0, len(payload))
    transmission.received(28)
    memory = bytearray(transmission.wanted)
    transmission.provide(memoryview(memory))
    position = 0
    while position < len(payload):
        room = transmission.buffer()
        count = min(len(room), len(payload) - position)
        room[:count] = payload[position : position + count]
        del room
        transmission.received(count)
        position += count
    assert transmission.payloads.popleft() == payload
    memory.append(0)  # which fails while there is a view of it


def test_the_request_behind_a_large_payload_is_looked_for_before_more_of_the_next_payload_is_received() -> None:
    transmission = begin()
    receive(transmission, request(WRITE, 1, 0, MIB) + bytes(MIB))
    assert len(transmission.buffer()) < BUFFER_SIZE // 10
    receive(transmission, request(READ, 2))
    assert len(transmission.buffer()) == BUFFER_SIZE


def test_a_payload_that_waits_for_memory_survives_the_use_of_the_buffer_by_others() -> None:
    transmission = begin()
    receive(transmission, request(WRITE, 1, 0, 1000) + noise(1000)[:600])
    transmission.settle()
    transmission._buffer[:] = bytes(BUFFER_SIZE)
    receive(transmission, noise(1000)[600:])
    assert list(transmission.payloads) == [noise(1000)]


@pytest.mark.parametrize("length", [0, 1, 28, 1000, BUFFER_SIZE, 700_001])
@pytest.mark.parametrize("flags", [0, FUA, 0xFFFF0000])
def test_no_memory_is_wanted_for_the_payload_of_a_write_that_is_refused(length: int, flags: int) -> None:
    """P84, R-71."""
    data = request(WRITE | flags, 1, 0, length) + bytes(length) + request(READ, 2)
    transmission = begin(READ_ONLY)
    requests = []
    for start in range(0, len(data), 999):
        piece = data[start : start + 999]
        transmission.buffer()[: len(piece)] = piece
        requests += transmission.received(len(piece))
        assert not transmission.wanted
    assert [each[2] for each in requests] == [1, 2]
    assert len(transmission.payloads) == 1


# Payloads of writes that are refused.


@pytest.mark.parametrize("length", [0, 1, 27, 28, 29, 512, 1000])
@pytest.mark.parametrize("flags", [0, FUA, 0xFFFF0000])
def test_the_payload_of_a_write_is_consumed_and_sync_is_kept(length: int, flags: int) -> None:
    """P84: even if it looks like requests, and whatever the flags."""
    payload = (request(READ, 99) * 40)[:length]
    data = request(WRITE | flags, 1, 0, length) + payload + request(READ, 2)
    for pieces in ([data], (data[i : i + 1] for i in range(len(data)))):
        requests, _, failure, _ = receive_in(pieces, flags=READ_ONLY)
        assert [each[2] for each in requests] == [1, 2]
        assert not failure


def test_a_write_is_returned_only_when_its_payload_has_come() -> None:
    """P84: a client is not prepared for the answer to a request that it is still sending."""
    transmission = begin()
    assert receive(transmission, request(WRITE, 1, 0, MIB)) == []
    assert receive(transmission, bytes(MIB - 1)) == []
    assert receive(transmission, b"\0" + request(READ, 2)) == [(MAGIC, WRITE, 1, 0, MIB), (MAGIC, READ, 2, 0, 0)]


@pytest.mark.parametrize("length", [BUFFER_SIZE - 28, BUFFER_SIZE - 27, BUFFER_SIZE, 3 * BUFFER_SIZE - 28, 700_001])
def test_a_payload_that_ends_anywhere_in_the_buffer_is_consumed(length: int) -> None:
    data = request(WRITE, 1, 0, length) + bytes(length) + request(READ, 2) + request(WRITE, 3, 0, 5) + bytes(5)
    assert [each[2] for each in receive(begin(), data + request(READ, 4))] == [1, 2, 3, 4]


def test_the_largest_write_is_consumed_and_a_larger_one_ends_the_connection() -> None:
    """P85, W4."""
    transmission = begin()
    assert receive(transmission, request(WRITE, 1, 0, 64 * MIB)) == []
    for _ in range(255):
        assert receive(transmission, bytes(256 * KIB)) == []
    assert len(receive(transmission, bytes(256 * KIB))) == 1
    assert len(receive(transmission, request(READ, 2))) == 1
    with pytest.raises(ProtocolError, match="67108865"):
        receive(transmission, request(WRITE, 3, 0, 64 * MIB + 1))


@pytest.mark.parametrize("length", [64 * MIB + 1, 2**31, 2**32 - 1])
def test_a_write_too_long_to_consume_comes_after_what_is_before_it(length: int) -> None:
    """P85, P141."""
    requests, _, failure = receive_three_ways(request(READ, 1) + request(WRITE, 2, 0, length) + request(READ, 3))
    assert [each[2] for each in requests] == [1]
    assert str(length) in failure


# Lost sync and disconnection.


@pytest.mark.parametrize("magic", [b"\x25\x60\x95\x14", b"\x12\x56\x09\x53", b"\x21\xe4\x1c\x71", b"\0\0\0\0"])
def test_a_wrong_magic_ends_the_connection_after_what_is_before_it(magic: bytes) -> None:
    """P80, P141."""
    requests, _, failure = receive_three_ways(request(READ, 1) + magic + bytes(24) + request(READ, 2))
    assert [each[2] for each in requests] == [1]
    assert magic.hex() in failure


@pytest.mark.parametrize("further", [b"x", request(READ), request(READ) * 100])
def test_a_failure_is_raised_once_nothing_is_left_to_return(further: bytes) -> None:
    transmission = begin()
    assert len(receive(transmission, request(READ) + bytes(28) + request(READ) * 100)) == 1
    assert transmission.failure is not None
    with pytest.raises(ProtocolError) as raised:
        receive(transmission, further)
    assert raised.value is transmission.failure


@pytest.mark.parametrize("last", [bytes(28), request(WRITE, 0, 0, 2**32 - 1), request(DISC)])
def test_the_buffer_is_whole_again_when_nothing_more_will_be_parsed(last: bytes) -> None:
    transmission = begin()
    receive(transmission, request(READ) + last + bytes(BUFFER_SIZE - 60))
    assert len(transmission.buffer()) == BUFFER_SIZE


def test_a_failure_with_nothing_before_it_is_raised_at_once() -> None:
    with pytest.raises(ProtocolError):
        receive(begin(), bytes(28))


def test_nothing_is_returned_after_a_client_disconnected() -> None:
    """P93: DISC itself is no request, what follows is ignored, and its offset and length mean nothing."""
    data = request(READ, 1) + request(FUA | DISC, 2, 5, 5) + request(READ, 3) + bytes(28)
    requests, disconnected, failure = receive_three_ways(data)
    assert [each[2] for each in requests] == [1]
    assert disconnected
    assert not failure


def test_a_disconnected_client_may_go_on_sending() -> None:
    transmission = begin()
    receive(transmission, request(DISC))
    for _ in range(3):
        assert receive(transmission, bytes(BUFFER_SIZE)) == []


# Refusals.


def refused(transmission: Transmission, operation: int, offset: int, length: int) -> int:
    """The errno of a refusal, 0 for none; every refusal says why, in one line."""
    refusal = transmission.refusal((0, operation, 0, offset, length))
    if refusal is None:
        return 0
    assert refusal.text.isprintable()
    assert len(refusal.text) > 10
    return refusal.errno


EPERM, EINVAL, ENOSPC = 1, 22, 28


@pytest.mark.parametrize("command", [READ, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS])
@pytest.mark.parametrize("flag", [0, FUA])
def test_a_command_that_is_offered_is_carried_out_with_and_without_fua(command: int, flag: int) -> None:
    """P82, P83: FUA goes with every command."""
    assert refused(begin(), command | flag, 0, 4096) == 0


@pytest.mark.parametrize("command", [DISC, 8, 9, 255, 0xFFFF])
def test_an_unknown_command_is_invalid(command: int) -> None:
    """P82."""
    assert refused(begin(), command, 0, 0) == EINVAL
    assert refused(begin(READ_ONLY), command, SIZE, SIZE) == EINVAL


@pytest.mark.parametrize(
    ("command", "allowed"),
    [
        (READ, FUA | DF),
        (WRITE, FUA),
        (FLUSH, FUA),
        (TRIM, FUA),
        (CACHE, FUA),
        (WRITE_ZEROES, FUA | NO_HOLE | FAST_ZERO),
        (BLOCK_STATUS, FUA | REQ_ONE),
    ],
)
def test_a_flag_is_taken_exactly_where_it_applies(command: int, allowed: int) -> None:
    """P83, P123: all sixteen flags, one by one and together."""
    transmission = begin()
    for bit in range(16, 32):
        expected = 0 if allowed & 1 << bit else EINVAL
        assert refused(transmission, command | 1 << bit, 0, 512) == expected, hex(1 << bit)
    assert refused(transmission, command | allowed, 0, 512) == 0
    assert refused(transmission, command | 0xFFFF0000, 0, 512) == EINVAL


@pytest.mark.parametrize(
    ("operation", "needs"),
    [
        (FLUSH, TransmissionFlag.SEND_FLUSH),
        (TRIM, TransmissionFlag.SEND_TRIM),
        (CACHE, TransmissionFlag.SEND_CACHE),
        (WRITE_ZEROES, TransmissionFlag.SEND_WRITE_ZEROES),
        (WRITE_ZEROES | FAST_ZERO, TransmissionFlag.SEND_FAST_ZERO),
        (READ | FUA, TransmissionFlag.SEND_FUA),
        (WRITE | FUA, TransmissionFlag.SEND_FUA),
        (FLUSH | FUA, TransmissionFlag.SEND_FUA),
    ],
)
def test_what_was_not_advertised_is_invalid(operation: int, needs: TransmissionFlag) -> None:
    """P83: nbdkit 1.32.5 dies of an unadvertised FAST_ZERO."""
    everything = EVERYTHING | TransmissionFlag.SEND_CACHE
    assert refused(begin(everything), operation, 0, 512) == 0
    assert refused(begin(everything & ~needs), operation, 0, 512) == EINVAL


def test_df_needs_structured_replies() -> None:
    """P83, P115."""
    assert refused(begin(structured=True), DF | READ, 0, 512) == 0
    assert refused(begin(structured=False), DF | READ, 0, 512) == EINVAL


def test_block_status_needs_a_selected_context() -> None:
    """P43, P117."""
    assert refused(begin(structured=True), BLOCK_STATUS, 0, 512) == 0
    assert refused(begin(structured=False), BLOCK_STATUS, 0, 512) == EINVAL


@pytest.mark.parametrize("command", [WRITE, TRIM, WRITE_ZEROES])
def test_a_read_only_export_forbids_every_change_before_it_looks_closer(command: int) -> None:
    """P87: read-only comes before flags, and these before bounds."""
    for flags in (READ_ONLY, EVERYTHING | TransmissionFlag.READ_ONLY):
        assert refused(begin(flags), command, 0, 512) == EPERM
        assert refused(begin(flags), command | 0xFFFF0000, 0, 512) == EPERM
        assert refused(begin(flags), command, SIZE, 2**32 - 1) == EPERM
    assert refused(begin(), command | 0xFFFF0000, SIZE, 512) == EINVAL


@pytest.mark.parametrize("command", [READ, FLUSH, CACHE, BLOCK_STATUS])
def test_a_read_only_export_still_takes_what_changes_nothing(command: int) -> None:
    """P70."""
    assert refused(begin(READ_ONLY), command, 0, 512) == 0


@pytest.mark.parametrize(
    ("command", "beyond"),
    [(READ, EINVAL), (WRITE, ENOSPC), (TRIM, EINVAL), (CACHE, EINVAL), (WRITE_ZEROES, ENOSPC), (BLOCK_STATUS, EINVAL)],
)
def test_no_request_reaches_past_the_end(command: int, beyond: int) -> None:
    """P87: in more than 64 bits, so that nothing wraps around."""
    transmission = begin()
    for offset, length in [(0, 1), (SIZE - 1, 1), (SIZE - 4096, 4096)]:
        assert refused(transmission, command, offset, length) == 0
    for offset, length in [
        (SIZE, 1),
        (SIZE - 1, 2),
        (SIZE - 4096, 4097),
        (2**32, 1),
        (2**63, 1),
        (2**64 - 1, 1),
        (2**64 - 512, 1024),
        (2**64 - 1, 2**32 - 1),
    ]:
        assert refused(transmission, command, offset, length) == beyond, (offset, length)


def test_flush_has_neither_offset_nor_length() -> None:
    """P91: both kinds of clients are out there."""
    assert refused(begin(), FLUSH, 2**64 - 1, 2**32 - 1) == 0


@pytest.mark.parametrize(
    ("command", "expected"),
    [(READ, 0), (WRITE, 0), (TRIM, 0), (CACHE, 0), (WRITE_ZEROES, 0), (FLUSH, 0), (BLOCK_STATUS, EINVAL)],
)
def test_a_length_of_zero_succeeds_but_has_no_status(command: int, expected: int) -> None:
    """P86, W4."""
    assert refused(begin(), command, 0, 0) == expected
    assert refused(begin(), command, SIZE, 0) == expected
    assert refused(begin(size=0), command, 0, 0) == expected


def test_payloads_are_limited_and_other_lengths_are_not() -> None:
    """P85, P96, P97, P128, W4."""
    transmission = begin(size=2**40)
    for command in (READ, WRITE):
        assert refused(transmission, command, 0, 32 * MIB) == 0
        assert refused(transmission, command, 0, 32 * MIB + 1) == EINVAL
    for command in (TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS):
        assert refused(transmission, command, 0, 2**32 - 1) == 0


@pytest.mark.parametrize("command", [READ, WRITE, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS])
def test_a_request_that_is_not_aligned_to_the_minimum_block_is_invalid(command: int) -> None:
    """P88."""
    transmission = begin(minimum_block=512)
    assert refused(transmission, command, 512, 1024) == 0
    for offset, length in [(1, 512), (512, 513), (511, 1), (256, 256)]:
        assert refused(transmission, command, offset, length) == EINVAL
    assert refused(transmission, FLUSH, 1, 1) == 0


def test_a_refused_flag_is_named() -> None:
    for operation, name in [(DF | WRITE, "DF"), (FAST_ZERO | FUA | READ, "FAST_ZERO"), (1 << 31 | READ, "0x8000")]:
        refusal = begin().refusal((0, operation, 0, 0, 512))
        assert refusal is not None
        assert name in refusal.text

"""Random and mutated streams: replies or a ProtocolError, nothing else, and the same for every split of the input.

Every failure names its seed.
"""

import random
import tracemalloc
from collections.abc import Iterator

import pytest

from nbdq.nbd.handshake import Handshake
from tests.nbd import test_transmission, wire
from tests.nbd.wire import EXPORTS, info, meta, option, request, shake, text, u32

SEEDS = range(30)
CASES = 20


def cut(data: bytes, chance: random.Random) -> Iterator[bytes]:
    """``data`` in random pieces, at a random scale, a few thousand at most."""
    most = max(chance.choice([1, 3, 40, 300, 5000, 100_000]), len(data) // 1000)
    position = 0
    while position < len(data):
        length = chance.randint(1, most)
        yield data[position : position + length]
        position += length


def mutate(data: bytes, chance: random.Random) -> bytes:
    """A few bytes or pieces of ``data`` changed, dropped, doubled or swapped for numbers at a limit."""
    changed = bytearray(data)
    for _ in range(chance.randrange(4)):
        at = chance.randrange(len(changed) + 1)
        match chance.randrange(5):
            case 0:
                changed[at : at + 1] = chance.randbytes(1)
            case 1:
                del changed[at : at + chance.randrange(20)]
            case 2:
                changed[at:at] = changed[at : at + chance.randrange(60)]
            case 3:
                changed[at : at + 4] = u32(chance.choice([0, 1, 4095, 4096, 4097, 65536, 1 << 20, 2**31, 2**32 - 1]))
            case 4:
                changed[at:at] = chance.randbytes(chance.randrange(50))
    return bytes(changed)


def conversation(chance: random.Random) -> bytes:
    """Options that a client could send, in any order."""
    names = ["", "disk", "a/other", "nope", "n" * 4096, "é" * 2048]
    queries = ["base:", "base:allocation", "qemu:", "qemu:dirty-bitmap:b1", "x", ":", "q" * 4096]

    def one() -> bytes:
        name = chance.choice(names)
        match chance.randrange(7):
            case 0:
                return option(chance.randrange(13), chance.randbytes(chance.choice([0, 0, 0, 1, 30])))
            case 1:
                return info(6, name, *chance.choices(range(5), k=chance.randrange(4)))
            case 2:
                return info(7, name, *chance.choices(range(5), k=chance.randrange(4)))
            case 3:
                return meta(chance.choice([9, 10]), name, *chance.choices(queries, k=chance.randrange(4)))
            case 4:
                return option(8)
            case 5:
                return option(chance.choice([9, 10]), text(name) + chance.randbytes(chance.randrange(20)))
            case _:
                return option(chance.choice([3, 3, 5, 99]), bytes(chance.choice([0] * 9 + [65536, 65537, 1 << 17])))

    flags = chance.choice([b"\0\0\0\3"] * 6 + [b"\0\0\0\1", b"\0\0\0\0", b"\0\0\0\7"])
    return flags + b"".join(one() for _ in range(chance.randrange(1, 12)))


@pytest.mark.parametrize("seed", SEEDS)
def test_no_conversation_breaks_the_handshake_however_it_is_cut(seed: int) -> None:
    chance = random.Random(f"handshake {seed}")
    for case in range(CASES):
        data = conversation(chance)
        if case % 3:
            data = mutate(data, chance)
        whole = shake([data])
        for _ in range(2):
            assert shake(cut(data, chance)) == whole, f"seed {seed}, case {case}"
        assert whole.reason.isprintable()
        assert not (whole.finished and whole.negotiated)
        for answer in whole.replies[: -1 if whole.negotiated else None]:
            assert answer.startswith(b"\x00\x03\xe8\x89\x04\x55\x65\xa9"), f"seed {seed}, case {case}"
            assert len(answer) == 20 + int.from_bytes(answer[16:20], "big"), f"seed {seed}, case {case}"


@pytest.mark.parametrize("seed", SEEDS[:20])
def test_noise_never_gets_through_the_handshake(seed: int) -> None:
    chance = random.Random(f"noise {seed}")
    for prefix in (b"", b"\0\0\0\3", b"\0\0\0\3IHAVEOPT", b"\0\0\0\3IHAVEOPT\0\0\0\7\0\0\0\x20"):
        data = prefix + chance.randbytes(chance.choice([1, 20, 100, 5000]))
        whole = shake([data])
        assert whole.negotiated is None, f"seed {seed}"
        assert shake(cut(data, chance)) == whole, f"seed {seed}"


def test_no_option_makes_the_handshake_hold_more_than_the_option_itself() -> None:
    """P25, R-05: the worst that fits, sent as slowly as one likes."""
    worst = [
        option(9, text("disk") + u32(64) + text("q" * 4096) * 15),
        option(7, text("n" * 4096) + b"\x7f\xff" + b"\0\3" * 29000),
        option(3, bytes(1 << 20)),
        option(99, bytes(65536)),
    ]
    handshake = Handshake(EXPORTS)
    handshake.receive(wire.NO_ZEROES)
    tracemalloc.start()
    for data in worst:
        for start in range(0, len(data), 4096):
            handshake.receive(data[start : start + 4096])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 512 << 10


def requests(chance: random.Random) -> bytes:
    """Requests that a client could send, writes with their payload."""

    def one() -> bytes:
        operation = chance.choice([0, 0, 0, 0, 1, 1, 3, 4, 5, 6, 7, 8, 0x00040000, 0x00010001, 0xFFFF0007])
        length = chance.choice([0, 1, 512, 4096, 70_000]) if operation & 0xFFFF == 1 else chance.randrange(1 << 32)
        header = request(operation, chance.getrandbits(64), chance.getrandbits(64), length)
        return header + (chance.randbytes(length) if operation & 0xFFFF == 1 else b"")

    stream = b"".join(one() for _ in range(chance.randrange(1, 60)))
    if not chance.randrange(4):
        stream += request(2) + chance.randbytes(100)
    return stream


def expected(data: bytes) -> tuple[list[tuple[int, int, int, int, int]], bool, bool]:
    """The requests of a stream, whether it disconnects and whether it loses sync: the slow and obvious way."""
    found = []
    while len(data) >= 28:
        header = data[:28]
        fields = [int.from_bytes(header[a:b], "big") for a, b in [(0, 4), (4, 8), (8, 16), (16, 24), (24, 28)]]
        command, length = fields[1] & 0xFFFF, fields[4]
        if fields[0] != 0x25609513 or (command == 1 and length > 64 << 20):
            return found, False, True
        if command == 2:
            return found, True, False
        end = 28 + (length if command == 1 else 0)
        if len(data) < end:
            break  # a WRITE whose payload has not come
        found.append((fields[0], fields[1], fields[2], fields[3], fields[4]))
        data = data[end:]
    return found, False, False


@pytest.mark.parametrize("seed", SEEDS)
def test_every_request_of_a_stream_is_found_however_it_is_cut(seed: int) -> None:
    chance = random.Random(f"transmission {seed}")
    for case in range(CASES):
        data = requests(chance)
        if case % 3 == 2:
            data = mutate(data, chance)
        found, disconnected, failed = expected(data)
        for pieces in ([data], cut(data, chance)):
            got = test_transmission.receive_in(pieces)
            assert (got[0], got[1], bool(got[2])) == (found, disconnected, failed), f"seed {seed}, case {case}"


@pytest.mark.parametrize("seed", SEEDS[:20])
def test_a_random_request_is_refused_or_lies_inside_the_export(seed: int) -> None:
    """P83, P87: and nothing is raised."""
    chance = random.Random(f"refusal {seed}")
    transmission = test_transmission.begin(size=1 << 30)
    edges = [0, 1, 511, 512, 1 << 20, (1 << 30) - 1, 1 << 30, (1 << 30) + 1, 1 << 32, 1 << 63, (1 << 64) - 1]
    for _ in range(1000):
        operation = chance.choice([chance.getrandbits(32), chance.randrange(10), 1 << chance.randrange(32)])
        offset = chance.choice([*edges, chance.getrandbits(64)])
        length = min(chance.choice([*edges, chance.getrandbits(32)]), (1 << 32) - 1)
        refusal = transmission.refusal((0, operation, 0, offset, length))
        shown = f"seed {seed}: {operation:#x} {offset} {length}"
        if refusal is None:
            assert operation & 0xFFFF in (0, 1, 3, 4, 5, 6, 7), shown
            assert operation & 0xFFFF == 3 or offset + length <= 1 << 30, shown
            assert operation & 0xFFFF > 1 or length <= 32 << 20, shown
        else:
            assert refusal.errno in (22, 28), shown

"""Cases to begin with: what honest clients say, and what the random tests of the parsers make of it."""

import random
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.oracle import HANDSHAKES, MODES, NEGOTIATED
from tests.nbd.test_fuzz import conversation, mutate, requests
from tests.nbd.wire import u32
from tests.server import client

#: Cases that a run by coverage has found worth keeping, one a line, in hexadecimal.
CORPUS = Path(__file__).parent / "corpus.txt"
#: Strings that are hard to find by chance.
DICTIONARY = (
    *(b"IHAVEOPT", b"disk", b"a/other", b"base:allocation", b"qemu:", b"qemu:allocation-depth", b"qemu:dirty-bitmap:"),
    *(b"\x25\x60\x95\x13", b"\x21\xe4\x1c\x71", b"\x00\x00\x00\x03", b"\x00\x20\x00\x07", b"\x00\x20\x00\x01"),
)


def kept() -> list[bytes]:
    """The cases of the corpus."""
    return [bytes.fromhex(line) for line in CORPUS.read_text().split()]


def made(seed: int, count: int) -> Iterator[bytes]:
    """``count`` random cases for each mode, a third of them honest."""
    chance = random.Random(f"seeds {seed}")
    for number in range(count):
        for mode in range(MODES):
            prefix = bytes((mode,)) + chance.randbytes(2)
            if mode < len(HANDSHAKES):
                data = conversation(chance)
                if chance.randrange(2):
                    data += client.option(11) + client.handshake("disk", extended=True)[4:]
            else:
                negotiated = NEGOTIATED[mode - len(HANDSHAKES)]
                data = _requests(chance) if negotiated.extended else requests(chance)
                if not chance.randrange(4):
                    length = (64 << 20) + chance.randrange(2)  # the limit, and one more
                    data += client.request(client.WRITE, length=length, extended=negotiated.extended)
            yield prefix + (mutate(data, chance) if number % 3 else data)


def _requests(chance: random.Random) -> bytes:
    """Requests with extended headers, those of WRITE and some others with a payload."""
    stream = b""
    for _ in range(chance.randrange(1, 20)):
        command = chance.choice([0, 1, 3, 4, 5, 6, 7, 7, 8])
        flags = chance.choice([0, 1, 8, 32, 33])
        if command == 7 and flags & 32:
            ids = chance.choice([(0,), (1,), (0, 1), (1, 1), (2,), ()])
            payload = client.status_payload(chance.choice([0, 512, 1 << 20, 1 << 33]), *ids)
        elif command == 1 or flags & 32:
            payload = chance.randbytes(chance.choice([0, 1, 512, 600]))
        else:
            payload = b""
        length = len(payload) or chance.choice([0, 512, 4096, 1 << 20, 1 << 40])
        if command == 1 or flags & 32:
            length = len(payload)
        offset = chance.choice([0, 512, 513, (1 << 20) - 512, 1 << 63])
        stream += client.request(command, chance.getrandbits(64), offset, length, flags=flags, extended=True) + payload
    return stream + (u32(0) if not chance.randrange(5) else b"")

"""A client with extended headers from the handshake to the disk (P122-P124), and the contexts of one request (P120)."""

import random
import struct
from collections.abc import Iterator

import numpy as np
import pytest

from nbdq.server.exports.export import Export
from tests.server.client import (
    BLOCK_STATUS,
    DISC,
    EINVAL,
    EXTENDED_HEADERS,
    FLUSH,
    FUA,
    NO_ZEROES,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Client,
    Disconnected,
    option,
    request,
    status_payload,
)
from tests.server.conftest import CONTENT
from tests.server.harness import FragmentedDisk, LoopServer, WritableDisk

M = 1 << 20


class Bitmap:
    """Clean, but for every ``step``-th page."""

    def __init__(self, step: int) -> None:
        self.step = step

    def ranges(self, offset: int, length: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        starts = np.arange(offset, offset + length, 4096, dtype=np.uint64)
        yield starts, (starts // np.uint64(4096) % np.uint64(self.step) == 0).astype(np.uint8), offset + length


@pytest.fixture(params=[True, False], ids=["inline", "pool"])
def disk(request: pytest.FixtureRequest) -> WritableDisk:
    return WritableDisk(CONTENT, cached=bool(request.param))


@pytest.fixture
def server(loop: str, disk: WritableDisk) -> Iterator[LoopServer]:
    bitmaps = {"b2": Bitmap(2), "b3": Bitmap(3)}
    with LoopServer(Export.writable("", disk, allocation_depth=True, bitmaps=bitmaps), loop=loop) as running:
        yield running


ALL = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b2", "qemu:dirty-bitmap:b3")


def test_a_disk_is_read_and_changed_as_with_compact_headers(server: LoopServer, disk: WritableDisk) -> None:
    seed = 11
    chance = random.Random(seed)
    expected = bytearray(CONTENT)
    client = server.connect().go(extended=True)
    for turn in range(150):
        command = chance.choice((READ, READ, WRITE, WRITE, WRITE_ZEROES, TRIM, FLUSH))
        length = chance.choice((1, 512, 4096, 100_000, 600_000))
        offset = chance.randrange(len(expected) - length)
        payload = chance.randbytes(length) if command == WRITE else b""
        reply = client.ask(command, offset, length, flags=chance.choice((0, FUA)), payload=payload)
        assert not reply.error, (seed, turn)
        if command == READ:
            assert reply.data == expected[offset : offset + length], (seed, turn)
        elif command != FLUSH:
            expected[offset : offset + length] = payload or bytes(length)
    assert bytes(disk.content) == expected


def test_hundreds_of_writes_and_reads_in_one_send_are_each_answered(server: LoopServer, disk: WritableDisk) -> None:
    client = server.connect().go(extended=True)
    said = b""
    for number in range(300):
        said += client.pack(WRITE, 8192 * number, 4096) + bytes([number & 255]) * 4096 + client.pack(READ, 4096, 512)
    client.send_beside(said)
    assert all(not reply.error for reply in client.replies().values())
    assert all(disk.content[8192 * number + 4095] == number & 255 for number in range(300))


def test_a_write_without_the_flag_of_a_payload_is_carried_out(server: LoopServer, disk: WritableDisk) -> None:
    """P123: as newest QEMU does."""
    client = server.connect().go(extended=True)
    client.socket.sendall(request(WRITE, 5, 4096, 6, extended=True) + b"honest")
    magic, flags, kind, cookie, offset, length = struct.unpack(">IHHQQQ", client.receive(32))
    assert (magic, flags, kind, cookie, offset, length) == (0x6E8A278C, 1, 0, 5, 4096, 0)
    assert client.read(4096, 6) == b"honest"


def test_a_payload_that_never_ends_changes_nothing(server: LoopServer, disk: WritableDisk) -> None:
    """R-71."""
    with server.connect().go(extended=True) as client:
        client.socket.sendall(client.pack(WRITE, 0, M) + b"x" * (M - 1))
    server.wait_until_idle()
    assert not disk.changes


def test_who_is_done_with_extended_headers_says_so_in_them(server: LoopServer) -> None:
    client = server.connect().go(extended=True)
    client.send(DISC)
    assert client.is_closed()


def test_compact_requests_end_such_a_connection(server: LoopServer) -> None:
    client = server.connect().go(extended=True)
    client.socket.sendall(client.pack(READ, 0, 512) + request(READ, 1, 0, 512) + bytes(4))
    assert client.reply().data == CONTENT[:512]
    assert client.is_closed()


def test_export_name_after_extended_headers_closes(server: LoopServer) -> None:
    """P30."""
    client = server.connect()
    client.socket.sendall(struct.pack(">I", NO_ZEROES | 1) + option(EXTENDED_HEADERS) + option(1))
    client.hello()
    assert client.option_reply()[:2] == (EXTENDED_HEADERS, 1)
    with pytest.raises(Disconnected):
        client.option_reply()


# Contexts.


@pytest.mark.parametrize("extended", [False, True], ids=["compact", "extended"])
def test_several_bitmaps_and_other_contexts_come_in_one_answer(server: LoopServer, extended: bool) -> None:
    """P44, P48, P117."""
    client = server.connect().go(extended=extended, contexts=(*ALL, ALL[2], "qemu:dirty-bitmap:", "base:"))
    assert client.contexts == {name: number for number, name in enumerate(ALL)}
    status = client.ask(BLOCK_STATUS, 0, 24 << 10).status
    assert status == {
        0: [(24 << 10, 0)],
        1: [(24 << 10, 1)],
        2: [(4096, 1), (4096, 0)] * 3,
        3: [(4096, 1), (8192, 0)] * 2,
    }


def test_a_payload_chooses_among_the_contexts(server: LoopServer) -> None:
    """P120."""
    client = server.connect().go(extended=True, contexts=ALL)
    assert client.flags & 1 << 12
    whole = client.ask(BLOCK_STATUS, 4096, M).status
    for chosen in [(2,), (3, 0), (0, 1, 2, 3), (3, 2, 1, 0)]:
        assert client.status_of(4096, M, *chosen) == {number: whole[number] for number in chosen}
    assert client.status_of(4096, M, 2, flags=REQ_ONE | FUA) == {2: [(4096, 0)]}


@pytest.mark.parametrize(
    "payload", [status_payload(512), status_payload(512, 4), status_payload(512, 1, 1), b"abc", b""]
)
def test_a_wrong_choice_is_an_error_and_sync_is_kept(server: LoopServer, payload: bytes) -> None:
    client = server.connect().go(extended=True, contexts=ALL)
    client._outstanding[77] = (BLOCK_STATUS, 0, len(payload), 0)
    client.socket.sendall(request(BLOCK_STATUS, 77, 0, len(payload), flags=PAYLOAD_LEN, extended=True) + payload)
    reply = client.reply()
    assert reply.error == EINVAL
    assert reply.message
    assert client.read(0, 512) == CONTENT[:512]


def test_compact_clients_and_those_without_contexts_may_not_choose(server: LoopServer) -> None:
    """P120, P123."""
    compact = server.connect().go(contexts=ALL)
    assert not compact.flags & 1 << 12
    assert compact.error(BLOCK_STATUS, 0, 512, flags=PAYLOAD_LEN) == EINVAL
    without = server.connect().go(extended=True)
    assert not without.flags & 1 << 12
    assert without.error(BLOCK_STATUS, 0, 12, flags=PAYLOAD_LEN, payload=status_payload(512, 0)) == EINVAL
    assert without.read(0, 512) == compact.read(0, 512)


def test_an_answer_has_a_bounded_number_of_extents(loop: str) -> None:
    with LoopServer(Export.read_only("", FragmentedDisk(1 << 40)), loop=loop) as server:
        client: Client = server.connect().go(extended=True, contexts=("base:allocation",))
        (extents,) = client.ask(BLOCK_STATUS, 0, 256 * M).status.values()
        assert len(extents) == 65536
        assert sum(length for length, _ in extents) == 32 * M

"""Writes through a live server: what is acknowledged is on the disk, what was torn is not, what was flushed survives.

The paths: carried out on the loop thread from the receive buffer, from memory of their own, or in the pool.
"""

import errno
import random
import socket
import struct
from collections.abc import Iterator

import pytest

from nbdq.server.exports.export import Export
from tests.server.client import (
    BLOCK_STATUS,
    CACHE,
    EINVAL,
    EIO,
    ENOSPC,
    EPERM,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Client,
    request,
    reset,
)
from tests.server.conftest import CONTENT
from tests.server.harness import LoopServer, MemoryDisk, WritableDisk

ENOTSUP = 95
SIZE = len(CONTENT)
KIB, MIB = 1 << 10, 1 << 20
KINDS = pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])


@pytest.fixture(params=["cached", "uncached"])
def disk(request: pytest.FixtureRequest) -> WritableDisk:
    """Written on the loop thread, or in the pool."""
    return WritableDisk(CONTENT, cached=request.param == "cached")


@pytest.fixture
def server(loop: str, disk: WritableDisk) -> Iterator[LoopServer]:
    with LoopServer(Export.writable("", disk), loop=loop) as running:
        yield running


@pytest.fixture(params=["simple", "structured"])
def client(request: pytest.FixtureRequest, server: LoopServer) -> Client:
    return server.connect().go(structured=request.param == "structured")


def noise(length: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(length)


# What is written.


@pytest.mark.parametrize("length", [1, 511, 512, 4096, 65_536, 128 * KIB, 256 * KIB - 28, 256 * KIB, 300_000, 3 * MIB])
def test_what_is_written_is_read_back_and_its_neighbours_stay(client: Client, disk: WritableDisk, length: int) -> None:
    expected = bytearray(CONTENT)
    for number, offset in enumerate((0, 4096, SIZE - length, 77)):
        payload = noise(length, number)
        assert client.error(WRITE, offset, length, payload=payload) == 0
        expected[offset : offset + length] = payload
        assert client.read(offset, length) == payload
    assert disk.content == expected


def test_a_write_of_32_mib_is_taken_and_one_of_more_is_refused_with_its_payload(loop: str) -> None:
    """P85, P84."""
    disk = WritableDisk(bytes(65 * MIB))
    with LoopServer(Export.writable("", disk), loop=loop) as server:
        client = server.connect().go()
        payload = noise(32 * MIB, 1)
        assert client.error(WRITE, MIB, 32 * MIB, payload=payload) == 0
        assert disk.content[MIB : 33 * MIB] == payload
        assert client.error(WRITE, 0, 32 * MIB + 1, payload=bytes(32 * MIB + 1)) == EINVAL
        assert client.read(0, 512) == bytes(512)


@pytest.mark.parametrize("length", [100, 4096, 60_000, 200_000, 400_000])
def test_many_writes_on_their_way_at_once_all_arrive(client: Client, disk: WritableDisk, length: int) -> None:
    count = min(SIZE // length, 300)
    order = list(range(count))
    random.Random(length).shuffle(order)
    said = b"".join(client.pack(WRITE, i * length, length) + noise(length, i) for i in order)
    client.send_beside(said + client.pack(READ, 0, 512))
    assert all(reply.error == 0 for reply in client.replies().values())
    assert bytes(disk.content[: count * length]) == b"".join(noise(length, i) for i in range(count))


@KINDS
def test_a_write_torn_into_single_bytes_is_a_write(server: LoopServer, disk: WritableDisk, structured: bool) -> None:
    client = server.connect().go(structured=structured)
    payload = noise(600, 3)
    for byte in client.pack(WRITE, 1000, 600) + payload + client.pack(READ, 900, 800):
        client.socket.sendall(bytes([byte]))
    client.replies()
    assert disk.content[1000:1600] == payload
    assert client.read(900, 800) == CONTENT[900:1000] + payload + CONTENT[1600:1700]


def test_random_requests_of_many_kinds_leave_the_disk_as_they_say(client: Client, disk: WritableDisk) -> None:
    seed = 31
    chance = random.Random(seed)
    expected = bytearray(CONTENT)
    for _ in range(30):
        said, reads = b"", {}
        area = SIZE // 16
        for base in chance.sample(range(0, SIZE, area), 16):  # apart, for their order is free (P89)
            length = chance.choice((1, 512, 4096, 5000, 70_000, 200_000))
            offset = base + chance.randrange(area - length)
            command = chance.choice((WRITE, WRITE, WRITE, WRITE_ZEROES, TRIM, READ, CACHE, FLUSH))
            flags = chance.choice((0, 0, FUA))
            payload = chance.randbytes(length) if command == WRITE else b""
            header = client.pack(command, offset, length, flags=flags)
            said += header + payload
            if command == READ:
                reads[int.from_bytes(header[8:16], "big")] = bytes(expected[offset : offset + length])
            elif command in (WRITE, WRITE_ZEROES, TRIM):
                expected[offset : offset + length] = payload or bytes(length)
        client.send_beside(said)
        for cookie, reply in client.replies().items():
            assert reply.error == 0
            assert reply.data == reads.get(cookie, b"")
        assert disk.content == expected, f"seed {seed}"


def test_other_clients_receiving_meanwhile_do_not_disturb_payloads_that_wait(loop: str) -> None:
    """The receive buffer is shared; what waits behind a full pool or a slow reader is copied out of it."""
    disk = WritableDisk(CONTENT, cached=False)
    with LoopServer(Export.writable("", disk), loop=loop) as server:
        first, second = server.connect().go(), server.connect().go()
        with disk.blocked():
            first.socket.sendall(b"".join(first.pack(WRITE, n * 512, 512) + noise(512, n) for n in range(300)))
            server.wait_for(lambda: server.waiting_for_pool == 1, "writes in the pool")
            disk.wait_for_request()
            second.send_beside(b"".join(second.pack(CACHE, 0, 0) for _ in range(5000)))
            assert len(second.replies()) == 5000
        assert all(reply.error == 0 for reply in first.replies().values())
    assert bytes(disk.content[: 300 * 512]) == b"".join(noise(512, n) for n in range(300))


def test_memory_of_a_payload_that_waits_in_the_pool_is_not_used_for_another(loop: str) -> None:
    disk = WritableDisk(CONTENT, cached=False)
    with LoopServer(Export.writable("", disk), loop=loop) as server:
        client = server.connect().go()

        def write_in_pieces(offset: int, payload: bytes) -> None:
            reserved = server.reserved
            client.socket.sendall(client.pack(WRITE, offset, len(payload)) + payload[:100])
            server.wait_for(lambda: server.reserved > reserved, "memory for the payload")
            client.socket.sendall(payload[100:])

        with disk.blocked():
            write_in_pieces(0, noise(200_000, 1))
            disk.wait_for_request()
            disk.cached = True
            for number in range(2, 5):
                write_in_pieces(1 * MIB, noise(1000, number))
                assert client.reply().error == 0
                write_in_pieces(2 * MIB, noise(200_000, number))
                assert client.reply().error == 0
                assert disk.content[2 * MIB :][:200_000] == noise(200_000, number)
        assert client.reply().error == 0
        assert disk.content[:200_000] == noise(200_000, 1)


def test_zeroes_and_trims_change_their_range_only(client: Client, disk: WritableDisk) -> None:
    """P95, P96."""
    assert client.error(WRITE_ZEROES, 1000, 5000) == 0
    assert client.error(WRITE_ZEROES, 10_000, 5000, flags=NO_HOLE) == 0
    assert client.error(WRITE_ZEROES, 20_000, 5000, flags=FAST_ZERO | FUA) == 0
    assert client.error(TRIM, 30_000, 5000) == 0
    assert disk.changes == [(name, n, 5000) for name, n in
        (("zero", 1000), ("zero", 10_000), ("zero", 20_000), ("discard", 30_000))]  # fmt: skip
    assert disk.unmapped == [True, False, True]
    assert client.read(0, 7000) == CONTENT[:1000] + bytes(5000) + CONTENT[6000:7000]


# What is refused, and what fails.


@pytest.mark.parametrize(
    ("command", "flags", "offset", "length", "expected"),
    [
        (WRITE, 0, SIZE, 512, ENOSPC),
        (WRITE, 0, SIZE - 511, 512, ENOSPC),
        (WRITE, 0, (1 << 64) - 512, 512, ENOSPC),
        (WRITE, 0, SIZE, 400_000, ENOSPC),
        (WRITE, NO_HOLE, 0, 512, EINVAL),
        (WRITE, 0x8000, 0, 400_000, EINVAL),
        (WRITE, 0, 0, 0, 0),
        (WRITE, FUA, SIZE, 0, 0),
        (WRITE_ZEROES, 0, SIZE - 1, 2, ENOSPC),
        (WRITE_ZEROES, 0, 0, (1 << 32) - 1, ENOSPC),
        (WRITE_ZEROES, 0x20, 0, 512, EINVAL),
        (WRITE_ZEROES, 0, 0, 0, 0),
        (TRIM, 0, SIZE, 1, EINVAL),
        (TRIM, NO_HOLE, 0, 512, EINVAL),
        (TRIM, 0, 0, 0, 0),
    ],
)
def test_what_is_refused_changes_nothing_and_the_connection_lives(
    client: Client, disk: WritableDisk, command: int, flags: int, offset: int, length: int, expected: int
) -> None:
    """P84, P86, P87."""
    payload = bytes(length) if command == WRITE else b""
    assert client.error(command, offset, length, flags=flags, payload=payload) == expected
    assert disk.content == CONTENT
    assert not disk.changes
    assert client.read(4096, 512) == CONTENT[4096:4608]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, ENOSPC),
        (errno.EDQUOT, ENOSPC),
        (errno.EROFS, EPERM),
        (errno.EPERM, EPERM),
        (errno.EINVAL, EINVAL),
        (errno.EOPNOTSUPP, EINVAL),
        (errno.EIO, EIO),
        (errno.ENOMEM, EIO),
    ],
)
def test_a_failure_of_the_disk_is_an_answer_without_paths(
    client: Client, disk: WritableDisk, number: int, expected: int
) -> None:
    """P98, P121."""
    disk.errors = dict.fromkeys(("write_cached", "write", "zero", "discard"), number)
    for command, length, flags in (
        (WRITE, 512, 0),
        (WRITE, 512, FUA),
        (WRITE, 700_000, 0),
        (WRITE_ZEROES, 512, 0),
        (TRIM, 512, 0),
        (TRIM, 512, FUA),
    ):
        reply = client.ask(command, 0, length, flags=flags, payload=bytes(length) if command == WRITE else b"")
        assert reply.error == expected
        assert "secret" not in reply.message
    assert disk.flushes == 0
    assert disk.content == CONTENT
    disk.errors = {}
    assert client.error(WRITE, 0, 512, payload=bytes(512)) == 0


def test_a_zeroing_that_cannot_be_fast_is_not_supported_and_changes_nothing(client: Client, disk: WritableDisk) -> None:
    """P96: ENOTSUP is for FAST_ZERO only."""
    disk.errors = {"fast zero": errno.EOPNOTSUPP}
    assert client.error(WRITE_ZEROES, 0, 4096, flags=FAST_ZERO) == ENOTSUP
    assert disk.content == CONTENT
    assert client.error(WRITE_ZEROES, 0, 4096) == 0
    assert client.read(0, 4096) == bytes(4096)


def test_a_bug_in_the_pool_is_an_answer(loop: str) -> None:
    class Broken(WritableDisk):
        def write(self, offset: int, view: memoryview) -> None:
            raise ZeroDivisionError

    with LoopServer(Export.writable("", Broken(CONTENT, cached=False)), loop=loop) as server:
        client = server.connect().go()
        assert client.error(WRITE, 0, 512, payload=bytes(512)) == EIO
        assert client.error(FLUSH) == 0
        assert "ZeroDivisionError" in server.errors.pop()


def test_read_only_and_writable_exports_stand_side_by_side(loop: str) -> None:
    """1.6, P70, P90."""
    fixed, changing = MemoryDisk(CONTENT), WritableDisk(CONTENT)
    with LoopServer(Export.read_only("fixed", fixed), Export.writable("", changing), loop=loop) as server:
        reader, writer = server.connect().go("fixed"), server.connect().go()
        assert reader.flags == 0x58F
        assert writer.flags == 0xDED
        assert reader.error(WRITE, 0, 512, payload=bytes(512)) == EPERM
        assert reader.error(WRITE, 0, MIB, payload=bytes(MIB)) == EPERM
        assert writer.error(WRITE, 0, 512, payload=bytes(512)) == 0
        assert reader.error(FLUSH) == 0
        assert changing.flushes == 0
        assert reader.read(0, 512) == CONTENT[:512]
        assert server.connect().go().read(0, 512) == bytes(512)


def test_the_size_of_replies_to_reads_and_writes_between_each_other_is_right(client: Client) -> None:
    said = b""
    for number in range(400):
        said += client.pack(WRITE, number * 100, 50) + noise(50, number) + client.pack(READ, 100_000 + number, 333)
        if client.structured and number % 100 == 0:
            said += client.pack(BLOCK_STATUS, 0, 512)  # refused: no context was selected
    client.send_beside(said)
    errors = [reply.error for reply in client.replies().values()]
    assert set(errors) <= {0, EINVAL}


# Connections that end within a payload.


@pytest.mark.parametrize("length", [600, 300_000])
def test_a_write_whose_payload_does_not_come_as_a_whole_is_not_done(loop: str, disk: WritableDisk, length: int) -> None:
    """R-71."""
    with LoopServer(Export.writable("", disk), loop=loop, tcp=True) as server:
        said = request(WRITE, 1, 4096, length) + noise(length, 1)
        for cut in (28, 29, 100, len(said) // 2, len(said) - 1):
            for leave in ("close", "reset", "shut down"):
                client = Client(server.address).go()
                client.socket.sendall(said[:cut])
                if leave == "shut down":
                    client.socket.shutdown(socket.SHUT_WR)
                    assert client.is_closed()
                if leave == "reset":
                    reset(client.socket)
                client.socket.close()
        server.wait_until_idle()
        assert disk.content == CONTENT
        assert server.connect().go().error(WRITE, 4096, length, payload=noise(length, 1)) == 0
    assert not disk.changes[1:]


def test_what_came_before_a_torn_write_is_done_and_answered(server: LoopServer, disk: WritableDisk) -> None:
    client = server.connect().go()
    client.socket.sendall(client.pack(WRITE, 0, 512) + bytes(512) + request(WRITE, 1, 4096, MIB) + bytes(1000))
    client.socket.shutdown(socket.SHUT_WR)
    assert client.reply().error == 0
    assert client.is_closed()
    assert disk.content[:8192] == bytes(512) + CONTENT[512:8192]


# Order.


def test_overlapping_writes_of_one_client_happen_in_the_order_in_which_they_came(loop: str) -> None:
    """P89 asks for none of it, but a client that expects it is not disappointed."""
    disk = WritableDisk(CONTENT, cached=False)
    with LoopServer(Export.writable("", disk), loop=loop) as server:
        client = server.connect().go()
        with disk.blocked():
            client.socket.sendall(client.pack(WRITE, 1000, 1000) + b"a" * 1000)
            disk.wait_for_request()
            disk.cached = True
            client.socket.sendall(client.pack(WRITE, 1500, 1000) + b"b" * 1000)
            client.socket.sendall(client.pack(WRITE_ZEROES, 1900, 200) + client.pack(WRITE, 2099, 1) + b"c")
        assert all(reply.error == 0 for reply in client.replies().values())
        assert disk.content[1000:2500] == b"a" * 500 + b"b" * 400 + bytes(199) + b"c" + b"b" * 400


def test_writes_beside_one_that_waits_do_not_wait(loop: str) -> None:
    disk = WritableDisk(CONTENT, cached=False)
    with LoopServer(Export.writable("", disk), loop=loop) as server:
        client = server.connect().go()
        with disk.blocked():
            waiting = client.send(WRITE, 1000, 1000, payload=b"a" * 1000)
            disk.wait_for_request()
            disk.cached = True
            for offset in (0, 2000, 999_999):
                cookie = client.send(WRITE, offset, 1000, payload=b"b" * 1000)
                assert client.reply().cookie == cookie
        assert client.reply().cookie == waiting


def test_a_stop_loses_no_write_that_was_accepted(loop: str) -> None:
    """P99, R-76."""
    disk = WritableDisk(bytes(SIZE), cached=False)
    with LoopServer(Export.writable("", disk), loop=loop, tcp=True) as server:
        client = server.connect().go()
        with disk.blocked():
            client.socket.sendall(b"".join(client.pack(WRITE, n * 4096, 4096) + b"x" * 4096 for n in range(20)))
            client.socket.sendall(client.pack(FLUSH) + client.pack(WRITE, MIB, 512, flags=FUA) + b"x" * 512)
            server.wait_for(lambda: len(disk.performed) >= 4, "writes in the pool")
            server.call(lambda: [c.shut_down() for c in server._server.census])
        assert all(reply.error == 0 for reply in client.replies().values())
        assert client.is_closed()
    assert disk.content[: 20 * 4096] == b"x" * (20 * 4096)
    assert disk.durable[MIB : MIB + 512] == b"x" * 512


def test_replies_to_writes_carry_no_data(server: LoopServer) -> None:
    """P100."""
    client = server.connect().go(structured=False)
    client.socket.sendall((request(WRITE, 7, 0, 512) + bytes(512)) * 3)
    assert client.receive(48) == 3 * struct.pack(">IIQ", 0x67446698, 0, 7)

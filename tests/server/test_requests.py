"""Every command as honest and as broken clients send it: exact errors, and a connection that lives on (P80-P102)."""

import contextlib
import random
import struct
from collections.abc import Iterator

import pytest

from nbdq.server.admission.entrance import Entrance
from nbdq.server.exports.export import Export
from tests.server.client import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    EINVAL,
    EIO,
    EPERM,
    FAST_ZERO,
    FLUSH,
    FUA,
    LIST,
    NO_HOLE,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Client,
    Disconnected,
    handshake,
    option,
    request,
)
from tests.server.conftest import CONTENT
from tests.server.harness import LoopServer, MemoryDisk, ZeroDisk

SIZE = len(CONTENT)
LARGE = 1 << 30
MAXIMUM = 32 << 20
#: The three kinds of headers, as arguments of :meth:`Client.go`.
HEADERS = {"simple": {"structured": False}, "structured": {}, "extended": {"extended": True}}
KINDS = pytest.mark.parametrize("headers", HEADERS)


def connect(server: LoopServer, headers: str) -> Client:
    """A client in transmission, with block status unless its replies are simple."""
    return server.connect().go(contexts=() if headers == "simple" else ("base:allocation",), **HEADERS[headers])


@pytest.fixture(params=["cached", "uncached"])
def disk(request: pytest.FixtureRequest) -> MemoryDisk:
    """Answers on the loop thread, or in the pool."""
    return MemoryDisk(CONTENT, cached=request.param == "cached")


@pytest.fixture(params=HEADERS)
def client(request: pytest.FixtureRequest, server: LoopServer) -> Client:
    return connect(server, request.param)


def answers_still(client: Client) -> None:
    """The connection is in sync and serves."""
    assert client.read(4096, 512) == CONTENT[4096:4608]


#: command, flags, offset, length → error; 0 is success. Payloads of WRITE are sent.
REQUESTS = [
    # READ
    (READ, 0, 0, 1, 0),
    (READ, 0, SIZE - 1, 1, 0),
    (READ, 0, 0, SIZE, 0),
    (READ, FUA, 0, 512, 0),
    (READ, 0, 0, 0, 0),
    (READ, 0, SIZE, 0, 0),
    (READ, 0, SIZE + 1, 0, EINVAL),
    (READ, 0, SIZE, 1, EINVAL),
    (READ, 0, SIZE - 1, 2, EINVAL),
    (READ, 0, 0, SIZE + 1, EINVAL),
    (READ, 0, 0, (1 << 32) - 1, EINVAL),
    (READ, 0, (1 << 64) - 1, 1, EINVAL),
    (READ, 0, (1 << 64) - 1, (1 << 32) - 1, EINVAL),
    (READ, 0, 1 << 63, 512, EINVAL),
    (READ, NO_HOLE, 0, 512, EINVAL),
    (READ, REQ_ONE, 0, 512, EINVAL),
    (READ, FAST_ZERO, 0, 512, EINVAL),
    (READ, 1 << 5, 0, 512, EINVAL),
    (READ, 1 << 15, 0, 512, EINVAL),
    (READ, 0xFFFF, 0, 512, EINVAL),
    # what would change data
    (WRITE, 0, 0, 512, EPERM),
    (WRITE, FUA, 0, 512, EPERM),
    (WRITE, 0, 0, 0, EPERM),
    (WRITE, 0, 0, 1, EPERM),
    (WRITE, 0, SIZE, 512, EPERM),
    (WRITE, 0, (1 << 64) - 1, 512, EPERM),
    (WRITE, 0, 0, 1 << 20, EPERM),
    (TRIM, 0, 0, 512, EPERM),
    (TRIM, 0, 0, (1 << 32) - 1, EPERM),
    (TRIM, 0, 0, 0, EPERM),
    (WRITE_ZEROES, 0, 0, 512, EPERM),
    (WRITE_ZEROES, NO_HOLE, 0, 512, EPERM),
    (WRITE_ZEROES, FAST_ZERO, 0, 512, EPERM),
    # FLUSH and CACHE
    (FLUSH, 0, 0, 0, 0),
    (FLUSH, FUA, 0, 0, 0),
    (FLUSH, 0, 1, 2, 0),
    (FLUSH, 0, (1 << 64) - 1, (1 << 32) - 1, 0),
    (FLUSH, DF, 0, 0, EINVAL),
    (CACHE, 0, 0, 512, 0),
    (CACHE, 0, 0, SIZE, 0),
    (CACHE, FUA, 0, 512, 0),
    (CACHE, 0, 0, 0, 0),
    (CACHE, 0, SIZE, 1, EINVAL),
    (CACHE, 0, 0, SIZE + 1, EINVAL),
    (CACHE, DF, 0, 512, EINVAL),
    # BLOCK_STATUS where it always fails
    (BLOCK_STATUS, 0, 0, 0, EINVAL),
    (BLOCK_STATUS, 0, SIZE, 1, EINVAL),
    (BLOCK_STATUS, 0, SIZE - 1, 2, EINVAL),
    (BLOCK_STATUS, 0, 0, (1 << 32) - 1, EINVAL),
    (BLOCK_STATUS, DF, 0, 512, EINVAL),
    # unknown commands, also the withdrawn RESIZE
    (8, 0, 0, 0, EINVAL),
    (9, 0, 0, 512, EINVAL),
    (0xFFFF, 0, 0, 512, EINVAL),
    (0x100, FUA, 0, 0, EINVAL),
]


def test_every_request_gets_the_answer_of_the_specification(client: Client) -> None:
    for command, flags, offset, length, error in REQUESTS:
        payload = client.payload(command, length, flags)
        reply = client.ask(command, offset, length, flags=flags, payload=payload)
        assert reply.error == error, f"command {command}, flags {flags:#x}, {length} bytes at {offset}"
        if command == READ and not error:
            assert reply.data == CONTENT[offset : offset + length]
        if error:
            assert bool(reply.message) == client.structured
        answers_still(client)


def test_all_those_requests_in_one_send_get_the_same_answers(client: Client) -> None:
    said = b""
    expected = {}
    for command, flags, offset, length, error in REQUESTS:
        header = client.pack(command, offset, length, flags=flags)
        said += header + client.payload(command, length, flags)
        expected[int.from_bytes(header[8:16], "big")] = (error, offset, length if command == READ else 0)
    client.send_beside(said)
    for cookie, reply in client.replies().items():
        error, offset, length = expected[cookie]
        assert reply.error == error
        assert reply.data == (b"" if error else CONTENT[offset : offset + length])
    answers_still(client)


def test_requests_torn_into_single_bytes_get_the_same_answers(client: Client) -> None:
    for command, flags, offset, length, error in REQUESTS:
        if length > 4096 and command in (READ, WRITE):
            continue
        for byte in client.pack(command, offset, length, flags=flags) + client.payload(command, length, flags):
            client.socket.sendall(bytes([byte]))
        assert client.reply().error == error
    answers_still(client)


@KINDS
def test_df_and_block_status_need_structured_replies(server: LoopServer, headers: str) -> None:
    client = connect(server, headers)
    assert client.error(READ, 0, 4096, flags=DF) == (0 if client.structured else EINVAL)
    assert client.error(BLOCK_STATUS, 0, 4096) == (0 if client.structured else EINVAL)
    answers_still(client)


def test_block_status_without_a_selected_context_is_refused(server: LoopServer) -> None:
    client = server.connect().go()
    assert client.error(BLOCK_STATUS, 0, 4096) == EINVAL
    answers_still(client)


@pytest.fixture
def large_server(loop: str) -> Iterator[LoopServer]:
    with LoopServer(Export.read_only("", ZeroDisk(LARGE)), loop=loop) as running:
        yield running


@KINDS
def test_a_read_may_have_the_maximum_length_and_not_a_byte_more(large_server: LoopServer, headers: str) -> None:
    client = connect(large_server, headers)
    assert client.read(LARGE - MAXIMUM, MAXIMUM) == bytes(MAXIMUM)
    assert client.error(READ, 0, MAXIMUM + 1) == EINVAL
    assert client.error(READ, 0, LARGE) == EINVAL
    assert client.read(0, 512) == bytes(512)


def test_a_write_of_64_mib_is_consumed_and_refused(large_server: LoopServer) -> None:
    client = large_server.connect().go()
    assert client.error(WRITE, 0, 64 << 20, payload=bytes(64 << 20)) == EPERM
    assert client.read(0, 512) == bytes(512)


def test_a_write_too_long_to_be_consumed_ends_the_connection_after_what_came_before(server: LoopServer) -> None:
    client = server.connect().go()
    client.socket.sendall(client.pack(READ, 0, 512) + request(WRITE, 1, 0, (64 << 20) + 1) + bytes(1000))
    assert client.reply().data == CONTENT[:512]
    assert client.is_closed()


@pytest.mark.parametrize("magic", [0x25609514, 0x21E41C71, 0x67446698, 0], ids=hex)
def test_a_wrong_magic_ends_the_connection_after_what_came_before(server: LoopServer, magic: int) -> None:
    client = server.connect().go()
    requests = [client.pack(READ, 512 * number, 512) for number in range(50)]
    client.socket.sendall(b"".join(requests) + struct.pack(">I", magic) + request(READ, 1, 0, 512)[4:])
    assert len(client.replies()) == 50
    assert client.is_closed()


@KINDS
def test_hundreds_of_mixed_requests_in_one_send_are_each_answered_once(
    server: LoopServer, disk: MemoryDisk, headers: str
) -> None:
    seed = 20
    chance = random.Random(seed)
    client = connect(server, headers)
    said = b""
    expected = {}
    for _ in range(800):
        command = chance.choice((READ, READ, READ, READ, FLUSH, CACHE, BLOCK_STATUS, TRIM, 99))
        length = chance.choice((0, 1, 100, 512, 4096, 40_000, 300_000))
        offset = chance.randrange(SIZE + 1000)
        header = client.pack(command, offset, length)
        said += header
        expected[int.from_bytes(header[8:16], "big")] = (command, offset, length)
    client.send_beside(said)
    for cookie, reply in client.replies().items():
        command, offset, length = expected[cookie]
        if command == READ and offset + length <= SIZE:
            assert reply.error == 0
            assert reply.data == CONTENT[offset : offset + length]
        elif command in (FLUSH, CACHE):
            assert reply.error in ((0,) if command == FLUSH or offset + length <= SIZE else (EINVAL,))
    answers_still(client)


def test_equal_cookies_are_echoed_as_they_came(server: LoopServer) -> None:
    client = server.connect().go(structured=False)
    cookie = 0xFFFFFFFFFFFFFFFF
    client.socket.sendall(request(FLUSH, cookie) * 3)
    assert client.receive(48) == 3 * struct.pack(">IIQ", 0x67446698, 0, cookie)


@KINDS
def test_a_read_error_is_an_answer_and_the_connection_lives(server: LoopServer, disk: MemoryDisk, headers: str) -> None:
    disk.failing = {8192, 65536}
    client = connect(server, headers)
    requests = [client.pack(READ, offset, 512) for offset in (4096, 8192, 12288)]
    client.socket.sendall(b"".join(requests) + client.pack(READ, 65536, 65536))
    errors = sorted(reply.error for reply in client.replies().values())
    assert errors == [0, 0, EIO, EIO]
    answers_still(client)


def test_an_internal_failure_is_an_answer_and_the_connection_lives(loop: str) -> None:
    class Broken(MemoryDisk):
        def read_into(self, offset: int, view: memoryview) -> None:
            raise ZeroDivisionError

    with LoopServer(Export.read_only("", Broken(CONTENT, cached=False)), loop=loop) as server:
        client = server.connect().go()
        assert client.error(READ, 0, 512) == EIO
        assert client.error(FLUSH) == 0
        assert "ZeroDivisionError" in server.errors.pop()  # the log tells of the bug, once
        assert not server.errors


def test_what_follows_a_disconnect_is_ignored(server: LoopServer) -> None:
    client = server.connect().go()
    client.socket.sendall(client.pack(READ, 0, 512) + request(DISC, 7, 5, 5) + request(READ, 8, 0, 512) + b"garbage")
    assert client.reply().data == CONTENT[:512]
    assert client.is_closed()


@pytest.mark.parametrize("call", ["list", "find", "chosen"])
def test_a_bug_before_the_transmission_costs_the_connection_that_met_it_and_nobody_else(
    loop: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-10: also behind the deadline of the handshake."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    with LoopServer(Export.read_only("", MemoryDisk(CONTENT)), loop=loop) as server:
        other = server.connect().go()
        assert other.read(0, 512) == CONTENT[:512]
        with monkeypatch.context() as patched:
            patched.setattr(Entrance, call, broken)
            client = server.connect()
            client.socket.sendall(handshake()[:4] + option(LIST) + handshake()[4:])
            client.hello()
            with contextlib.suppress(Disconnected):
                while True:
                    client.option_reply()
            server.wait_for_connections(1)
        assert other.read(0, 512) == CONTENT[:512]
        assert "ZeroDivisionError" in server.errors.pop()
        assert not server.errors


def test_a_bug_on_the_data_path_costs_the_connection_that_met_it_and_nobody_else(loop: str) -> None:
    class Broken(MemoryDisk):
        def read_cached(self, offset: int, view: memoryview) -> bool:
            if offset == 8192:
                raise ZeroDivisionError
            return offset != 4096 and super().read_cached(offset, view)

    with LoopServer(Export.read_only("", Broken(CONTENT)), loop=loop) as server:
        client, other = server.connect().go(), server.connect().go()
        client.socket.sendall(b"".join(client.pack(READ, offset, 512) for offset in (0, 4096, 8192, 12288)))
        assert client.is_closed()
        assert other.read(4096, 512) == CONTENT[4096:4608]
        assert "ZeroDivisionError" in server.errors.pop()
        assert not server.errors

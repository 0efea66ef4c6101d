"""How connections end: torn at any byte, by DISC, in the middle of work, with replies that nobody reads (P93, R-13)."""

import contextlib
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdq.server.exports.export import Export
from tests.server.client import (
    BLOCK_STATUS,
    CACHE,
    DISC,
    FLUSH,
    READ,
    WRITE,
    Client,
    HealthyClient,
    request,
    reset,
)
from tests.server.conftest import CONTENT
from tests.server.harness import FileDisk, LoopServer, MemoryDisk, ZeroDisk, no_descriptor_leaks

#: Requests with their payloads, as a conversation to be torn.
CONVERSATION = [
    (READ, 0, 512),
    (FLUSH, 0, 0),
    (WRITE, 0, 40),
    (CACHE, 0, 4096),
    (BLOCK_STATUS, 0, 4096),
    (99, 0, 0),
    (READ, 70_000, 70_000),
]


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_whoever_stops_sending_at_any_byte_gets_the_answers_to_what_was_whole(loop: str, cached: bool) -> None:
    length = sum(28 + (size if command == WRITE else 0) for command, _, size in CONVERSATION)
    with (
        LoopServer(Export.read_only("", MemoryDisk(CONTENT, cached=cached)), loop=loop) as server,
        HealthyClient(server.address, CONTENT) as healthy,
    ):
        for cut in range(length + 1):
            with Client(server.address).go(contexts=("base:allocation",)) as client:
                said = b""
                for command, offset, size in CONVERSATION:
                    payload = bytes(size if command == WRITE else 0)
                    whole = len(said) + 28 + len(payload) <= cut
                    said += (
                        client.pack(command, offset, size) if whole else request(command, 1, offset, size)
                    ) + payload
                client.socket.sendall(said[:cut])
                client.socket.shutdown(socket.SHUT_WR)
                client.replies()
                assert client.is_closed()
        healthy.wait_for_a_round()


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
def test_a_connection_reset_at_any_byte_of_a_request_is_forgotten(tcp_server: LoopServer, structured: bool) -> None:
    said = request(READ, 1, 0, 512) + request(WRITE, 2, 0, 40) + bytes(40) + request(READ, 3, 4096, 4096)
    with HealthyClient(tcp_server.address, CONTENT) as healthy, no_descriptor_leaks():
        for cut in range(len(said) + 1):
            client = Client(tcp_server.address).go(structured=structured)
            tcp_server.wait_for(lambda: tcp_server.transmitting == 2, "the transmission phase")
            with tcp_server.paused():
                client.socket.sendall(said[:cut])
                reset(client.socket)
        healthy.wait_for_a_round()
        tcp_server.wait_for_connections(1)


def test_a_unix_client_that_leaves_answers_unread_and_a_request_unfinished_is_forgotten(server: LoopServer) -> None:
    client = Client(server.address).go()
    client.socket.sendall(request(FLUSH, 1))
    assert client.socket.recv(1, socket.MSG_PEEK)
    with server.paused():
        client.socket.sendall(request(READ, 2, 0, 512)[:9])
        client.socket.close()
    server.wait_for_connections(0)


def test_a_client_that_leaves_while_the_pool_works_for_it_costs_nothing_for_long(loop: str) -> None:
    disk = MemoryDisk(CONTENT, cached=False)
    with LoopServer(Export.read_only("", disk), loop=loop) as server:
        for leave in (socket.socket.close, reset):
            client = server.connect().go()
            with disk.blocked():
                client.socket.sendall(b"".join(client.pack(READ, 100_000 * number, 100_000) for number in range(20)))
                disk.wait_for_request()
                assert server.reserved >= 100_000
                leave(client.socket)
            server.wait_until_idle()


def test_disc_is_obeyed_when_everything_before_it_is_answered(loop: str) -> None:
    disk = MemoryDisk(CONTENT, cached=False)
    with LoopServer(Export.read_only("", disk), loop=loop) as server:
        client = server.connect().go()
        with disk.blocked():
            requests = [client.pack(READ, 100_000 * number, 100_000) for number in range(20)]
            client.socket.sendall(b"".join(requests) + request(DISC) + request(READ, 1, 0, 512))
            disk.wait_for_request()
        assert len(client.replies()) == 20
        assert client.is_closed()


def test_answers_reach_a_tcp_client_that_goes_on_sending_behind_disc(loop: str) -> None:
    with LoopServer(Export.read_only("", MemoryDisk(CONTENT)), loop=loop, tcp=True) as server:
        client = server.connect().go()
        requests = [client.pack(READ, 100_000 * number, 100_000) for number in range(20)]
        client.socket.sendall(b"".join(requests) + request(DISC) + bytes(1 << 20))
        server.wait_for(lambda: not server.transmitting, "the end of the transmission")
        assert len(client.replies()) == 20
        assert client.is_closed()


@pytest.fixture(params=["memory", "file", "pool"])
def large_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MemoryDisk]:
    """256 MiB, whose replies are memory, pieces of a file, or made in the pool."""
    if request.param == "file":
        path = tmp_path / "disk"
        with path.open("wb") as file:
            file.truncate(256 << 20)
        disk: MemoryDisk = FileDisk(path)
    elif request.param == "memory":
        disk = MemoryDisk(bytes(256 << 20))
    else:
        disk = ZeroDisk(256 << 20)
    yield disk
    disk.close()


def test_a_client_that_asks_for_much_and_hangs_up_harms_nobody(loop: str, large_disk: MemoryDisk) -> None:
    exports = (Export.read_only("", large_disk), Export.read_only("healthy", MemoryDisk(CONTENT, cached=False)))
    with LoopServer(*exports, loop=loop) as server, no_descriptor_leaks():
        with HealthyClient(server.address, CONTENT, name="healthy") as healthy:
            for number in range(20):
                client = Client(server.address).go()
                client.socket.sendall(b"".join(request(READ, i, i << 24, 16 << 20) for i in range(16)))
                if number % 2:
                    client.receive(100_000)
                client.socket.close()
            healthy.wait_for_a_round()
        server.wait_until_idle()


def test_random_clients_that_come_and_go_leave_a_server_as_it_was(loop: str) -> None:
    seed = 4
    chance = random.Random(seed)
    disk = MemoryDisk(CONTENT, cached=False)
    with LoopServer(Export.read_only("", disk), loop=loop, tcp=True) as server, no_descriptor_leaks():
        with HealthyClient(server.address, CONTENT) as healthy:
            for _ in range(300):
                client = Client(server.address)
                if chance.random() < 0.8:
                    client.go(structured=chance.random() < 0.5)
                    count = chance.choice((1, 10, 200))
                    length = chance.choice((1, 4096, 100_000, 1 << 20))
                    said = b"".join(request(READ, number, number * 512, length) for number in range(count))
                    client.socket.sendall(said[: chance.randrange(len(said) + 1)])
                    if chance.random() < 0.5:
                        client.socket.settimeout(0.005)
                        with contextlib.suppress(TimeoutError):
                            client.socket.recv(chance.randrange(1, 100_000))
                chance.choice((socket.socket.close, reset))(client.socket)
            healthy.wait_for_a_round()
        server.wait_until_idle()

"""Clients that break off, garble, drip or never finish the handshake, beside one that must not notice (R-01..R-03)."""

import contextlib
import random
import socket
from collections.abc import Callable

import pytest

from nbdq.server.exports.export import Export
from nbdq.server.limits import Limits
from tests.server.client import (
    LIST,
    PATIENCE,
    READ,
    Background,
    Client,
    Disconnected,
    HealthyClient,
    connect,
    handshake,
    option,
    request,
    reset,
)
from tests.server.harness import LoopServer, MemoryDisk, no_descriptor_leaks

#: A good conversation up to the first request.
GOOD = handshake(contexts=("base:allocation",)) + request(READ, 1, 4096, 512)


@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["FIN", "RST"])
def test_a_client_may_vanish_at_every_byte_of_the_handshake(
    loop: str, disk: MemoryDisk, leave: Callable[[socket.socket], None]
) -> None:
    limits = Limits(handshake_seconds=10 * PATIENCE)  # that a client is gone is to be noticed long before
    with (
        LoopServer(Export.read_only("", disk), loop=loop, limits=limits, tcp=True) as server,
        no_descriptor_leaks(),
        HealthyClient(server.address, disk.content) as healthy,
    ):
        for length in range(len(GOOD) + 1):
            sock = connect(server.address)
            assert sock.recv(1, socket.MSG_PEEK)
            with server.paused():
                sock.sendall(GOOD[:length])
                leave(sock)
        healthy.wait_for_a_round()
        server.wait_for_connections(1)


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
def test_a_conversation_in_single_bytes_gives_the_same_answers(
    tcp_server: LoopServer, disk: MemoryDisk, structured: bool
) -> None:
    client = tcp_server.connect()
    client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in handshake(structured=structured):
        client.socket.sendall(bytes([byte]))
    client.finish_handshake()
    assert client.size == disk.size
    for byte in client.pack(READ, 4000, 5000):
        client.socket.sendall(bytes([byte]))
    assert client.reply().data == disk.content[4000:9000]


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
def test_requests_that_come_together_with_the_last_option_are_answered(
    server: LoopServer, disk: MemoryDisk, structured: bool
) -> None:
    client = server.connect()
    requests = [client.pack(READ, 4096 * number, 4096) for number in range(100)]
    torn = requests[-1]
    client.socket.sendall(handshake(structured=structured) + b"".join(requests[:-1]) + torn[:20])
    client.finish_handshake()
    for number in range(99):
        assert client.reply().data == disk.content[4096 * number :][:4096]
    client.socket.sendall(torn[20:])
    assert client.reply().data == disk.content[4096 * 99 :][:4096]


def test_garbage_instead_of_a_handshake_disturbs_nobody(server: LoopServer, disk: MemoryDisk) -> None:
    with HealthyClient(server.address, disk.content) as healthy:
        for seed in range(200):
            chance = random.Random(seed)
            said = bytearray(GOOD)
            if seed % 2:
                said = bytearray(GOOD[: chance.randrange(24)] + chance.randbytes(chance.randrange(2000)))
            else:
                for _ in range(chance.randint(1, 4)):
                    said[chance.randrange(len(said))] = chance.randrange(256)
            with Client(server.address) as client, contextlib.suppress(ConnectionError):
                client.socket.sendall(said)
                client.socket.shutdown(socket.SHUT_WR)
                while client.socket.recv(1 << 16):  # until the server hangs up; the seed is the number of the round
                    pass
        healthy.wait_for_a_round()


def test_a_thousand_silent_sockets_are_dropped_at_the_deadline(
    loop: str, disk: MemoryDisk, many_descriptors: None
) -> None:
    limits = Limits(handshake_seconds=2, pending_handshakes=2000, connections=2000)
    with LoopServer(Export.read_only("", disk), loop=loop, limits=limits) as server, no_descriptor_leaks():
        with HealthyClient(server.address, disk.content) as healthy:
            silent = [connect(server.address) for _ in range(1000)]
            healthy.wait_for_a_round()
            server.wait_for_connections(1)  # nobody but the healthy one
            healthy.wait_for_a_round()
        for sock in silent:
            assert sock.recv(100) == b"NBDMAGICIHAVEOPT\x00\x03"
            assert sock.recv(100) == b""
            sock.close()
        server.wait_for_connections(0)


def test_progress_does_not_extend_the_deadline_of_the_handshake(loop: str, disk: MemoryDisk) -> None:
    limits = Limits(handshake_seconds=0.3)
    with LoopServer(Export.read_only("", disk), loop=loop, limits=limits) as server:
        client = server.connect()
        drip = b"\x00\x00\x00\x03" + 20 * option(LIST)

        def drip_until_cut() -> None:
            sent = 0
            while True:
                client.socket.sendall(drip[sent : sent + 1])
                sent = min(sent + 1, len(drip) - 1)
                client.socket.settimeout(0.01)
                try:
                    if not client.socket.recv(1000):
                        return
                except TimeoutError:
                    continue

        with contextlib.suppress(ConnectionError):
            drip_until_cut()
        server.wait_for_connections(0)


def test_a_client_that_reads_no_option_replies_is_dropped_at_the_deadline(loop: str) -> None:
    names = [f"{number:04}" + "x" * 4000 for number in range(500)]
    exports = [Export.read_only(name, MemoryDisk(bytes(512))) for name in names]
    limits = Limits(handshake_seconds=0.5)
    with LoopServer(*exports, loop=loop, limits=limits) as server:
        client = server.connect()
        client.socket.sendall(b"\x00\x00\x00\x03" + 30 * option(LIST))  # 2 MB each
        server.wait_for_connections(0)
        client.hello()
        with contextlib.suppress(Disconnected):
            for _ in range(30 * 500):
                client.option_reply()
            raise AssertionError("the client got everything")


def test_who_is_beyond_the_limit_of_handshakes_waits_until_one_is_over(loop: str, disk: MemoryDisk) -> None:
    limits = Limits(pending_handshakes=3, crowded_handshake_seconds=100 * PATIENCE)
    with LoopServer(Export.read_only("", disk), loop=loop, limits=limits) as server:
        silent = [server.connect() for _ in range(3)]
        server.wait_for_connections(3)
        late = [server.connect() for _ in range(5)]
        for client in silent:
            client.hello()
        assert server.negotiating == server.connections == 3
        silent[0].socket.sendall(handshake())  # to the transmission phase: one less that negotiates
        server.wait_for_connections(4)
        silent[1].socket.close()
        silent[2].socket.close()
        for client in late:
            assert client.go().read(0, 512) == disk.content[:512]


def test_connections_that_come_and_go_leave_nothing_behind(server: LoopServer) -> None:
    with no_descriptor_leaks():
        for _ in range(300):
            connect(server.address).close()
        with Client(server.address) as last:  # accepted after all the others
            last.go()
        server.wait_for_connections(0)


def test_a_flood_of_connections_that_vanish_does_not_stop_a_healthy_one(server: LoopServer, disk: MemoryDisk) -> None:
    def come_and_go() -> None:
        connect(server.address).close()

    with Background(come_and_go), Background(come_and_go), HealthyClient(server.address, disk.content) as healthy:
        for _ in range(10):
            healthy.wait_for_a_round()

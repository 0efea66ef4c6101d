"""The end of a server: what is accepted is answered, what hangs is cut, nothing stays behind (R-02, P99, R-76)."""

import contextlib
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nbdq.server.exports.export import Export
from nbdq.server.exports.rate import Rates
from nbdq.server.limits import Limits
from tests.server.client import (
    ABORT,
    ACK,
    DISC,
    FIXED_NEWSTYLE,
    FLUSH,
    GO,
    LIST,
    NO_ZEROES,
    PATIENCE,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Address,
    Client,
    Disconnected,
    connect,
    handshake,
    option,
    reset,
    text,
)
from tests.server.conftest import CONTENT
from tests.server.harness import LoopServer, MemoryDisk, WritableDisk, ZeroDisk

ESHUTDOWN = 108
ERR_SHUTDOWN = 1 << 31 | 7


@pytest.fixture(params=[False, True], ids=["unix", "tcp"])
def tcp(request: pytest.FixtureRequest) -> bool:
    over_tcp: bool = request.param
    return over_tcp


def is_refused(address: Address) -> bool:
    """Whether nobody listens there any more."""
    try:
        connect(address).close()
    except (ConnectionError, FileNotFoundError):
        return True
    return False


def test_stopping_ends_idle_and_half_negotiated_connections(loop: str, tcp: bool, disk: MemoryDisk) -> None:
    with LoopServer(Export.read_only("", disk), loop=loop, tcp=tcp) as server:
        said = handshake()
        clients = [server.connect() for _ in range(20)]
        for number, client in enumerate(clients):
            client.hello()
            client.socket.sendall(said[: number * 2])
        idle = server.connect().go()
        with ThreadPoolExecutor(1) as thread:
            stopping = thread.submit(server.stop)
            assert idle.is_closed()
            idle.socket.close()
            stopping.result()
        for client in clients:
            with pytest.raises(Disconnected):
                client.receive(1 << 20)
        assert is_refused(server.address)
        for client in clients:
            client.socket.close()


def test_requests_in_the_pool_are_answered_before_the_end(loop: str, tcp: bool) -> None:
    disk = MemoryDisk(CONTENT, cached=False)
    with LoopServer(Export.read_only("", disk), loop=loop, tcp=tcp) as server, ThreadPoolExecutor(1) as thread:
        clients = [server.connect().go() for _ in range(5)]
        with disk.blocked():
            for client in clients:
                client.socket.sendall(b"".join(client.pack(READ, n * 1000, 1000) for n in range(100)))
            server.wait_for(lambda: server.waiting_for_pool == 5, "requests of all in the pool")
            stopping = thread.submit(server.stop)
            server.wait_for(lambda: is_refused(server.address), "the end of the listener")
            assert not stopping.done()
        for client in clients:
            replies = client.replies()
            assert sorted(reply.data for reply in replies.values()) == sorted(
                CONTENT[n * 1000 :][:1000] for n in range(100)
            )
            assert client.is_closed()
            client.socket.close()
        stopping.result()


def test_busy_clients_lose_no_answer_to_what_was_accepted(loop: str, tcp: bool, disk: MemoryDisk) -> None:
    begun = threading.Barrier(7)

    def ask_until_the_end(client: Client) -> str:
        """Keep sixteen reads on their way until the server hangs up; how it did that."""
        client.send(READ, 0, 512)
        client.reply()
        begun.wait(PATIENCE)
        while True:
            with contextlib.suppress(ConnectionError):  # no more is taken; what was taken is still to be answered
                while client.outstanding < 16:
                    client.send(READ, 4096, 8192)
            try:
                assert client.reply().data == CONTENT[4096 : 4096 + 8192]
            except Disconnected as error:
                client.socket.close()
                return str(error)

    # TCP has to end in order; a unix socket that still holds requests ends behind its data with a reset.
    ends = ["end of stream after 0 of 4 bytes", "[Errno 104] Connection reset by peer after 0 of 4 bytes"]
    with LoopServer(Export.read_only("", disk), loop=loop, tcp=tcp) as server, ThreadPoolExecutor(6) as threads:
        clients = [threads.submit(ask_until_the_end, server.connect().go()) for _ in range(6)]
        begun.wait(PATIENCE)
        server.stop()
        for client in clients:
            assert client.result() in ends[: 1 if tcp else 2]


def test_those_that_take_too_long_are_cut(loop: str) -> None:
    limits = Limits(drain_seconds=0.3)
    with LoopServer(Export.read_only("", ZeroDisk(1 << 30)), loop=loop, limits=limits) as server:
        stuck = server.connect().go()
        stuck.send(READ, 0, 32 << 20)
        server.wait_for(lambda: server.reserved > 0 and server.waiting_for_pool == 0, "a reply that nobody reads")
        server.stop()
        assert server.connections == 0
        with pytest.raises(Disconnected):
            stuck.reply()


def stop(server: LoopServer, *, refuse: bool = False) -> None:
    """What SIGTERM does, with --on-stop as it is asked for."""
    server.wait(lambda: server._server.stop(refuse=refuse))


def wait_until_refused(client: Client) -> None:
    """Return when the server answers requests with ESHUTDOWN."""
    deadline = time.monotonic() + PATIENCE
    while client.error(READ, 0, 512) != ESHUTDOWN:
        assert time.monotonic() < deadline, "requests are carried out for ever"


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_what_comes_after_a_stop_that_refuses_is_told_so_until_the_client_leaves(
    loop: str, tcp: bool, structured: bool
) -> None:
    """P99: what was accepted is carried out; every other request gets its own answer, and nothing is changed."""
    disk = WritableDisk(CONTENT, cached=False)
    with (
        LoopServer(Export.writable("", disk), loop=loop, tcp=tcp) as server,
        ThreadPoolExecutor(1) as thread,
    ):
        client = server.connect().go(structured=structured)
        with disk.blocked():
            client.send(WRITE, 0, 512, payload=b"x" * 512)
            disk.wait_for_request()
            stopping = thread.submit(stop, server, refuse=True)
            server.wait_for(lambda: is_refused(server.address), "the end of the listener")
        assert client.reply().error == 0
        wait_until_refused(client)
        changes = len(disk.changes)
        for command, length in ((READ, 0), (WRITE, 512), (WRITE, 300_000), (FLUSH, 0), (TRIM, 4096), (WRITE_ZEROES, 9)):
            payload = bytes(length) if command == WRITE else b""
            reply = client.ask(command, 0, length, payload=payload)
            assert reply.error == ESHUTDOWN
            assert reply.message == ("the server stops" if structured else "")
        assert len(disk.changes) == changes
        assert not stopping.done()
        client.send(DISC)
        assert client.is_closed()
        client.socket.close()
        stopping.result(PATIENCE)


def test_a_write_that_had_begun_to_come_when_the_server_stopped_is_carried_out(loop: str) -> None:
    disk = WritableDisk(CONTENT)
    with LoopServer(Export.writable("", disk), loop=loop) as server, ThreadPoolExecutor(1) as thread:
        client = server.connect().go()
        torn = client.pack(WRITE, 0, 1 << 20) + bytes(1 << 20)
        client.socket.sendall(torn[: 1 << 19])
        server.wait_for(lambda: server.reserved > 0, "the half of the payload")
        stopping = thread.submit(stop, server, refuse=True)
        server.wait_for(lambda: is_refused(server.address), "the end of the listener")
        client.socket.sendall(torn[1 << 19 :])
        assert client.reply().error == 0
        assert disk.content[: 1 << 20] == bytes(1 << 20)
        assert client.error(WRITE, 0, 1 << 20, payload=bytes(1 << 20)) == ESHUTDOWN
        client.socket.close()
        stopping.result(PATIENCE)


def test_a_client_that_does_not_leave_is_cut_when_the_grace_is_over(loop: str) -> None:
    limits = Limits(drain_seconds=0.3)
    with LoopServer(Export.read_only("", MemoryDisk(CONTENT)), loop=loop, limits=limits) as server:
        client = server.connect().go()
        stop(server, refuse=True)
        assert client.is_closed()
        client.socket.close()


@pytest.mark.parametrize("refuse", [False, True], ids=["close", "refuse"])
def test_options_of_a_handshake_are_answered_that_the_server_stops(loop: str, refuse: bool) -> None:
    """P99, R-76 (2): ERR_SHUTDOWN to all of them but ABORT, which is acknowledged."""
    with LoopServer(Export.read_only("", MemoryDisk(CONTENT)), loop=loop) as server, ThreadPoolExecutor(1) as thread:
        clients = [server.connect() for _ in range(2)]
        for client in clients:
            client.hello()
            client.socket.sendall(struct.pack(">I", FIXED_NEWSTYLE | NO_ZEROES))
        server.wait_for(lambda: server.negotiating == 2, "both handshakes")
        stopping = thread.submit(stop, server, refuse=refuse)
        server.wait_for(lambda: is_refused(server.address), "the end of the listener")
        curious, polite = clients
        curious.socket.sendall(option(LIST) + option(GO, text("") + bytes(2)))
        for asked in (LIST, GO):
            code, reply, said = curious.option_reply()
            assert (code, reply) == (asked, ERR_SHUTDOWN)
            assert said == b"the server is shutting down"
        polite.socket.sendall(option(ABORT))
        assert polite.option_reply()[:2] == (ABORT, ACK)
        for client in clients:
            assert client.is_closed()
            client.socket.close()
        stopping.result(PATIENCE)


def test_a_server_in_a_hurry_waits_no_longer(loop: str) -> None:
    """The second signal: whoever takes too long is cut long before the deadline."""
    with (
        LoopServer(Export.read_only("", ZeroDisk(1 << 30)), loop=loop) as server,
        ThreadPoolExecutor(1) as thread,
    ):
        stuck = server.connect().go()
        stuck.send(READ, 0, 32 << 20)
        server.wait_for(lambda: server.reserved > 0 and server.waiting_for_pool == 0, "a reply that nobody reads")
        stopping = thread.submit(server.stop)
        server.wait_for(lambda: is_refused(server.address), "the end of the listener")
        assert not stopping.done()
        server.call(lambda: server._server.hurry(0.1))
        stopping.result(PATIENCE)
        with pytest.raises(Disconnected):
            stuck.reply()


def test_clients_of_a_removed_export_hear_that_it_is_gone_and_are_hung_up_on(loop: str) -> None:
    """P99: who comes back finds nobody, so a request is answered at once; others are not in the way."""
    disk = WritableDisk(CONTENT)
    export, other = Export.writable("gone", disk), Export.read_only("", MemoryDisk(CONTENT))
    with LoopServer(export, other, loop=loop) as server:
        client, bystander = server.connect().go("gone"), server.connect().go()
        assert client.error(WRITE, 0, 512, payload=b"x" * 512) == 0
        server.call(export.cut)
        assert client.error(WRITE, 0, 512, payload=b"y" * 512) == ESHUTDOWN
        assert client.error(READ, 0, 512) == ESHUTDOWN
        assert disk.content[:512] == b"x" * 512
        assert client.is_closed()
        assert bystander.read(0, 512) == CONTENT[:512]


def test_clients_that_have_vanished_do_not_keep_others_from_hearing_that_the_export_is_gone(loop: str) -> None:
    """R-72, P99: that they have left is found out in the middle of telling everybody."""
    export = Export.writable("", WritableDisk(CONTENT), rates=Rates(requests=0.01))
    throttle = export.throttle
    assert throttle is not None
    with LoopServer(export, loop=loop) as server:
        clients = [server.connect().go() for _ in range(8)]
        for number, client in enumerate(clients, 1):
            client.send(READ, 0, 512)
            client.send(READ, 0, 512)
            server.wait_for(lambda n=number: throttle.waiting == n, "clients that wait for their turn")  # type: ignore[misc]
        for vanished in clients[:-1]:
            vanished.socket.close()
        server.call(export.cut)
        clients[-1].replies()
        assert clients[-1].error(READ, 0, 512) == ESHUTDOWN


def test_a_slot_of_an_export_is_free_when_its_client_has_vanished(loop: str) -> None:
    """R-72: the slot of a client, and what is reserved for it, end with its last request, however it left."""
    disk = MemoryDisk(CONTENT, cached=False)
    export = Export.read_only("", disk, maximum_connections=1)
    with LoopServer(export, loop=loop, tcp=True) as server:
        first = server.connect().go()
        with disk.blocked():
            first.send(READ, 0, 512)
            disk.wait_for_request()
            reset(first.socket)
            server.wait_for(lambda: export.connection_count == 0, "the end of the client")
            second = server.connect().go()
        assert second.read(0, 512) == CONTENT[:512]

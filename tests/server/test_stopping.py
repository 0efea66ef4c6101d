"""The end of a server: what is accepted is answered, what hangs is cut, nothing stays behind (R-02, P99, R-76)."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nbdq.server.export import Export
from nbdq.server.limits import Limits
from tests.server.client import PATIENCE, READ, Address, Client, Disconnected, connect, handshake
from tests.server.conftest import CONTENT
from tests.server.harness import LoopServer, MemoryDisk, ZeroDisk


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

"""FLUSH and FUA: what they promise, who shares a flush, and what a failing one says (P90-P92, R-63, R-75)."""

import errno
from collections.abc import Iterator

import pytest

from nbdq.server.exports.export import Export
from tests.server.client import EIO, FLUSH, FUA, TRIM, WRITE, WRITE_ZEROES, Client
from tests.server.conftest import CONTENT
from tests.server.harness import LoopServer, WritableDisk


@pytest.fixture(params=["cached", "uncached"])
def disk(request: pytest.FixtureRequest) -> WritableDisk:
    """Written on the loop thread, or in the pool."""
    return WritableDisk(CONTENT, cached=request.param == "cached")


@pytest.fixture
def server(loop: str, disk: WritableDisk) -> Iterator[LoopServer]:
    with LoopServer(Export.writable("", disk), loop=loop) as running:
        yield running


def test_a_flush_saves_what_any_client_was_told_is_written(server: LoopServer, disk: WritableDisk) -> None:
    """P90, P91."""
    clients = [server.connect().go(structured=bool(n % 2)) for n in range(4)]
    for round_ in range(5):
        for number, client in enumerate(clients):
            offset = (round_ * 4 + number) * 1000
            assert client.error(WRITE, offset, 1000, payload=bytes([65 + round_]) * 1000) == 0
        assert clients[round_ % 4].error(FLUSH) == 0
        assert disk.durable[round_ * 4000 :][:4000] == bytes([65 + round_]) * 4000


@pytest.mark.parametrize("length", [1, 4096, 300_000])
@pytest.mark.parametrize("command", [WRITE, WRITE_ZEROES, TRIM])
def test_a_change_with_fua_is_durable_when_it_is_acknowledged(
    server: LoopServer, disk: WritableDisk, command: int, length: int
) -> None:
    """P92."""
    client = server.connect().go()
    for offset in (0, 77_777, len(CONTENT) - length):
        payload = b"x" * length if command == WRITE else b""
        assert client.error(command, offset, length, flags=FUA, payload=payload) == 0
        assert disk.durable[offset : offset + length] == (payload or bytes(length))


def test_a_write_without_fua_waits_for_no_flush(server: LoopServer, disk: WritableDisk) -> None:
    client = server.connect().go()
    assert client.error(WRITE, 0, 512, payload=bytes(512)) == 0
    assert disk.flushes == 0


def test_all_who_wait_while_a_flush_runs_share_the_next_one(server: LoopServer, disk: WritableDisk) -> None:
    clients = [server.connect().go() for _ in range(5)]
    with disk.blocked():
        clients[0].send(FLUSH)
        disk.wait_for_request()
        for number, client in enumerate(clients):
            for _ in range(4):
                client.send(FLUSH)
            if disk.cached:
                client.send(WRITE, 4096 * number, 512, flags=FUA, payload=b"x" * 512)
        server.wait_for(lambda: server.waiting_for_pool == 5, "flushes of all")
        server.wait_for(
            lambda: (
                server.call(lambda: sum(c._session.in_progress for c in server._server.census))
                == (26 if disk.cached else 21)
            ),
            "all flushes asked for",
        )
        assert disk.flushes == 1
    for client in clients:
        assert all(reply.error == 0 for reply in client.replies().values())
    assert disk.flushes == 2
    if disk.cached:
        assert all(disk.durable[4096 * n :][:512] == b"x" * 512 for n in range(5))


def test_flushes_that_come_together_are_one(server: LoopServer, disk: WritableDisk) -> None:
    client = server.connect().go()
    client.socket.sendall(b"".join(client.pack(FLUSH) for _ in range(100)))
    client.replies()
    assert disk.flushes <= 3  # the stream may come in pieces


def test_a_flush_that_began_before_a_write_does_not_save_it(server: LoopServer, disk: WritableDisk) -> None:
    """P91: the second flush must not be answered by the first."""
    disk.cached = True
    client, other = server.connect().go(), server.connect().go()
    with disk.blocked():
        client.send(FLUSH)
        disk.wait_for_request()
        assert other.error(WRITE, 0, 512, payload=b"x" * 512) == 0
        other.send(FLUSH)
    assert other.reply().error == 0
    assert disk.durable[:512] == b"x" * 512
    client.reply()


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
def test_a_flush_that_fails_is_told_to_all_who_wait_for_it(
    server: LoopServer, disk: WritableDisk, structured: bool
) -> None:
    """R-63: nobody is told that something is safe which is not."""
    disk.errors["flush"] = errno.EIO
    clients = [server.connect().go(structured=structured) for _ in range(3)]
    for client in clients:
        client.socket.sendall(
            client.pack(FLUSH)
            + client.pack(WRITE, 0, 512, flags=FUA)
            + bytes(512)
            + client.pack(WRITE_ZEROES, 4096, 512, flags=FUA)
            + client.pack(TRIM, 8192, 512, flags=FUA)
        )
    for client in clients:
        replies = client.replies().values()
        assert [reply.error for reply in replies] == [EIO] * 4
        assert not any("secret" in reply.message for reply in replies)
    assert disk.durable == CONTENT
    del disk.errors["flush"]
    assert clients[0].error(FLUSH) == 0


def test_a_client_that_leaves_while_it_waits_for_a_flush_costs_nothing_for_long(
    server: LoopServer, disk: WritableDisk
) -> None:
    disk.cached = True
    with disk.blocked():
        client = Client(server.address).go()
        client.socket.sendall(client.pack(WRITE, 0, 512, flags=FUA) + bytes(512) + client.pack(FLUSH) * 10)
        disk.wait_for_request()
        client.socket.close()
    server.wait_until_idle()
    assert server.connect().go().error(FLUSH) == 0


def test_a_bug_in_a_flush_is_an_answer(loop: str) -> None:
    class Broken(WritableDisk):
        def flush(self) -> None:
            raise ZeroDivisionError

    with LoopServer(Export.writable("", Broken(CONTENT)), loop=loop) as server:
        client = server.connect().go()
        assert client.error(FLUSH) == EIO
        assert client.read(0, 512) == CONTENT[:512]
        assert "ZeroDivisionError" in server.errors.pop()

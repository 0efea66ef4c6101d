"""Clients that want more than their share: of memory, of the loop, of the pool (R-70, R-80; scorecard 14, 15)."""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from nbdq.block import Status
from nbdq.server.exports.export import Export
from nbdq.server.limits import ARENA_SIZE, GUARANTEED_BYTES, Limits
from tests.server.client import (
    BLOCK_STATUS,
    CACHE,
    PATIENCE,
    READ,
    Client,
    Disconnected,
    HealthyClient,
    handshake,
    request,
    reset,
)
from tests.server.conftest import CONTENT
from tests.server.harness import FragmentedDisk, LoopServer, MemoryDisk, WritableDisk, ZeroDisk, resident_bytes

GREEDY = "greedy"
HEALTHY = Export.read_only("", MemoryDisk(CONTENT))
UNCACHED = Export.read_only("", MemoryDisk(CONTENT, cached=False))
STATUS = ("base:allocation",)


def test_clients_that_never_read_get_no_more_memory_than_the_budgets_allow(loop: str) -> None:
    limits = Limits(process_bytes=8 << 20, connection_bytes=4 << 20)
    exports = (UNCACHED, Export.read_only(GREEDY, ZeroDisk(1 << 30)))
    with LoopServer(*exports, loop=loop, limits=limits) as server, HealthyClient(server.address, CONTENT) as healthy:
        for _ in range(20):
            greedy = server.connect().go(GREEDY)
            greedy.socket.sendall(b"".join(request(READ, number, number << 20, 1 << 20) for number in range(64)))
            healthy.wait_for_a_round()
            assert server.reserved <= limits.process_bytes + 21 * GUARANTEED_BYTES


@pytest.mark.parametrize(
    ("disk", "length", "count"),
    [(MemoryDisk(CONTENT), 4096, 200), (ZeroDisk(1 << 30), 4096, 200), (ZeroDisk(1 << 30), 32 << 20, 40)],
    ids=["4 KiB from memory", "4 KiB from the pool", "32 MiB from the pool"],
)
def test_clients_that_never_read_do_not_make_the_server_outgrow_its_cap(
    disk: MemoryDisk, length: int, count: int
) -> None:
    limits = Limits(peer_connections=0, export_connections=0)
    said = b"".join(request(READ, 1 << 63 | number, (number << 12) % (4 << 20), length) for number in range(4000))
    exports = (UNCACHED, Export.read_only(GREEDY, disk))
    with LoopServer(*exports, limits=limits) as server, HealthyClient(server.address, CONTENT) as healthy:
        before = resident_bytes()
        for _ in range(count):
            greedy = server.connect().go(GREEDY)
            greedy.socket.setblocking(False)
            greedy.socket.send(said)
            greedy.socket.send(said[: len(said) // 2])
        healthy.wait_for_a_round()
        server.wait_for(
            lambda: server.transmitting == count + 1 and server.waiting_for_pool <= 1, "the end of all work"
        )
        assert resident_bytes() - before < limits.process_bytes * 1.2  # scorecard 14
        healthy.wait_for_a_round()


@pytest.mark.parametrize("length", [32 << 20, 1 << 20])
def test_what_clients_that_never_read_hold_is_free_when_they_leave(loop: str, length: int) -> None:
    limits = Limits(process_bytes=32 << 20, connection_bytes=32 << 20)
    with LoopServer(Export.read_only("", ZeroDisk(1 << 30)), loop=loop, limits=limits) as server:
        greedy = server.connect().go()
        greedy.socket.sendall(b"".join(request(READ, number, 0, length) for number in range(64)))
        server.wait_for(lambda: server.reserved > 15 << 20, "all that one source may have")
        waiting = server.connect().go()
        waiting.send(READ, 0, 8 << 20)
        greedy.socket.close()
        assert waiting.reply().data == bytes(8 << 20)


def test_a_client_can_always_read_a_little_when_others_hold_all_memory(loop: str) -> None:
    limits = Limits(process_bytes=1 << 20)
    with LoopServer(UNCACHED, Export.read_only(GREEDY, ZeroDisk(1 << 30)), loop=loop, limits=limits) as server:
        greedy = server.connect().go(GREEDY)
        greedy.send(READ, 0, 8 << 20)
        server.wait_for(lambda: server.reserved > 8 << 20 and not server.waiting_for_pool, "more than the whole budget")
        modest, demanding = server.connect().go(), server.connect().go()
        demanding.send(READ, 0, GUARANTEED_BYTES + 1)
        for offset in range(0, 1 << 20, 100_000):
            assert modest.read(offset, 100_000) == CONTENT[offset : offset + 100_000]
        demanding.socket.settimeout(0.1)
        with pytest.raises(TimeoutError):
            demanding.socket.recv(1)
        demanding.socket.settimeout(PATIENCE)
        greedy.socket.close()
        assert demanding.reply().data == CONTENT[: GUARANTEED_BYTES + 1]


def test_a_client_that_takes_nothing_is_cut_and_one_that_takes_little_is_not(loop: str) -> None:
    limits = Limits(reply_stall_seconds=1, process_bytes=8 << 20)
    with LoopServer(Export.read_only("", ZeroDisk(1 << 30)), loop=loop, limits=limits) as server:
        stalled = server.connect().go()
        slow = server.connect().go()
        for client in (stalled, slow):
            client.send(READ, 0, 32 << 20)
        left = 32 << 20
        while server.connections == 2:
            left -= len(slow.receive(min(128 << 10, left - (1 << 20))))
            slow.socket.settimeout(PATIENCE)
        with pytest.raises(Disconnected):
            stalled.reply()
        slow.receive(left + 16 + 4 + 8)
        time.sleep(1.2)  # who owes nothing may be silent
        assert slow.read(0, 512) == bytes(512)


def test_requests_for_more_than_the_whole_budget_run_alone_and_one_after_the_other(loop: str) -> None:
    limits = Limits(process_bytes=1 << 20, connection_bytes=1 << 20)
    with LoopServer(Export.read_only("", ZeroDisk(1 << 30)), loop=loop, limits=limits) as server:
        clients = [server.connect().go() for _ in range(4)]
        for client in clients:
            client.socket.sendall(b"".join(client.pack(READ, number << 23, 8 << 20) for number in range(3)))
        with ThreadPoolExecutor(len(clients)) as threads:
            for replies in threads.map(Client.replies, clients):
                assert all(reply.data == bytes(8 << 20) for reply in replies.values())


def test_a_large_read_that_only_the_pool_can_answer_does_not_wait_for_itself(loop: str) -> None:
    """On a writable disk memory is reserved before it is known who answers; it must not count twice."""
    limits = Limits(process_bytes=1 << 20, connection_bytes=1 << 20)
    with LoopServer(Export.writable("", WritableDisk(CONTENT, cached=False)), loop=loop, limits=limits) as server:
        client = server.connect().go()
        for length in (64 << 10, 600 << 10, 1 << 20, len(CONTENT)):
            assert client.read(0, length) == CONTENT[:length]


def test_one_batch_of_large_reads_is_not_looked_up_before_any_of_it_is_sent(loop: str) -> None:
    disk = MemoryDisk(bytes(64 << 20))
    exports = (HEALTHY, Export.read_only(GREEDY, disk))
    with LoopServer(*exports, loop=loop) as server, HealthyClient(server.address, CONTENT) as healthy:
        greedy = server.connect().go(GREEDY)
        greedy.socket.sendall(b"".join(request(READ, number, 0, 32 << 20) for number in range(5000)))
        server.wait_for(lambda: disk.pieces_gathered > 0, "the first look-up")
        healthy.wait_for_a_round()
        assert disk.pieces_gathered < 100


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_one_batch_of_long_status_queries_is_not_answered_before_any_of_it_is_sent(loop: str, cached: bool) -> None:
    disk = FragmentedDisk(1 << 30, cached=cached)
    exports = (HEALTHY, Export.read_only(GREEDY, disk))
    with LoopServer(*exports, loop=loop) as server, HealthyClient(server.address, CONTENT) as healthy:
        greedy = server.connect().go(GREEDY, contexts=STATUS)
        greedy.socket.sendall(b"".join(request(BLOCK_STATUS, number, 0, 64 << 20) for number in range(300)))
        server.wait_for(lambda: len(disk.performed) > 0 and server.waiting_for_pool == 0, "the first answers")
        healthy.wait_for_a_round()
        assert len(disk.performed) <= 100  # half a MiB each


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize(
    ("command", "offset", "length"),
    [(BLOCK_STATUS, 0, 256 << 20), (READ, 1 << 30, 1)],
    ids=["statuses", "errors"],
)
def test_what_waits_for_a_client_is_reserved_but_for_one_batch(
    command: int, offset: int, length: int, cached: bool
) -> None:
    """R-70: also answers that were made on the loop thread."""
    export = Export.read_only("", FragmentedDisk(1 << 30, cached=cached), allocation_depth=True)
    with LoopServer(export) as server:
        greedy = server.connect().go(extended=True, contexts=(*STATUS, "qemu:allocation-depth"))
        said = memoryview(request(command, 1, offset, length, extended=True) * 200_000)
        greedy.socket.setblocking(False)
        deadline = time.monotonic() + PATIENCE
        while not server.unsent:
            assert time.monotonic() < deadline, "the socket takes everything"
            with contextlib.suppress(BlockingIOError):
                said = said[greedy.socket.send(said) :]
        assert server.unsent <= server.reserved + ARENA_SIZE + (64 << 10)


@pytest.mark.parametrize(
    ("limits", "extents"),
    [(Limits(status_seconds=0), 8), (Limits(status_seconds=1e-9), 2), (Limits(status_extents=3), 3)],
    ids=["none", "time", "extents"],
)
def test_a_status_is_as_long_as_the_limits_allow(loop: str, limits: Limits, extents: int) -> None:
    class PieceDisk(FragmentedDisk):
        """What is known in pieces, as of a chain that has to be read for it."""

        def status(self, offset: int, length: int) -> Iterator[Status]:
            for start in range(offset, offset + length, 1024):
                yield from super().status(start, 1024)

    disk = PieceDisk(4096, cached=False)
    with LoopServer(Export.read_only("", disk), loop=loop, limits=limits) as server:
        client = server.connect().go(contexts=STATUS)
        (found,) = client.ask(BLOCK_STATUS, 0, 4096).status.values()
        assert len(found) == extents


@pytest.mark.parametrize("command", [CACHE, READ, BLOCK_STATUS])
def test_one_client_does_not_take_the_pool_for_itself(loop: str, command: int) -> None:
    disk = MemoryDisk(CONTENT, cached=False)
    with LoopServer(Export.read_only("", disk), loop=loop) as server:
        greedy = server.connect().go(contexts=STATUS)
        modest = server.connect().go()
        with disk.blocked():
            greedy.socket.sendall(b"".join(request(command, n, 800 * n, 1) for n in range(1, 5000)))
            disk.wait_for_request()
            modest.send(READ, 0, 512)
            server.wait_for(lambda: server.waiting_for_pool == 2, "the modest client's request in the pool")
        assert modest.reply().data == CONTENT[:512]
        assert disk.performed.index(0) < 1000


def test_work_for_a_client_that_is_gone_is_not_done(loop: str) -> None:
    disk = ZeroDisk(1 << 30)
    with LoopServer(Export.read_only("", disk), loop=loop, tcp=True) as server:
        with disk.blocked():
            greedy = server.connect().go()
            greedy.socket.sendall(b"".join(request(CACHE, n, n << 20, 1) for n in range(100)))
            disk.wait_for_request()
            reset(greedy.socket)
            server.wait_for_connections(0)
        assert server.connect().go().read(0, 512) == bytes(512)
        assert len(disk.performed) <= Limits().workers + 1


def test_five_hundred_clients_that_send_single_bytes_disturb_nobody(
    loop: str, disk: MemoryDisk, many_descriptors: None
) -> None:
    limits = Limits(handshake_seconds=10 * PATIENCE, pending_handshakes=600, peer_connections=0, export_connections=0)
    served = LoopServer(Export.read_only("", disk), loop=loop, limits=limits)
    with served as server, HealthyClient(server.address, disk.content) as healthy:
        clients = [server.connect() for _ in range(500)]
        said = handshake(structured=False)
        for byte in said[:10]:
            for client in clients:
                client.socket.sendall(bytes([byte]))
        healthy.wait_for_a_round()
        for client in clients:
            client.socket.sendall(said[10:])
        for client in clients:
            client.finish_handshake()
        torn = [client.pack(READ, 1000 * number, 1000) for number, client in enumerate(clients)]
        for position in range(28):
            for client, header in zip(clients, torn, strict=True):
                client.socket.sendall(header[position : position + 1])
            healthy.wait_for_a_round()
        for number, client in enumerate(clients):
            assert client.reply().data == disk.content[1000 * number :][:1000]


def test_a_status_that_takes_too_long_gets_about_as_far_in_every_context(
    loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client goes on where the shortest answer ends."""

    class SlowDisk(FragmentedDisk):
        clock = 0.0

        def status(self, offset: int, length: int) -> Iterator[Status]:
            for start in range(offset, offset + length, 4096):
                self.clock += 0.001
                yield from super().status(start, 4096)

    disk = SlowDisk(8 << 20, cached=False)
    for module in ("exports.contexts", "transmission.perform"):
        monkeypatch.setattr(f"nbdq.server.{module}.monotonic", lambda: disk.clock)
    contexts = ("base:allocation", "qemu:allocation-depth")
    export = Export.read_only("", disk, allocation_depth=True)
    with LoopServer(export, loop=loop, limits=Limits(status_seconds=1)) as server:
        client = server.connect().go(contexts=contexts)
        status = client.ask(BLOCK_STATUS, 0, disk.size).status
        reached = [sum(length for length, _ in extents) for extents in status.values()]
        assert len(reached) == len(contexts)
        assert all(400 <= length // 4096 <= 600 for length in reached), reached

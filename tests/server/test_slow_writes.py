"""Writes that hold up the loop go to the pool, clients that send slowly hold no memory for ever (R-70, R-80)."""

import time

import pytest

from nbdq.block import Piece
from nbdq.server.exports.export import Export
from nbdq.server.limits import GUARANTEED_BYTES, Limits
from nbdq.server.transmission.pace import BATCH_SECONDS, POOLED_SECONDS, Pace
from tests.server.client import (
    FUA,
    PATIENCE,
    READ,
    WRITE,
    Client,
    Disconnected,
    HealthyClient,
    request,
)
from tests.server.conftest import CONTENT
from tests.server.harness import LoopServer, MemoryDisk, WritableDisk, resident_bytes

MIB = 1 << 20
SLOW = "slow"


class ThrottledDisk(WritableDisk):
    """A medium whose every write sleeps, as the kernel makes writers do when too much is dirty."""

    def __init__(self, content: bytes, *, seconds: float) -> None:
        super().__init__(content)
        self.seconds = seconds

    def _change(self, name: str, offset: int, view: memoryview) -> None:
        time.sleep(self.seconds)
        super()._change(name, offset, view)

    def count(self, name: str) -> int:
        return sum(change[0] == name for change in self.changes)


@pytest.mark.parametrize("flags", [0, FUA])
def test_a_slow_medium_does_not_hold_up_other_clients(loop: str, flags: int) -> None:
    """R-80: of all writes only few sleep on the loop thread."""
    disk = ThrottledDisk(CONTENT, seconds=3 * POOLED_SECONDS)
    exports = (Export.read_only("", MemoryDisk(CONTENT)), Export.writable(SLOW, disk))
    with LoopServer(*exports, loop=loop) as server, HealthyClient(server.address, CONTENT) as healthy:
        writer = server.connect().go(SLOW)
        for start in range(0, 100, 20):
            writer.socket.sendall(
                b"".join(writer.pack(WRITE, n << 14, 512, flags=flags) + bytes(512) for n in range(start, start + 20))
            )
            healthy.wait_for_a_round()
            assert all(reply.error == 0 for reply in writer.replies().values())
        assert len(disk.changes) == 100
        assert disk.count("write_cached") <= 5
        assert server.call(lambda: server._server.lag.worst) < PATIENCE


def test_a_medium_that_is_quick_again_is_written_on_the_loop_thread_again(loop: str) -> None:
    disk = ThrottledDisk(CONTENT, seconds=2 * BATCH_SECONDS)
    with LoopServer(Export.writable("", disk), loop=loop) as server:
        client = server.connect().go()
        for _ in range(3):
            assert client.error(WRITE, 0, 512, payload=bytes(512)) == 0
        assert disk.count("write") >= 1
        disk.seconds = 0
        inline, deadline = disk.count("write_cached"), time.monotonic() + PATIENCE
        while disk.count("write_cached") == inline:
            assert client.error(WRITE, 0, 512, payload=bytes(512)) == 0
            assert time.monotonic() < deadline


def test_a_loop_that_is_held_up_shows_it(loop: str) -> None:
    with LoopServer(Export.read_only("", MemoryDisk(CONTENT)), loop=loop) as server:
        server.call(lambda: time.sleep(0.3))
        server.wait_for(lambda: server._server.lag.worst > 0.1, "a lag that is seen")


def test_writes_return_to_the_loop_when_they_have_been_quick_for_a_while() -> None:
    pace = Pace()
    assert pace.inline_from <= 1000
    pace.inline_was_slow(1000.0)
    pause = pace.inline_from - 1000
    assert pause > 0
    pace.pooled(1000.0, 1000.0 + POOLED_SECONDS / 2)
    assert pace.inline_from == 1000 + pause
    pace.pooled(1000.0, 1000.0 + 2 * POOLED_SECONDS)
    assert pace.inline_from == 1000 + 2 * POOLED_SECONDS + pause
    pace.pooled(1001.0, 1002.0)  # begun when writes were on the loop again, as an allocation is that takes its time
    assert pace.inline_from < 1001


def test_the_pause_grows_with_each_vain_return_and_is_forgotten_in_time() -> None:
    pace = Pace()
    now, pauses = 1000.0, []
    for _ in range(10):
        pace.inline_was_slow(now)
        pauses.append(pace.inline_from - now)
        now = pace.inline_from
    assert pauses == sorted(pauses)
    assert pauses[-1] > 10 * pauses[0]
    assert pauses[-1] <= 2.0
    pace.inline_was_slow(now + 100)
    assert pace.inline_from - now - 100 == pytest.approx(pauses[0])


# Memory of payloads.


def test_clients_that_announce_much_and_send_little_get_no_more_than_the_budget(loop: str) -> None:
    """R-70."""
    limits = Limits(process_bytes=8 * MIB)
    disk = WritableDisk(bytes(64 * MIB))
    with LoopServer(Export.writable("", disk), loop=loop, limits=limits) as server:
        modest = server.connect().go()
        before = resident_bytes()
        for _ in range(30):
            greedy = server.connect().go()
            greedy.socket.sendall(request(WRITE, 1, 0, 3 * MIB) + bytes(1000))
            assert modest.error(WRITE, 4096, 200_000, payload=b"x" * 200_000) == 0
            assert server.reserved <= limits.process_bytes + 31 * GUARANTEED_BYTES
        assert resident_bytes() - before < 40 * MIB
        assert disk.content[:4096] == bytes(4096)


def test_a_payload_that_finds_no_memory_is_received_when_there_is_some(loop: str) -> None:
    limits = Limits(process_bytes=4 * MIB)
    disk = WritableDisk(bytes(64 * MIB))
    with LoopServer(Export.writable("", disk), loop=loop, limits=limits) as server:
        holder = server.connect().go()
        holder.socket.sendall(request(WRITE, 1, 0, 4 * MIB) + bytes(1000))
        server.wait_for(lambda: server.reserved >= 4 * MIB, "the whole budget")
        payload = bytes(range(256)) * 8192
        waiting = server.connect().go()
        waiting.send_beside(
            waiting.pack(WRITE, 5, 100)
            + b"y" * 100
            + waiting.pack(WRITE, MIB, 2 * MIB)
            + payload
            + waiting.pack(READ, 0, 9)
        )
        assert waiting.reply().error == 0
        other = server.connect().go()  # receives into the same buffer meanwhile
        for _ in range(20):
            assert other.error(WRITE, 8 * MIB, 100_000, payload=b"z" * 100_000) == 0
        waiting.socket.settimeout(0.1)
        with pytest.raises(TimeoutError):
            waiting.socket.recv(1)
        waiting.socket.settimeout(PATIENCE)
        holder.socket.close()
        assert all(reply.error == 0 for reply in waiting.replies().values())
        assert disk.content[MIB : 3 * MIB] == payload
        assert disk.content[5:105] == b"y" * 100
        assert disk.content[:5] == bytes(5)


def test_payloads_larger_than_all_memory_come_one_after_the_other(loop: str) -> None:
    limits = Limits(process_bytes=MIB, connection_bytes=MIB)
    for cached in (True, False):
        disk = WritableDisk(bytes(32 * MIB), cached=cached)
        with LoopServer(Export.writable("", disk), loop=loop, limits=limits) as server:
            clients = [server.connect().go() for _ in range(4)]
            for number, client in enumerate(clients):
                said = b""
                for index in (0, 4):
                    said += client.pack(WRITE, (number + index) * 3 * MIB, 3 * MIB) + bytes([number + 1]) * 3 * MIB
                    said += client.pack(WRITE, 31 * MIB + number * 1000, 500) + bytes([number + 1]) * 500
                client.send_beside(said)
            for client in clients:
                assert all(reply.error == 0 for reply in client.replies().values())
        for number in range(4):
            for index in (0, 4):
                start = (number + index) * 3 * MIB
                assert disk.content[start : start + 3 * MIB] == bytes([number + 1]) * 3 * MIB


def test_writes_that_wait_for_the_pool_hold_only_their_share_of_memory(loop: str) -> None:
    limits = Limits(process_bytes=8 * MIB, connection_bytes=2 * MIB)
    disk = WritableDisk(CONTENT, cached=False)
    with LoopServer(Export.writable("", disk), loop=loop, limits=limits) as server:
        greedy = server.connect().go()
        with disk.blocked():
            said = [greedy.pack(WRITE, n * 8192, 8192) + bytes([n % 255 + 1]) * 8192 for n in range(500)]
            greedy.send_beside(b"".join(said))
            disk.wait_for_request()
            time.sleep(0.1)
            assert server.reserved <= 2 * MIB + GUARANTEED_BYTES
        assert all(reply.error == 0 for reply in greedy.replies().values())
        for n in range(500):
            assert disk.content[n * 8192 :][:8192] == bytes([n % 255 + 1]) * 8192


def test_a_client_that_stops_within_a_payload_is_cut_and_one_that_is_slow_is_not(loop: str) -> None:
    limits = Limits(payload_stall_seconds=1)
    disk = WritableDisk(bytes(8 * MIB))
    with LoopServer(Export.writable("", disk), loop=loop, limits=limits) as server:
        stalled, slow = server.connect().go(), server.connect().go()
        stalled.socket.sendall(request(WRITE, 1, 0, MIB) + bytes(100))
        slow.socket.sendall(slow.pack(WRITE, MIB, MIB))
        sent = 0
        while server.connections == 2:
            slow.socket.sendall(b"x")
            sent += 1
            time.sleep(0.02)
        with pytest.raises(Disconnected):
            stalled.receive(1)
        slow.socket.sendall(b"x" * (MIB - sent))
        assert slow.reply().error == 0
        time.sleep(1.3)  # who owes nothing may be silent
        assert slow.read(MIB, 512) == b"x" * 512
        assert disk.content[:MIB] == bytes(MIB)


def test_a_payload_whose_beginning_waited_for_memory_has_a_deadline_too(loop: str) -> None:
    limits = Limits(payload_stall_seconds=0.3, process_bytes=MIB)
    with LoopServer(Export.writable("", WritableDisk(bytes(8 * MIB))), loop=loop, limits=limits) as server:
        for _ in range(3):
            server.connect().go().socket.sendall(request(WRITE, 1, 0, MIB) + bytes(10_000))
        server.wait_for_connections(0)


def test_replies_from_a_disk_that_can_change_are_counted(loop: str) -> None:
    """R-70: such a disk gives copies where one that cannot change gives pieces of files."""

    class CopyingDisk(WritableDisk):
        copied = 0

        def gather_cached(self, offset: int, length: int) -> list[Piece] | None:
            self.copied += length
            return [memoryview(bytes(self.content[offset : offset + length]))]

    limits = Limits(process_bytes=32 * MIB)
    disk = CopyingDisk(bytes(16 * MIB))
    with LoopServer(Export.writable("", disk), loop=loop, limits=limits) as server:
        for _ in range(20):
            greedy = server.connect().go()
            greedy.socket.sendall(b"".join(request(READ, n, 0, 16 * MIB) for n in range(64)))
        modest = server.connect().go()
        for _ in range(5):
            assert modest.read(0, 200_000) == bytes(200_000)
        assert disk.copied <= limits.process_bytes + 5 * 200_000


def test_a_client_that_leaves_its_replies_unread_is_not_written_for(loop: str) -> None:
    """R-70: a client that does not read is not read."""
    disk = WritableDisk(bytes(64 * MIB))
    with LoopServer(Export.writable("", disk), loop=loop) as server:
        greedy = Client(server.address).go()
        greedy.socket.setblocking(False)
        said = request(READ, 1, 0, MIB) * 8 + (request(WRITE, 2, 4096, 4096) + b"x" * 4096) * 50
        total = 0
        try:
            while total < 256 * MIB:
                total += greedy.socket.send(said)
        except BlockingIOError:
            pass
        assert total < 64 * MIB
        modest = server.connect().go()
        assert modest.error(WRITE, MIB, 512, payload=b"y" * 512) == 0
        greedy.socket.close()

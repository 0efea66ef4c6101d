"""How fast the clients of an export may go: averages kept, shared fairly, in nobody's way at the end."""

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from nbdq.errors import ExportError
from nbdq.nbd.handshake import TlsMode
from nbdq.nbd.transmission import RawRequest
from nbdq.server.exports.export import Export
from nbdq.server.exports.rate import Rates, Throttle
from nbdq.server.limits import Limits
from nbdq.server.tls.credentials import Tls
from tests.server.client import FLUSH, FUA, READ, WRITE, Client, request
from tests.server.conftest import CONTENT
from tests.server.harness import LoopServer, MemoryDisk, WritableDisk
from tests.server.secure import TlsClient, trusting
from tests.support.pki import Pki
from tests.support.tools import requires

MIB = 1 << 20


class Time:
    """A clock that moves when it is told to, and calls who asked for it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def clock(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], None]) -> Any:
        self._count += 1
        call = (self.now + delay, self._count, callback)
        self._due.append(call)
        return SimpleNamespace(cancel=lambda: self._due.remove(call))

    def run_until(self, end: float) -> None:
        while self._due and min(self._due)[0] <= end:
            due = min(self._due)
            self._due.remove(due)
            self.now = due[0]
            due[2]()
        self.now = end


class Waiter:
    """A client with requests ready at any time, as its session would serve them."""

    def __init__(self, throttle: Throttle, make: Callable[[], RawRequest], depth: int = 64) -> None:
        self.throttle = throttle
        self.requests = self.bytes = 0
        self._make = make
        self.backlog = deque(make() for _ in range(depth))
        self.resume = self.serve

    def serve(self) -> None:
        while self.throttle.serve(self.backlog, self._batch, self.resume, paid=False):
            pass

    def _batch(self, portion: deque[RawRequest]) -> bool:
        while portion:
            _, _, _, _, length = portion.popleft()
            self.requests += 1
            self.bytes += length
            self.backlog.append(self._make())
        return True


def waiters(time: Time, rates: Rates, *makers: Callable[[], RawRequest]) -> tuple[Throttle, list[Waiter]]:
    throttle = Throttle(rates, clock=time.clock, call_later=time.call_later)
    found = [Waiter(throttle, make) for make in makers]
    for waiter in found:
        waiter.serve()
    return throttle, found


@pytest.mark.parametrize("seed", range(5))
def test_averages_keep_to_both_rates_whatever_the_requests(seed: int) -> None:
    chance, time = random.Random(seed), Time()
    rates = Rates(requests=chance.choice((10, 500, 5000)), bytes=chance.choice((MIB, 100 * MIB)), burst=1)
    lengths = [chance.choice((512, 4096, 65536, 32 * MIB)) for _ in range(50)]
    _, (one, two) = waiters(
        time, rates, *2 * (lambda: (0, chance.choice((READ, WRITE)), 0, 0, chance.choice(lengths)),)
    )
    time.run_until(60)
    requests, transferred = one.requests + two.requests, one.bytes + two.bytes
    assert requests <= 61 * rates.requests + 1, seed
    assert transferred <= 61 * rates.bytes + 32 * MIB, seed
    assert requests >= 58 * rates.requests or transferred >= 58 * rates.bytes, seed


def test_clients_share_a_rate_evenly_however_much_each_has_ready() -> None:
    time = Time()

    def small() -> RawRequest:
        return 0, READ, 0, 0, 4096

    throttle, (one, two) = waiters(time, Rates(requests=1000), small, small)
    three = Waiter(throttle, small, depth=1)
    three.serve()
    time.run_until(20)
    counts = [one.requests, two.requests, three.requests]
    assert sum(counts) == pytest.approx(21 * 1000, rel=0.01)
    assert max(counts) - min(counts) <= 1100, "but for the burst, which the first one got"


def test_a_flush_costs_nothing_and_waits_for_nobody() -> None:
    time = Time()
    throttle, (busy,) = waiters(time, Rates(requests=1, bytes=1), lambda: (0, READ, 0, 0, 4096))
    assert busy.requests == 1
    other = Waiter(throttle, lambda: (0, FLUSH, 0, 0, 0), depth=3)
    other.throttle.serve(other.backlog, other._batch, other.resume, paid=False)
    assert other.requests == 3


def test_what_is_refused_for_its_length_is_not_charged_in_full() -> None:
    time = Time()
    _, (waiter,) = waiters(time, Rates(bytes=64 * MIB), lambda: (0, READ, 0, 0, (1 << 32) - 1))
    time.run_until(100)
    assert waiter.requests >= 100


def test_other_rates_hold_at_once_and_forgive_debts() -> None:
    time = Time()
    throttle, (waiter,) = waiters(time, Rates(bytes=1), lambda: (0, READ, 0, 0, MIB))
    assert waiter.requests == 1
    throttle.change(Rates(requests=100, burst=0.01))
    time.run_until(10)
    assert waiter.requests == pytest.approx(1000, abs=10)


def test_who_has_left_is_not_given_a_turn() -> None:
    time = Time()
    throttle, (gone, there) = waiters(time, Rates(requests=10, burst=0.1), *2 * (lambda: (0, READ, 0, 0, 512),))
    throttle.forget(gone.resume)
    before = gone.requests
    time.run_until(10)
    assert gone.requests == before
    assert there.requests >= 95


@pytest.mark.parametrize("rates", [{"requests": -1}, {"bytes": -1}, {"burst": 0}])
def test_rates_that_make_no_sense_are_refused(rates: dict[str, float]) -> None:
    with pytest.raises(ExportError):
        Rates(**rates)


def test_a_client_gets_what_the_rate_allows_and_no_processor_time_is_spent_on_waiting(loop: str) -> None:
    export = Export.read_only("", MemoryDisk(CONTENT), rates=Rates(requests=200, burst=0.1))
    with LoopServer(export, loop=loop) as server:
        client = server.connect().go()
        begun, busy = time.monotonic(), server.call(time.thread_time)
        client.send_beside(b"".join(client.pack(READ, 0, 512) for _ in range(220)))
        assert len(client.replies()) == 220
        assert time.monotonic() - begun >= (220 - 20) / 200 * 0.9
        assert server.call(time.thread_time) - busy < 0.5


def test_bytes_are_limited_over_all_connections_in_both_directions(loop: str) -> None:
    disk = WritableDisk(CONTENT)
    export = Export.writable("", disk, rates=Rates(bytes=4 * MIB, burst=0.1))
    with LoopServer(export, loop=loop) as server:
        writer, reader = server.connect().go(), server.connect().go()
        begun = time.monotonic()

        def write() -> None:
            for offset in range(0, MIB, MIB // 4):
                assert writer.error(WRITE, offset, MIB // 4, payload=bytes(MIB // 4)) == 0

        thread = threading.Thread(target=write)
        thread.start()
        for offset in range(0, MIB, MIB // 4):
            reader.read(offset, MIB // 4)
        thread.join()
        assert time.monotonic() - begun >= (2 - 0.4 - 0.5) / 4


def test_memory_for_a_large_payload_is_not_taken_before_it_can_be_used(loop: str) -> None:
    disk = WritableDisk(CONTENT)
    export = Export.writable("", disk, rates=Rates(bytes=MIB, burst=0.01))
    with LoopServer(export, loop=loop) as server:
        clients = [server.connect().go() for _ in range(5)]
        for client in clients:
            client.send_beside(request(WRITE, 1, 0, 2 * MIB) + bytes(2 * MIB))
        server.wait_for(lambda: disk.changes != [], "the first write")
        assert server.reserved <= 2 * MIB, "one payload at a time"
        server.call(lambda: export.limit(Rates()))
        server.wait_for(lambda: len(disk.changes) == 5, "the others")


def test_pause_drain_and_end_do_not_wait_for_rates(loop: str) -> None:
    export = Export.read_only("", MemoryDisk(CONTENT), rates=Rates(requests=1, burst=1))
    with LoopServer(export, loop=loop, limits=Limits(drain_seconds=20)) as server:
        client = server.connect().go()
        client.socket.sendall(b"".join(client.pack(READ, 0, 512) for _ in range(40)))  # received at once
        client.reply()
        begun = time.monotonic()

        async def drain() -> None:
            async with export.gate.closed():
                pass
            await export.pause(None)
            export.resume()

        server.wait(drain)
        server.stop()
        assert len(client.replies()) == 39
        assert time.monotonic() - begun < 15


def test_a_client_that_leaves_gets_no_further_than_the_rate_allows(loop: str) -> None:
    disk = MemoryDisk(CONTENT, cached=False)
    with LoopServer(Export.read_only("", disk, rates=Rates(requests=2, burst=1)), loop=loop) as server:
        begun = time.monotonic()
        for _ in range(3):
            client = Client(server.address).go()
            client.socket.sendall(b"".join(request(READ, number, 0, 1) for number in range(100)))
            client.socket.close()
        time.sleep(0.5)
        assert len(disk.performed) <= 2 + 2 * (time.monotonic() - begun) + 1


@pytest.mark.parametrize(("cached", "burst", "seed"), [(True, 0.02, 0), (False, 1, 1)])
def test_what_is_written_at_a_limited_pace_is_what_was_sent(loop: str, cached: bool, burst: float, seed: int) -> None:
    """Payloads wait in the receive buffer, in memory of their own, or in the socket, and none takes another's place."""
    chance, limits = random.Random(seed), Limits(requests=4)
    slot, count = 512 << 10, 40
    disk = WritableDisk(bytes(3 * count * slot), cached=cached)
    rates = Rates(requests=400, bytes=100 * MIB, burst=burst)
    with LoopServer(Export.writable("", disk, rates=rates), loop=loop, limits=limits) as server:
        expected: dict[int, bytes] = {}
        clients = [server.connect().go() for _ in range(3)]
        for number, client in enumerate(clients):
            said = b""
            for turn in range(count):
                offset = (number * count + turn) * slot
                payload = chance.randbytes(chance.choice((1, 512, 4096, 70_000, 200_000, 400_000)))
                expected[offset] = payload
                said += client.pack(WRITE, offset, len(payload), flags=chance.choice((0, 0, FUA))) + payload
                if chance.random() < 0.2:
                    said += client.pack(FLUSH)
            client.send_beside(said)
        for client in clients:
            assert all(reply.error == 0 for reply in client.replies().values())
        for offset, payload in expected.items():
            assert disk.content[offset : offset + len(payload)] == payload, (seed, offset)
            assert disk.content[offset + len(payload)] == 0


@requires("certtool")
@pytest.mark.parametrize("cached", [True, False])
def test_what_tls_has_decrypted_already_is_served_when_the_rate_allows_it(
    loop: str, tls: Tls, pki: Pki, cached: bool
) -> None:
    """Nothing comes in the socket any more when it waits within the stream."""
    chance, slot, count = random.Random(cached), 128 << 10, 60
    disk = WritableDisk(bytes(count * slot), cached=cached)
    export = Export.writable("disk", disk, rates=Rates(requests=150, burst=0.02))
    with (
        LoopServer(export, loop=loop, tls=tls, tls_mode=TlsMode.REQUIRE) as server,
        TlsClient(server, trusting(pki.server)) as client,
    ):
        client.go()
        expected, said = {}, b""
        for offset in range(0, count * slot, slot):
            expected[offset] = chance.randbytes(chance.choice((1, 512, 4096, 70_000)))
            said += client.pack(WRITE, offset, len(expected[offset])) + expected[offset]
        client.socket.sendall(said)  # in this thread: OpenSSL does not do two things at once
        assert all(reply.error == 0 for reply in client.replies().values())
        for offset, payload in expected.items():
            assert client.read(offset, len(payload)) == payload

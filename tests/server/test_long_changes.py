"""Requests as long as extended headers permit (P96, P124): whole disks at once, and nobody waits for them."""

import asyncio
import errno
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from nbdq.block import Kind, Status
from nbdq.server.exports.export import Export
from tests.server.client import (
    BLOCK_STATUS,
    CACHE,
    EINVAL,
    ENOSPC,
    FAST_ZERO,
    FUA,
    NO_HOLE,
    PATIENCE,
    READ,
    TRIM,
    WRITE_ZEROES,
    Client,
)
from tests.server.harness import LoopServer, WritableDisk

SIZE = 1 << 62
GIB = 1 << 30
ENOTSUP = 95


class HugeDisk(WritableDisk):
    """A disk of zeros that notes changes, each of which waits while a test holds it."""

    def __init__(self) -> None:
        super().__init__(b"", cached=False)
        self.size = SIZE
        self.fast: list[bool] = []
        self.prefetched: list[tuple[int, int]] = []
        self.allowed = threading.Semaphore(10**6)
        self.fails_at = SIZE

    def hold(self) -> None:
        """Let no further change happen."""
        while self.allowed.acquire(blocking=False):
            pass

    def _change(self, name: str, offset: int, view: memoryview) -> None:
        raise AssertionError("data is written")

    def _note(self, name: str, offset: int, length: int) -> None:
        assert self.allowed.acquire(timeout=PATIENCE)
        if offset + length > self.fails_at:
            raise OSError(errno.ENOSPC, "no space left", "/secret")
        self.changes.append((name, offset, length))

    def zero(self, offset: int, length: int, *, unmap: bool, fast: bool = False) -> None:
        if fast and "fast zero" in self.errors:
            raise OSError(self.errors["fast zero"], "slow")
        self.fast.append(fast)
        self._note("unmap" if unmap else "zero", offset, length)

    def discard(self, offset: int, length: int) -> None:
        self._note("discard", offset, length)

    def read_into(self, offset: int, view: memoryview) -> None:
        view[:] = bytes(len(view))

    def prefetch(self, offset: int, length: int) -> None:
        self.prefetched.append((offset, length))

    def flush(self) -> None:
        self.changes.append(("flush", 0, 0))

    def status(self, offset: int, length: int) -> Iterator[Status]:
        middle = offset + length // 2
        starts = np.array([offset, middle], dtype=np.uint64)
        yield Status(starts, np.array([Kind.DATA, Kind.ZERO], np.uint8), np.ones(2, np.uint16), offset + length, starts)


@pytest.fixture
def disk() -> HugeDisk:
    return HugeDisk()


@pytest.fixture
def export(disk: HugeDisk) -> Export:
    return Export.writable("", disk)


@pytest.fixture
def server(loop: str, export: Export) -> Iterator[LoopServer]:
    with LoopServer(export, loop=loop) as running:
        yield running


def begin(server: LoopServer) -> Client:
    return server.connect().go(extended=True, contexts=("base:allocation",))


@pytest.mark.parametrize(
    ("command", "flags", "name"),
    [
        (WRITE_ZEROES, 0, "unmap"),
        (WRITE_ZEROES, NO_HOLE, "zero"),
        (WRITE_ZEROES, FAST_ZERO, "unmap"),
        (TRIM, 0, "discard"),
    ],
)
@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (512, SIZE - 1024), (SIZE - 6 * GIB - 1, 5 * GIB)])
def test_one_request_changes_as_much_as_it_says_without_gap_or_overlap(
    server: LoopServer, disk: HugeDisk, command: int, flags: int, name: str, offset: int, length: int
) -> None:
    assert begin(server).error(command, offset, length, flags=flags) == 0
    position = offset
    for changed, start, count in disk.changes:
        assert changed == name
        assert start == position
        assert start % (2 << 20) == 0 or start == offset, "a cluster is cut that the client did not cut"
        position += count
    assert position == offset + length
    assert len(disk.changes) < 200
    assert disk.fast[:1] == ([bool(flags & FAST_ZERO)] if command == WRITE_ZEROES else [])
    assert not any(disk.fast[1:])


def test_what_could_not_be_zeroed_fast_is_refused_before_anything_changes(server: LoopServer, disk: HugeDisk) -> None:
    disk.errors["fast zero"] = errno.EOPNOTSUPP
    assert begin(server).error(WRITE_ZEROES, 0, SIZE, flags=FAST_ZERO) == ENOTSUP
    assert not disk.changes


def test_fua_saves_the_whole_of_it(server: LoopServer, disk: HugeDisk) -> None:
    assert begin(server).error(TRIM, 0, SIZE, flags=FUA) == 0
    assert [name for name, _, _ in disk.changes].index("flush") == len(disk.changes) - 1


def test_a_failure_in_the_middle_is_the_answer(server: LoopServer, disk: HugeDisk) -> None:
    disk.fails_at = SIZE // 2
    client = begin(server)
    reply = client.ask(WRITE_ZEROES, 0, SIZE)
    assert reply.error == ENOSPC
    assert "secret" not in reply.message
    assert client.error(TRIM, 0, 4096) == 0


def test_ranges_that_wrap_around_are_refused(server: LoopServer, disk: HugeDisk) -> None:
    """P87: 64-bit sums have no 64-bit overflow."""
    client = begin(server)
    for length in (SIZE + 1, (1 << 64) - 1, 1 << 63):
        assert client.error(WRITE_ZEROES, 4096, length) == ENOSPC
        for command in (TRIM, CACHE, BLOCK_STATUS, READ):
            assert client.error(command, 4096, length) == EINVAL
    assert client.error(READ, 0, SIZE) == EINVAL
    assert not disk.changes


def test_a_whole_disk_may_be_cached_which_is_a_hint(server: LoopServer, disk: HugeDisk) -> None:
    assert begin(server).error(CACHE, 0, SIZE) == 0
    assert len(disk.prefetched) == 1


def test_the_status_of_a_whole_disk_has_lengths_of_64_bits(server: LoopServer) -> None:
    assert begin(server).ask(BLOCK_STATUS, 0, SIZE).status == {0: [(SIZE // 2, 0), (SIZE // 2, 3)]}


def test_clients_are_served_while_a_disk_is_trimmed(server: LoopServer, disk: HugeDisk) -> None:
    disk.hold()
    client = begin(server)
    trim = client.send(TRIM, 0, SIZE)
    read = client.send(READ, 0, 4096)
    assert client.reply().cookie == read
    assert server.connect().go().read(GIB, 4096) == bytes(4096)
    disk.allowed.release(1000)
    reply = client.reply()
    assert (reply.cookie, reply.error) == (trim, 0)


def test_many_of_them_take_one_thread_of_the_pool_and_turns(server: LoopServer, disk: HugeDisk) -> None:
    """Or one client could have them all, and everybody else wait."""
    disk.hold()
    client = begin(server)
    part = SIZE // 16
    for number in range(16):
        client.send(TRIM, number * part, part)
    others = server.connect().go()
    assert others.read(GIB, 4096) == bytes(4096)
    disk.allowed.release(16)
    server.wait_for(lambda: len(disk.changes) == 16, "a piece of each")
    assert {offset for _, offset, _ in disk.changes} == {number * part for number in range(16)}
    disk.allowed.release(10**6)
    assert not any(reply.error for reply in client.replies().values())
    assert sum(length for _, _, length in disk.changes) == SIZE


def test_a_disk_is_drained_in_the_middle_and_the_request_goes_on_afterwards(
    server: LoopServer, disk: HugeDisk, export: Export
) -> None:
    disk.hold()
    client = begin(server)
    client.send(WRITE_ZEROES, 0, SIZE)
    disk.allowed.release(2)
    server.wait_for(lambda: len(disk.changes) == 2, "two pieces")
    entered = threading.Event()
    leave = threading.Event()

    async def drain() -> int:
        async with export.gate.closed():
            entered.set()
            before = len(disk.changes)
            while not leave.is_set():
                await asyncio.sleep(0.001)
            return len(disk.changes) - before

    task = threading.Thread(target=lambda: results.append(server.wait(drain)))
    results: list[int] = []
    task.start()
    assert not entered.wait(0.05), "drained while a piece is being carried out"
    disk.allowed.release(1)
    assert entered.wait(PATIENCE)
    disk.allowed.release(1000)
    leave.set()
    task.join()
    assert results == [0]
    assert client.reply().error == 0
    assert sum(length for _, _, length in disk.changes) == SIZE


def test_what_a_disk_has_lost_meanwhile_is_left_out(server: LoopServer, disk: HugeDisk, export: Export) -> None:
    disk.hold()
    client = begin(server)
    client.send(WRITE_ZEROES, 0, SIZE)

    async def shrink() -> None:
        server_side = asyncio.get_running_loop()
        server_side.call_soon(disk.allowed.release, 1)
        async with export.gate.closed():
            disk.size = 100 * GIB
            export.adopt(disk)
            disk.allowed.release(1000)

    server.wait(shrink)
    assert client.reply().error == 0
    assert sum(length for _, _, length in disk.changes) == 100 * GIB


@pytest.mark.parametrize("is_cut", [True, False], ids=["cut", "vanished"])
def test_nobody_finishes_what_a_client_had_begun_that_is_gone(
    server: LoopServer, disk: HugeDisk, export: Export, is_cut: bool
) -> None:
    """R-72: as at the end of the time that a server has to stop; and whoever comes back after a crash must not have
    what he writes then zeroed by what he had asked for before."""
    disk.hold()
    client = begin(server)
    client.send(TRIM, 0, SIZE)
    server.wait_for(lambda: server.waiting_for_pool == 1, "the request")
    if is_cut:
        server.call(lambda: export.cut(at_once=True))
    else:
        client.socket.close()
    server.wait_for_connections(0)
    disk.allowed.release(1000)
    server.wait_until_idle()
    assert sum(length for _, _, length in disk.changes) <= 4 * GIB

"""Draining a disk under its clients, exchanging it, and going on: whatever they are doing, and however it ends."""

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, cast

import pytest

from nbdq.server.exports.export import Export, Exports
from nbdq.server.exports.volume import Volume, all_drained
from nbdq.server.limits import Limits
from nbdq.server.threads import in_thread
from nbdq.server.transmission import detach
from tests.server.client import FLUSH, FUA, READ, WRITE, Background, Client, handshake
from tests.server.conftest import CONTENT
from tests.server.harness import FileDisk, LoopServer, MemoryDisk, WritableDisk

OTHER = random.Random("other").randbytes(len(CONTENT))
BIG = 1 << 20


class Drain:
    """A drain of an export's disk that ends when the test says so, or is told what to raise."""

    def __init__(self, server: LoopServer, *exports: Export, device: Any = None) -> None:
        """Begin; inside, ``device`` takes the place of the first export's."""
        self.entered = threading.Event()
        self._go_on: Future[None] = Future()
        self._server = server

        async def drain() -> None:
            async with AsyncExitStack() as stack:
                for export in exports:
                    await stack.enter_async_context(export.gate.closed())
                if device is not None:
                    exports[0].adopt(device)
                self.entered.set()
                await asyncio.wrap_future(self._go_on)

        self.task: asyncio.Task[None] = server.call(lambda: asyncio.get_running_loop().create_task(drain()))

    def wait_until_inside(self) -> None:
        assert self.entered.wait(30)

    @property
    def is_waiting(self) -> bool:
        """Whether the disk is not drained yet, after everything that could drain it has had its turn."""
        for _ in range(5):
            self._server.call(lambda: None)
        return not self.entered.is_set()

    def end(self, error: Exception | None = None) -> None:
        """Let the block end, with ``error``, and wait until sessions have gone on."""
        if error is None:
            self._go_on.set_result(None)
        else:
            self._go_on.set_exception(error)
        self._server.wait(lambda: finished(self.task))


async def finished(task: "asyncio.Task[None]") -> None:
    await asyncio.wait([task])


def on_loop(server: LoopServer, coroutine: Callable[[], Awaitable[None]]) -> None:
    server.wait(coroutine)


@pytest.fixture
def old() -> WritableDisk:
    return WritableDisk(CONTENT)


@pytest.fixture
def new() -> WritableDisk:
    return WritableDisk(OTHER)


def test_what_comes_while_the_disk_is_drained_waits_for_the_new_one(
    loop: str, old: WritableDisk, new: WritableDisk
) -> None:
    export = Export.writable("", old)
    with LoopServer(export, loop=loop) as server:
        client = server.connect().go()
        assert client.read(0, 4096) == CONTENT[:4096]
        drain = Drain(server, export, device=new)
        drain.wait_until_inside()
        client.send(READ, 4096, 4096)
        client.send(WRITE, 0, 512, payload=b"x" * 512)
        client.send(FLUSH)
        assert not drain.is_waiting
        assert not new.changes
        drain.end()
        replies = list(client.replies().values())
        assert [reply.error for reply in replies] == [0, 0, 0]
        assert any(reply.data == OTHER[4096:8192] for reply in replies)
        assert client.read(0, 1024) == b"x" * 512 + OTHER[512:1024]
        assert new.durable[:512] == b"x" * 512
        assert not old.changes


@pytest.mark.parametrize("leaves", [False, True], ids=["stays", "leaves"])
@pytest.mark.parametrize(
    ("command", "flags"), [(READ, 0), (WRITE, 0), (WRITE, FUA), (FLUSH, 0)], ids=["read", "write", "FUA", "flush"]
)
def test_what_is_in_progress_ends_on_the_old_disk_first(
    loop: str, new: WritableDisk, command: int, flags: int, leaves: bool
) -> None:
    """Whether or not the client that asked for it has been cut."""
    old = WritableDisk(CONTENT, cached=False)
    export = Export.writable("", old)
    with LoopServer(export, loop=loop) as server:
        client = server.connect().go()
        with old.blocked():
            payload = b"x" * 512 if command == WRITE else b""
            client.send(command, 0, 512 if command != FLUSH else 0, flags=flags, payload=payload)
            old.wait_for_request()
            if leaves:
                server.call(lambda: [connection.abort() for connection in list(export.clients)])
            drain = Drain(server, export, device=new)
            assert drain.is_waiting
        drain.wait_until_inside()
        assert bool(old.changes) == (command == WRITE)
        assert old.flushes == (command == FLUSH or (bool(flags) and not leaves))
        drain.end()
        if not leaves:
            assert client.reply().error == 0
        assert not new.changes


def test_a_payload_that_is_half_there_is_written_to_the_new_disk(
    loop: str, old: WritableDisk, new: WritableDisk
) -> None:
    export = Export.writable("", old)
    with LoopServer(export, loop=loop) as server:
        payload = random.Random(1).randbytes(BIG)
        client = server.connect().go()
        for cut in (10, 100_000, BIG - 1):
            client.socket.sendall(client.pack(WRITE, 0, BIG) + payload[:cut])
            other = server.connect().go()
            assert other.read(0, 512) is not None  # the loop has had its turn with the half
            drain = Drain(server, export, device=new)
            drain.wait_until_inside()
            drain.end()
            client.socket.sendall(payload[cut:])
            assert client.reply().error == 0
            assert client.read(0, BIG) == payload
        assert not old.changes


def test_a_client_that_comes_while_the_disk_is_drained_is_served_by_the_new_one(
    loop: str, old: WritableDisk, new: WritableDisk
) -> None:
    export = Export.writable("", old)
    with LoopServer(export, loop=loop) as server:
        drain = Drain(server, export, device=new)
        drain.wait_until_inside()
        client = server.connect().go()
        client.send(READ, 0, 512)
        server.call(lambda: None)
        drain.end()
        assert client.reply().data == OTHER[:512]


def test_nothing_reaches_a_drained_disk_from_a_client_that_has_just_come(loop: str) -> None:
    disk = WritableDisk(CONTENT, cached=False)
    export = Export.writable("", disk)
    with LoopServer(export, loop=loop) as server:
        drain = Drain(server, export)
        drain.wait_until_inside()
        client = server.connect()
        client.socket.sendall(handshake() + client.pack(READ, 0, 512))  # one is parsed with the handshake
        client.finish_handshake()
        client.send(WRITE, 512, 512, payload=bytes(512))
        assert not drain.is_waiting
        assert server.waiting_for_pool == 0
        assert not disk.performed
        drain.end()
        assert {reply.error for reply in client.replies().values()} == {0}


def test_nothing_reaches_a_drained_disk_from_a_client_that_reads_its_replies_at_last(
    loop: str, old: WritableDisk
) -> None:
    """Its requests are in the server already, and waited only for their replies to have room."""
    export = Export.writable("", old)
    with LoopServer(export, loop=loop) as server:
        client = server.connect().go()
        for _ in range(6):
            client.send(READ, 0, len(CONTENT))
        assert server.connect().go().read(0, 512) == CONTENT[:512]
        drain = Drain(server, export)
        drain.wait_until_inside()
        gathered = old.pieces_gathered
        assert gathered < 6
        for _ in range(gathered):
            assert client.reply().data == CONTENT
        assert not drain.is_waiting
        assert old.pieces_gathered == gathered
        drain.end()
        assert all(reply.data == CONTENT for reply in client.replies().values())


def test_replies_that_wait_in_files_are_true_although_the_files_change(loop: str, tmp_path: Path) -> None:
    """A client that does not read holds up nobody, and gets what it asked for in the end."""
    path = tmp_path / "disk"
    path.write_bytes(CONTENT)
    disk = FileDisk(path)
    export = Export.read_only("", disk)
    with LoopServer(export, loop=loop) as server:
        client, quick = server.connect().go(), server.connect().go()
        for _ in range(4):
            client.send(READ, 0, len(CONTENT))  # more than a socket takes
        assert quick.read(0, 512) == CONTENT[:512]
        drain = Drain(server, export, device=MemoryDisk(OTHER))
        drain.wait_until_inside()
        path.write_bytes(bytes(len(CONTENT)))
        disk.close()
        drain.end()
        assert quick.read(0, 512) == OTHER[:512]
        contents = [reply.data for reply in client.replies().values()]
        assert contents[0] == CONTENT
        assert all(content in (CONTENT, OTHER) for content in contents)


def test_a_client_is_cut_for_whose_unread_replies_there_is_no_memory(
    loop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detach, "_WAIT_SECONDS", 0.05)
    path = tmp_path / "disk"
    path.write_bytes(CONTENT)
    disk = FileDisk(path)
    export = Export.read_only("", disk)
    with LoopServer(export, loop=loop, limits=Limits(process_bytes=1 << 20)) as server:
        clients = [server.connect().go() for _ in range(2)]
        for client in clients * 4:
            client.send(READ, 0, len(CONTENT))  # more than a socket takes
        quick = server.connect().go()
        assert quick.read(0, 512) == CONTENT[:512]
        drain = Drain(server, export, device=MemoryDisk(OTHER))
        drain.wait_until_inside()
        disk.close()
        drain.end()
        assert quick.read(0, 512) == OTHER[:512]
        server.wait_for_connections(2)  # one copy is always possible


def test_a_section_that_fails_resumes_what_was_there(loop: str, old: WritableDisk) -> None:
    export = Export.writable("", old)
    with LoopServer(export, loop=loop) as server:
        client = server.connect().go()
        drain = Drain(server, export)
        drain.wait_until_inside()
        client.send(READ, 0, 512)
        drain.end(OSError("no"))
        assert client.reply().data == CONTENT[:512]
        assert server.call(lambda: isinstance(drain.task.exception(), OSError))


def test_a_drain_that_is_cancelled_while_it_waits_resumes(loop: str) -> None:
    disk = WritableDisk(CONTENT, cached=False)
    export = Export.writable("", disk)
    with LoopServer(export, loop=loop) as server:
        client = server.connect().go()
        with disk.blocked():
            client.send(READ, 0, 512)
            disk.wait_for_request()
            drain = Drain(server, export)
            assert drain.is_waiting
            server.call(drain.task.cancel)
            server.wait(lambda: finished(drain.task))
            client.send(READ, 512, 512)
            server.wait_for(lambda: len(disk.performed) == 2, "the second request does not reach the disk")
        assert {reply.data for reply in client.replies().values()} == {CONTENT[:512], CONTENT[512:1024]}


def test_a_cancelled_task_does_not_let_go_of_the_disk_before_its_thread_is_done(loop: str, old: WritableDisk) -> None:
    export = Export.writable("", old)
    begun, go_on = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert go_on.wait(30)

    async def drain() -> None:
        async with export.gate.closed():
            await in_thread(work)

    with LoopServer(export, loop=loop) as server:
        client = server.connect().go()
        task: asyncio.Task[None] = server.call(lambda: asyncio.get_running_loop().create_task(drain()))
        assert begun.wait(30)
        server.call(task.cancel)
        client.send(READ, 0, 512)
        for _ in range(5):
            assert server.call(lambda: export.is_held)
        go_on.set()
        assert client.reply().data == CONTENT[:512]
        assert server.call(task.cancelled)


def test_drains_of_one_disk_happen_one_after_another_and_nest_in_a_task(loop: str, old: WritableDisk) -> None:
    export = Export.writable("", old)
    with LoopServer(export, loop=loop) as server:
        client = server.connect().go()
        first = Drain(server, export)
        first.wait_until_inside()
        second = Drain(server, export, export)  # nested
        assert second.is_waiting
        first.end()
        second.wait_until_inside()
        client.send(READ, 0, 512)
        second.end()
        assert client.reply().data == CONTENT[:512]


def test_no_guest_waits_for_the_disk_of_another_one_that_somebody_looks_at() -> None:
    async def story() -> None:
        first, second = (Volume(name, cast(Any, None), Exports()) for name in "ab")

        async def drain() -> None:
            async with all_drained([second, first]):
                assert first.gate.is_closed
                assert second.gate.is_closed

        async with second.steady():
            task = asyncio.create_task(drain())
            for _ in range(10):
                await asyncio.sleep(0)
                assert not first.gate.is_closed
            async with second.drained():  # a task that is inside may do that
                assert second.gate.is_closed
            assert not task.done()
        await task
        assert not first.gate.is_closed
        assert not second.gate.is_closed

    asyncio.run(story())


def test_two_exports_of_one_disk_are_drained_together(loop: str, old: WritableDisk, new: WritableDisk) -> None:
    export = Export.writable("a", old)
    twin = Export.read_only("b", old, gate=export.gate)
    with LoopServer(export, twin, loop=loop) as server:
        clients = [server.connect().go(name) for name in "ab"]
        drain = Drain(server, export)
        drain.wait_until_inside()
        for client in clients:
            client.send(READ, 0, 512)
        server.call(lambda: (export.adopt(new), twin.adopt(new)))
        drain.end()
        assert [client.reply().data for client in clients] == [OTHER[:512]] * 2


def test_disks_exchanged_under_load_lose_nothing_and_mix_nothing_up(loop: str) -> None:
    """Every client owns a part of the disk and knows what is in it; each exchange goes to a copy."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    content = bytes(CONTENT)
    disks = [WritableDisk(content, cached=cached) for cached in (True, False, True)]
    export = Export.writable("", disks[0])
    part = len(content) // 4

    class Owner(Background):
        def __init__(self, client: Client, number: int) -> None:
            self._client = client
            self._random = random.Random(seed + number)
            self._base = number * part
            self._expected = bytearray(content[self._base :][:part])
            super().__init__(self._round)

        def _round(self) -> None:
            reads = {}
            said = b""
            for _ in range(self._random.randrange(1, 12)):
                length = self._random.choice((512, 4096, 70_000, 300_000))
                offset = self._random.randrange(part - length)
                if self._random.random() < 0.5:
                    payload = self._random.randbytes(length)
                    self._expected[offset : offset + length] = payload
                    flags = FUA if self._random.random() < 0.1 else 0
                    self._client.send_beside(
                        self._client.pack(WRITE, self._base + offset, length, flags=flags) + payload
                    )
                    assert all(reply.error == 0 for reply in self._client.replies().values())
                else:
                    header = self._client.pack(READ, self._base + offset, length)
                    reads[int.from_bytes(header[8:16], "big")] = bytes(self._expected[offset : offset + length])
                    said = header
                    self._client.send_beside(said)
                    for cookie, reply in self._client.replies().items():
                        assert reply.data == reads[cookie]

    with LoopServer(export, loop=loop) as server, AsyncExitStackOfThreads() as stack:
        owners = [stack.enter(Owner(server.connect().go(), number)) for number in range(4)]
        for round_ in range(30):
            old, new = disks[round_ % 3], disks[(round_ + 1) % 3]

            async def exchange(old: WritableDisk = old, new: WritableDisk = new) -> None:
                async with export.gate.closed():
                    changes, flushes = len(old.changes), old.flushes
                    new.content[:] = old.content
                    await asyncio.sleep(0.001)
                    assert (changes, flushes) == (len(old.changes), old.flushes), "a change while the disk is drained"
                    old.content[:] = bytes(len(old.content))
                    export.adopt(new)

            on_loop(server, exchange)
            owners[round_ % 4].wait_for_a_round()


class AsyncExitStackOfThreads:
    """Background threads that end together."""

    def __init__(self) -> None:
        self._threads: list[Background] = []

    def __enter__(self) -> "AsyncExitStackOfThreads":
        return self

    def enter(self, thread: Background) -> Background:
        self._threads.append(thread)
        return thread.__enter__()

    def __exit__(self, *error: Any) -> None:
        for thread in self._threads:
            thread.__exit__(*error)


def test_a_larger_disk_can_be_used_by_those_who_are_connected(loop: str, old: WritableDisk) -> None:
    export = Export.writable("", old)
    larger = WritableDisk(CONTENT + bytes(4096))
    with LoopServer(export, loop=loop) as server:
        client = server.connect().go()
        assert client.error(READ, len(CONTENT), 512) != 0
        server.call(lambda: export.adopt(larger))
        assert client.read(len(CONTENT), 4096) == bytes(4096)
        assert client.error(WRITE, len(CONTENT) + 4095, 1, payload=b"x") == 0
        assert server.connect().go().size == len(CONTENT) + 4096
        assert client.error(READ, len(CONTENT) + 4096, 1) != 0


@pytest.mark.parametrize("extended", [False, True])
def test_a_write_that_begins_to_come_before_the_disk_is_larger_is_carried_out_or_refused(
    loop: str, old: WritableDisk, extended: bool
) -> None:
    """R-71: whether there is room is decided when the last byte has come, and the first ones must not be lost then."""
    export = Export.writable("", old)
    larger = WritableDisk(CONTENT + bytes(BIG))
    with LoopServer(export, loop=loop) as server:
        client = server.connect().go(extended=extended)
        client.socket.sendall(client.pack(WRITE, len(CONTENT), BIG) + OTHER[:1000])
        assert server.connect().go().read(0, 512)
        server.call(lambda: export.adopt(larger))
        client.socket.sendall(OTHER[1000:BIG])
        reply = client.reply()
        assert larger.content[len(CONTENT) :] == (bytes(BIG) if reply.error else OTHER[:BIG])


def test_a_smaller_disk_refuses_what_lies_behind_its_end(loop: str, old: WritableDisk) -> None:
    export = Export.writable("", old)
    smaller = WritableDisk(CONTENT[:4096])
    with LoopServer(export, loop=loop) as server:
        client = server.connect().go()
        client.socket.sendall(client.pack(WRITE, 1 << 20, 1 << 20) + bytes(1000))  # in the middle of a payload
        assert server.connect().go().read(0, 512)
        server.call(lambda: export.adopt(smaller))
        client.socket.sendall(bytes((1 << 20) - 1000))
        assert client.reply().error == 28  # ENOSPC
        assert client.error(READ, 4096, 512) == 22  # EINVAL
        assert client.read(0, 4096) == CONTENT[:4096]
        assert not smaller.changes


def test_a_paused_export_waits_and_others_of_its_disk_do_not(loop: str, old: WritableDisk) -> None:
    export = Export.writable("a", old)
    twin = Export.read_only("b", old, gate=export.gate)
    with LoopServer(export, twin, loop=loop) as server:
        held, served = server.connect().go("a"), server.connect().go("b")
        server.wait(lambda: export.pause(None))
        held.send(READ, 0, 512)
        assert served.read(0, 512) == CONTENT[:512]
        drain = Drain(server, export)  # which does not end the pause
        drain.wait_until_inside()
        drain.end()
        assert server.call(lambda: export.is_held)
        assert held.outstanding
        server.call(export.resume)
        assert held.reply().data == CONTENT[:512]


def test_a_pause_ends_by_itself(loop: str, old: WritableDisk) -> None:
    export = Export.writable("", old)
    expired = threading.Event()
    with LoopServer(export, loop=loop) as server:
        client = server.connect().go()
        server.wait(lambda: export.pause(0.05, expired.set))
        client.send(READ, 0, 512)
        assert client.reply().data == CONTENT[:512]
        assert expired.wait(30)


def test_a_server_that_stops_answers_those_who_are_paused(loop: str, old: WritableDisk) -> None:
    export = Export.writable("", old)
    with LoopServer(export, loop=loop) as server:
        client = server.connect().go()
        client.send(READ, 0, 512)
        assert client.reply().data == CONTENT[:512]
        server.wait(lambda: export.pause(None))
        client.send(WRITE, 0, 512, payload=b"y" * 512)
        with client:
            server.stop()

"""A server in a thread of the test process, under either event loop, and disks whose behaviour a test decides.

The one place of these tests that looks inside the server: what it has open, in progress and reserved.
"""

import asyncio
import contextlib
import errno
import gc
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import uvloop

from nbdq.block import FilePiece, Kind, Piece, Status
from nbdq.nbd.handshake import TlsMode
from nbdq.server.exports.export import Export, Exports
from nbdq.server.limits import Limits
from nbdq.server.listener import listen_tcp, listen_unix
from nbdq.server.server import Server
from nbdq.server.tls.credentials import Tls
from nbdq.storage import FileStorage
from tests.server.client import PATIENCE, Address, Client

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop": uvloop.new_event_loop,
    "asyncio": asyncio.new_event_loop,
}

T = TypeVar("T")


class MemoryDisk:
    """A read-only block device over ``content``, all data, whose requests a test can delay or fail."""

    def __init__(self, content: bytes | bytearray, *, cached: bool = True) -> None:
        """``cached``: answer on the loop thread; otherwise every request goes to the pool."""
        self.content = memoryview(content)
        self.size = len(content)
        self.cached = cached
        self.failing: set[int] = set()
        """Offsets at which READ and BLOCK_STATUS fail with EIO."""
        self.pieces_gathered = 0
        """Calls of :meth:`gather_cached`, on the loop thread."""
        self.performed: list[int] = []
        """Offsets of what reached :meth:`read_into`, :meth:`status` or :meth:`prefetch`, in order."""
        self._open = threading.Event()
        self._open.set()

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        """Until the block ends, what reaches the pool waits there, as for a dead disk."""
        self.performed.clear()
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def wait_for_request(self) -> None:
        """Return when something has been performed."""
        deadline = time.monotonic() + PATIENCE
        while not self.performed:
            assert time.monotonic() < deadline, "nothing reaches the disk"
            time.sleep(0.001)

    def read_cached(self, offset: int, view: memoryview) -> bool:
        if not self.cached or offset in self.failing:
            return False
        view[:] = self.content[offset : offset + len(view)]
        return True

    def gather_cached(self, offset: int, length: int) -> list[Piece] | None:
        self.pieces_gathered += 1
        if not self.cached or offset in self.failing:
            return None
        return [self.content[offset : offset + length]]

    def gather(self, offset: int, length: int) -> list[Piece]:
        view = memoryview(bytearray(length))
        self.read_into(offset, view)
        return [view]

    def read_into(self, offset: int, view: memoryview) -> None:
        self._pass(offset)
        view[:] = self.content[offset : offset + len(view)]

    def status_cached(self, offset: int, length: int) -> bool:
        return self.cached

    def status(self, offset: int, length: int) -> Iterator[Status]:
        self._pass(offset)
        yield Status(
            np.array([offset], dtype=np.uint64),
            np.array([Kind.DATA], dtype=np.uint8),
            np.ones(1, dtype=np.uint16),
            offset + length,
            np.array([offset], dtype=np.uint64),
        )

    def prefetch(self, offset: int, length: int) -> None:
        self._pass(offset)

    def close(self) -> None: ...

    def _pass(self, offset: int) -> None:
        self.performed.append(offset)
        assert self._open.wait(PATIENCE)
        if offset in self.failing:
            raise OSError(errno.EIO, "bad sector")


class WritableDisk(MemoryDisk):
    """A disk in memory that can be changed, and knows what of it would survive a power cut."""

    def __init__(self, content: bytes, *, cached: bool = True) -> None:
        super().__init__(bytearray(content), cached=cached)
        self.durable = bytes(content)
        """What the last flush that succeeded has saved."""
        self.changes: list[tuple[str, int, int]] = []
        """Name, offset and length of every change, in order; those on the loop thread are "write_cached"."""
        self.flushes = 0
        """How many have begun."""
        self.errors: dict[str, int] = {}
        """Name of a method → errno that it fails with."""
        self.unmapped: list[bool] = []
        """Whether each :meth:`zero` was asked to unmap."""

    def write_cached(self, offset: int, view: memoryview) -> bool:
        if not self.cached:
            return False
        self._fail("write_cached")
        self._change("write_cached", offset, view)
        return True

    def write(self, offset: int, view: memoryview) -> None:
        self._pass(offset)
        self._fail("write")
        self._change("write", offset, view)

    def zero(self, offset: int, length: int, *, unmap: bool, fast: bool = False) -> None:
        self._pass(offset)
        self._fail("fast zero" if fast else "zero")
        self.unmapped.append(unmap)
        self._change("zero", offset, memoryview(bytes(length)))

    def discard(self, offset: int, length: int) -> None:
        self._pass(offset)
        self._fail("discard")
        self._change("discard", offset, memoryview(bytes(length)))

    def flush(self) -> None:
        self.flushes += 1
        saved = bytes(self.content)  # what comes while it runs is not covered
        self._pass(0)
        self._fail("flush")
        self.durable = saved

    def _change(self, name: str, offset: int, view: memoryview) -> None:
        self.content[offset : offset + len(view)] = view
        self.changes.append((name, offset, len(view)))

    def _fail(self, name: str) -> None:
        if name in self.errors:
            raise OSError(self.errors[name], os.strerror(self.errors[name]), "/secret/path")


class ZeroDisk(MemoryDisk):
    """A large disk of zeros, to be read in large pieces through the pool."""

    def __init__(self, size: int) -> None:
        super().__init__(b"", cached=False)
        self.size = size

    def read_into(self, offset: int, view: memoryview) -> None:
        self._pass(offset)
        view[:] = bytes(len(view))


class FragmentedDisk(MemoryDisk):
    """A disk whose status changes every 512 bytes."""

    def __init__(self, size: int, *, cached: bool = True) -> None:
        super().__init__(b"", cached=cached)
        self.size = size

    def status(self, offset: int, length: int) -> Iterator[Status]:
        self._pass(offset)
        starts = np.arange(offset // 512 * 512, offset + length, 512, dtype=np.uint64)
        kind = np.where(starts // np.uint64(512) % np.uint64(2), np.uint8(Kind.DATA), np.uint8(Kind.ZERO))
        starts[0] = offset
        yield Status(starts, kind, np.ones(len(starts), dtype=np.uint16), offset + length, starts)


class FileDisk(MemoryDisk):
    """A disk over a raw file: what it says is cached is sent from the file by reference."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.read_bytes())
        self.storage = FileStorage.open(str(path))

    def gather_cached(self, offset: int, length: int) -> list[Piece] | None:
        return [FilePiece(self.storage, offset, length)]

    def close(self) -> None:
        self.storage.close()


class LoopServer:
    """A server on a unix socket, or with ``tcp`` on 127.0.0.1, in its own thread. A context manager.

    Leaving it closes the clients that :meth:`connect` made, waits until the server has nothing left of any client,
    stops it, and fails if there are ``errors`` that the test did not take out.
    """

    def __init__(
        self,
        *exports: Export,
        loop: str = "uvloop",
        limits: Limits | None = None,
        tcp: bool = False,
        tls: Tls | None = None,
        tls_mode: TlsMode = TlsMode.OFF,
    ) -> None:
        self._exports = exports
        self._tls, self._tls_mode = tls, tls_mode
        self._limits = limits or Limits()
        self._make_loop = LOOPS[loop]
        self._tcp = tcp
        self._clients: list[Client] = []
        self._started: Future[Address] = Future()
        self.errors: list[str] = []
        """What was raised in the loop or logged as an error: bugs, whatever a client was answered."""
        self._thread = threading.Thread(target=self._run, name="server-under-test")

    @property
    def address(self) -> Address:
        return self._started.result()

    def connect(self) -> Client:
        """A new client, which has said nothing yet."""
        client = Client(self.address)
        self._clients.append(client)
        return client

    def call(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on the loop's thread."""
        future: Future[T] = Future()

        def carry_out() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._loop.call_soon_threadsafe(carry_out)
        return future.result(PATIENCE)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Hold the loop for the length of the block, so that it sees all that happens meanwhile at once."""
        holding, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            holding.set()
            go_on.wait(PATIENCE)

        self._loop.call_soon_threadsafe(hold)
        assert holding.wait(PATIENCE)
        try:
            yield
        finally:
            go_on.set()

    def wait(self, coroutine: Callable[[], Awaitable[T]]) -> T:
        """Run a coroutine function on the loop to its end."""
        return asyncio.run_coroutine_threadsafe(coroutine(), self._loop).result(PATIENCE)  # type: ignore[arg-type]

    def stop(self) -> None:
        """What SIGTERM does."""
        self.wait(self._server.stop)

    # What the server holds.

    @property
    def connections(self) -> int:
        return self.call(lambda: len(self._server.census))

    @property
    def negotiating(self) -> int:
        return self.call(lambda: self._server.census.negotiating)

    @property
    def transmitting(self) -> int:
        """Sessions that still read requests or owe replies."""
        return self.call(lambda: sum(bool((s := c._session) and not s._ended) for c in self._server.census))

    @property
    def waiting_for_pool(self) -> int:
        """Sessions for which the pool has work."""
        return self.call(lambda: sum(bool((s := c._session) and s.in_progress) for c in self._server.census))

    @property
    def unsent(self) -> int:
        """Bytes in memory that wait for clients to take them."""

        def count() -> int:
            outputs = [session._output for c in self._server.census if (session := c._session)]
            return sum(len(each) for output in outputs for each in output._pieces if not isinstance(each, FilePiece))

        return self.call(count)

    @property
    def reserved(self) -> int:
        """Bytes of the process budget that are taken."""
        budget = self._server._resources.budget
        return self.call(lambda: budget._total - budget._free)

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Poll until ``condition`` holds."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {PATIENCE} s"
            time.sleep(0.002)

    def wait_for_connections(self, count: int) -> None:
        self.wait_for(lambda: self.connections == count, f"{count} connections instead of {self.connections}")

    def wait_until_idle(self) -> None:
        """Return when no client is left, and nothing of what clients had reserved."""
        self.wait_for_connections(0)
        self.wait_for(lambda: self.reserved == 0, "reserved bytes are not given back")

    # Its life.

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=self._make_loop) as runner:
            self._loop = runner.get_loop()
            self._loop.set_exception_handler(lambda _, context: self.errors.append(_describe(context)))
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        with tempfile.TemporaryDirectory(prefix="nbdq-") as directory:
            try:
                path = f"{directory}/socket"
                mode = self._tls_mode
                listener = listen_tcp("127.0.0.1", 0, tls=mode)[0] if self._tcp else listen_unix(path, tls=mode)
                self._server = Server(Exports(self._exports), [listener], self._limits, tls=self._tls)
                self._server.start()
                self._started.set_result(listener.socket.getsockname()[:2] if self._tcp else path)
            except BaseException as error:
                self._started.set_exception(error)
                raise
            await self._end.wait()
            await self._server.stop()

    def __enter__(self) -> Self:
        self._handler = _ErrorRecorder(self.errors)
        logging.getLogger("nbdq").addHandler(self._handler)
        self._thread.start()
        self._started.result(PATIENCE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for client in self._clients:
                client.socket.close()
            if error is None:
                self.wait_until_idle()
        finally:
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join()
            logging.getLogger("nbdq").removeHandler(self._handler)
        assert not self.errors, "\n".join(self.errors)


def _describe(context: dict[str, Any]) -> str:
    return f"{context['message']}: {context.get('exception')!r}"


class _ErrorRecorder(logging.Handler):
    """Keeps what the server logs as an error: a bug, whatever the client was answered."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._errors = errors

    def emit(self, record: logging.LogRecord) -> None:
        self._errors.append(logging.Formatter().format(record))


@contextlib.contextmanager
def no_descriptor_leaks() -> Iterator[None]:
    """Soon after the block no more descriptors are open than before it."""

    def count() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    before = count()
    yield
    deadline = time.monotonic() + PATIENCE
    while count() > before:
        assert time.monotonic() < deadline, f"{before} descriptors before, {count()} after"
        time.sleep(0.01)


def has_ipv6() -> bool:
    """Whether this machine has the address ::1."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def resident_bytes() -> int:
    """Memory of this process that is really there."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

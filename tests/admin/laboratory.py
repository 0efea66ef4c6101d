"""An admin socket over disks that are only names, and operations that do nothing but obey."""

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from nbdq.admin.client import Client
from nbdq.admin.context import Context
from nbdq.admin.job_request import JobRequest
from nbdq.admin.monitor import Access
from nbdq.admin.policies import Policies
from nbdq.admin.registry import COMMANDS, Command, Reply
from nbdq.admin.service import Administration
from nbdq.admin.state import State
from nbdq.errors import OperationError
from nbdq.ops.control import Control
from nbdq.server.exports.export import Exports
from nbdq.server.listener import listen_unix

PATIENCE = 20
_Result = TypeVar("_Result")


class PaperVolume:
    """A disk that consists of names, and knows whether it is drained."""

    def __init__(self, name: str, image: str) -> None:
        self.name = name
        self.layers = [SimpleNamespace(path=image, format="qcow2")]
        self.chain = SimpleNamespace(layers=self.layers, node_name=lambda index: None)
        self.drains = 0
        self.is_drained = False

    @asynccontextmanager
    async def drained(self) -> AsyncIterator[None]:
        self.is_drained = True
        self.drains += 1
        try:
            yield
        finally:
            self.is_drained = False

    async def flush(self) -> None:
        assert not self.is_drained

    def withdraw_derived(self, layers: object) -> None:
        """There are none."""

    def derive_soon(self) -> None:
        """There are none."""

    def adopt(self) -> None:
        assert self.is_drained


class PaperOperation:
    """Does pieces of work when it is let, and notes what is called."""

    def __init__(self, volume: PaperVolume, *, pieces: int, fails: dict[str, Exception]) -> None:
        self.calls: list[str] = []
        self.pieces = pieces
        self.may_work = threading.Semaphore(0)
        self._volume = volume
        self._fails = fails

    def run(self, control: Control) -> None:
        self._called("run")
        control.expect(self.pieces - control.total)
        while control.done < control.total:
            while not self.may_work.acquire(timeout=0.01):
                control.advance()
            control.advance(1)

    def pivot(self) -> None:
        assert self._volume.is_drained
        self._called("pivot")

    def revert(self) -> None:
        assert self._volume.is_drained
        self._called("revert")

    def finish(self) -> None:
        assert not self._volume.is_drained
        self._called("finish")

    def abort(self) -> None:
        assert self._volume.is_drained
        self._called("abort")

    def _called(self, what: str) -> None:
        self.calls.append(what)
        if what in self._fails:
            raise self._fails.pop(what)


class PaperMirror(PaperOperation):
    """One that gets ready, and waits to be completed."""

    def __init__(self, volume: PaperVolume, *, pieces: int, fails: dict[str, Exception]) -> None:
        super().__init__(volume, pieces=pieces, fails=fails)
        self.on_ready: Callable[[], None] = lambda: None
        self._wanted = threading.Event()

    def complete(self) -> None:
        self._wanted.set()

    def run(self, control: Control) -> None:
        super().run(control)
        self.on_ready()
        while not self._wanted.wait(0.01):
            control.advance()


@dataclass(frozen=True)
class StartJob:
    """Arguments of x-test-job."""

    device: str
    job_id: str
    pieces: int = 1
    mirror: bool = False
    fail_in: str | None = None
    errno: int = 5
    bug_in: str | None = None
    on_error: str = "report"
    auto_finalize: bool = True
    auto_dismiss: bool = True
    layers: list[str] | None = None
    persistent: bool = False


class AdminServer:
    """A loop in a thread of its own with an admin socket; see :meth:`client`."""

    def __init__(self, directory: Path, *, state: str | None = None, access: Access | None = None) -> None:
        self.path = str(directory / "admin")
        self.image = str(directory / "disk.qcow2")
        self.volumes = [PaperVolume("disk", self.image), PaperVolume("other", str(directory / "other.qcow2"))]
        self.operations: dict[str, PaperOperation] = {}
        self.state = State(state)
        for volume in self.volumes:
            self.state.name_disk(volume.name, volume.layers[0].path)
        self.context: Context | None = None
        self._access = access or Access()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> "AdminServer":
        COMMANDS["x-test-job"] = Command("x-test-job", StartJob, self._start_job, True)
        COMMANDS["x-test-events"] = Command("x-test-events", Burst, _burst, True)
        COMMANDS["x-test-answer"] = Command("x-test-answer", Burst, _answer, False)
        COMMANDS["x-test-bug"] = Command("x-test-bug", Burst, _bug, True)
        self._thread.start()
        assert self._ready.wait(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self.quit()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the server does not stop"
        for name in ("x-test-job", "x-test-events", "x-test-answer", "x-test-bug"):
            del COMMANDS[name]

    def quit(self) -> None:
        with suppress(RuntimeError):  # it has stopped by itself
            self._loop.call_soon_threadsafe(self._stop.set)

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """What a coroutine returns on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)

    def client(self) -> Client:
        return Client(self.path, timeout=PATIENCE)

    def raw(self) -> socket.socket:
        """A connection of which nothing was read yet."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        sock.connect(self.path)
        return sock

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self.administration = Administration(self.state, Policies(), listen_unix(self.path), self._access)
        await self.administration.start(self.volumes, Exports([]), self._stop.set)  # type: ignore[arg-type]
        self._ready.set()
        await self._stop.wait()
        await self.administration.stop(within=30)

    async def _start_job(self, context: Context, arguments: StartJob) -> Reply:
        volume: Any = context.volumes.volume(arguments.device)
        kind = PaperMirror if arguments.mirror else PaperOperation
        fails: dict[str, Exception] = {}
        if arguments.fail_in:
            text = os.strerror(arguments.errno)
            fails[arguments.fail_in] = OSError(arguments.errno, text) if arguments.errno else OperationError("no")
        if arguments.bug_in:
            fails[arguments.bug_in] = AssertionError("a bug")

        def make() -> PaperOperation:
            operation = kind(volume, pieces=arguments.pieces, fails=fails)
            self.operations[arguments.job_id] = operation
            return operation

        request = JobRequest(
            id=arguments.job_id,
            type="commit",
            volume=volume,
            command="x-test-job",
            arguments=vars(arguments),
            layers=None if arguments.layers is None else frozenset(arguments.layers),
            on_error=arguments.on_error,  # type: ignore[arg-type]
            auto_finalize=arguments.auto_finalize,
            auto_dismiss=arguments.auto_dismiss,
            persistent=arguments.persistent,
        )
        await context.jobs.start(request, make)
        return None


@dataclass(frozen=True)
class Burst:
    """Arguments of x-test-events."""

    count: int = 1
    length: int = 0


async def _burst(context: Context, arguments: Burst) -> Reply:
    for number in range(arguments.count):
        context.emit("X_TEST", {"number": number, "text": "x" * arguments.length})
        if number % 1000 == 999:
            await asyncio.sleep(0)
    return None


async def _answer(context: Context, arguments: Burst) -> Reply:
    return ["x" * arguments.length]


async def _bug(context: Context, arguments: Burst) -> Reply:
    raise ZeroDivisionError

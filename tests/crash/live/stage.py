"""Guests that work on served disks before, while and after an administrator changes them, and what they were told."""

import asyncio
import random
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    ExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

from nbdq.admin import job
from nbdq.admin.registry import Reply
from nbdq.chain.live import LiveChain
from nbdq.errors import NbdqError
from nbdq.ops import active_commit, commit, rebase, transfer
from nbdq.ops.control import Control
from nbdq.ops.operation import Operation
from nbdq.qcow2.writing import epochs as engine_epochs
from nbdq.server.exports.volume import Volume
from tests.crash.guest import Allowed, Guest, History, Verb
from tests.crash.live.scenario import Prepared
from tests.crash.live.server import Server
from tests.crash.live.tree import TreeRecorder
from tests.crash.recorder import NEVER
from tests.crash.schedule import Schedule
from tests.crash.stamps import Values, read_stamps
from tests.crash.verdict import Fault, Finding, compare

#: How far the numbers of one disk's stamps are from those of the next one.
_NUMBERS = 100_000
_RECOVERED_REQUESTS = 8
#: Of a guest that works beside an operation.
_REQUESTS_BESIDE = 20


class Front:
    """A disk as clients see it: whatever is its device now."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume

    @property
    def size(self) -> int:
        return self._volume.chain.device.size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._volume.chain.device, name)


@dataclass
class Epoch:
    """A guest's history until everything on the disk is exchanged at once."""

    history: History
    begun: int = 0
    ended: int = NEVER


@dataclass(frozen=True)
class Recording:
    """What happened to a directory, and what guests and administrators were told."""

    recorder: TreeRecorder
    epochs: Mapping[str, list[Epoch]]
    replies: list[tuple[int, dict[str, str]]]
    """From that moment on these images are the tops of disks."""
    begun: int
    """When the operation was ordered."""
    finding: Finding | None
    """What went wrong without any crash; the rest is worth nothing then."""
    resumed: int = 0
    """Jobs that went on from where another server had been."""

    def promises(self) -> list[int]:
        """The moments at which less is allowed."""
        flushes = [
            request.answered
            for epochs in self.epochs.values()
            for epoch in epochs
            for request in epoch.history.requests
            if request.verb is Verb.FLUSH and request.answered != NEVER and not request.failed
        ]
        return [*flushes, *(moment for moment, _ in self.replies)]

    def allowed(self, name: str, cut: int) -> list[Allowed]:
        """What a disk may hold after a crash at ``cut``: all of it as one of these says."""
        return [epoch.history.allowed(cut) for epoch in self.epochs[name] if epoch.begun <= cut <= epoch.ended]

    def promise(self, cut: int) -> tuple[int, ...]:
        """Equal for two cuts after which the same is allowed, given that the states are the same."""
        histories = [
            epoch.history.promise(cut)
            for epochs in self.epochs.values()
            for epoch in epochs
            if epoch.begun <= cut <= epoch.ended
        ]
        return (*histories, sum(moment <= cut for moment, _ in self.replies))

    def tops(self, name: str, cut: int) -> list[str]:
        """What may be the top of a disk by then; empty if nobody was told anything yet."""
        said = [(moment, tops[name]) for moment, tops in self.replies if name in tops]
        if not any(moment <= cut for moment, _ in said):
            return []
        known = sum(moment <= cut for moment, _ in said)
        return [top for _, top in said[known - 1 :]]


class Stage:
    """One run of a scenario."""

    def __init__(
        self,
        prepared: Prepared,
        recorder: TreeRecorder,
        generator: random.Random,
        schedule: Schedule | None = None,
    ) -> None:
        """With a ``schedule``, guests work in threads of it beside jobs."""
        self.directory = prepared.directory
        self.scenario = prepared.scenario
        self.generator = generator
        self.server: Server
        self.replies: list[tuple[int, dict[str, str]]] = []
        self.begun = 0
        self.resumed = 0
        self._recorder = recorder
        self._schedule = schedule
        self._pieces = 0
        self._drained: list[Volume] = []
        self._is_working = False
        self.shield: Callable[[Volume], AbstractContextManager[None]] = lambda volume: nullcontext()
        """Within it guests work."""
        self.epochs: dict[str, list[Epoch]] = {}
        for number, (name, initial) in enumerate(prepared.initial.items()):
            first = max(_NUMBERS * (number + 1), int(initial.max()) + 100)
            self.epochs[name] = [Epoch(History(recorder, initial, first_number=first))]

    # For scenarios.

    def path(self, name: str) -> str:
        """The absolute path of an image."""
        return str(self.directory / name)

    async def order(self, name: str, /, **arguments: Any) -> Reply:
        """As :meth:`Server.order`, with some more of the guests' requests afterwards."""
        reply = await self.server.order(name, **arguments)
        self.guests(2)
        return reply

    async def job(self, name: str, make: Callable[[LiveChain], Operation]) -> None:
        """As :meth:`Server.job`, on the disk ``name``, with some more of the guests' requests afterwards."""
        volume = self.server.volumes[name]
        await self.server.job(volume, lambda: make(volume.chain))
        self.guests(2)

    def replied(self, **tops: str) -> None:
        """The administrator knows that these images are the tops of the disks from now on."""
        self.replies.append((self._recorder.tick(), tops))

    def guests(self, count: int, *, only: str | None = None) -> None:
        """Let the guests of all disks that are served make some requests."""
        if self._is_working:
            return
        self._is_working = True
        try:
            for name, volume in self.server.volumes.items():
                if volume not in self._drained and only in (None, name):
                    history = self.epochs[name][-1].history
                    with self.shield(volume):
                        Guest(Front(volume), history, self.scenario.habits, self.generator).work(count)
        finally:
            self._is_working = False

    def beside(self, work: Callable[[], object]) -> None:
        """Do something that needs no drain, with guests in other threads if the scenario wants that."""
        if self._schedule is None:
            work()
            return
        guests = [
            partial(self._guest(name).work, _REQUESTS_BESIDE, cached=number == 0)
            for name in self.server.volumes
            for number in range(self.scenario.threads)
        ]
        self._is_working = True  # they do, and nobody else
        try:
            self._schedule.run([lambda: _do(work), *guests])
        finally:
            self._is_working = False

    def _guest(self, name: str) -> Guest:
        history = self.epochs[name][-1].history
        generator = random.Random(self.generator.randrange(1 << 30))
        return Guest(Front(self.server.volumes[name]), history, self.scenario.habits, generator)

    @contextmanager
    def becoming(self, name: str, values: Values) -> Iterator[None]:
        """Inside, the disk exchanges all that it holds for ``values``, as a whole, or fails to."""
        volume, epochs = self.server.volumes[name], self.epochs[name]
        old = epochs[-1]
        new = Epoch(History(self._recorder, values, first_number=old.history._next + 100), self._recorder.tick())
        epochs.append(new)
        self._drained.append(volume)
        try:
            yield
        except (NbdqError, OSError):
            # What the disk is now comes last; on a medium that has failed nobody knows what the file says.
            epochs[-2:] = [old, new] if self._differs(name, old.history.allowed_now()) is not None else [new, old]
            if volume.chain.layers[0].storage.failure is None:
                del epochs[-2]
            raise
        finally:
            self._drained.remove(volume)
        old.ended = self._recorder.tick()

    # The run.

    async def play(self, *, recovering: bool) -> Finding | None:
        """Start the server, let guests and administrator work, stop it."""
        scenario = self.scenario
        self.server = Server(self.directory, scenario.disks, state=scenario.state)
        try:
            self.resumed = sum(len(self.server.state.disk(name).jobs) for name in self.server.volumes)
            await self.server.start()
            if recovering:
                self.guests(_RECOVERED_REQUESTS)
            else:
                self.guests(scenario.requests)
                self.begun = self._recorder.tick()
                await scenario.operate(self)
                self.guests(scenario.requests)
            finding = self._look()
        except BaseException:
            self.server.kill()
            raise
        closing = [epochs[-1].history.begin(Verb.FLUSH) for epochs in self.epochs.values()]
        self.server.close()
        for request, epochs in zip(closing, self.epochs.values(), strict=True):
            epochs[-1].history.end(request)
        return finding

    def _look(self) -> Finding | None:
        for name, epochs in self.epochs.items():
            finding = self._differs(name, epochs[-1].history.allowed_now())
            if finding is not None:
                return Finding(finding.fault, f"disk {name} before any crash: {finding.text}")
        return None

    def _differs(self, name: str, allowed: Allowed) -> Finding | None:
        return compare(self.scenario.padded(read_stamps(self.server.read(name))), allowed)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let guests work wherever the server serves them while it carries out orders."""
        drained, advance = Volume.drained, Control.advance

        @asynccontextmanager
        async def interrupted(volume: Volume) -> AsyncIterator[None]:
            self.guests(2)
            async with drained(volume):
                self._drained.append(volume)
                try:
                    yield
                finally:
                    self._drained.remove(volume)
            self.guests(2)

        def drain(volume: Volume) -> AbstractAsyncContextManager[None]:
            return interrupted(volume)

        def advanced(control: Control, length: int = 0, *, cost: int | None = None) -> None:
            self._pieces += 1
            if self._pieces == self.scenario.cancelled_after:
                control.cancel()
            advance(control, length, cost=cost)
            if self.generator.random() < self.scenario.eagerness:
                self.guests(1)

        async def in_own_thread(_name: str, function: Callable[[Control], None], control: Control) -> None:
            await asyncio.sleep(0)
            self.beside(lambda: function(control))

        with (
            patch.object(Volume, "drained", drain),
            patch.object(Control, "advance", advanced),
            patch.object(job, "_in_own_thread", in_own_thread),
        ):
            yield


def _do(work: Callable[[], object]) -> None:
    work()


@contextmanager
def small_pieces() -> Iterator[None]:
    """Let operations copy little at a time, so that much can happen in between."""
    with ExitStack() as stack:
        for module, name, value in (
            (transfer, "_PIECE", 16 << 10),
            (transfer, "_ZEROS", 32 << 10),
            (rebase, "_PIECE", 16 << 10),
            (rebase, "_ZEROS", 32 << 10),
            (commit, "_DURABLE_BYTES", 48 << 10),
            (active_commit, "_SMALL", 8 << 10),
            (active_commit, "_GRANULARITY_BITS", 12),
            (active_commit, "_IDLE", 0),
        ):
            stack.enter_context(patch.object(module, name, value))
        yield


def record(prepared: Prepared, generator: random.Random, *, recovering: bool = False) -> Recording:
    """Run the scenario on the files that are in its directory; with ``recovering``, start the server and no more."""
    schedule = Schedule(generator.randrange(1 << 30)) if prepared.scenario.threads else None
    if schedule is None:
        recorder = TreeRecorder(prepared.directory)
    else:
        recorder = TreeRecorder(prepared.directory, pause=schedule.pause, linger=schedule.linger)
    stage = Stage(prepared, recorder, generator, schedule)
    with ExitStack() as stack:
        for context in (recorder.installed(), stage.installed(), small_pieces()):
            stack.enter_context(context)
        if schedule is not None:
            stack.enter_context(schedule.installed())
            # Who waits by looking again and again lets others run meanwhile.
            stack.enter_context(patch.object(engine_epochs, "sleep", lambda seconds: schedule.pause(drowsiness=1)))
        try:
            finding = asyncio.run(stage.play(recovering=recovering))
        except Exception:
            finding = Finding(Fault.BROKEN, traceback.format_exc())
    return Recording(recorder, stage.epochs, stage.replies, stage.begun, finding, stage.resumed)

"""The single-fault sweep over operations: call number N of an operation fails once, for N = 1, 2, 3 … until none does.

After every fault: the operation has reported an error, or has succeeded all the same; guests go on and read what they
wrote; after a restart the disk is whole, what was begun is gone, and the same operation succeeds; every image is sound.

    python -m tests.crash.live.faults [--scenario NAME] [--stride N]
"""

import asyncio
import logging
import os
import random
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click

from nbdq.errors import NbdqError
from nbdq.server.exports.volume import Volume
from nbdq.storage import FileStorage
from tests.crash.explore import scratch
from tests.crash.guest import History
from tests.crash.live.scenario import Prepared, Scenario, prepare
from tests.crash.live.scenarios import SCENARIOS, by_name
from tests.crash.live.server import JobFailed, Server, on_one_thread
from tests.crash.live.stage import Epoch, Stage, small_pieces
from tests.crash.live.tree import TreeRecorder
from tests.crash.live.verdict import Bench, Restarted
from tests.crash.recorder import NEVER
from tests.crash.stamps import read_stamps
from tests.crash.verdict import Finding, compare
from tests.random.faults import Fault, FaultyFiles

#: What may come out of an operation that fails.
ERRORS = (NbdqError, OSError, JobFailed)
FAULTS = (Fault.BROKEN, Fault.NO_SPACE, Fault.UNREADABLE)


class FaultyCalls(FaultyFiles):
    """Counts what happens to names, too."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Until the block ends, every call is at the mercy of this one."""
        with ExitStack() as stack:
            stack.enter_context(super().installed())
            if self.fault is not Fault.UNREADABLE:
                for owner, name, grows in (
                    (FileStorage, "create", True),
                    (os, "rename", True),
                    (os, "unlink", False),
                    (os, "fsync", False),
                ):
                    stack.enter_context(patch.object(owner, name, self._failing(getattr(owner, name), name, grows)))
            yield

    def _failing(self, original: Any, name: str, grows: bool) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if grows or self.fault is not Fault.NO_SPACE:
                self._check(f"{name} {arguments[0]}", grows=grows)
            return original(*arguments, **options)

        return call


@dataclass
class Sweep:
    """All faults of one kind in one scenario."""

    prepared: Prepared
    fault: Fault
    directory: Path
    """Existing, and empty."""
    points: int = 0
    reported: int = 0
    """Points after which the operation said that it failed."""
    findings: list[str] = field(default_factory=list)

    def run(self, *, stride: int = 1, first: int = 1) -> None:
        """Let call number ``first``, ``first`` + ``stride``, … fail, up to the first run without a fault."""
        at = first
        with on_one_thread(), small_pieces():
            while self._survives(at):
                self.points += 1
                at += stride

    def _survives(self, at: int) -> bool:
        live = self.prepared.copy_to(self.directory / "live")
        files = FaultyCalls(self.fault, at)
        run = _Run(live, files)
        try:
            finding = asyncio.run(run.play())
        except Exception:
            finding = traceback.format_exc()
        if finding is not None:
            self.findings.append(f"{self.prepared.scenario}, {self.fault.value} at call {at} ({files.met}): {finding}")
        self.reported += run.error is not None
        shutil.rmtree(live.directory)
        return bool(files.met)


class _Run:
    """One operation, one fault."""

    def __init__(self, prepared: Prepared, files: FaultyCalls) -> None:
        self._prepared = prepared
        self._scenario = prepared.scenario
        self._files = files
        self._recorder = TreeRecorder(prepared.directory)
        self._stage = Stage(prepared, self._recorder, random.Random(1))
        self._stage.shield = self._shield
        self._is_dead = False
        self.error: Exception | None = None

    @contextmanager
    def _shield(self, volume: Volume) -> Iterator[None]:
        """Guests meet no fault of their own; but what an operation has broken for good stays broken."""
        with self._files.paused():
            try:
                yield
            except OSError:
                if all(layer.storage.failure is None for layer in volume.chain.layers[:1]):
                    raise
                self._is_dead = True

    async def play(self) -> str | None:
        """What went wrong."""
        stage, scenario = self._stage, self._scenario
        stage.server = Server(self._prepared.directory, scenario.disks, state=scenario.state)
        with stage.installed():
            await stage.server.start()
            stage.guests(scenario.requests)
            before = self._layers()
            with self._files.installed():
                await self._operate()
            if not self._files.met:
                stage.server.kill()
                return None
            finding = stage._look()
            if finding is not None:
                return f"{self._said()}, then {finding}"
            stage.guests(4)
            self._close()
            return await self._go_on(before)

    async def _operate(self) -> None:
        try:
            await self._scenario.operate(self._stage)
        except ERRORS as error:
            if not self._files.met:
                raise
            self.error = error

    def _said(self) -> str:
        return f"it said {self.error!r}" if self.error is not None else "it succeeded"

    def _layers(self) -> list[list[str]]:
        return [[layer.path for layer in volume.chain.layers] for volume in self._stage.server.volumes.values()]

    def _close(self) -> None:
        for volume in self._stage.server.volumes.values():
            self._is_dead |= any(layer.storage.failure is not None for layer in volume.chain.layers[:1])
        try:
            self._stage.server.close()
        except OSError:
            if not self._is_dead:
                raise

    async def _go_on(self, before: list[list[str]]) -> str | None:
        """Start again, look, and do it again if it was not done."""
        stage, scenario = self._stage, self._scenario
        try:
            stage.server = Server(self._prepared.directory, scenario.disks, state=scenario.state)
        except ERRORS as error:
            return f"{self._said()}, then it did not start again: {error}"
        await stage.server.start()
        now = self._recorder.tick()
        for name, epochs in stage.epochs.items():
            values = scenario.padded(read_stamps(stage.server.read(name)))
            histories = [epoch.history for epoch in epochs if epoch.ended == NEVER]
            allowed = [each.allowed(now) if self._is_dead else each.allowed_now() for each in histories]
            wrong = [compare(values, each) for each in allowed]
            if None not in wrong:
                return f"{self._said()}, started again: {wrong[-1]}"
            last = epochs[-1].history
            epochs.append(Epoch(History(self._recorder, values, first_number=last._next + 100)))
        if self.error is not None and "changed as wanted" not in str(self.error) and self._layers() == before:
            try:
                await scenario.operate(stage)
            except ERRORS as error:
                if self._is_dead and "itmap" in str(error):
                    return None  # what was done to bitmaps could not be undone on a medium that had failed
                return f"{self._said()}, then, tried again: {error!r}"
        stage.guests(2)
        wrong = stage._look()
        if wrong is not None:
            return f"{self._said()}, tried again: {wrong}"
        stage.server.close()
        return self._check()

    def _check(self) -> str | None:
        contents = {path.name: bytearray(path.read_bytes()) for path in self._prepared.directory.iterdir()}
        bench = Bench(self._prepared, referee=None)
        restarted = bench.restart(contents)
        finding = restarted if isinstance(restarted, Finding) else self._check_images(bench, contents, restarted)
        return None if finding is None else f"{self._said()}, in the end {finding}"

    @staticmethod
    def _check_images(bench: Bench, contents: dict[str, bytearray], restarted: Restarted) -> Finding | None:
        bench.put(contents)
        return bench.check(contents, restarted, lambda finding: None)


def swept(scenario: Scenario, fault: Fault, directory: Path, *, stride: int, first: int) -> Sweep:
    """The sweep of a scenario, done, in the existing and empty ``directory``."""
    home = directory / "prepared"
    home.mkdir()
    sweep = Sweep(prepare(scenario, home), fault, directory)
    sweep.run(stride=stride, first=first)
    return sweep


@click.command(help=__doc__)
@click.option("--scenario", type=click.Choice([scenario.name for scenario in SCENARIOS]), help="Only this one.")
@click.option("--stride", default=1, show_default=True, help="Of the calls, how many fail: every so manieth.")
@click.option("--first", default=1, show_default=True, help="The first call that fails.")
def main(scenario: str | None, stride: int, first: int) -> None:
    logging.disable(logging.CRITICAL)
    begun, points, found = time.monotonic(), 0, 0
    for each in [by_name()[scenario]] if scenario else SCENARIOS:
        for fault in FAULTS:
            with scratch() as directory:
                sweep = swept(each, fault, directory, stride=stride, first=first)
            points, found = points + sweep.points, found + len(sweep.findings)
            click.echo(f"{each}, {fault.value}: {sweep.points} points, {sweep.reported} reported")
            for finding in sweep.findings[:3]:
                click.echo(f"  FAILED {finding}")
    click.echo(f"{points} points, {found} failures, {time.monotonic() - begun:.0f} s")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()

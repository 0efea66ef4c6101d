"""Power cuts and faults during operations on disks that are in use: nothing that was flushed is lost (R-59..R-62).

``python -m tests.crash.live`` and ``python -m tests.crash.live.faults`` do the same for as much as one likes.
"""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdq.errors import OperationError
from tests.crash.explore import scratch
from tests.crash.live.explore import Explorer
from tests.crash.live.faults import FAULTS, Sweep
from tests.crash.live.mutants import MUTANTS, Mutant
from tests.crash.live.scenario import Scenario, prepare
from tests.crash.live.scenarios import SCENARIOS, by_name
from tests.crash.live.server import Server, on_one_thread
from tests.crash.live.stage import record
from tests.support.tools import requires

pytestmark = requires("qemu-img", "qemu-io")

#: Of each scenario; about 1500 of all.
_STATES = 27
_STATES_FOR_A_MUTANT = 2000
_STATES_OF_A_RUN = 60
#: Of the calls of an operation, how many fail: every so manieth. A prime, whatever the rhythm of the calls.
_STRIDE = 23


@pytest.fixture
def directory() -> Iterator[Path]:
    with scratch() as path:
        yield path


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_a_power_cut_during_an_operation_loses_nothing_and_leaves_a_disk_that_a_restart_finds(
    scenario: Scenario, directory: Path
) -> None:
    explorer = Explorer(directory)
    explorer.run(scenario, 1, states=_STATES, recoveries=1)
    assert not explorer.figures.failures, str(explorer.figures.failures[0])
    assert explorer.figures.states >= _STATES * 0.4


@pytest.mark.parametrize("mutant", [pytest.param(mutant, id=name) for name, mutant in MUTANTS.items()])
def test_an_operation_without_a_barrier_is_found_out(mutant: Mutant, directory: Path) -> None:
    explorer = Explorer(directory, ask_qemu=False, stop_at_failure=True)
    seed = 0
    with mutant.installed():
        while not explorer.is_over and explorer.figures.states < _STATES_FOR_A_MUTANT and seed < 100:
            seed += 1
            explorer.run(by_name()[mutant.scenario], seed, states=_STATES_OF_A_RUN, recoveries=3)
    assert explorer.figures.failures, f"nobody noticed in {explorer.figures.states} states: {mutant.barrier}"


def test_a_run_can_be_repeated_from_its_seed(directory: Path) -> None:
    prepared = prepare(by_name()["an active commit"], directory)
    runs = []
    for _ in range(2):
        live = prepared.copy_to(directory / "live")
        with on_one_thread():
            recording = record(live, random.Random(7))
        assert recording.finding is None, recording.finding
        acts = [(each.file, each.act, each.offset, each.data, each.begun) for each in recording.recorder.entries]
        runs.append((acts, list(map(str, recording.recorder.name_acts)), recording.replies))
        for path in live.directory.iterdir():
            path.unlink()
        live.directory.rmdir()
    assert runs[0] == runs[1]


@pytest.mark.parametrize("number", range(len(SCENARIOS)), ids=lambda number: SCENARIOS[number].name)
def test_an_operation_survives_any_one_fault_of_its_files(number: int, directory: Path) -> None:
    home = directory / "prepared"
    home.mkdir()
    prepared = prepare(SCENARIOS[number], home)
    for fault in FAULTS:
        sweep = Sweep(prepared, fault, directory)
        sweep.run(stride=_STRIDE, first=1 + number % _STRIDE)
        assert not sweep.findings, sweep.findings[0]


def test_a_checkpoint_that_a_crash_has_undone_leaves_no_bitmap_that_a_backup_would_believe_in_vain(
    directory: Path,
) -> None:
    prepared = prepare(by_name()["a checkpoint"], directory)

    async def half_done() -> None:
        """The image as a cut between its sealing and the record of the overlay leaves it."""
        server = Server(directory, prepared.scenario.disks, state=True)
        await server.start()
        await server.order("block-dirty-bitmap-add", node="disk", name="next", persistent=True)
        await server.order("block-dirty-bitmap-disable", node="disk", name="bitmap")
        server.close()

    async def next_backup() -> None:
        server = Server(directory, prepared.scenario.disks, state=True)
        await server.start()
        try:
            disks = [{"node": "disk", "bitmap": "bitmap", "new-bitmap": "other"}]
            with pytest.raises(OperationError, match="misses what was written since"):
                await server.order("x-nbdq-checkpoint", id="two", disks=disks)
            await server.order("block-dirty-bitmap-merge", node="disk", target="bitmap", bitmaps=["next"])
            await server.order("block-dirty-bitmap-enable", node="disk", name="bitmap")
            await server.order("x-nbdq-checkpoint", id="two", disks=disks)
        finally:
            server.kill()

    with on_one_thread():
        asyncio.run(half_done())
        asyncio.run(next_backup())

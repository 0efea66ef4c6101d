"""Power cuts: after one at any moment the disk opens, is sound, and holds what was flushed and nothing foreign.

``python -m tests.crash`` does the same for as many states as one likes.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.engine import believed_bitmaps, open_engine, own_check
from tests.crash.explore import Explorer, scratch
from tests.crash.mutants import MUTANTS, Mutant
from tests.crash.recording import record
from tests.crash.verdict import Fault
from tests.crash.workloads import WORKLOADS, Workload, by_name, prepare
from tests.support.tools import requires

pytestmark = requires("qemu-img", "qemu-io")

#: Of each workload; more than 2000 of all. Some are counted once that came up twice, because they are equal.
_STATES = 75
_STATES_FOR_A_MUTANT = 2000
#: Of them for one run; a race shows in few runs, but then in many states.
_STATES_OF_A_RUN = 40


@pytest.fixture
def directory() -> Iterator[Path]:
    with scratch() as path:
        yield path


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_a_power_cut_loses_nothing_that_was_flushed_and_shows_nothing_foreign(
    workload: Workload, directory: Path
) -> None:
    explorer = Explorer(directory, open_engine, judges=(own_check,), bitmap_judge=believed_bitmaps)
    explorer.run(workload, 1, states=_STATES, recoveries=1, repairs=1)
    assert not explorer.figures.failures, str(explorer.figures.failures[0])
    assert explorer.figures.states >= _STATES * 0.65


@pytest.mark.parametrize("name", ["small requests", "several at once over a base"])
def test_a_run_can_be_repeated_from_its_seed(name: str, directory: Path) -> None:
    workload = by_name()[name]
    prepared = prepare(workload, directory)
    runs = []
    for number in range(2):
        live = prepared.copy_to(directory / str(number))
        recording = record(workload, live, open_engine, random.Random(7), recovering=False)
        assert recording.finding is None
        requests = list(map(str, recording.history.requests))
        runs.append(([(each.act, each.offset, each.data, each.begun) for each in recording.entries], requests))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("mutant", [pytest.param(mutant, id=name) for name, mutant in MUTANTS.items()])
def test_an_engine_without_a_barrier_is_found_out(mutant: Mutant, directory: Path) -> None:
    explorer = Explorer(directory, open_engine, bitmap_judge=believed_bitmaps, stop_at_failure=True)
    with mutant.installed():
        for seed in range(1, _STATES_FOR_A_MUTANT // _STATES_OF_A_RUN + 1):
            if not explorer.is_over:
                states = min(_STATES_OF_A_RUN, _STATES_FOR_A_MUTANT - explorer.figures.states)
                explorer.run(by_name()[mutant.workload], seed, states=states, recoveries=0, repairs=0)
    assert explorer.figures.failures, f"nobody noticed in {explorer.figures.states} states: {mutant.barrier}"
    assert not explorer.figures.faults[Fault.BROKEN], f"it does not work at all: {explorer.figures.failures[0]}"

"""The test is tested: on a writer that is right, on its siblings that each leave out one barrier, and on its parts."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.crash.explore import Explorer, scratch
from tests.crash.guest import Habits
from tests.crash.plain_writer import Omit, PlainWriter
from tests.crash.verdict import Fault
from tests.crash.workloads import Layer, Workload
from tests.support.tools import requires

pytestmark = requires("qemu-img", "qemu-io")

_TRIMMING = Workload(
    "plain", (Layer(),), Habits(write=50, zero=20, discard=15, flush=12, largest=24, aligned_to=8), requests=60
)


@pytest.fixture
def directory() -> Iterator[Path]:
    with scratch() as path:
        yield path


def test_a_writer_that_keeps_every_barrier_is_acquitted(directory: Path) -> None:
    explorer = Explorer(directory, PlainWriter)
    explorer.run(_TRIMMING, 1, states=600)
    assert not explorer.figures.failures, str(explorer.figures.failures[0])
    assert explorer.figures.states >= 400


@pytest.mark.parametrize(
    ("omit", "fault"),
    [
        (Omit.SYNC_BEFORE_ENTRIES, {Fault.CORRUPT, Fault.FOREIGN, Fault.LOST}),
        (Omit.LAST_SYNC, {Fault.LOST}),
        (Omit.QUARANTINE, {Fault.FOREIGN}),
        (Omit.REFCOUNTS_FIRST, {Fault.CORRUPT}),
    ],
)
def test_a_writer_without_a_barrier_is_found_out(omit: Omit, fault: set[Fault], directory: Path) -> None:
    explorer = Explorer(directory, partial(PlainWriter, omit=omit), stop_at_failure=True)
    explorer.run(_TRIMMING, 1, states=2000, recoveries=0)
    assert explorer.figures.failures
    assert explorer.figures.failures[0].finding.fault in fault, str(explorer.figures.failures[0])

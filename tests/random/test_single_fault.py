"""Whatever change of a file fails, the disk keeps its promises; ``faults.py`` says which, and sweeps it all.

The ordinary run takes every point of one kind of fault in each scenario and every few of the others.
"""

import pytest

from tests.random.faults import Fault, Sweep
from tests.random.scenarios import SCENARIOS, Scenario
from tests.support.scratch import scratch
from tests.support.tools import requires

pytestmark = requires("qemu-img", "qemu-io")

#: A prime, so that the points are of every kind whatever the rhythm of the writer.
STRIDE = 7


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_disk_survives_any_one_fault_of_its_file(scenario: Scenario, fault: Fault) -> None:
    with scratch() as directory:
        sweep = Sweep(scenario, fault, directory)
        sweep.run(stride=STRIDE)
    assert sweep.points

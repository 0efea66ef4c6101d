"""The operations, and what they are done to."""

from functools import cache

from tests.crash.live.images import KIB, Layer
from tests.crash.live.scenario import Scenario
from tests.crash.live.stage import Stage

_BASE = Layer(filled=0.7)
_TOP = Layer(filled=0.3, zeroed=0.1)


async def _snapshot(stage: Stage) -> None:
    await stage.order(
        "blockdev-snapshot-sync", device="disk", snapshot_file=stage.path("new"), x_nbdq_cluster_size=4 * KIB
    )
    stage.replied(disk="new")


async def _two_snapshots(stage: Stage) -> None:
    await _snapshot(stage)
    stage.guests(6)
    await stage.order(
        "blockdev-snapshot-sync", device="disk", snapshot_file=stage.path("newer"), x_nbdq_cluster_size=8 * KIB
    )
    stage.replied(disk="newer")


async def _transaction(stage: Stage) -> None:
    actions = [
        {
            "type": "blockdev-snapshot-sync",
            "data": {"device": name, "snapshot-file": stage.path(f"{name}-new"), "x-nbdq-cluster-size": 4 * KIB},
        }
        for name in ("disk", "other")
    ]
    await stage.order("transaction", actions=actions)
    stage.replied(disk="disk-new", other="other-new")


SCENARIOS: tuple[Scenario, ...] = (
    Scenario("a snapshot", {"disk": (_BASE, _TOP)}, _snapshot),
    Scenario("a snapshot without a state file", {"disk": (_BASE, _TOP)}, _snapshot, state=False),
    Scenario("a snapshot of a raw disk", {"disk": (Layer(format="raw"),)}, _snapshot),
    Scenario("a snapshot of an image with a bitmap", {"disk": (Layer(bitmap=True),)}, _snapshot),
    Scenario("two snapshots", {"disk": (_TOP,)}, _two_snapshots),
    Scenario("a transaction of two disks", {"disk": (_BASE, _TOP), "other": (_BASE,)}, _transaction),
    Scenario(
        "a transaction of two disks without a state file",
        {"disk": (_BASE, _TOP), "other": (_BASE,)},
        _transaction,
        state=False,
    ),
)


@cache
def by_name() -> dict[str, Scenario]:
    """Every scenario by its name."""
    return {scenario.name: scenario for scenario in SCENARIOS}

"""The operations, and what they are done to."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

from nbdq.chain.overlay import OverlayDisk
from nbdq.errors import OperationError
from nbdq.ops.amend import Amend, ChainRules
from nbdq.qcow2.amending.options import AmendOptions
from nbdq.qcow2.snapshots import Snapshot, read_snapshots
from nbdq.qcow2.writing.internal_snapshots import create_snapshot, delete_snapshot
from nbdq.qcow2.writing.switch import reclaim
from nbdq.qcow2.writing.writable import WritableImage
from tests.crash.live.images import KIB, Layer
from tests.crash.live.scenario import Scenario
from tests.crash.live.stage import Stage
from tests.crash.recorder import SECTOR
from tests.crash.stamps import Values, read_stamps

Operate = Callable[[Stage], Awaitable[None]]

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


async def _failing_transaction(stage: Stage) -> None:
    """The last action cannot be applied, when the others have been."""
    path = stage.path("named")
    await stage.order("blockdev-snapshot-sync", device="other", snapshot_file=path, snapshot_node_name="node")
    stage.replied(other="named")
    actions = [
        {"type": "blockdev-snapshot-sync", "data": {"device": "disk", "snapshot-file": stage.path("never")}},
        {
            "type": "blockdev-snapshot-sync",
            "data": {"device": "other", "snapshot-file": stage.path("ever"), "snapshot-node-name": "node"},
        },
    ]
    try:
        await stage.order("transaction", actions=actions)
    except OperationError:
        stage.replied(disk="disk1")
        return
    raise AssertionError("two layers have one name")


def _commit(*, top: str, base: str, **words: Any) -> Operate:
    async def operate(stage: Stage) -> None:
        await stage.order("block-commit", device="disk", top=stage.path(top), base=stage.path(base), **words)

    return operate


def _active_commit(base: str) -> Operate:
    async def operate(stage: Stage) -> None:
        await stage.order("block-commit", device="disk", base=stage.path(base))
        stage.replied(disk=base)

    return operate


def _stream(*, layer: str | None = None, base: str | None = None) -> Operate:
    async def operate(stage: Stage) -> None:
        words = {"x_nbdq_layer": layer, "base": base}
        paths = {word: stage.path(name) for word, name in words.items() if name is not None}
        await stage.order("block-stream", device="disk", **paths)

    return operate


def _rebase(to: str, *, format: str = "qcow2", layer: str | None = None) -> Operate:
    async def operate(stage: Stage) -> None:
        chosen = {} if layer is None else {"layer": stage.path(layer)}
        await stage.order("x-nbdq-rebase", device="disk", backing_file=to, backing_format=format, **chosen)

    return operate


def _resize(*sizes: int) -> Operate:
    async def operate(stage: Stage) -> None:
        volume = stage.server.volumes["disk"]
        for size in sizes:
            if size < volume.chain.device.size:
                values = read_stamps(stage.server.read("disk"))[: size // SECTOR]
                with stage.becoming("disk", stage.scenario.padded(values)):
                    await volume.flush()  # so that nothing else can be as old as before
                    await volume.resize(size, shrink=True)
            else:
                await volume.resize(size)
            stage.guests(6)

    return operate


async def _grow_beside(stage: Stage) -> None:
    volume = stage.server.volumes["disk"]
    for size in (1024 * KIB, 3072 * KIB):
        device = volume.chain.device
        assert isinstance(device, OverlayDisk)
        if device.size < size:
            stage.beside(partial(device.grow, size))
            volume.adopt()
        stage.guests(4)


def _amend(*steps: AmendOptions, size: int | None = None, whole: bool = False) -> Operate:
    async def operate(stage: Stage) -> None:
        for options in steps:
            rules = ChainRules() if whole else None
            await stage.job("disk", partial(Amend, options=options, name="disk", size=size, whole_chain=rules))
            stage.guests(4)

    return operate


async def _create_internal(stage: Stage, name: str) -> tuple[Snapshot, Values]:
    """And what the disk holds at that moment."""
    volume = stage.server.volumes["disk"]
    async with volume.drained():
        snapshot = create_snapshot(_image(stage), name, date_seconds=1, date_nanoseconds=2)
        volume.adopt()
        return snapshot, stage.scenario.padded(read_stamps(stage.server.read("disk")))


def _image(stage: Stage) -> WritableImage:
    device = stage.server.volumes["disk"].chain.device
    assert isinstance(device, OverlayDisk)
    return device.top


async def _internal_create(stage: Stage) -> None:
    for name in ("one", "two"):
        await _create_internal(stage, name)
        stage.guests(6)


async def _internal_delete(stage: Stage) -> None:
    await _create_internal(stage, "one")
    stage.guests(8)
    image = _image(stage)
    while snapshots := read_snapshots(image.storage, image.header):
        stage.beside(partial(delete_snapshot, image, snapshots[0]))
        stage.guests(6)


async def _internal_apply(stage: Stage) -> None:
    volume = stage.server.volumes["disk"]
    snapshot, values = await _create_internal(stage, "one")
    stage.guests(8)
    with stage.becoming("disk", values):
        async with volume.drained():
            device = volume.chain.device
            assert isinstance(device, OverlayDisk)
            unused = device.apply_snapshot(snapshot)
            volume.adopt()
    stage.guests(4)
    stage.beside(partial(reclaim, _image(stage), unused))
    stage.guests(4)


async def _checkpoint(stage: Stage) -> None:
    disks = [{"node": "disk", "bitmap": "bitmap", "new-bitmap": "next"}]
    await stage.order("x-nbdq-checkpoint", id="one", disks=disks)
    stage.replied(disk="disk1.checkpoint-one")


async def _checkpoint_and_end(stage: Stage) -> None:
    await _checkpoint(stage)
    stage.guests(8)
    await stage.order("x-nbdq-checkpoint-end", id="one")
    stage.replied(disk="disk1")


_FOUR = (_BASE, Layer(filled=0.4, zeroed=0.1), Layer(filled=0.3, zeroed=0.1), Layer(filled=0.2))
_MIXED = (
    Layer("cluster_size=8k", filled=0.6),
    Layer("cluster_size=4k", filled=0.4, zeroed=0.1),
    Layer("cluster_size=16k,extended_l2=on", filled=0.3, zeroed=0.1),
    Layer("cluster_size=2k", filled=0.1),
)
_PACKED = (
    Layer("cluster_size=8k", filled=0.6, compressed=True),
    Layer("cluster_size=8k", filled=0.5, compressed=True),
    Layer("cluster_size=8k", filled=0.3, compressed=True),
    Layer("cluster_size=8k", filled=0.1),
)
_LARGER = (
    Layer("cluster_size=16k", filled=0.8, compressed=True, piece=32),
    Layer("cluster_size=2k", filled=0.3),
    Layer("cluster_size=2k", filled=0.3, zeroed=0.1),
    Layer("cluster_size=4k", filled=0.1),
)
_KEPT = (replace(_BASE, snapshot=True), *_FOUR[1:])
_SHORT = (replace(_BASE, size=100 * KIB), *_FOUR[1:])
_OLD = Layer("cluster_size=4k,compat=0.10", filled=0.5)

SCENARIOS: tuple[Scenario, ...] = (
    Scenario("a snapshot", {"disk": (_BASE, _TOP)}, _snapshot),
    Scenario("a snapshot without a state file", {"disk": (_BASE, _TOP)}, _snapshot, state=False),
    Scenario("a snapshot of a raw disk", {"disk": (Layer(format="raw"),)}, _snapshot),
    Scenario("a snapshot of an image with a bitmap", {"disk": (Layer(bitmap=True),)}, _snapshot),
    Scenario("two snapshots", {"disk": (_TOP,)}, _two_snapshots),
    Scenario(
        "a transaction of two disks",
        {"disk": (_BASE, _TOP), "other": (_BASE,)},
        _transaction,
        together=True,
        requests=3,
    ),
    Scenario(
        "a transaction of two disks without a state file",
        {"disk": (_BASE, _TOP), "other": (_BASE,)},
        _transaction,
        state=False,
    ),
    Scenario("a transaction that fails", {"disk": (_BASE, _TOP), "other": (_BASE,)}, _failing_transaction, requests=4),
    Scenario("a commit", {"disk": _FOUR}, _commit(top="disk2", base="disk0")),
    Scenario("a commit without a state file", {"disk": _FOUR}, _commit(top="disk1", base="disk0"), state=False),
    Scenario("a commit into a smaller base", {"disk": _SHORT}, _commit(top="disk2", base="disk0")),
    Scenario("a commit of mixed clusters", {"disk": _MIXED}, _commit(top="disk2", base="disk0")),
    Scenario("a commit of compressed clusters", {"disk": _PACKED}, _commit(top="disk2", base="disk0")),
    Scenario("a commit into larger compressed clusters", {"disk": _LARGER}, _commit(top="disk2", base="disk0")),
    Scenario("a commit into a base with a snapshot", {"disk": _KEPT}, _commit(top="disk2", base="disk0")),
    Scenario(
        "a commit into a raw base",
        {"disk": (Layer(format="raw", filled=0.6), *_FOUR[1:])},
        _commit(top="disk2", base="disk0"),
    ),
    Scenario(
        "a commit that records a long name",
        {"disk": _FOUR},
        _commit(top="disk2", base="disk0", backing_file=f"{'./' * 300}disk0"),
    ),
    Scenario(
        "a commit into a base with a bitmap",
        {"disk": (replace(_BASE, bitmap=True), *_FOUR[1:])},
        _commit(top="disk2", base="disk0"),
    ),
    Scenario("a commit cancelled", {"disk": _KEPT}, _commit(top="disk2", base="disk0"), cancelled_after=6),
    Scenario("a commit beside guests", {"disk": _FOUR}, _commit(top="disk2", base="disk0"), threads=2),
    Scenario(
        "a commit of packed clusters beside guests", {"disk": _LARGER}, _commit(top="disk2", base="disk0"), threads=2
    ),
    Scenario("an active commit", {"disk": _FOUR[:3]}, _active_commit("disk0")),
    Scenario("an active commit without a state file", {"disk": _FOUR[:3]}, _active_commit("disk0"), state=False),
    Scenario("an active commit into a smaller base", {"disk": _SHORT[:3]}, _active_commit("disk0")),
    Scenario("an active commit of mixed clusters", {"disk": _MIXED}, _active_commit("disk1")),
    Scenario("an active commit of compressed clusters", {"disk": _PACKED}, _active_commit("disk0")),
    Scenario(
        "an active commit into a raw base",
        {"disk": (Layer(format="raw", filled=0.6), *_FOUR[1:3])},
        _active_commit("disk0"),
    ),
    Scenario(
        "an active commit into a base with a bitmap",
        {"disk": (replace(_BASE, bitmap=True), *_FOUR[1:3])},
        _active_commit("disk0"),
    ),
    Scenario("an active commit cancelled", {"disk": _KEPT}, _commit(top="disk3", base="disk0"), cancelled_after=9),
    Scenario("an active commit beside guests", {"disk": _FOUR[:3]}, _active_commit("disk0"), threads=2),
    Scenario("an active commit of mixed clusters beside guests", {"disk": _MIXED}, _active_commit("disk0"), threads=2),
    Scenario("a stream", {"disk": _FOUR[:3]}, _stream()),
    Scenario("a stream to a base", {"disk": _FOUR}, _stream(base="disk0")),
    Scenario("a stream into a layer below", {"disk": _FOUR}, _stream(layer="disk2", base="disk0")),
    Scenario("a stream of mixed clusters", {"disk": _MIXED}, _stream()),
    Scenario("a stream of compressed clusters", {"disk": _PACKED}, _stream(base="disk0")),
    Scenario("a stream over a smaller base", {"disk": _SHORT[:3]}, _stream(base="disk0")),
    Scenario("a stream cancelled", {"disk": _FOUR[:3]}, _stream(), cancelled_after=5),
    Scenario("a stream beside guests", {"disk": _FOUR[:3]}, _stream(), threads=2),
    Scenario("a stream of compressed clusters beside guests", {"disk": _PACKED}, _stream(base="disk0"), threads=2),
    Scenario("a stream into a layer below, beside guests", {"disk": _FOUR}, _stream(layer="disk2"), threads=2),
    Scenario(
        "a rebase beside guests", {"disk": _FOUR[:3]}, _rebase("spare1"), spare=(Layer(), Layer(filled=0.3)), threads=2
    ),
    Scenario("a rebase", {"disk": _FOUR[:3]}, _rebase("spare1"), spare=(Layer(), Layer(filled=0.3))),
    Scenario("a rebase of a layer below", {"disk": _FOUR}, _rebase("spare0", layer="disk2"), spare=(Layer(),)),
    Scenario(
        "a rebase to a raw image",
        {"disk": _FOUR[:3]},
        _rebase("spare0", format="raw"),
        spare=(Layer(format="raw", size=200 * KIB),),
    ),
    Scenario("growing", {"disk": (_BASE, _TOP)}, _resize(1024 * KIB, 3072 * KIB), largest=3072 * KIB),
    Scenario("growing beside guests", {"disk": (_BASE, _TOP)}, _grow_beside, largest=3072 * KIB, threads=2),
    Scenario(
        "growing and shrinking",
        {"disk": (replace(_BASE, size=512 * KIB), _TOP)},
        _resize(448 * KIB, 128 * KIB, 320 * KIB),
        largest=448 * KIB,
    ),
    Scenario(
        "amending down and up",
        {"disk": (_BASE, replace(_TOP, zeroed=0.3))},
        _amend(AmendOptions(version=2), AmendOptions(version=3), AmendOptions(version=2)),
    ),
    Scenario(
        "amending refcounts",
        {"disk": (_BASE, replace(_TOP, snapshot=True))},
        _amend(AmendOptions(refcount_bits=64), AmendOptions(refcount_bits=4)),
    ),
    Scenario(
        "amending a whole chain beside guests",
        {"disk": (_TOP, _TOP, _TOP)},
        _amend(AmendOptions(refcount_bits=64), AmendOptions(version=3), whole=True),
        threads=2,
    ),
    Scenario("amending a whole chain", {"disk": (_OLD, _OLD, _OLD)}, _amend(AmendOptions(version=3), whole=True)),
    Scenario("internal snapshots", {"disk": (_BASE, _TOP)}, _internal_create),
    Scenario("internal snapshots deleted", {"disk": (_BASE, replace(_TOP, snapshot=True))}, _internal_delete),
    Scenario(
        "internal snapshots deleted beside guests",
        {"disk": (_BASE, replace(_TOP, snapshot=True))},
        _internal_delete,
        threads=2,
    ),
    Scenario("an internal snapshot applied", {"disk": (_BASE, _TOP)}, _internal_apply),
    Scenario("a checkpoint", {"disk": (_BASE, Layer(bitmap=True))}, _checkpoint),
    Scenario(
        "a checkpoint and its end",
        {"disk": (_BASE, Layer(bitmap=True))},
        _checkpoint_and_end,
    ),
)


@cache
def by_name() -> dict[str, Scenario]:
    """Every scenario by its name."""
    return {scenario.name: scenario for scenario in SCENARIOS}

"""External snapshots, and transactions of whatever can be part of one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from nbdq.admin.arguments import parse
from nbdq.admin.commands.bitmaps import BITMAP_ACTIONS
from nbdq.admin.commands.internal_snapshots import NewSnapshot, internal_snapshot_action
from nbdq.admin.context import Context
from nbdq.admin.registry import Reply, command
from nbdq.admin.state import Changes, State
from nbdq.admin.transaction import Action, carry_out
from nbdq.errors import ImageError, OperationError, printable
from nbdq.ops.control import Control
from nbdq.ops.snapshot import ExternalSnapshot, SnapshotPlan
from nbdq.server.exports.volume import Volume
from nbdq.server.threads import in_thread

_log = logging.getLogger(__name__)

_SUPPORTED_FORMAT = "qcow2"


@dataclass(frozen=True)
class Snapshot:
    """Arguments of blockdev-snapshot-sync, QEMU's and ours."""

    snapshot_file: str
    device: str | None = None
    node_name: str | None = None
    snapshot_node_name: str | None = None
    format: str = _SUPPORTED_FORMAT
    mode: Literal["absolute-paths", "existing"] = "absolute-paths"
    x_nbdq_backing_name: str | None = None
    """How the overlay calls its backing file, instead of by its absolute path."""
    x_nbdq_minimum_free: int = 0
    """Bytes that must be free where the overlay goes."""
    x_nbdq_cluster_size: int | None = None
    """Of the overlay, instead of what the volume policy says."""


def chosen_volume(context: Context, device: str | None, node_name: str | None) -> Volume:
    """The disk that a command names in one of QEMU's two ways.

    Raises:
        OperationError: it names none, or two.
    """
    names = [name for name in (device, node_name) if name is not None]
    if len(names) != 1:
        raise OperationError("Need exactly one of 'device' and 'node-name'")
    return context.volumes.volume(names[0])


class SnapshotAction:
    """An :class:`~nbdq.admin.transaction.Action`: an overlay becomes the top of a disk."""

    def __init__(self, context: Context, volume: Volume, plan: SnapshotPlan) -> None:
        """Nothing is done yet.

        Raises:
            OperationError: as :class:`~nbdq.ops.snapshot.ExternalSnapshot`.
        """
        self.volume = volume
        self.what = f"a snapshot to {printable(plan.path, 1024)}"
        self.layers = frozenset({volume.chain.path})
        self._state: State = context.state
        self._plan = plan
        self._operation = ExternalSnapshot(volume.chain, plan)

    async def prepare(self) -> None:
        await in_thread(self._prepare)

    def _prepare(self) -> None:
        if not self._plan.existing:
            if os.path.lexists(self._plan.path):  # asked now, for what is recorded may be removed after a crash
                raise ImageError(self._plan.path, "exists already", "choose another name")
            with self._state.transaction() as changes:
                changes.add_pending(self.volume.name, self._plan.path)
        try:
            self._operation.run(Control())
        except BaseException:
            self._abandon()
            raise

    async def apply(self) -> None:
        try:
            await in_thread(self._operation.pivot)
        finally:
            self.volume.adopt()

    def record(self, changes: Changes) -> None:
        changes.set_top(self.volume.name, self._plan.path, _SUPPORTED_FORMAT)

    async def settle(self) -> None:
        await in_thread(self._operation.mark)

    async def undo(self) -> None:
        try:
            await in_thread(self._operation.revert)
        finally:
            self.volume.adopt()

    async def finish(self) -> None:
        await in_thread(self._operation.finish)

    async def abandon(self) -> None:
        await in_thread(self._abandon)

    def _abandon(self) -> None:
        try:
            self._operation.abort()
        except (OperationError, OSError) as error:
            _log.warning("%s: %s; the next start of the server removes it", self.what, error)
            return
        with self._state.transaction() as changes:
            changes.remove_pending(self.volume.name, self._plan.path)


def snapshot_action(context: Context, arguments: Snapshot) -> Action:
    """What blockdev-snapshot-sync does, as part of a transaction."""
    if arguments.format != _SUPPORTED_FORMAT:
        raise OperationError(f"Unknown driver '{printable(arguments.format)}': overlays are {_SUPPORTED_FORMAT}")
    path = os.path.abspath(arguments.snapshot_file)
    options = context.policies.overlay_options(path)
    if arguments.x_nbdq_cluster_size is not None:
        options["cluster_size"] = arguments.x_nbdq_cluster_size
    plan = SnapshotPlan(
        path,
        options,
        existing=arguments.mode == "existing",
        backing_name=arguments.x_nbdq_backing_name,
        node_name=arguments.snapshot_node_name,
        minimum_free=arguments.x_nbdq_minimum_free,
    )
    volume = chosen_volume(context, arguments.device, arguments.node_name)
    context.checkpoints.check_free(volume)
    return SnapshotAction(context, volume, plan)


@command("blockdev-snapshot-sync", Snapshot)
async def snapshot(context: Context, arguments: Snapshot) -> Reply:
    """Make an overlay, link it to the disk's present top, and let it be the top; durable when this returns."""
    await carry_out(context, [snapshot_action(context, arguments)])
    return None


@dataclass(frozen=True)
class TransactionMember:
    """One action of a transaction."""

    type: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Properties:
    """QEMU's TransactionProperties."""

    completion_mode: Literal["individual", "grouped"] = "individual"


@dataclass(frozen=True)
class Transaction:
    """Arguments of transaction."""

    actions: list[TransactionMember]
    properties: Properties = field(default_factory=Properties)


@dataclass(frozen=True)
class Abort:
    """An action that always fails, to see that nothing happens."""


def _abort(context: Context, arguments: Abort) -> Action:
    raise OperationError("Transaction aborted using Abort action")


#: What can be part of a transaction: the class of its arguments, and what makes an action of them.
ACTIONS: dict[str, tuple[type[Any], Callable[[Context, Any], Action]]] = {
    "blockdev-snapshot-sync": (Snapshot, snapshot_action),
    "blockdev-snapshot-internal-sync": (NewSnapshot, internal_snapshot_action),
    "abort": (Abort, _abort),
    **BITMAP_ACTIONS,
}


@command("transaction", Transaction)
async def transaction(context: Context, arguments: Transaction) -> Reply:
    """Do all actions at one moment of all their disks, or none."""
    actions: list[Action] = []
    for member in arguments.actions:
        if member.type not in ACTIONS:
            raise OperationError(f"Parameter 'type' does not accept value '{printable(member.type)}'")
        kind, make = ACTIONS[member.type]
        actions.append(make(context, parse(kind, member.data, where=f"{member.type}.data")))
    if actions:
        await carry_out(context, actions)
    return None

"""Internal snapshots of disks that are served: QEMU's commands, and two that it has for its monitor only (4.5).

Making one and going back to one stop the disk for as long as its tables take to be read and written; deleting one does
not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from nbdq.admin.context import Context
from nbdq.admin.registry import Reply, command
from nbdq.admin.state import Changes
from nbdq.admin.transaction import Action, carry_out
from nbdq.chain.overlay import OverlayDisk
from nbdq.errors import ExportError, NotFound, OperationError, printable
from nbdq.qcow2.snapshots import Snapshot, find_snapshot, read_snapshots
from nbdq.qcow2.writing.internal_snapshots import create_snapshot, delete_snapshot, prepare_snapshot
from nbdq.qcow2.writing.switch import reclaim
from nbdq.server.exports.volume import Volume
from nbdq.server.threads import in_thread

_NANOSECONDS = 1_000_000_000


@dataclass(frozen=True)
class NewSnapshot:
    """QEMU's BlockdevSnapshotInternal."""

    device: str
    name: str


@dataclass(frozen=True)
class OneSnapshot:
    """Which snapshot: id, name, or both of it."""

    device: str
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Device:
    """Whose snapshots."""

    device: str


class InternalSnapshotAction:
    """An :class:`~nbdq.admin.transaction.Action`: a disk is kept in its own image as it is at that moment."""

    def __init__(self, volume: Volume, name: str) -> None:
        self.volume = volume
        self.what = f"an internal snapshot '{printable(name)}'"
        self.layers = frozenset({volume.chain.path})
        self._name = name
        self._made: Snapshot | None = None

    async def prepare(self) -> None:
        """Refuse what cannot be; let little be left to do while the disk stands still."""
        device = _writable(self.volume)
        if not self._name:
            raise OperationError("Name is empty")
        if any(snapshot.name == self._name for snapshot in await _snapshots(self.volume)):
            raise OperationError(
                f"Snapshot with name '{printable(self._name)}' already exists on device '{printable(self.volume.name)}'"
            )
        await in_thread(prepare_snapshot, device.top)

    async def apply(self) -> None:
        """Make it."""
        self._made = await in_thread(self._create)

    def _create(self) -> Snapshot:
        seconds, nanoseconds = divmod(time.time_ns(), _NANOSECONDS)
        device = _writable(self.volume)
        return create_snapshot(device.top, self._name, date_seconds=seconds, date_nanoseconds=nanoseconds)

    def record(self, changes: Changes) -> None:
        """The image records it itself."""

    async def settle(self) -> None:
        """Nothing is left to do."""

    async def undo(self) -> None:
        """Delete it again."""
        assert self._made is not None, "nothing was applied"
        await in_thread(delete_snapshot, _writable(self.volume).top, self._made)

    async def finish(self) -> None:
        """Nothing is left to do."""

    async def abandon(self) -> None:
        """Nothing was prepared that would stay."""


def internal_snapshot_action(context: Context, arguments: NewSnapshot) -> Action:
    """What blockdev-snapshot-internal-sync does, as part of a transaction."""
    return InternalSnapshotAction(context.volumes.volume(arguments.device), arguments.name)


@command("blockdev-snapshot-internal-sync", NewSnapshot)
async def create(context: Context, arguments: NewSnapshot) -> Reply:
    """Keep the disk as it is now in its own image; durable when this returns."""
    await carry_out(context, [internal_snapshot_action(context, arguments)])
    return None


@command("blockdev-snapshot-delete-internal-sync", OneSnapshot)
async def delete(context: Context, arguments: OneSnapshot) -> Reply:
    """Delete an internal snapshot, named by its id, its name, or both; what it was. Clients are served meanwhile."""
    volume = context.volumes.volume(arguments.device)
    device = _writable(volume)
    with context.jobs.exclusive(volume, "deleting an internal snapshot", frozenset({volume.chain.path})):
        async with volume.steady():
            snapshots = await _snapshots(volume)
            chosen = _choose(snapshots, arguments)
            _withdraw(volume, snapshots, chosen)
            await in_thread(delete_snapshot, device.top, chosen)
    return _described(chosen)


@command("x-nbdq-snapshot-list", Device, changes=False)
async def list_snapshots(context: Context, arguments: Device) -> Reply:
    """The internal snapshots of a disk's top image."""
    return [_described(snapshot) for snapshot in await _snapshots(context.volumes.volume(arguments.device))]


@command("x-nbdq-snapshot-apply", OneSnapshot)
async def apply(context: Context, arguments: OneSnapshot) -> Reply:
    """Let the disk hold again what an internal snapshot holds; what it holds now is lost. Clients that are connected
    see the other contents, and the other size, if there is one, at once."""
    volume = context.volumes.volume(arguments.device)
    device = _writable(volume)
    with context.jobs.exclusive(volume, "going back to an internal snapshot"):
        chosen = _choose(await _snapshots(volume), arguments)
        await in_thread(prepare_snapshot, device.top)
        async with volume.drained():
            try:
                unused = await in_thread(device.apply_snapshot, chosen)
            finally:
                volume.adopt()
        await in_thread(reclaim, device.top, unused)
    return _described(chosen)


def _writable(volume: Volume) -> OverlayDisk:
    """The disk, if it can have internal snapshots.

    Raises:
        OperationError: it is raw or read-only.
    """
    device, name = volume.chain.device, printable(volume.name)
    if volume.chain.read_only:
        raise OperationError(f"Device '{name}' is read only")
    if not isinstance(device, OverlayDisk):
        raise OperationError(f"Block format 'raw' used by device '{name}' does not support internal snapshots")
    return device


async def _snapshots(volume: Volume) -> tuple[Snapshot, ...]:
    top = volume.chain.layers[0]
    return () if top.header is None else await in_thread(read_snapshots, top.storage, top.header)


def _choose(snapshots: Sequence[Snapshot], wanted: OneSnapshot) -> Snapshot:
    if wanted.id is None and wanted.name is None:
        raise OperationError("Name or id must be provided")
    found = [
        snapshot for snapshot in snapshots if wanted.id in (None, snapshot.id) and wanted.name in (None, snapshot.name)
    ]
    shown = [printable(text or "(null)") for text in (wanted.id, wanted.name, wanted.device)]
    if not found:
        raise OperationError(
            f"Snapshot with id '{shown[0]}' and name '{shown[1]}' does not exist on device '{shown[2]}'"
        )
    if len(found) > 1:
        ids = ", ".join(printable(snapshot.id, 20) for snapshot in found[:20])
        raise OperationError(f"Several snapshots of device '{shown[2]}' are named '{shown[1]}'; say which by id: {ids}")
    return found[0]


def _withdraw(volume: Volume, snapshots: Sequence[Snapshot], snapshot: Snapshot) -> None:
    """Let nobody in to exports of ``snapshot`` that came along with others.

    Raises:
        OperationError: somebody uses one, or an administrator has made one.
    """
    for export in volume.exports:
        view = volume.view_of(export)
        with suppress(ExportError, NotFound):
            if view.snapshot is None or (view.layer is not None and volume.chain.index_of(view.layer) > 0):
                continue
            if find_snapshot(snapshots, view.snapshot) != snapshot:
                continue
            if export.is_derived and not export.clients:
                volume.delete(export)
            else:
                raise OperationError(
                    f"Snapshot '{printable(snapshot.id)}' is shown by export '{printable(export.info.name)}'; "
                    "delete that first"
                )


def _described(snapshot: Snapshot) -> dict[str, Any]:
    """QEMU's SnapshotInfo, and the size of the disk."""
    clock_seconds, clock_nanoseconds = divmod(snapshot.vm_clock_ns, _NANOSECONDS)
    found = {
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_seconds,
        "date-nsec": snapshot.date_nanoseconds,
        "vm-clock-sec": clock_seconds,
        "vm-clock-nsec": clock_nanoseconds,
    }
    if snapshot.icount is not None:
        found["icount"] = snapshot.icount
    if snapshot.disk_size is not None:
        found["x-nbdq-disk-size"] = snapshot.disk_size
    return found

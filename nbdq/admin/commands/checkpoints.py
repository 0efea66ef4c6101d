"""Checkpoints for backup programs: begin one for any number of disks, read it over NBD, end it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nbdq.admin.checkpoints import Checkpoint, Member, PublishMoment, RotateBitmaps, overlay_path
from nbdq.admin.commands.snapshots import SnapshotAction
from nbdq.admin.context import Context
from nbdq.admin.registry import NoArguments, Reply, command
from nbdq.admin.transaction import Action, carry_out
from nbdq.errors import OperationError
from nbdq.nbd.constants import DIRTY_BITMAP
from nbdq.ops.snapshot import SnapshotPlan

#: It becomes part of file names.
_WELL_FORMED = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)


@dataclass(frozen=True)
class CheckpointDisk:
    """What a checkpoint does with one disk."""

    node: str
    bitmap: str | None = None
    """The bitmap that ends here, and is shown with the moment; None for a full backup."""
    new_bitmap: str | None = None
    """A bitmap that begins here; None if there is to be no incremental backup from here on."""
    export: str | None = None
    """The name under which the moment is exported."""
    snapshot_file: str | None = None
    """Where the throw-away overlay goes."""


@dataclass(frozen=True)
class BeginCheckpoint:
    """Arguments of x-nbdq-checkpoint."""

    id: str
    disks: list[CheckpointDisk]
    minimum_free: int = 0
    """Bytes that must be free where the overlays go."""


@command("x-nbdq-checkpoint", BeginCheckpoint)
async def begin(context: Context, arguments: BeginCheckpoint) -> Reply:
    """Freeze one moment of all disks: export it read-only with the bitmap that ends there, begin the new bitmap."""
    if not _WELL_FORMED.fullmatch(arguments.id):
        raise OperationError("Parameter 'id' must be 1 to 64 letters, digits, dots, dashes and underscores")
    if not arguments.disks:
        raise OperationError("Parameter 'disks' must name at least one disk")
    volumes = [context.volumes.volume(disk.node) for disk in arguments.disks]
    if len({volume.name for volume in volumes}) != len(volumes):
        raise OperationError("Parameter 'disks' names a disk twice")
    context.checkpoints.check_new(arguments.id, volumes)
    actions: list[Action] = []
    members = []
    for volume, disk in zip(volumes, arguments.disks, strict=True):
        path = disk.snapshot_file or overlay_path(volume, arguments.id)
        export = disk.export or f"{volume.name}-{arguments.id}"
        options = context.policies.overlay_options(path)
        plan = SnapshotPlan(path, options, minimum_free=arguments.minimum_free)
        actions += [
            RotateBitmaps(volume, frozen=disk.bitmap, successor=disk.new_bitmap),
            SnapshotAction(context, volume, plan),
            PublishMoment(volume, id=export, name=export, frozen=disk.bitmap),
        ]
        members.append(Member(volume, volume.chain.path, path, export, disk.bitmap, disk.new_bitmap))
    checkpoint = Checkpoint(arguments.id, members)
    context.checkpoints.add(checkpoint)  # now, so that nobody begins another one meanwhile
    try:
        await carry_out(context, actions)
    except BaseException:
        context.checkpoints.remove(checkpoint)
        raise
    return _described(checkpoint)


@command("x-nbdq-query-checkpoints", NoArguments, changes=False)
async def query(context: Context, arguments: NoArguments) -> Reply:
    """The checkpoints that have not ended."""
    return [_described(checkpoint) for checkpoint in context.checkpoints]


def _described(checkpoint: Checkpoint) -> dict[str, object]:
    return {
        "id": checkpoint.id,
        "disks": [
            {
                "node": member.volume.name,
                "export": member.export,
                "image": member.image,
                "snapshot-file": member.overlay,
                **({} if member.frozen is None else {"bitmap": member.frozen, "context": DIRTY_BITMAP + member.frozen}),
                **({} if member.successor is None else {"new-bitmap": member.successor}),
            }
            for member in checkpoint.members
        ],
    }

"""Checkpoints for backup programs: begin one for any number of disks, read it over NBD, end it."""

from __future__ import annotations

import asyncio
import re
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

from nbdq.admin.checkpoints import Checkpoint, Member, PublishMoment, RotateBitmaps, overlay_path
from nbdq.admin.commands.snapshots import SnapshotAction
from nbdq.admin.context import Context
from nbdq.admin.job_request import JobRequest
from nbdq.admin.registry import NoArguments, Reply, command
from nbdq.admin.transaction import Action, carry_out
from nbdq.errors import OperationError
from nbdq.nbd.constants import DIRTY_BITMAP
from nbdq.ops.merge_back import MergeBack, Rotation
from nbdq.ops.snapshot import SnapshotPlan

#: How often to look whether clients that were cut are gone.
_POLL_SECONDS = 0.01
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


@dataclass(frozen=True)
class EndCheckpoint:
    """Arguments of x-nbdq-checkpoint-end."""

    id: str
    success: bool = True
    """Whether the backup is safe. If not, what had changed up to the checkpoint counts as changed still."""
    mode: Literal["safe", "hard"] = "safe"
    """Whether clients that still read the checkpoint are a reason to refuse, or are cut."""
    speed: int = 0
    """Bytes per second for each disk; 0 for no limit."""


@command("x-nbdq-checkpoint-end", EndCheckpoint)
async def end(context: Context, arguments: EndCheckpoint) -> Reply:
    """End a checkpoint: remove its exports, and merge its overlays back, with a job for each disk."""
    checkpoint = context.checkpoints.find(arguments.id)
    if arguments.mode == "safe":
        for member in checkpoint.left:
            if any(export.id == member.export and export.clients for export in member.volume.exports):
                raise OperationError(f"export '{member.export}' still in use; end it when its clients are gone")
    jobs = []
    for member in checkpoint.left:
        await _remove_export(member)
        request = JobRequest(
            id=f"checkpoint-{checkpoint.id}-{member.volume.name}",
            type="commit",
            volume=member.volume,
            command="x-nbdq-checkpoint-end",
            arguments=asdict(arguments),
            obsolete=member.overlay,
            speed=arguments.speed,
        )
        job = await context.jobs.start(request, partial(_merge_back, checkpoint, member, succeeded=arguments.success))
        jobs.append(job.id)
    return {"jobs": jobs}


async def _remove_export(member: Member) -> None:
    """On return nobody reads the image any more, which is about to change."""
    for export in member.volume.exports:
        if export.id == member.export:
            member.volume.delete(export, hard=True)
            while export.clients:
                await asyncio.sleep(_POLL_SECONDS)


def _merge_back(checkpoint: Checkpoint, member: Member, *, succeeded: bool) -> MergeBack:
    return MergeBack(
        member.volume.chain,
        image=member.image,
        overlay=member.overlay,
        rotation=Rotation(member.frozen, member.successor),
        succeeded=succeeded,
        on_end=partial(checkpoint.ended.add, member.volume.name),
    )


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
            for member in checkpoint.left
        ],
    }

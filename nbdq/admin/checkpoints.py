"""Checkpoints: one moment of several disks, kept readable for a backup, and what changed up to it frozen (F1).

Each disk gets a throw-away overlay, so that its images stand still below; they are exported read-only. In the same
moment the bitmap that says what the backup has to read stops counting, and a new one, for the next backup, begins to.
The new one is a bitmap of the image *below* the overlay: it sees the guest's writes when the overlay is committed back,
which marks exactly what was written meanwhile. So it is complete also if the server dies in between.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nbdq.admin.state import Changes
from nbdq.chain.bitmaps import bitmaps_of
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.views import View
from nbdq.errors import NotFound, OperationError, printable
from nbdq.qcow2.bitmaps.tracking import DirtyBitmaps
from nbdq.server.exports.export import Export
from nbdq.server.exports.wish import Wish

if TYPE_CHECKING:
    from nbdq.server.exports.volume import Volume


@dataclass(frozen=True)
class Member:
    """One disk of a checkpoint."""

    volume: Volume
    image: str
    """The path of the image that was the top at that moment."""
    overlay: str
    """The path of the overlay that takes the guest's writes since."""
    export: str
    """The id of the export that shows the moment."""
    frozen: str | None
    """The bitmap that tells what changed up to the moment."""
    successor: str | None
    """The bitmap that tells what changes from the moment on."""


@dataclass(frozen=True)
class Checkpoint:
    """One moment of several disks."""

    id: str
    members: Sequence[Member]
    ended: set[str] = field(default_factory=set)
    """Names of the disks that are no longer part of it."""

    @property
    def left(self) -> list[Member]:
        """The disks that still are."""
        return [member for member in self.members if member.volume.name not in self.ended]


class Checkpoints:
    """Those that have begun and not ended."""

    def __init__(self) -> None:
        self._by_id: dict[str, Checkpoint] = {}

    def __iter__(self) -> Iterator[Checkpoint]:
        for checkpoint in list(self._by_id.values()):
            if checkpoint.left:
                yield checkpoint

    def add(self, checkpoint: Checkpoint) -> None:
        """Remember one that has begun."""
        self._by_id[checkpoint.id] = checkpoint

    def remove(self, checkpoint: Checkpoint) -> None:
        """Forget one that has ended."""
        del self._by_id[checkpoint.id]

    def find(self, id: str) -> Checkpoint:
        """The checkpoint of that name.

        Raises:
            NotFound: there is none.
        """
        checkpoint = self._by_id.get(id)
        if checkpoint is None or not checkpoint.left:
            raise NotFound(f"Checkpoint '{printable(id)}' not found")
        return checkpoint

    def check_new(self, id: str, volumes: Sequence[Volume]) -> None:
        """Refuse a second checkpoint of that name, or of one of these disks.

        Raises:
            OperationError: there is one.
        """
        for checkpoint in self:
            if checkpoint.id == id:
                raise OperationError(f"Checkpoint '{printable(id)}' exists already; end it, or choose another name")
        for volume in volumes:
            self.check_free(volume)

    def check_free(self, volume: Volume) -> None:
        """Refuse what would put something between a disk and its checkpoint.

        Raises:
            OperationError: the disk is part of one.
        """
        for checkpoint in self:
            if any(member.volume is volume for member in checkpoint.left):
                name = printable(volume.name)
                raise OperationError(
                    f"disk '{name}' is part of checkpoint '{printable(checkpoint.id)}'; end that first"
                )


class _DrainedOnly:
    """The steps of an action that does all it does while the disk is drained."""

    layers: frozenset[str] | None = frozenset()

    async def prepare(self) -> None:
        """Nothing."""

    def record(self, changes: Changes) -> None:
        """Nothing."""

    async def settle(self) -> None:
        """Nothing."""

    async def finish(self) -> None:
        """Nothing."""

    async def abandon(self) -> None:
        """Nothing."""


class RotateBitmaps(_DrainedOnly):
    """An :class:`~nbdq.admin.transaction.Action`: one bitmap stops to count, another one begins."""

    def __init__(self, volume: Volume, *, frozen: str | None, successor: str | None) -> None:
        """Either may be missing."""
        self.volume = volume
        self.what = "a rotation of bitmaps"
        self._frozen = frozen
        self._successor = successor

    async def apply(self) -> None:
        if self._frozen is not None:
            self._freeze(self._frozen)
        if self._successor is not None:
            try:
                self._bitmaps().add(self._successor, persistent=True)
            except OperationError:
                if self._frozen is not None:
                    self._bitmaps().enable(self._frozen)
                raise

    def _freeze(self, name: str) -> None:
        bitmaps = self._bitmaps()
        if any(state.name == name and not state.is_persistent for state in bitmaps):
            raise OperationError(
                f"Bitmap '{printable(name)}' is not persistent, and would not come along; add bitmaps for backups with"
                " persistent: true"
            )
        if any(state.name == name and not (state.is_recording or state.is_inconsistent) for state in bitmaps):
            # So a crash in the middle of a checkpoint leaves it, whose successor has what it misses.
            raise OperationError(
                f"Bitmap '{printable(name)}' is disabled, and misses what was written since; merge into it the bitmap"
                " that recorded that and enable it, or make a full backup"
            )
        bitmaps.disable(name)

    async def undo(self) -> None:
        if self._frozen is not None:  # the image may have been opened anew since
            self._bitmaps().enable(self._frozen)
        if self._successor is not None:
            self._bitmaps().remove(self._successor)

    def _bitmaps(self) -> DirtyBitmaps:
        device = self.volume.chain.device
        if not isinstance(device, OverlayDisk):
            raise OperationError(f"{printable(self.volume.chain.path, 1024)} is no qcow2 image, and has no bitmaps")
        return bitmaps_of(device.top)


class PublishMoment(_DrainedOnly):
    """An :class:`~nbdq.admin.transaction.Action`: what is below the new overlay is exported, with the frozen bitmap."""

    def __init__(self, volume: Volume, *, id: str, name: str, frozen: str | None) -> None:
        self.volume = volume
        self.what = "an export"
        self._wish = Wish(
            id,
            name,
            description="a checkpoint",
            view=View(layer=volume.chain.path),
            bitmaps=[frozen] if frozen is not None else [],
            allocation_depth=True,
        )
        self._export: Export | None = None

    async def apply(self) -> None:
        self._export = await self.volume.add(self._wish)

    async def undo(self) -> None:
        assert self._export is not None
        self.volume.delete(self._export, hard=True)


def overlay_path(volume: Volume, checkpoint: str) -> str:
    """Where the overlay of a disk goes, unless somebody says otherwise: beside its top."""
    return f"{os.path.abspath(volume.chain.path)}.checkpoint-{checkpoint}"

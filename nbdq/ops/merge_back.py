"""The end of a checkpoint for one disk: its throw-away overlay goes back into the image below, and is removed (F1).

An active commit that completes by itself. The image's own bitmaps see what is committed as writes, so the one that was
begun with the checkpoint has everything that the guest wrote since. What the checkpoint froze is then given up; or, if
the backup failed, joined with what came after, as if the checkpoint had never been.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from nbdq.chain.bitmaps import bitmaps_of
from nbdq.chain.live import LiveChain
from nbdq.chain.overlay import OverlayDisk
from nbdq.errors import NotFound, OperationError, printable
from nbdq.ops.active_commit import ActiveCommit
from nbdq.ops.control import Control
from nbdq.qcow2.writing.writable import WritableImage
from nbdq.storage import sync_directory_of


@dataclass(frozen=True)
class Rotation:
    """The bitmaps of a checkpoint, by name."""

    frozen: str | None
    """Ended at the checkpoint."""
    successor: str | None
    """Began there."""


class MergeBack:
    """An :class:`~nbdq.ops.operation.Operation`. What it changes of bitmaps is done when the disk is drained."""

    def __init__(
        self,
        chain: LiveChain,
        *,
        image: str,
        overlay: str,
        rotation: Rotation,
        succeeded: bool,
        on_end: Callable[[], None],
    ) -> None:
        """Look whether it can be done; nothing is changed.

        Args:
            image: the path of the layer that was the top at the checkpoint.
            overlay: the path of the layer that has been the top since.
            succeeded: the backup is safe, and need not be made again.
            on_end: called when the overlay is no longer part of the disk, whatever else may fail.

        Raises:
            NotFound: they are not part of the disk any more.
            OperationError: the overlay is not the top.
        """
        base = chain.index_of(image)
        if chain.index_of(overlay) != 0 or base != 1:
            raise OperationError(
                f"{printable(overlay, 1024)} is not the top of the disk any more; commit what lies over it first"
            )
        self._chain = chain
        self._overlay = overlay
        self._rotation = rotation
        self._succeeded = succeeded
        self._on_end = on_end
        # The image was written to until the checkpoint: who has another overlay on it was lost before.
        self._commit = ActiveCommit(chain, base=base, force=True)

    def run(self, control: Control) -> None:
        """Commit, until little is left; see :class:`~nbdq.ops.active_commit.ActiveCommit`."""
        self._commit.complete()
        self._commit.run(control)

    def pivot(self) -> None:
        """Let the image be the top again."""
        self._commit.pivot()

    def revert(self) -> None:
        """Let the overlay be the top still."""
        self._commit.revert()

    def finish(self) -> None:
        """Close and remove the overlay, and settle the bitmaps, durably.

        Raises:
            OperationError, OSError: something of that is left to be done by hand; the disk is in order.
        """
        self._on_end()
        try:
            self._settle_bitmaps()
        finally:
            self._commit.finish()
            with suppress(FileNotFoundError):
                os.unlink(self._overlay)
                sync_directory_of(self._overlay)

    def abort(self) -> None:
        """Stay as it was; the disk is drained."""
        self._commit.abort()

    def _settle_bitmaps(self) -> None:
        frozen, successor = self._rotation.frozen, self._rotation.successor
        unwanted = frozen
        if not self._succeeded:
            unwanted = successor
            if frozen is not None:
                self._rejoin(frozen, successor)
        if unwanted is None:
            return
        image = self._image
        with suppress(NotFound):  # somebody has removed it meanwhile
            bitmaps_of(image).remove(unwanted)
        bitmaps_of(image).forget_removed(image)

    def _rejoin(self, frozen: str, successor: str | None) -> None:
        """Let the frozen bitmap go on as if it had never stopped.

        Raises:
            OperationError: nobody knows what has changed since the checkpoint; the next backup has to be a full one.
        """
        if successor is None:
            raise OperationError(
                f"Bitmap '{printable(frozen)}' has missed the writes since the checkpoint; remove it, and make a full"
                " backup"
            )
        image = self._image
        bitmaps = bitmaps_of(image)
        bitmaps.enable(frozen)
        image.barrier()  # every write from now on marks both, and those before are in the successor
        bitmaps.merge(frozen, [bitmaps.usable(successor)])

    @property
    def _image(self) -> WritableImage:
        device = self._chain.device
        assert isinstance(device, OverlayDisk), "bitmaps were rotated in it"
        return device.top

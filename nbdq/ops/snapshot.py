"""External snapshots: a new, empty overlay becomes the top of a disk; what was its top stays as it is (4.6, R-59).

The overlay is whole and durable before the disk is drained. While it is drained the old top is sealed and the overlay
put in front; the caller records that, durably; then the old top is marked, so that nobody opens it for writing by
mistake. A crash before the record leaves the old top in charge and an empty file; after it, the overlay.
"""

import os
from dataclasses import dataclass, field, replace
from typing import Any

from nbdq.chain.bitmaps import carry_over_bitmaps
from nbdq.chain.create import create_qcow2
from nbdq.chain.disk import ChainDisk
from nbdq.chain.live import LiveChain
from nbdq.chain.resolve import ResolvedLayer
from nbdq.chain.sealing import or_never_written
from nbdq.errors import OperationError, printable
from nbdq.ops.control import Control
from nbdq.qcow2.create import CreateOptions
from nbdq.qcow2.header_area import set_backing, set_overlay_marker
from nbdq.storage import sync_directory_of


@dataclass(frozen=True)
class SnapshotPlan:
    """What the overlay is to be."""

    path: str
    """Where it is made; nothing may be there, unless it is ``existing``."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of :class:`~nbdq.qcow2.create.CreateOptions`, but for size and backing file."""
    existing: bool = False
    """The overlay is there already, empty or with the contents that the disk is to have."""
    backing_name: str | None = None
    """What the overlay calls its backing file, if not by its absolute path."""
    node_name: str | None = None
    """A name for the overlay as a layer."""
    minimum_free: int = 0
    """Bytes that the file system must have free for what will be written; see R-59 and 4.6 on thick storage."""


class ExternalSnapshot:
    """An :class:`~nbdq.ops.operation.Operation`; between pivot and finish comes :meth:`mark`."""

    def __init__(self, chain: LiveChain, plan: SnapshotPlan) -> None:
        """Nothing is done yet.

        Raises:
            OperationError: the disk is read-only, or the overlay must not lie there.
        """
        if chain.read_only:
            raise OperationError(f"{printable(chain.path, 1024)} is served read-only; there is nothing to snapshot")
        if not chain.gate.admits(plan.path):
            raise OperationError(
                f"{printable(plan.path, 1024)} lies outside the allowed directories; allow its directory with"
                " --allow-backing DIR"
            )
        self._chain = chain
        self._plan = plan
        self._made = False
        self._new: ResolvedLayer | None = None
        self._old, self._old_device = chain.layers, chain.device

    @property
    def path(self) -> str:
        """The overlay's."""
        return self._plan.path

    def run(self, control: Control) -> None:
        """Make the overlay, or look at the existing one; it is durable and open on return.

        Raises:
            OperationError: something is there already, there is not enough room, or an existing overlay does not fit.
            ImageError, OSError: it cannot be made or opened.
        """
        plan, chain = self._plan, self._chain
        control.check()
        top = chain.layers[0]
        format = "raw" if top.header is None else "qcow2"
        name = plan.backing_name or os.path.abspath(top.path)
        if not plan.existing:
            self._check_room()
            options = CreateOptions(size=chain.device.size, backing_name=name, backing_format=format, **plan.options)
            create_qcow2(plan.path, options, replace=False, locking=chain.policy.locking)
            self._made = True
        (self._new,) = chain.resolve(plan.path, format="qcow2", alone=True)
        assert self._new.header is not None
        if self._new.header.guest_size != chain.device.size:
            raise OperationError(
                f"{printable(plan.path, 1024)} is a disk of {self._new.header.guest_size} bytes, not of"
                f" {chain.device.size}; make it anew"
            )
        if plan.existing and (self._new.header.backing_name, self._new.header.backing_format) != (name, format):
            chain.claims.begin_writing(self._new)
            header = set_backing(self._new.storage, self._new.header, name=name, format=format)
            self._new = replace(self._new, header=header)
        assert not isinstance(chain.device, ChainDisk)
        chain.device.flush()  # so that little is left to be saved while requests wait

    def _check_room(self) -> None:
        directory = os.path.dirname(os.path.abspath(self._plan.path))
        status = os.statvfs(directory)
        free = status.f_bavail * status.f_frsize
        if free < self._plan.minimum_free:
            raise OperationError(
                f"{printable(directory, 1024)} has {free} bytes free, less than the {self._plan.minimum_free} that are"
                " wanted; make room, or choose another directory"
            )

    def pivot(self) -> None:
        """Let the overlay be the top. The disk is drained, and stays so until :meth:`mark` or :meth:`revert`.

        Raises:
            ImageError, OSError: the old top cannot be sealed, or the overlay not be written to; all is as before.
        """
        assert self._new is not None
        if self._chain.layers[0].storage is not self._old[0].storage:
            raise OperationError(
                f"{printable(self._plan.path, 1024)} is no overlay of the disk's top any more; make it anew"
            )
        if self._plan.node_name is not None:
            self._chain.check_name(self._plan.node_name)
        self._old, self._old_device = self._chain.layers, self._chain.device
        self._chain.rearrange([self._new, *self._old])
        if self._plan.node_name is not None:
            self._chain.name_layer(0, self._plan.node_name)

    def mark(self) -> None:
        """Let the old top's header name the overlay, durably; a raw one cannot. Drained or not.

        Raises:
            OSError: it cannot be written, or has no room for the name.
        """
        old = self._chain.layers[1]
        if old.header is not None:
            set_overlay_marker(old.storage, old.header, os.path.abspath(self._plan.path))
            self._chain.refresh(1)

    def revert(self) -> None:
        """Let the old top be the top again; nothing has been written to the overlay since :meth:`pivot`.

        Raises:
            ImageError, OSError: it cannot be opened any more. The overlay stays, but nobody can write to it: whoever
                starts the server again finds the old top.
        """
        new, old = self._chain.layers[:2]
        with or_never_written(new.storage, "the snapshot could not be taken back"):
            if old.header is not None and old.header.overlay_marker is not None:
                set_overlay_marker(old.storage, old.header, None)
                self._chain.refresh(1)
            self._chain.rearrange(self._chain.layers[1:])
        carry_over_bitmaps(self._old_device, self._chain.device)

    def finish(self) -> None:
        """Nothing is left to be done."""

    def abort(self) -> None:
        """Remove what was made. Idempotent.

        Raises:
            OperationError: :meth:`revert` has failed.
            OSError: it cannot be removed, but is closed; no disk knows of it.
        """
        if self._new is not None and self._new.storage is self._chain.layers[0].storage:
            what = f"{printable(self._plan.path, 1024)} is the top of the disk, and should not be"
            raise OperationError(f"{what}; nothing is written to it; start the server again")
        if self._new is not None:
            self._chain.drop([self._new])
            self._new = None
        if self._made:
            self._made = False
            os.unlink(self._plan.path)
            sync_directory_of(self._plan.path)

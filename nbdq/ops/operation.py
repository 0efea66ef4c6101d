"""What a long operation on a live chain looks like to the job that carries it out.

::

    run ──► pivot ──► finish
     │        │
     │        ▼
     └────► abort ◄── revert (when another member of the same transaction could not pivot)

Every method blocks and is called from one thread at a time, but for :meth:`MirroringOperation.complete`. Whatever is
called when, and wherever power fails between, the chain reads the same.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from nbdq.ops.control import Control


class Operation(Protocol):
    """Work on one disk: long while it is served, then a short change of its structure.

    Nobody else changes structure or size of the disk from the making of the operation to its end.
    """

    def run(self, control: Control) -> None:
        """Do the long part; the disk is served meanwhile.

        Raises:
            Cancelled: ``control`` said so. :meth:`abort` follows.
            ImageError, OperationError, OSError: it failed. :meth:`abort` follows, or ``run`` again.
        """

    def pivot(self) -> None:
        """Change the structure of the chain; the caller has drained the disk. Durable on return.

        Raises:
            ImageError, OperationError, OSError: it failed, and the structure is as it was. :meth:`abort` follows.
        """

    def revert(self) -> None:
        """Undo :meth:`pivot`; the caller has drained the disk since before the pivot. :meth:`abort` follows."""

    def finish(self) -> None:
        """Do what may be slow after the pivot: close files, empty images. The disk is served."""

    def abort(self) -> None:
        """Give up: release what is held; the caller has drained the disk, which may know places that become free now.

        Nothing else is called afterwards. Idempotent.
        """


@runtime_checkable
class MarkingOperation(Operation, Protocol):
    """An operation after which a file must not be taken for the disk any more."""

    def mark(self) -> None:
        """Say so in that file; the disk is drained since the pivot, and what it is now has been recorded, durably.

        Raises:
            ImageError, OSError: it cannot be said; the disk is in order.
        """


@runtime_checkable
class MirroringOperation(Operation, Protocol):
    """An operation whose :meth:`run` catches up with the guest, and then keeps up until it is told to complete."""

    on_ready: Callable[[], None]
    """Set by the job before ``run``; ``run`` calls it once, from its own thread, when it has caught up."""

    def complete(self) -> None:
        """Let ``run`` return as soon as the remainder is small enough for the pivot. From any thread."""

"""All or nothing, over any number of disks: every change is prepared, then all disks stand still while all changes happen.

::

    prepare ──► apply ──► record ──► settle ──► finish       every step for all actions before the next one begins
       │          │          │
       └─ abandon ┴─ undo ───┘                               of what was done so far, last first

What may take long belongs into ``prepare`` and ``finish``, when the disks are served. From ``apply`` to ``settle`` they
are drained. The record is one file, replaced as a whole: with it the transaction has happened, before it, nothing has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, ExitStack
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from nbdq.admin.state import Changes, State
from nbdq.errors import NbdqError
from nbdq.server.threads import in_thread

if TYPE_CHECKING:
    from nbdq.admin.context import Context
    from nbdq.server.volume import Volume

_log = logging.getLogger(__name__)


class Action(Protocol):
    """One change of one disk. Every method blocks, and is called in a thread, one at a time.

    A method that raises has undone what it did.
    """

    @property
    def volume(self) -> Volume:
        """The disk that it changes."""
        ...

    @property
    def what(self) -> str:
        """In words, for whoever is refused meanwhile."""
        ...

    @property
    def layers(self) -> frozenset[str] | None:
        """Paths of the layers that nobody else may restructure meanwhile; None for all of the disk."""
        ...

    def prepare(self) -> None:
        """Do what can be done while the disk is served."""

    def apply(self) -> None:
        """Change the disk, which is drained."""

    def record(self, changes: Changes) -> None:
        """Say what has to be known after a restart."""

    def settle(self) -> None:
        """The change is recorded, the disk still drained; what is done here is not necessary for that."""

    def undo(self) -> None:
        """Take :meth:`apply` back; the disk has been drained since."""

    def finish(self) -> None:
        """All went well, and the disk is served again."""

    def abandon(self) -> None:
        """Take :meth:`prepare` back; the disk is served."""


async def carry_out(context: Context, actions: Sequence[Action]) -> None:
    """Do all ``actions``, in their order, at one moment of all their disks.

    Raises:
        NbdqError, OSError: one of them failed; everything is as it was.
    """
    volumes = {action.volume.name: action.volume for action in actions}
    with ExitStack() as claims:
        for name in sorted(volumes):
            wanted = [action for action in actions if action.volume is volumes[name]]
            layers = None if any(action.layers is None for action in wanted) else _union(wanted)
            claims.enter_context(context.jobs.exclusive(volumes[name], wanted[0].what, layers))
        prepared: list[Action] = []
        try:
            for action in actions:
                await in_thread(action.prepare)
                prepared.append(action)
            async with AsyncExitStack() as drained:
                begun = monotonic()
                for name in sorted(volumes):
                    await drained.enter_async_context(volumes[name].drained())
                try:
                    await in_thread(_apply, actions, context.state)
                finally:
                    for volume in volumes.values():
                        volume.adopt()
            _log.info("%s: paused for %.1f ms", actions[0].what, (monotonic() - begun) * 1000)
        except BaseException:
            for action in reversed(prepared):
                await in_thread(_quietly, action.abandon)
            raise
    for action in actions:
        await in_thread(action.finish)


def _union(actions: Sequence[Action]) -> frozenset[str]:
    return frozenset(path for action in actions for path in action.layers or ())


def _apply(actions: Sequence[Action], state: State) -> None:
    applied: list[Action] = []
    try:
        for action in actions:
            action.apply()
            applied.append(action)
        if state.path is None:  # then what actions leave behind in images is all that outlives us
            for action in actions:
                action.settle()
        with state.transaction() as changes:
            for action in actions:
                action.record(changes)
    except BaseException:
        for action in reversed(applied):
            _quietly(action.undo)
        raise
    if state.path is not None:
        for action in actions:
            _quietly(action.settle)


def _quietly(step: Callable[[], None]) -> None:
    """Run a step whose failure must not hide another one, or changes nothing any more."""
    try:
        step()
    except (NbdqError, OSError) as error:
        _log.error("after a transaction: %s", error)

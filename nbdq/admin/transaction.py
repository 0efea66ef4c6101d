"""All or nothing, over any number of disks: changes are prepared, then all disks stand still while all of them happen.

::

    prepare ──► apply ──► record ──► settle ──► finish       every step for all actions before the next one begins
       │          │          │
       └─ abandon ┴─ undo ───┘                               of what was done so far, last first

What may take long belongs into ``prepare`` and ``finish``, when the disks are served. From ``apply`` to ``settle`` they
are drained. The record is one file, replaced as a whole: with it the transaction has happened, before it, nothing has.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from nbdq.admin.state import Changes, State
from nbdq.errors import NbdqError
from nbdq.server.exports.volume import all_drained
from nbdq.server.threads import in_thread

if TYPE_CHECKING:
    from nbdq.admin.context import Context
    from nbdq.server.exports.volume import Volume

_log = logging.getLogger(__name__)


class Action(Protocol):
    """One change of one disk. Called one method at a time, on the loop thread; a method that raises has undone what it
    did."""

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

    async def prepare(self) -> None:
        """Do what can be done while the disk is served."""

    async def apply(self) -> None:
        """Change the disk, which is drained."""

    def record(self, changes: Changes) -> None:
        """Say what has to be known after a restart."""

    async def settle(self) -> None:
        """The change is recorded, the disk still drained; what is done here is not necessary for that."""

    async def undo(self) -> None:
        """Take :meth:`apply` back; the disk has been drained since."""

    async def finish(self) -> None:
        """All went well, and the disk is served again."""

    async def abandon(self) -> None:
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
                await action.prepare()
                prepared.append(action)
            begun = monotonic()
            async with all_drained(volumes.values()):
                await _apply(actions, context.state)
            _log.info("%s: requests paused for %.1f ms", actions[0].what, (monotonic() - begun) * 1000)
        except BaseException:
            for action in reversed(prepared):
                await _quietly(action.abandon)
            raise
        for action in actions:
            await action.finish()


def _union(actions: Sequence[Action]) -> frozenset[str]:
    return frozenset(path for action in actions for path in action.layers or ())


async def _apply(actions: Sequence[Action], state: State) -> None:
    applied: list[Action] = []
    try:
        for action in actions:
            await action.apply()
            applied.append(action)
        if state.path is None:  # then what actions leave behind in images is all that outlives us
            for action in actions:
                await action.settle()
        await in_thread(_record, actions, state)
    except BaseException:
        for action in reversed(applied):
            await _quietly(action.undo)
        raise
    if state.path is not None:
        for action in actions:
            await _quietly(action.settle)


def _record(actions: Sequence[Action], state: State) -> None:
    with state.transaction() as changes:
        for action in actions:
            action.record(changes)


async def _quietly(step: Callable[[], Awaitable[None]]) -> None:
    """Take a step whose failure must not hide another one, or changes nothing any more."""
    try:
        await step()
    except (NbdqError, OSError) as error:
        _log.error("after a transaction: %s", error)

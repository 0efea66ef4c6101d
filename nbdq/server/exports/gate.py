"""The gate of a disk: between the requests of its clients and those who change the disk itself.

Open, it costs nothing: sessions ask no more than whether they are held, once for each batch. Closed, no request touches
the device; what clients send waits in their sockets. Loop thread only.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Protocol

from nbdq.server.exports.pause import Pause

_log = logging.getLogger(__name__)


class Guarded(Protocol):
    """A session, as a gate sees it."""

    @property
    def export(self) -> object:
        """What it serves."""
        ...

    @property
    def in_progress(self) -> int:
        """Requests that it has begun and that are not answered."""
        ...

    @property
    def is_quiet(self) -> bool:
        """Whether nothing that it has begun touches the device."""
        ...

    def reconsider(self) -> None:
        """Begin to hold requests back, or serve again, as the gate and the export now say."""
        ...

    @property
    def is_detached(self) -> bool:
        """Whether nothing that waits to be sent lies in a file."""
        ...

    async def detach(self) -> None:
        """Copy what waits to be sent from files into memory. Only while quiet."""
        ...


class Gate:
    """Everybody who serves requests on one disk, whatever the export."""

    def __init__(self) -> None:
        self.pause = Pause(self.reconsider)
        """An administrator's wish, besides :meth:`closed`."""
        self._is_draining = False
        self._sessions: set[Guarded] = set()
        self._exclusive = asyncio.Lock()
        self._holder: asyncio.Task[object] | None = None
        self._changed = asyncio.Event()

    @property
    def is_closed(self) -> bool:
        """Whether sessions hold their requests back."""
        return self._is_draining or self.pause.is_on

    def in_progress(self, export: object = None) -> int:
        """Requests that all sessions, or those of ``export``, have in the pool, or waiting for a flush."""
        return sum(session.in_progress for session in self._sessions if export in (None, session.export))

    def enter(self, session: Guarded) -> None:
        """``session`` serves this disk from now on, as soon as the gate is open."""
        self._sessions.add(session)

    def leave(self, session: Guarded) -> None:
        """``session`` has ended, and nothing that it has begun is left."""
        self._sessions.discard(session)
        self._changed.set()

    def became_quiet(self) -> None:
        """Some session that is held back has become quiet."""
        self._changed.set()

    def reconsider(self) -> None:
        """Have all sessions look again whether they are held back."""
        for session in list(self._sessions):
            session.reconsider()

    async def wait_until_quiet(self, export: object = None) -> None:
        """Return when all sessions, or those of ``export``, are quiet; they must be held."""
        while any(not session.is_quiet and export in (None, session.export) for session in self._sessions):
            self._changed.clear()
            await self._changed.wait()

    @asynccontextmanager
    async def steady(self) -> AsyncIterator[None]:
        """Inside, nobody else is :meth:`closed`; requests are served.

        One caller at a time; the others wait. A task that is inside already may come in again, and may be closed.
        """
        task = asyncio.current_task()
        if self._holder is task:
            yield
            return
        async with self._exclusive:
            self._holder = task
            try:
                yield
            finally:
                self._holder = None

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Inside, it is :meth:`steady`, no request of any session touches the disk, and no unsent reply points into its
        files.

        However the block ends, and if it is not even reached because its task was cancelled, sessions go on where they
        were.
        """
        async with self.steady():
            if self._is_draining:  # by this task
                yield
                return
            self._is_draining = True
            begun = monotonic()
            try:
                self.reconsider()
                await self.wait_until_quiet()
                await asyncio.gather(*(session.detach() for session in self._sessions if not session.is_detached))
                _log.debug("%d sessions drained within %.2f ms", len(self._sessions), (monotonic() - begun) * 1000)
                yield
            finally:
                self._is_draining = False
                self.reconsider()

"""Group commit: all who want a flush of an export while one is running share the next one.

A flush covers every write that was acknowledged before the flush was asked for, on whatever connection, because it
begins afterwards (P90, P91, R-75). FUA is the write, then a share in a flush that begins after it (P92).
"""

import logging
from collections.abc import Callable
from functools import partial

from nbdq.server.resources import Resources

_log = logging.getLogger(__name__)

#: Called on the loop thread when the flush is over, with what it failed of.
Waiter = Callable[[Exception | None], None]


class Commits:
    """The flushes of one export, at most one at a time. Loop thread only, but for :meth:`_commit`."""

    def __init__(self, flush: Callable[[], None]) -> None:
        self._flush = flush
        self._waiting: list[Waiter] = []
        self._running = False

    def join(self, waiter: Waiter, resources: Resources) -> None:
        """Have everything that is written by now made durable, and call ``waiter`` then, never before returning."""
        self._waiting.append(waiter)
        if not self._running:
            self._running = True
            resources.loop.call_soon(self._begin, resources)  # so that the rest of the batch can join

    def _begin(self, resources: Resources) -> None:
        waiters, self._waiting = self._waiting, []
        resources.pool.submit(partial(self._commit, waiters, resources))

    def _commit(self, waiters: list[Waiter], resources: Resources) -> None:
        """Pool thread: one flush for all."""
        failure = None
        try:
            self._flush()
        except Exception as error:
            failure = error
        try:
            resources.loop.call_soon_threadsafe(self._finish, waiters, failure, resources)
        except RuntimeError:  # the loop is closed: nobody is left to answer
            _log.debug("a flush ended after the end of the loop")

    def _finish(self, waiters: list[Waiter], failure: Exception | None, resources: Resources) -> None:
        if self._waiting:
            self._begin(resources)
        else:
            self._running = False
        for waiter in waiters:
            waiter(failure)

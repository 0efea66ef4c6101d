"""Work for strangers that is too long to be done for all of them before anybody else is served."""

import asyncio
from collections import deque
from collections.abc import Callable
from time import monotonic

#: How much longer than a piece of it the loop belongs to others, before the next one.
_REST = 4


class Turns:
    """Does what it is given in the order in which it comes, a piece at a time, and for a fifth of the time at most.
    Loop thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._line: deque[Callable[[], None]] = deque()
        self._is_due = False

    def wait(self, call: Callable[[], None]) -> None:
        """Call ``call`` when it is its turn."""
        self._line.append(call)
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._next)

    def _next(self) -> None:
        begun = monotonic()
        try:
            self._line.popleft()()
        finally:
            self._is_due = bool(self._line)
            if self._is_due:
                self._loop.call_later(_REST * (monotonic() - begun), self._next)

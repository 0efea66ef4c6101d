"""What a long operation reports, and what it obeys: progress, speed, pause, cancel.

The operation calls :meth:`Control.advance` after every piece of work, from its own thread; everybody else may look and
steer from theirs. Must not know jobs, clients or event loops.
"""

import threading
from time import monotonic

#: How far ahead of a speed limit a job may run before it sleeps, in seconds.
_SLICE = 0.1


class Cancelled(Exception):
    """The operation was asked to stop. It leaves a valid chain behind; never shown to a user as an error."""


class Control:
    """Shared between one operation and those who watch it. Thread-safe."""

    def __init__(self, *, speed: int = 0) -> None:
        """``speed`` limits the work in bytes per second; 0 for no limit."""
        self.total = 0
        """Bytes of work, as far as it is known; may grow."""
        self.done = 0
        """Bytes of work done."""
        self._speed = speed
        self._cancelled = False
        self._paused = False
        self._wake = threading.Condition()
        self._window_start = monotonic()
        self._window_bytes = 0

    @property
    def speed(self) -> int:
        """The limit in bytes per second; 0 for none."""
        return self._speed

    @speed.setter
    def speed(self, speed: int) -> None:
        with self._wake:
            self._speed = speed
            self._window_start, self._window_bytes = monotonic(), 0
            self._wake.notify_all()

    def cancel(self) -> None:
        """Let the operation end at its next :meth:`advance`."""
        with self._wake:
            self._cancelled = True
            self._wake.notify_all()

    def pause(self) -> None:
        """Let the operation stop at its next :meth:`advance`, until :meth:`resume`."""
        self._paused = True

    def resume(self) -> None:
        """Go on after :meth:`pause`."""
        with self._wake:
            self._paused = False
            self._window_start, self._window_bytes = monotonic(), 0
            self._wake.notify_all()

    def expect(self, length: int) -> None:
        """So many more bytes of work have been found."""
        self.total += length

    def advance(self, length: int = 0, *, cost: int | None = None) -> None:
        """``length`` bytes are done; wait for as long as the speed limit and a pause want it.

        Args:
            cost: how many of them count for the speed limit, if not all: zeros move nothing.

        Raises:
            Cancelled: somebody wants the operation to end.
        """
        self.done += length
        self._window_bytes += length if cost is None else cost
        with self._wake:
            while not self._cancelled and (self._paused or self._ahead() > _SLICE):
                self._wake.wait(None if self._paused else self._ahead())
        self.check()

    def wait(self, seconds: float) -> None:
        """Do nothing for so long.

        Raises:
            Cancelled: somebody wants the operation to end.
        """
        with self._wake:
            self._wake.wait_for(lambda: self._cancelled, seconds)
        self.check()

    def check(self) -> None:
        """Go on, unless somebody wants the operation to end.

        Raises:
            Cancelled: somebody does.
        """
        if self._cancelled:
            raise Cancelled

    def _ahead(self) -> float:
        """Seconds by which the work is ahead of the limit."""
        if not self._speed:
            return 0.0
        return self._window_start + self._window_bytes / self._speed - monotonic()

"""SIGTERM and SIGINT through the life of a server: whenever they come, everything is left in order."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """What a signal to stop means. While the server starts it is remembered, and obeyed where nothing is half done;
    later what :meth:`deliver` was given is called on the loop; at last, while disks are saved, it means nothing any
    more. A context manager, for the main thread.

    These are handlers of Python's and not of the loop's: the loop takes its own away when it is closed, and a second
    signal would then kill a process that is saving what guests have written.
    """

    def __init__(self) -> None:
        self._came = 0
        self._callback: Callable[[int], object] | None = None
        self._may_interrupt = False

    def __enter__(self) -> Self:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something that could be read again
        for number in _SIGNALS:
            signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # everything is done, and only the exit status is left to be told

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """For what may take long while the server starts, and stands an interruption: the repair of images does. A
        signal is obeyed before the block and behind it, a second one inside.

        Raises:
            SystemExit: with 0; a signal came.
        """
        self._obey()
        self._may_interrupt = True
        try:
            yield
        finally:
            self._may_interrupt = False
        self._obey()

    def _obey(self) -> None:
        if self._came:
            raise SystemExit(0)

    def deliver(self, callback: Callable[[int], object]) -> None:
        """From now on ``callback`` is called on the running loop, with the number of signals so far."""
        self._loop = asyncio.get_running_loop()
        self._callback = callback
        if self._came:
            self._loop.call_soon(callback, self._came)

    def ignore(self) -> None:
        """From now on signals mean nothing; to be called before the loop ends."""
        self._callback = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._came += 1
        if self._may_interrupt and self._came > 1:
            raise SystemExit(0)
        if self._callback is not None:
            self._loop.call_soon_threadsafe(self._callback, self._came)

"""A pause that ends by itself: an administrator who forgets to resume must not hang his guests for ever."""

import asyncio
from collections.abc import Callable


class Pause:
    """Whether clients are held back at an administrator's wish. Loop thread only."""

    def __init__(self, changed: Callable[[], None]) -> None:
        """``changed`` is called whenever :attr:`is_on` has changed."""
        self.is_on = False
        self._changed = changed
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, seconds: float | None, on_expired: Callable[[], None] = lambda: None) -> None:
        """Hold clients back for so long, None for ever; again: for so long from now. ``on_expired`` hears of the end
        unless :meth:`end` came first."""
        self._forget_timer()
        if seconds is not None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._expire, on_expired)
        if not self.is_on:
            self.is_on = True
            self._changed()

    def end(self) -> None:
        """Serve again. Idempotent."""
        self._forget_timer()
        if self.is_on:
            self.is_on = False
            self._changed()

    def _expire(self, on_expired: Callable[[], None]) -> None:
        self._timer = None
        self.end()
        on_expired()

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

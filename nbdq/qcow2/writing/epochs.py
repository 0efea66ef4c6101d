"""Which requests are under way, by the time at which they began: what a freed cluster has to wait for (R-50).

An epoch ends with every flush. A request *pins* the epoch in which it begins, before it looks anything up, so that what
it finds is not used for something else while it lasts. Whoever keeps host offsets for longer than a request *holds* the
epoch.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import sleep

#: An epoch that never comes: nothing is pinned.
NEVER = 1 << 63
#: Seconds between two looks at whether requests have ended; they last about as long.
_LOOK = 0.0005


class Epochs:
    """The epochs of one image. Pins and holds may be taken by any thread, without a lock."""

    __slots__ = ("_holds", "_pins", "current", "inline")

    def __init__(self) -> None:
        self.current = 0
        """A request that begins now knows nothing that was freed in an earlier one."""
        self.inline = NEVER
        """The pin of the one thread that does not wait: an assignment, because it is taken for every small request."""
        self._pins: dict[int, int] = {}
        self._holds: dict[object, int] = {}

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """While a request runs that looks tables up and then touches host clusters without the lock.

        A plain store, and no lock: a look-up comes after the pin, and what it finds was not freed before.
        """
        token = threading.get_ident()
        outer = self._pins.get(token)
        if outer is None:
            self._pins[token] = self.current
        try:
            yield
        finally:
            if outer is None:
                del self._pins[token]

    @contextmanager
    def hold(self) -> Iterator[None]:
        """A pin that belongs to no thread or request: nothing but the use of freed clusters waits for its end."""
        token = object()
        self._holds[token] = self.current
        try:
            yield
        finally:
            del self._holds[token]

    def advance(self) -> int:
        """Begin the next epoch, under the lock of the image; the one that has ended."""
        ended = self.current
        self.current = ended + 1
        return ended

    def oldest_active(self) -> int:
        """The epoch of the oldest request or hold; the current one if there are none."""
        return min(self._oldest_request(), *self._holds.copy().values(), self.current)

    def _oldest_request(self) -> int:
        return min(self.inline, self.current, *self._pins.copy().values())

    def wait_for(self, epoch: int) -> None:
        """Return when no request of ``epoch`` or an earlier one is left. Not from within one: that never ends."""
        assert threading.get_ident() not in self._pins, "a request waits for itself"
        while self._oldest_request() <= epoch:
            sleep(_LOOK)

"""Memory for replies and payloads, counted: a share for each connection and a bound for the process (R-70)."""

from collections import Counter
from collections.abc import Callable, Hashable


class Budget:
    """Bytes that requests and unsent replies may hold, for the whole process. Loop thread only.

    Who is refused is called back, first come first served, when enough bytes have been given back. A request larger
    than the whole budget is admitted when nothing else is reserved, so nobody waits for ever.

    Bytes are reserved for a source, which is where a client comes from. One that holds more than would be left for all
    others gets no more: so half of the budget is the most for one, a quarter for the next, and nobody who keeps what he
    has can have large requests of others wait for ever.
    """

    def __init__(self, total: int) -> None:
        self._free = self._total = total
        self._held: Counter[Hashable] = Counter()  # by source
        # Who is to be called back, the bytes that it wants, and its source.
        self._waiting: dict[Callable[[], None], tuple[int, Hashable]] = {}

    @property
    def total(self) -> int:
        """All there is."""
        return self._total

    @property
    def taken(self) -> int:
        """What is reserved; with what was overdrawn, it may be more than all there is."""
        return self._total - self._free

    def take(self, count: int, retry: Callable[[], None], *, source: Hashable = None, overdraw: bool = False) -> bool:
        """Reserve ``count`` bytes; if that is not possible now, False, and ``retry`` is called once, later.

        The same ``retry`` waits but once, at the place in the queue that it had first, for the last ``count`` it asked.
        Without a ``source`` it may be all. ``overdraw``: they are guaranteed to the caller, and so reserved even if
        there are none.
        """
        if overdraw or self._fits(count, source):
            self._free -= count
            self._held[source] += count
            return True
        self._waiting[retry] = count, source
        return False

    def forget(self, retry: Callable[[], None]) -> None:
        """Call back no more, if ``retry`` waits."""
        self._waiting.pop(retry, None)

    def give(self, count: int, *, source: Hashable = None) -> None:
        """Return ``count`` bytes that are reserved for ``source``.

        All whose wish can now be met alone are called back, even though there may not be enough for them all together:
        some no longer want anything, and who comes too late waits again.
        """
        self._free += count
        self._held[source] -= count
        if not self._held[source]:
            del self._held[source]
        for retry in [retry for retry, wanted in self._waiting.items() if self._fits(*wanted)]:
            del self._waiting[retry]
            retry()

    def resize(self, total: int) -> None:
        """Another total; what is reserved stays so, even if it is more."""
        self._free += total - self._total
        self._total = total
        self.give(0)

    def _fits(self, count: int, source: Hashable) -> bool:
        left = self._free - count
        return (left >= 0 and (source is None or self._held[source] <= left)) or self._free == self._total

"""Reply memory, counted: a share for each connection and a bound for the process (R-70)."""

from collections import deque
from collections.abc import Callable


class Budget:
    """Bytes that requests in progress may hold, for the whole process. Loop thread only.

    Who is refused is called back, first come first served, when bytes are given back. A request larger than the whole
    budget is admitted when nothing else is in progress, so nobody waits for ever.
    """

    def __init__(self, total: int) -> None:
        self._free = self._total = total
        self._waiting: deque[Callable[[], None]] = deque()

    def take(self, count: int, retry: Callable[[], None]) -> bool:
        """Reserve ``count`` bytes; if that is not possible now, False, and ``retry`` is called later."""
        if count <= self._free or self._free == self._total:
            self._free -= count
            return True
        self._waiting.append(retry)
        return False

    def give(self, count: int) -> None:
        """Return ``count`` reserved bytes."""
        self._free += count
        for _ in range(len(self._waiting)):
            if self._free <= 0:
                break
            self._waiting.popleft()()

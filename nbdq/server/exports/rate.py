"""How fast the clients of an export may go, all together: token buckets for requests and for bytes.

A session serves the portion of its requests that is allowed now, and pays for it. That may be more than there was, by
one request; the bucket is in debt then, and all wait until that is made up for, so that the average keeps to the rate
whatever the size of a request. Who has to wait does so in one line, and goes to its end after each portion: all get the
same, and nobody spins.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf, isfinite
from time import monotonic

from nbdq.errors import ExportError
from nbdq.nbd.constants import MAXIMUM_PAYLOAD, Command
from nbdq.nbd.transmission import RawRequest

#: While somebody waits, portions are what the rate allows in such a time: many enough to look even, and few enough to
#: cost nothing.
_PORTION_SECONDS = 0.005
#: The resolution of the loop's timers, below which it would spin.
_SHORTEST_WAIT = 0.001
#: Nothing is lost of the rate when a timer comes so late.
_LATENESS = 0.05
#: Requests whose data counts; zeroing and discarding move none.
_COUNTED = frozenset({Command.READ, Command.WRITE, Command.CACHE})
_COMMAND_MASK = 0xFFFF


@dataclass(frozen=True)
class Rates:
    """What the clients of an export may do in a second; 0 for no limit."""

    requests: float = 0.0
    """FLUSH not counted: it is a client's duty."""
    bytes: float = 0.0
    """Read, written and cached."""
    burst: float = 1.0
    """Seconds' worth of both that clients who were idle may use at once."""

    def __post_init__(self) -> None:
        """
        Raises:
            ExportError: a rate is negative, or the burst not positive.
        """
        numbers = (self.requests, self.bytes, self.burst)
        if not all(map(isfinite, numbers)) or min(numbers) < 0 or not self.burst:
            raise ExportError("rates must not be negative, and a burst must be positive; a rate of 0 is no limit")

    @property
    def are_limited(self) -> bool:
        """Whether there is any limit."""
        return bool(self.requests or self.bytes)


class _Bucket:
    """Tokens that come in at ``rate``; without one there are always enough."""

    def __init__(self, rate: float, burst: float, least: float) -> None:
        """``least``: what has to be there before anybody gets something."""
        self.rate = rate
        self._least = least
        self.portion = max(rate * _PORTION_SECONDS, least)
        self.level = self._most = max(rate * burst, self.portion + rate * _LATENESS)

    def fill(self, seconds: float) -> None:
        """Time has passed."""
        self.level = min(self._most, self.level + self.rate * seconds)

    @property
    def is_empty(self) -> bool:
        """Whether there is not enough for anybody."""
        return bool(self.rate) and self.level < self._least

    def share(self, count: int) -> float:
        """What one of ``count`` who wait may take at a time."""
        if not self.rate:
            return inf
        return min(self.level, max(self.portion / count, self._least)) if count else self.level

    @property
    def delay(self) -> float:
        """Seconds until there is a portion."""
        return max(0.0, (self.portion - self.level) / self.rate) if self.rate else 0.0


class Throttle:
    """The rates of one export, and the line of those who wait. Loop thread only."""

    def __init__(
        self,
        rates: Rates,
        *,
        clock: Callable[[], float] = monotonic,
        call_later: Callable[[float, Callable[[], None]], asyncio.TimerHandle] | None = None,
    ) -> None:
        """``clock`` and ``call_later`` are the running loop's, but in tests."""
        self._clock = clock
        self._call_later = call_later
        self._waiting: dict[Callable[[], None], None] = {}  # in the order of their turns
        self._turn: Callable[[], None] | None = None  # whose it is
        self._timer: asyncio.TimerHandle | None = None
        self._set(rates)

    def _set(self, rates: Rates) -> None:
        self.rates = rates
        self._requests = _Bucket(rates.requests, rates.burst, 1.0)
        self._bytes = _Bucket(rates.bytes, rates.burst, 1.0)
        self._filled = self._clock()

    def change(self, rates: Rates) -> None:
        """Other rates from now on; debts are forgiven."""
        self._set(rates)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake()

    @property
    def waiting(self) -> int:
        """Clients that wait for their turn."""
        return len(self._waiting)

    def admits(self, resume: Callable[[], None]) -> bool:
        """Whether it is the caller's turn; if not, ``resume`` is called when it is, once."""
        if self._turn is resume:
            return True
        self._fill()
        if not self._waiting and not self._delay:
            return True
        self._waiting.setdefault(resume)
        self._schedule()
        return False

    def serve(
        self,
        backlog: deque[RawRequest],
        batch: Callable[[deque[RawRequest]], bool],
        resume: Callable[[], None],
        *,
        paid: bool,
    ) -> bool:
        """Have ``batch`` take from the front of ``backlog`` what is allowed now; False, and ``resume`` is called later,
        if that is nothing. ``paid``: for the first request :meth:`pay` was called already."""
        count = 1 if paid else self._portion(backlog, resume)
        if not count:
            return False
        asked = [backlog.popleft() for _ in range(count)]
        portion = deque(asked)
        try:
            return batch(portion)
        finally:
            if not paid:
                costs = [_cost(request) for request in asked[: count - len(portion)]]
                self.pay(requests=sum(cost for cost, _ in costs), bytes=sum(length for _, length in costs))
            backlog.extendleft(reversed(portion))

    def _portion(self, backlog: Iterable[RawRequest], resume: Callable[[], None]) -> int:
        """How many of the next requests of a client may be served now."""
        count, count_left, bytes_left = 0, 0.0, 0.0
        admitted: bool | None = None  # not asked for as long as the next ones are free
        for request in backlog:
            cost, length = _cost(request)
            if cost:
                if admitted is None:
                    admitted = self.admits(resume)
                    if admitted:
                        others = len(self._waiting)
                        count_left = self._requests.share(others and others + 1)
                        bytes_left = self._bytes.share(others and others + 1)
                if not admitted or count_left < 1 or bytes_left <= 0:
                    break
            count += 1
            count_left -= cost
            bytes_left -= length
        return count

    def pay(self, *, requests: int, bytes: int) -> None:
        """So much is done, or about to be; whose turn it was has had it."""
        self._turn = None
        self._requests.level -= requests
        self._bytes.level -= bytes

    def forget(self, resume: Callable[[], None]) -> None:
        """Who waits does so no more."""
        self._waiting.pop(resume, None)

    # Time.

    @property
    def _delay(self) -> float:
        return max(self._requests.delay, self._bytes.delay)

    def _fill(self) -> None:
        now = self._clock()
        seconds, self._filled = now - self._filled, now
        self._requests.fill(seconds)
        self._bytes.fill(seconds)

    def _schedule(self) -> None:
        if self._timer is None and self._waiting:
            call_later = self._call_later or asyncio.get_running_loop().call_later
            self._timer = call_later(max(self._delay, _SHORTEST_WAIT), self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        self._wake()

    def _wake(self) -> None:
        """Give each of those who wait now a turn, for as long as there is something to give."""
        for resume in list(self._waiting):
            self._fill()
            if self._requests.is_empty or self._bytes.is_empty:
                break
            if resume in self._waiting:
                del self._waiting[resume]
                self._turn = resume
                resume()
                self._turn = None
        self._schedule()


def _cost(request: RawRequest) -> tuple[int, int]:
    """What a request counts as: requests and bytes."""
    _, operation, _, _, length = request
    command = operation & _COMMAND_MASK
    # What is longer is refused, or serves to read ahead; neither is worth holding up everybody for.
    return command != Command.FLUSH, min(length, MAXIMUM_PAYLOAD) if command in _COUNTED else 0

"""What clients have done: the numbers of ``query-blockstats``, of the metrics, and of the line about a connection.

Every connection counts by itself, without a lock; an :class:`Account` adds up those of an export, the ones included
that are gone.
"""

import threading
from bisect import bisect_left
from collections import Counter

from nbdq.durations import BOUNDS, Durations
from nbdq.nbd.constants import Command
from nbdq.nbd.ending import Cause

_COMMANDS = max(Command) + 1
_NAMES = {
    "rd": (Command.READ,),
    "wr": (Command.WRITE, Command.WRITE_ZEROES),
    "unmap": (Command.TRIM,),
    "flush": (Command.FLUSH,),
}
_STATUS = (Command.BLOCK_STATUS,)
_NANOSECONDS = 10**9


class Counters:
    """Requests, bytes and times by command. Loop thread only, but for :meth:`failed`.

    The time of a request is that from when it is taken up to when its reply is handed to the socket, or to what waits
    for the socket; those that are answered in one batch have the time of the batch.
    """

    def __init__(self) -> None:
        self.durations = [Durations() for _ in range(_COMMANDS)]
        """By command; a request that failed has a time, too."""
        self._bytes = [0] * _COMMANDS
        self._invalid = [0] * _COMMANDS
        self._failed = [0] * _COMMANDS
        self._failed_bytes = [0] * _COMMANDS
        self._lock = threading.Lock()

    def done(self, command: int, count: int, length: int, seconds: float) -> None:
        """``count`` requests with ``length`` bytes in all are answered after ``seconds`` each, those that failed among
        them."""
        durations = self.durations[command]
        durations.classes[bisect_left(BOUNDS, seconds)] += count  # as Durations.add(), a call less for each batch
        durations.seconds += seconds * count
        self._bytes[command] += length

    def refused(self, command: int) -> None:
        """A request was answered with an error before it reached the disk."""
        if command < _COMMANDS:
            self._invalid[command] += 1

    def failed(self, command: int, length: int) -> None:
        """A request of ``length`` bytes failed; it is, or will be, among those that are done. Any thread."""
        with self._lock:
            self._failed[command] += 1
            self._failed_bytes[command] += length

    def add(self, other: "Counters") -> None:
        """Count everything that ``other`` has counted, too."""
        for mine, theirs in zip(self.durations, other.durations, strict=True):
            mine.merge(theirs)
        for numbers, others in (
            (self._bytes, other._bytes),
            (self._invalid, other._invalid),
            (self._failed, other._failed),
            (self._failed_bytes, other._failed_bytes),
        ):
            numbers[:] = map(sum, zip(numbers, others, strict=True))

    def results(self, command: Command) -> dict[str, int]:
        """Requests by how they ended: ``ok``, ``error`` if the disk failed them, ``invalid`` if they were wrong."""
        ok = max(0, self.durations[command].count - self._failed[command])  # a failure may be counted first
        return {"ok": ok, "error": self._failed[command], "invalid": self._invalid[command]}

    def bytes_done(self, command: Command) -> int:
        """Bytes that requests with success were about."""
        return max(0, self._bytes[command] - self._failed_bytes[command])

    @property
    def requests(self) -> int:
        """All that were answered, well or not."""
        return sum(durations.count for durations in self.durations) + sum(self._invalid)

    def described(self) -> dict[str, object]:
        """The counters under QEMU's names (BlockDeviceStats). Operations are those that succeeded, ``failed`` those
        that the disk failed, ``invalid`` those that were wrong in themselves; WRITE_ZEROES counts as a write, TRIM as
        unmapping. Times are those of all operations that reached the disk."""
        found: dict[str, object] = {"x-nbdq-status-operations": self._sum(_STATUS, "ok")}
        for name, commands in _NAMES.items():
            times = Durations()
            for command in commands:
                times.merge(self.durations[command])
            if name != "flush":
                found[f"{name}_bytes"] = sum(map(self.bytes_done, commands))
                found[f"{name}_merged"] = 0
            found[f"{name}_operations"] = self._sum(commands, "ok")
            found[f"failed_{name}_operations"] = self._sum(commands, "error")
            found[f"invalid_{name}_operations"] = self._sum(commands, "invalid")
            found[f"{name}_total_time_ns"] = int(times.seconds * _NANOSECONDS)
            if name != "unmap":  # for which QEMU has none
                boundaries = [round(bound * _NANOSECONDS) for bound in BOUNDS]
                found[f"{name}_latency_histogram"] = {"boundaries": boundaries, "bins": times.classes}
        return found

    def _sum(self, commands: tuple[Command, ...], result: str) -> int:
        return sum(self.results(command)[result] for command in commands)


class Account:
    """The counters of all connections of one export, the ones included that are gone. Loop thread only."""

    def __init__(self) -> None:
        self._open: dict[Counters, None] = {}
        self._closed = Counters()

    def open(self) -> Counters:
        """Counters for a connection, from now on part of the account."""
        counters = Counters()
        self._open[counters] = None
        return counters

    def close(self, counters: Counters) -> None:
        """The connection is gone, and nothing that it has begun is left."""
        if counters in self._open:
            del self._open[counters]
            self._closed.add(counters)

    @property
    def total(self) -> Counters:
        """What was counted until now."""
        total = Counters()
        for counters in (self._closed, *self._open):
            total.add(counters)
        return total


class Visits:
    """How the connections of a server ended, by cause. Loop thread only."""

    def __init__(self) -> None:
        self.served: Counter[Cause] = Counter()
        """Those of clients that had come to an export."""
        self.in_handshake: Counter[Cause] = Counter()
        """The others."""

    def ended(self, cause: Cause, *, served: bool) -> None:
        """A connection has ended."""
        (self.served if served else self.in_handshake)[cause] += 1

"""What the clients of an export have done to its disk: the numbers of ``query-blockstats``."""

import threading

from nbdq.nbd.constants import Command

_COMMANDS = max(Command) + 1


class Counters:
    """Requests and bytes by command. Loop thread only, but for :meth:`failed`."""

    def __init__(self) -> None:
        self._requests = [0] * _COMMANDS
        self._bytes = [0] * _COMMANDS
        self._invalid = [0] * _COMMANDS
        self._failed = [0] * _COMMANDS
        self._failed_bytes = [0] * _COMMANDS
        self._lock = threading.Lock()

    def done(self, command: int, count: int, length: int) -> None:
        """``count`` requests with ``length`` bytes in all are answered, those that failed among them."""
        self._requests[command] += count
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
        for mine, theirs in (
            (self._requests, other._requests),
            (self._bytes, other._bytes),
            (self._invalid, other._invalid),
            (self._failed, other._failed),
            (self._failed_bytes, other._failed_bytes),
        ):
            mine[:] = map(sum, zip(mine, theirs, strict=True))

    def requests(self, *commands: Command) -> int:
        """Requests that succeeded."""
        return max(0, sum(self._requests[command] - self._failed[command] for command in commands))

    def bytes(self, *commands: Command) -> int:
        """Bytes of requests that succeeded."""
        return max(0, sum(self._bytes[command] - self._failed_bytes[command] for command in commands))

    def failures(self, *commands: Command) -> int:
        """Requests that the disk failed."""
        return sum(self._failed[command] for command in commands)

    def refusals(self, *commands: Command) -> int:
        """Requests that were wrong in themselves."""
        return sum(self._invalid[command] for command in commands)

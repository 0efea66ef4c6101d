"""What the clients of an export have done to its disk: the numbers of ``query-blockstats``."""

import threading

from nbdq.nbd.constants import Command

_COMMANDS = max(Command) + 1
_NAMES = {
    "rd": (Command.READ,),
    "wr": (Command.WRITE, Command.WRITE_ZEROES),
    "unmap": (Command.TRIM,),
    "flush": (Command.FLUSH,),
}
_STATUS = (Command.BLOCK_STATUS,)


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

    def described(self) -> dict[str, int]:
        """The counters under QEMU's names. Operations are those that succeeded, ``failed`` those that the disk failed,
        ``invalid`` those that were wrong in themselves; WRITE_ZEROES counts as a write, TRIM as unmapping."""
        found = {"x-nbdq-status-operations": self._succeeded(self._requests, self._failed, _STATUS)}
        for name, commands in _NAMES.items():
            if name != "flush":
                found[f"{name}_bytes"] = self._succeeded(self._bytes, self._failed_bytes, commands)
                found[f"{name}_merged"] = 0
            found[f"{name}_operations"] = self._succeeded(self._requests, self._failed, commands)
            found[f"failed_{name}_operations"] = sum(self._failed[command] for command in commands)
            found[f"invalid_{name}_operations"] = sum(self._invalid[command] for command in commands)
        return found

    def _succeeded(self, all: list[int], failed: list[int], commands: tuple[Command, ...]) -> int:
        return sum(max(0, all[command] - failed[command]) for command in commands)  # a failure may be counted first

"""What a service manager is told: systemd's ``sd_notify`` protocol, one datagram a message.

A server runs just as well without anybody who listens; so nothing here is ever an error, at most a line in the log.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, MutableMapping

_log = logging.getLogger(__name__)

#: A manager that takes no message for so long does not get it; the loop waits no longer.
_SEND_SECONDS = 0.5
#: Between two looks whether the status is still true.
_STATUS_SECONDS = 2.0


class Notifier:
    """Tells the service manager, if there is one. Loop thread only from :meth:`start` on."""

    def __init__(self, address: str = "", watchdog_seconds: float = 0.0) -> None:
        """``address``: a path, or the name of an abstract socket behind ``@``. ``watchdog_seconds``: within which the
        manager wants to hear from us again and again; 0 if it does not care."""
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._watchdog_seconds = watchdog_seconds
        self._told = ""

    @classmethod
    def of_environment(cls, environment: MutableMapping[str, str] = os.environ) -> "Notifier":
        """For whoever started this process. The variables are removed, so that no child speaks for us."""
        address, microseconds, process = (
            environment.pop(name, "") for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
        )
        if address and address[0] not in "/@":
            _log.warning("NOTIFY_SOCKET is neither a path nor an abstract socket; the service manager is told nothing")
            return cls()
        wanted = microseconds.isascii() and microseconds.isdigit() and process in ("", str(os.getpid()))
        return cls(address, int(microseconds) / 1e6 if wanted else 0.0)

    def start(self, describe: Callable[[], str]) -> None:
        """Clients can connect. From now on the event loop says that it is alive, so that a manager notices if it hangs,
        and what ``describe`` returns, a line for ``systemctl status``, whenever that has changed."""
        self._describe = describe
        self._send("READY=1", f"STATUS={describe()}")
        if self._address:
            self._look()
            self._feed_watchdog()

    def _look(self) -> None:
        status = self._describe()
        if status != self._told:
            self._told = status
            self._send(f"STATUS={status}")
        asyncio.get_running_loop().call_later(_STATUS_SECONDS, self._look)

    def _feed_watchdog(self) -> None:
        if self._watchdog_seconds:
            self._send("WATCHDOG=1")
            asyncio.get_running_loop().call_later(self._watchdog_seconds / 2, self._feed_watchdog)

    def reloading(self) -> None:
        """The configuration is being read again; :meth:`reloaded` ends that."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def reloaded(self) -> None:
        """What was read is in force, or was refused."""
        self._send("READY=1")

    def stopping(self, status: str, *, within: float) -> None:
        """The server ends, and may take ``within`` seconds from now for that, without a word in between; may be told
        again."""
        self._describe = lambda: status
        self._told = status
        wanted = f"{int(within * 1e6)}"
        watchdog = [f"WATCHDOG_USEC={wanted}"] if self._watchdog_seconds else []
        self._send("STOPPING=1", f"EXTEND_TIMEOUT_USEC={wanted}", *watchdog, f"STATUS={status}")

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(_SEND_SECONDS)
                sock.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            _log.warning("cannot tell the service manager %s: %s", lines[0], error.strerror or error)

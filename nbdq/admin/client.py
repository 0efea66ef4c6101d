"""A client of the admin socket, for one thread: calls one after the other, and events as they come."""

import json
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Self

from nbdq.errors import NbdqError, printable

_RECEIVE = 64 << 10
#: No answer is larger; also bounds what a wrong server can make us keep.
_LINE_MAX = 256 << 20
_EVENTS_MAX = 10_000


class AdminError(NbdqError):
    """The server refused a command, or cannot be talked to."""

    def __init__(self, text: str, kind: str = "") -> None:
        self.kind = kind
        """QEMU's error class, if the server said it."""
        super().__init__(text)


class Client:
    """A negotiated connection. Use as a context manager."""

    def __init__(self, path: str, *, timeout: float | None = None) -> None:
        """Connect; ``timeout`` bounds every wait in seconds.

        Raises:
            AdminError: nobody listens there, or it is no QMP server.
        """
        self.path = path
        self._timeout = timeout
        self._buffer = bytearray()
        self._events: deque[dict[str, Any]] = deque(maxlen=_EVENTS_MAX)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(path)
            self.greeting = self._receive()
            if "QMP" not in self.greeting:
                raise AdminError(f"{printable(path)}: not an admin socket")
            self.call("qmp_capabilities")
        except OSError as error:
            self.close()
            raise AdminError(f"cannot connect to {printable(path)}: {error.strerror or error}") from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave; what was asked for goes on."""
        self._socket.close()

    def call(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Have a command executed; return what it returns. Events that come meanwhile are kept for :meth:`events`.

        Raises:
            AdminError: the server refused, or the connection broke.
        """
        request = {"execute": command} | ({"arguments": arguments} if arguments else {})
        with suppress(BrokenPipeError):  # the server may have said why before it went
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            message = self._receive()
            if "event" in message:
                self._events.append(message)
            elif "error" in message:
                raise AdminError(message["error"]["desc"], message["error"]["class"])
            else:
                return message["return"]

    def taken_events(self) -> list[dict[str, Any]]:
        """The events that came while other things were waited for, oldest first; they are not given again."""
        taken = list(self._events)
        self._events.clear()
        return taken

    @property
    def has_events(self) -> bool:
        """Whether :meth:`next_event` has one at once."""
        return bool(self._events) or b"\n" in self._buffer

    def next_event(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The oldest event that was not given yet; None if there is none for so long.

        Raises:
            AdminError: the connection broke.
        """
        if self._events:
            return self._events.popleft()
        self._socket.settimeout(seconds)
        try:
            while "event" not in (message := self._receive()):
                pass
        except TimeoutError:
            return None
        finally:
            self._socket.settimeout(self._timeout)
        return message

    def events(self) -> Iterator[dict[str, Any]]:
        """Events, oldest first, for as long as the server is there.

        Raises:
            TimeoutError: none came for the time that was set.
        """
        while True:
            try:
                event = self.next_event(self._timeout)
            except AdminError:
                return
            if event is None:
                raise TimeoutError
            yield event

    def _receive(self) -> dict[str, Any]:
        while (end := self._buffer.find(b"\n")) < 0:
            try:
                data = self._socket.recv(_RECEIVE)
            except ConnectionError:
                data = b""
            if not data or len(self._buffer) > _LINE_MAX:
                raise AdminError(f"{printable(self.path)}: the server has closed the connection")
            self._buffer += data
            if not self._buffer.startswith(b"{"):  # an NBD server, say, which ends no line
                raise AdminError(f"{printable(self.path)}: not an admin socket")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise AdminError(f"{printable(self.path)}: not an admin socket")
        return message

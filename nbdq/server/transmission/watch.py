"""What the loop watches for one session: bytes that come, room to send, a client that takes no replies."""

import asyncio
import socket
from collections.abc import Callable

from nbdq.server.tls.stream import SecureStream


class Watch:
    """The callbacks of one socket. Loop thread only."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket | SecureStream,
        *,
        on_readable: Callable[[], None],
        on_room: Callable[[], None],
        on_stall: Callable[[], None],
        stall_seconds: float,
    ) -> None:
        """``on_stall`` is called when the client takes not one byte for ``stall_seconds``, 0 for never, of what waits
        for it."""
        self._loop = loop
        self._socket = sock
        self._stream = sock if isinstance(sock, SecureStream) else None
        self._again: asyncio.Handle | None = None  # while we tell of bytes ourselves
        self._on_readable = on_readable
        self._on_room = on_room
        self._on_stall = on_stall
        self._stall_seconds = stall_seconds
        self.is_reading = False
        self._is_sending = False
        self._stall: asyncio.TimerHandle | None = None

    def read(self) -> None:
        """Tell of bytes that come, until :meth:`pause`; to be called again after each time that bytes were taken."""
        if not self.is_reading:
            self.is_reading = True
            self._loop.add_reader(self._socket.fileno(), self._on_readable)
        if self._stream is not None and self._stream.has_more and self._again is None:
            self._again = self._loop.call_soon(self._tell_again)

    def _tell_again(self) -> None:
        """Tell of bytes that are here already, decrypted or not; the socket does not."""
        self._again = None
        self._on_readable()

    def pause(self) -> None:
        """Leave what comes in the socket."""
        if self.is_reading:
            self.is_reading = False
            self._loop.remove_reader(self._socket.fileno())
        if self._again is not None:
            self._again.cancel()
            self._again = None

    def wait_for_room(self) -> None:
        """The socket took what it could, and more waits: tell of room, and begin the deadline for it anew."""
        if not self._is_sending:
            self._is_sending = True
            self._loop.add_writer(self._socket.fileno(), self._on_room)
        self._lift_deadline()
        if self._stall_seconds:
            self._stall = self._loop.call_later(self._stall_seconds, self._on_stall)

    def ignore_room(self) -> None:
        """Tell of no room for now; the deadline stays."""
        if self._is_sending:
            self._is_sending = False
            self._loop.remove_writer(self._socket.fileno())

    def all_sent(self) -> None:
        """Nothing waits for room any more."""
        self.ignore_room()
        self._lift_deadline()

    def stop(self) -> None:
        """Watch nothing any more; the socket is about to be closed."""
        self.pause()
        self.ignore_room()
        self._lift_deadline()

    def _lift_deadline(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

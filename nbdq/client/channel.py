"""A socket to a server, with a deadline on every wait.

Blocking for its caller, and yet it never stops receiving while it sends: a client that pipelines would otherwise wait
for a server that waits for that client. Knows bytes and TLS; must not know what the bytes mean.
"""

import errno
import select
import socket
import ssl
import time
from typing import Final

#: Bytes that may pile up unread while we send; a server that says more than that, unasked, is hostile (R-21).
MAXIMUM_UNREAD: Final = 256 << 20

_PIECE: Final = 256 << 10


class Channel:
    """One connection, owned by one thread. Every wait for the server ends ``timeout`` seconds after the last bytes were
    given to :meth:`send`, so that a server which drips its answer does not hold us up for longer, either."""

    def __init__(self, connected: socket.socket, *, timeout: float) -> None:
        """Take over ``connected``; ``timeout`` in seconds."""
        self.timeout = timeout
        self._socket = connected
        self._socket.setblocking(False)
        self._unread = bytearray()
        self._end = False
        self._deadline = time.monotonic() + timeout

    @property
    def tls_version(self) -> str:
        """How it is encrypted, as in "TLSv1.3"; empty if it is not."""
        return (self._socket.version() or "") if isinstance(self._socket, ssl.SSLSocket) else ""

    @property
    def unread(self) -> int:
        """Bytes that were received and not yet taken."""
        return len(self._unread)

    def start_tls(self, context: ssl.SSLContext, hostname: str) -> None:
        """Encrypt from here on.

        Raises:
            OSError: the handshake failed (``ssl.SSLError``), was cut off, or did not end in time.
        """
        self._deadline = time.monotonic() + self.timeout
        self._socket = context.wrap_socket(
            self._socket, server_hostname=hostname or None, do_handshake_on_connect=False
        )
        while True:
            try:
                self._socket.do_handshake()
                return
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT)

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of ``data`` and start the clock for the answer to it.

        Raises:
            ConnectionError: the server has closed the connection.
            TimeoutError: the server does not take it.
        """
        self._deadline = time.monotonic() + self.timeout
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view) :]
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)
                self._fill()
            except (BlockingIOError, ssl.SSLWantWriteError):
                if self._wait(select.POLLOUT | select.POLLIN) & select.POLLIN and not self._end:
                    self._fill()
            except ssl.SSLError as error:
                raise ConnectionResetError(errno.ECONNRESET, f"the server ended TLS ({error.reason})") from None
        self._deadline = time.monotonic() + self.timeout

    def receive(self, count: int) -> bytes:
        """Exactly ``count`` bytes.

        Raises:
            ConnectionError: the server closed the connection before the last of them.
            TimeoutError: they did not come in time.
        """
        while len(self._unread) < count:
            if self._end:
                raise ConnectionResetError(errno.ECONNRESET, "the server closed the connection")
            self._wait(select.POLLIN)
            self._fill(count)
        data = bytes(self._unread[:count])
        del self._unread[:count]
        return data

    def wait_for_end(self) -> bytes:
        """Everything that the server still says until it closes the connection.

        Raises:
            TimeoutError: it does not close it.
        """
        while not self._end:
            self._wait(select.POLLIN)
            self._fill()
        return self.take_unread()

    def take_unread(self) -> bytes:
        """What was received and not taken, all of it, without waiting."""
        data = bytes(self._unread)
        self._unread.clear()
        return data

    def silent(self, seconds: float) -> bool:
        """Whether the server says nothing, and stays, for that long."""
        self._deadline = time.monotonic() + seconds
        try:
            while not self._unread and not self._end:
                self._wait(select.POLLIN)
                self._fill()
        except TimeoutError:
            return True
        return False

    def close(self) -> None:
        """Close without a word; harmless when closed."""
        self._socket.close()

    def _fill(self, count: int = MAXIMUM_UNREAD + 1) -> None:
        """Receive what is there, until there are ``count`` bytes: a server may go on as fast as we receive."""
        while len(self._unread) < count:
            try:
                data = self._socket.recv(_PIECE)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            except (ConnectionError, ssl.SSLError):  # a reset, or an end of TCP without one of TLS
                data = b""
            if not data:
                self._end = True
                return
            self._unread += data
            if len(self._unread) > MAXIMUM_UNREAD:
                raise ConnectionAbortedError(errno.ECONNABORTED, f"the server sent {len(self._unread)} bytes unasked")
            if not isinstance(self._socket, ssl.SSLSocket):  # TLS may hold more that poll() does not see
                return

    def _wait(self, events: int) -> int:
        if events & select.POLLIN and isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return select.POLLIN  # TLS has what poll() does not see
        poll = select.poll()
        poll.register(self._socket, events)
        remaining = self._deadline - time.monotonic()
        ready = poll.poll(remaining * 1000) if remaining > 0 else []
        if not ready:
            raise TimeoutError(errno.ETIMEDOUT, f"the server does not answer within {self.timeout:g} s")
        return ready[0][1]

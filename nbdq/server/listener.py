"""Listening sockets: made with care, accepting without spinning, removed at the end."""

import asyncio
import logging
import os
import select
import socket
import stat
from collections.abc import Callable

from nbdq.errors import ExportError, printable
from nbdq.nbd.handshake import TlsMode
from nbdq.nbd.uri import tcp_uri, unix_uri
from nbdq.server.limits import Limits

_log = logging.getLogger(__name__)

#: Clients that may wait while the limits are reached; a unix client that does not block is turned away behind them.
_BACKLOG = 1024
#: Clients accepted before others get their turn; one that comes and goes faster than it is accepted must not hold us.
_ACCEPTS_MAX = 64
#: Pause after accept failed, as for want of descriptors or memory; without it the loop would spin (3.4).
_ACCEPT_PAUSE_SECONDS = 1.0
_SO_SNDBUFFORCE = 32
#: Asked of the kernel for the send buffer of unix sockets, whose default holds less than one large reply.
_UNIX_SEND_BUFFER = 2 << 20


class Listener:
    """A socket that listens. Owns it, and a unix socket's file if it made that, until :meth:`close`."""

    def __init__(self, sock: socket.socket, path: str | None = None, *, tls: TlsMode = TlsMode.OFF) -> None:
        """``path``: of the file that is to be removed in the end; None for sockets without one, and for those that
        whoever started us goes on to own."""
        sock.setblocking(False)
        self.socket = sock
        self.tls = tls
        """What its clients may and must do (P64)."""
        self._wanted = True
        self._retry: asyncio.TimerHandle | None = None  # while accepting pauses after a failure
        self._path = path
        self._identity = _identity(path) if path else None

    def uri(self, export_name: str) -> str:
        """Where a client finds an export through this listener (U1); with TLS if that is on offer, which leads to
        every export."""
        secure = self.tls is not TlsMode.OFF
        if (path := self.path) is not None:
            return unix_uri(export_name, path, secure=secure)
        host, port = self.socket.getsockname()[:2]
        return tcp_uri(export_name, host, port, secure=secure)

    @property
    def path(self) -> str | None:
        """Absolute path of a unix socket; an abstract one begins with NUL. None on TCP."""
        if self.socket.family != socket.AF_UNIX:
            return None
        name = self._path or self.socket.getsockname()
        path = os.fsdecode(name)
        return path if path.startswith("\0") else os.path.abspath(path)

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits to be accepted."""
        if self.socket.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(0))

    def start(self, loop: asyncio.AbstractEventLoop, accept: Callable[[socket.socket, object], bool]) -> None:
        """Accept clients; ``accept`` takes ownership of each socket, whose address it is told, and answers whether it
        wants more for now."""
        self._loop = loop
        self._accept = accept
        self._watch()

    def pause(self) -> None:
        """Accept nobody until :meth:`resume`."""
        self._wanted = False
        self._loop.remove_reader(self.socket.fileno())

    def resume(self) -> None:
        """Accept again, unless closed meanwhile."""
        self._wanted = True
        self._watch()

    def _watch(self) -> None:
        if self._wanted and self._retry is None and self.socket.fileno() >= 0:
            self._loop.add_reader(self.socket.fileno(), self._on_readable)

    def _try_again(self) -> None:
        self._retry = None
        self._watch()

    def _on_readable(self) -> None:
        for _ in range(_ACCEPTS_MAX):
            try:
                sock, address = self.socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                _log.error("cannot accept a client: %s; trying again in %.0f s", error.strerror, _ACCEPT_PAUSE_SECONDS)
                self._loop.remove_reader(self.socket.fileno())
                self._retry = self._loop.call_later(_ACCEPT_PAUSE_SECONDS, self._try_again)
                return
            _prepare(sock)
            if not self._accept(sock, address):
                return

    def close(self) -> None:
        """Stop listening; remove the socket file if it is still ours."""
        if self.socket.fileno() < 0:
            return
        if hasattr(self, "_loop"):
            self._loop.remove_reader(self.socket.fileno())
        if self._retry is not None:
            self._retry.cancel()
        # The file goes first. Once nobody listens on it another server may replace it, and the new file may get the
        # inode number of ours, which nothing holds any more: we would remove what the other server listens on.
        self._remove_file()
        self.socket.close()

    def _remove_file(self) -> None:
        if self._path is None:
            return
        try:
            if _identity(self._path) == self._identity:
                os.unlink(self._path)
        except FileNotFoundError:
            pass
        except OSError as error:  # no reason to stop stopping
            _log.warning("cannot remove the socket %s: %s", printable(self._path), error.strerror)


def _identity(path: str) -> tuple[int, int]:
    """Which file has that name; a link to one is another. No two that are open at once are alike."""
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _prepare(sock: socket.socket) -> None:
    """Options of an accepted socket: no delay, room for a large reply (nbd.md 4.3, item 9)."""
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _UNIX_SEND_BUFFER)
        except OSError:  # only a privileged process may exceed the system's limit
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_SEND_BUFFER)
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def watch_for_death(sock: socket.socket, limits: Limits) -> None:
    """Have the kernel notice when the host of an accepted TCP client is gone, so that its locks and memory are freed.

    Raises:
        OSError: the client has gone already.
    """
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, bool(limits.keepalive_seconds))
    for option, value in (
        (socket.TCP_KEEPIDLE, max(1, limits.keepalive_seconds)),  # the kernel has no less
        (socket.TCP_KEEPINTVL, limits.keepalive_interval_seconds),
        (socket.TCP_KEEPCNT, limits.keepalive_probes),
        (socket.TCP_USER_TIMEOUT, limits.user_timeout_seconds * 1000),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, int(value))


def listen_unix(path: str, *, mode: int = 0o600, tls: TlsMode = TlsMode.OFF) -> Listener:
    """Listen on a unix socket that only ``mode`` may use, from its first moment (R-41).

    A socket file that nobody listens on is replaced (R-42).

    Raises:
        ExportError: the path is taken or cannot be bound.
    """
    if not path:
        raise ExportError("the path of a unix socket is empty")  # the kernel would choose a name that nobody knows
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        before = os.umask(0o777 & ~mode)
        try:
            sock.bind(path)
        finally:
            os.umask(before)
        sock.listen(_BACKLOG)
        return Listener(sock, path, tls=tls)
    except OSError as error:
        sock.close()
        raise ExportError(f"cannot listen on {printable(path)}: {error.strerror or error}") from None
    except BaseException:
        sock.close()
        raise


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ExportError(f"cannot listen on {printable(path)}: the path exists and is not a socket; remove it")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:  # its queue is full, so there is one
            pass
    raise ExportError(f"cannot listen on {printable(path)}: another server listens there; stop it or choose a path")


def listen_tcp(host: str, port: int, *, tls: TlsMode = TlsMode.OFF) -> list[Listener]:
    """Listen on every address of ``host``; port 0 lets the system choose.

    Raises:
        ExportError: the address cannot be resolved or bound.
    """
    listeners: list[Listener] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):  # a hosts file may say the same twice
            sock = socket.socket(family, kind, protocol)
            listeners.append(Listener(sock, tls=tls))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)
            sock.listen(_BACKLOG)
    except (OSError, UnicodeError) as error:  # the latter for a host that cannot be a name
        for listener in listeners:
            listener.close()
        reason = getattr(error, "strerror", None) or "not a host name"
        raise ExportError(f"cannot listen on {printable(host)} port {port}: {reason}") from None
    return listeners

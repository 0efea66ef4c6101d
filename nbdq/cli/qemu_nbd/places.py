"""Where clients connect: a socket that was handed to us, a unix socket, or a TCP port.

Imported before everything that makes a server: a caller may give us little time until it connects, and its connection
waits in the queue of the socket.
"""

import errno
import os
import re
import socket
import time

from nbdq.cli.qemu_nbd.arguments import Arguments
from nbdq.errors import ExportError, printable
from nbdq.nbd.constants import DEFAULT_PORT
from nbdq.nbd.handshake import TlsMode
from nbdq.server.activation import inherited_sockets
from nbdq.server.listener import Listener, listen_tcp, listen_unix

#: Options that say where clients connect, which nobody may say if a socket was handed to us.
_PLACES = {
    "--socket": "Unix socket",
    "--bind": "The interface",
    "--port": "TCP port number",
    "--selinux-label": "SELinux label",
}
#: How long a server that was told to end may take to leave its socket; qemu-nbd takes it away from whoever has it.
_PATIENCE_SECONDS = 3.0


def inherited_listener(arguments: Arguments) -> Listener | None:
    """The socket that was opened for this process, if one was.

    Raises:
        ExportError: it cannot be used, or options say another place.
    """
    inherited = inherited_sockets()
    if not inherited:
        return None
    for option, what in _PLACES.items():
        if option in arguments.seen:
            raise ExportError(f"{what} can't be set when using socket activation")
    if len(inherited) > 1:
        raise ExportError("qemu-nbd does not support socket activation with LISTEN_FDS > 1")
    return Listener(inherited[0].socket, tls=_tls_mode(arguments))


def listen(arguments: Arguments) -> list[Listener]:
    """Listen where the options say. A unix socket has the mode that the umask leaves it, as qemu-nbd's: programs that
    start it as root connect as somebody else.

    Raises:
        ExportError: the place is taken, or cannot be bound.
    """
    mode = _tls_mode(arguments)
    if arguments.socket is None:
        try:
            return listen_tcp(arguments.address or "0.0.0.0", port_number(arguments.port), tls=mode)
        except ExportError as error:
            busy = os.strerror(errno.EADDRINUSE)
            raise ExportError(
                f"Failed to find an available port: {busy}" if busy in str(error) else str(error)
            ) from None
    mask = os.umask(0)
    os.umask(mask)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return [listen_unix(arguments.socket, mode=0o777 & ~mask, tls=mode)]
        except ExportError as error:
            if not _is_taken(arguments.socket) or time.monotonic() > deadline:
                raise ExportError(f"Failed to bind socket to {printable(arguments.socket)}: {error}") from None
        time.sleep(0.02)


def _is_taken(path: str) -> bool:
    """Whether a server listens there."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            return probe.connect_ex(path) in (0, errno.EAGAIN)
        except OSError:  # too long for a socket
            return False


def _tls_mode(arguments: Arguments) -> TlsMode:
    """qemu-nbd demands TLS as soon as it has credentials."""
    return TlsMode.OFF if arguments.tls_creds is None else TlsMode.REQUIRE


def port_number(text: str | None) -> int:
    """The port that ``-p`` says: a number, or a service.

    Raises:
        ExportError: neither.
    """
    if text is None:
        return DEFAULT_PORT
    if re.fullmatch(r"[0-9]{1,5}", text) and int(text) < 1 << 16:
        return int(text)
    try:
        return socket.getservbyname(text, "tcp")
    except (OSError, UnicodeError):
        raise ExportError(f"address resolution failed for port {printable(text)}: unknown service") from None

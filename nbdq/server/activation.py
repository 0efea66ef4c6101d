"""Sockets that whoever started us has opened already: systemd's protocol (``sd_listen_fds``), and libnbd's ``[ CMD ]``.

They are somebody else's: we accept on them, and neither unlink nor shut them down, so that clients who come between two
servers wait in the queue of the socket and notice nothing (R-78).
"""

import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Literal, cast

from nbdq.errors import ExportError, printable

Role = Literal["nbd", "nbd-tls", "admin", "metrics"]

_FIRST_DESCRIPTOR = 3
_ROLES = ("nbd", "nbd-tls", "admin", "metrics")


@dataclass(frozen=True)
class Inherited:
    """A listening stream socket, and what it is for. Owned by whoever has it."""

    socket: socket.socket
    role: Role = "nbd"


def inherited_sockets(environment: MutableMapping[str, str] = os.environ) -> list[Inherited]:
    """The sockets that were handed to this very process; empty for most.

    Names (``FileDescriptorName=``) say what they are for; any other name means exports. The variables are removed, so
    that no child takes them for its own.

    Raises:
        ExportError: what was handed over is not what the variables say, or cannot be listened on.
    """
    process, count, names = (environment.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES"))
    environment.pop("LISTEN_PIDFDID", None)
    if not count or process != str(os.getpid()):  # meant for somebody else, who did not remove them
        return []
    if not count.isascii() or not count.isdigit() or len(count) > 4:
        raise ExportError(f"LISTEN_FDS is {printable(count)!r}, which is not a number of sockets")
    known = names.split(":") if names else []
    if known and len(known) != int(count):
        raise ExportError(f"LISTEN_FDNAMES has {len(known)} names for LISTEN_FDS={count}")
    taken: list[Inherited] = []
    try:
        for number in range(int(count)):
            name = known[number] if known else ""
            role = cast(Role, name if name in _ROLES else "nbd")
            taken.append(Inherited(_take(_FIRST_DESCRIPTOR + number), role))
    except BaseException:
        for one in taken:
            one.socket.close()
        raise
    return taken


def _take(descriptor: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError as error:
        raise ExportError(f"descriptor {descriptor}, from socket activation: {error.strerror}") from None
    try:
        sock.set_inheritable(False)
        if (
            sock.family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
            or sock.type != socket.SOCK_STREAM
            or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        ):
            raise ExportError(
                f"descriptor {descriptor}, from socket activation, is no stream socket that listens; "
                "in a unit, use ListenStream= and Accept=no"
            )
    except BaseException:
        sock.detach()
        raise
    return sock

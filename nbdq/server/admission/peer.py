"""Who is at the other end of a connection, as far as the kernel and TLS can say."""

import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

_CREDENTIALS = struct.Struct("iII")
_SO_PEERGROUPS = 59

#: Addresses of hosts; an IPv4 address in an IPv6 one counts as the former (R-11).
Host = IPv4Address | IPv6Address


@dataclass(frozen=True)
class Identity:
    """What a client has proved with TLS (P65, P66)."""

    subject: str
    """Of its certificate, as RFC 4514 writes it, most significant part last; empty for a pre-shared key."""
    names: frozenset[str]
    """``DNS:…``, ``URI:…``, ``IP:…``, ``email:…`` of the certificate, and its subject in the order in which it has the
    parts, as QEMU writes it; or ``PSK:`` and the name of the key."""


@dataclass
class Peer:
    """One client. Loop thread only."""

    number: int
    """Of the connection, unique in the process; what logs and metrics call it."""
    address: str
    """For logs: host and port, or ``unix``."""
    host: Host | None = None
    """None for a unix socket."""
    process: int | None = None
    user: int | None = None
    group: int | None = None
    """What the kernel says of a client on a unix socket, None on others (SO_PEERCRED)."""
    groups: frozenset[int] = frozenset()
    """``group`` and the supplementary ones; those are missing if there are more than 256."""
    secure: bool = False
    """Whether what is said now is protected by TLS."""
    identity: Identity | None = None
    """None if TLS proved nothing about the client."""

    @classmethod
    def of(cls, sock: socket.socket, address: object, number: int) -> "Peer":
        """The client that ``accept`` returned together with ``address``.

        Raises:
            OSError: it has gone already.
        """
        if sock.family == socket.AF_UNIX:
            process, user, group, groups = credentials(sock)
            return cls(number, f"unix:{user}", process=process, user=user, group=group, groups=groups)
        assert isinstance(address, tuple)
        host, port = address[:2]
        return cls(number, f"[{host}]:{port}" if ":" in host else f"{host}:{port}", host=host_of(host))

    def __str__(self) -> str:
        return f"#{self.number} {self.address}"


def credentials(sock: socket.socket) -> tuple[int, int, int, frozenset[int]]:
    """Process, user, group and all groups of whoever connected to a unix socket, at that moment.

    Raises:
        OSError: it has gone already.
    """
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, group = _CREDENTIALS.unpack(raw)
    supplementary = b""
    with suppress(OSError):  # more than fit, or a kernel before 4.13
        supplementary = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)
    groups = struct.iter_unpack("I", supplementary[: len(supplementary) & ~3])
    return process, user, group, frozenset((group, *(number for (number,) in groups)))


def host_of(text: str) -> Host:
    """The address of a socket, without its zone."""
    host = ip_address(text.partition("%")[0])
    return host.ipv4_mapped or host if isinstance(host, IPv6Address) else host

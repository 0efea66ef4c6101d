"""Who may use an export: what it demands of a client, checked with what is known of that already (R-07)."""

import grp
import pwd
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from ipaddress import IPv4Network, IPv6Network, ip_network

from nbdq.errors import ExportError, printable
from nbdq.server.admission.peer import Peer

Network = IPv4Network | IPv6Network

#: An IPv4 network as IPv6 writes it; R-11.
_MAPPED = IPv6Network("::ffff:0:0/96")


@dataclass(frozen=True)
class Access:
    """What an export demands of a client. All demands must be met; without any, everybody is let in.

    ``networks`` are for TCP clients, ``users`` and ``groups`` for those on unix sockets. If there are demands for one
    kind only, no client of the other kind is let in.
    """

    tls: bool = False
    """Only under TLS (P64)."""
    subjects: tuple[str, ...] = ()
    """Patterns, one of which the subject or a name of the client's certificate matches, or ``PSK:`` and the name of its
    key (R-16). As in QEMU's authorisation lists ``*`` stands for any text, commas included; without ``*``, ``?`` and
    ``[`` a pattern is the exact text. Demands TLS by itself."""
    networks: tuple[Network, ...] = ()
    """One of which the client's address lies in; an IPv4 address counts as such, even in an IPv6 one (R-11)."""
    users: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()
    """The client's process runs as one of the users, root being none by nature, or as a member of one of the groups."""

    @classmethod
    def of(
        cls,
        *,
        tls: bool = False,
        subjects: Iterable[str] | None = None,
        networks: Iterable[str] | None = None,
        users: Iterable[str | int] | None = None,
        groups: Iterable[str | int] | None = None,
    ) -> "Access":
        """The demands as an operator writes them: networks as ``10.0.0.0/8`` or single addresses, users and groups
        by name or number. None is no demand.

        Raises:
            ExportError: a word means nothing, or a list is empty, which could be meant as everybody or nobody.
        """
        lists = {"subjects": subjects, "networks": networks, "users": users, "groups": groups}
        for name, given in lists.items():
            if given is not None and not list(given):
                raise ExportError(f"{name}: the list is empty; leave it out to demand nothing")
        return cls(
            tls,
            tuple(subjects or ()),
            tuple(map(network_of, networks or ())),
            frozenset(map(_user, users or ())),
            frozenset(map(_group, groups or ())),
        )

    @property
    def demands_tls(self) -> bool:
        """Whether nobody is let in without TLS."""
        return self.tls or bool(self.subjects)

    def objection(self, peer: Peer) -> str:
        """Why ``peer`` is not let in, whatever TLS may prove; empty if nothing is wrong with where it comes from."""
        if not (self.networks or self.users or self.groups):
            return ""
        if peer.host is not None:
            if not self.networks:
                return "it comes over TCP, and only clients on unix sockets are let in"
            near = any(peer.host in network for network in self.networks)
            return "" if near else f"its address is in none of the networks {_listed(self.networks)}"
        if not (self.users or self.groups):
            return "it is on a unix socket, and only clients of certain networks are let in"
        if peer.user in self.users or not peer.groups.isdisjoint(self.groups):
            return ""
        return f"user {peer.user} is neither on the list of users nor in one of the groups"

    def mistrust(self, peer: Peer) -> str:
        """Why what TLS proves of ``peer`` is not enough; empty if it is."""
        if self.demands_tls and not peer.secure:
            return "it does not use TLS"
        if not self.subjects:
            return ""
        if peer.identity is None:
            return "it has proved no identity"
        known = (peer.identity.subject, *peer.identity.names)
        if any(fnmatchcase(name, pattern) for name in known if name for pattern in self.subjects):
            return ""
        return f"{printable(peer.identity.subject or _listed(peer.identity.names))} is not on the list of subjects"


def network_of(text: str) -> Network:
    """A network, or a single address, as an operator writes it.

    Raises:
        ExportError: it is none, or has bits set behind its prefix.
    """
    try:
        network = ip_network(text)
    except ValueError as error:
        raise ExportError(f"{printable(text)!r} is not a network such as 192.0.2.0/24: {error}") from None
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        return IPv4Network((int(network.network_address) & 0xFFFFFFFF, network.prefixlen - 96))
    return network


def _user(word: str | int) -> int:
    try:
        return int(word) if isinstance(word, int) or word.isdecimal() else pwd.getpwnam(word).pw_uid
    except KeyError:
        raise ExportError(f"there is no user {printable(str(word))!r}") from None


def _group(word: str | int) -> int:
    try:
        return int(word) if isinstance(word, int) or word.isdecimal() else grp.getgrnam(word).gr_gid
    except KeyError:
        raise ExportError(f"there is no group {printable(str(word))!r}") from None


def _listed(items: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, items))) or "(none)"

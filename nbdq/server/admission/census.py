"""Who is connected: those that negotiate, and those that use an export, counted by where they come from.

Who uses exports is limited in number, and who is one too many is told so, in the answer to an option. That takes a
handshake, so these are limited apart: at that limit nobody is accepted, and if somebody waits, the oldest handshake of
whoever has most has to go once it is a second old, or a tenth of that if he has more than half of the places. Honest
ones take milliseconds; who only fills the place makes room.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from ipaddress import IPv6Address
from typing import Protocol

from nbdq.nbd.constants import OptionReply
from nbdq.nbd.ending import Ending
from nbdq.nbd.messages import OptionRefused
from nbdq.server.admission.peer import Peer
from nbdq.server.limits import Limits

_log = logging.getLogger(__name__)

#: A client's host, or the network of a host that has one to itself, or its user.
Source = tuple[str, int]
#: Part of its time in a crowd that a handshake has whose source fills more than half of the places.
_HASTE = 0.1


class Member(Protocol):
    """A connection, as the census sees it."""

    def shut_down(self) -> None:
        """End when everything accepted is answered."""
        ...

    def refuse(self) -> None:
        """Answer with errors what is not yet accepted, until the client leaves."""
        ...

    def abort(self, ending: Ending = ...) -> None:
        """End at once."""
        ...


class Census:
    """The connections of a server. Loop thread only."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        """May be replaced at any time; nobody is cut for that."""
        self._peers: dict[Member, Peer] = {}
        self._negotiating: dict[Member, float] = {}  # when each was accepted, oldest first
        self._using: Counter[Source] = Counter()  # those that use exports

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[Member]:
        """All of them, as they are now."""
        return iter(list(self._peers))

    @property
    def negotiating(self) -> int:
        """Those that do not use an export yet."""
        return len(self._negotiating)

    # Coming and going.

    def accepted(self, member: Member, peer: Peer, now: float) -> None:
        """It negotiates from now on."""
        self._peers[member] = peer
        self._negotiating[member] = now

    def negotiated(self, member: Member) -> None:
        """It uses an export from now on."""
        del self._negotiating[member]
        self._using[source_of(self._peers[member])] += 1

    def left(self, member: Member) -> None:
        """It is gone."""
        source = source_of(self._peers.pop(member))
        if self._negotiating.pop(member, None) is None:
            self._using[source] -= 1
            if not self._using[source]:
                del self._using[source]

    # Handshakes.

    @property
    def takes_handshakes(self) -> bool:
        """Whether one more client may begin to negotiate."""
        return len(self._negotiating) < self.limits.pending_handshakes

    def displaceable(self) -> tuple[Member, float]:
        """Whose handshake is the next to make room, and from when on it may be asked to. There are handshakes."""
        sources = {member: source_of(self._peers[member]) for member in self._negotiating}
        counts = Counter(sources.values())
        most = max(counts.values())
        member = next(member for member, source in sources.items() if counts[source] == most)
        patience = self.limits.crowded_handshake_seconds
        if most > self.limits.pending_handshakes // 2:
            patience *= _HASTE
        return member, self._negotiating[member] + patience

    # Those who want to use exports.

    def check_room(self, peer: Peer) -> None:
        """
        Raises:
            OptionRefused: there are enough clients, or enough of where ``peer`` comes from.
        """
        limits = self.limits
        if self._using.total() >= limits.connections:
            raise full(peer, f"the server has its {limits.connections} clients; try later", "connections")
        if limits.peer_connections and self._using[source_of(peer)] >= limits.peer_connections:
            text = f"there are {limits.peer_connections} connections from where you are; that is all that one may have"
            raise full(peer, text, "peer-connections")

    def check_room_for_tls(self, peer: Peer) -> None:
        """
        Raises:
            OptionRefused: there are enough clients that use TLS.
        """
        limit = self.limits.tls_connections
        if limit and sum(peer.secure for peer in self._peers.values()) >= limit:
            raise full(peer, f"the server has its {limit} clients that use TLS; try later", "tls-connections")


def full(peer: Peer, text: str, limit: str) -> OptionRefused:
    """What tells ``peer`` that it is one too many; the log tells the operator which limit that is."""
    _log.warning("%s: refused: %s (limit %s)", peer, text, limit)
    return OptionRefused(OptionReply.ERR_POLICY, text)


def source_of(peer: Peer) -> Source:
    """Where a client comes from, as far as it cannot choose that."""
    if peer.host is None:
        return "user", -1 if peer.user is None else peer.user
    if isinstance(peer.host, IPv6Address):
        return "network", int(peer.host) >> 64
    return "host", int(peer.host)

"""Every limit and deadline of the server, with its reason. Sizes in bytes, times in seconds."""

from dataclasses import dataclass, field, fields
from math import inf, isfinite
from typing import Any

from nbdq.errors import ExportError

#: Replies of one batch are assembled in an arena of this size.
ARENA_SIZE = 256 << 10
#: Arenas that wait for their next use.
ARENAS_KEPT = 64
#: From this length on, file data goes to the socket by reference instead of through the arena.
SENDFILE_LENGTH = 32 << 10
#: Up to this length a payload may be written on the loop thread: 60 µs of copying.
INLINE_WRITE_LENGTH = 256 << 10
#: Memory for replies and payloads that a connection gets even when the process has none left.
GUARANTEED_BYTES = 256 << 10
#: How long clients of an export that is deleted may take to get their last answers.
CUT_SECONDS = 10.0
#: … and how long they may stay to hear that there is nothing more to be had.
REFUSE_SECONDS = 1.0
#: In seconds; the kernel takes no more.
_MOST_KEEPALIVE = 32767


def _limit(default: Any, reason: str, *, least: float = 0, most: float = inf) -> Any:
    return field(default=default, metadata={"reason": reason, "least": least, "most": most})


@dataclass(frozen=True)
class Limits:
    """Limits that an operator may change, each with its reason, which ``nbdq serve --limit help`` shows.

    A 0 is no limit where it is allowed, unless the reason says otherwise. Names end in the unit; counts have none.
    """

    # Who gets in.
    handshake_seconds: float = _limit(10.0, "from accept to the end of the handshake, TLS included, whatever comes")
    pending_handshakes: int = _limit(64, "clients that negotiate at once; more wait to be accepted", least=1)
    crowded_handshake_seconds: float = _limit(
        1.0,
        "at that limit, the age at which the oldest one of whoever has most is dropped for somebody who waits; 0: any",
    )
    connections: int = _limit(1024, "clients that use exports, all together; more are told so", least=1)
    export_connections: int = _limit(128, "clients of one export, unless it has a number of its own; more are told so")
    peer_connections: int = _limit(
        512,
        "clients from one address (IPv6: one /64) or of one user; a host has them for all its guests; more are told so",
    )
    tls_connections: int = _limit(256, "clients under TLS, which cost more memory and time; more are refused TLS")
    options: int = _limit(32, "options of one handshake, and as many again for each export that is listed", least=1)

    # What a client may hold.
    requests: int = _limit(
        128, "requests of one connection in progress, as many as Linux sends; then it is not read for a while", least=1
    )
    connection_bytes: int = _limit(
        32 << 20, "memory for replies and payloads of one connection; a single larger request runs alone", least=1
    )
    process_bytes: int = _limit(256 << 20, "the same for all connections together", least=1)
    status_extents: int = _limit(
        64 << 10, "extents of one block status reply, where the protocol allows 2^20", least=1, most=1 << 20
    )
    status_seconds: float = _limit(
        0.05, "work for one block status reply; then it tells of less than was asked for, as the protocol allows"
    )

    # Who does not go on.
    reply_stall_seconds: float = _limit(300.0, "a client that takes not one byte of a waiting reply for so long is cut")
    payload_stall_seconds: float = _limit(60.0, "a client that sends not one byte of the rest of a WRITE is cut")
    user_timeout_seconds: float = _limit(
        120.0, "TCP: data that for so long is not acknowledged, or finds no window, ends a connection", most=2_000_000
    )
    keepalive_seconds: float = _limit(
        60.0, "TCP: silence after which the kernel asks whether the client is there", most=_MOST_KEEPALIVE
    )
    keepalive_interval_seconds: float = _limit(10.0, "TCP: between such questions", least=1, most=_MOST_KEEPALIVE)
    keepalive_probes: int = _limit(6, "TCP: such questions until the client counts as gone", least=1, most=127)
    drain_seconds: float = _limit(30.0, "from SIGTERM until connections that are still busy are cut; 0: at once")

    # What the process uses.
    inflated_bytes: int = _limit(64 << 20, "inflated clusters kept for all disks; 0: none")
    index_bytes: int = _limit(64 << 20, "windows of the chain indexes of all disks, in equal shares", least=1)
    workers: int = _limit(4, "threads for everything that can wait for a disk or a decompressor", least=1)

    def __post_init__(self) -> None:
        """
        Raises:
            ExportError: a limit is less than makes sense, or more than the protocol or the kernel takes.
        """
        for limit in fields(self):
            value, least, most = getattr(self, limit.name), limit.metadata["least"], limit.metadata["most"]
            if not isfinite(value):
                raise ExportError(f"limit {limit.name.replace('_', '-')}: {value} is not a number")
            if not least <= value <= most:
                bound = f"less than {least:.10g}" if value < least else f"more than {most:.10g}"
                raise ExportError(f"limit {limit.name.replace('_', '-')}: {value:.10g} is {bound}")

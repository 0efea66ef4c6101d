"""Every limit and deadline of the server, with its reason. Sizes in bytes, times in seconds."""

from dataclasses import dataclass

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
#: Extents in one block status reply (P117 allows 2^20; clients cap lower).
STATUS_EXTENTS = 64 << 10


@dataclass(frozen=True)
class Limits:
    """Limits that an operator may change."""

    handshake_seconds: float = 10.0
    """From accept to the transmission phase; not extended by progress (R-01)."""
    pending_handshakes: int = 64
    connections: int = 1024
    """All connections of the process, those that still negotiate included."""
    connection_bytes: int = 32 << 20
    """Memory for replies and payloads of one connection; a single larger request runs alone."""
    process_bytes: int = 256 << 20
    """The same for all connections together."""
    inflated_bytes: int = 64 << 20
    """Inflated clusters kept for all disks."""
    index_bytes: int = 64 << 20
    """Windows of the chain indexes of all disks, in equal shares."""
    drain_seconds: float = 30.0
    """From SIGTERM until connections that are still busy are cut."""
    reply_stall_seconds: float = 300.0
    """A client that takes not one byte of a waiting reply for so long is cut, and so is one that sends not one of a
    payload for which memory is held."""
    workers: int = 4
    """Threads for everything that can wait for a disk or a decompressor."""

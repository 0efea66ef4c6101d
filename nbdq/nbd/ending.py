"""Why connections end: a closed list, the same in logs, metrics and code (P141, W7)."""

from dataclasses import dataclass
from enum import StrEnum


class Cause(StrEnum):
    """What ended a connection. The values are labels of metrics, so they stay as they are."""

    DISCONNECT = "disconnect"
    """The client said NBD_CMD_DISC (P93, P140)."""
    ABORT = "abort"
    """The client said NBD_OPT_ABORT (P140)."""
    CLOSED = "closed"
    """The client closed its side without a word (R-72)."""
    BROKEN = "broken"
    """The network or the client's kernel broke it: a reset, a time-out, nobody there to send to."""
    PROTOCOL = "protocol"
    """What the client sent can no longer be followed, or passes every bound (P141, R-05)."""
    REFUSED = "refused"
    """What the client asked for cannot be had, and the protocol has no other answer than to hang up (P30); or the
    export was deleted or filled up while the client was being told of it."""
    TLS = "tls"
    """The TLS handshake failed, or TLS broke down later (P60)."""
    POLICY = "policy"
    """More connections than this client may have."""
    HANDSHAKE_TIMEOUT = "handshake-timeout"
    """The handshake took longer than its deadline (R-01)."""
    STALLED = "stalled"
    """The client did not take its replies, or did not send the rest of a payload (R-70)."""
    CUT = "cut"
    """An administrator's order: its export is deleted or closed to it."""
    SHUTDOWN = "shutdown"
    """The server stops (P99)."""
    READ_FAILED = "read-failed"
    """A reply that had begun could not be completed (P101)."""
    BUG = "bug"
    """A mistake of ours; the log has a traceback."""


@dataclass(frozen=True)
class Ending:
    """One connection's end."""

    cause: Cause
    text: str
    """One line for the log."""

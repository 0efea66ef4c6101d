"""What all sessions of a server share."""

import asyncio
from dataclasses import dataclass, field

from nbdq.nbd.transmission import BUFFER_SIZE
from nbdq.pool import WorkerPool
from nbdq.server.budget import Budget
from nbdq.server.limits import Limits


@dataclass
class Resources:
    """Loop thread only, but for the pool."""

    loop: asyncio.AbstractEventLoop
    pool: WorkerPool
    limits: Limits
    budget: Budget
    receive_buffer: bytearray = field(default_factory=lambda: bytearray(BUFFER_SIZE))
    """Every session is done with what it received, or has copied it, before the next one receives."""
    arenas: list[bytearray] = field(default_factory=list)
    """Buffers of ARENA_SIZE that no session holds: for replies, and for payloads of about that length."""

"""What all sessions of a server share."""

import asyncio
from dataclasses import dataclass, field

from nbdq.nbd.transmission import BUFFER_SIZE
from nbdq.pool import WorkerPool
from nbdq.server.admission.census import Census
from nbdq.server.budget import Budget
from nbdq.server.limits import ARENA_SIZE, ARENAS_KEPT, Limits
from nbdq.server.monitoring.counters import Visits
from nbdq.server.turns import Turns


@dataclass
class Resources:
    """Loop thread only, but for the pool."""

    loop: asyncio.AbstractEventLoop
    pool: WorkerPool
    limits: Limits
    budget: Budget
    census: Census
    receive_buffer: bytearray = field(default_factory=lambda: bytearray(BUFFER_SIZE))
    """Every session is done with what it received, or has copied it, before the next one receives."""
    visits: Visits = field(default_factory=Visits)
    _arenas: list[bytearray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.turns = Turns(self.loop)
        """For handshakes that have much to say."""

    def borrow_arena(self) -> bytearray:
        """A buffer of ARENA_SIZE, for replies or for a payload of about that length."""
        return self._arenas.pop() if self._arenas else bytearray(ARENA_SIZE)

    def return_arena(self, arena: bytearray) -> None:
        """Nobody uses ``arena`` any more; a few are kept, for fresh memory is slow."""
        if len(self._arenas) < ARENAS_KEPT:
            self._arenas.append(arena)

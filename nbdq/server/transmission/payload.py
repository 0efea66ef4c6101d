"""Memory for large payloads: each is received into memory of its own, which was reserved before (R-70)."""

import asyncio
from collections.abc import Callable
from functools import partial

import numpy as np

from nbdq.nbd.ending import Cause, Ending
from nbdq.nbd.transmission import Transmission
from nbdq.server.exports.export import Export
from nbdq.server.limits import ARENA_SIZE
from nbdq.server.resources import Resources
from nbdq.server.transmission.pending import Pending
from nbdq.server.transmission.watch import Watch


class PayloadMemory:
    """The memory of the payload that one session is receiving, or has received last. Loop thread only."""

    def __init__(
        self,
        transmission: Transmission,
        pending: Pending,
        resources: Resources,
        export: Export,
        watch: Watch,
        *,
        resume: Callable[[], None],
        end: Callable[[Ending], None],
    ) -> None:
        """``resume`` is called when the rates of the ``export`` allow the payload that they did not before, ``end``
        when a client that is being read does not send the rest of one."""
        self._transmission = transmission
        self._pending = pending
        self._resources = resources
        self._export = export
        self._resume = resume
        self._watch = watch
        self._end = end
        self._arena: bytearray | None = None  # what the payload was received into, if it was one
        self._stall: asyncio.TimerHandle | None = None
        self._count = 0

    def provide(self) -> bool:
        """Give a payload the memory that it waits for; False when there is none for now (R-70), or when it could not be
        used soon, because the export has been as fast as it may."""
        length = self._transmission.wanted
        if not length:
            return True
        throttle = self._export.throttle
        if throttle is not None and not throttle.admits(self._resume):
            return False
        if not self._pending.reserve_payload(length):
            return False
        if throttle is not None:
            throttle.pay(requests=1, bytes=length)
        if ARENA_SIZE // 2 <= length <= ARENA_SIZE:
            self._arena = self._resources.borrow_arena()
            self._transmission.provide(memoryview(self._arena)[:length])
        else:
            self._arena = None
            self._transmission.provide(np.empty(length, dtype=np.uint8).data)  # clearing it would take a third more
        self._count += 1
        self.watch()
        return True

    def watch(self) -> None:
        """Let a payload that stays unfinished not hold its memory for ever."""
        seconds = self._resources.limits.payload_stall_seconds
        missing = self._transmission.missing
        if missing and self._stall is None and seconds:
            self._stall = self._resources.loop.call_later(seconds, partial(self._judge, self._count, missing))

    def _judge(self, count: int, missing: int) -> None:
        self._stall = None
        if self._watch.is_reading and (self._count, self._transmission.missing) == (count, missing):
            self._end(Ending(Cause.STALLED, "client does not send the rest of a WRITE"))
        else:
            self.watch()

    def done(self) -> None:
        """The WRITE whose payload has memory of its own was answered at once."""
        self._pending.payload_done()
        if self._arena is not None:
            self._resources.return_arena(self._arena)
            self._arena = None

    def abandon(self) -> None:
        """The session has ended."""
        if self._export.throttle is not None:
            self._export.throttle.forget(self._resume)
        if self._stall is not None:
            self._stall.cancel()

"""The server: exports, listeners and connections together, from start to a clean stop.

Keeps a registry of every connection, half-negotiated ones included, so that a stop ends them all (R-02).
"""

import asyncio
import itertools
import logging
import socket
from collections.abc import Callable, Sequence
from functools import partial

from nbdq.nbd.ending import Cause, Ending
from nbdq.nbd.handshake import TlsMode
from nbdq.pool import WorkerPool
from nbdq.server.admission.census import Census
from nbdq.server.admission.peer import Peer
from nbdq.server.budget import Budget
from nbdq.server.connection import Connection
from nbdq.server.exports.export import Exports
from nbdq.server.limits import Limits
from nbdq.server.listener import Listener, watch_for_death
from nbdq.server.monitoring.lag import LagWatch
from nbdq.server.resources import Resources
from nbdq.server.tls.credentials import Tls

_log = logging.getLogger(__name__)

#: At the limit of handshakes nothing tells that somebody waits to be accepted; so we look.
_LOOK_AGAIN_SECONDS = 0.1
_DISPLACED = Ending(Cause.POLICY, "dropped during the handshake: others wait, and its time in a crowd was over")


class Server:
    """Serves ``exports`` on ``listeners``. Owns the listeners; the exports' devices stay the caller's."""

    def __init__(
        self,
        exports: Exports,
        listeners: Sequence[Listener],
        limits: Limits,
        *,
        tls: Tls | None = None,
        clients_at_once: int = 0,
    ) -> None:
        """``tls`` is needed if a listener has it on offer. Of more than ``clients_at_once``, unless that is 0, the
        later ones wait in the kernel's queue until one leaves, as qemu-nbd has it."""
        assert tls is not None or all(listener.tls is TlsMode.OFF for listener in listeners)
        self._tls = tls
        self._exports = exports
        self._clients_at_once = clients_at_once
        self._listeners = listeners
        self._numbers = itertools.count(1)
        self._accepting = True
        self._crowded: asyncio.TimerHandle | None = None  # until a handshake may be asked to make room
        self._idle = asyncio.Event()
        self._idle.set()
        self._pool = WorkerPool(limits.workers)
        self.census = Census(limits)
        """Every connection, half-negotiated ones included."""
        loop, budget = asyncio.get_running_loop(), Budget(limits.process_bytes)
        self._resources = Resources(loop, self._pool, limits, budget, self.census)
        self.lag = LagWatch(self._resources.loop)
        self.on_idle: Callable[[], None] = lambda: None
        """Called whenever the last connection has ended."""

    @property
    def tls(self) -> Tls | None:
        """What clients can be secured with, if anything."""
        return self._tls

    @property
    def resources(self) -> Resources:
        """What its connections share."""
        return self._resources

    @property
    def limits(self) -> Limits:
        """What holds now."""
        return self._resources.limits

    def limit(self, limits: Limits) -> None:
        """Other limits from now on. Those that are there stay, and go on under the deadlines that they began with; the
        number of threads, and what the disks share, need a new start."""
        self._resources.limits = self.census.limits = limits
        self._resources.budget.resize(limits.process_bytes)
        self._adjust_accepting()

    def start(self) -> None:
        """Accept clients from now on."""
        for listener in self._listeners:
            listener.start(self._resources.loop, partial(self._accept, listener.tls))

    def _accept(self, tls_mode: TlsMode, sock: socket.socket, address: object) -> bool:
        try:
            peer = Peer.of(sock, address, next(self._numbers))
            watch_for_death(sock, self.limits)
        except OSError:
            sock.close()
            return True
        _log.debug("%s: connected", peer)
        connection = Connection(
            sock,
            peer,
            self._exports,
            self._resources,
            tls_mode=tls_mode,
            tls=self._tls,
            on_negotiated=self._negotiated,
            on_close=self._forget,
        )
        self.census.accepted(connection, peer, self._resources.loop.time())
        self._idle.clear()
        connection.start()
        return self._adjust_accepting()

    def _negotiated(self, connection: Connection) -> None:
        self.census.negotiated(connection)
        self._adjust_accepting()

    def _forget(self, connection: Connection) -> None:
        self.census.left(connection)
        if not self.census:
            self._idle.set()
            self.on_idle()
        self._adjust_accepting()

    def _adjust_accepting(self) -> bool:
        """Stop accepting while there are enough handshakes; who is not accepted waits in the kernel's queue."""
        full = self._clients_at_once and len(self.census) >= self._clients_at_once
        wanted = not full and self.census.takes_handshakes
        if wanted != self._accepting:
            self._accepting = wanted
            for listener in self._listeners:
                if wanted:
                    listener.resume()
                else:
                    listener.pause()
        if not wanted and not full and self._crowded is None:
            self._crowded = self._resources.loop.call_at(self.census.displaceable()[1], self._make_room)
        return wanted

    def _make_room(self) -> None:
        """End handshakes that have had their time, if anybody waits for their place."""
        self._crowded = None
        if self.census.takes_handshakes:
            return
        if not any(listener.is_awaited for listener in self._listeners):
            self._crowded = self._resources.loop.call_later(_LOOK_AGAIN_SECONDS, self._make_room)
            return
        connection, when = self.census.displaceable()
        if when <= self._resources.loop.time():
            connection.abort(_DISPLACED)
        self._adjust_accepting()

    def admit_nobody(self) -> None:
        """Listen no more: who comes now is for the next server. Idempotent."""
        for listener in self._listeners:
            listener.close()

    def hurry(self, seconds: float) -> None:
        """Cut in so many seconds whoever is still there, whatever :meth:`stop` is at."""
        self._resources.loop.call_later(seconds, self._cut)

    def _cut(self) -> None:
        if self.census:
            _log.warning("%d connections did not finish in time", len(self.census))
        for connection in self.census:
            connection.abort()

    async def stop(self, *, refuse: bool = False) -> None:
        """Listen no more, let connections finish what they have begun, cut those that take too long (P99, R-76).

        Connections are closed when everything accepted is answered: who connects again asks the next server for the
        rest, and has lost nothing. ``refuse``: there will be none, so whatever clients still ask for is answered with
        ESHUTDOWN, until they have left. On return no thread touches a device any more.
        """
        self.admit_nobody()
        if self._crowded is not None:
            self._crowded.cancel()
        for export in list(self._exports.by_id.values()):  # one ends with a last client that has left
            export.gate.pause.end()
            export.resume()  # what clients have sent is answered, although they were to be held back for longer
        for connection in self.census:
            if refuse:
                connection.refuse()
            else:
                connection.shut_down()
        deadline = self._resources.loop.call_later(self.limits.drain_seconds, self._cut)
        await self._idle.wait()
        deadline.cancel()
        self.lag.close()
        self._pool.close()

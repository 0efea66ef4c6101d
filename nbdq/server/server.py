"""The server: exports, listeners and connections together, from start to a clean stop.

Keeps a registry of every connection, half-negotiated ones included, so that a stop ends them all (R-02).
"""

import asyncio
import itertools
import logging
import socket
from collections.abc import Sequence

from nbdq.pool import WorkerPool
from nbdq.server.budget import Budget
from nbdq.server.connection import Connection
from nbdq.server.export import Exports
from nbdq.server.lag import LagWatch
from nbdq.server.limits import Limits
from nbdq.server.listener import Listener
from nbdq.server.peer import Peer
from nbdq.server.resources import Resources

_log = logging.getLogger(__name__)


class Server:
    """Serves ``exports`` on ``listeners``. Owns the listeners; the exports' devices stay the caller's."""

    def __init__(self, exports: Exports, listeners: Sequence[Listener], limits: Limits) -> None:
        self._exports = exports
        self._listeners = listeners
        self._limits = limits
        self._connections: set[Connection] = set()
        self._negotiating: set[Connection] = set()
        self._numbers = itertools.count(1)
        self._accepting = True
        self._idle = asyncio.Event()
        self._idle.set()
        self._pool = WorkerPool(limits.workers)
        self._resources = Resources(asyncio.get_running_loop(), self._pool, limits, Budget(limits.process_bytes))
        self.lag = LagWatch(self._resources.loop)

    def start(self) -> None:
        """Accept clients from now on."""
        for listener in self._listeners:
            listener.start(self._resources.loop, self._accept)

    def _accept(self, sock: socket.socket, address: object) -> bool:
        try:
            peer = Peer.of(sock, address, next(self._numbers))
        except OSError:
            sock.close()
            return True
        _log.debug("%s: connected", peer)
        connection = Connection(
            sock, peer, self._exports, self._resources, on_negotiated=self._forget_negotiation, on_close=self._forget
        )
        self._connections.add(connection)
        self._negotiating.add(connection)
        self._idle.clear()
        connection.start()
        return self._adjust_accepting()

    def _forget_negotiation(self, connection: Connection) -> None:
        self._negotiating.discard(connection)
        self._adjust_accepting()

    def _forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._idle.set()
        self._forget_negotiation(connection)

    def _adjust_accepting(self) -> bool:
        """Stop accepting at the limits; who is not accepted waits in the kernel's queue until somebody leaves."""
        limits = self._limits
        wanted = len(self._connections) < limits.connections and len(self._negotiating) < limits.pending_handshakes
        if wanted != self._accepting:
            self._accepting = wanted
            for listener in self._listeners:
                if wanted:
                    listener.resume()
                else:
                    listener.pause()
        return wanted

    async def stop(self) -> None:
        """Listen no more, let connections finish what they have begun, cut those that take too long (P99, R-76).

        On return no thread touches a device any more.
        """
        for listener in self._listeners:
            listener.close()
        for export in self._exports.by_id.values():
            export.gate.pause.end()
            export.resume()  # what clients have sent is answered, although they were to be held back for longer
        for connection in list(self._connections):
            connection.shut_down()
        try:
            await asyncio.wait_for(self._idle.wait(), self._limits.drain_seconds)
        except TimeoutError:
            _log.warning("%d connections did not finish in time", len(self._connections))
            for connection in list(self._connections):
                connection.abort()
        self.lag.close()
        self._pool.close()

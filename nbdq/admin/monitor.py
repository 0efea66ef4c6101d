"""The admin socket: clients are let in, their commands executed one after the other, events told to all of them.

A client is a guest of the loop that serves disks. So it is bounded in everything: requests in size and number, what it
does not read (then it is cut off, and nobody else notices), and its number (R-43). Who may come in is decided by the
file mode of the socket, and again by the kernel's word on who is there (R-40).
"""

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from time import monotonic
from typing import Any

from nbdq.admin import wire
from nbdq.admin.arguments import parse
from nbdq.admin.context import Context, Peer
from nbdq.admin.jobs import NotActive
from nbdq.admin.registry import COMMANDS
from nbdq.errors import NbdqError, NotFound, in_words, printable
from nbdq.server.admission.peer import credentials
from nbdq.server.listener import Listener

_log = logging.getLogger(__name__)
#: Who changed what; told however quiet the server is to be (R-43).
_audit = logging.getLogger("nbdq.audit")
_audit.setLevel(logging.INFO)

CLIENTS_MAX = 64
#: Requests that a client may make in a second; more have to wait.
_RATE = 100
#: Bytes that may wait for a client which does not read.
_BACKLOG_MAX = 4 << 20
_RECEIVE = 64 << 10
#: How long a client that is to go may take to read the rest.
_GOODBYE_SECONDS = 1.0


@dataclass(frozen=True)
class Access:
    """Who may use the socket, besides root and the user that the server runs as."""

    users: Collection[int] = ()
    groups: Collection[int] = ()

    def admits(self, peer: Peer, groups: Collection[int]) -> bool:
        """Whether ``peer``, a member of ``groups`` besides its own, may come in."""
        if peer.user in (0, os.geteuid(), *self.users):
            return True
        return not {peer.group, *groups}.isdisjoint(self.groups)


class Monitor:
    """Serves the admin socket. Owns the listener. Loop thread only."""

    def __init__(self, listener: Listener, context: Callable[[Peer], Context], access: Access) -> None:
        """``context`` makes what the commands of a peer get."""
        self._listener = listener
        self._context = context
        self._access = access
        self._clients: set[_Client] = set()

    def start(self) -> None:
        """Let clients in."""
        self._loop = asyncio.get_running_loop()
        self._listener.start(self._loop, self._accept)

    def emit(self, event: str, data: dict[str, Any]) -> None:
        """Tell every client that is past its negotiation."""
        if self._clients:
            line = wire.event(event, data)
            for client in list(self._clients):
                client.tell(line)

    @property
    def backlog(self) -> int:
        """Bytes that wait for clients to take them."""
        return sum(client.backlog for client in self._clients)

    async def stop(self, *, within: float) -> None:
        """Let nobody in, carry out what has begun, for at most ``within`` seconds, and say good-bye. On return no
        command is in progress."""
        self._listener.close()
        deadline = self._loop.call_later(within, self.hurry)
        await asyncio.gather(*(client.stop() for client in list(self._clients)))
        deadline.cancel()

    def hurry(self) -> None:
        """Cancel the commands of clients that were told to :meth:`stop`."""
        for client in self._clients:
            client.hurry()

    def _accept(self, sock: socket.socket, address: object) -> bool:
        try:
            process, user, group, groups = credentials(sock)
            peer = Peer(process, user, group)
        except OSError:  # it has gone already
            sock.close()
            return True
        if not self._access.admits(peer, groups):
            _log.warning("admin: %s was refused: neither root, nor our own user, nor on the list", peer)
            sock.close()
        elif len(self._clients) >= CLIENTS_MAX:
            _log.warning("admin: %s was refused: there are %d clients", peer, CLIENTS_MAX)
            sock.close()
        else:
            client = _Client(sock, self._context(peer), self._clients.discard)
            self._clients.add(client)
            client.start(self._loop)
        return True


class _Client:
    """One connection."""

    def __init__(self, sock: socket.socket, context: Context, on_close: Callable[["_Client"], None]) -> None:
        self._socket = sock
        self._context = context
        self._on_close = on_close
        self._negotiated = False
        self._waiting: deque[tuple[bytes, int]] = deque()
        """Lines to be sent, each with the bytes of it that count as events."""
        self._waiting_bytes = 0
        self._event_bytes = 0
        self._writable = asyncio.Event()
        self._taken = asyncio.Event()
        self._receiving: asyncio.Future[bytes] | None = None
        self._leaving = False
        self._is_busy = False  # a command is in hand

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Serve it from now on."""
        self._loop = loop
        self._writer = loop.create_task(self._write())
        self._reader = loop.create_task(self._read())

    @property
    def backlog(self) -> int:
        """Bytes that wait for it to take them."""
        return self._waiting_bytes

    def tell(self, event: bytes) -> None:
        """Send an event, if it wants any."""
        if not self._negotiated or self._leaving:
            return
        self._event_bytes += len(event)
        if self._event_bytes > _BACKLOG_MAX:
            _log.warning("admin: %s does not read what it is sent; cut off", self._context.peer)
            self._leave()
            self._writer.cancel()
            return
        self._send(event, is_event=True)

    async def stop(self) -> None:
        """Finish the command in hand, send what is waiting for as long as it is being read, and close."""
        self._leave()
        await asyncio.wait([self._reader])

    def hurry(self) -> None:
        """Carry out nothing any more: cancel the command in hand, which is taken back as if it had failed."""
        if self._leaving and self._is_busy:
            _log.warning("admin: %s: a command is cancelled, because the server ends", self._context.peer)
            self._reader.cancel()

    def _leave(self) -> None:
        self._leaving = True
        self._taken.set()
        if self._receiving is not None:
            self._receiving.cancel()

    async def _read(self) -> None:
        parser = wire.Parser()
        allowance, before = float(_RATE), monotonic()
        self._send(wire.greeting())
        try:
            while not self._leaving and (data := await self._receive()):
                for request in parser.feed(data):
                    allowance, before = min(_RATE, allowance + (monotonic() - before) * _RATE), monotonic()
                    if allowance < 1:
                        await asyncio.sleep((1 - allowance) / _RATE)
                    allowance -= 1
                    if self._leaving:
                        break
                    self._is_busy = True
                    answer = await self._answer(request)
                    self._is_busy = False
                    await self._reply(answer)
        except wire.TooLarge as error:
            self._send(wire.error(wire.GENERIC_ERROR, str(error), {}))
            _log.warning("admin: %s: %s", self._context.peer, error)
        except OSError:
            pass  # it has gone
        finally:
            await self._close()

    async def _receive(self) -> bytes:
        """What came next; empty at the end."""
        self._receiving = asyncio.ensure_future(self._loop.sock_recv(self._socket, _RECEIVE))
        try:
            return await self._receiving
        except asyncio.CancelledError:
            if not self._leaving:
                raise
            return b""
        finally:
            self._receiving = None

    async def _answer(self, request: wire.Request | wire.BadRequest) -> bytes:
        if isinstance(request, wire.BadRequest):
            return wire.error(wire.GENERIC_ERROR, request.text, request.tag)
        command = COMMANDS.get(request.command)
        if command is None:
            text = f"The command {printable(request.command)} has not been found"
            return wire.error(wire.COMMAND_NOT_FOUND, text, request.tag)
        negotiates = request.command == "qmp_capabilities"
        if negotiates is self._negotiated:
            text = (
                "Capabilities negotiation is already complete, command ignored"
                if negotiates
                else "Expecting capabilities negotiation with 'qmp_capabilities'"
            )
            return wire.error(wire.COMMAND_NOT_FOUND, text, request.tag)
        peer = self._context.peer
        try:
            arguments = parse(command.arguments, request.arguments)
            if command.changes:
                _audit.info("%s: %s %s", peer, command.name, printable(str(request.arguments), 1000))
            value = await command.run(self._context, arguments)
        except NotActive as error:
            return wire.error(wire.DEVICE_NOT_ACTIVE, str(error), request.tag)
        except NotFound as error:
            return wire.error(wire.DEVICE_NOT_FOUND, str(error), request.tag)
        except (NbdqError, OSError) as error:
            if command.changes:
                _audit.info("%s: %s failed: %s", peer, command.name, in_words(error))
            return wire.error(wire.GENERIC_ERROR, in_words(error), request.tag)
        except Exception:
            _log.exception("admin: %s: %s failed", peer, command.name)
            return wire.error(wire.GENERIC_ERROR, "internal error; the server's log says more", request.tag)
        self._negotiated = self._negotiated or negotiates
        return wire.answer(value, request.tag)

    def _send(self, line: bytes, *, is_event: bool = False) -> None:
        self._waiting.append((line, len(line) * is_event))
        self._waiting_bytes += len(line)
        self._writable.set()

    async def _reply(self, line: bytes) -> None:
        """Send an answer, and wait until the client has taken most of what it was sent: only then does it get more."""
        self._send(line)
        while self._waiting_bytes > _BACKLOG_MAX and not self._leaving:
            self._taken.clear()
            await self._taken.wait()

    async def _write(self) -> None:
        try:
            while True:
                await self._writable.wait()
                while self._waiting:
                    line, event_bytes = self._waiting.popleft()
                    await self._loop.sock_sendall(self._socket, line)
                    self._waiting_bytes -= len(line)
                    self._event_bytes -= event_bytes
                    self._taken.set()
                self._writable.clear()
                if self._leaving:
                    return
        except OSError:
            self._leave()  # it has gone

    async def _close(self) -> None:
        """Send what is waiting, within bounds, and close the socket."""
        self._leaving = True
        self._on_close(self)
        self._writable.set()
        await asyncio.wait([self._writer], timeout=_GOODBYE_SECONDS)
        self._writer.cancel()
        await asyncio.wait([self._writer])
        self._socket.close()

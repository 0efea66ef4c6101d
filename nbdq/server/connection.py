"""One client from accept to close: drives the handshake, then hands the socket to a session.

Owns the socket. Moves bytes and keeps time; decides nothing about the protocol.
"""

import logging
import socket
from collections.abc import Callable

from nbdq.errors import ProtocolError, printable
from nbdq.nbd.constants import Command
from nbdq.nbd.ending import Cause, Ending
from nbdq.nbd.handshake import Handshake, TlsMode
from nbdq.nbd.transmission import Transmission
from nbdq.server.admission.census import source_of
from nbdq.server.admission.entrance import Entrance
from nbdq.server.admission.peer import Peer
from nbdq.server.exports.export import Export, Exports
from nbdq.server.monitoring.peer_log import PeerLog
from nbdq.server.resources import Resources
from nbdq.server.tls.credentials import Tls
from nbdq.server.tls.stream import SecureStream, broken
from nbdq.server.transmission.output import Output
from nbdq.server.transmission.session import Session

_log = logging.getLogger(__name__)

#: Options are small; a bound on what is parsed in one turn of the loop.
_RECEIVE_SIZE = 4 << 10
_STOPS = Ending(Cause.SHUTDOWN, "the server stops")

#: How long a client that has all its answers may take to hang up.
_LINGER_SECONDS = 1.0
#: Instead of no deadline.
_FOR_EVER = 1e9
#: Why a connection is cut, unless somebody has a better reason.
_CUT = Ending(Cause.CUT, "cut: the time to end in peace is over")


class Connection:
    """Loop thread only. Fully valid before its first byte is sent (R-03)."""

    def __init__(
        self,
        sock: socket.socket,
        peer: Peer,
        exports: Exports,
        resources: Resources,
        *,
        tls_mode: TlsMode,
        tls: Tls | None,
        on_negotiated: Callable[["Connection"], None],
        on_close: Callable[["Connection"], None],
    ) -> None:
        """Take ownership of ``sock``; ``on_negotiated`` is called when transmission begins, ``on_close`` once. ``tls``
        is needed unless ``tls_mode`` is OFF."""
        assert tls is not None or tls_mode is TlsMode.OFF
        self._log = PeerLog(_log, peer)
        self._begun = resources.loop.time()
        self._heard = False  # it has said something
        self._peer = peer
        self._socket: socket.socket | SecureStream = sock
        self._tls = tls
        self._exports = exports
        self._resources = resources
        self._on_negotiated = on_negotiated
        self._on_close = on_close
        self._entrance = Entrance(exports, peer, resources.census)
        self._handshake = Handshake(self._entrance, tls=tls_mode, maximum_options=resources.limits.options)
        self._output = Output(sock)
        self._session: Session | None = None
        self._export: Export | None = None
        self._closed = False
        self._deadline = resources.loop.call_later(
            resources.limits.handshake_seconds or _FOR_EVER,
            self._close,
            Ending(Cause.HANDSHAKE_TIMEOUT, "handshake took longer than its deadline"),
        )

    def start(self) -> None:
        """Say hello and listen to the client."""
        self._resources.loop.add_reader(self._socket.fileno(), self._on_readable)
        self._send([self._handshake.hello()])

    def shut_down(self, ending: Ending = _STOPS) -> None:
        """End a transmission when its accepted requests are answered, and a negotiation soon: what it still asks for is
        answered with ERR_SHUTDOWN (P99)."""
        if self._session is not None:
            self._session.shut_down(ending)
        else:
            self._handshake.shut_down()
            self._deadline.cancel()
            self._deadline = self._resources.loop.call_later(_LINGER_SECONDS, self._close, ending)

    def refuse(self, ending: Ending = _STOPS) -> None:
        """Answer what is accepted, and what comes after with an error, until the client leaves (P99); a negotiation is
        shut down."""
        if self._session is not None:
            self._session.refuse(ending)
        else:
            self.shut_down(ending)

    def abort(self, ending: Ending = _CUT) -> None:
        """Close at once."""
        self._close(ending)

    def resize(self, size: int) -> None:
        """The export has another size from now on."""
        if self._session is not None:
            self._session.resize(size)

    def _guard(self, callback: Callable[[], None]) -> None:
        """Run a callback of the loop; a bug in it ends this connection, and leaves nothing hanging (R-10)."""
        try:
            callback()
        except Exception:
            self._log.exception("the connection ends for a bug")
            self._close(Ending(Cause.BUG, "internal error"))

    def _on_readable(self) -> None:
        self._guard(self._receive_all)

    def _receive_all(self) -> None:
        # uvloop tells of a broken connection only once, perhaps together with its last bytes; if these need no answer,
        # whose sending would fail, we have to look again.
        while not self._receive() and not self._closed:
            pass

    def _receive(self) -> bool:
        """Take what has come; whether anything more will be heard of the socket, if there is more."""
        try:
            data = b"" if self._handshake.has_more else self._socket.recv(_RECEIVE_SIZE)
            if data and self._handshake.starting_tls:
                self._secured()
        except (BlockingIOError, InterruptedError):
            if self._handshake.starting_tls:
                self._wait_for_tls()
            if self._may_go_on:
                self._resources.loop.call_soon(self._go_on)
            return True
        except OSError as error:
            self._close(broken(error))
            return True
        if not data and not self._handshake.has_more:
            self._close(Ending(Cause.CLOSED, "client left during the handshake"))
            return True
        self._heard = True
        try:
            replies = self._handshake.receive(data)
            if self._handshake.starting_tls and self._has_said_more():
                raise ProtocolError("more came behind STARTTLS before it was answered")
        except ProtocolError as error:
            self._close(Ending(Cause.PROTOCOL, str(error)))
            return True
        self._send(replies)
        if self._handshake.has_more:
            if self._may_go_on and not self._closed:  # many may ask for long lists at once
                self._resources.loop.remove_reader(self._socket.fileno())
                self._resources.turns.wait(self._take_turn)
            return True
        return bool(replies) and not self._may_go_on

    def _send(self, replies: list[bytes]) -> None:
        if replies:
            self._output.append(memoryview(b"".join(replies)))
        loop, descriptor = self._resources.loop, self._socket.fileno()
        try:
            drained = self._output.flush()
        except OSError as error:
            self._close(broken(error))
            return
        if not drained:  # a client that does not read its replies is not read either
            loop.remove_reader(descriptor)
            loop.add_writer(descriptor, self._guard, self._on_writable)
        elif self._handshake.starting_tls:
            self._start_tls()
        elif self._handshake.negotiated is not None:
            self._begin_transmission()
        elif self._handshake.finished:
            assert self._handshake.ending is not None
            self._close(self._handshake.ending)

    def _on_writable(self) -> None:
        loop, descriptor = self._resources.loop, self._socket.fileno()
        loop.remove_writer(descriptor)
        loop.add_reader(descriptor, self._on_readable)
        self._send([])
        self._go_on()

    # TLS. What comes behind STARTTLS before that was answered may be somebody else's, who wants it to be taken for the
    # client's: nothing of it is kept (P62, R-14).

    def _has_said_more(self) -> bool:
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK)) if isinstance(self._socket, socket.socket) else False
        except OSError:  # nothing, or nothing any more
            return False

    def _start_tls(self) -> None:
        """The client knows: from now on it speaks TLS, or is cut."""
        if isinstance(self._socket, socket.socket):
            assert self._tls is not None
            self._socket = self._tls.secure(self._socket, self._resources, self._on_step)
            self._output = Output(self._socket)

    def _wait_for_tls(self) -> None:
        assert isinstance(self._socket, SecureStream)
        if self._socket.is_busy:  # what comes has to wait, and must not wake us all the time
            self._resources.loop.remove_reader(self._socket.fileno())
        else:  # it may have more to say than the socket took
            self._send([])

    def _on_step(self) -> None:
        self._resources.loop.add_reader(self._socket.fileno(), self._on_readable)
        self._on_readable()

    def _secured(self) -> None:
        assert isinstance(self._socket, SecureStream)
        self._peer.identity = self._socket.identity()
        self._peer.secure = True
        self._handshake.secured()
        identity = self._peer.identity
        who = "anybody" if identity is None else printable(identity.subject or ", ".join(identity.names))
        self._log.info("%s, the client is %s", self._socket.describe(), who, fields={"event": "tls", "identity": who})

    def _take_turn(self) -> None:
        if not self._closed:
            self._resources.loop.add_reader(self._socket.fileno(), self._on_readable)
            self._on_readable()

    def _go_on(self) -> None:
        if self._may_go_on and not self._closed:
            self._on_readable()

    @property
    def _may_go_on(self) -> bool:
        """Whether more can be received of which the socket does not tell, because we or TLS have it already."""
        if self._session is not None or self._output:
            return False
        return self._handshake.has_more or (isinstance(self._socket, SecureStream) and self._socket.has_more)

    def _begin_transmission(self) -> None:
        negotiated = self._handshake.negotiated
        assert negotiated is not None
        self._deadline.cancel()
        self._resources.loop.remove_reader(self._socket.fileno())
        export = self._entrance.chosen(negotiated)
        if export is None:
            text = "the export is gone, full or another one since the client asked for it"
            self._close(Ending(Cause.REFUSED, text))
            return
        self._on_negotiated(self)
        self._exports.enter(export, self)
        self._export = export
        self._log.export = export.id
        self._log.debug("export %r, contexts %s", export.info.name, [name for _, name in negotiated.contexts])
        self._session = Session(
            self._socket,
            Transmission(negotiated, self._resources.receive_buffer),
            export,
            self._resources,
            source=source_of(self._peer),
            on_end=self._hang_up,
            log=self._log,
        )
        self._session.start(bytes(self._handshake.leftover))

    def _hang_up(self, ending: Ending) -> None:
        """Close so that what was sent arrives (P93, P99).

        TCP drops what it has not yet delivered when data comes in on a closed socket; so what a client still sends is
        read and forgotten, until it hangs up too or has had its time.
        """
        if self._socket.family != socket.AF_UNIX:
            try:
                self._socket.shutdown(socket.SHUT_WR)
            except OSError:  # the client is gone already
                pass
            else:
                loop = self._resources.loop
                loop.add_reader(self._socket.fileno(), self._on_late, ending)
                self._deadline = loop.call_later(_LINGER_SECONDS, self._close, ending)
                return
        self._close(ending)

    def _on_late(self, ending: Ending) -> None:
        try:
            if self._socket.recv(_RECEIVE_SIZE):
                return
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            pass
        self._close(ending)

    def _close(self, ending: Ending) -> None:
        if self._closed:
            return
        self._closed = True
        self._deadline.cancel()
        if self._session is not None:
            self._session.abandon()
        if self._export is not None:
            self._exports.leave(self._export, self)
        self._resources.loop.remove_reader(self._socket.fileno())
        self._resources.loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._resources.visits.ended(ending.cause, served=self._session is not None)
        self._tell(ending)
        self._on_close(self)

    def _tell(self, ending: Ending) -> None:
        """The one line about a connection; one that said nothing was a look whether somebody listens (P15)."""
        seconds = self._resources.loop.time() - self._begun
        fields: dict[str, object] = {"event": "closed", "cause": ending.cause, "duration": round(seconds, 3)}
        if self._session is None:
            level = logging.INFO if self._heard or ending.cause is Cause.HANDSHAKE_TIMEOUT else logging.DEBUG
            self._log.log(level, "no export within %.1f s: %s", seconds, ending.text, fields=fields)
            return
        done = self._session.counters
        read, written = done.bytes_done(Command.READ), done.bytes_done(Command.WRITE)
        fields |= {"requests": done.requests, "read": read, "written": written}
        text = "export %r for %.1f s: %d requests, %d bytes read, %d written: %s"
        self._log.info(text, self._log.export, seconds, done.requests, read, written, ending.text, fields=fields)

"""A socket under TLS, with those methods that the handshake and sessions use of a plain one.

TLS itself works between two buffers in memory, and this moves bytes between them and the socket. Compared with a socket
of the ``ssl`` module that costs one more copy, which large transfers do not show, and saves system calls: requests that
came together arrive with one call, although clients give each of them a record of its own (2.2 µs for one, not 4.3),
and replies leave in pieces larger than a record. And what TLS has to send does not depend on what the socket takes.

The steps of the handshake are taken in a thread of their own, where strangers cannot hold up anybody's requests with
them: a signature with an RSA key of 4096 bits takes milliseconds. Meanwhile nothing else touches the TLS layer.

Owns the socket. Knows NBD no further than how its connections end. Loop thread only, but for those steps.
"""

import errno
import socket
import ssl
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from nbdq.nbd.ending import Cause, Ending
from nbdq.pool import WorkerPool
from nbdq.server.admission.peer import Identity
from nbdq.server.resources import Resources
from nbdq.server.tls.identity import identity_of
from nbdq.server.tls.psk import PresharedKeys
from nbdq.storage import FileStorage

#: Bytes taken from the socket at once, and encrypted at once. The buffers in memory keep the size that they once had:
#: twice as much saves an eighth of the time, and costs each connection 100 KiB for each of the two (R-17).
_RECEIVE_SIZE = 64 << 10
_SEND_SIZE = 64 << 10
#: Bytes that are encrypted in one turn of the loop: a third of a millisecond.
_TURN_SIZE = 1 << 20
#: How often a receive that comes to nothing looks for more before others have their turn: TLS has messages of its own,
#: with which a client could keep us busy.
_FETCHES_PER_TURN = 4
#: Bytes that TLS may have to say by itself to a client that does not read; beyond, the client plays with us.
_UNASKED_SIZE = 16 << 10


class TlsFailed(OSError):
    """TLS could not be begun, or broke down. The text is for the log; the client was told by TLS itself."""

    def __init__(self, text: str) -> None:
        super().__init__(errno.EPROTO, text)

    def __str__(self) -> str:
        return str(self.strerror)


def broken(error: OSError) -> Ending:
    """How a connection ends that failed with ``error``."""
    return Ending(Cause.TLS if isinstance(error, TlsFailed) else Cause.BROKEN, str(error))


class SecureStream:
    """The server's side of TLS on one non-blocking socket."""

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        resources: Resources,
        pool: WorkerPool,
        *,
        keys: PresharedKeys | None,
        on_step: Callable[[], None],
    ) -> None:
        """Take over ``sock``, on which the client begins its handshake now. Its steps are taken in the ``pool``, which
        has one thread; after each ``on_step`` is called, for receiving to go on. ``keys`` if ``context`` asks these."""
        self._socket = sock
        self._resources = resources
        self._pool = pool
        self._on_step = on_step
        self._keys = keys
        self._key_name: str | None = None
        self._failed: TlsFailed | None = None
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._tail = memoryview(b"")  # what was taken out of _outgoing and is still to be sent
        self._promised = 0  # bytes given to send and encrypted, of which the caller does not know yet
        self._turn = 0
        self.is_established = False
        """Whether the handshake has succeeded; everything else waits for that."""
        self.is_busy = False
        """Whether a step of the handshake is being taken; to receive is of no use before the call to ``on_step``."""
        self._is_closed = False
        self.has_more = False
        """Whether the last receive may have left something that is here already: the socket will not tell of it."""

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def family(self) -> socket.AddressFamily:
        return self._socket.family

    def identity(self) -> Identity | None:
        """Who the client has proved to be.

        Raises:
            TlsFailed: its certificate says that in a way which cannot be read.
        """
        assert self.is_established
        try:
            certificate = self._tls.getpeercert()
        except ValueError as error:
            raise TlsFailed(f"the client's certificate cannot be read: {error}") from None
        if certificate:
            return identity_of(certificate)
        if self._key_name is not None:
            return Identity("", frozenset({f"PSK:{self._key_name}"}))
        return None

    def describe(self) -> str:
        """Version and cipher, for the log."""
        cipher = self._tls.cipher()
        return f"{self._tls.version()} with {cipher[0] if cipher else 'no cipher'}"

    # Receiving.

    def recv(self, size: int) -> bytes:
        """At most ``size`` bytes; as :meth:`recv_into`."""
        buffer = bytearray(size)
        return bytes(buffer[: self.recv_into(buffer)])

    def recv_into(self, buffer: bytearray | memoryview) -> int:
        """What the client said, at least one byte; 0 when it has ended, with or without TLS's own farewell (P67). Until
        the handshake has succeeded this takes what belongs to it.

        Raises:
            BlockingIOError: nothing for now; if :attr:`has_more`, others should have their turn and then we again.
            TlsFailed, OSError: the connection is broken.
        """
        if self._failed is not None:
            raise self._failed
        if self.is_busy:
            raise BlockingIOError
        if not self.is_established:
            if not self._fetch():
                return 0
            self.is_busy = True
            self._pool.submit(self._take_step)
            raise BlockingIOError
        view = memoryview(buffer)
        for _ in range(_FETCHES_PER_TURN):
            count = self._decrypt(view)
            if self._outgoing.pending:
                self._send_unasked()
            if count is not None:
                return count
            if not self._fetch():
                return 0
        self.has_more = True
        raise BlockingIOError

    def _fetch(self) -> bool:
        arena = self._resources.borrow_arena()
        try:
            view = memoryview(arena)[:_RECEIVE_SIZE]
            count = self._socket.recv_into(view)
            self._incoming.write(view[:count])
            return bool(count)
        finally:
            self._resources.return_arena(arena)

    def _take_step(self) -> None:
        """In the pool: go on with the handshake as far as what was received allows."""
        failure = ""
        is_established = False
        if self._keys is not None:
            self._keys.asked = None
        try:
            self._tls.do_handshake()
            is_established = True
        except ssl.SSLWantReadError:
            pass
        except Exception as error:
            failure = _in_words(error)
        if self._keys is not None and self._keys.asked is not None:
            self._key_name = self._keys.asked
        with suppress(RuntimeError):  # the loop is closed
            self._resources.loop.call_soon_threadsafe(self._step_taken, is_established, failure)

    def _step_taken(self, is_established: bool, failure: str) -> None:
        self.is_busy = False
        if self._is_closed:
            return
        self.is_established = is_established
        self._failed = TlsFailed(failure) if failure else None
        with suppress(OSError):  # to receive will tell
            self.flush()
        self._on_step()

    def _decrypt(self, view: memoryview) -> int | None:
        """Fill ``view`` from what is here; None if that is not even one byte."""
        done = 0
        self.has_more = False
        try:
            while done < len(view):
                count: int = self._tls.read(len(view) - done, view[done:])  # type: ignore[assignment]
                if not count:  # the farewell; it will be read again
                    self.has_more = True
                    return done
                done += count
                if not self._incoming.pending and not self._tls.pending():
                    return done
            self.has_more = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            if not done:
                raise self._failure(error) from None
            self.has_more = True  # what came before is good, and the next receive fails as this one
        return done or None

    # Sending.

    def begin_turn(self) -> None:
        """The loop has looked after others since anything was sent."""
        self._turn = 0

    def send(self, data: memoryview, flags: int = 0) -> int:
        """As :meth:`sendmsg`."""
        return self.sendmsg((data,), (), flags)

    def sendmsg(self, buffers: Sequence[memoryview], ancillary: Iterable[object] = (), flags: int = 0) -> int:
        """How many of these bytes have left. Whoever is told to wait comes back with the same bytes, as they may be
        encrypted already.

        Raises:
            BlockingIOError: not all of what was encrypted has left, or this turn of the loop is over.
            TlsFailed, OSError: the connection is broken.
        """
        if not self._promised:
            self._encrypt(buffers)
        if flags & socket.MSG_MORE and self._outgoing.pending < _SEND_SIZE:
            return self._fulfilled()
        return self._sent()

    def send_file(self, storage: FileStorage, offset: int, length: int) -> int:
        """The same for bytes of a file, as ``sendfile`` does it; 0 if the file ends before ``offset``."""
        if not self._promised:
            arena = self._resources.borrow_arena()
            try:
                view = memoryview(arena)[: min(length, _SEND_SIZE)]
                count = storage.read_into(offset, view)
                if not count:
                    return 0
                self._encrypt((view[:count],))
            finally:
                self._resources.return_arena(arena)
        return self._sent()

    def flush(self) -> bool:
        """Send what is encrypted; whether all of it has left.

        Raises:
            OSError: the connection is broken.
        """
        while self._tail or (not self.is_busy and self._outgoing.pending):
            if not self._tail:
                self._tail = memoryview(self._outgoing.read())
            try:
                self._tail = self._tail[self._socket.send(self._tail) :]
            except BlockingIOError:
                return False
        return True

    def _encrypt(self, buffers: Iterable[memoryview]) -> None:
        if self._turn >= _TURN_SIZE:
            raise BlockingIOError
        for buffer in buffers:
            position = 0
            while position < len(buffer) and self._promised < _SEND_SIZE:
                try:
                    count = self._tls.write(buffer[position : position + _SEND_SIZE - self._promised])
                except ssl.SSLError as error:
                    raise self._failure(error) from None
                position += count
                self._promised += count
        self._turn += self._promised

    def _sent(self) -> int:
        if not self.flush():
            raise BlockingIOError
        return self._fulfilled()

    def _fulfilled(self) -> int:
        count, self._promised = self._promised, 0
        return count

    def _send_unasked(self) -> None:
        """Send what TLS says by itself: new keys, alerts. What does not leave waits for what follows."""
        if not self.flush() and self._outgoing.pending > _UNASKED_SIZE:
            raise TlsFailed("TLS: the client demands answers and does not read them")

    # Ending.

    def shutdown(self, how: int) -> None:
        """Say farewell, so that the client knows that nothing was cut off (P67), and shut the socket down."""
        self._say_farewell()
        self._socket.shutdown(how)

    def close(self) -> None:
        """Say farewell if that has not happened, close the socket, and give all memory back. Nothing may follow."""
        with suppress(OSError):
            self._say_farewell()
        self._is_closed = True
        self._socket.close()
        # The parts of a connection know each other in circles. These hold most of its memory, and must not wait for the
        # circles to be found. A step that still waits for its turn fails then, which nobody minds.
        del self._tls, self._incoming, self._outgoing

    def _say_farewell(self) -> None:
        if self.is_established:
            with suppress(ssl.SSLError):  # it wants to read the client's farewell, for which nobody waits
                self._tls.unwrap()
        self.flush()

    def _failure(self, error: ssl.SSLError) -> TlsFailed:
        """``error`` in words, after the client was told of it."""
        with suppress(OSError):
            self.flush()
        return TlsFailed(_in_words(error))


def _in_words(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: the client's certificate is refused: {error.verify_message}"
    reason = (error.reason if isinstance(error, ssl.SSLError) else None) or str(error)
    return f"TLS: {reason.replace('_', ' ').lower()}"

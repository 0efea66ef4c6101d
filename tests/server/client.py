"""An NBD client on a raw socket, written from the protocol and not from ``nbdq.nbd``: honest, strict, or hostile.

The builders give bytes to be sent whole, torn or garbled. :class:`Client` keeps the rules itself unless a test makes it
break them, and judges every reply by the letter (P100-P117): a reply that a real client could stumble over fails the
test here. Every wait ends after ``PATIENCE``, so a server that says nothing fails a test and does not hang it.
"""

import itertools
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

#: Seconds until a server that says nothing counts as hung; generous, because it only bounds failures.
PATIENCE = 30

Address = str | tuple[str, int]
"""The path of a unix socket, or host and port."""

FIXED_NEWSTYLE, NO_ZEROES = 1, 2
EXPORT_NAME, ABORT, LIST, INFO, GO, STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT = 1, 2, 3, 6, 7, 8, 9, 10
EXTENDED_HEADERS = 11
ACK, INFO_REPLY, META_CONTEXT = 1, 3, 4
ERR_UNSUP, ERR_INVALID = 0x80000001, 0x80000003

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = 1, 2, 4, 8, 16, 32

EPERM, EIO, EINVAL, ENOSPC = 1, 5, 22, 28

_REQUEST = struct.Struct(">IHHQQI")
_EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
_OPTION_REPLY_MAGIC = 0x0003E889045565A9
_REQUEST_MAGIC = 0x25609513
_EXTENDED_REQUEST_MAGIC = 0x21E41C71
_SIMPLE_MAGIC = 0x67446698
_CHUNK_MAGIC = 0x668E33EF
_EXTENDED_CHUNK_MAGIC = 0x6E8A278C
_NONE, _DATA, _HOLE, _STATUS, _STATUS_EXT, _ERROR, _ERROR_OFFSET = 0, 1, 2, 5, 6, 0x8001, 0x8002


def text(string: str) -> bytes:
    raw = string.encode()
    return struct.pack(">I", len(raw)) + raw


def option(code: int, data: bytes = b"") -> bytes:
    """One option of the handshake (P20)."""
    return b"IHAVEOPT" + struct.pack(">II", code, len(data)) + data


def meta_context(code: int, name: str, *queries: str) -> bytes:
    """LIST_META_CONTEXT or SET_META_CONTEXT (P41, P42)."""
    return option(code, text(name) + struct.pack(">I", len(queries)) + b"".join(map(text, queries)))


def handshake(
    name: str = "", *, structured: bool = True, extended: bool = False, contexts: tuple[str, ...] = ()
) -> bytes:
    """All that an honest client says before its first request, when it does not wait for the answers."""
    said = struct.pack(">I", FIXED_NEWSTYLE | NO_ZEROES)
    if extended:
        said += option(EXTENDED_HEADERS)
    elif structured:
        said += option(STRUCTURED_REPLY)
    if contexts:
        said += meta_context(SET_META_CONTEXT, name, *contexts)
    return said + option(GO, text(name) + struct.pack(">HH", 1, 3))


def request(
    command: int, cookie: int = 0, offset: int = 0, length: int = 0, *, flags: int = 0, extended: bool = False
) -> bytes:
    """One request header (P80)."""
    if extended:
        return _EXTENDED_REQUEST.pack(_EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length)
    return _REQUEST.pack(_REQUEST_MAGIC, flags, command, cookie, offset, length)


def status_payload(length: int, *ids: int) -> bytes:
    """The payload of a BLOCK_STATUS that asks for some contexts of a range (P120)."""
    return struct.pack(f">Q{len(ids)}I", length, *ids)


def connect(address: Address) -> socket.socket:
    """A blocking socket to a server, whose waits are bounded."""
    sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else _family(address[0]))
    try:
        # With a timeout, Python's connect() would not wait for a place in the queue of a unix socket.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", PATIENCE, 0))
        sock.connect(address)
        sock.settimeout(PATIENCE)
    except BaseException:
        sock.close()
        raise
    return sock


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def reset(sock: socket.socket) -> None:
    """Close with a RST instead of a FIN; a unix socket knows no such thing and is just closed."""
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Disconnected(AssertionError):
    """The server closed the connection where it had more to say."""


@dataclass
class Reply:
    """The whole answer to one request."""

    cookie: int
    error: int = 0
    """The first, if there are several."""
    message: str = ""
    errors: list[tuple[int | None, str]] = field(default_factory=list)
    """The place in the export of every error, and its text."""
    parts: list[tuple[int, bytes]] = field(default_factory=list)
    """What a READ returned in chunks, ascending by offset; all of it is in ``data`` if there was no error."""
    data: bytes = b""
    status: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Metadata context id → (length, flags) of each extent."""


class Client:
    """One connection. A context manager; leaving it closes the socket without a word."""

    def __init__(self, address: Address) -> None:
        """Connect, and say nothing yet."""
        self.socket = connect(address)
        self.size = self.flags = 0
        self.contexts: dict[str, int] = {}
        self.structured = self.extended = False
        self._cookies = itertools.count(0x6E626471 << 32 | 1)
        self._outstanding: dict[int, tuple[int, int, int, int]] = {}  # cookie → command, offset, length, flags

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    # The handshake.

    def go(
        self, name: str = "", *, structured: bool = True, extended: bool = False, contexts: tuple[str, ...] = ()
    ) -> Self:
        """Negotiate to the transmission phase."""
        self.socket.sendall(handshake(name, structured=structured, extended=extended, contexts=contexts))
        self.finish_handshake()
        return self

    def finish_handshake(self) -> None:
        """Take the hello and the answers to what was said, up to the answer to GO."""
        self.hello()
        while True:
            code, reply, data = self.option_reply()
            assert reply < 1 << 31, f"option {code} refused with {reply:#x}: {data.decode()}"
            if reply == INFO_REPLY and data[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", data[2:])
            elif reply == META_CONTEXT:
                self.contexts[data[4:].decode()] = struct.unpack(">I", data[:4])[0]
            elif reply == ACK:
                assert not data
                self.extended |= code == EXTENDED_HEADERS
                self.structured |= code in (STRUCTURED_REPLY, EXTENDED_HEADERS)
                if code == GO:
                    return

    def hello(self) -> None:
        assert self.receive(18) == b"NBDMAGICIHAVEOPT\x00\x03"

    def option_reply(self) -> tuple[int, int, bytes]:
        """Option, type and data of the next option reply."""
        magic, code, reply, length = struct.unpack(">QIII", self.receive(20))
        assert magic == _OPTION_REPLY_MAGIC
        return code, reply, self.receive(length)

    # The transmission.

    def pack(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0) -> bytes:
        """A request that waits for its reply from now on; it is still to be sent, for a WRITE with its payload.

        With extended headers a WRITE gets its flag PAYLOAD_LEN (P123).
        """
        cookie = next(self._cookies)
        if command != DISC:
            self._outstanding[cookie] = (command, offset, length, flags)
        if self.extended and command == WRITE:
            flags |= PAYLOAD_LEN
        return request(command, cookie, offset, length, flags=flags, extended=self.extended)

    def payload(self, command: int, length: int, flags: int) -> bytes:
        """What a server expects behind the header of such a request, were it ever so wrong (P82, P123)."""
        return bytes(length) if command == WRITE or (self.extended and flags & PAYLOAD_LEN) else b""

    def status_of(self, offset: int, length: int, *ids: int, flags: int = 0) -> dict[int, list[tuple[int, int]]]:
        """What a BLOCK_STATUS with a payload says of a range in the contexts of these ids, and in no other (P120)."""
        payload = status_payload(length, *ids)
        cookie = next(self._cookies)
        self._outstanding[cookie] = (BLOCK_STATUS, offset, length, flags)
        header = request(BLOCK_STATUS, cookie, offset, len(payload), flags=flags | PAYLOAD_LEN, extended=self.extended)
        self.socket.sendall(header + payload)
        reply = self.reply(contexts=ids)
        assert not reply.error, reply.message
        return reply.status

    def send(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"") -> int:
        """Send one request; return its cookie."""
        header = self.pack(command, offset, length, flags=flags)
        self.socket.sendall(header + payload)
        return int.from_bytes(header[8:16], "big")

    def ask(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"") -> Reply:
        """Send one request and wait for its reply, which must be the next one."""
        cookie = self.send(command, offset, length, flags=flags, payload=payload)
        reply = self.reply()
        assert reply.cookie == cookie
        return reply

    def read(self, offset: int, length: int) -> bytes:
        """Read what must be readable."""
        reply = self.ask(READ, offset, length)
        assert reply.error == 0, f"READ {length} at {offset}: errno {reply.error} {reply.message}"
        return reply.data

    def error(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"") -> int:
        """The error number of the reply to one request; 0 for success."""
        return self.ask(command, offset, length, flags=flags, payload=payload).error

    def send_beside(self, data: bytes) -> None:
        """Send more than a server may take before its replies are read, while the caller goes on to read them."""
        threading.Thread(target=self.socket.sendall, args=(data,), daemon=True).start()

    @property
    def outstanding(self) -> int:
        """Requests without a reply."""
        return len(self._outstanding)

    def reply(self, *, contexts: Iterable[int] | None = None) -> Reply:
        """The next whole reply, judged; a block status of ``contexts``, if not of all that were selected."""
        (magic,) = struct.unpack(">I", self.receive(4))
        if magic == _SIMPLE_MAGIC:
            assert not self.extended, "a simple reply to a client with extended headers (P122)"
            error, cookie = struct.unpack(">IQ", self.receive(12))
            command, _, length, _ = self._outstanding.pop(cookie)
            assert command != READ or not self.structured, "a READ must get a structured reply (P102)"
            return Reply(cookie, error, data=self.receive(length) if command == READ and not error else b"")
        assert magic == self._chunk_magic, f"a reply begins with {magic:#x}"
        assert self.structured, "a structured reply to a client that did not ask for them"
        return self._structured_reply(set(self.contexts.values() if contexts is None else contexts))

    @property
    def _chunk_magic(self) -> int:
        return _EXTENDED_CHUNK_MAGIC if self.extended else _CHUNK_MAGIC

    def _chunk_header(self) -> tuple[int, int, int, int]:
        """Flags, type, cookie and length of a chunk behind its magic (P110)."""
        flags: int
        if not self.extended:
            flags, kind, cookie, length = struct.unpack(">HHQI", self.receive(16))
            return flags, kind, cookie, length
        flags, kind, cookie, offset, length = struct.unpack(">HHQQQ", self.receive(28))
        assert cookie in self._outstanding, f"a reply to nothing: cookie {cookie:#x}"
        assert offset == self._outstanding[cookie][1], "a chunk that does not echo the request's offset (P110)"
        return flags, kind, cookie, length

    def replies(self) -> dict[int, Reply]:
        """All outstanding replies, by cookie."""
        found = {}
        while self._outstanding:
            reply = self.reply()
            assert reply.cookie not in found
            found[reply.cookie] = reply
        return found

    def _structured_reply(self, contexts: set[int]) -> Reply:
        """The chunks of one reply; this client knows a server that does not interleave replies."""
        reply: Reply | None = None
        while True:
            flags, kind, cookie, length = self._chunk_header()
            assert flags in (0, 1)
            if reply is None:
                assert cookie in self._outstanding, f"a reply to nothing: cookie {cookie:#x}"
                reply = Reply(cookie)
            assert reply.cookie == cookie
            self._take_chunk(reply, kind, self.receive(length))
            if flags:
                break
            magic = self.receive(4)
            assert magic == struct.pack(">I", self._chunk_magic)
        command, offset, wanted, request_flags = self._outstanding.pop(reply.cookie)
        assert not reply.parts or command == READ
        if command == READ:
            self._judge_parts(reply, offset, wanted, request_flags)
        elif not reply.error and command == BLOCK_STATUS:
            assert set(reply.status) == contexts, "a context without a chunk, or one without a request (P117)"
            for extents in reply.status.values():
                self._judge_extents(extents, offset, wanted, request_flags)
        return reply

    def _judge_parts(self, reply: Reply, offset: int, length: int, flags: int) -> None:
        """P113: content chunks lie in the request, do not overlap, and cover all of it unless there is an error."""
        reply.parts.sort()
        assert not flags & DF or len(reply.parts) + len(reply.errors) <= 1, "a READ with DF answered in pieces (P115)"
        position = offset
        for start, data in reply.parts:
            assert start >= position, "an overlap in a READ (P113)"
            assert reply.error or start == position, "a gap in a READ (P113)"
            position = start + len(data)
        assert position <= offset + length
        for place, _ in reply.errors:
            assert place is None or offset <= place < offset + length
        if not reply.error:
            assert position == offset + length
            reply.data = b"".join(data for _, data in reply.parts)

    def _take_chunk(self, reply: Reply, kind: int, body: bytes) -> None:
        match kind:
            case 0:
                assert not body
            case 1:
                assert len(body) > 8, "an empty OFFSET_DATA (P111)"
                reply.parts.append((int.from_bytes(body[:8], "big"), body[8:]))
            case 2:
                assert len(body) == 12
                start, length = struct.unpack(">QI", body)
                assert length > 0
                reply.parts.append((start, bytes(length)))
            case 5:
                assert not self.extended, "a BLOCK_STATUS instead of a BLOCK_STATUS_EXT (P122)"
                assert len(body) % 8 == 4
                self._take_status(reply, int.from_bytes(body[:4], "big"), struct.iter_unpack(">II", body[4:]))
            case 6:
                assert self.extended, "a BLOCK_STATUS_EXT for compact headers (P111)"
                context, count = struct.unpack(">II", body[:8])
                assert len(body) == 8 + 16 * count
                self._take_status(reply, context, struct.iter_unpack(">QQ", body[8:]))
            case 0x8001 | 0x8002:
                error, length = struct.unpack(">IH", body[:6])
                assert error, "an error chunk without an error"
                assert len(body) == 6 + length + (8 if kind == _ERROR_OFFSET else 0)
                message = body[6 : 6 + length].decode()
                if not reply.error:
                    reply.error, reply.message = error, message
                reply.errors.append((int.from_bytes(body[-8:], "big") if kind == _ERROR_OFFSET else None, message))
            case _:
                raise AssertionError(f"a chunk of type {kind:#x}")

    def _take_status(self, reply: Reply, context: int, extents: Iterable[tuple[int, int]]) -> None:
        assert context not in reply.status, "a context answered twice (P117)"
        reply.status[context] = list(extents)
        assert reply.status[context], "a BLOCK_STATUS without an extent (P111)"

    def _judge_extents(self, extents: list[tuple[int, int]], offset: int, length: int, flags: int) -> None:
        """P117: contiguous from the request's offset, none empty, only the last one past the request's end."""
        assert all(size > 0 for size, _ in extents)
        assert sum(size for size, _ in extents[:-1]) < length
        assert offset + sum(size for size, _ in extents) <= self.size
        assert all(a[1] != b[1] for a, b in itertools.pairwise(extents)), "neighbours of equal status"
        if flags & REQ_ONE:
            assert len(extents) == 1
            assert extents[0][0] <= length

    # Bytes.

    def receive(self, length: int) -> bytes:
        """Exactly ``length`` bytes.

        Raises:
            Disconnected: fewer came.
        """
        buffer = bytearray(length)
        view, done = memoryview(buffer), 0
        while done < length:
            try:
                count = self.socket.recv_into(view[done:])
            except ConnectionError as error:
                raise Disconnected(f"{error} after {done} of {length} bytes") from None
            if not count:
                raise Disconnected(f"end of stream after {done} of {length} bytes")
            done += count
        return bytes(buffer)

    def is_closed(self) -> bool:
        """Whether the server closed the connection, having nothing more to say; waits for the one or the other."""
        try:
            return not self.socket.recv(1)
        except ConnectionError:
            return True


class Background:
    """A thread that does something again and again beside a test; leaving the block ends it and raises its failure."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self.rounds = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._act()
                self.rounds += 1
        except BaseException as error:
            self._failure = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while error is None and not self.rounds and self._thread.is_alive():
            self._thread.join(0.01)  # whatever the test did, one round beside it must have succeeded
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def wait_for_a_round(self) -> None:
        """Return when a round has begun and succeeded since the call."""
        rounds, deadline = self.rounds, time.monotonic() + PATIENCE
        while self.rounds < rounds + 2:
            assert self._thread.is_alive(), self._failure
            assert time.monotonic() < deadline, f"nothing happened in {PATIENCE} s"
            time.sleep(0.001)


class HealthyClient(Background):
    """A client that reads at random places all the time and compares every answer with the disk's ``content``."""

    def __init__(
        self,
        address: Address,
        content: bytes | memoryview,
        *,
        name: str = "",
        seed: int = 0,
        client: Client | None = None,
    ) -> None:
        """``client``: one that has negotiated already, in place of a new one."""
        self._client = client or Client(address).go(name)
        self._content = content
        self._random = random.Random(seed)
        super().__init__(self._round)

    def _round(self) -> None:
        expected = {}
        said = b""
        for _ in range(8):
            length = self._random.choice((1, 512, 4096, 4097, 70_000))
            offset = self._random.randrange(len(self._content) - length)
            header = self._client.pack(READ, offset, length)
            said += header
            expected[int.from_bytes(header[8:16], "big")] = self._content[offset : offset + length]
        self._client.socket.sendall(said)
        for cookie, reply in self._client.replies().items():
            assert reply.error == 0
            assert reply.data == expected[cookie], "a healthy client read wrong bytes"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._client:
            super().__exit__(kind, error, trace)

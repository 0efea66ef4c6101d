"""Our client and servers that lie, drip, flood or fall silent: one line of error, soon, and bounded memory (R-21)."""

import contextlib
import resource
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from nbdq.client import wire
from nbdq.client.connection import Connection, connect
from nbdq.client.transaction import Transaction
from nbdq.errors import NbdqError, ProtocolError
from nbdq.nbd.constants import ChunkType, Command, CommandFlag
from nbdq.nbd.uri import Uri

HELLO = b"NBDMAGICIHAVEOPT\0\3"
ACK, SERVER, INFO, META = 1, 2, 3, 4

Script = Callable[[socket.socket], None]


@contextlib.contextmanager
def serving(script: Script) -> Iterator[Uri]:
    """A server that follows ``script`` with each client, and then hangs up."""
    with tempfile.TemporaryDirectory(prefix="nbdq-") as directory, socket.socket(socket.AF_UNIX) as listener:
        path = f"{directory}/s"
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connected, _ = listener.accept()
                    with connected, contextlib.suppress(OSError):
                        script(connected)

        threading.Thread(target=serve, daemon=True).start()
        yield Uri(secure=False, socket_path=path, query={})
        listener.shutdown(socket.SHUT_RDWR)


def says(*pieces: bytes, hold: bool = False) -> Script:
    """A hello, then each piece after something was received; and stay silent or not."""

    def script(connected: socket.socket) -> None:
        connected.sendall(HELLO)
        connected.recv(4)
        for piece in pieces:
            connected.recv(1 << 16)
            connected.sendall(piece)
        if hold:
            while connected.recv(1 << 16):
                pass

    return script


def reply(option: int, kind: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    return struct.pack(">QIII", 0x0003E889045565A9, option, kind, len(data) if length is None else length) + data


def details(size: int = 1 << 20, flags: int = 0x85) -> bytes:
    return reply(7, INFO, struct.pack(">HQH", 0, size, flags)) + reply(7, ACK)


@pytest.mark.parametrize(
    "hello",
    [
        b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n",
        b"NBDMAGIC" + struct.pack(">QQI", 0x420281861253, 1 << 20, 0) + bytes(124),
        bytes(18),
    ],
    ids=["ssh", "oldstyle", "zeros"],
)
def test_what_is_no_nbd_server_is_told_in_one_line(hello: bytes) -> None:
    with serving(lambda connected: connected.sendall(hello)) as uri, pytest.raises(ProtocolError) as raised:
        connect(uri, timeout=5)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"x" * 20, id="no magic"),
        pytest.param(reply(6, ACK), id="another option"),
        pytest.param(reply(3, 77), id="an unknown type"),
        pytest.param(reply(3, ACK, b"x"), id="an ACK with data"),
        pytest.param(reply(3, SERVER, b"", length=1 << 31), id="2 GiB announced"),
        pytest.param(reply(3, SERVER, struct.pack(">I", 100) + b"short") + reply(3, ACK), id="a name beyond the reply"),
        pytest.param(reply(3, SERVER, struct.pack(">I", 1) + b"\xff") + reply(3, ACK), id="a name that is no UTF-8"),
        pytest.param(
            reply(3, SERVER, struct.pack(">I", 4097) + b"x" * 4097) + reply(3, ACK), id="a name of 4097 bytes"
        ),
        pytest.param(reply(3, SERVER, b"\0") + reply(3, ACK), id="no length of a name"),
        pytest.param(reply(3, INFO, b"\0\0") + reply(3, ACK), id="INFO in a list"),
        pytest.param(reply(3, (1 << 31) + 1, b"a\0b"), id="a text with a NUL"),
    ],
)
def test_a_list_that_breaks_the_protocol_is_refused(answer: bytes) -> None:
    with serving(says(answer)) as uri, connect(uri, timeout=5) as connection, pytest.raises(ProtocolError) as raised:
        connection.list()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("length", [1, 4000])
def test_a_list_without_end_ends(length: int) -> None:
    """Before it fills the memory, too (R-21)."""
    many = reply(3, SERVER, struct.pack(">I", length) + b"x" * length) * (10_000 // length + 1)

    def flood(connected: socket.socket) -> None:
        connected.sendall(HELLO)
        while True:
            connected.sendall(many)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with serving(flood) as uri, connect(uri, timeout=60) as connection, pytest.raises(ProtocolError, match="no end"):
        connection.list()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 128 << 10


def test_a_server_that_drips_its_answer_does_not_hold_us_up_for_longer_than_the_timeout() -> None:
    def drip(connected: socket.socket) -> None:
        connected.sendall(HELLO)
        connected.recv(1 << 16)
        for byte in reply(3, SERVER, struct.pack(">I", 4000) + b"x" * 4000):
            connected.sendall(bytes([byte]))
            time.sleep(0.02)

    with serving(drip) as uri, connect(uri, timeout=0.5) as connection, pytest.raises(TimeoutError):
        connection.list()


def test_a_server_that_says_nothing_is_given_up() -> None:
    with serving(lambda connected: time.sleep(2)) as uri, pytest.raises(TimeoutError):
        connect(uri, timeout=0.2)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(reply(7, ACK), id="no INFO_EXPORT"),
        pytest.param(reply(7, INFO, bytes(11)) + reply(7, ACK), id="a short INFO_EXPORT"),
        pytest.param(reply(7, INFO, b"\0") + reply(7, ACK), id="an INFO without type"),
        pytest.param(details(size=1 << 63), id="a size of 2^63"),
        pytest.param(reply(7, SERVER, bytes(12)) + reply(7, ACK), id="SERVER instead of INFO"),
    ],
)
def test_an_export_that_breaks_the_protocol_is_refused(answer: bytes) -> None:
    with serving(says(answer)) as uri, connect(uri, timeout=5) as connection, pytest.raises(ProtocolError):
        connection.go("")


def _simple(cookie: int, error: int = 0) -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie)


COOKIE = 0x6E6264710000_0001


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"\0" * 16, id="no magic"),
        pytest.param(_simple(5), id="a cookie that nobody used"),
        pytest.param(struct.pack(">IHHQI", 0x668E33EF, 1, 0, COOKIE, 0), id="a chunk that was not agreed"),
        pytest.param(_simple(COOKIE)[:10], id="half a header"),
        pytest.param(_simple(COOKIE) + b"short", id="too little data"),
    ],
)
def test_a_reply_that_breaks_the_protocol_ends_in_an_error(answer: bytes) -> None:
    with serving(says(details(), answer)) as uri, connect(uri, timeout=5) as connection:
        session = connection.go("")
        with pytest.raises((ProtocolError, ConnectionError)) as raised:
            session.read(0, 512)
        assert "\n" not in str(raised.value)


def test_an_error_of_the_server_is_an_error_of_the_system() -> None:
    with serving(says(details(), _simple(COOKIE, 28))) as uri, connect(uri, timeout=5) as connection:
        session = connection.go("")
        with pytest.raises(OSError, match="No space left") as raised:
            session.write(0, b"x")
        assert raised.value.errno == 28


@pytest.mark.parametrize("option", ["abort", "close"])
def test_leaving_a_server_that_hangs_up_is_no_error(option: str) -> None:
    with serving(says(b"")) as uri:
        connection: Connection = connect(uri, timeout=5)
        connection.abort() if option == "abort" else connection.close()


def test_plaintext_behind_the_consent_to_tls_is_refused() -> None:
    context = ssl.create_default_context()
    server = serving(says(reply(5, ACK) + reply(3, ACK), hold=True))
    with server as uri, connect(uri, timeout=2) as connection, pytest.raises((ProtocolError, ssl.SSLError)):
        connection.start_tls(context, "localhost")


# Chunks, without a server.

DATA, HOLE, STATUS, ERROR, ERROR_OFFSET = (
    *(ChunkType.OFFSET_DATA, ChunkType.OFFSET_HOLE, ChunkType.BLOCK_STATUS),
    *(ChunkType.ERROR, ChunkType.ERROR_OFFSET),
)


def data(offset: int, payload: bytes) -> bytes:
    return struct.pack(">Q", offset) + payload


def hole(offset: int, length: int) -> bytes:
    return struct.pack(">QI", offset, length)


def test_pieces_of_a_read_are_put_together_in_whatever_order_they_come() -> None:
    transaction = Transaction(Command.READ, 100, 12, 0)
    for done, kind, payload in ((0, DATA, data(108, b"dddd")), (0, HOLE, hole(104, 4)), (1, DATA, data(100, b"aaaa"))):
        transaction.take_chunk(kind, done, payload, extended=False)
    assert transaction.done
    assert transaction.data == b"aaaa" + bytes(4) + b"dddd"


@pytest.mark.parametrize(
    ("chunks", "flags"),
    [
        pytest.param([(1, DATA, data(99, b"ab"))], 0, id="before the request"),
        pytest.param([(1, DATA, data(111, b"ab"))], 0, id="behind the request"),
        pytest.param([(0, DATA, data(100, b"abcd")), (1, DATA, data(103, b"x" * 9))], 0, id="overlap"),
        pytest.param([(0, DATA, data(104, b"abcd")), (1, HOLE, hole(100, 5))], 0, id="overlap from the left"),
        pytest.param([(1, DATA, data(100, b""))], 0, id="no data"),
        pytest.param([(1, HOLE, hole(100, 0))], 0, id="an empty hole"),
        pytest.param([(1, HOLE, hole(100, 12)[:-1])], 0, id="a short hole"),
        pytest.param([(0, DATA, data(100, b"x" * 11)), (1, ChunkType.NONE, b"")], 0, id="a byte is missing"),
        pytest.param([(1, ChunkType.NONE, b"x")], 0, id="NONE with data"),
        pytest.param([(0, ChunkType.NONE, b"")], 0, id="NONE without DONE"),
        pytest.param([(1, STATUS, bytes(12))], 0, id="status of a READ"),
        pytest.param([(1, 99, b"")], 0, id="an unknown type"),
        pytest.param([(0, DATA, data(100, b"x" * 6)), (1, DATA, data(106, b"x" * 6))], CommandFlag.DF, id="fragments"),
        pytest.param([(1, ERROR, b"\0\0\0")], 0, id="a short error"),
        pytest.param([(1, ERROR, struct.pack(">IH", 0, 0))], 0, id="error 0"),
        pytest.param([(1, ERROR, struct.pack(">IH", 5, 100) + b"x")], 0, id="a text beyond the chunk"),
        pytest.param([(1, ERROR, struct.pack(">IH", 5, 1) + b"\xff")], 0, id="a text that is no UTF-8"),
        pytest.param([(1, ERROR_OFFSET, struct.pack(">IHQ", 5, 0, 112))], 0, id="an error elsewhere"),
    ],
)
def test_chunks_of_a_read_that_break_a_rule_are_refused(chunks: list[tuple[int, int, bytes]], flags: int) -> None:
    transaction = Transaction(Command.READ, 100, 12, flags)
    *before, (done, kind, payload) = chunks
    for earlier_done, earlier_kind, earlier_payload in before:
        transaction.take_chunk(earlier_kind, earlier_done, earlier_payload, extended=False)
    with pytest.raises(ProtocolError) as raised:
        transaction.take_chunk(kind, done, payload, extended=False)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("payload", "flags"),
    [
        pytest.param(struct.pack(">I", 1), 0, id="no extent"),
        pytest.param(struct.pack(">III", 1, 0, 0), 0, id="an empty extent"),
        pytest.param(struct.pack(">III", 2, 100, 0), 0, id="another context"),
        pytest.param(struct.pack(">III", 1, 1000, 0), 0, id="beyond the export"),
        pytest.param(struct.pack(">IIIII", 1, 100, 0, 1, 0), 0, id="an extent behind the request"),
        pytest.param(struct.pack(">IIIII", 1, 50, 0, 50, 0), CommandFlag.REQ_ONE, id="two for REQ_ONE"),
        pytest.param(struct.pack(">III", 1, 101, 0), CommandFlag.REQ_ONE, id="too long for REQ_ONE"),
        pytest.param(struct.pack(">IIII", 1, 50, 0, 50), 0, id="half an extent"),
    ],
)
def test_a_block_status_that_breaks_a_rule_is_refused(payload: bytes, flags: int) -> None:
    transaction = Transaction(Command.BLOCK_STATUS, 400, 100, flags, frozenset({1}), 600)
    with pytest.raises(ProtocolError):
        transaction.take_chunk(STATUS, 1, payload, extended=False)


def test_a_chunk_larger_than_any_answer_is_not_received() -> None:
    transaction = Transaction(Command.READ, 0, 512, 0)
    assert transaction.limit(DATA) == 520
    assert transaction.limit(99) == 0
    assert transaction.limit(ERROR) < 8192
    assert wire.MAXIMUM_OPTION_REPLY < 1 << 16
    assert issubclass(wire.OptionFailed, NbdqError)

"""Checks of the handshake: the hello, and how options are framed (P10-P29, P140)."""

import struct
import time
from contextlib import suppress

from nbdq.client import wire
from nbdq.client.connection import dial
from nbdq.errors import ProtocolError
from nbdq.nbd.constants import ClientFlag, HandshakeFlag, Option, OptionReply
from nbdq.probe.check import Level, check
from nbdq.probe.findings import Deviation, expect
from nbdq.probe.target import NO_EXPORT, SETTLE, Target, answer, drip, expect_in_sync, expect_reply, go, info_data

_UNKNOWN_OPTION = 0x6E62_6471
_KNOWN_FLAGS = int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)

#: Seconds within which a server should be rid of a client that says nothing.
_HANDSHAKE_DEADLINE = 60.0


@check("P10 P11 P150", Level.MUST, plain=True)
def hello(target: Target) -> None:
    """The server speaks first: two magic numbers, and the flag of fixed newstyle; no flag that nobody knows."""
    channel = dial(target.uri, timeout=target.timeout)
    try:
        flags = wire.parse_hello(channel.receive(wire.HELLO.size))
        expect(flags & HandshakeFlag.FIXED_NEWSTYLE, f"the flags are {flags:#x}: no fixed newstyle")
        expect(not flags & ~_KNOWN_FLAGS, f"the flags are {flags:#x}")
        expect(channel.silent(0.1), f"{channel.unread} bytes follow, or the end")
    finally:
        channel.close()


@check("P12", Level.MUST, plain=True)
def unknown_client_flags(target: Target) -> None:
    """A client that sets a flag which nobody knows is disconnected."""
    channel = dial(target.uri, timeout=target.timeout)
    try:
        flags = wire.parse_hello(channel.receive(wire.HELLO.size)) & _KNOWN_FLAGS
        channel.send(struct.pack(">I", flags | 1 << 31) + wire.pack_option(_UNKNOWN_OPTION))
        expect(not channel.receive(1), "the server goes on")
    except ConnectionError:
        pass  # the end came before we had said everything
    finally:
        channel.close()


@check("P13 P30", Level.MUST)
def plain_newstyle(target: Target) -> None:
    """A client that does not know fixed newstyle gets its export by EXPORT_NAME, with 124 zeroes behind it."""
    with target.connect(0) as connection:
        session = connection.export_name(target.uri.export)
        expect(session.export.size == target.size, f"a size of {session.export.size} instead of {target.size}")
        expect(session.channel.silent(0.1), "more follows than 10 and 124 bytes, or the end")


@check("P5", Level.MUST)
def options_byte_by_byte(target: Target) -> None:
    """An option may come in pieces of any size."""
    with target.connect() as connection:
        drip(connection.channel, wire.pack_option(Option.INFO, info_data(target.uri.export)))
        replies = connection.take_answer(Option.INFO)
        if replies[-1].type != OptionReply.ERR_UNSUP:
            wire.parse_details(replies[:-1])


@check("P5 P22", Level.PRACTICE)
def options_in_one_segment(target: Target) -> None:
    """Options that come at once are answered one after another."""
    with target.connect() as connection:
        options = (_UNKNOWN_OPTION, Option.LIST, Option.STRUCTURED_REPLY, _UNKNOWN_OPTION + 1)
        connection.channel.send(b"".join(wire.pack_option(option) for option in options))
        for option in options:
            connection.take_answer(option)


@check("P24 P150", Level.MUST)
def unknown_option(target: Target) -> None:
    """An option that the server does not know is answered with ERR_UNSUP, and its data is skipped."""
    with target.connect() as connection:
        for option, data in ((_UNKNOWN_OPTION, b"x" * 1000), (Option.PEEK_EXPORT, b""), (0, b"x"), (1 << 31, b"")):
            expect_reply(answer(connection, option, data), OptionReply.ERR_UNSUP)
        expect_in_sync(connection)


@check("P25", Level.PRACTICE)
def oversized_option(target: Target) -> None:
    """An option of 1 MiB is refused and skipped, or ends the connection."""
    with target.connect() as connection:
        try:
            reply = answer(connection, _UNKNOWN_OPTION, bytes(1 << 20))
        except ConnectionError:
            return
        expect_reply(reply, OptionReply.ERR_UNSUP, OptionReply.ERR_TOO_BIG, OptionReply.ERR_INVALID)
        expect_in_sync(connection)


@check("P20", Level.PRACTICE)
def wrong_option_magic(target: Target) -> None:
    """What does not begin like an option ends the connection."""
    with target.connect() as connection:
        connection.channel.send(b"IHAVEOPX" + struct.pack(">II", Option.ABORT, 0))
        said = connection.channel.wait_for_end()
        expect(OptionReply.ACK.to_bytes(4, "big") not in said, "it is taken for an option")


@check("P26 P140", Level.MUST)
def abort_is_acknowledged(target: Target) -> None:
    """ABORT is answered with ACK."""
    with target.connect() as connection:
        expect_reply(answer(connection, Option.ABORT), OptionReply.ACK)


@check("P26", Level.SHOULD)
def data_of_abort_is_ignored(target: Target) -> None:
    """ABORT may carry data, which is ignored."""
    with target.connect() as connection:
        expect_reply(answer(connection, Option.ABORT, b"good bye"), OptionReply.ACK)


@check("P26", Level.SHOULD)
def data_where_none_belongs(target: Target) -> None:
    """LIST, STRUCTURED_REPLY and EXTENDED_HEADERS with data are answered with ERR_INVALID."""
    for option in (Option.LIST, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS):
        with target.connect() as connection:
            reply = answer(connection, option, b"data")
            if reply not in (OptionReply.ERR_INVALID, OptionReply.ERR_UNSUP):
                raise Deviation(f"{option.name} with data is answered with {wire.reply_name(reply)}")
            with suppress(ConnectionError):  # the client broke a rule, and a server may end it for that
                expect_in_sync(connection)


@check("P27", Level.PRACTICE)
def inconsistent_lengths(target: Target) -> None:
    """An INFO whose inner lengths disagree with the outer one fails, and what follows is understood."""
    name = target.uri.export.encode()
    wrong = {
        "no length of the name": b"\0\0",
        "a name longer than the option": struct.pack(">I", len(name) + 100) + name + b"\0\0",
        "a name of 4 GiB": struct.pack(">I", 0xFFFF_FFFF) + name + b"\0\0",
        "no count of requests": struct.pack(">I", len(name)) + name,
        "fewer requests than it says": struct.pack(">I", len(name)) + name + b"\0\2\0\3",
        "more behind the requests": struct.pack(">I", len(name)) + name + b"\0\1\0\3xx",
    }
    for what, data in wrong.items():
        with target.connect() as connection:
            try:
                reply = answer(connection, Option.INFO, data)
                expect(reply >> 31, f"INFO with {what} is answered with {wire.reply_name(reply)}")
                expect_in_sync(connection)
            except ConnectionError:
                pass  # the client broke a rule, and a server may end it for that


@check("P27 P45", Level.MUST)
def inconsistent_lengths_of_queries(target: Target) -> None:
    """A query that is longer than the option is answered with ERR_INVALID."""
    target.need(target.contexts, "the export has no metadata contexts")
    for option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
        with target.connect() as connection:
            connection.structured_reply()
            data = wire.pack_context_request(target.uri.export, (target.contexts[0],))
            expect_reply(answer(connection, option, data[:-1]), OptionReply.ERR_INVALID)
            expect_in_sync(connection)


@check("P28 P121 P2", Level.MUST)
def texts_of_errors(target: Target) -> None:
    """What an error says is a string of at most 4096 bytes, also where it repeats a name of that length."""
    names = (NO_EXPORT, "x" * 4096, "x" + "é" * 2047)
    with target.connect() as connection:
        for name in names:
            answer(connection, Option.INFO, info_data(name))
            answer(connection, Option.LIST_META_CONTEXT, wire.pack_context_request(name, ("base:allocation",)))
        answer(connection, _UNKNOWN_OPTION)


@check("P15 P94 P141", Level.MUST)
def clients_that_leave(target: Target) -> None:
    """A client that leaves at any point of the handshake harms nobody else."""
    target.need_several()
    whole = b"\0\0\0\3" + wire.pack_option(Option.INFO, info_data(target.uri.export))
    with target.plain() as witness:
        for length in (0, 2, 4, 12, len(whole) - 1, len(whole)):
            channel = dial(target.uri, timeout=target.timeout)
            channel.receive(wire.HELLO.size)
            channel.send(whole[:length])
            channel.close()
        time.sleep(SETTLE)
        try:
            witness.ask(_UNKNOWN_OPTION)
        except (OSError, ProtocolError) as error:
            raise Deviation(f"another client notices: {error}") from None


@check("P16", Level.PRACTICE, slow=True, plain=True)
def silent_client(target: Target) -> None:
    """A client that says nothing during the handshake is disconnected within a minute."""
    channel = dial(target.uri, timeout=_HANDSHAKE_DEADLINE)
    try:
        channel.receive(wire.HELLO.size)
        begun = time.monotonic()
        expect(not channel.silent(_HANDSHAKE_DEADLINE), f"it is still connected after {_HANDSHAKE_DEADLINE:.0f} s")
        expect(time.monotonic() - begun > 1, "it is disconnected within a second")
    finally:
        channel.close()


@check("P30", Level.MUST)
def export_name(target: Target) -> None:
    """EXPORT_NAME is answered with size and flags, and with 124 zeroes unless both sides waive them."""
    for flags in (ClientFlag.FIXED_NEWSTYLE, ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES):
        with target.connect(int(flags)) as connection:
            size = connection.export_name(target.uri.export).export.size
            expect(size == target.size, f"the size is {size} instead of {target.size}")
            expect(connection.channel.silent(0.1), f"more follows than belongs there, or the end ({flags!r})")


@check("P35", Level.MUST)
def no_zeroes_behind_go(target: Target) -> None:
    """Nothing follows the ACK of GO, whatever the client said of zeroes."""
    with target.connect(int(ClientFlag.FIXED_NEWSTYLE)) as connection:
        session = go(connection, target.uri.export)
        expect(session.channel.silent(0.1), f"{session.channel.unread} bytes follow, or the end")

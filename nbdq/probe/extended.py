"""Checks of extended headers, where the server has them (P40, P120-P124); to other checks they are one more mode."""

import struct

from nbdq.client.connection import Connection
from nbdq.client.session import Session
from nbdq.client.transaction import error_name
from nbdq.client.wire import pack_option
from nbdq.nbd.constants import Command, CommandFlag, Errno, Option, OptionReply, TransmissionFlag
from nbdq.probe.check import Level, check
from nbdq.probe.findings import Deviation, expect
from nbdq.probe.target import EXTENDED, Target, answer, expect_alive, expect_error, expect_in_sync, expect_reply, go


def _agree(connection: Connection, target: Target) -> None:
    target.need(EXTENDED in target.modes, f"the server does not have {EXTENDED.name}")
    expect(connection.extended_headers(), "EXTENDED_HEADERS was accepted before, and now it is not")


@check("P24 P40", Level.MUST)
def extended_headers_or_none(target: Target) -> None:
    """EXTENDED_HEADERS is agreed to, or answered with ERR_UNSUP as any option that a server does not have."""
    with target.connect() as connection:
        expect_reply(answer(connection, Option.EXTENDED_HEADERS), OptionReply.ACK, OptionReply.ERR_UNSUP)
        expect_in_sync(connection)


@check("P40", Level.SHOULD)
def extended_headers_come_alone(target: Target) -> None:
    """EXTENDED_HEADERS is agreed to without STRUCTURED_REPLY, and then GO works and READ is answered in chunks."""
    with target.connect() as connection:
        _agree(connection, target)
        expect_alive(connection.go(target.uri.export), target)


@check("P39 P40", Level.MUST)
def extended_headers_come_first(target: Target) -> None:
    """STRUCTURED_REPLY after EXTENDED_HEADERS changes nothing; ERR_EXT_HEADER_REQD is what it is answered with."""
    with target.connect() as connection:
        _agree(connection, target)
        reply = answer(connection, Option.STRUCTURED_REPLY)
        expect_reply(reply, OptionReply.ERR_EXT_HEADER_REQD, OptionReply.ACK)
        expect_alive(connection.go(target.uri.export), target)


@check("P30 P122", Level.PRACTICE)
def no_export_name_after_extended_headers(target: Target) -> None:
    """EXPORT_NAME after EXTENDED_HEADERS ends the connection."""
    with target.connect() as connection:
        _agree(connection, target)
        connection.channel.send(pack_option(Option.EXPORT_NAME, target.uri.export.encode()))
        said = connection.channel.wait_for_end()
        expect(not said, f"it is answered with {len(said)} bytes")


@check("P123", Level.SHOULD)
def payload_of_a_command_without(target: Target) -> None:
    """A payload that does not belong to a command is skipped and answered with EINVAL."""
    with target.session(EXTENDED) as session:
        for command in (Command.READ, Command.CACHE, Command.FLUSH, 99):
            payload = bytes(min(512, session.export.size))
            transaction = session.call(command, 0, len(payload), flags=int(CommandFlag.PAYLOAD_LEN), payload=payload)
            expect_error(transaction, Errno.EINVAL)
        expect_alive(session, target)


@check("P123", Level.SHOULD)
def endless_payload(target: Target) -> None:
    """A payload of 8 GiB ends the connection."""
    with target.session(EXTENDED) as session:
        cookie = session.expect(Command.WRITE, 0, 1 << 33)
        session.channel.send(session.pack(Command.WRITE, cookie, 0, 1 << 33))
        session.channel.wait_for_end()


@check("P124", Level.SHOULD)
def huge_lengths(target: Target) -> None:
    """A length of 2^33 or 2^64 - 1 is understood as such: READ fails, and the connection goes on."""
    with target.session(EXTENDED) as session:
        for length in (1 << 33, (1 << 64) - 1):
            expect_error(session.call(Command.READ, 0, length), Errno.EINVAL, Errno.EOVERFLOW)
        expect_alive(session, target)


@check("P120", Level.MUST)
def status_of_some_contexts(target: Target) -> None:
    """BLOCK_STATUS with a list of contexts is answered for those alone."""
    target.need(target.contexts and target.size, "the export is empty, or has no metadata contexts")
    with target.session(EXTENDED, *target.contexts[:4]) as session:
        _need_payload(session, target)
        for number in session.contexts.values():
            payload = struct.pack(">QI", target.block, number)
            cookie = session.expect(Command.BLOCK_STATUS, 0, target.block, contexts=frozenset({number}))
            flags = int(CommandFlag.PAYLOAD_LEN)
            session.channel.send(
                session.pack(Command.BLOCK_STATUS, cookie, 0, len(payload), flags=flags, payload=payload)
            )
            transaction = session.receive()[1]
            expect(not transaction.error, f"it fails with {error_name(transaction.error)}")


@check("P120", Level.MUST)
def wrong_lists_of_contexts(target: Target) -> None:
    """A list with contexts that are unknown, repeated or cut short is skipped, and answered with EINVAL."""
    target.need(target.contexts and target.size, "the export is empty, or has no metadata contexts")
    with target.session(EXTENDED, *target.contexts[:4]) as session:
        number = next(iter(session.contexts.values()))
        unknown = max(session.contexts.values()) + 1
        flags = int(CommandFlag.PAYLOAD_LEN)
        head = struct.pack(">Q", target.block)
        for tail in (struct.pack(">I", unknown), struct.pack(">II", number, number), struct.pack(">IB", number, 0)):
            payload = head + tail
            transaction = session.call(Command.BLOCK_STATUS, 0, len(payload), flags=flags, payload=payload)
            expect_error(transaction, Errno.EINVAL)
        expect_alive(session, target)


@check("P120 P70", Level.SHOULD)
def lists_of_contexts_need_contexts(target: Target) -> None:
    """BLOCK_STATUS_PAYLOAD is advertised only to a client that selected metadata contexts."""
    with target.connect() as connection:
        _agree(connection, target)
        flags = go(connection, target.uri.export).export.flags
        if TransmissionFlag.BLOCK_STATUS_PAYLOAD in flags:
            raise Deviation(f"the flags are {flags!r}")


def _need_payload(session: Session, target: Target) -> None:
    advertised = TransmissionFlag.BLOCK_STATUS_PAYLOAD in session.export.flags
    target.need(advertised, "the export does not have BLOCK_STATUS_PAYLOAD")

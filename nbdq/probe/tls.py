"""Checks of STARTTLS: with ``nbd://`` of its refusal, with ``nbds://`` of TLS itself (P60-P64)."""

import ssl
import warnings
from contextlib import suppress

from nbdq.client.connection import Connection
from nbdq.client.tls import tls_context, tls_hostname
from nbdq.client.wire import option_name, pack_option, reply_name
from nbdq.nbd.constants import Command, Option, OptionReply, TransmissionFlag
from nbdq.probe.check import Level, check
from nbdq.probe.findings import Deviation, expect
from nbdq.probe.target import NO_EXPORT, STRUCTURED, Target, expect_success, info_data

_UNKNOWN_OPTION = 0x6E62_6471


def _reply(connection: Connection, option: int, data: bytes = b"") -> int:
    return connection.ask(option, data)[-1].type


@check("P64", Level.MUST, plain=True)
def tls_refused_or_not(target: Target) -> None:
    """STARTTLS is agreed to; or it is refused, and then nothing ever demands TLS."""
    with target.plain() as connection:
        reply = _reply(connection, Option.STARTTLS)
        expect(reply != OptionReply.ERR_TLS_REQD, "it is answered with ERR_TLS_REQD")
        if reply != OptionReply.ACK:
            for option, data in ((Option.LIST, b""), (Option.INFO, info_data(target.uri.export))):
                later = _reply(connection, option, data)
                expect(later != OptionReply.ERR_TLS_REQD, f"{option.name} demands TLS, which is not to be had")


@check("P60", Level.SHOULD, plain=True)
def data_of_starttls(target: Target) -> None:
    """STARTTLS with data is refused."""
    with target.plain() as connection:
        reply = _reply(connection, Option.STARTTLS, b"data")
        expect(reply >> 31, f"it is answered with {reply_name(reply)}")


@check("P64", Level.MUST, plain=True)
def tls_is_demanded_of_all_or_of_exports(target: Target) -> None:
    """Either every option but STARTTLS and ABORT demands TLS, or at most INFO and GO do.

    Of ABORT the specification says both.
    """
    with target.plain() as connection:
        forced = _reply(connection, Option.LIST) == OptionReply.ERR_TLS_REQD
        options: dict[int, bytes] = {Option.STRUCTURED_REPLY: b"", _UNKNOWN_OPTION: b"data", Option.LIST: b""}
        if forced:
            options |= {Option.INFO: info_data(target.uri.export), Option.GO: info_data(NO_EXPORT)}
        for option, data in options.items():
            reply = _reply(connection, option, data)
            demanded = reply == OptionReply.ERR_TLS_REQD
            expect(demanded == forced, f"{option_name(option)} is answered with {reply_name(reply)}")


@check("P30 P64", Level.MUST, plain=True)
def export_name_does_not_avoid_tls(target: Target) -> None:
    """Where every option demands TLS, EXPORT_NAME ends the connection."""
    with target.plain() as connection:
        forced = _reply(connection, Option.LIST) == OptionReply.ERR_TLS_REQD
        target.need(forced, "the server does not demand TLS of all")
        connection.channel.send(pack_option(Option.EXPORT_NAME, target.uri.export.encode()))
        said = connection.channel.wait_for_end()
        expect(not said, f"it is answered with {len(said)} bytes")


@check("P60 P64", Level.MUST)
def tls_within_tls(target: Target) -> None:
    """STARTTLS is answered with ERR_INVALID once there is TLS, and no option demands TLS any more."""
    target.tls()
    with target.connect() as connection:
        reply = _reply(connection, Option.STARTTLS)
        expect(reply == OptionReply.ERR_INVALID, f"it is answered with {reply_name(reply)}")
        for option, data in ((Option.LIST, b""), (Option.INFO, info_data(NO_EXPORT))):
            reply = _reply(connection, option, data)
            expect(reply != OptionReply.ERR_TLS_REQD, f"{option.name} demands TLS within TLS")


@check("P60", Level.SHOULD)
def tls_before_version_1_2(target: Target) -> None:
    """TLS older than version 1.2 is refused."""
    target.tls()
    context = tls_context(target.uri)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that is the point
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with target.plain() as connection, suppress(ConnectionError, ssl.SSLError):
        connection.start_tls(context, tls_hostname(target.uri))
        raise Deviation(f"{connection.channel.tls_version} is accepted")


@check("P61", Level.MUST)
def tls_forgets_what_was_agreed(target: Target) -> None:
    """STARTTLS voids what was agreed before: structured replies, extended headers, and metadata contexts."""
    context = target.tls()
    target.need(STRUCTURED in target.modes, "the server does not have structured replies")
    for option in (Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS):
        with target.plain() as connection:
            reply = _reply(connection, option)
            target.need(reply != OptionReply.ERR_TLS_REQD, "the server agrees to nothing before TLS")
            connection.start_tls(context, tls_hostname(target.uri))
            session = connection.go(target.uri.export)
            expect(TransmissionFlag.SEND_DF not in session.export.flags, f"{option.name} is still in force")
            expect_success(session.call(Command.READ, 0, target.block))


@check("P62", Level.MUST)
def what_is_injected_before_tls(target: Target) -> None:
    """What comes in plaintext behind STARTTLS is never taken for something said within TLS."""
    context = target.tls()
    with target.plain() as connection:
        connection.channel.send(pack_option(Option.STARTTLS) + pack_option(Option.LIST))
        try:
            connection.take_answer(Option.STARTTLS)
            connection.channel.start_tls(context, tls_hostname(target.uri))
            if connection.channel.silent(0.5):
                connection.ask(_UNKNOWN_OPTION)  # the client refuses the answer to another option
            else:
                said = connection.channel.take_unread()
                expect(not said, f"{len(said)} bytes come within TLS before anything was asked there")
        except (ConnectionError, ssl.SSLError):
            pass  # the server ends such a connection: the safest answer


@check("P63", Level.MUST)
def failed_tls(target: Target) -> None:
    """What is no TLS after STARTTLS ends the connection."""
    target.tls()
    with target.plain() as connection:
        reply = _reply(connection, Option.STARTTLS)
        expect(reply == OptionReply.ACK, f"STARTTLS is answered with {reply_name(reply)}")
        connection.channel.send(pack_option(Option.LIST) * 20)
        try:
            said = connection.channel.wait_for_end()
        except TimeoutError:
            raise Deviation(f"it is still open after {target.timeout:g} s") from None
        expect(pack_option(0)[:4] not in said and len(said) < 64, f"{len(said)} bytes are sent")

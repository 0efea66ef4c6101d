"""``-L``: what another server offers, in qemu-nbd's words."""

import io
import os
import ssl
import sys

from nbdq.cli.client_tls import psk_context
from nbdq.cli.qemu_nbd.arguments import Arguments
from nbdq.cli.qemu_nbd.places import port_number
from nbdq.client.connection import Connection, connect
from nbdq.client.wire import ExportDetails, OptionFailed, option_name
from nbdq.errors import ExportError, printable
from nbdq.nbd.constants import OptionReply, TransmissionFlag
from nbdq.nbd.uri import Uri

_TIMEOUT_SECONDS = 30.0

#: Flag → qemu-nbd's word; RESIZE is experimental, and bits are tested in ascending order.
_RESIZE = 1 << 9
_FLAGS: dict[int, str] = {
    TransmissionFlag.READ_ONLY: "readonly",
    TransmissionFlag.SEND_FLUSH: "flush",
    TransmissionFlag.SEND_FUA: "fua",
    TransmissionFlag.ROTATIONAL: "rotational",
    TransmissionFlag.SEND_TRIM: "trim",
    TransmissionFlag.SEND_WRITE_ZEROES: "zeroes",
    TransmissionFlag.SEND_DF: "df",
    TransmissionFlag.CAN_MULTI_CONN: "multi",
    _RESIZE: "resize",
    TransmissionFlag.SEND_CACHE: "cache",
    TransmissionFlag.SEND_FAST_ZERO: "fast-zero",
}


_REFUSALS: dict[int, str] = {
    OptionReply.ERR_UNSUP: "Unsupported option type",
    OptionReply.ERR_POLICY: "Denied by server for option",
    OptionReply.ERR_INVALID: "Invalid parameters for option",
    OptionReply.ERR_PLATFORM: "Server lacks support for option",
    OptionReply.ERR_TLS_REQD: "TLS negotiation required before option",
    OptionReply.ERR_SHUTDOWN: "Server shutting down before option",
}
#: OpenSSL's numbers for a certificate of another host, mail address or IP address.
_HOSTNAME_MISMATCH = (62, 63, 64)
#: And for one whose authority is none of ours.
_UNKNOWN_ISSUER = (2, 18, 19, 20, 21)


def print_exports(arguments: Arguments) -> None:
    """Print every export of the server that the options lead to.

    Raises:
        ExportError, ProtocolError, OSError: there is no server, or it does not let us in.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a server may say what the terminal has no characters for
    uri = _uri(arguments)
    credentials = arguments.credentials
    context = None
    if credentials is not None and credentials.psk:
        context = psk_context(os.path.join(credentials.directory, "keys.psk"), credentials.user)
    try:
        _print_exports(uri, context)
    except OptionFailed as error:
        raise ExportError(_failure(error)) from None
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in _HOSTNAME_MISMATCH:
            what = f"Certificate does not match the hostname {printable(uri.query.get('tls-hostname', uri.host))}"
        elif error.verify_code in _UNKNOWN_ISSUER:
            what = "The certificate hasn't got a known issuer"
        else:
            what = f"The certificate is not trusted: {error.verify_message}"
        raise ExportError(what) from None
    except ssl.SSLError as error:
        raise ExportError(f"TLS handshake failed: {error.reason or error}") from None
    except OSError as error:
        raise ExportError(f"Failed to connect to '{uri}': {error.strerror or error}") from None


def _failure(error: OptionFailed) -> str:
    """Why an option was refused, in QEMU's words, and on a line of its own in the server's."""
    what = _REFUSALS.get(error.reply, "Unknown error code when asking for option")
    text = f"{what} {error.option} ({option_name(error.option).lower().replace('_', ' ')})"
    return f"{text}\nserver reported: {printable(error.text, 4096)}" if error.text else text


def _print_exports(uri: Uri, context: ssl.SSLContext | None) -> None:
    with connect(uri, timeout=_TIMEOUT_SECONDS, tls=context) as connection:
        connection.structured_reply()
        found = connection.list()
        print(f"exports available: {len(found)}")
        for name, description in found:
            print(f" export: '{printable(name, 4096)}'")
            if description:
                print(f"  description: {printable(description, 4096)}")
            _print_details(connection, name)
        connection.abort()


def _print_details(connection: Connection, name: str) -> None:
    try:
        details: ExportDetails = connection.info(name)
    except OptionFailed:
        return  # it may be full, or gone by now
    flags = int(details.flags)
    if flags & TransmissionFlag.HAS_FLAGS:
        print(f"  size:  {details.size}")
        words = "".join(f" {word}" for flag, word in _FLAGS.items() if flags & flag)
        print(f"  flags: 0x{flags:x} ({words} )")
    if details.block_sizes is not None:
        minimum, preferred, maximum = details.block_sizes
        print(f"  min block: {minimum}\n  opt block: {preferred}\n  max block: {maximum}")
    try:
        contexts = connection.list_meta_contexts(name)
    except OptionFailed:
        contexts = []
    if contexts:
        print(f"  available meta contexts: {len(contexts)}")
        for context in contexts:
            print(f"   {printable(context, 4096)}")


def _uri(arguments: Arguments) -> Uri:
    query: dict[str, str] = {}
    credentials = arguments.credentials
    if credentials is not None and not credentials.psk:
        query["tls-certificates"] = credentials.directory
        query["tls-verify-peer"] = str(int(credentials.verify_peer))
        hostname = arguments.tls_hostname or arguments.address
        if hostname is None and credentials.verify_peer and arguments.socket is not None:
            raise ExportError("No hostname for certificate validation")
        if hostname is not None:
            query["tls-hostname"] = hostname
    secure = credentials is not None
    if arguments.socket is not None:
        return Uri(secure=secure, socket_path=arguments.socket, query=query)
    host = arguments.address or "0.0.0.0"
    return Uri(secure=secure, host=host, port=port_number(arguments.port), query=query)

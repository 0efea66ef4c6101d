"""``-L``: what another server offers, in qemu-nbd's words."""

from nbdq.cli.qemu_nbd.arguments import Arguments
from nbdq.cli.qemu_nbd.places import port_number
from nbdq.client.connection import Connection, connect
from nbdq.client.wire import ExportDetails, OptionFailed
from nbdq.errors import ExportError, printable
from nbdq.nbd.constants import TransmissionFlag
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


def print_exports(arguments: Arguments) -> None:
    """Print every export of the server that the options lead to.

    Raises:
        ExportError, OSError: there is none, or it does not let us in.
    """
    with connect(_uri(arguments), timeout=_TIMEOUT_SECONDS) as connection:
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
    if arguments.tls_creds is not None:
        credentials = arguments.objects.credentials(arguments.tls_creds, server=False)
        if credentials.psk:
            raise ExportError("Failed to get TLS creds: -L knows certificates only, no pre-shared keys")
        query["tls-certificates"] = credentials.directory
        query["tls-verify-peer"] = str(int(credentials.verify_peer))
        hostname = arguments.tls_hostname or arguments.address
        if hostname is None and credentials.verify_peer and arguments.socket is not None:
            raise ExportError("No hostname for certificate validation")
        if hostname is not None:
            query["tls-hostname"] = hostname
    secure = arguments.tls_creds is not None
    if arguments.socket is not None:
        return Uri(secure=secure, socket_path=arguments.socket, query=query)
    host = arguments.address or "0.0.0.0"
    return Uri(secure=secure, host=host, port=port_number(arguments.port), query=query)

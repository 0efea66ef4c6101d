"""URIs of exports, as ``doc/uri.md`` of the NBD project defines them (U1). Pure text: opens and resolves nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, unquote, urlsplit

from nbdq.errors import ExportError, printable
from nbdq.nbd.constants import DEFAULT_PORT, MAXIMUM_STRING

#: Scheme → whether it demands TLS, and whether it leads to a unix socket.
_SCHEMES = {
    "nbd": (False, False),
    "nbds": (True, False),
    "nbd+unix": (False, True),
    "nbds+unix": (True, True),
}


@dataclass(frozen=True, kw_only=True)
class Uri:
    """Where a client finds an export. Exactly one of ``host`` and ``socket_path`` is not empty."""

    secure: bool
    """The connection has to be encrypted, and fails if it cannot be."""
    host: str = ""
    """A name or an address, an IPv6 address without its brackets."""
    port: int = DEFAULT_PORT
    socket_path: str = ""
    """Of a unix socket; an abstract one begins with a NUL."""
    export: str = ""
    user: str = ""
    """For TLS with a pre-shared key: who the client is."""
    query: Mapping[str, str]
    """Every parameter but ``socket``, those that nobody knows among them; values of bare keys are empty."""

    def __str__(self) -> str:
        """The place without export and parameters, for messages."""
        if self.socket_path:
            return printable(self.socket_path)
        return printable(f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}")


def parse_uri(text: str) -> Uri:
    """Take a URI apart (U1).

    Raises:
        ExportError: it is none that leads to an NBD server, or the name of its export is none that NBD can carry (P2).
    """
    if not text.isprintable():
        raise _invalid(text, "it contains control characters, which have to be written as %XX")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:  # of the brackets or of the port
        raise _invalid(text, str(error)) from None
    if parts.scheme not in _SCHEMES:
        raise _invalid(text, f"it does not begin with {', '.join(f'{scheme}://' for scheme in _SCHEMES)}")
    if parts.fragment:
        raise _invalid(text, "a '#' in it has to be written as %23")
    secure, unix = _SCHEMES[parts.scheme]
    query = _parse_query(parts.query)
    socket_path = query.pop("socket", "")
    host = "" if unix else unquote(parts.hostname or "") or "localhost"
    if unix and not socket_path:
        raise _invalid(text, "it needs ?socket=PATH")
    return Uri(
        secure=secure,
        host=host,
        port=DEFAULT_PORT if port is None else port,
        socket_path=socket_path if unix else "",
        export=_parse_name(text, parts),
        user=unquote(parts.username or ""),
        query=query,
    )


def _parse_name(text: str, parts: SplitResult) -> str:
    """The path without its first slash, so that ``//disk`` means ``/disk`` (P31)."""
    try:
        name = unquote(parts.path[1:], errors="strict")
    except UnicodeDecodeError:
        raise _invalid(text, "the name of the export is not valid UTF-8") from None
    if "\0" in name or len(name.encode()) > MAXIMUM_STRING:
        raise _invalid(text, f"the name of an export has at most {MAXIMUM_STRING} bytes and no NUL")
    return name


def _parse_query(query: str) -> dict[str, str]:
    """The parameters; a plus sign is one (unlike in a form). A path is bytes, as Python's file functions take them."""
    pairs = (part.partition("=") for part in query.split("&") if part)
    return {unquote(key): unquote(value, errors="surrogateescape") for key, _, value in pairs}


def _invalid(text: str, what: str) -> ExportError:
    return ExportError(f"'{printable(text)}' is not the URI of an NBD export: {what}")


def tcp_uri(name: str, host: str, port: int = DEFAULT_PORT, *, secure: bool = False) -> str:
    """The URI of export ``name`` on a TCP listener, with TLS if ``secure``; ``host`` is a name or an address as a
    client would dial it."""
    authority = (
        f"[{quote(host, safe=':')}]" if ":" in host else quote(host)
    )  # IPv6 in brackets, zone escaped (RFC 6874)
    if port != DEFAULT_PORT:
        authority += f":{port}"
    return f"{'nbds' if secure else 'nbd'}://{authority}/{quote(name)}"


def unix_uri(name: str, socket_path: str, *, secure: bool = False) -> str:
    """The URI of export ``name`` on a unix socket, with TLS if ``secure``; an abstract socket begins with a NUL, which
    becomes ``%00``.

    ``socket_path`` should be absolute: a client resolves it in its own directory. Bytes that are no UTF-8 may be in it
    as surrogate escapes, as Python's file functions deliver them.
    """
    scheme = "nbds+unix" if secure else "nbd+unix"
    return f"{scheme}:///{quote(name)}?socket={quote(socket_path, errors='surrogateescape')}"

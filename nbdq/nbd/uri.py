"""URIs of exports, as ``doc/uri.md`` of the NBD project defines them (U1). Pure text: opens and resolves nothing."""

from urllib.parse import quote

from nbdq.nbd.constants import DEFAULT_PORT


def tcp_uri(name: str, host: str, port: int = DEFAULT_PORT) -> str:
    """The URI of export ``name`` on a TCP listener; ``host`` is a name or an address as a client would dial it."""
    authority = (
        f"[{quote(host, safe=':')}]" if ":" in host else quote(host)
    )  # IPv6 in brackets, zone escaped (RFC 6874)
    if port != DEFAULT_PORT:
        authority += f":{port}"
    return f"nbd://{authority}/{quote(name)}"


def unix_uri(name: str, socket_path: str) -> str:
    """The URI of export ``name`` on a unix socket; an abstract one begins with a NUL, which becomes ``%00``.

    ``socket_path`` should be absolute: a client resolves it in its own directory. Bytes that are no UTF-8 may be in it
    as surrogate escapes, as Python's file functions deliver them.
    """
    return f"nbd+unix:///{quote(name)}?socket={quote(socket_path, errors='surrogateescape')}"

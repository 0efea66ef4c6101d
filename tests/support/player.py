"""Carries operations out over the wire, one at a time; run by the system's interpreter, which has libnbd's binding.

Reads a list of operations as JSON from standard input and prints, for each, the errno name of its failure or "".
A read prints the checksum of what it read.
"""

import json
import sys
import zlib
from collections.abc import Callable
from typing import Any

from tests.support.operations import Operation, Verb


def play(handle: Any, operation: Operation) -> str | int:
    """Carry one operation out on a libnbd handle; the outcome is one of those of the module's docstring."""
    import nbd

    verb, offset, length = operation.verb, operation.offset, operation.length
    fua = nbd.CMD_FLAG_FUA if operation.fua else 0

    def zero(flags: int) -> None:
        handle.zero(length, offset, flags | fua | (nbd.CMD_FLAG_NO_HOLE if verb is Verb.ZERO else 0))

    calls: dict[Verb, Callable[[], Any]] = {
        Verb.WRITE: lambda: handle.pwrite(operation.payload(), offset, fua),
        Verb.BLANK: lambda: handle.pwrite(operation.payload(), offset, fua),
        Verb.ZERO: lambda: zero(0),
        Verb.UNMAP: lambda: zero(0),
        Verb.DISCARD: lambda: handle.trim(length, offset, fua),
        Verb.FLUSH: lambda: handle.flush(),
        Verb.READ: lambda: zlib.crc32(handle.pread(length, offset)),
    }
    try:
        if operation.fast and handle.can_fast_zero():
            try:
                zero(nbd.CMD_FLAG_FAST_ZERO)
                return ""
            except nbd.Error as error:
                if error.errno not in ("ENOTSUP", "EOPNOTSUPP"):
                    raise
        found = calls[verb]()
    except nbd.Error as error:
        return error.errno or error.string
    return found if verb is Verb.READ else ""


def main(server: str) -> None:
    """Connect to ``server``, a URI or a command as JSON that gets its socket from libnbd, and play."""
    import nbd

    handle = nbd.NBD()
    handle.set_strict_mode(0)  # the server is to judge, not the client
    if server.startswith("["):
        handle.connect_systemd_socket_activation(json.loads(server))
    else:
        handle.connect_uri(server)
    operations = [Operation(Verb(verb), *rest) for verb, *rest in json.load(sys.stdin)]
    print(json.dumps([play(handle, operation) for operation in operations]))
    handle.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])

"""libnbd's Python binding, which Debian makes for the system's interpreter only: scripts run there, not here."""

from pathlib import Path

from tests.support.tools import run

#: Names that every script finds. ``failure(call)`` is the (errno name, message) with which a call fails.
_PROLOGUE = """
import nbd

def failure(call):
    try:
        call()
    except nbd.Error as error:
        return error.errno, error.string
    raise AssertionError("the server let it pass")

socket = {socket!r}
data = open({data!r}, "rb").read()
h = nbd.NBD()
"""


def nbdsh(script: str, *, socket: Path, data: Path) -> str:
    """Run ``script`` with a handle ``h`` that is not connected yet, the ``socket`` and the expected ``data``."""
    prologue = _PROLOGUE.format(socket=str(socket), data=str(data))
    return run("/usr/bin/python3", "-c", prologue + script)

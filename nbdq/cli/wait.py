"""``nbdq wait``: until an export can be used, for scripts that start a server elsewhere."""

import ssl
import time

import click

from nbdq.cli.client_tls import tls_of
from nbdq.client.connection import connect
from nbdq.errors import ExportError, NbdqError, in_words, printable
from nbdq.nbd.uri import Uri, parse_uri

#: Between two attempts.
_PAUSE_SECONDS = 0.05
#: What a server that has been reached may take at least, however little of the time is left.
_ANSWER_SECONDS = 0.5


@click.command("wait")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait; 0 asks once.",
)
@click.argument("uri")
def wait_command(uri: str, timeout: float) -> None:
    """Wait until the export at URI can be used.

    That is more than a socket somebody listens on: the server says that a client may enter this very export. Says
    nothing then; else, when the time is over, why the last attempt failed, with exit status 1.
    """
    place = parse_uri(uri)
    tls = tls_of(place)
    deadline = time.monotonic() + timeout
    while (reason := _reason_against(place, tls, deadline - time.monotonic())) is not None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise ExportError(f"{printable(uri)}: cannot be used, after {timeout:g} s: {reason}")
        time.sleep(min(left, _PAUSE_SECONDS))


def _reason_against(place: Uri, tls: ssl.SSLContext | None, seconds: float) -> str | None:
    """Why the export cannot be used now; None if it can."""
    try:
        with connect(place, timeout=max(seconds, _ANSWER_SECONDS), tls=tls) as connection:
            connection.info(place.export)
            connection.abort()
    except (NbdqError, OSError) as error:
        return in_words(error)
    return None

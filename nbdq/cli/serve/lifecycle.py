"""The options of ``nbdq serve`` about the process itself: how it begins, who hears of that, and how it ends."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

import click

from nbdq.cli.options import together
from nbdq.errors import ExportError, printable

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerSettings:
    """The process."""

    pid_file: str | None = None
    """Where the process id is, while clients can connect."""
    on_stop: Literal["close", "refuse"] = "close"
    """What becomes of clients when the server stops. ``close``: their connections are closed when everything accepted
    is answered, so that those who connect again lose nothing. ``refuse``: the server will not come back, and answers
    what they still ask for with ESHUTDOWN, until they have left (P99)."""


@dataclass(frozen=True)
class StartSettings:
    """What holds for one start of a server only, and so is nothing for the configuration file."""

    fork: bool = False
    """Go on in the background when clients can connect."""
    ready_fd: int | None = None
    """A descriptor that gets a newline, and is closed, when clients can connect."""
    run: str | None = None
    """A shell command to serve; the server ends with it (captive mode)."""
    print_uri: bool | None = None
    """None: unless the output belongs to somebody else, the command or whoever opened our sockets."""


#: The options that ``server_settings`` and ``start_settings`` take.
lifecycle_options = together(
    click.option("--pid-file", type=click.Path(), help="Write the process id here once clients can connect."),
    click.option("--fork", is_flag=True, help="Return when clients can connect, and serve in the background."),
    click.option(
        "--ready-fd",
        type=click.IntRange(min=0),
        help="Write a newline to this descriptor, and close it, when clients can connect.",
    ),
    click.option(
        "--run",
        metavar="COMMAND",
        help="Serve for as long as this shell command runs, on a private unix socket unless told otherwise. It "
        "has $uri, $nbd, $unixsocket, $port and $exportname; its exit status is ours.",
    ),
    click.option(
        "--print-uri/--no-print-uri",
        default=None,
        help="Print the URI of each export when clients can connect.  [default: print, unless --run or socket "
        "activation]",
    ),
    click.option(
        "--on-stop",
        type=click.Choice(["close", "refuse"]),
        default="close",
        show_default=True,
        help="In the end close connections when everything accepted is answered, so that clients can connect "
        "again and lose nothing; or refuse requests (ESHUTDOWN) until clients leave.",
    ),
)


def server_settings(pid_file: str | None, on_stop: Literal["close", "refuse"]) -> ServerSettings:
    """What the options say."""
    return ServerSettings(pid_file, on_stop)


def start_settings(fork: bool, ready_fd: int | None, run: str | None, print_uri: bool | None) -> StartSettings:
    """What the options say.

    Raises:
        click.UsageError: they contradict each other.
    """
    if fork and run is not None:
        raise click.UsageError("--fork goes on without its caller, and --run ends with the command; choose one")
    if ready_fd is not None:
        try:
            os.set_inheritable(ready_fd, False)
        except OSError as error:
            raise click.UsageError(f"--ready-fd {ready_fd}: {error.strerror}") from None
    return StartSettings(fork, ready_fd, run, print_uri)


def tell_ready(descriptor: int) -> None:
    """Write a newline, and close ``descriptor``; whoever waits may have gone."""
    try:
        os.write(descriptor, b"\n")
    except OSError as error:
        _log.warning("cannot tell descriptor %d that clients can connect: %s", descriptor, error.strerror)
    with suppress(OSError):
        os.close(descriptor)


@contextmanager
def process_id_in(path: str | None) -> Iterator[None]:
    """Keep our process id in the file at ``path``, if there is to be one, for as long as clients can connect.

    It appears whole, and is removed only if it still holds our id and not that of a successor.

    Raises:
        ExportError: it cannot be written.
    """
    if path is None:
        yield
        return
    is_ours = write_process_id(path)
    try:
        yield
    finally:
        try:
            if is_ours and _content(path) == _line():
                os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            _log.warning("cannot remove the pid file %s: %s", printable(path), error.strerror)


def write_process_id(path: str) -> bool:
    """Write our process id to the file at ``path``, which appears whole; whether it is a file that can be removed.

    Raises:
        ExportError: it cannot be written.
    """
    try:
        return _write_whole(path, _line())
    except OSError as error:
        raise ExportError(f"cannot write the pid file {printable(path)}: {error.strerror}") from None


def _line() -> str:
    return f"{os.getpid()}\n"


def _write_whole(path: str, text: str) -> bool:
    """Whether the file is ours to remove: a pipe or a device is written to, and stays."""
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "w") as file:
            file.write(text)
        return False
    beside = f"{path}.{os.getpid()}"
    with suppress(FileNotFoundError):
        os.unlink(beside)  # it would be its owner's still, who could have the operator stop another process
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        with open(descriptor, "w") as file:
            file.write(text)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
    return True


def _content(path: str) -> str:
    with open(path, errors="replace") as file:
        return file.read(64)

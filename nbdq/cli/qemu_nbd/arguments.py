"""What a command line of qemu-nbd says, with getopt's habits: ``-kPATH``, ``--socket=PATH``, ``--sock PATH``.

click has none of QEMU's abbreviations and messages, so the standard library's getopt takes the words apart here.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from getopt import GetoptError, gnu_getopt

from nbdq.cli.qemu_nbd.objects import Credentials, Objects
from nbdq.errors import ExportError, printable
from nbdq.nbd.constants import MAXIMUM_STRING

#: Long options and their short ones; a colon follows the short option, an equals sign the long one, with an argument.
_LONG: dict[str, str] = {
    "help": "h",
    "version": "V",
    "bind=": "b:",
    "port=": "p:",
    "socket=": "k:",
    "offset=": "o:",
    "read-only": "r",
    "allocation-depth": "A",
    "bitmap=": "B:",
    "connect=": "c:",
    "disconnect": "d",
    "list": "L",
    "snapshot": "s",
    "load-snapshot=": "l:",
    "nocache": "n",
    "cache=": "",
    "aio=": "",
    "discard=": "",
    "detect-zeroes=": "",
    "shared=": "e:",
    "format=": "f:",
    "persistent": "t",
    "verbose": "v",
    "object=": "",
    "export-name=": "x:",
    "description=": "D:",
    "tls-creds=": "",
    "tls-hostname=": "",
    "tls-authz=": "",
    "image-opts": "",
    "trace=": "T:",
    "fork": "",
    "pid-file=": "",
    "selinux-label=": "",
    "handshake-limit=": "",
}
_SHORT = "".join(_LONG.values())
_LONG_OF = {f"-{short[0]}": f"--{long.rstrip('=')}" for long, short in _LONG.items() if short}

#: Cache mode → whether every write is flushed before it is answered.
_CACHE = {"none": False, "off": False, "directsync": True, "writeback": False, "unsafe": False, "writethrough": True}
_AIO = ("threads", "native", "io_uring")
_DETECT_ZEROES = ("off", "on", "unmap")
_DISCARD = {"ignore": False, "off": False, "unmap": True, "on": True}
_ONCE = {"--cache": "-n and --cache", "--aio": "--aio", "--discard": "--discard"}


class UsageError(ExportError):
    """The command line cannot be understood; who typed it is told where to look."""


@dataclass
class Arguments:
    """One call of qemu-nbd, with its defaults."""

    file: str | None = None
    lists: bool = False
    """Say what another server has."""
    help: bool = False
    version: bool = False
    # Where clients connect, and how many.
    socket: str | None = None
    address: str | None = None
    port: str | None = None
    selinux_label: str | None = None
    shared: int = 1
    """Clients at once, those that negotiate included; others wait. 0: no limit."""
    persistent: bool = False
    """Serve on when the last client has left."""
    handshake_seconds: int = 10
    """0: for ever."""
    # The export.
    name: str | None = None
    description: str | None = None
    bitmaps: list[str] = field(default_factory=list)
    allocation_depth: bool = False
    read_only: bool = False
    discard: bool = False
    detect_zeroes: str = "off"
    write_through: bool = False
    # The image.
    format: str | None = None
    image_opts: bool = False
    offset: int = 0
    snapshot: bool = False
    load_snapshot: str | None = None
    # TLS.
    objects: Objects = field(default_factory=Objects)
    tls_creds: str | None = None
    tls_hostname: str | None = None
    tls_authz: str | None = None
    credentials: Credentials | None = None
    """What ``tls_creds`` names."""
    subjects: tuple[str, ...] = ()
    """Whom ``tls_authz`` lets in; empty without it."""
    # The process.
    fork: bool = False
    pid_file: str | None = None
    verbose: bool = False
    device: bool = False
    """``-c`` or ``-d`` is given."""
    seen: set[str] = field(default_factory=set)
    """Long names of the options given."""


def parse(words: list[str]) -> Arguments:
    """Take a command line apart, without the name of the program.

    Raises:
        UsageError: it is none of qemu-nbd's.
        ExportError: a value cannot be, or options exclude each other.
    """
    try:
        options, operands = gnu_getopt(words, _SHORT, list(_LONG))
    except GetoptError as error:
        raise UsageError(_as_getopt_says(error)) from None
    arguments = Arguments()
    for option, value in options:
        option = _LONG_OF.get(option, option)
        if option == "--nocache":
            option, value = "--cache", "none"
        if option in arguments.seen and option in _ONCE:
            raise ExportError(f"{_ONCE[option]} can only be specified once")
        arguments.seen.add(option)
        _TAKERS[option](arguments, value)
        if arguments.help or arguments.version:
            return arguments
    _check(arguments, operands)
    return arguments


def _as_getopt_says(error: GetoptError) -> str:
    """The message in the words of the C library, which programs may know."""
    short = not error.msg.startswith("option --")
    name = printable(error.opt)
    option = f"-- '{name}'" if short else f"'--{name}'"
    if "not recognized" in error.msg:
        return f"invalid option {option}" if short else f"unrecognized option {option}"
    if "requires argument" in error.msg:
        return f"option requires an argument {option}" if short else f"option {option} requires an argument"
    if "must not have" in error.msg:
        return f"option {option} doesn't allow an argument"
    possible = " ".join(f"'--{name.rstrip('=')}'" for name in _LONG if name.startswith(error.opt))
    return f"option {option} is ambiguous; possibilities: {possible}"


def _check(arguments: Arguments, operands: list[str]) -> None:
    """What holds between options and operands."""
    if arguments.lists:
        if operands:
            raise ExportError("List mode is incompatible with a file name")
        if arguments.seen & _PER_DEVICE:
            raise ExportError("List mode is incompatible with per-device settings")
        if arguments.fork:
            raise ExportError("List mode is incompatible with forking")
    elif len(operands) != 1:
        raise UsageError("Invalid number of arguments")
    else:
        arguments.file = operands[0]
    if arguments.device:
        raise ExportError(
            "Kernel /dev/nbdN support not available: serve on a socket, and connect with nbd-client -unix PATH DEVICE"
        )
    if arguments.detect_zeroes == "unmap" and not arguments.discard:
        raise ExportError("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")
    if arguments.image_opts and arguments.format is not None:
        raise ExportError("--image-opts and -f are mutually exclusive")
    _check_tls(arguments)


_PER_DEVICE = {
    *("--export-name", "--description", "--offset", "--connect", "--disconnect", "--format", "--load-snapshot"),
    *("--bitmap", "--allocation-depth", "--aio", "--discard", "--cache"),
}


def _check_tls(arguments: Arguments) -> None:
    if arguments.tls_creds is None:
        if arguments.tls_authz is not None:
            raise ExportError("--tls-authz is not permitted without --tls-creds")
        if arguments.tls_hostname is not None:
            raise ExportError("--tls-hostname is not permitted without --tls-creds")
        return
    if arguments.lists and arguments.tls_authz is not None:
        raise ExportError("TLS authorization is incompatible with export list")
    if not arguments.lists and arguments.tls_hostname is not None:
        raise ExportError("TLS hostname is only supported with export list")
    arguments.credentials = arguments.objects.credentials(arguments.tls_creds, server=not arguments.lists)
    if arguments.tls_authz is not None:
        arguments.subjects = arguments.objects.subjects(arguments.tls_authz)


#: No offset and no number of clients.
_TOO_LARGE = 1 << 63


# One function for each option that does more than to note its value.


def _number(text: str, complaint: str) -> int:
    """A number as C reads it with base 0, not negative; some callers write ``-e 2`` as one word."""
    text = re.sub(r"^\s*\+?", "", text)
    if re.fullmatch(r"0[xX][0-9a-fA-F]{1,20}", text):
        value = int(text, 16)
    elif re.fullmatch(r"0[0-7]{1,25}", text):
        value = int(text, 8)
    elif re.fullmatch(r"0|[1-9][0-9]{0,20}", text):
        value = int(text)
    else:
        value = _TOO_LARGE
    if value >= _TOO_LARGE:
        raise ExportError(f"{complaint} '{printable(text)}'")
    return value


def _take_socket(arguments: Arguments, text: str) -> None:
    if not text.startswith("/"):
        raise ExportError("socket path must be absolute")
    arguments.socket = text


def _take_cache(arguments: Arguments, text: str) -> None:
    if text not in _CACHE:
        raise ExportError(f"Invalid cache mode `{printable(text)}'")
    arguments.write_through = _CACHE[text]


def _take_aio(arguments: Arguments, text: str) -> None:
    if text not in _AIO:
        raise ExportError(f"Invalid aio mode '{printable(text)}'")


def _take_discard(arguments: Arguments, text: str) -> None:
    if text not in _DISCARD:
        raise ExportError(f"Invalid discard mode `{printable(text)}'")
    arguments.discard = _DISCARD[text]


def _take_detect_zeroes(arguments: Arguments, text: str) -> None:
    if text not in _DETECT_ZEROES:
        raise ExportError(f"Failed to parse detect_zeroes mode: Invalid parameter '{printable(text)}'")
    arguments.detect_zeroes = text


def _take_load_snapshot(arguments: Arguments, text: str) -> None:
    arguments.load_snapshot = text
    arguments.read_only = True


def _take_object(arguments: Arguments, text: str) -> None:
    arguments.objects.add(text)


def _take_name(arguments: Arguments, text: str) -> None:
    arguments.name = _string(text, "name")


def _take_description(arguments: Arguments, text: str) -> None:
    arguments.description = _string(text, "description")


def _string(text: str, what: str) -> str:
    if len(text.encode(errors="surrogateescape")) > MAXIMUM_STRING:
        raise ExportError(f"export {what} '{printable(text)}' too long")
    return text


def _note(name: str) -> Callable[[Arguments, str], None]:
    """Keep the text of the option as it is."""

    def take(arguments: Arguments, text: str) -> None:
        setattr(arguments, name, text)

    return take


def _set(name: str) -> Callable[[Arguments, str], None]:
    """Note that the option is there."""

    def take(arguments: Arguments, text: str) -> None:
        setattr(arguments, name, True)

    return take


def _count(name: str, complaint: str) -> Callable[[Arguments, str], None]:
    """Keep the number that the option says."""

    def take(arguments: Arguments, text: str) -> None:
        setattr(arguments, name, _number(text, complaint))

    return take


_TAKERS: dict[str, Callable[[Arguments, str], None]] = {
    "--help": _set("help"),
    "--version": _set("version"),
    "--bind": _note("address"),
    "--port": _note("port"),
    "--socket": _take_socket,
    "--offset": _count("offset", "Invalid offset"),
    "--read-only": _set("read_only"),
    "--allocation-depth": _set("allocation_depth"),
    "--bitmap": lambda arguments, text: arguments.bitmaps.append(text),
    "--connect": _set("device"),
    "--disconnect": _set("device"),
    "--list": _set("lists"),
    "--snapshot": _set("snapshot"),
    "--load-snapshot": _take_load_snapshot,
    "--cache": _take_cache,
    "--aio": _take_aio,
    "--discard": _take_discard,
    "--detect-zeroes": _take_detect_zeroes,
    "--shared": _count("shared", "Invalid shared device number"),
    "--format": _note("format"),
    "--persistent": _set("persistent"),
    "--verbose": _set("verbose"),
    "--object": _take_object,
    "--export-name": _take_name,
    "--description": _take_description,
    "--tls-creds": _note("tls_creds"),
    "--tls-hostname": _note("tls_hostname"),
    "--tls-authz": _note("tls_authz"),
    "--image-opts": _set("image_opts"),
    "--trace": lambda arguments, text: None,
    "--fork": _set("fork"),
    "--pid-file": _note("pid_file"),
    "--selinux-label": _note("selinux_label"),
    "--handshake-limit": _count("handshake_seconds", "Invalid handshake limit"),
}

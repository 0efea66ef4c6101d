"""Options and value types that several commands share."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from nbdq.chain.policy import Policy

_Function = TypeVar("_Function", bound=Callable[..., Any])

_SUFFIXES = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50, "e": 1 << 60}


class Size(click.ParamType[int]):
    """Bytes, with qemu-img's suffixes: 65536, 64k, 1.5G."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        number, suffix = value.rstrip("bBkKmMgGtTpPeE"), value.lstrip("0123456789.").lower()
        try:
            size = int(number) if number.isdigit() else float(number)
            return int(size * _SUFFIXES[suffix])
        except (ValueError, KeyError, OverflowError):
            self.fail(f"{value!r} is not a size; write bytes or a number with a suffix of k, M, G, T, P, E", param, ctx)


class Mode(click.ParamType[int]):
    """File mode in octal."""

    name = "mode"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            mode = value if isinstance(value, int) else int(value, 8)
        except ValueError:
            mode = -1
        if not 0 <= mode <= 0o777:
            self.fail(f"{value!r} is not an octal file mode such as 0660", param, ctx)
        return mode


class Backing(click.ParamType[tuple[str, str] | None]):
    """FORMAT:PATH of one layer of an explicit chain, or ``none``."""

    name = "FORMAT:PATH|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str] | None:
        if value is None or isinstance(value, tuple) or value == "none":
            return None if value == "none" else value
        format, colon, path = value.partition(":")
        if not colon or not path or format not in ("qcow2", "raw"):
            self.fail(f"{value!r} is not qcow2:PATH, raw:PATH or none", param, ctx)
        return format, path


def together(*options: Callable[[Any], Any]) -> Callable[[_Function], _Function]:
    """One decorator for several options, which ``--help`` shows in this order."""

    def decorate(function: _Function) -> _Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


# Options that mean the same in every command that has them.
format_option = click.option(
    "-f",
    "--format",
    "format",
    type=click.Choice(["qcow2", "raw"]),
    default="qcow2",
    show_default=True,
    help="Format of IMAGE; it is never guessed.",
)
allow_backing_option = click.option(
    "--allow-backing",
    "allow_backing",
    type=click.Path(exists=True, file_okay=False),
    multiple=True,
    help="A directory that backing and data files may lie in, besides IMAGE's own.",
)
allow_data_file_option = click.option(
    "--allow-data-file", is_flag=True, help="Open external data files that headers name."
)
progress_option = click.option("-p", "--progress", is_flag=True, help="Show how far it is.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print errors only.")

#: The options that say how a chain may be opened, gathered by ``chain_arguments``.
chain_options = together(
    format_option,
    click.option(
        "--backing",
        "backing",
        type=Backing(),
        multiple=True,
        help="The layer below, in order from the top; replaces what headers say. 'none' ends the chain.",
    ),
    allow_backing_option,
    allow_data_file_option,
    click.option("-U", "--force-share", is_flag=True, help="Open even if another process writes to the image."),
)


def explicit_chain(backing: tuple[tuple[str, str] | None, ...]) -> list[tuple[str, str]] | None:
    """The layers of ``--backing``; None if the option was not given.

    Raises:
        click.UsageError: ``none`` together with layers.
    """
    if not backing:
        return None
    if None in backing and len(backing) > 1:
        raise click.UsageError("--backing none stands alone; an explicit chain ends after its last layer anyway")
    return [layer for layer in backing if layer is not None]


def chain_arguments(
    *,
    format: str,
    backing: tuple[tuple[str, str] | None, ...],
    allow_backing: tuple[str, ...],
    allow_data_file: bool,
    force_share: bool,
) -> dict[str, Any]:
    """The arguments of :func:`nbdq.chain.open.open_disk` that the chain options say."""
    policy = Policy(roots=allow_backing, allow_data_file=allow_data_file, force_share=force_share)
    return {"format": format, "backing": explicit_chain(backing), "policy": policy}

"""The limits of a server as options of ``nbdq serve``, and what of them depends on the machine."""

import difflib
import logging
import os
import resource
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click

from nbdq.cli.options import Size, together
from nbdq.errors import ExportError, printable
from nbdq.server.limits import Limits

_log = logging.getLogger(__name__)

#: All requests and replies together get no more of the memory that the process may use, unless the operator says so.
_SHARE_OF_MEMORY = 4
#: Descriptors for what may still be opened: administrators, layers of snapshots, an image that is streamed into.
_SPARE_DESCRIPTORS = 128
_LIMITS = {limit.name.replace("_", "-"): limit for limit in fields(Limits)}


def _show(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    if "help" in value:
        width = max(map(len, _LIMITS))
        for name, limit in _LIMITS.items():
            click.echo(f"{name:<{width}}  {_in_words(name, limit.default):>8}  {limit.metadata['reason']}")
        context.exit()
    return value


def _in_words(name: str, value: Any) -> str:
    if name.endswith("-bytes"):
        return f"{int(value) >> 20}M"
    return f"{value:g} s" if name.endswith("-seconds") else str(value)


#: The options that ``limits`` takes.
limit_options = together(
    click.option(
        "--limit",
        "limit",
        metavar="NAME=VALUE",
        multiple=True,
        callback=_show,
        help="Change a limit; may be repeated. --limit help tells all of them, with their reasons.",
    ),
    click.option(
        "--handshake-limit",
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        help="How long a client may take for its handshake; 0 for no limit.  [default: 10]",
    ),
    click.option(
        "--drain-seconds",
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        help="How long clients may take to get their answers when the server stops; 0: no time.  [default: 30]",
    ),
)


def limits(limit: tuple[str, ...], handshake_limit: float | None, drain_seconds: float | None) -> Limits:
    """The section ``limits``.

    Raises:
        click.UsageError: there is no such limit, or it cannot be that.
    """
    values = dict(map(_parse, limit))
    if handshake_limit is not None:
        values["handshake_seconds"] = handshake_limit
    if drain_seconds is not None:
        values["drain_seconds"] = drain_seconds
    try:
        return Limits(**values)
    except ExportError as error:
        raise click.UsageError(str(error)) from None


def _parse(word: str) -> tuple[str, Any]:
    name, _, text = word.partition("=")
    known = _LIMITS.get(name.replace("_", "-"))
    if known is None:
        close = difflib.get_close_matches(name, _LIMITS, n=1)
        text = f"did you mean {close[0]}?" if close else "--limit help tells all of them"
        raise click.UsageError(f"there is no limit {printable(name)!r}; {text}")
    try:
        if known.name.endswith("_bytes"):
            return known.name, Size().convert(text, None, None)
        return known.name, float(text) if known.name.endswith("_seconds") else int(text)
    except (ValueError, click.BadParameter):
        kind = "a size" if known.name.endswith("_bytes") else "a number"
        raise click.UsageError(f"limit {name}: {printable(text)!r} is not {kind}") from None


def fit(limits: Limits) -> Limits:
    """``limits``, with the memory of the process as the machine allows it, unless it was chosen."""
    memory = available_memory()
    default = Limits().process_bytes
    if memory is None or limits.process_bytes != default:
        return limits
    return replace(limits, process_bytes=max(1, min(default, memory // _SHARE_OF_MEMORY)))


def available_memory(cgroup: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that our control group, or one that it is part of, may use; None if none of them has a limit."""
    try:
        lines = cgroup.read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base, name = (root, "memory.max") if not controllers else (root / "memory", "memory.limit_in_bytes")
        group = base / path.lstrip("/")
        for place in (group, *group.parents):
            try:
                text = (place / name).read_text().strip()
            except OSError:  # the root has none, and a container does not see what is around it
                continue
            if text.isdigit() and int(text) < 1 << 60:  # version 1 has a huge number for no limit
                found.append(int(text))
            if place == base:
                break
    return min(found, default=None)


def raise_descriptors() -> None:
    """Allow ourselves as many open files as the administrator of the machine does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check_descriptors(limits: Limits) -> None:
    """Say so in the log if there are not enough file descriptors for all clients that may come. Everything is open that
    the server has open without them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + limits.connections + limits.pending_handshakes + _SPARE_DESCRIPTORS
    if hard != resource.RLIM_INFINITY and needed > hard:
        _log.warning(
            "%d open files may be needed, and only %d are allowed; raise the limit (ulimit -Hn, LimitNOFILE=), "
            "or lower the limit of connections",
            needed,
            hard,
        )

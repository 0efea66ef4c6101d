"""What ``nbdq ctl`` prints: results and events, for people or programs."""

import json
import time
from typing import Any

import click

from nbdq.errors import printable

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def show(value: Any, *, as_json: bool) -> None:
    """Print what a command returned; nothing, if it returned nothing."""
    if as_json:
        click.echo(json.dumps(value, indent=2))
    elif isinstance(value, list) and value and all(map(_is_flat, value)):
        show_table(value, list(dict.fromkeys(name for row in value for name in row)))
    elif isinstance(value, dict) and _is_flat(value):
        for name, member in value.items():
            click.echo(f"{name}: {_cell(member)}")
    elif value not in ({}, [], None):
        click.echo(json.dumps(value, indent=2))


def show_table(rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Print rows below each other; what a row does not have stays empty."""
    cells = [[_cell(row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[index]) for line in [columns, *cells]) for index in range(len(columns))]
    for line in [[name.removeprefix("x-nbdq-").upper() for name in columns], *cells]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def size_text(size: float) -> str:
    """Bytes in the largest unit that leaves something before the point."""
    unit = 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.3g} {_UNITS[unit]}" if unit and size < 100 else f"{size:.0f} {_UNITS[unit]}"


def event_text(event: dict[str, Any]) -> str:
    """One line about an event, with the local time."""
    stamp = event["timestamp"]
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stamp["seconds"]))
    data = " ".join(f"{name}={_cell(value)}" for name, value in event.get("data", {}).items())
    return f"{moment}.{stamp['microseconds'] // 1000:03} {event['event']} {data}".rstrip()


def _is_flat(value: Any) -> bool:
    return isinstance(value, dict) and not any(isinstance(member, dict | list) and member for member in value.values())


def _cell(value: Any) -> str:
    if value is None or value in ({}, []):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable(value if isinstance(value, str) else json.dumps(value), 1000)

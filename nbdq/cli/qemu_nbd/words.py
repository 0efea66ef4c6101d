"""QEMU's lists of options, ``name=value,…``, as ``--object``, ``--image-opts`` and ``json:`` have them."""

import json
from typing import Any

from nbdq.errors import ExportError, printable

_BOOLEANS = {
    **dict.fromkeys(("on", "yes", "true", "y"), True),
    **dict.fromkeys(("off", "no", "false", "n"), False),
}


def parse_list(text: str, *, first: str) -> dict[str, str]:
    """The values of a list by their names; two commas stand for one that belongs to a value. Of several with one name
    the last counts. The first word may be a value of ``first``; another one without a value means ``on``."""
    values: dict[str, str] = {}
    for number, word in enumerate(text.replace(",,", "\0").split(",")):  # no argument contains a NUL
        name, equals, value = word.replace("\0", ",").partition("=")
        if equals:
            values[name] = value
        elif number == 0:
            values[first] = name
        elif name:
            values[name] = "on"
    return values


def parse_json(text: str) -> dict[str, str]:
    """A JSON object in the same form: members of members get names with dots, elements of lists their numbers.

    Raises:
        ExportError: it is no object.
    """
    try:
        value = json.loads(text)
        if isinstance(value, dict):
            return dict(_flat(value, ""))
    except (ValueError, RecursionError):
        pass
    raise ExportError(f"Could not parse the JSON options {printable(text)!r}")


def _flat(value: Any, name: str) -> list[tuple[str, str]]:
    if isinstance(value, dict | list):
        prefix = f"{name}." if name else ""
        members = value.items() if isinstance(value, dict) else enumerate(value)
        return [pair for key, member in members for pair in _flat(member, f"{prefix}{key}")]
    if isinstance(value, bool):
        return [(name, "on" if value else "off")]
    return [(name, "" if value is None else str(value))]


def boolean(name: str, text: str) -> bool:
    """On or off, in any of QEMU's words.

    Raises:
        ExportError: in none of them.
    """
    if text not in _BOOLEANS:
        raise ExportError(f"Parameter '{name}' expects 'on' or 'off'")
    return _BOOLEANS[text]

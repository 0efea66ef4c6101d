"""Lists of options as qemu-img takes them, ``-o name=value,...``: parsed, explained, and named in errors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import click

from nbdq.cli.options import Size
from nbdq.errors import NbdqError, printable

#: What ``compat`` says, as versions of the format.
VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_BOOLEANS = {
    **dict.fromkeys(("on", "yes", "true", "y"), True),
    **dict.fromkeys(("off", "no", "false", "n"), False),
}


def size_value(text: str) -> int:
    """Bytes, with a suffix of k, M, G, … or without."""
    try:
        size = Size().convert(text, None, None)
    except click.BadParameter as error:
        raise NbdqError(error.message) from None
    if size < 0:
        raise NbdqError(f"{printable(text)!r} is negative")
    return size


def number(text: str) -> int:
    """An integer, as a programmer writes it."""
    try:
        return int(text, 0)
    except ValueError:
        raise NbdqError(f"{printable(text)!r} is not a number") from None


def one_of(choices: dict[str, Any]) -> Callable[[str], Any]:
    """The value that a word stands for."""

    def choose(text: str) -> Any:
        if text not in choices:
            raise NbdqError(f"{printable(text)!r} is none of {', '.join(choices)}")
        return choices[text]

    return choose


def boolean(text: str) -> bool:
    """On or off, in any of QEMU's words."""
    if text not in _BOOLEANS:
        raise NbdqError(f"{printable(text)!r} is neither on nor off")
    return _BOOLEANS[text]


@dataclass(frozen=True)
class Option:
    """One name that ``-o`` takes; ``kind`` is its type in the words of qemu-img's help."""

    kind: str
    parse: Callable[[str], Any]
    help: str
    default: str | None = None
    """What is announced where nothing is said; as qemu-img, which does not do that for all options."""


def split_options(lists: tuple[str, ...]) -> list[str]:
    """The single words of all ``-o`` lists; two commas stand for one that belongs to a value."""
    words: list[str] = []
    for text in lists:
        parts = text.replace(",,", "\0").split(",")  # no argument contains a NUL
        if not all(parts):
            raise NbdqError(f"invalid option list {printable(text)!r}: there is nothing before or after a comma")
        words += (part.replace("\0", ",") for part in parts)
    return words


def parse_options(
    words: list[str], options: Mapping[str, Option], unknown: Callable[[str], NbdqError]
) -> tuple[dict[str, str], dict[str, Any]]:
    """What every option says, as text and as value; of several with one name the last one counts.

    Raises:
        NbdqError: a value cannot be; what ``unknown`` returns for a name that is not one of ``options``.
    """
    texts, values = {}, {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:  # a boolean by itself, or with "no" before it
            text = "on"
            if name not in options and name.startswith("no"):
                name, text = name[2:], "off"
        option = options.get(name)
        if option is None:
            raise unknown(name)
        if not equals and not option.kind.startswith("bool"):
            raise NbdqError(f"{name} needs a value: {name}=...")
        texts[name], values[name] = text, parse_option(name, option, text)
    return texts, values


def parse_option(name: str, option: Option, text: str) -> Any:
    """The value of one option; an error begins with its name."""
    try:
        return option.parse(text)
    except NbdqError as error:
        raise NbdqError(f"{name}: {error}") from None


def print_options(title: str, options: Mapping[str, Option]) -> None:
    """What ``-o help`` shows."""
    print(title)
    for name, option in sorted(options.items()):
        print(f"  {f'{name}=<{option.kind}>':<22} - {option.help}")

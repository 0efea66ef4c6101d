"""Tables of a configuration file become dataclasses; what is wrong with them is gathered, so that one run tells all.

The dataclass is the schema: field ``a_b`` is the key ``a-b``, and must be given if it has no default. Types may be str,
bool, int, float, Literal, tuples and other dataclasses. ``Annotated`` with a click type means that strings are read as
an option of that type is; numbers of bytes, which are known by their names, are read as sizes such as ``"64M"``.
"""

import difflib
import math
import types
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import click

from nbdq.cli.options import Size
from nbdq.errors import NbdqError, printable

_Kind = TypeVar("_Kind")


def key_of(field: str) -> str:
    """How a field is called in the file."""
    return field.rstrip("_").replace("_", "-")


class Problems(list[str]):
    """What is wrong, one line each, with its place."""

    def add(self, where: str, what: str) -> None:
        """``where`` names a section or key."""
        self.append(f"{where}: {what}" if where else what)


@cache
def keys_of(kind: Any) -> dict[str, tuple[Field[Any], Any]]:
    """The keys of a section: its fields, and their types as annotated."""
    hints = get_type_hints(kind, include_extras=True)
    return {key_of(field.name): (field, hints[field.name]) for field in fields(kind)}


def read_table(kind: type[_Kind], table: Any, where: str, problems: Problems) -> _Kind | None:
    """An instance of the dataclass ``kind``; None if something is wrong, which ``problems`` say then."""
    if not isinstance(table, dict):
        problems.add(where, f"is {_kind_of(table)}, but must be a table")
        return None
    keys = keys_of(cast(Any, kind))
    before = len(problems)
    for key in table:
        if key not in keys:
            problems.add(where, f"unknown key {printable(key)!r}{_suggestion(key, keys)}")
    values = {}
    for key, (field, annotation) in keys.items():
        if key in table:
            values[field.name] = read_value(annotation, table[key], f"{where}: {key}" if where else key, problems)
        elif field.default is MISSING and field.default_factory is MISSING:
            problems.add(where, f"{key} is missing")
    if len(problems) > before:
        return None
    try:
        return kind(**values)
    except NbdqError as error:
        problems.add(where, str(error))
        return None


def read_value(annotation: Any, value: Any, where: str, problems: Problems) -> Any:
    """``value`` as the annotation of the field at ``where`` wants it."""
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (each for each in get_args(annotation) if each is not type(None))
    reader = None
    if get_origin(annotation) is Annotated:
        annotation, reader = get_args(annotation)
    if get_origin(annotation) is tuple and not _is_reader_of_tuples(annotation):
        return _read_items(annotation, reader, value, where, problems)
    if reader is None and annotation in (int, float) and where.endswith("bytes"):
        reader = Size()
    if reader is not None and isinstance(value, str):
        return _converted(reader, value, where, problems)
    if is_dataclass(annotation) and isinstance(annotation, type):
        return read_table(annotation, value, where, problems)
    return _checked(annotation, value, where, problems)


def _is_reader_of_tuples(annotation: Any) -> bool:
    """Whether it is a tuple of so many items, which a click type makes of a string."""
    return get_args(annotation)[-1] is not Ellipsis


def _read_items(annotation: Any, reader: Any, value: Any, where: str, problems: Problems) -> Any:
    if not isinstance(value, list):
        problems.add(where, f"is {_kind_of(value)}, but must be a list")
        return None
    (item, _) = get_args(annotation)
    if reader is not None:
        item = Annotated[item, reader]
    tables = is_dataclass(item)
    return tuple(
        read_value(item, each, place_of(where, number, _name_of(each)) if tables else where, problems)
        for number, each in enumerate(value, 1)
    )


def place_of(section: str, number: int, name: str | None) -> str:
    """One of several tables, such as ``export 2 ("vm")``."""
    return f"{section} {number}" + (f' ("{printable(name)}")' if name is not None else "")


def _name_of(table: Any) -> str | None:
    if not isinstance(table, dict):
        return None
    return next((table[key] for key in ("name", "image", "path", "socket") if isinstance(table.get(key), str)), None)


def _converted(reader: click.ParamType[Any], value: str, where: str, problems: Problems) -> Any:
    try:
        return _within_64_bits(reader.convert(value, None, None), where, problems)
    except click.BadParameter as error:
        problems.add(where, error.message)
        return None


def _within_64_bits(value: Any, where: str, problems: Problems) -> Any:
    if isinstance(value, int) and abs(value) >= 1 << 63:
        problems.add(where, "does not fit into 64 bits")
        return 0
    return value


def _checked(annotation: Any, value: Any, where: str, problems: Problems) -> Any:
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        if value not in choices:
            wanted = " or ".join(map(repr, choices))
            problems.add(where, f"is {printable(repr(value))}, but must be {wanted}{_suggestion(value, choices)}")
        return value
    value = _within_64_bits(value, where, problems)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, annotation) or (annotation is int and isinstance(value, bool)):
        problems.add(where, f"is {_kind_of(value)}, but must be {_WORDS.get(annotation, 'a table')}")
    elif annotation is str and "\0" in value:
        problems.add(where, "contains a NUL character")
    elif annotation is float and not math.isfinite(value):
        problems.add(where, "must be finite")
    elif annotation in (int, float) and value < 0:
        problems.add(where, "must not be negative")
    return value


_WORDS: dict[Any, str] = {
    str: "a string",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "a table",
    list: "a list",
}


def _kind_of(value: Any) -> str:
    return _WORDS.get(type(value), "a date or time")


def _suggestion(word: Any, known: Any) -> str:
    if not isinstance(word, str):
        return ""
    close: Sequence[str] = difflib.get_close_matches(word.replace("_", "-"), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""

"""Checked arguments: JSON members become an instance of a dataclass, or an error that names the member.

The dataclass is the whole schema. Field ``a_b`` is ``a-b`` on the wire, a trailing ``_`` (``from_``) is dropped, and
fields without a default must be given. Types may be str, int, bool, float, list, dict, Literal, other dataclasses, and
unions of these with each other and None. The words are QEMU's where QEMU refuses the same.
"""

import types
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from nbdq.errors import OperationError, printable

_Kind = TypeVar("_Kind")
#: Field → its name on the wire, its type, whether it must be given.
_Schema = dict[str, tuple[str, Any, bool]]
#: Integers on the wire have 64 bits, and are taken for offsets and sizes.
_INTEGERS = range(-(1 << 63), 1 << 64)


class InvalidArguments(OperationError):
    """The arguments do not fit the command; nothing was done."""


def wire_name(field: str) -> str:
    """How a field of an argument class is called on the wire."""
    return field.rstrip("_").replace("_", "-")


def parse(kind: type[_Kind], members: Any, where: str = "", *, spell: Callable[[str], str] = wire_name) -> _Kind:
    """An instance of the dataclass ``kind`` from a JSON object.

    ``where`` is its own name, for errors; ``spell`` says how fields are called there. Lists and dictionaries are the
    caller's own objects or copies of them.

    Raises:
        InvalidArguments: a member is missing, unknown, or of another type.
    """
    if not isinstance(members, dict):
        raise _wrong_type(where or "arguments", "object")
    prefix = f"{where}." if where else ""
    values = {}
    known = set()
    schema: _Schema = _schema(cast(Any, kind), spell)
    for name, (member, annotation, required) in schema.items():
        known.add(member)
        if member in members:
            values[name] = _checked(annotation, members[member], prefix + member, spell)
        elif required:
            raise InvalidArguments(f"Parameter '{prefix}{member}' is missing")
    for member in members:
        if member not in known:
            raise InvalidArguments(f"Parameter '{prefix}{printable(str(member))}' is unexpected")
    return kind(**values)


def describe(kind: Any) -> list[dict[str, Any]]:
    """The members of an argument class for clients: name, type in words, whether required, default, members."""
    found = []
    for field in fields(kind):
        member, annotation, required = _schema(kind, wire_name)[field.name]
        entry: dict[str, Any] = {"name": member, "type": _type_name(annotation), "required": required}
        if not required and field.default is not MISSING and field.default is not None:
            entry["default"] = field.default
        choices = _choices(annotation)
        if choices:
            entry["values"] = choices
        nested = [kind for kind in _alternatives(annotation) if is_dataclass(kind)]
        if nested:
            entry["members"] = describe(nested[0])
        found.append(entry)
    return found


@cache
def _schema(kind: Any, spell: Callable[[str], str]) -> _Schema:
    hints = get_type_hints(kind)
    return {
        field.name: (
            spell(field.name),
            hints[field.name],
            field.default is MISSING and field.default_factory is MISSING,
        )
        for field in fields(kind)
    }


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types of which a value may be; None is no value."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for kind in get_args(annotation) if kind is not type(None))
    return (annotation,)


def _choices(annotation: Any) -> list[Any]:
    return [value for kind in _alternatives(annotation) if get_origin(kind) is Literal for value in get_args(kind)]


def _checked(annotation: Any, value: Any, where: str, spell: Callable[[str], str]) -> Any:
    """``value`` as the annotation wants it. A JSON null is as good as nothing where None is allowed."""
    kinds = _alternatives(annotation)
    if value is None and type(None) in get_args(annotation):
        return None
    for kind in kinds:
        if _json_type_fits(kind, value):
            return _converted(kind, value, where, spell)
    raise _wrong_type(where, " or ".join(_type_name(kind) for kind in kinds))


def _json_type_fits(kind: Any, value: Any) -> bool:
    origin = get_origin(kind) or kind
    if origin is Any:
        return True
    if origin is Literal:
        return isinstance(value, str)
    if origin is dict or is_dataclass(origin):
        return isinstance(value, dict)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin)


def _converted(kind: Any, value: Any, where: str, spell: Callable[[str], str]) -> Any:
    origin = get_origin(kind) or kind
    if origin is Literal and value not in get_args(kind):
        raise InvalidArguments(f"Parameter '{where}' does not accept value '{printable(value)}'")
    if isinstance(value, str):
        _check_text(value, where)
    elif origin is int and value not in _INTEGERS:
        raise InvalidArguments(f"Parameter '{where}' does not fit into 64 bits")
    elif origin is list and get_args(kind):
        return [_checked(get_args(kind)[0], item, f"{where}[{index}]", spell) for index, item in enumerate(value)]
    elif origin is dict and get_args(kind):
        return {
            key: _checked(get_args(kind)[1], item, f"{where}.{printable(key)}", spell) for key, item in value.items()
        }
    elif is_dataclass(origin):
        return parse(cast(type[Any], origin), value, where, spell=spell)
    return value


def _check_text(value: str, where: str) -> None:
    """Strings become file names, in which neither of these can stand; bytes that are no UTF-8 are U+DC80 to U+DCFF."""
    if "\0" in value:
        raise InvalidArguments(f"Parameter '{where}' contains a NUL character")
    try:
        value.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        raise InvalidArguments(f"Parameter '{where}' is not valid Unicode") from None


def _wrong_type(where: str, expected: str) -> InvalidArguments:
    return InvalidArguments(f"Invalid parameter type for '{where}', expected: {expected}")


def _type_name(annotation: Any) -> str:
    """The JSON type in QEMU's words."""
    names = {str: "string", int: "integer", bool: "boolean", float: "number", list: "array", Literal: "string"}
    kinds = _alternatives(annotation)
    return " or ".join(dict.fromkeys(names.get(get_origin(kind) or kind, "object") for kind in kinds))

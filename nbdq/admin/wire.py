"""QMP as bytes: requests cut out of a stream and read with care, replies and events made. Knows no sockets.

As in QEMU, a request is one JSON object wherever it begins and ends; line breaks mean nothing, but a control character
(or 0xFF) forgets what was begun (qmp-spec 2.6). A request is bounded before anything looks at it (R-43).
"""

import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nbdq import __version__
from nbdq.errors import NbdqError, printable

#: Bytes of one request, nesting of its objects and lists, and how many brackets and strings it may have.
REQUEST_MAX = 1 << 20
_DEPTH_MAX = 32
_TOKENS_MAX = 1 << 16
#: What matters outside of strings and inside; control characters belong to neither.
_OUTSIDE = re.compile(rb'["{}\[\]\x00-\x08\x0b\x0c\x0e-\x1f\xff]')
_INSIDE = re.compile(rb'["\x00-\x1f\xff]|\\[^\x00-\x1f\xff]?')
_BLANKS = re.compile(rb"[ \t\r\n]*")
#: What stands between requests and should not: as much as is one mistake.
_STRAY = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\xff]+|[^\n\x00-\x08\x0b\x0c\x0e-\x1f\xff]+")
_OPENING, _CLOSING = (b"{", b"["), (b"}", b"]")

#: The level of QEMU whose commands are offered.
VERSION = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": f"nbdq {__version__}"}

GENERIC_ERROR = "GenericError"
COMMAND_NOT_FOUND = "CommandNotFound"
DEVICE_NOT_FOUND = "DeviceNotFound"
DEVICE_NOT_ACTIVE = "DeviceNotActive"


class TooLarge(NbdqError):
    """A request exceeds the bounds; the connection is of no further use."""


@dataclass(frozen=True)
class Request:
    """A command that a client wants executed."""

    command: str
    arguments: dict[str, Any]
    tag: dict[str, Any]
    """Its ``id``, to be returned with the answer; empty if there was none."""


@dataclass(frozen=True)
class BadRequest:
    """Something that is no request; to be answered with the error ``text``."""

    text: str
    tag: dict[str, Any]


class Parser:
    """Cuts a stream of bytes into requests."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scanned = 0  # so far everything is known
        self._in_string = False
        self._depth = 0
        self._tokens = 0

    def feed(self, data: bytes) -> Iterator[Request | BadRequest]:
        """Everything that is complete with ``data``.

        Raises:
            TooLarge: the request at hand is longer, deeper or more complex than any that makes sense.
        """
        self._buffer += data
        while True:
            text = self._next_object()
            if isinstance(text, bytes):
                yield read_request(text)
            elif text is not None:
                yield text
            else:
                return

    def _next_object(self) -> bytes | BadRequest | None:
        """The next complete object, or what stands in the place of one; None: more has to come."""
        buffer = self._buffer
        if self._scanned == 0:
            blank = _BLANKS.match(buffer)
            assert blank is not None  # it matches nothing, too
            del buffer[: blank.end()]
            if buffer and buffer[0] != ord("{"):
                stray = _STRAY.match(buffer)
                assert stray is not None  # it matches everything that is not blank
                return self._stray(0, stray.end())
        while token := (_INSIDE if self._in_string else _OUTSIDE).search(buffer, self._scanned):
            kind = token[0]
            if kind == b"\\":
                if token.end() < len(buffer):
                    return self._stray(token.start(), token.end() + 1)
                break  # what it escapes has not come yet
            self._scanned = token.end()
            if kind == b'"':
                self._in_string = not self._in_string
                self._count_token()
            elif kind in _OPENING:
                self._depth += 1
                self._count_token()
            elif kind in _CLOSING:
                self._depth -= 1
                if self._depth == 0:
                    return self._take(self._scanned)
            elif not kind.startswith(b"\\"):
                return self._stray(token.start(), token.end())
        else:
            self._scanned = len(buffer)
        self._check_length(len(buffer))
        return None

    def _count_token(self) -> None:
        self._tokens += 1
        if self._tokens > _TOKENS_MAX:
            raise TooLarge(f"a request has more than {_TOKENS_MAX} parts")
        if self._depth > _DEPTH_MAX:
            raise TooLarge(f"a request is nested more than {_DEPTH_MAX} deep")

    @staticmethod
    def _check_length(length: int) -> None:
        if length > REQUEST_MAX:
            raise TooLarge(f"a request is longer than {REQUEST_MAX} bytes")

    def _stray(self, start: int, end: int) -> BadRequest:
        """Forget everything up to ``end``; what begins at ``start`` is the reason."""
        shown = printable(bytes(self._buffer[start:end][:40]).rstrip())
        self._take(end)
        return BadRequest(f"JSON parse error, stray '{shown}'", {})

    def _take(self, end: int) -> bytes:
        self._check_length(end)
        text = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._scanned = self._depth = self._tokens = 0
        self._in_string = False
        return text


def read_request(text: bytes) -> Request | BadRequest:
    """The request in one JSON object of bounded size and depth."""
    try:
        members = json.loads(
            text.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        return BadRequest(f"JSON parse error, {printable(str(error))}", {})
    tag = {"id": members["id"]} if "id" in members else {}
    command, arguments = members.get("execute"), members.get("arguments", {})
    unknown = next((name for name in members if name not in ("execute", "arguments", "id")), None)
    if unknown is not None:
        return BadRequest(f"QMP input member '{printable(unknown)}' is unexpected", tag)
    if command is None:
        return BadRequest("QMP input lacks member 'execute'", tag)
    if not isinstance(command, str):
        return BadRequest("QMP input member 'execute' must be a string", tag)
    if not isinstance(arguments, dict):
        return BadRequest("QMP input member 'arguments' must be an object", tag)
    return Request(command, arguments, tag)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("an object has two members of one name")
    return members


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def greeting() -> bytes:
    """The first thing that a client gets."""
    return _line({"QMP": {"version": VERSION, "capabilities": []}})


def answer(value: Any, tag: dict[str, Any]) -> bytes:
    """A command succeeded."""
    return _line({"return": {} if value is None else value, **tag})


def error(kind: str, text: str, tag: dict[str, Any]) -> bytes:
    """A command failed: ``kind`` is one of QEMU's error classes."""
    return _line({"error": {"class": kind, "desc": text}, **tag})


def event(name: str, data: dict[str, Any]) -> bytes:
    """Something happened, now."""
    microseconds = time.time_ns() // 1000
    stamp = {"seconds": microseconds // 1_000_000, "microseconds": microseconds % 1_000_000}
    return _line({"timestamp": stamp, "event": name, "data": data})


def _line(members: dict[str, Any]) -> bytes:
    return json.dumps(members).encode("ascii") + b"\r\n"

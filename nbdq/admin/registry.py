"""The commands of the admin socket: each a name, a dataclass of its arguments, and a coroutine.

What clients send is checked against the dataclass before the coroutine sees it (:mod:`nbdq.admin.arguments`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from nbdq.admin.context import Context

Reply = dict[str, Any] | list[Any] | None
"""What a command returns; None is sent as the empty object."""

_Arguments = TypeVar("_Arguments")


@dataclass(frozen=True)
class NoArguments:
    """For commands that take none."""


@dataclass(frozen=True)
class Command:
    """One command that clients can execute."""

    name: str
    arguments: type[Any]
    run: Callable[[Context, Any], Awaitable[Reply]]
    changes: bool
    """Whether it changes something, and so is logged with the peer's user id (R-43)."""

    @property
    def help(self) -> str:
        """What it does, for people."""
        return (self.run.__doc__ or "").strip()


COMMANDS: dict[str, Command] = {}
"""All commands by name, filled while :mod:`nbdq.admin.commands` is imported."""


def command(
    name: str, arguments: type[_Arguments], *, changes: bool | None = None
) -> Callable[[Callable[[Context, _Arguments], Awaitable[Reply]]], Callable[[Context, _Arguments], Awaitable[Reply]]]:
    """Offer the decorated coroutine as ``name``; it gets ``arguments``, checked.

    What it raises of OperationError, ImageError and OSError becomes the client's error (NotFound: of class
    DeviceNotFound). ``changes`` is true unless the name says that it only asks (``query-…``).
    """

    def register(
        run: Callable[[Context, _Arguments], Awaitable[Reply]],
    ) -> Callable[[Context, _Arguments], Awaitable[Reply]]:
        assert name not in COMMANDS, f"two commands are named {name}"
        asks = name.startswith("query-")
        COMMANDS[name] = Command(name, arguments, run, not asks if changes is None else changes)
        return run

    return register


def known_commands() -> dict[str, Command]:
    """All commands by name. The first call imports them, which a server without administrators need not wait for."""
    import_module("nbdq.admin.commands")
    return COMMANDS

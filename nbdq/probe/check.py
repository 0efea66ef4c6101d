"""What a check is: one rule of the protocol, and a function that finds out whether a server keeps it.

A check is a function of a :class:`Target`; the first sentence of its docstring is the rule. It returns if the server
keeps it, and otherwise raises :class:`~nbdq.probe.findings.Deviation`, or lets the client's ``ProtocolError`` and
``OSError`` say it.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from nbdq.probe.target import Target


class Level(Enum):
    """How binding a rule is, and so how bad it is not to keep it."""

    MUST = "MUST"
    SHOULD = "SHOULD"
    PRACTICE = "practice"
    """Not in the specification: what clients rely on, or what keeps a server safe from them."""


@dataclass(frozen=True)
class Check:
    """One rule and its test."""

    items: tuple[str, ...]
    """Numbers of the rules in nbdq's checklist of the protocol."""
    level: Level
    function: Callable[[Target], None]
    writes: bool
    """It changes what the export contains, or might if the server is wrong."""
    slow: bool
    """It waits for what a server does only after a long time."""
    plain: bool
    """It needs no export, and says something of a server that demands TLS, too."""

    @property
    def name(self) -> str:
        return self.function.__name__.replace("_", "-")

    @property
    def rule(self) -> str:
        """What is required, in one sentence."""
        return " ".join((inspect.getdoc(self.function) or "").partition("\n\n")[0].split())


#: Every check; ``run`` puts them in order.
CHECKS: Final[list[Check]] = []


def check(
    items: str, level: Level, *, writes: bool = False, slow: bool = False, plain: bool = False
) -> Callable[[Callable[[Target], None]], Callable[[Target], None]]:
    """Make a function a check of the rules ``items``, which are separated by spaces."""

    def register(function: Callable[[Target], None]) -> Callable[[Target], None]:
        CHECKS.append(Check(tuple(items.split()), level, function, writes, slow, plain))
        return function

    return register

"""Run the checks against one target, whatever the server does to them."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from nbdq.client.wire import OptionFailed
from nbdq.errors import ProtocolError, in_words, printable
from nbdq.nbd.constants import OptionReply
from nbdq.probe import contexts, exports, extended, handshake, requests, tls, writes
from nbdq.probe.check import CHECKS, Check, Level
from nbdq.probe.findings import Deviation, NotApplicable
from nbdq.probe.target import Target

#: The modules whose import has registered the checks, in the order in which those are run: from the first thing that a
#: server says to what it is told to change.
_SUBJECTS = (handshake, exports, tls, requests, contexts, extended, writes)
CHECKS.sort(key=lambda check: [subject.__name__ for subject in _SUBJECTS].index(check.function.__module__))

#: Seconds that a server has to come back, in case that somebody restarts it.
_RETURN = 3.0

GONE = "the server no longer accepts connections"
CAME_BACK = "the server stopped accepting connections, and came back"


class Verdict(Enum):
    """What a check has found."""

    OK = "ok"
    DEVIATES = "deviates"
    NOT_APPLICABLE = "not applicable"
    NOT_TESTED = "not tested"


@dataclass(frozen=True)
class Result:
    """One check and what it has found."""

    check: Check
    verdict: Verdict
    observed: str
    """What the server did instead, or why nothing was tested; empty if all is well."""
    level: Level
    """That of the check, or MUST if the server broke a rule that always holds: one of the form of replies, or, by going
    away, that connections are ended by clients, or for a fault of their own (P141)."""


def select(items: Sequence[str]) -> list[Check]:
    """The checks of these rules, by number or by name; every one without.

    Raises:
        ValueError: there is none for one of them.
    """
    wanted = {item.casefold() for item in items}
    known = {key.casefold() for check in CHECKS for key in (*check.items, check.name)}
    if unknown := [item for item in items if item.casefold() not in known]:
        raise ValueError(f"no check of {', '.join(map(printable, unknown))}; --list shows all")
    return [
        check for check in CHECKS if not wanted or wanted & {check.name, *(item.casefold() for item in check.items)}
    ]


def run(target: Target, checks: Sequence[Check], *, slow: bool = False) -> Iterator[Result]:
    """Explore ``target``, and run ``checks`` one after another, up to the one after which the server is gone for good.

    Raises:
        OSError, ProtocolError, ExportError: the server or the export cannot be reached at all.
    """
    target.explore()
    gone = False
    for check in checks:
        if gone:
            yield Result(check, Verdict.NOT_TESTED, GONE, check.level)
        elif check.writes and not target.may_write:
            yield Result(check, Verdict.NOT_TESTED, "it needs --write", check.level)
        elif check.slow and not slow:
            yield Result(check, Verdict.NOT_TESTED, "it needs --slow", check.level)
        elif target.demands_tls and not check.plain:
            yield Result(
                check, Verdict.NOT_APPLICABLE, "the server demands TLS: probe it with an nbds URI", check.level
            )
        else:
            result = _judge(target, check)
            if result.verdict is Verdict.DEVIATES and (death := _death(target)):
                gone = death == GONE
                observed = f"{death} ({result.observed})"
                result = Result(check, Verdict.DEVIATES, observed, Level.MUST)
            yield result


def _judge(target: Target, check: Check) -> Result:
    target.mode = None
    level = check.level
    try:
        check.function(target)
        return Result(check, Verdict.OK, "", level)
    except NotApplicable as reason:
        return Result(check, Verdict.NOT_APPLICABLE, str(reason), level)
    except Deviation as deviation:
        observed = str(deviation)
    except OptionFailed as failure:
        if failure.reply == OptionReply.ERR_TLS_REQD and not target.uri.secure:
            return Result(check, Verdict.NOT_APPLICABLE, "the server demands TLS", level)
        observed = str(failure)
    except ProtocolError as error:  # a rule that always holds, whatever this check is about
        observed, level = str(error), Level.MUST
    except OSError as error:
        observed = in_words(error)
    mode = f"{target.mode.name}: " if target.mode and len(target.modes) > 1 else ""
    return Result(check, Verdict.DEVIATES, printable(mode + observed), level)


def _death(target: Target) -> str:
    """Whether the server has gone since it was last talked to: empty, CAME_BACK or GONE."""
    deadline = time.monotonic() + _RETURN
    died = False
    while True:
        try:
            with target.plain():
                return CAME_BACK if died else ""
        except (OSError, ProtocolError):
            died = True
        if time.monotonic() > deadline:
            return GONE
        time.sleep(0.05)


def deviations(results: Sequence[Result], level: Level) -> int:
    """How many of ``results`` deviate from a rule of that level."""
    return sum(result.verdict is Verdict.DEVIATES and result.level is level for result in results)

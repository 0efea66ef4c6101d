"""A small part of what ``python -m tests.fuzz.protocol`` does, and whether it would see mistakes of a server."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis.errors import HypothesisException

from nbdq.nbd.transmission import Refusal, Transmission
from nbdq.server.exports.commits import Commits
from nbdq.server.transmission.pending import Pending
from tests.fuzz.model import Model
from tests.fuzz.protocol import Disk, explore


def test_clients_who_say_anything_get_what_the_protocol_promises() -> None:
    explore(examples=30, steps=30, shrink=False)  # which could take longer than a test may; the command does it


def _lazy_flush(self: Commits, waiter: Callable[[Any], None], resources: Any) -> None:
    resources.loop.call_soon(waiter, None)


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a flush does nothing": lambda patch: patch.setattr(Commits, "join", _lazy_flush),
    "changes of a client overtake each other": lambda patch: patch.setattr(
        Pending, "overlaps", lambda self, offset, length: False
    ),
    "a trim keeps what was there": lambda patch: patch.setattr(Disk, "discard", lambda self, offset, length: None),
    "a write goes to the place before": lambda patch: patch.setattr(
        Disk, "write", lambda self, offset, view: self._change("write", max(0, offset - 4096), view)
    ),
    "a read-only export can be written to": lambda patch: patch.setattr(
        Transmission,
        "refusal",
        lambda self, request, refusal=Transmission.refusal: (
            found if (found := refusal(self, request)) is None or found.errno != 1 else Refusal(22, "wrong")
        ),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_of_the_server_is_seen(
    mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    with pytest.raises((AssertionError, ExceptionGroup, HypothesisException)):
        explore(examples=30, steps=20, shrink=False)


def test_the_model_knows_what_a_unit_may_hold() -> None:
    model = Model(4)
    watch = model.watch(0, 4)
    model.begin("a", 0, 2, 1)
    model.begin("b", 1, 3, 2)
    model.begin("a", 1, 2, 3)
    assert watch.possible == [{0, 1}, {0, 1, 2, 3}, {0, 2}, {0}]
    model.end(0, 2, happened=True)
    model.end(1, 3, happened=True)
    assert model.watch(0, 4).possible == [{1}, {0, 1, 2, 3}, {2}, {0}]
    model.end(1, 2, happened=None)
    assert model.watch(0, 4).possible == [{1}, {1, 2, 3}, {2}, {0}]
    model.begin("a", 1, 2, 5)
    model.begin("a", 1, 2, 6)
    model.end(1, 2, happened=True)
    model.end(1, 2, happened=True)
    assert model.watch(1, 2).possible == [{6}]

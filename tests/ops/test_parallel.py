"""Pieces of work on several threads: as if one after the other, but for the time."""

import threading
from collections.abc import Callable

import pytest

from nbdq.ops.parallel import in_order

several = pytest.mark.parametrize("workers", [1, 4])


@several
def test_ends_are_told_in_order_whatever_ends_first(workers: int) -> None:
    done: list[int] = []
    pieces = [(number, lambda number=number: done.append(number)) for number in range(100)]
    assert list(in_order(pieces, workers=workers)) == list(range(100))
    assert sorted(done) == list(range(100))


@several
def test_what_was_told_has_been_done(workers: int) -> None:
    done: set[int] = set()
    pieces = [(number, lambda number=number: done.add(number)) for number in range(100)]
    for number in in_order(pieces, workers=workers):
        assert done >= set(range(number + 1))


@several
def test_a_failure_is_raised_when_its_turn_comes(workers: int) -> None:
    def fail() -> None:
        raise OSError(5, "broken")

    pieces: list[tuple[int, Callable[[], object]]] = [(0, list), (1, fail), (2, list)]
    told = in_order(pieces, workers=workers)
    assert next(told) == 0
    with pytest.raises(OSError, match="broken"):
        next(told)


def test_pieces_run_at_the_same_time() -> None:
    meeting = threading.Barrier(4, timeout=30)
    assert list(in_order([(number, meeting.wait) for number in range(8)], workers=4)) == list(range(8))


def test_nothing_runs_any_more_once_nobody_wants_to_know() -> None:
    before = threading.active_count()
    running = in_order([(number, list) for number in range(1000)], workers=4)
    next(running)
    running.close()
    assert threading.active_count() == before

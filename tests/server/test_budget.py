"""The memory budget of the process: who gets bytes, who waits, and who is called when."""

from nbdq.server.budget import Budget


class Waiter:
    """Somebody who wants bytes and counts how often it is called back."""

    def __init__(self, budget: Budget, wanted: int) -> None:
        self.budget = budget
        self.wanted = wanted
        self.calls = 0

    def take(self) -> bool:
        return self.budget.take(self.wanted, self.called)

    def called(self) -> None:
        self.calls += 1


def test_what_is_given_back_can_be_taken_again() -> None:
    budget = Budget(100)
    first, second = Waiter(budget, 60), Waiter(budget, 60)
    assert first.take()
    assert not second.take()
    budget.give(60)
    assert second.calls == 1
    assert second.take()


def test_one_that_asks_again_and_again_is_called_back_once() -> None:
    budget = Budget(100)
    greedy, waiter = Waiter(budget, 100), Waiter(budget, 50)
    assert greedy.take()
    assert not any(waiter.take() for _ in range(10))
    budget.give(100)
    assert waiter.calls == 1
    budget.give(0)
    assert waiter.calls == 1


def test_nobody_is_woken_for_bytes_that_cannot_be_enough() -> None:
    budget = Budget(100)
    holder, large, small = Waiter(budget, 90), Waiter(budget, 80), Waiter(budget, 30)
    assert holder.take()
    assert not large.take()
    assert not small.take()
    budget.give(20)
    assert (large.calls, small.calls) == (0, 1)


def test_a_request_larger_than_the_budget_is_admitted_alone() -> None:
    budget = Budget(100)
    huge, small = Waiter(budget, 1000), Waiter(budget, 1)
    assert huge.take()
    assert not small.take()
    budget.give(1000)
    assert small.take()
    assert not huge.take()
    budget.give(1)
    assert huge.calls == 1
    assert huge.take()


def test_those_who_wait_are_called_in_the_order_in_which_they_came() -> None:
    budget = Budget(10)
    order: list[int] = []
    assert budget.take(10, lambda: None)
    for number in range(5):
        assert not budget.take(5, lambda number=number: order.append(number))  # type: ignore[misc]
    budget.give(10)
    assert order == [0, 1, 2, 3, 4]


def test_what_is_guaranteed_is_granted_when_nothing_is_left() -> None:
    budget = Budget(100)
    holder, guaranteed, small = Waiter(budget, 100), Waiter(budget, 10), Waiter(budget, 1)
    assert holder.take()
    assert budget.take(10, guaranteed.called, overdraw=True)
    assert not small.take()
    budget.give(10)  # pays the overdraft back, and no more
    assert small.calls == 0
    budget.give(100)
    assert small.calls == 1


def test_one_that_left_is_not_called_back() -> None:
    budget = Budget(100)
    holder, gone = Waiter(budget, 100), Waiter(budget, 1)
    assert holder.take()
    assert not gone.take()
    budget.forget(gone.called)
    budget.forget(gone.called)
    budget.give(100)
    assert gone.calls == 0


def test_a_source_that_holds_more_than_would_be_left_gets_no_more() -> None:
    """Otherwise one that begins payloads and drips them keeps all large requests of others waiting for ever."""
    budget, nobody = Budget(256), lambda: None
    taken = [budget.take(32, nobody, source="greedy") for _ in range(8)]
    assert taken == [True] * 4 + [False] * 4
    assert [budget.take(32, nobody, source="second") for _ in range(8)] == [True] * 2 + [False] * 6
    assert budget.take(32, nobody, source="honest")
    assert budget.take(1, nobody, source="greedy", overdraw=True)


def test_a_source_that_gives_back_may_take_again() -> None:
    budget, calls = Budget(100), []
    assert budget.take(60, lambda: None, source="one")
    assert not budget.take(10, lambda: calls.append("one"), source="one")
    assert budget.take(10, lambda: None, source="two")
    budget.give(40, source="one")
    assert calls == ["one"]
    assert budget.take(10, lambda: None, source="one")

"""The cache of inflated clusters: each is inflated once for all who want it, within a budget; errors do not stay."""

import errno
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from nbdq.chain.clusters import ClusterCache

#: Seconds until a thread counts as hung; generous, because it only bounds failures.
PATIENCE = 30


@pytest.fixture
def cache() -> Iterator[ClusterCache]:
    found = ClusterCache(budget=1000)
    yield found
    found.close()


def never() -> bytes:
    raise AssertionError("inflated again")


def fails() -> bytes:
    raise OSError(errno.EIO, "damaged")


def started(target: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


class Slow:
    """A load that another thread waits in until it is let go."""

    def __init__(self, outcome: Callable[[], bytes]) -> None:
        self.entered = threading.Event()
        self.let_go = threading.Event()
        self.outcome = outcome

    def __call__(self) -> bytes:
        self.entered.set()
        assert self.let_go.wait(PATIENCE)
        return self.outcome()


def test_a_cluster_is_inflated_when_it_is_first_wanted(cache: ClusterCache) -> None:
    assert cache.peek("a") is None
    assert cache.get("a", lambda: b"data") == b"data"
    assert cache.get("a", never) == b"data"
    assert cache.peek("a") == b"data"


def test_the_cluster_used_longest_ago_makes_room(cache: ClusterCache) -> None:
    for key in "abcde":
        cache.get(key, lambda: bytes(200))
    cache.get("a", never)
    cache.peek("b")
    cache.get("f", lambda: bytes(400))
    assert [key for key in "abcdef" if cache.peek(key) is not None] == ["a", "b", "e", "f"]


def test_a_cluster_larger_than_the_budget_is_returned_but_not_kept(cache: ClusterCache) -> None:
    cache.get("a", lambda: bytes(500))
    assert cache.get("b", lambda: bytes(1001)) == bytes(1001)
    assert cache.peek("b") is None
    assert cache.get("c", lambda: bytes(1000)) == bytes(1000)  # the account is right again
    assert cache.peek("c") is not None


def test_without_a_budget_nothing_is_kept() -> None:
    cache = ClusterCache(budget=0)
    assert cache.get("a", lambda: b"data") == b"data"
    assert cache.peek("a") is None
    cache.close()


def test_two_readers_of_one_cluster_inflate_it_once(cache: ClusterCache) -> None:
    slow = Slow(lambda: b"data")
    found: list[bytes] = []
    first = started(lambda: found.append(cache.get("a", slow)))
    assert slow.entered.wait(PATIENCE)
    second = started(lambda: found.append(cache.get("a", never)))
    second.join(0.05)
    assert second.is_alive()  # it waits; were it so slow that it has not asked yet, the test would prove less
    assert cache.peek("a") is None
    assert cache.get("b", lambda: b"other") == b"other"  # nobody else waits
    slow.let_go.set()
    first.join(PATIENCE)
    second.join(PATIENCE)
    assert found == [b"data", b"data"]
    assert found[0] is found[1]


def test_a_failure_is_not_kept(cache: ClusterCache) -> None:
    for _ in range(2):
        with pytest.raises(OSError, match="damaged"):
            cache.get("a", fails)
    assert cache.get("a", lambda: b"data") == b"data"


def test_whoever_waited_for_a_failure_is_not_left_waiting(cache: ClusterCache) -> None:
    slow = Slow(fails)
    errors: list[OSError] = []

    def read() -> None:
        try:
            cache.get("a", slow)
        except OSError as error:
            errors.append(error)

    first = started(read)
    assert slow.entered.wait(PATIENCE)
    second = started(read)
    second.join(0.05)
    slow.let_go.set()
    first.join(PATIENCE)
    second.join(PATIENCE)
    assert [error.errno for error in errors] == [errno.EIO, errno.EIO]


def test_a_mistake_of_ours_does_not_lock_the_cluster_for_ever(cache: ClusterCache) -> None:
    with pytest.raises(AssertionError):
        cache.get("a", never)
    assert cache.get("a", lambda: b"data") == b"data"


# Inflating ahead.


def test_a_cluster_inflated_ahead_is_there_when_it_is_wanted(cache: ClusterCache) -> None:
    slow = Slow(lambda: b"data")
    slow.let_go.set()
    cache.get_ahead("a", slow)
    assert slow.entered.wait(PATIENCE)
    assert cache.get("a", never) == b"data"
    cache.get_ahead("a", never)
    assert cache.get("a", never) == b"data"


def test_a_reader_does_not_wait_for_a_cluster_that_nobody_inflates_yet() -> None:
    """It may stand far behind in the queue."""
    cache = ClusterCache(budget=1000, workers=1)
    slow = Slow(lambda: b"other")
    cache.get_ahead("a", slow)
    assert slow.entered.wait(PATIENCE)
    ahead: list[bytes] = []
    cache.get_ahead("b", lambda: ahead.append(b"again") or b"again")  # type: ignore[func-returns-value]
    assert cache.get("b", lambda: b"data") == b"data"
    slow.let_go.set()
    cache.close()
    assert ahead == []


def test_inflating_ahead_does_not_wait_and_is_not_done_twice(cache: ClusterCache) -> None:
    slow = Slow(lambda: b"data")
    cache.get_ahead("a", slow)
    assert slow.entered.wait(PATIENCE)
    cache.get_ahead("a", never)
    assert cache.peek("a") is None
    slow.let_go.set()
    assert cache.get("a", never) == b"data"


def test_an_error_ahead_is_nobodys_error(cache: ClusterCache) -> None:
    """Until somebody reads the cluster for real."""
    slow = Slow(fails)
    cache.get_ahead("a", slow)
    slow.let_go.set()
    assert cache.get("a", lambda: b"data") == b"data"


def wait_until_taken(cache: ClusterCache) -> None:
    """Return when a cluster has been inflated ahead, which must be as soon as there is room for it."""
    taken = threading.Event()

    def load() -> bytes:
        taken.set()
        return b"x"

    deadline = time.monotonic() + PATIENCE
    while not taken.wait(0.001):
        assert time.monotonic() < deadline
        cache.get_ahead("last", load)


def test_only_so_many_clusters_wait_to_be_inflated_ahead(cache: ClusterCache) -> None:
    """A hint is dropped rather than queued without end; later ones are taken again."""
    slow = Slow(lambda: b"x")
    done: list[int] = []

    def load(number: int) -> bytes:
        done.append(number)
        return slow()

    for number in range(1000):
        cache.get_ahead(number, lambda number=number: load(number))  # type: ignore[misc]
    slow.let_go.set()
    wait_until_taken(cache)
    assert 2 <= len(done) <= 32


def test_mistakes_ahead_do_not_stop_inflating_ahead(cache: ClusterCache) -> None:
    """However many clusters fail with an error that is no OSError, room for the next is made."""
    for number in range(100):
        cache.get_ahead(number, never)
        with pytest.raises(AssertionError):
            cache.get(number, never)
    wait_until_taken(cache)


def test_closing_waits_for_what_is_being_inflated_and_forgets_everything() -> None:
    """Afterwards the images can be closed."""
    cache = ClusterCache(budget=1000, workers=1)
    slow = Slow(lambda: b"data")
    cache.get_ahead("a", slow)
    assert slow.entered.wait(PATIENCE)
    closing = started(cache.close)
    closing.join(0.05)
    assert closing.is_alive()
    slow.let_go.set()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert cache.peek("a") is None


def test_a_forgotten_cluster_is_inflated_anew_and_takes_no_room(cache: ClusterCache) -> None:
    cache.get("a", lambda: b"a" * 600)
    cache.get("b", lambda: b"b" * 300)
    cache.forget("a")
    cache.forget("unknown")
    assert cache.peek("a") is None
    cache.get("c", lambda: b"c" * 600)
    assert cache.peek("b") == b"b" * 300, "the budget counts what is there"
    assert cache.get("a", lambda: b"new") == b"new"

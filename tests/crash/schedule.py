"""Threads of which one runs at a time, chosen by a seed at every lock and every act on a file: races that replay.

The locks of the engine are exchanged for ones that know the schedule, so that a thread which waits for a lock hands on
its turn. What runs between two such points is never interrupted; a race that needs no lock and no file in between is
not found here.
"""

import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

#: How probably a thread falls asleep where it could go on, and how long, in turns of others. Without that each goes on
#: soon, and nothing that takes many steps ever happens between two steps of another.
_DROWSINESS, _LINGERING = 0.03, 0.25
_SLEEP_BITS = 10


class Deadlock(AssertionError):
    """Every thread waits for another one."""


class Schedule:
    """Runs functions as threads that take turns."""

    def __init__(self, seed: int) -> None:
        self._generator = random.Random(seed)
        self._turns: dict[threading.Thread, threading.Semaphore] = {}
        self._ready: list[threading.Thread] = []
        self._asleep_until: dict[threading.Thread, int] = {}
        self._steps = 0
        self._left = 0
        self._failure: BaseException | None = None
        self._done = threading.Event()

    def run(self, functions: Sequence[Callable[[], None]]) -> None:
        """Run all to their end; raise what the first one that failed raised."""
        threads = [threading.Thread(target=self._main, args=(function,), daemon=True) for function in functions]
        self._turns = {thread: threading.Semaphore(0) for thread in threads}
        self._ready = list(threads)
        self._left = len(threads)
        for thread in threads:
            thread.start()
        self._hand_on()
        self._done.wait()
        if self._failure is not None:
            raise self._failure
        for thread in threads:
            thread.join()
        self._turns = {}

    def _main(self, function: Callable[[], None]) -> None:
        me = threading.current_thread()
        self._turns[me].acquire()
        try:
            function()
        except BaseException as error:  # given to whoever called run()
            self._failure = self._failure or error
            self._done.set()
            return
        self._ready.remove(me)
        self._left -= 1
        if self._ready:
            self._hand_on()
            return
        if self._left:
            self._failure = self._failure or Deadlock("the last running thread ended while others wait")
        self._done.set()

    def _hand_on(self) -> None:
        self._turns[self._choose()].release()

    def _choose(self) -> threading.Thread:
        """One that is ready, and awake if any is."""
        self._steps += 1
        awake = [thread for thread in self._ready if self._asleep_until.get(thread, 0) <= self._steps]
        return self._generator.choice(awake or self._ready)

    @property
    def _me(self) -> threading.Thread | None:
        """The current thread, if it takes turns."""
        thread = threading.current_thread()
        return thread if thread in self._turns else None

    def linger(self) -> None:
        """Let others run, probably for long: what was decided is about to be done."""
        self.pause(drowsiness=_LINGERING)

    def pause(self, *, drowsiness: float = _DROWSINESS) -> None:
        """Perhaps let another thread run."""
        me = self._me
        if me is None or len(self._ready) == 1:
            return
        if self._generator.random() < drowsiness:
            self._asleep_until[me] = self._steps + int(2 ** self._generator.uniform(0, _SLEEP_BITS))
        chosen = self._choose()
        if chosen is not me:
            self._turns[chosen].release()
            self._turns[me].acquire()

    def block(self) -> None:
        """Let others run until somebody calls :meth:`wake` for this thread."""
        me = self._me
        assert me is not None, "a thread outside of the schedule would wait for ever"
        self._ready.remove(me)
        if not self._ready:
            self._failure = Deadlock("every thread waits for a lock")
            self._done.set()
        else:
            self._hand_on()
        self._turns[me].acquire()

    def wake(self, thread: threading.Thread) -> None:
        """Let a blocked thread run again; one that is only about to block does not."""
        if thread not in self._ready:
            self._ready.append(thread)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Give the modules of the engine locks of this schedule; objects made meanwhile keep them."""
        substitute = SimpleNamespace(**vars(threading))
        substitute.Lock = lambda: _Lock(self, reentrant=False)
        substitute.RLock = lambda: _Lock(self, reentrant=True)
        substitute.Condition = lambda lock=None: _Condition(self, lock)
        with ExitStack() as stack:
            for name, module in list(sys.modules.items()):
                if name.startswith(("nbdq.qcow2.", "nbdq.chain.")) and hasattr(module, "threading"):
                    stack.enter_context(patch.object(module, "threading", substitute))
            yield


class _Lock:
    """A lock whose waiters hand on their turn."""

    def __init__(self, schedule: Schedule, *, reentrant: bool) -> None:
        self._schedule = schedule
        self._reentrant = reentrant
        self._owner: threading.Thread | None = None
        self._depth = 0
        self._waiters: list[threading.Thread] = []

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        me = threading.current_thread()
        self._schedule.pause()
        if self._reentrant and self._owner is me:
            self._depth += 1
            return True
        while self._owner is not None:
            if not blocking or timeout >= 0:
                return False
            self._waiters.append(me)
            self._schedule.block()
        self._owner, self._depth = me, 1
        return True

    def release(self) -> None:
        assert self._owner is not None
        self._depth -= 1
        if self._depth == 0:
            self._owner = None
            for waiter in self._waiters:
                self._schedule.wake(waiter)
            self._waiters.clear()
            self._schedule.pause()

    def locked(self) -> bool:
        return self._owner is not None

    def owned(self) -> bool:
        return self._owner is threading.current_thread()

    def give_up(self) -> int:
        """Release all the way; say how deep it was held."""
        depth, self._depth = self._depth, 1
        self.release()
        return depth

    def take_back(self, depth: int) -> None:
        self.acquire()
        self._depth = depth

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: Any) -> None:
        self.release()


class _Condition:
    """A condition variable over such a lock."""

    def __init__(self, schedule: Schedule, lock: Any = None) -> None:
        self._schedule = schedule
        self._lock = lock or _Lock(schedule, reentrant=True)
        self._waiters: list[threading.Thread] = []
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def wait(self, timeout: float | None = None) -> bool:
        assert self._lock.owned()
        if timeout is None:
            self._waiters.append(threading.current_thread())
        depth = self._lock.give_up()
        if timeout is None:
            if threading.current_thread() in self._waiters:
                self._schedule.block()
        else:
            self._schedule.pause()
        self._lock.take_back(depth)
        return timeout is None

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        while not (result := predicate()):
            self.wait(timeout)
            if timeout is not None:
                return predicate()
        return result

    def notify(self, n: int = 1) -> None:
        assert self._lock.owned()
        for waiter in self._waiters[:n]:
            self._schedule.wake(waiter)
        del self._waiters[:n]

    def notify_all(self) -> None:
        self.notify(len(self._waiters))

    def __enter__(self) -> Any:
        return self._lock.__enter__()

    def __exit__(self, *arguments: Any) -> None:
        self._lock.__exit__(*arguments)

"""Pieces of work on several threads at once, whose ends are told in order."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

from nbdq.pool import WorkerPool

_Token = TypeVar("_Token")

#: Pieces that are under way or done, but not told yet, for each thread.
_AHEAD = 3


class _Piece:
    """One piece, and how it ended."""

    def __init__(self, work: Callable[[], object], stopped: threading.Event) -> None:
        self._work = work
        self._stopped = stopped
        self._ended = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Do it, unless nobody cares any more."""
        try:
            if not self._stopped.is_set():
                self._work()
        except BaseException as error:
            self._error = error
        self._ended.set()

    def wait(self) -> None:
        self._ended.wait()
        if self._error is not None:
            raise self._error


def in_order(pieces: Iterable[tuple[_Token, Callable[[], object]]], *, workers: int) -> Generator[_Token]:
    """Do all ``pieces``, up to ``workers`` at a time; give what came with each, in order, when all before are done too.

    ``pieces`` is iterated by the caller's thread. When the iterator is closed, nothing is under way any more.

    Raises:
        BaseException: what a piece raised, when its turn comes; later ones may have been done.
    """
    if workers < 2:
        for token, work in pieces:
            work()
            yield token
        return
    pool = WorkerPool(workers)
    stopped = threading.Event()
    pending: deque[tuple[_Token, _Piece]] = deque()
    try:
        for token, work in pieces:
            piece = _Piece(work, stopped)
            pending.append((token, piece))
            pool.submit(piece.run)
            if len(pending) >= workers * _AHEAD:
                yield _first(pending)
        while pending:
            yield _first(pending)
    finally:
        stopped.set()
        pool.close()


def _first(pending: deque[tuple[_Token, _Piece]]) -> _Token:
    token, piece = pending.popleft()
    piece.wait()
    return token

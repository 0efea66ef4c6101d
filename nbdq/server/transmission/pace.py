"""Whether writes are carried out on the loop thread: yes, until they hold it up.

Writing to the page cache takes microseconds, but the kernel makes writers sleep when too much is dirty, and some file
systems are slow. Nothing tells beforehand, so the time is watched (R-80).
"""

#: A batch of requests with writes in it that takes the loop longer shows that writes wait. More than the 5 ms for which
#: the interpreter may leave the processor to another thread; a batch of sixty quick writes takes a tenth.
BATCH_SECONDS = 0.008
#: A write in the pool that took so long shows that they still wait. More, because threads wait for each other there.
POOLED_SECONDS = 0.02

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 2.0
#: After so long without trouble the next trouble counts as the first.
_MEMORY = 10.0


class Pace:
    """The pace of one export's writes. Times are those of ``time.monotonic``.

    When writes on the loop thread were too slow, the pool gets them for a while: 50 ms at first, twice as long each
    time that this turns out to have been too short, and always until the pool has had no slow one for as long.
    """

    def __init__(self) -> None:
        self.inline_from = 0.0
        """From this moment on writes are carried out on the loop thread."""
        self._pause = _FIRST_PAUSE

    def inline_was_slow(self, now: float) -> int:
        """Loop thread: a batch with writes has taken more than BATCH_SECONDS. Returns 0, the bytes that a write may
        have from now on to be carried out there."""
        recently = now - self.inline_from < _MEMORY and self.inline_from
        self._pause = min(self._pause * 2, _LONGEST_PAUSE) if recently else _FIRST_PAUSE
        self.inline_from = now + self._pause
        return 0

    def pooled(self, begun: float, now: float) -> None:
        """Any thread: the pool has carried out a write. Two threads at once may lose the shorter pause, no more."""
        if now - begun > POOLED_SECONDS and begun < self.inline_from:
            self.inline_from = now + self._pause

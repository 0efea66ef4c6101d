"""A TRIM or WRITE_ZEROES of any length, as extended headers permit (P124): carried out in pieces.

Between two pieces the disk may be drained, its layers exchanged, the client be gone, and others have their turn in the
pool. A piece takes as long as the metadata that it changes, which nobody knows beforehand; so the next one is longer if
the last one was quick.
"""

from time import monotonic

from nbdq.block import Piece
from nbdq.nbd.constants import CommandFlag
from nbdq.nbd.transmission import RawRequest
from nbdq.server.transmission.perform import Performer

#: Longer changes are carried out in pieces, of which the first is so long. Compact requests never are.
LONG = 4 << 30
#: Pieces end at multiples of this, which no unit of allocation exceeds; so only the ends of the whole range cut any.
_STEP = 64 << 20
#: The next piece is twice as long after one that took less than the first, and half as long after more than the second.
_QUICK_SECONDS, _SLOW_SECONDS = 0.02, 0.1

_FAST_ZERO = CommandFlag.FAST_ZERO << 16


class LongChange:
    """One such request, and how far it has come."""

    def __init__(self, request: RawRequest, begun: float) -> None:
        """``begun``: when it was admitted."""
        self.request = request
        self.begun = begun
        self.is_done = False
        """Whether nothing is left to do, because all is done, or because a piece has failed."""
        self.failure: list[Piece] | None = None
        """The reply to tell of that."""
        self._operation = request[1]
        self._position = request[3]
        self._length = LONG

    def perform(self, performer: Performer) -> None:
        """Carry out one more piece. Pool thread.

        What lies behind the end of a disk that has become smaller since the piece before is left out. After a failure
        the pieces before have been carried out.
        """
        try:
            self._perform(performer)
        except Exception as error:
            self.failure = performer.failure(self.request, error)
            self.is_done = True

    def _perform(self, performer: Performer) -> None:
        end = min(self.request[3] + self.request[4], performer.size)
        stop = min((self._position + self._length) // _STEP * _STEP, end)
        if self._position < stop:
            begun = monotonic()
            performer.change(self._operation, self._position, stop - self._position)
            seconds = monotonic() - begun
            if seconds < _QUICK_SECONDS:
                self._length *= 2
            elif seconds > _SLOW_SECONDS:
                self._length = max(self._length // 2, _STEP)
        self._position = stop
        # What has to be quick was refused before anything changed. Later, at worst the end of the range is written.
        self._operation &= ~_FAST_ZERO
        self.is_done = stop >= end

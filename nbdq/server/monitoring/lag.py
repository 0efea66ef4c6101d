"""How late the event loop runs what is due: the one number that shows that something blocks it (R-80)."""

import asyncio
import logging

from nbdq.durations import Durations

_log = logging.getLogger(__name__)

#: Between two looks; whatever blocks the loop for longer is seen, shorter lags by chance. Costs 0.02 % of a processor.
_INTERVAL = 0.05
#: From here on a lag is worth a line in the log.
_NOTABLE = 0.05


class LagWatch:
    """Looks at the loop's clock at regular times. Loop thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.worst = 0.0
        """The longest lag so far, in seconds; who reads it may set it to 0."""
        self.durations = Durations()
        """All that were seen."""
        self._expect()

    def _expect(self) -> None:
        self._due = self._loop.time() + _INTERVAL
        self._timer = self._loop.call_at(self._due, self._look)

    def _look(self) -> None:
        lag = self._loop.time() - self._due
        self.durations.add(lag)
        if lag > self.worst:
            self.worst = lag
        if lag > _NOTABLE:
            _log.debug("the loop was held up for %.0f ms", lag * 1000)
        self._expect()

    def close(self) -> None:
        """Look no more."""
        self._timer.cancel()

"""How the log looks, and how much of it there is: lines for people, or one JSON object a line for machines."""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from nbdq.errors import printable
from nbdq.server.admission.peer import Peer

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)

#: Who administers what (R-43): never left out.
_AUDIT = "nbdq.audit"
#: Records of one kind in a minute, by level; whoever can make us write more could fill the disk. Whoever wants to see
#: DEBUG has asked for everything.
_MOST = {logging.INFO: 1000, logging.WARNING: 20, logging.ERROR: 20, logging.CRITICAL: 20}
#: Characters of a message; what clients say is bounded where it is logged, so this is for our mistakes.
_MESSAGE_MAX = 16 << 10

#: What systemd's journal calls our levels (sd-daemon(3)).
_JOURNAL = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


def _client(record: logging.LogRecord) -> dict[str, object]:
    """The fields of the client that a message names, if it does."""
    peers = [value for value in record.args or () if isinstance(value, Peer)] if isinstance(record.args, tuple) else []
    return {"conn": peers[0].number, "client": peers[0].address} if peers else {}


class _JsonFormatter(logging.Formatter):
    """One object a record: ``ts`` (RFC 3339, UTC), ``level``, ``logger``, ``msg``, the record's own ``fields``, and
    ``exc`` with a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "ts": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
            **_client(record),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["exc"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class _TextFormatter(logging.Formatter):
    """One line a record, whatever the message holds, and a traceback below it."""

    def __init__(self, prefix: str) -> None:
        super().__init__(f"{prefix}%(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message, _MESSAGE_MAX)
        return super().formatMessage(record)


@dataclass
class _Kind:
    """Records from one line of code, within one minute."""

    begun: float
    count: int = 0
    last: logging.LogRecord | None = None
    """The last one that was left out."""


class LimitedHandler(logging.StreamHandler[TextIO]):
    """Writes records to a stream, so many of one kind in a minute, and then how many more there were.

    Records are of one kind if one line of the program made them.
    """

    def __init__(self, *, seconds: float = 60.0, journal: bool = False, stream: TextIO | None = None) -> None:
        """``seconds`` is the length of a minute; for a ``journal`` each line begins with its priority."""
        super().__init__(stream)
        self._seconds = seconds
        self._journal = journal
        self._kinds: dict[tuple[str, int], _Kind] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if self._admits(record):
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not self._journal:
            return text
        mark = f"<{_JOURNAL.get(record.levelno, 6)}>"
        return mark + text.replace("\n", f"\n{mark}")

    def _admits(self, record: logging.LogRecord) -> bool:
        """Whether it is written. The handler's lock is held."""
        most = _MOST.get(record.levelno)
        if most is None or record.name == _AUDIT:
            return True
        key = record.pathname, record.lineno
        now = time.monotonic()
        kind = self._kinds.get(key)
        if kind is None or (now - kind.begun >= self._seconds and kind.last is None):
            kind = self._kinds[key] = _Kind(now)
        kind.count += 1
        if kind.count <= most:
            return True
        if kind.last is None:
            self._later(max(0.0, kind.begun + self._seconds - now), lambda: self._summarize(key, most))
        kind.last = record
        return False

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, call)
        timer.daemon = True  # what it would say is said by close()
        timer.start()

    def _summarize(self, key: tuple[str, int], most: int) -> None:
        """Say what was left out, and begin a new minute."""
        self.acquire()
        try:
            kind = self._kinds.pop(key, None)
            if kind is not None and kind.last is not None:
                count, last = kind.count - most, kind.last
                more = logging.makeLogRecord(
                    {
                        "name": last.name,
                        "levelno": last.levelno,
                        "levelname": last.levelname,
                        "msg": f"… and {count} more like: {last.getMessage()}",
                        "fields": {"event": "suppressed", "count": count},
                    }
                )
                super().emit(more)
        finally:
            self.release()

    def close(self) -> None:
        """Say what was left out, and write no more."""
        for key, kind in list(self._kinds.items()):
            if kind.last is not None:
                self._summarize(key, _MOST[kind.last.levelno])
        super().close()


def _is_journal(stream: TextIO) -> bool:
    """Whether ``stream`` leads to systemd's journal, as systemd says of our stderr in JOURNAL_STREAM."""
    device, _, number = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return (device, number) == (str(status.st_dev), str(status.st_ino))


def configure_logging(*, verbosity: int, log_format: str) -> None:
    """Log to stderr; ``verbosity`` 0 shows warnings, 1 what clients do, 2 everything."""
    journal = _is_journal(sys.stderr)
    handler = LimitedHandler(journal=journal)
    if log_format == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(_TextFormatter("" if journal else "nbdq: %(levelname)s: "))
    logging.basicConfig(handlers=[handler], level=_LEVELS[min(verbosity, len(_LEVELS) - 1)], force=True)

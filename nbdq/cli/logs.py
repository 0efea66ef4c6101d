"""How the log looks: lines for people, or one JSON object a line for machines."""

import json
import logging
import time

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


class _JsonFormatter(logging.Formatter):
    """One object a record: ``ts`` (RFC 3339, UTC), ``level``, ``logger``, ``msg``, and ``exc`` with a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "ts": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        if record.exc_info:
            fields["exc"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def configure_logging(*, verbosity: int, log_format: str) -> None:
    """Log to stderr; ``verbosity`` 0 shows warnings, 1 what clients do, 2 everything."""
    handler = logging.StreamHandler()
    if log_format == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("nbdq: %(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=_LEVELS[min(verbosity, len(_LEVELS) - 1)], force=True)

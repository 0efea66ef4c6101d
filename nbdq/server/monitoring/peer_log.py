"""Lines about one connection: each with its number and address in front, and as fields of their own in a JSON log."""

import logging
from collections.abc import MutableMapping
from typing import Any

from nbdq.server.admission.peer import Peer


class PeerLog(logging.LoggerAdapter[logging.Logger]):
    """A logger for what concerns one client. Any thread.

    A record's attribute ``fields`` is a dictionary: ``conn``, ``client``, ``export`` once it is known, and what the
    caller gives as ``fields`` besides.
    """

    def __init__(self, logger: logging.Logger, peer: Peer) -> None:
        super().__init__(logger, {})
        self._peer = peer
        self.export: str | None = None
        """Id of the export that the client has chosen."""

    def of(self, logger: logging.Logger) -> "PeerLog":
        """The same for lines that another module writes."""
        other = PeerLog(logger, self._peer)
        other.export = self.export
        return other

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        fields = {"conn": self._peer.number, "client": self._peer.address}
        if self.export is not None:
            fields["export"] = self.export
        kwargs["extra"] = {"fields": fields | kwargs.pop("fields", {})}
        return str(self._peer).replace("%", "%%") + ": " + msg, kwargs

"""The exports as one client sees them: the directory of its handshake.

Whoever does not meet the demands of an export finds no such export, as if it did not exist (P37); who does, but is one
too many, is told so.
"""

import logging
from collections.abc import Sequence

from nbdq.errors import printable
from nbdq.nbd.constants import OptionReply
from nbdq.nbd.exports import ExportInfo, Negotiated
from nbdq.nbd.messages import OptionRefused
from nbdq.server.export import Export, Exports
from nbdq.server.peer import Peer

_log = logging.getLogger(__name__)


class Entrance:
    """What ``peer`` may see and enter of ``exports``, at any moment. Loop thread only."""

    def __init__(self, exports: Exports, peer: Peer, *, tls_offered: bool = False) -> None:
        """``tls_offered``: a client that does not use TLS can begin to (P64)."""
        self._exports = exports
        self._peer = peer
        self._tls_offered = tls_offered

    def list(self) -> Sequence[ExportInfo]:
        """All that the client may enter, in the operator's order (P32)."""
        return [export.info for export in self._exports.by_name.values() if not self._objection(export)]

    def find(self, name: str) -> ExportInfo | None:
        """The export of exactly that name (P31).

        Raises:
            OptionRefused: only TLS is missing (P64), or it is full.
        """
        export = self._exports.by_name.get(name)
        if export is None:
            return None
        objection = self._objection(export)
        if not objection:
            return None if export.is_full else export.info
        access = export.access
        if self._tls_offered and not self._peer.secure and access.demands_tls and not access.objection(self._peer):
            raise OptionRefused(OptionReply.ERR_TLS_REQD, f"export '{printable(name)}' needs TLS")
        _log.info("%s: not let into export %r: %s", self._peer, export.info.name, objection)
        return None

    def _objection(self, export: Export) -> str:
        return export.access.objection(self._peer) or export.access.mistrust(self._peer)

    def chosen(self, negotiated: Negotiated) -> Export | None:
        """The export that a handshake has led to; None if it is not any more what the client was told."""
        export = self._exports.by_name.get(negotiated.export.name)
        if export is None or export.info != negotiated.export or export.is_full or self._objection(export):
            return None
        return export

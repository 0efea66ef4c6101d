"""The exports as one client sees them: the directory of its handshake."""

from collections.abc import Sequence

from nbdq.nbd.handshake import ExportInfo, Negotiated
from nbdq.server.export import Export, Exports
from nbdq.server.peer import Peer


class Entrance:
    """What ``peer`` may see and enter of ``exports``, at any moment. Loop thread only."""

    def __init__(self, exports: Exports, peer: Peer) -> None:
        self._exports = exports
        self._peer = peer

    def list(self) -> Sequence[ExportInfo]:
        """Everything on offer, in the operator's order (P32)."""
        return [export.info for export in self._exports.by_name.values()]

    def find(self, name: str) -> ExportInfo | None:
        """The export of exactly that name (P31), unless it is full."""
        export = self._exports.by_name.get(name)
        return None if export is None or export.is_full else export.info

    def chosen(self, negotiated: Negotiated) -> Export | None:
        """The export that a handshake has led to; None if it is not any more what the client was told."""
        export = self._exports.by_name.get(negotiated.export.name)
        if export is None or export.info != negotiated.export or export.is_full:
            return None
        return export

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
from nbdq.server.admission.access import Access
from nbdq.server.admission.census import Census, full
from nbdq.server.admission.peer import Peer
from nbdq.server.exports.export import Export, Exports

_log = logging.getLogger(__name__)


class Entrance:
    """What ``peer`` may see and enter of ``exports``, at any moment. Loop thread only."""

    def __init__(self, exports: Exports, peer: Peer, census: Census) -> None:
        self._exports = exports
        self._peer = peer
        self._census = census

    def list(self) -> Sequence[ExportInfo]:
        """All that the client may enter, in the operator's order (P32)."""
        verdicts: dict[Access, str] = {}  # thousands of exports have few demands between them
        listed = []
        for export in self._exports.by_name.values():
            verdict = verdicts.get(export.access)
            if verdict is None:
                verdict = verdicts[export.access] = self._objection(export)
            if not verdict:
                listed.append(export.info)
        return listed

    def find(self, name: str) -> ExportInfo | None:
        """The export of exactly that name (P31).

        Raises:
            OptionRefused: only TLS is missing (P64), or there are enough clients already.
        """
        export = self._exports.named(name)
        if export is None:
            return None
        objection = self._objection(export)
        if objection:
            _log.info("%s: not let into export %r: %s", self._peer, export.info.name, objection)
            if not self._peer.secure and export.access.demands_tls and not export.access.objection(self._peer):
                raise OptionRefused(OptionReply.ERR_TLS_REQD, f"export '{printable(name)}' needs TLS")
            return None
        self._check_room(export)
        return export.info

    def check_room_for_tls(self) -> None:
        """
        Raises:
            OptionRefused: there are enough clients that use TLS.
        """
        self._census.check_room_for_tls(self._peer)

    def chosen(self, negotiated: Negotiated) -> Export | None:
        """The export that a handshake has led to; None if it is not any more what the client was told."""
        export = self._exports.by_name.get(negotiated.export.name)
        if export is None or export.info != negotiated.export or self._objection(export):
            return None
        try:
            self._check_room(export)
        except OptionRefused:
            return None
        return export

    def _objection(self, export: Export) -> str:
        return export.access.objection(self._peer) or export.access.mistrust(self._peer)

    def _check_room(self, export: Export) -> None:
        limit = export.maximum_connections or self._census.limits.export_connections
        if limit and len(export.clients) >= limit:
            text = f"export '{printable(export.info.name)}' has its {limit} clients; try later"
            raise full(self._peer, text, "max-connections" if export.maximum_connections else "export-connections")
        self._census.check_room(self._peer)

"""Exports: named disks, as clients see them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from nbdq.block import BlockDevice
from nbdq.errors import ExportError, printable
from nbdq.nbd.constants import ALLOCATION_DEPTH, BASE_ALLOCATION, TransmissionFlag
from nbdq.nbd.handshake import ExportInfo

#: One process serves every connection from one device object, so CAN_MULTI_CONN is true (P90); FLUSH and FUA are
#: harmless on a read-only export, and some clients ask for them (P70).
_READ_ONLY_FLAGS = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.READ_ONLY
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.CAN_MULTI_CONN
    | TransmissionFlag.SEND_CACHE
)


@dataclass
class Export:
    """A disk under a name. The device stays the creator's."""

    info: ExportInfo
    device: BlockDevice
    maximum_connections: int = 0
    """0: no limit of its own."""
    connection_count: int = 0

    @classmethod
    def read_only(
        cls,
        name: str,
        device: BlockDevice,
        *,
        description: str = "",
        allocation_depth: bool = False,
        maximum_connections: int = 0,
    ) -> "Export":
        """An export that refuses every write; ``allocation_depth`` offers that metadata context too.

        Raises:
            ExportError: name or description is not fit for the protocol (P2).
        """
        contexts = (BASE_ALLOCATION, ALLOCATION_DEPTH) if allocation_depth else (BASE_ALLOCATION,)
        info = ExportInfo(name, device.size, _READ_ONLY_FLAGS, description=description, contexts=contexts)
        return cls(info, device, maximum_connections)

    @property
    def is_full(self) -> bool:
        """Whether no further client may come in."""
        return bool(self.maximum_connections) and self.connection_count >= self.maximum_connections


class Exports:
    """The exports of a server: the directory that a handshake looks things up in."""

    def __init__(self, exports: Sequence[Export]) -> None:
        """Names must differ.

        Raises:
            ExportError: two exports have one name.
        """
        self.by_name = {export.info.name: export for export in exports}
        if len(self.by_name) != len(exports):
            names = sorted(export.info.name for export in exports)
            twice = next(a for a, b in pairwise(names) if a == b)
            raise ExportError(f"two exports are named {printable(twice)!r}; give each its own with --export-name")

    def list(self) -> Sequence[ExportInfo]:
        """Everything on offer, in the operator's order."""
        return [export.info for export in self.by_name.values()]

    def find(self, name: str) -> ExportInfo | None:
        """The export of exactly that name (P31), unless it is full."""
        export = self.by_name.get(name)
        return None if export is None or export.is_full else export.info

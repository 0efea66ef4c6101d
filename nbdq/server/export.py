"""Exports: named disks, as clients see them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from nbdq.block import BlockDevice, WritableBlockDevice
from nbdq.errors import ExportError, printable
from nbdq.nbd.constants import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP, TransmissionFlag
from nbdq.nbd.handshake import ExportInfo
from nbdq.server.contexts import DirtyBitmap
from nbdq.server.writing import DetectZeroes, Writing

#: One process serves every connection from one device object, which keeps nothing for any of them: a flush covers what
#: all have written, and all read the same. So CAN_MULTI_CONN is true (P90, R-75).
_FLAGS = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.CAN_MULTI_CONN
    | TransmissionFlag.SEND_CACHE
)
#: FLUSH and FUA are harmless on a read-only export, and some clients ask for them (P70).
_READ_ONLY_FLAGS = _FLAGS | TransmissionFlag.READ_ONLY
_WRITABLE_FLAGS = (
    _FLAGS | TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO
)


@dataclass
class Export:
    """A disk under a name. The device stays the creator's."""

    info: ExportInfo
    device: BlockDevice
    maximum_connections: int = 0
    """0: no limit of its own."""
    writing: Writing | None = None
    """None for a read-only export."""
    bitmaps: Mapping[str, DirtyBitmap] = field(default_factory=dict)
    """Those that clients may ask for, by name (P48)."""
    connection_count: int = 0

    @classmethod
    def read_only(
        cls,
        name: str,
        device: BlockDevice,
        *,
        description: str = "",
        allocation_depth: bool = False,
        bitmaps: Mapping[str, DirtyBitmap] | None = None,
        maximum_connections: int = 0,
    ) -> "Export":
        """An export that refuses every write; ``allocation_depth`` and ``bitmaps`` are offered as metadata contexts.

        Raises:
            ExportError: name or description is not fit for the protocol (P2).
        """
        contexts = _contexts(bitmaps or (), allocation_depth=allocation_depth)
        info = ExportInfo(name, device.size, _READ_ONLY_FLAGS, description=description, contexts=contexts)
        return cls(info, device, maximum_connections, bitmaps=bitmaps or {})

    @classmethod
    def writable(
        cls,
        name: str,
        device: WritableBlockDevice,
        *,
        description: str = "",
        allocation_depth: bool = False,
        bitmaps: Mapping[str, DirtyBitmap] | None = None,
        maximum_connections: int = 0,
        discard: bool = True,
        detect_zeroes: DetectZeroes = DetectZeroes.OFF,
    ) -> "Export":
        """An export that clients may change. Without ``discard`` they cannot make it give up space.

        Nothing is flushed when clients leave; that is their duty (R-72), and the creator's before the device is closed.

        Raises:
            ExportError: name or description is not fit for the protocol (P2).
        """
        contexts = _contexts(bitmaps or (), allocation_depth=allocation_depth)
        info = ExportInfo(name, device.size, _WRITABLE_FLAGS, description=description, contexts=contexts)
        writing = Writing(device, discard=discard, detect_zeroes=detect_zeroes)
        return cls(info, device, maximum_connections, writing, bitmaps or {})

    @property
    def is_full(self) -> bool:
        """Whether no further client may come in."""
        return bool(self.maximum_connections) and self.connection_count >= self.maximum_connections


def _contexts(bitmaps: Iterable[str], *, allocation_depth: bool) -> tuple[str, ...]:
    depth = (ALLOCATION_DEPTH,) if allocation_depth else ()
    return (BASE_ALLOCATION, *depth, *(DIRTY_BITMAP + name for name in bitmaps))


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

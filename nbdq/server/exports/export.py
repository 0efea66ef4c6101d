"""Exports: named disks, as clients see them."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

from nbdq.block import BlockDevice, WritableBlockDevice
from nbdq.errors import ExportError, printable
from nbdq.nbd.constants import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP, TransmissionFlag
from nbdq.nbd.ending import Cause, Ending
from nbdq.nbd.exports import ExportInfo
from nbdq.server.admission.access import Access
from nbdq.server.exports.contexts import STANDARD, Context, DirtyBitmap, context_of_bitmap
from nbdq.server.exports.gate import Gate
from nbdq.server.exports.pause import Pause
from nbdq.server.exports.private_contexts import PRIVATE, SINCE, ShownLayer, context_since, with_private_contexts
from nbdq.server.exports.rate import Rates, Throttle
from nbdq.server.exports.writing import DetectZeroes, Writing
from nbdq.server.limits import CUT_SECONDS, REFUSE_SECONDS
from nbdq.server.monitoring.counters import Account

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

_REMOVED = Ending(Cause.CUT, "the export was removed")


class Client(Protocol):
    """A connection in the transmission phase, as its export sees it."""

    def shut_down(self, ending: Ending) -> None:
        """End when everything accepted is answered."""
        ...

    def refuse(self, ending: Ending) -> None:
        """Answer with errors what is not yet accepted, until the client leaves."""
        ...

    def abort(self) -> None:
        """End at once."""
        ...

    def resize(self, size: int) -> None:
        """The export has another size from now on."""
        ...


@dataclass(eq=False)
class Export:
    """A disk under a name. The device stays the creator's. Loop thread only."""

    info: ExportInfo
    """What new clients are told."""
    device: BlockDevice
    maximum_connections: int = 0
    """0: none of its own, but that of the server."""
    writing: Writing | None = None
    """None for a read-only export."""
    bitmaps: Mapping[str, DirtyBitmap] = field(default_factory=dict)
    """Those that clients may ask for, by name (P48)."""
    id: str = ""
    """What the operator calls it; the name, unless he says otherwise."""
    gate: Gate = field(default_factory=Gate)
    """That of the disk, which exports may share."""
    account: Account = field(default_factory=Account)
    """What its clients have done."""
    clients: set[Client] = field(default_factory=set)
    access: Access = field(default_factory=Access)
    """What new clients have to be or to prove; those that are there stay."""
    layers: Sequence[ShownLayer] = ()
    """What the disk consists of, top first."""
    throttle: Throttle | None = None
    """None without any limit; :meth:`limit` changes it."""
    is_derived: bool = False
    """Whether it came along with another export of its disk, to which it gives way."""
    on_left: Callable[[], None] = lambda: None
    """Called when the last client has left."""
    on_gone: Callable[[], None] = lambda: None
    """Called when nobody can come in any more, and nobody is left."""

    def __post_init__(self) -> None:
        self.id = self.id or self.info.name
        self._pause = Pause(self.gate.reconsider)

    @classmethod
    def make(
        cls,
        name: str,
        device: BlockDevice,
        *,
        writable: bool = False,
        id: str = "",
        gate: Gate | None = None,
        description: str = "",
        allocation_depth: bool = False,
        bitmaps: Mapping[str, DirtyBitmap] | None = None,
        layers: Sequence[ShownLayer] = (),
        maximum_connections: int = 0,
        access: Access | None = None,
        rates: Rates | None = None,
        discard: bool = True,
        detect_zeroes: DetectZeroes = DetectZeroes.OFF,
    ) -> "Export":
        """An export of ``device``, which has to be a :class:`~nbdq.block.WritableBlockDevice` if it is ``writable``.

        ``allocation_depth`` and ``bitmaps`` are offered as metadata contexts, and so are, if the device has ``layers``,
        those of nbdq's own. Without ``discard`` clients cannot make
        it give up space. Nothing is flushed when clients leave; that is their duty (R-72), and the creator's before
        the device is closed.

        Raises:
            ExportError: name or description is not fit for the protocol (P2).
        """
        bitmaps = {} if bitmaps is None else bitmaps
        flags = _WRITABLE_FLAGS if writable else _READ_ONLY_FLAGS
        depth = (ALLOCATION_DEPTH,) if allocation_depth else ()
        contexts = (BASE_ALLOCATION, *depth, *(DIRTY_BITMAP + bitmap for bitmap in bitmaps))
        info = ExportInfo(name, device.size, flags, description=description, contexts=contexts)
        writing = None
        if writable:
            writing = Writing(cast(WritableBlockDevice, device), discard=discard, detect_zeroes=detect_zeroes)
        export = cls(info, device, maximum_connections, writing, bitmaps, id, gate or Gate(), access=access or Access())
        export.limit(rates or Rates())
        export.adopt(device, layers)
        return export

    @classmethod
    def read_only(cls, name: str, device: BlockDevice, **options: Any) -> "Export":
        """:meth:`make` an export that refuses every write."""
        return cls.make(name, device, **options)

    @classmethod
    def writable(cls, name: str, device: WritableBlockDevice, **options: Any) -> "Export":
        """:meth:`make` an export that clients may change."""
        return cls.make(name, device, writable=True, **options)

    @property
    def connection_count(self) -> int:
        return len(self.clients)

    @property
    def is_held(self) -> bool:
        """Whether sessions must not begin anything."""
        return self._pause.is_on or self.gate.is_closed

    async def pause(self, seconds: float | None, on_expired: Callable[[], None] = lambda: None) -> None:
        """Hold its clients back, for at most so long; on return nothing that they began is in progress."""
        self._pause.begin(seconds, on_expired)
        await self.gate.wait_until_quiet(self)

    def resume(self) -> None:
        """Serve again."""
        self._pause.end()

    def cut(self, *, at_once: bool = False) -> None:
        """Have all clients leave, ``at_once`` or as soon as what they have sent is answered. For a moment they hear
        ESHUTDOWN of what they still ask for, because nobody serves them when they come back (P99); then they are hung
        up on, and who takes too long is cut."""
        self.resume()
        if at_once:
            self._cut_all()
            return
        for client in list(self.clients):  # one may be found to have left already
            client.refuse(_REMOVED)
        loop = asyncio.get_running_loop()
        loop.call_later(REFUSE_SECONDS, self._hang_up_on_all)
        loop.call_later(CUT_SECONDS, self._cut_all)

    def _hang_up_on_all(self) -> None:
        for client in list(self.clients):
            client.shut_down(_REMOVED)

    def _cut_all(self) -> None:
        for client in list(self.clients):
            client.abort()

    def adopt(self, device: BlockDevice, layers: Sequence[ShownLayer] = ()) -> None:
        """Show ``device`` from now on, at its size, to all clients; the gate is closed, or the device the same.

        New clients are offered what there is to know of its ``layers``; those that are there keep the contexts that
        they have, and the layers that these mean.
        """
        self.device = device
        if self.writing is not None:
            self.writing.adopt(cast(WritableBlockDevice, device))
        self.layers = layers
        self.info = with_private_contexts(replace(self.info, size=device.size), layers)
        for client in self.clients:
            client.resize(device.size)

    def context(self, name: str) -> Context:
        """One of the contexts on offer, for a client that has selected it now."""
        if name.startswith(DIRTY_BITMAP):
            return context_of_bitmap(name, self.bitmaps)
        if name.startswith(SINCE):
            return context_since(name, lambda: self.layers)
        return STANDARD[name] if name in STANDARD else PRIVATE[name]

    @property
    def admits_writers(self) -> bool:
        """Whether new clients may write."""
        return TransmissionFlag.READ_ONLY not in self.info.flags

    def admit_writers(self, admitted: bool) -> None:
        """Whether new clients may write; those that are there go on as they were told."""
        assert self.writing is not None
        self.info = replace(self.info, flags=_WRITABLE_FLAGS if admitted else _READ_ONLY_FLAGS)

    @property
    def rates(self) -> Rates:
        """How fast its clients may go, all together."""
        return Rates() if self.throttle is None else self.throttle.rates

    def limit(self, rates: Rates) -> None:
        """Change :attr:`rates`, for those that are there too. On the loop thread, or before there are clients."""
        if self.throttle is not None:
            self.throttle.change(rates)
            if not rates.are_limited:
                self.throttle = None
        elif rates.are_limited:
            self.throttle = Throttle(rates)

    def obey(self, *, access: Access, rates: Rates, maximum_connections: int) -> None:
        """Another policy from now on; nobody who is there is cut."""
        self.access = access
        self.limit(rates)
        self.maximum_connections = maximum_connections

    def describe(self, description: str) -> None:
        """Tell new clients another description.

        Raises:
            ExportError: it is not fit for the protocol (P2).
        """
        self.info = replace(self.info, description=description)


class Exports:
    """The exports of a server. Loop thread only."""

    def __init__(self, exports: Iterable[Export] = ()) -> None:
        """Names and ids must differ.

        Raises:
            ExportError: they do not.
        """
        self.by_name: dict[str, Export] = {}
        """Those that clients may choose, in the operator's order."""
        self.by_id: dict[str, Export] = {}
        """Those and the ones that are only left to their last clients."""
        self.default = ""
        """Name of the export that clients get who name none."""
        self.on_deleted: Callable[[Export], None] = lambda export: None
        """Told of every export that is gone: nobody can come in, and nobody is left."""
        for export in exports:
            self.add(export)

    def add(self, export: Export) -> None:
        """Offer ``export`` from now on.

        Raises:
            ExportError: name or id is taken.
        """
        there = self.by_name.get(export.info.name)
        if there is not None and there.is_derived:
            self.delete(there)  # exact names win
        elif there is not None:
            text = f"two exports are named {printable(export.info.name)!r}; give each a name of its own"
            raise ExportError(text)
        if export.id in self.by_id:
            raise ExportError(f"Block export id '{printable(export.id)}' is already in use")
        self.by_name[export.info.name] = self.by_id[export.id] = export

    def delete(self, export: Export) -> None:
        """Let nobody in any more; the export is gone when the last client has left."""
        if self.by_name.get(export.info.name) is export:
            del self.by_name[export.info.name]
        if not export.clients and self.by_id.get(export.id) is export:
            del self.by_id[export.id]
            export.on_gone()
            self.on_deleted(export)

    def named(self, name: str) -> Export | None:
        """The export that a client means: of exactly that name, or the default one if the name is empty (P31)."""
        return self.by_name.get(name) or (self.by_name.get(self.default) if not name else None)

    def free_id(self, id: str) -> str:
        """``id``, or with a number behind it while another export has it."""
        free, number = id, 2
        while free in self.by_id:
            free, number = f"{id}-{number}", number + 1
        return free

    def enter(self, export: Export, client: Client) -> None:
        """``client`` uses ``export`` from now on."""
        export.clients.add(client)

    def leave(self, export: Export, client: Client) -> None:
        """``client`` is gone."""
        export.clients.discard(client)
        if not export.clients:
            export.on_left()
        if self.by_name.get(export.info.name) is not export:
            self.delete(export)

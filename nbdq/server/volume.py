"""A disk that the server has open: its chain of images, and the exports that show it.

The place where the live structure of a disk meets its clients: whoever changes the structure does so inside
:meth:`Volume.drained`, and then has the exports :meth:`Volume.adopt` what came out.
"""

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from nbdq.block import BlockDevice
from nbdq.chain.bitmaps import find_bitmaps, live_bitmap
from nbdq.chain.disk import ChainDisk
from nbdq.chain.live import LiveChain
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.raw_disk import RawDisk
from nbdq.chain.views import View, open_view
from nbdq.errors import ExportError, NbdqError, OperationError, printable
from nbdq.server.access import Access
from nbdq.server.contexts import DirtyBitmap
from nbdq.server.counters import Counters
from nbdq.server.export import Export, Exports
from nbdq.server.gate import Gate
from nbdq.server.rate import Rates
from nbdq.server.threads import in_thread
from nbdq.server.writing import DetectZeroes

_log = logging.getLogger(__name__)

_ACTIVE = View()


@dataclass(frozen=True)
class Wish:
    """What an operator wants of an export."""

    id: str
    name: str
    description: str = ""
    writable: bool = False
    view: View = _ACTIVE
    """Other views than the disk itself are read-only."""
    bitmaps: Sequence[str] = ()
    allocation_depth: bool = False
    maximum_connections: int = 0
    access: Access = field(default_factory=Access)
    rates: Rates = field(default_factory=Rates)
    discard: bool = True
    detect_zeroes: DetectZeroes = DetectZeroes.OFF


@dataclass
class _Shown:
    """An export of the volume, and what it shows."""

    export: Export
    view: View
    bitmaps: dict[str, DirtyBitmap] = field(default_factory=dict)


class Volume:
    """One disk under a name. Owns its chain until :meth:`close`. Loop thread only, but for that."""

    def __init__(self, name: str, chain: LiveChain, directory: Exports) -> None:
        """``directory`` is the server's, into which the volume's exports are put."""
        self.name = name
        self.chain = chain
        self.gate = Gate()
        self._directory = directory
        self._shown: dict[str, _Shown] = {}
        self._retired = Counters()

    # The disk and its structure.

    def drained(self) -> AbstractAsyncContextManager[None]:
        """Inside ``async with``, no request of any client touches the device, nor an unsent reply a file of it; what
        clients send waits in their sockets.

        One task at a time, the others wait; who is inside may come in again. However the block ends, sessions go on
        where they were, on the device that was :meth:`adopt`-ed last. What blocks inside is done with
        :func:`nbdq.server.threads.in_thread`, which is not left before it is over, even if its task is cancelled.
        """
        return self.gate.closed()

    def steady(self) -> AbstractAsyncContextManager[None]:
        """Inside ``async with``, nobody else drains the disk, so its structure stays; clients are served."""
        return self.gate.steady()

    def adopt(self) -> None:
        """Let all exports show what the chain is now: another device, another size. The disk is drained.

        An export is deleted, and its clients are cut, if what it shows is gone: a layer that is no longer part of the
        chain, or that is the top and changes.
        """
        for shown in list(self._shown.values()):
            try:
                device = self._open(shown.view)
            except (NbdqError, OSError) as error:
                _log.warning("export %r has nothing to show any more: %s", shown.export.id, error)
                self.delete(shown.export)
                shown.export.cut(at_once=True)
                continue
            shown.export.adopt(device)
            for name in shown.bitmaps:
                # A bitmap that did not come along shows what had changed until then.
                shown.bitmaps[name] = live_bitmap(device, name) or shown.bitmaps[name]

    async def resize(self, size: int, *, shrink: bool = False) -> None:
        """Give the disk another size, durably. Clients that are connected may use what is new at once, although the
        protocol tells them nothing; what lies behind a smaller size is lost, and requests there are refused.

        Raises:
            OperationError: the disk is read-only; or it would become smaller, and ``shrink`` is not set.
            OSError: it could not be done; the disk has its old size.
        """
        async with self.steady():
            device = self._writable()
            if size > device.size:
                await in_thread(device.grow, size)
                self.adopt()
                return
        if size == device.size:
            return
        if not shrink:
            raise OperationError(
                f"{size} bytes are less than the {self.chain.device.size} that {printable(self.name)} has; "
                "what lies behind would be lost; to do it all the same, ask with x-nbdq-shrink"
            )
        async with self.drained():
            await in_thread(self._shrink, size)
            self.adopt()

    def _shrink(self, size: int) -> None:
        device = self._writable()
        if size < device.size:
            device.shrink(size)

    def _writable(self) -> OverlayDisk | RawDisk:
        if isinstance(self.chain.device, ChainDisk):
            raise OperationError(f"{printable(self.name)} is read-only")
        return self.chain.device

    async def flush(self) -> None:
        """Make durable what clients were told is written.

        Raises:
            OSError: it could not be.
        """
        async with self.steady():
            device = self.chain.device
            if not isinstance(device, ChainDisk):
                await in_thread(device.flush)

    async def pause(self, seconds: float | None, on_expired: Callable[[], None] = lambda: None) -> None:
        """Hold back all clients, for at most so long; on return nothing that they began is in progress."""
        self.gate.pause.begin(seconds, on_expired)
        await self.gate.wait_until_quiet()

    def resume(self) -> None:
        """Serve again."""
        self.gate.pause.end()

    def close(self) -> None:
        """Make everything durable, and close the files. No client is left.

        Raises:
            OSError: what was written last may be lost. Everything is closed nevertheless.
        """
        self.chain.close()

    # Exports.

    @property
    def exports(self) -> list[Export]:
        """Those that are there, the ones left to their last clients included."""
        return [shown.export for shown in self._shown.values()]

    def view_of(self, export: Export) -> View:
        """What an export of this volume shows."""
        return self._shown[export.id].view

    async def add(self, wish: Wish) -> Export:
        """Offer the disk, or a view of it, to clients.

        Raises:
            ExportError: name or id is taken, or not fit for the protocol; or there is no such bitmap.
            OperationError, ImageError, OSError: the view cannot be opened.
        """
        if wish.writable and (self.chain.read_only or wish.view != _ACTIVE):
            raise ExportError(f"Block node is read-only: export '{printable(wish.id)}' cannot be writable")
        async with self.steady():
            shown = await in_thread(self._make, wish)
            self._directory.add(shown.export)
            self._shown[wish.id] = shown
        return shown.export

    def open_first(self, wish: Wish) -> Export:
        """:meth:`add` before the server runs, when nobody waits."""
        shown = self._make(wish)
        self._directory.add(shown.export)
        self._shown[wish.id] = shown
        return shown.export

    def _make(self, wish: Wish) -> _Shown:
        view = wish.view
        if view.snapshot is not None and view.layer is None:
            view = View(self.chain.path, view.snapshot)  # where it is; there may be another top soon
        device = self._open(view)
        bitmaps: dict[str, DirtyBitmap] = {**find_bitmaps(device, wish.bitmaps, on_event=self.chain.on_event)}
        export = Export.make(
            wish.name,
            device,
            id=wish.id,
            gate=self.gate,
            description=wish.description,
            writable=wish.writable,
            bitmaps=bitmaps,
            allocation_depth=wish.allocation_depth,
            maximum_connections=wish.maximum_connections,
            access=wish.access,
            rates=wish.rates,
            discard=wish.discard,
            detect_zeroes=wish.detect_zeroes,
        )
        export.on_gone = lambda: self._forget(export)
        return _Shown(export, view, bitmaps)

    def _open(self, view: View) -> BlockDevice:
        return self.chain.device if view == _ACTIVE else open_view(self.chain, view)

    def delete(self, export: Export, *, hard: bool = False) -> None:
        """Let no new client in; the export is gone when the last one has left. ``hard``: have them leave, as soon as
        what they have sent is answered; who takes too long is cut."""
        self._directory.delete(export)
        if hard:
            export.cut()

    def _forget(self, export: Export) -> None:
        del self._shown[export.id]
        self._retired.add(export.account.total)

    # Numbers.

    def counters(self) -> Counters:
        """What clients of all exports have done so far, those included that are gone."""
        total = Counters()
        total.add(self._retired)
        for export in self.exports:
            total.add(export.account.total)
        return total


@asynccontextmanager
async def all_drained(volumes: Iterable[Volume]) -> AsyncIterator[None]:
    """Several volumes drained at once. They are waited for in the order of their names, so that two who want the same
    never wait for each other, and all of them before the first one is drained, so that no guest waits for another's."""
    ordered = sorted(set(volumes), key=lambda volume: volume.name)
    async with AsyncExitStack() as stack:
        for volume in ordered:
            await stack.enter_async_context(volume.steady())
        for volume in ordered:
            await stack.enter_async_context(volume.drained())
        yield

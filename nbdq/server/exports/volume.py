"""A disk that the server has open: its chain of images, and the exports that show it.

The place where the live structure of a disk meets its clients: whoever changes the structure does so inside
:meth:`Volume.drained`, and then has the exports :meth:`Volume.adopt` what came out.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from nbdq.block import BlockDevice
from nbdq.chain.bitmaps import find_bitmaps, live_bitmap
from nbdq.chain.disk import ChainDisk
from nbdq.chain.live import LiveChain
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.raw_disk import RawDisk
from nbdq.chain.views import View, open_view
from nbdq.errors import ExportError, NbdqError, OperationError, printable
from nbdq.server.exports.contexts import DirtyBitmap
from nbdq.server.exports.derived import EXPORTS_MAX, Derivation, Derived, LazyView, derived_wishes
from nbdq.server.exports.export import Export, Exports
from nbdq.server.exports.gate import Gate
from nbdq.server.exports.private_contexts import ShownLayer
from nbdq.server.exports.wish import Wish
from nbdq.server.monitoring.counters import Counters
from nbdq.server.threads import in_thread

_log = logging.getLogger(__name__)

_ACTIVE = View()


@dataclass
class Shown:
    """An export of the volume, and what it shows."""

    export: Export
    view: View
    bitmaps: dict[str, DirtyBitmap] = field(default_factory=dict)
    parent: str | None = None
    """Name of the export that it came along with, if it did."""


class Volume:
    """One disk under a name. Owns its chain until :meth:`close`. Loop thread only, but for that."""

    def __init__(self, name: str, chain: LiveChain, directory: Exports) -> None:
        """``directory`` is the server's, into which the volume's exports are put."""
        self.name = name
        self.chain = chain
        self.gate = Gate()
        self.is_closed = False
        self._directory = directory
        self._shown: dict[str, Shown] = {}
        self._retired = Counters()
        self._derivations: dict[str, Derivation] = {}
        self._derive_again = False
        self._deriving: asyncio.Task[None] | None = None
        self.is_restructured: Callable[[], bool] = lambda: False
        """Whether somebody may be writing to layers below the top."""
        self.on_idle: Callable[[], None] = lambda: None
        """Called when the last export is gone."""

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
            device = shown.export.device
            if isinstance(device, LazyView) and not shown.export.clients:
                device.forget()  # the rest can wait for derive_soon(); there may be hundreds
                continue
            try:
                self._show(shown)
            except (NbdqError, OSError) as error:
                _log.warning("export %r has nothing to show any more: %s", shown.export.id, error)
                self.delete(shown.export)
                shown.export.cut(at_once=True)

    def _show(self, shown: Shown) -> None:
        """Let an export show what the chain is now."""
        export = shown.export
        device = self._open(shown.view, lazy_size=export.info.size if export.is_derived else None)
        export.adopt(device, self._layers(shown.view))
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
                "what lies behind would be lost; to do it all the same, ask with x-nbdq-shrink "
                "(nbdq ctl resize --shrink)"
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
        self.is_closed = True
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
            return self.offer(await in_thread(self.make, wish))

    def offer(self, shown: Shown) -> Export:
        """Let clients in to an export that :meth:`make` has made; the disk may have changed in between.

        Raises:
            ExportError: name or id is taken.
        """
        if shown.view == _ACTIVE:
            self._show(shown)
        export = shown.export
        self._directory.add(export)
        self._shown[export.id] = shown
        return export

    def make(self, wish: Wish, *, derived: Derived | None = None) -> Shown:
        """An export that nobody sees yet, for :meth:`offer`. Any thread. What is ``derived`` opens what it shows when
        that is read.

        Raises:
            ExportError, OperationError, ImageError, OSError: as :meth:`add`, but for what is taken.
        """
        view = wish.view
        if view.snapshot is not None and view.layer is None:
            view = View(self.chain.path, view.snapshot)  # where it is; there may be another top soon
        device = self._open(view, lazy_size=derived.size if derived else None)
        bitmaps: dict[str, DirtyBitmap] = {**find_bitmaps(device, wish.bitmaps, on_event=self.chain.on_event)}
        export = Export.make(
            wish.name,
            device,
            id=wish.id,
            gate=self.gate,
            description=wish.description,
            writable=wish.writable,
            bitmaps=bitmaps,
            layers=self._layers(view),
            allocation_depth=wish.allocation_depth,
            maximum_connections=wish.maximum_connections,
            access=wish.access,
            rates=wish.rates,
            discard=wish.discard,
            detect_zeroes=wish.detect_zeroes,
        )
        export.is_derived = derived is not None
        export.on_left = partial(self._on_left, export)
        export.on_gone = lambda: self._forget(export)
        return Shown(export, view, bitmaps, derived.parent if derived else None)

    def _open(self, view: View, *, lazy_size: int | None) -> BlockDevice:
        if lazy_size is not None:
            assert view.layer is not None
            self.chain.index_of(view.layer)  # raises NotFound
            return LazyView(self.chain, view, lazy_size)
        return self.chain.device if view == _ACTIVE else open_view(self.chain, view)

    def _layers(self, view: View) -> list[ShownLayer]:
        """What ``view`` consists of, top first."""
        first = self.chain.index_of(view.layer) if view.layer is not None else 0
        return [
            ShownLayer(layer.storage, self.chain.node_name(index), layer.path.rpartition("/")[2])
            for index, layer in enumerate(self.chain.layers)
            if index >= first
        ]

    def delete(self, export: Export, *, hard: bool = False) -> None:
        """Let no new client in, here and where it came along; the export is gone when the last one has left. ``hard``:
        have them leave, as soon as what they have sent is answered; who takes too long is cut."""
        self._directory.delete(export)
        if hard:
            export.cut()
        if not export.is_derived and self._derivations.pop(export.info.name, None) is not None:
            for shown in [shown for shown in self._shown.values() if shown.parent == export.info.name]:
                self.delete(shown.export, hard=hard)

    def _on_left(self, export: Export) -> None:
        if isinstance(export.device, LazyView):
            export.device.forget()

    def _forget(self, export: Export) -> None:
        del self._shown[export.id]
        self._retired.add(export.account.total)
        if not self._shown:
            self.on_idle()

    # Exports that come along with others.

    def derive(self, name: str, derivation: Derivation | None) -> None:
        """What is to come along with the export ``name`` from the next :meth:`derive_now` or :meth:`derive_soon` on."""
        self._derivations.pop(name, None)
        if derivation is not None and (derivation.snapshots or derivation.layers):
            self._derivations[name] = derivation

    def policy_changed(self, export: Export) -> None:
        """What came along with ``export`` obeys the same policy from now on, and shares its rates."""
        for shown in self._shown.values():
            if shown.parent == export.info.name:
                self._obey_parent(shown.export, export)

    def _obey_parent(self, export: Export, parent: Export) -> None:
        export.access = parent.access
        export.maximum_connections = parent.maximum_connections
        export.throttle = parent.throttle

    def derive_now(self) -> None:
        """Offer what the derivations say, before the server runs."""
        for _ in self._offer_derived(self._derived_wishes(list(self._derivations.values()))):
            pass

    def derive_soon(self) -> None:
        """Offer what the derivations say now, once nobody restructures the disk; who did so calls this afterwards."""
        self._derive_again = bool(self._derivations) or any(shown.export.is_derived for shown in self._shown.values())
        if self._derive_again and (self._deriving is None or self._deriving.done()):
            self._deriving = asyncio.create_task(self._derive())

    async def _derive(self) -> None:
        while self._derive_again:
            self._derive_again = False
            async with self.steady():
                if self.is_restructured():
                    return  # who does calls us again
                wanted = await in_thread(self._derived_wishes, list(self._derivations.values()))
                for _ in self._offer_derived(wanted):
                    await asyncio.sleep(0)  # there may be hundreds, and clients of other disks wait
                    if self.is_restructured():
                        break

    def _derived_wishes(self, derivations: Sequence[Derivation]) -> list[Derived]:
        return [found for each in derivations for found in derived_wishes(self.chain, each)]

    def _offer_derived(self, wanted: Sequence[Derived]) -> Iterator[None]:
        """A step at a time."""
        kept = {each.wish.name: (each.wish.view, each.size, each.parent) for each in wanted}
        for shown in [shown for shown in self._shown.values() if shown.export.is_derived]:
            export = shown.export
            if kept.get(export.info.name) != (shown.view, export.info.size, shown.parent):
                self.delete(export)
            elif not export.clients:
                self._show(shown)  # what was opened may not be what is there now
                yield
        for each in wanted:
            parent = self._directory.by_name.get(each.parent)
            if parent is None or each.parent not in self._derivations:
                continue  # taken back while this was found out
            if len(self._directory.by_name) >= EXPORTS_MAX:
                _log.warning("%r and more are not offered: there are %d exports", each.wish.name, EXPORTS_MAX)
                return
            if each.wish.name not in self._directory.by_name:
                try:
                    shown = self.make(replace(each.wish, id=self._directory.free_id(each.wish.id)), derived=each)
                    self._obey_parent(self.offer(shown), parent)
                except ExportError as error:
                    _log.info("not offered: %s", error)
                yield

    def withdraw_derived(self, layers: Collection[str] | None = None) -> None:
        """Until :meth:`derive_soon`, take those back that nobody uses and that show one of these layers, or any."""
        for shown in list(self._shown.values()):
            if shown.export.is_derived and not shown.export.clients and (layers is None or shown.view.layer in layers):
                self.delete(shown.export)

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

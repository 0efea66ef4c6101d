"""The disks of a server, as the settings want them: opened, kept, exchanged and closed, while clients use them.

What is wanted is prepared as a whole, and only then changed as a whole: everything is open and every name is free, or
nothing has happened (R-77). A disk that stays is not opened anew, so its clients, its jobs, its other exports and what
an administrator has set go on untouched; a setting that the operator has changed counts, and no other. One that is
wanted no more lets nobody in, and is closed when its last client has left and no job is at work on it.
"""

import asyncio
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from nbdq.admin.service import Administration
from nbdq.chain.clusters import ClusterCache
from nbdq.cli.serve.settings import ExportSettings
from nbdq.cli.serve.volumes import open_chain, wish_of
from nbdq.errors import ExportError, NbdqError, in_words, printable
from nbdq.server.exports.derived import Derivation
from nbdq.server.exports.export import Export, Exports
from nbdq.server.exports.volume import Shown, Volume
from nbdq.server.exports.writing import DetectZeroes
from nbdq.server.threads import in_thread
from nbdq.storage import Identity, identity_of

_log = logging.getLogger(__name__)

#: Images of directories that are opened before others get their turn, and what there is by then is offered.
_OPENED_AT_ONCE = 64
#: Until we look again whether a disk that nobody wants any more can be closed, while a job is at work on it.
_AGAIN_SECONDS = 1.0


@dataclass(frozen=True)
class Wanted:
    """An export that is to be there."""

    settings: ExportSettings
    where: str = ""
    """Where that is written, for errors."""
    is_required: bool = True
    """Otherwise, if it cannot be offered, the log says so, and everything else is done; and a disk that is open for
    reading only stays so."""
    is_lower: bool = False
    """Another image lies over it, so it is opened for reading only."""
    identity: Identity | None = None
    """Which file the image has to be, when it is opened, if that was looked at before (R-36)."""

    def failed(self, error: Exception) -> ExportError:
        """The error in the name of whoever wants it."""
        return ExportError(f"{self.where}: {in_words(error)}" if self.where else in_words(error))


@dataclass(eq=False)
class _Disk:
    """A disk that is open, and its exports that settings want."""

    volume: Volume
    place: str
    """Of the image that the settings name, with all links followed."""
    identity: Identity | None
    """Which file that was."""
    opened_for: ExportSettings
    shown: dict[str, tuple[ExportSettings, Export]] = field(default_factory=dict)
    """By the names of the exports. None is left if the disk is to be closed."""


@dataclass
class _Change:
    """Everything prepared."""

    written: set[str]
    """Places of images that some export is to be writable of."""
    targets: dict[_Disk, dict[str, tuple[ExportSettings, Shown | None]]] = field(default_factory=dict)
    """What each disk is to show; what is shown already has nothing prepared."""
    opened: list[_Disk] = field(default_factory=list)
    disks: dict[str, list[_Disk]] = field(default_factory=dict)
    """Those that are or will be open, by the places of their images."""
    tops: dict[Identity, _Disk] = field(default_factory=dict)
    """Disks whose top is another image by now, by that."""
    names: set[str] = field(default_factory=set)
    default: str = ""
    is_partial: bool = False
    """Whether more is to be opened, and so another change has to follow."""

    def note(self, disk: _Disk) -> None:
        """It is or will be open."""
        self.disks.setdefault(disk.place, []).append(disk)
        top = disk.volume.chain.layers[0].storage.identity
        if top != disk.identity:
            self.tops[top] = disk

    def find(self, wanted: Wanted) -> _Disk | None:
        """The disk whose image is that file; if there is no file, it was of that place."""
        place, identity = os.path.realpath(wanted.settings.image), wanted.identity or _identity(wanted.settings.image)
        found = next((disk for disk in self.disks.get(place, ()) if identity in (None, disk.identity)), None)
        return self.tops.get(identity) if found is None and identity is not None else found

    def abandon(self) -> None:
        """Close what was opened; nobody has used it."""
        self.targets = {}
        self.close_unused()

    def close_unused(self) -> None:
        """Close what was opened in vain."""
        unused = [disk for disk in self.opened if disk not in self.targets]
        self.opened = [disk for disk in self.opened if disk in self.targets]
        for disk in unused:
            self.disks[disk.place] = [one for one in self.disks.get(disk.place, ()) if one is not disk]
            if not disk.volume.is_closed:
                disk.volume.close()


class Disks:
    """Owns the volumes until :meth:`close`. Loop thread only, once it runs."""

    def __init__(
        self, exports: Exports, administration: Administration, *, clusters: ClusterCache, index_bytes: int
    ) -> None:
        """``index_bytes`` are for the indexes of those that are opened together."""
        self._exports = exports
        self._administration = administration
        self._clusters = clusters
        self._index_bytes = index_bytes
        self._disks: list[_Disk] = []
        self._changing = asyncio.Lock()
        self._is_settled = False
        self._closing: set[asyncio.Task[None]] = set()
        self._ours: set[Export] = set()
        """What settings want, as opposed to administrators."""
        self._complaints: dict[str, str] = {}

    def __iter__(self) -> Iterator[Volume]:
        return iter([disk.volume for disk in self._disks])

    def open_first(self, wanted: Sequence[Wanted]) -> None:
        """:meth:`change` before the server runs.

        Raises:
            ExportError, ImageError, OSError: as :meth:`change`; what is open by then :meth:`close` closes.
        """
        change = self._prepare(wanted, len(wanted))
        self._carry_out(change)
        for disk in self._disks:
            disk.volume.derive_now()

    async def change(self, wanted: Sequence[Wanted]) -> None:
        """Let exactly these exports be there, besides those that administrators have added.

        Raises:
            ExportError: one cannot be opened or changed, or its name is taken; nothing has changed.
            OSError: the state file cannot be written; nothing has changed.
        """
        async with self._changing:
            while await self._change_partly(wanted):
                pass

    async def _change_partly(self, wanted: Sequence[Wanted]) -> bool:
        change = await in_thread(self._prepare, wanted, _OPENED_AT_ONCE)
        admitted: list[_Disk] = []
        try:
            for disk in change.opened:
                await self._administration.admit(disk.volume)
                admitted.append(disk)
            self._carry_out(change)
        except BaseException:
            for disk in admitted:
                with suppress(NbdqError, OSError):
                    await self._administration.dismiss(disk.volume)
            await in_thread(change.abandon)
            raise
        for disk in change.targets:
            disk.volume.derive_soon()
        return change.is_partial

    async def settle(self) -> None:
        """Close nothing by ourselves any more; what is being closed is closed on return."""
        self._is_settled = True
        async with self._changing:
            for task in list(self._closing):
                task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)

    def close(self) -> None:
        """Make everything that was written durable, and close all disks. The loop has ended, no client is left.

        Raises:
            ExportError: some disk could not be saved; all are closed nevertheless.
        """
        self._clusters.close()  # first, because it may be reading the disks
        failures = []
        for volume in self:
            if volume.is_closed:
                continue
            path = volume.chain.path
            try:
                volume.close()
            except OSError as error:
                failures.append(f"{printable(path)}: what was written last may be lost: {error.strerror or error}")
        if failures:
            raise ExportError("; ".join(failures))

    # Preparing: on any thread, changing nothing that anybody sees.

    def _prepare(self, wanted: Sequence[Wanted], at_once: int) -> _Change:
        writers = {each.settings.image for each in wanted if each.settings.writable and not each.is_lower}
        change = _Change(written=set(map(os.path.realpath, writers)))
        for there in self._disks:
            change.note(there)
        index_bytes = self._index_bytes // max(len(wanted), 1)
        complaints: dict[str, str] = {}
        try:
            for each in sorted(wanted, key=lambda each: not each.is_required):
                disk = change.find(each)
                if not each.is_required:
                    if disk is None and len(change.opened) >= at_once:
                        change.is_partial = True
                        continue
                    if self._is_overlay_of_ours(each.settings.image, disk):
                        continue
                    is_read_only = each.is_lower if disk is None else disk.volume.chain.read_only
                    each = replace(
                        each, settings=replace(each.settings, read_only=each.settings.read_only or is_read_only)
                    )
                try:
                    self._prepare_one(each, disk, change, index_bytes=index_bytes)
                except (NbdqError, OSError) as error:
                    if each.is_required:
                        raise (each.failed(error) if each.where else error) from None
                    if os.path.lexists(each.settings.image):  # else it has gone since the directory was looked at
                        complaints[each.settings.image] = in_words(error)
                    change.close_unused()
        except BaseException:
            change.abandon()
            raise
        for image, text in complaints.items():
            if self._complaints.get(image) != text:
                _log.warning("not offered: %s", text)
        self._complaints = complaints
        return change

    def _is_overlay_of_ours(self, image: str, disk: _Disk | None) -> bool:
        """Whether the image lies over a disk, or is about to, which keeps the name of the image that it began with."""
        if disk is not None:
            return disk.place != os.path.realpath(image)
        if self._administration.is_passing(image):
            return True
        identity = _identity(image)  # asked for only now, because it may have become a top since it was passing
        return any(disk.volume.chain.layers[0].storage.identity == identity for disk in self._disks)

    def _prepare_one(self, wanted: Wanted, disk: _Disk | None, change: _Change, *, index_bytes: int) -> None:
        settings = wanted.settings
        name = settings.export_name
        if name in change.names:
            raise ExportError(f"two exports are named {printable(name)!r}; give each a name of its own")
        self._check_name(name)
        if disk is None:
            disk = self._open(settings, wanted.identity or _identity(settings.image), change, index_bytes)
            change.opened.append(disk)
            change.note(disk)
        else:
            _check_openings(disk, settings)
        known = disk.shown.get(name)
        if known is not None and not _needs_another(known, settings):
            settings_before, export = known
            if settings_before.description != settings.description:
                replace(export.info, description=settings.description)  # raises if it does not fit the protocol
            prepared = None
        else:
            prepared = disk.volume.make(wish_of(settings, id=name or disk.volume.name))
        change.targets.setdefault(disk, {})[name] = settings, prepared
        change.names.add(name)
        if settings.default:
            change.default = name

    def _open(self, settings: ExportSettings, identity: Identity | None, change: _Change, index_bytes: int) -> _Disk:
        taken = {disk.volume.name for disks in change.disks.values() for disk in disks}
        name = _free(settings.export_name or ExportSettings(image=settings.image).export_name, taken)
        place = os.path.realpath(settings.image)
        chain = open_chain(
            replace(settings, read_only=settings.read_only and place not in change.written),
            name,
            identity=identity,
            clusters=self._clusters,
            top_of=self._administration.top_of,
            index_bytes=index_bytes,
        )
        return _Disk(Volume(name, chain, self._exports), place, identity, settings)

    # Carrying out: at one moment for all clients.

    def _carry_out(self, change: _Change) -> None:
        for name in change.names:
            self._check_name(name)
        for disk in self._disks:
            self._withdraw(disk, change.targets.get(disk, {}))
        self._disks += change.opened
        for disk, target in change.targets.items():
            disk.volume.on_idle = lambda: None
            for name, (settings, prepared) in target.items():
                if prepared is None and disk.shown[name][0] == settings:
                    continue
                self._show(disk, name, settings, prepared)
        self._exports.default = change.default

    def _check_name(self, name: str) -> None:
        """Refuse a name that an administrator has given to an export of his own."""
        there = self._exports.by_name.get(name)
        if there is not None and there not in self._ours and not there.is_derived:
            raise ExportError(f"an administrator has added an export named {printable(name)!r}; remove that first")

    def _withdraw(self, disk: _Disk, target: dict[str, tuple[ExportSettings, Shown | None]]) -> None:
        """Let nobody in to exports that are wanted no more, or in another form."""
        if not (disk.shown or target):
            return  # it was let go before, and is closed when it is free
        for name, (_, export) in list(disk.shown.items()):
            if name not in target or target[name][1] is not None:
                del disk.shown[name]
                self._ours.discard(export)
                disk.volume.delete(export)
        if not disk.shown and not target:
            self._retire(disk)

    def _show(self, disk: _Disk, name: str, settings: ExportSettings, prepared: Shown | None) -> None:
        volume = disk.volume
        if prepared is None:
            before, export = disk.shown[name]
            _update(volume, export, before, settings)
        else:
            export = prepared.export
            export.id = self._exports.free_id(export.id)
            volume.offer(prepared)
            if volume.chain.write_threshold != settings.write_threshold and settings.write_threshold is not None:
                volume.chain.set_write_threshold(settings.write_threshold)
        disk.shown[name] = settings, export
        self._ours.add(export)
        wish = wish_of(settings, id=export.id)
        volume.derive(name, Derivation(wish, snapshots=settings.snapshots, layers=settings.layers))
        volume.policy_changed(export)  # an administrator may have changed it

    # Closing what is wanted no more.

    def _retire(self, disk: _Disk) -> None:
        volume = disk.volume
        volume.on_idle = lambda: self._close_soon(disk)
        if not volume.exports:
            self._close_soon(disk)
        else:
            _log.info("%s is closed when its last client has left", printable(volume.name))

    def _close_soon(self, disk: _Disk) -> None:
        if self._is_settled:
            return
        task = asyncio.get_running_loop().create_task(self._close_when_free(disk))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close_when_free(self, disk: _Disk) -> None:
        volume = disk.volume
        while True:
            async with self._changing:
                if disk not in self._disks or disk.shown or volume.exports:
                    return
                try:
                    await self._administration.dismiss(volume)
                except (NbdqError, OSError) as error:
                    if volume.is_closed:
                        _log.error("%s: what was written last may be lost: %s", printable(volume.name), in_words(error))
                    else:
                        _log.debug("not closed yet: %s", error)
                if volume.is_closed:
                    self._disks.remove(disk)
                    _log.info("%s is closed", printable(volume.name))
                    return
            await asyncio.sleep(_AGAIN_SECONDS)


def _identity(path: str) -> Identity | None:
    with suppress(OSError, ValueError):
        return identity_of(path)
    return None


def _free(name: str, taken: set[str]) -> str:
    free, number = name, 2
    while free in taken:
        free, number = f"{name}-{number}", number + 1
    return free


def _check_openings(disk: _Disk, settings: ExportSettings) -> None:
    """Refuse what an image would have to be opened anew for."""
    before = disk.opened_for
    for key in ("format", "backing", "allow_backing", "allow_data_file", "force_share", "snapshot"):
        if getattr(before, key) != getattr(settings, key):
            raise ExportError(
                f"{printable(settings.image, 1024)}: {key.replace('_', '-')} is another than it was opened with; "
                "remove its exports, and add them when it is closed, or start the server anew"
            )
    if settings.writable and disk.volume.chain.read_only:
        raise ExportError(
            f"{printable(settings.image, 1024)}: is open for reading only, and cannot be written to; "
            "remove its exports, and add them when it is closed, or start the server anew"
        )


def _needs_another(known: tuple[ExportSettings, Export], settings: ExportSettings) -> bool:
    """Whether the export cannot just be changed: what it is to clients who are there must not change."""
    before, export = known
    return (
        before.bitmaps != settings.bitmaps
        or before.allocation_depth != settings.allocation_depth
        or (settings.writable and export.writing is None)
    )


def _update(volume: Volume, export: Export, before: ExportSettings, settings: ExportSettings) -> None:
    """Change what the operator has changed; what an administrator has set meanwhile stays otherwise."""
    if before.description != settings.description:
        export.describe(settings.description)
    if (before.access, before.rate, before.max_connections) != (
        settings.access,
        settings.rate,
        settings.max_connections,
    ):
        export.obey(access=settings.access.make(), rates=settings.rate, maximum_connections=settings.max_connections)
    if export.writing is not None:
        if (before.discard, before.detect_zeroes) != (settings.discard, settings.detect_zeroes):
            detect = DetectZeroes(settings.detect_zeroes)
            export.writing.set(discard=settings.discard == "unmap", detect_zeroes=detect)
        if before.writable != settings.writable:
            export.admit_writers(settings.writable)
    if before.write_threshold != settings.write_threshold:
        volume.chain.set_write_threshold(settings.write_threshold)

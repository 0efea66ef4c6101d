"""What a running server reads again: its configuration file, certificates, and directories of exports (R-77).

A reload is one step: the file is read and checked as a whole, certificates are read, images opened, and only then does
anything change; else everything stays as it was, and the log or the administrator hears why.
"""

import asyncio
import logging
import signal
from collections.abc import Callable
from dataclasses import fields

from nbdq.cli.logs import configure_logging
from nbdq.cli.serve.config_file import report, where
from nbdq.cli.serve.disks import Disks, Wanted
from nbdq.cli.serve.limits import check_descriptors, fit
from nbdq.cli.serve.settings import DirectorySettings, ExportSettings, Offer, Settings
from nbdq.errors import ExportError, NbdqError, in_words, printable
from nbdq.server.exports.directory import Format, list_images
from nbdq.server.notify import Notifier
from nbdq.server.server import Server
from nbdq.server.threads import in_thread
from nbdq.server.tls.credentials import Tls

_log = logging.getLogger(__name__)

#: Sections that only a new start puts into force.
_FIXED = ("listen", "admin", "metrics", "server")
#: How often we look whether there is a directory to be looked at by now.
_IDLE_SECONDS = 1.0
_OFFER = tuple(field.name for field in fields(Offer))


class Catalogue:
    """What settings want: the exports that they name, and those that their directories hold. Not thread-safe."""

    def __init__(self, *, of_file: bool) -> None:
        """``of_file``: the settings are from a file, in which errors say where."""
        self._of_file = of_file
        self._seen: dict[DirectorySettings, list[Wanted]] = {}
        self._complaints: dict[str, str] = {}

    def wanted(self, settings: Settings) -> list[Wanted]:
        """Everything, in the operator's order; waits for disks. A directory that cannot be read holds what it held
        before, and the log says so once.

        Raises:
            ExportError, OSError: a directory was never read, and cannot be.
        """
        found = [
            Wanted(export, where(number, export) if self._of_file else "")
            for number, export in enumerate(settings.export, 1)
        ]
        seen = {}
        for directory in settings.export_directory:
            try:
                seen[directory] = _images_in(directory)
                self._complaints.pop(directory.path, None)
            except (ExportError, OSError) as error:
                if directory not in self._seen:
                    raise
                seen[directory] = self._seen[directory]
                if self._complaints.get(directory.path) != in_words(error):
                    self._complaints[directory.path] = in_words(error)
                    _log.warning("export directory %s: %s", printable(directory.path, 1024), in_words(error))
            found += seen[directory]
        self._seen = seen
        return found


def _images_in(directory: DirectorySettings) -> list[Wanted]:
    formats: dict[str, Format] = dict.fromkeys(directory.qcow2, "qcow2")
    formats.update(dict.fromkeys(directory.raw, "raw"))
    offer = {name: getattr(directory, name) for name in _OFFER}
    return [
        Wanted(
            ExportSettings(
                image=found.path,
                name=directory.prefix + found.name,
                format=found.format,
                read_only=directory.read_only,
                **offer,
            ),
            is_required=False,
            is_lower=found.has_overlay,
            identity=found.identity,
        )
        for found in list_images(directory.path, formats)
    ]


class Reloader:
    """Keeps a server as its settings want it. Loop thread only."""

    def __init__(
        self,
        settings: Settings,
        load: Callable[[], Settings] | None,
        catalogue: Catalogue,
        disks: Disks,
        server: Server,
        tls: Tls | None,
        notifier: Notifier,
    ) -> None:
        """``load`` reads the settings anew; None if they cannot change, as they are those of a command line."""
        self._settings = settings
        self._load = load
        self._catalogue = catalogue
        self._disks = disks
        self._server = server
        self._tls = tls
        self._notifier = notifier
        self._tasks: list[asyncio.Task[None]] = []
        self._one_at_a_time = asyncio.Lock()

    async def reload(self) -> None:
        """Read everything again. On return it is in force.

        Raises:
            ExportError, OSError: something is wrong; nothing has changed.
        """
        async with self._one_at_a_time:
            before = self._settings
            settings = before if self._load is None else await in_thread(self._load)
            _check_fixed(before, settings)
            if self._tls is not None:
                await in_thread(Tls, settings.tls)  # refuses what cannot be
            await self._disks.change(await in_thread(self._catalogue.wanted, settings))
            self._settings = settings
            if self._tls is not None:
                try:
                    self._tls.reload(settings.tls)
                except ExportError as error:  # exchanged again since we looked
                    _log.error("certificates and keys stay as they were: %s", error)
            if before.limits != settings.limits:
                self._server.limit(fit(settings.limits))
            check_descriptors(settings.limits)
            if before.log != settings.log:
                configure_logging(verbosity=settings.log.verbosity, log_format=settings.log.format)
            _log.info("reloaded")

    def start(self) -> None:
        """Reload on SIGHUP from now on, and look at directories of exports as often as the settings say."""
        hung_up = asyncio.Event()
        loop = asyncio.get_running_loop()
        # No handler of the loop's, which would be gone with the loop, when disks are still being saved.
        signal.signal(signal.SIGHUP, lambda *_: loop.call_soon_threadsafe(hung_up.set))
        self._tasks = [asyncio.create_task(self._on_hangups(hung_up)), asyncio.create_task(self._rescan())]

    async def stop(self) -> None:
        """Do no more by ourselves. SIGHUP means nothing from now on."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._disks.settle()

    async def _on_hangups(self, hung_up: asyncio.Event) -> None:
        while True:
            await hung_up.wait()
            hung_up.clear()
            self._notifier.reloading()
            try:
                await self.reload()
            except (NbdqError, OSError) as error:
                for line in report(error):
                    _log.error("not reloaded: %s", line)
            except Exception:
                _log.exception("not reloaded")
            finally:
                self._notifier.reloaded()

    async def _rescan(self) -> None:
        while True:
            periods = [each.rescan_seconds for each in self._settings.export_directory if each.rescan_seconds]
            await asyncio.sleep(min(periods, default=_IDLE_SECONDS))
            if not periods:
                continue
            async with self._one_at_a_time:
                try:
                    await self._disks.change(await in_thread(self._catalogue.wanted, self._settings))
                except (NbdqError, OSError) as error:
                    _log.warning("export directories: %s", in_words(error))
                except Exception:
                    _log.exception("export directories")


def _check_fixed(before: Settings, after: Settings) -> None:
    """Refuse to pretend that something is in force that is not."""
    for name in _FIXED:
        if getattr(before, name) != getattr(after, name):
            raise ExportError(f"section {name} has changed, which needs a new start; nothing was reloaded")
    if before.tls.mode_of(None) != after.tls.mode_of(None):
        raise ExportError("tls: whether clients use TLS has changed, which needs a new start; nothing was reloaded")

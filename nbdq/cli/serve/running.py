"""A server from its settings: everything opened before anybody can connect, and closed in the end, come what may."""

import asyncio
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass

import uvloop

from nbdq.admin.service import Administration
from nbdq.chain.clusters import ClusterCache
from nbdq.cli.logs import configure_logging
from nbdq.cli.serve.administration import open_administration
from nbdq.cli.serve.caller import Caller
from nbdq.cli.serve.captive import run_command, variables
from nbdq.cli.serve.disks import Disks
from nbdq.cli.serve.lifecycle import StartSettings, process_id_in
from nbdq.cli.serve.limits import check_descriptors, fit, raise_descriptors
from nbdq.cli.serve.listeners import one_of_role, open_listeners
from nbdq.cli.serve.metrics import Monitoring, listen_for_monitoring
from nbdq.cli.serve.reload import Catalogue, Reloader
from nbdq.cli.serve.settings import Settings
from nbdq.cli.serve.signals import StopSignals
from nbdq.cli.serve.tls import open_tls
from nbdq.server.exports.export import Exports
from nbdq.server.listener import Listener
from nbdq.server.server import Server
from nbdq.server.tls.credentials import Tls
from nbdq.storage import share_one_heap

#: What a second signal leaves of the time for an end in peace.
_HURRY_SECONDS = 2.0
#: What we ask of a service manager for the rest, when nobody is served any more: as long as a disk may take to write
#: out everything that it holds in memory.
_SAVE_SECONDS = 300.0


def run(settings: Settings, start: StartSettings | None = None, *, load: Callable[[], Settings] | None = None) -> int:
    """Serve until a signal or an administrator says stop, or the command of ``start`` has ended; then everything
    written is durable (R-76). ``load`` reads the settings anew when SIGHUP or an administrator says so (R-77).

    Returns:
        The exit status: 0, or that of the command.

    Raises:
        ImageError, ExportError, StateError, PolicyError, OSError: something cannot be opened, or saved in the end.
        click.UsageError: settings contradict the sockets of socket activation.
        SystemExit: signals ended the start; or this process was only to put a server into the background.
    """
    start = start or StartSettings()
    configure_logging(verbosity=settings.log.verbosity, log_format=settings.log.format)
    caller = Caller(start)
    share_one_heap()
    raise_descriptors()
    exports = Exports()
    clusters = ClusterCache(budget=settings.limits.inflated_bytes)
    with (
        StopSignals() as signals,
        closing(open_administration(settings.admin, one_of_role(caller.sockets, "admin"))) as administrators,
        closing(Disks(exports, administrators, clusters=clusters, index_bytes=settings.limits.index_bytes)) as disks,
        ExitStack() as undo,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        catalogue = Catalogue(of_file=load is not None)
        with signals.interruptible():
            disks.open_first(catalogue.wanted(settings))
        captive = start.run is not None
        listeners = open_listeners(settings.listen, caller.sockets, settings.tls, captive=captive, undo=undo)
        parts = _Parts(
            settings=settings,
            load=load,
            command=start.run,
            caller=caller,
            signals=signals,
            exports=exports,
            disks=disks,
            catalogue=catalogue,
            clusters=clusters,
            administrators=administrators,
            listeners=listeners,
            tls=open_tls(settings.tls, [listener.tls for listener in listeners]),
            monitors=listen_for_monitoring(settings.metrics, one_of_role(caller.sockets, "metrics"), undo),
        )
        return runner.run(_serve(parts))


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What a server is put together from, all of it open before there is a loop."""

    settings: Settings
    load: Callable[[], Settings] | None
    command: str | None
    """The server lives for that alone."""
    caller: Caller
    signals: StopSignals
    exports: Exports
    disks: Disks
    catalogue: Catalogue
    clusters: ClusterCache
    administrators: Administration
    listeners: list[Listener]
    tls: Tls | None
    monitors: list[Listener]


async def _serve(parts: _Parts) -> int:
    """Serve until the end; the exit status."""
    settings, caller, administrators = parts.settings, parts.caller, parts.administrators
    exports, disks, listeners = parts.exports, parts.disks, parts.listeners
    stop = asyncio.Event()
    server = Server(exports, listeners, fit(settings.limits), tls=parts.tls)
    jobs = administrators.jobs
    monitoring = Monitoring(parts.monitors, server, disks, parts.clusters, lambda: [job.info() for job in jobs])

    def on_signal(count: int) -> None:
        stop.set()
        if count > 1:
            server.hurry(_HURRY_SECONDS)
            asyncio.get_running_loop().call_later(_HURRY_SECONDS, administrators.hurry)

    parts.signals.deliver(on_signal)
    reloader = Reloader(settings, parts.load, parts.catalogue, disks, server, parts.tls, caller.notifier)
    patience = settings.limits.drain_seconds
    try:
        await administrators.start(disks, exports, stop.set, reloader.reload)
        try:
            check_descriptors(settings.limits)
            server.start()
            monitoring.is_ready = True
            with process_id_in(settings.server.pid_file):
                reloader.start()  # who hears that we are ready may have changed something by then, and say so
                caller.tell_ready(listener.uri(name) for listener in listeners for name in exports.by_name)
                caller.notifier.start(lambda: _status(exports))
                if parts.command is not None:
                    name = next(iter(exports.by_name), "")
                    return await run_command(parts.command, variables(listeners[0], name), stop)
                await stop.wait()
                return 0
        finally:
            caller.notifier.stopping("waiting for clients to finish", within=2 * patience + _SAVE_SECONDS)
            monitoring.is_ready = False
            await reloader.stop()
            server.admit_nobody()
            await administrators.stop(within=patience)
    finally:
        await server.stop(refuse=settings.server.on_stop == "refuse")
        await monitoring.stop()
        caller.notifier.stopping("saving what was written", within=_SAVE_SECONDS)
        parts.signals.ignore()


def _status(exports: Exports) -> str:
    clients = sum(export.connection_count for export in exports.by_id.values())
    return f"{len(exports.by_name)} exports, {clients} clients"

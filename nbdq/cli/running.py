"""A server from its settings: everything opened before anybody can connect, and closed in the end, come what may."""

import asyncio
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import uvloop

from nbdq.admin.service import Administration
from nbdq.chain.clusters import ClusterCache
from nbdq.cli.administration import open_administration
from nbdq.cli.logs import configure_logging
from nbdq.cli.settings import ListenSettings, Settings
from nbdq.cli.volumes import open_volumes
from nbdq.errors import ExportError, printable
from nbdq.nbd.constants import DEFAULT_PORT
from nbdq.server.export import Exports
from nbdq.server.listener import Listener, listen_tcp, listen_unix
from nbdq.server.server import Server
from nbdq.server.volume import Volume
from nbdq.storage import share_one_heap

_log = logging.getLogger(__name__)


def run(settings: Settings) -> None:
    """Serve until a signal or an administrator says stop; then everything written is durable (R-76).

    Raises:
        ImageError, ExportError, StateError, PolicyError, OSError: something cannot be opened, or saved in the end.
    """
    configure_logging(verbosity=settings.log.verbosity, log_format=settings.log.format)
    share_one_heap()
    exports = Exports()
    clusters = ClusterCache(budget=settings.limits.inflated_bytes)
    with (
        closing(open_administration(settings.admin)) as administrators,
        open_volumes(
            settings.export,
            exports,
            clusters=clusters,
            top_of=administrators.top_of,
            index_bytes=settings.limits.index_bytes,
        ) as volumes,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(_serve(settings, exports, volumes, administrators, _listen(settings.listen)))


def _listen(places: tuple[ListenSettings, ...]) -> list[Listener]:
    listeners: list[Listener] = []
    try:
        for place in places:
            if place.socket is not None:
                listeners.append(listen_unix(place.socket, mode=place.mode))
            else:
                listeners += listen_tcp(place.address, DEFAULT_PORT if place.port is None else place.port)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


async def _serve(
    settings: Settings,
    exports: Exports,
    volumes: list[Volume],
    administrators: Administration,
    listeners: list[Listener],
) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = Server(exports, listeners, settings.limits)
    try:
        await administrators.start(volumes, exports, stop.set)
        try:
            server.start()
            with _process_id_in(settings.server.pid_file):
                for listener in listeners:
                    for name in exports.by_name:
                        print(listener.uri(name), flush=True)
                await stop.wait()
        finally:
            await administrators.stop()
    finally:
        await server.stop()


@contextmanager
def _process_id_in(path: str | None) -> Iterator[None]:
    """Keep our process id in the file at ``path``, if there is to be one, for as long as clients can connect."""
    if path is None:
        yield
        return
    try:
        Path(path).write_text(f"{os.getpid()}\n")
    except OSError as error:
        raise ExportError(f"cannot write the pid file {printable(path)}: {error.strerror}") from None
    try:
        yield
    finally:
        try:
            Path(path).unlink(missing_ok=True)
        except OSError as error:
            _log.warning("cannot remove the pid file %s: %s", printable(path), error.strerror)

"""``nbdq serve``: images to exports, until a signal says stop."""

import asyncio
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import click
import uvloop

from nbdq.admin.service import Administration
from nbdq.chain.clusters import ClusterCache
from nbdq.cli.administration import administration_options, open_administration
from nbdq.cli.logs import configure_logging
from nbdq.cli.options import CHAIN_OPTIONS, Mode, Size, chain_arguments, chain_options
from nbdq.cli.volumes import export_names, one_each, open_volumes
from nbdq.errors import ExportError, printable
from nbdq.nbd.constants import DEFAULT_PORT
from nbdq.server.export import Exports
from nbdq.server.limits import Limits
from nbdq.server.listener import Listener, listen_tcp, listen_unix
from nbdq.server.server import Server
from nbdq.server.volume import Volume, Wish
from nbdq.server.writing import DetectZeroes
from nbdq.storage import share_one_heap

_log = logging.getLogger(__name__)


@click.command("serve")
@chain_options
@click.option("-k", "--socket", type=click.Path(), help="Listen on this unix socket.")
@click.option("-b", "--bind", default=None, help="Listen on this address.  [default: 127.0.0.1, unless --socket]")
@click.option(
    "-p",
    "--port",
    type=click.IntRange(0, 65535),
    default=None,
    help=f"Listen on this TCP port; 0 chooses a free one.  [default: {DEFAULT_PORT}, unless --socket]",
)
@click.option("--socket-mode", type=Mode(), default="0600", show_default=True, help="File mode of the unix socket.")
@click.option(
    "-x",
    "--export-name",
    "names",
    multiple=True,
    help="Name of the export; once for each IMAGE.  [default: empty, or file names if there are several]",
)
@click.option("-D", "--description", "descriptions", multiple=True, help="Text about the export; once for each IMAGE.")
@click.option("-r", "--read-only", is_flag=True, help="Refuse writes, as --load-snapshot and --force-share do too.")
@click.option(
    "--discard",
    type=click.Choice(["unmap", "ignore"]),
    default="unmap",
    show_default=True,
    help="Whether clients can make images give up space.",
)
@click.option(
    "--detect-zeroes",
    type=click.Choice([choice.value for choice in DetectZeroes]),
    default=DetectZeroes.OFF.value,
    show_default=True,
    help="Turn writes of zeros into zeroing that keeps the space, or with unmap gives it up.",
)
@click.option(
    "--write-threshold",
    type=Size(),
    default=None,
    help="Warn in the log when an image file grows past this, in time to extend a thin volume.",
)
@click.option(
    "-l",
    "--load-snapshot",
    "snapshot",
    default=None,
    help="Serve an internal snapshot of IMAGE: its id or name, or snapshot.id=ID,snapshot.name=NAME.",
)
@click.option(
    "-B",
    "--bitmap",
    "bitmaps",
    multiple=True,
    help="Offer this dirty bitmap of IMAGE, or of the first layer below that has one of the name, as the metadata "
    "context qemu:dirty-bitmap:NAME; may be repeated.",
)
@click.option("-A", "--allocation-depth", is_flag=True, help="Offer the qemu:allocation-depth metadata context.")
@click.option(
    "-e",
    "--shared",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Clients that an export takes at once; 0 for no limit.",
)
@click.option("-t", "--persistent", is_flag=True, help="Accepted for qemu-nbd's sake: nbdq always serves on.")
@administration_options
@click.option("--pid-file", type=click.Path(), help="Write the process id here once clients can connect.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Lines for people, or an object a line.",
)
@click.option("-v", "--verbose", count=True, help="Log clients; twice: everything.")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=click.Path())
def serve_command(
    images: tuple[str, ...],
    socket: str | None,
    bind: str | None,
    port: int | None,
    socket_mode: int,
    names: tuple[str, ...],
    descriptions: tuple[str, ...],
    read_only: bool,
    discard: str,
    detect_zeroes: str,
    write_threshold: int | None,
    snapshot: str | None,
    bitmaps: tuple[str, ...],
    allocation_depth: bool,
    shared: int,
    persistent: bool,
    pid_file: str | None,
    log_format: str,
    verbose: int,
    **options: Any,
) -> None:
    """Serve each IMAGE, with its whole chain, as an NBD export.

    Clients can write to IMAGE, never to what is below it. Prints the URI of each export when clients can connect.
    SIGTERM or SIGINT ends it cleanly; everything written is durable then.
    """
    chain = {name: value for name, value in options.items() if name in CHAIN_OPTIONS}
    administration = {name: value for name, value in options.items() if name not in CHAIN_OPTIONS}
    configure_logging(verbosity=verbose, log_format=log_format)
    share_one_heap()
    if len(images) > 1 and (chain["backing"] or snapshot or bitmaps):
        raise click.UsageError("--backing, --load-snapshot and --bitmap are for a single IMAGE")
    if detect_zeroes == DetectZeroes.UNMAP and discard == "ignore":
        raise click.UsageError("--detect-zeroes unmap gives up space, which --discard ignore forbids")
    limits = Limits()
    texts = one_each("--description", descriptions, images, default=[""] * len(images))
    wishes = [
        Wish(
            id=name,
            name=name,
            description=text,
            writable=not (read_only or snapshot is not None or chain["force_share"]),
            bitmaps=bitmaps,
            allocation_depth=allocation_depth,
            maximum_connections=shared,
            discard=discard == "unmap",
            detect_zeroes=DetectZeroes(detect_zeroes),
        )
        for name, text in zip(export_names(names, images), texts, strict=True)
    ]
    directory = Exports()
    with (
        closing(open_administration(**administration)) as administrators,
        open_volumes(
            images,
            wishes,
            directory,
            clusters=ClusterCache(budget=limits.inflated_bytes),
            top_of=administrators.top_of,
            snapshot=snapshot,
            index_budget=limits.index_bytes // len(images),
            write_threshold=write_threshold,
            on_event=_log.warning,
            **chain_arguments(**chain),
        ) as volumes,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        listeners = _listen(socket, bind, port, socket_mode)
        runner.run(_serve(directory, volumes, administrators, listeners, limits, pid_file))


def _listen(socket: str | None, bind: str | None, port: int | None, socket_mode: int) -> list[Listener]:
    listeners: list[Listener] = []
    try:
        if socket is not None:
            listeners.append(listen_unix(socket, mode=socket_mode))
        if socket is None or bind is not None or port is not None:
            listeners += listen_tcp(bind or "127.0.0.1", DEFAULT_PORT if port is None else port)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


async def _serve(
    exports: Exports,
    volumes: list[Volume],
    administrators: Administration,
    listeners: list[Listener],
    limits: Limits,
    pid_file: str | None,
) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = Server(exports, listeners, limits)
    try:
        await administrators.start(volumes, exports, stop.set)
        try:
            server.start()
            with _process_id_in(pid_file):
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

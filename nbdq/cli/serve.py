"""``nbdq serve``: images to exports, until a signal says stop."""

import asyncio
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import click
import uvloop

from nbdq.block import BlockDevice, WritableBlockDevice
from nbdq.chain.bitmaps import find_bitmaps
from nbdq.chain.clusters import ClusterCache
from nbdq.chain.open import open_disk, open_writable
from nbdq.cli.logs import configure_logging
from nbdq.cli.options import Mode, Size, chain_arguments, chain_options
from nbdq.errors import ExportError, printable
from nbdq.nbd.constants import DEFAULT_PORT
from nbdq.server.export import Export, Exports
from nbdq.server.limits import Limits
from nbdq.server.listener import Listener, listen_tcp, listen_unix
from nbdq.server.server import Server
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
    **chain: Any,
) -> None:
    """Serve each IMAGE, with its whole chain, as an NBD export.

    Clients can write to IMAGE, never to what is below it. Prints the URI of each export when clients can connect.
    SIGTERM or SIGINT ends it cleanly; everything written is durable then.
    """
    configure_logging(verbosity=verbose, log_format=log_format)
    share_one_heap()
    if len(images) > 1 and (chain["backing"] or snapshot or bitmaps):
        raise click.UsageError("--backing, --load-snapshot and --bitmap are for a single IMAGE")
    if detect_zeroes == DetectZeroes.UNMAP and discard == "ignore":
        raise click.UsageError("--detect-zeroes unmap gives up space, which --discard ignore forbids")
    limits = Limits()
    clusters = ClusterCache(budget=limits.inflated_bytes)
    read_only = read_only or snapshot is not None or chain["force_share"]
    about: dict[str, Any] = {"allocation_depth": allocation_depth, "maximum_connections": shared}
    writing: dict[str, Any] = {"discard": discard == "unmap", "detect_zeroes": DetectZeroes(detect_zeroes)}
    opening: dict[str, Any] = {
        "clusters": clusters,
        "index_budget": limits.index_bytes // len(images),
        **chain_arguments(**chain),
    }
    read: list[BlockDevice] = []
    written: list[tuple[str, WritableBlockDevice]] = []
    try:
        exports = []
        texts = _one_each("--description", descriptions, images, default=[""] * len(images))
        for image, name, text in zip(images, _export_names(names, images), texts, strict=True):
            if read_only:
                layers = open_disk(image, snapshot=snapshot, **opening)
                read.append(layers)
                about["bitmaps"] = find_bitmaps(layers, bitmaps)
                exports.append(Export.read_only(name, layers, description=text, **about))
            else:
                disk = open_writable(image, write_threshold=write_threshold, on_event=_log.warning, **opening)
                written.append((image, disk))
                about["bitmaps"] = find_bitmaps(disk, bitmaps)
                exports.append(Export.writable(name, disk, description=text, **about, **writing))
        directory = Exports(exports)
        listeners = _listen(socket, bind, port, socket_mode)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(directory, listeners, limits, pid_file))
    finally:
        clusters.close()  # first, because it may be reading the disks
        for unchanged in read:
            unchanged.close()
        _save(written)


def _save(disks: list[tuple[str, WritableBlockDevice]]) -> None:
    """Make everything durable that was written, and close (R-76).

    Raises:
        ExportError: some disk could not be saved; all are closed nevertheless.
    """
    failures = []
    for path, disk in disks:
        try:
            try:
                disk.flush()
            finally:
                disk.close()
        except OSError as error:
            failures.append(f"{printable(path)}: what was written last may be lost: {error.strerror or error}")
    if failures:
        raise ExportError("; ".join(failures))


def _export_names(names: tuple[str, ...], images: tuple[str, ...]) -> list[str]:
    default = [""] if len(images) == 1 else [PurePath(image).stem for image in images]
    return _one_each("--export-name", names, images, default=default)


def _one_each(option: str, values: tuple[str, ...], images: tuple[str, ...], *, default: list[str]) -> list[str]:
    if not values:
        return default
    if len(values) != len(images):
        raise click.UsageError(f"{option} is given {len(values)} times for {len(images)} images; give one for each")
    return list(values)


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


async def _serve(exports: Exports, listeners: list[Listener], limits: Limits, pid_file: str | None) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = Server(exports, listeners, limits)
    server.start()
    try:
        with _process_id_in(pid_file):
            for listener in listeners:
                for info in exports.list():
                    print(listener.uri(info.name), flush=True)
            await stop.wait()
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

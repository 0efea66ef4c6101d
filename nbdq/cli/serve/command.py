"""``nbdq serve``: the options, and what settings they make."""

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, Literal, TypeVar

import click

from nbdq.cli.options import Mode, Size, chain_options, explicit_chain
from nbdq.cli.serve.administration import admin_settings, administration_options
from nbdq.cli.serve.config_file import ConfigError, load_settings
from nbdq.cli.serve.configuration import (
    configuration_options,
    directories,
    refuse_besides_config,
    refuse_what_means_nothing,
)
from nbdq.cli.serve.lifecycle import lifecycle_options, server_settings, start_settings
from nbdq.cli.serve.limits import limit_options, limits
from nbdq.cli.serve.metrics import metrics_options, metrics_settings
from nbdq.cli.serve.running import run
from nbdq.cli.serve.settings import ExportSettings, ListenSettings, LogSettings, Offer, Settings
from nbdq.cli.serve.tls import tls_options, tls_settings
from nbdq.cli.serve.volumes import export_names, one_each
from nbdq.errors import printable
from nbdq.nbd.constants import DEFAULT_PORT
from nbdq.server.exports.writing import DetectZeroes

_Result = TypeVar("_Result")


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
@click.option("--snapshots", is_flag=True, help="Offer internal snapshots, too, read-only, as NAME@SNAPSHOT.")
@click.option("--layers", is_flag=True, help="Offer the layers below, too, read-only, as NAME#1, NAME#2, …")
@click.option("-A", "--allocation-depth", is_flag=True, help="Offer the qemu:allocation-depth metadata context.")
@click.option(
    "-e",
    "--shared",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Clients that an export takes at once; 0: as many as --limit export-connections allows.",
)
@click.option("-t", "--persistent", is_flag=True, help="Accepted for qemu-nbd's sake: nbdq always serves on.")
@administration_options
@tls_options
@limit_options
@metrics_options
@lifecycle_options
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Lines for people, or an object a line.",
)
@click.option("-v", "--verbose", count=True, help="Log clients; twice: everything.")
@configuration_options
@click.argument("images", metavar="[IMAGE]...", nargs=-1, type=click.Path())
@click.pass_context
def serve_command(
    context: click.Context,
    /,
    images: tuple[str, ...],
    persistent: bool,
    config: str | None,
    check_config: bool,
    **options: Any,
) -> None:
    """Serve each IMAGE, with its whole chain, as an NBD export.

    Clients can write to IMAGE, never to what is below it. Prints the URI of each export when clients can connect.
    SIGHUP has certificates, directories and the file of --config read again. SIGTERM or SIGINT ends it cleanly;
    everything written is durable then.
    """
    load = None
    if config is not None:
        refuse_besides_config(context)
        load = partial(load_settings, os.path.abspath(config))
        settings = _loaded(load)
    else:
        refuse_what_means_nothing(context)
        settings = _settings(images, options)
    if check_config:
        sys.exit(_check(settings, of_file=config is not None))
    sys.exit(run(settings, _from(start_settings, options), load=load))


def _loaded(load: Callable[[], Settings]) -> Settings:
    """The settings of the file; all that is wrong with it is told, one line each."""
    try:
        return load()
    except ConfigError as error:
        for line in error.lines:
            click.echo(f"nbdq: {line}", err=True)
        sys.exit(1)


def _settings(images: tuple[str, ...], options: dict[str, Any]) -> Settings:
    offer = _offer(options)
    found = _from(directories, {**options, "offer": offer})
    if not images and not found:
        raise click.UsageError("nothing is to be served; name an IMAGE, or --export-dir DIR, or --config FILE")
    return Settings(
        listen=_from(listeners, options),
        export=_from(exports, {**options, "offer": offer, "images": images, "alone": len(images) == 1 and not found}),
        export_directory=found,
        admin=_from(admin_settings, options),
        tls=_from(tls_settings, options),
        limits=_from(limits, options),
        metrics=_from(metrics_settings, options),
        log=_from(log_settings, options),
        server=_from(server_settings, options),
    )


def _offer(options: dict[str, Any]) -> dict[str, Any]:
    """What options say of :class:`Offer`, for images and directories alike.

    Raises:
        click.UsageError: options contradict each other.
    """
    if options["detect_zeroes"] == "unmap" and options["discard"] == "ignore":
        raise click.UsageError("--detect-zeroes unmap gives up space, which --discard ignore forbids")
    named = {field.name: options[field.name] for field in fields(Offer) if field.name in options}
    return {**named, "max_connections": options["shared"]}


def _check(settings: Settings, *, of_file: bool) -> int:
    """Tell what is wrong, or what would be served; the exit status."""
    from nbdq.cli.serve.config_check import problems_of

    found = list(problems_of(settings, of_file=of_file))
    for problem, _ in found:
        click.echo(f"nbdq: {problem}", err=True)
    if any(is_fatal for _, is_fatal in found):
        return 1
    for export in settings.export:
        mode = "writable" if export.writable else "read-only"
        click.echo(f"export {printable(export.export_name)!r}: {printable(export.image, 1024)} ({mode})")
    for directory in settings.export_directory:
        click.echo(f"exports of {printable(directory.path, 1024)}")
    return 0


def _from(settings: Callable[..., _Result], options: dict[str, Any]) -> _Result:
    """What ``settings`` makes of those options that are its arguments."""
    return settings(**{name: options[name] for name in inspect.signature(settings).parameters})


def listeners(socket: str | None, bind: str | None, port: int | None, socket_mode: int) -> tuple[ListenSettings, ...]:
    """A unix socket, TCP, or both; none if nothing is said."""
    places = [] if socket is None else [ListenSettings(socket, socket_mode)]
    if bind is not None or port is not None:
        places.append(ListenSettings(address=bind or "127.0.0.1", port=port))
    return tuple(places)


def exports(
    images: tuple[str, ...],
    alone: bool,
    names: tuple[str, ...],
    descriptions: tuple[str, ...],
    backing: tuple[tuple[str, str] | None, ...],
    snapshot: str | None,
    bitmaps: tuple[str, ...],
    format: Literal["qcow2", "raw"],
    read_only: bool,
    offer: dict[str, Any],
) -> tuple[ExportSettings, ...]:
    """One for each image; the other options, and the ``offer``, hold for all of them. An image that is served ``alone``
    has no name.

    Raises:
        click.UsageError: options do not fit the number of images.
    """
    if len(images) != 1 and (backing or snapshot or bitmaps):
        raise click.UsageError("--backing, --load-snapshot and --bitmap are for a single IMAGE")
    chain = explicit_chain(backing)
    texts = one_each("--description", descriptions, images, default=[""] * len(images))
    return tuple(
        ExportSettings(
            image=image,
            name=name,
            description=text,
            format=format,
            backing=None if chain is None else tuple(chain),
            read_only=read_only,
            snapshot=snapshot,
            bitmaps=bitmaps,
            **offer,
        )
        for image, name, text in zip(images, export_names(names, images, alone=alone), texts, strict=True)
    )


def log_settings(log_format: Literal["text", "json"], verbose: int) -> LogSettings:
    """How much is logged, and how it looks."""
    return LogSettings(log_format, verbose)

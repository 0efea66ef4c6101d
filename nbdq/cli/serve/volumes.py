"""From the settings of an export to what a server serves: names, the wish, and the chain of the disk."""

import logging
from collections.abc import Callable, Sequence
from pathlib import PurePath

import click

from nbdq.chain.clusters import ClusterCache
from nbdq.chain.live import LiveChain
from nbdq.chain.policy import Policy
from nbdq.cli.serve.settings import ExportSettings
from nbdq.errors import ExportError, printable
from nbdq.server.exports.wish import Wish
from nbdq.server.exports.writing import DetectZeroes
from nbdq.storage import Identity

_log = logging.getLogger(__name__)

#: Volume name and IMAGE, format and policy → the same of the image that is the disk's top now.
TopOf = Callable[..., tuple[str, str, Policy]]


def export_names(names: Sequence[str], images: Sequence[str], *, alone: bool) -> list[str]:
    """The name of the export of each image: as given, or empty for one that is ``alone``, or what the files are called.

    Raises:
        click.UsageError: some, but not all are given.
    """
    default = [""] if alone else [PurePath(image).stem for image in images]
    return one_each("--export-name", names, images, default=default)


def one_each(option: str, values: Sequence[str], images: Sequence[str], *, default: list[str]) -> list[str]:
    """The values of an option that is given for every image or for none.

    Raises:
        click.UsageError: it is given for some.
    """
    if not values:
        return default
    if len(values) != len(images):
        raise click.UsageError(f"{option} is given {len(values)} times for {len(images)} images; give one for each")
    return list(values)


def wish_of(export: ExportSettings, *, id: str) -> Wish:
    """What is to be offered of the disk."""
    return Wish(
        id=id,
        name=export.export_name,
        description=export.description,
        writable=export.writable,
        bitmaps=export.bitmaps,
        allocation_depth=export.allocation_depth,
        maximum_connections=export.max_connections,
        access=export.access.make(),
        rates=export.rate,
        discard=export.discard == "unmap",
        detect_zeroes=DetectZeroes(export.detect_zeroes),
    )


def open_chain(
    export: ExportSettings,
    name: str,
    *,
    identity: Identity | None,
    clusters: ClusterCache,
    top_of: TopOf,
    index_bytes: int,
) -> LiveChain:
    """Open the disk ``name``, whose top may be another image by now. The caller owns it.

    Args:
        identity: of the image as it was found; if it is the top, it has to be that file still.
        top_of: which image to open, since snapshots and commits may have put another one in front or behind.
        index_bytes: for the windows of the chain's index.

    Raises:
        ImageError, OSError: as :meth:`~nbdq.chain.live.LiveChain.open`.
        ExportError: there is another top, and the settings say what is below the old one.
    """
    image, backing = export.image, export.backing
    policy = Policy(roots=export.allow_backing, allow_data_file=export.allow_data_file, force_share=export.force_share)
    top = top_of(name, image, format=export.format, policy=policy)
    if export.snapshot is not None:
        top = image, export.format, policy  # of which it is a snapshot, whatever lies over it now
    if top[0] != image and backing is not None:
        raise ExportError(
            f"{printable(image, 1024)}: by now {printable(top[0], 1024)} is the top of this disk; --backing "
            "says what is below the former; leave it out, or name the new top as IMAGE"
        )
    chain = LiveChain.open(
        top[0],
        format=top[1],
        policy=top[2],
        backing=backing,
        snapshot=export.snapshot,
        read_only=not export.writable,
        clusters=clusters,
        index_budget=index_bytes,
        write_threshold=export.write_threshold,
        on_event=_log.warning,
    )
    if identity is not None and top[0] == image and chain.layers[0].storage.identity != identity:
        chain.close()
        raise ExportError(f"{printable(image, 1024)}: was exchanged while it was being opened")
    return chain

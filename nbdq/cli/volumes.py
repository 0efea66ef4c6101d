"""From the command line to what a server serves: each IMAGE a volume with one export."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import PurePath
from typing import Any

import click

from nbdq.chain.clusters import ClusterCache
from nbdq.chain.live import LiveChain
from nbdq.chain.policy import Policy
from nbdq.errors import ExportError, printable
from nbdq.server.export import Exports
from nbdq.server.volume import Volume, Wish

#: Volume name and IMAGE, format and policy → the same of the image that is the disk's top now.
TopOf = Callable[..., tuple[str, str, Policy]]


def export_names(names: Sequence[str], images: Sequence[str]) -> list[str]:
    """The name of the export of each image: as given, or empty for a single one, or what the files are called.

    Raises:
        click.UsageError: some, but not all are given.
    """
    default = [""] if len(images) == 1 else [PurePath(image).stem for image in images]
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


def volume_names(wishes: Sequence[Wish], images: Sequence[str]) -> list[str]:
    """What administrators call the disks: as the exports, or as the files where these have no name; all different."""
    names: list[str] = []
    for wish, image in zip(wishes, images, strict=True):
        name = stem = wish.name or PurePath(image).stem
        number = 2
        while name in names:
            name, number = f"{stem}-{number}", number + 1
        names.append(name)
    return names


@contextmanager
def open_volumes(
    images: Sequence[str],
    wishes: Sequence[Wish],
    directory: Exports,
    *,
    clusters: ClusterCache,
    top_of: TopOf,
    snapshot: str | None,
    format: str,
    policy: Policy,
    backing: Sequence[tuple[str, str]] | None,
    **opening: Any,
) -> Iterator[list[Volume]]:
    """Open a volume for each image, read-only unless its wish is for a writable export, and put the exports into
    ``directory``; at the end everything written is made durable, and the volumes closed (R-76).

    Args:
        top_of: which image to open, since snapshots and commits may have put another one in front or behind.
        opening: further arguments of :meth:`nbdq.chain.live.LiveChain.open`.

    Raises:
        ImageError, ExportError, OSError: as :meth:`~nbdq.chain.live.LiveChain.open` and
            :meth:`~nbdq.server.volume.Volume.add`.
        ExportError: at the end, some disk could not be saved; all are closed nevertheless.
    """
    volumes: list[Volume] = []
    try:
        for image, wish, name in zip(images, wishes, volume_names(wishes, images), strict=True):
            top = top_of(name, image, format=format, policy=policy)
            if snapshot is not None:
                top = image, format, policy  # of which it is a snapshot, whatever lies over it now
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
                snapshot=snapshot,
                read_only=not wish.writable,
                clusters=clusters,
                **opening,
            )
            volumes.append(Volume(name, chain, directory))
            volumes[-1].open_first(replace(wish, id=name))
        yield volumes
    finally:
        clusters.close()  # first, because it may be reading the disks
        _save(volumes)


def _save(volumes: Sequence[Volume]) -> None:
    failures = []
    for volume in volumes:
        path = volume.chain.path
        try:
            volume.close()
        except OSError as error:
            failures.append(f"{printable(path)}: what was written last may be lost: {error.strerror or error}")
    if failures:
        raise ExportError("; ".join(failures))

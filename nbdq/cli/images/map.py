"""``nbdq map``: what each range of a disk is and which file holds it, in qemu-img's two formats (qcow2.md 4.1)."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import click

from nbdq.block import Extent
from nbdq.chain.clusters import ClusterCache
from nbdq.chain.open import open_disk
from nbdq.cli.options import Size, chain_arguments, chain_options
from nbdq.errors import NbdqError


@click.command("map")
@chain_options
@click.option("--output", type=click.Choice(["human", "json"]), default="human", show_default=True)
@click.option("-s", "--start-offset", type=Size(), default=0, help="Begin here.")
@click.option("-l", "--max-length", type=Size(), default=None, help="Look at so many bytes only.")
@click.option("-S", "--load-snapshot", "snapshot", default=None, help="An internal snapshot of IMAGE, by id or name.")
@click.argument("image", type=click.Path())
def map_command(
    image: str, output: str, start_offset: int, max_length: int | None, snapshot: str | None, **chain_words: Any
) -> None:
    """Print the extents of IMAGE, through its whole chain.

    The json form is byte for byte that of qemu-img 8.2 and later.
    """
    clusters = ClusterCache(budget=0)
    disk = open_disk(image, clusters=clusters, snapshot=snapshot, **chain_arguments(**chain_words))
    try:
        start = min(start_offset, disk.size)
        length = disk.size - start if max_length is None else min(max_length, disk.size - start)
        extents = disk.extents(start, length)
        if output == "json":
            _print_json(extents, start_offset)
        else:
            _print_human(extents)
    finally:
        clusters.close()
        disk.close()


def _print_json(extents: Iterator[Extent], start: int) -> None:
    separator = "["
    # A range that holds nothing is one extent of nothing, as in qemu-img.
    nothing = Extent(start, 0, 0, present=False, zero=False, data=False, compressed=False, offset=None, path="")
    for extent in chain([next(extents, nothing)], extents):
        offset = "" if extent.offset is None else f', "offset": {extent.offset}'
        print(
            f'{separator}{{ "start": {extent.start}, "length": {extent.length}, "depth": {extent.depth}, '
            f'"present": {_boolean(extent.present)}, "zero": {_boolean(extent.zero)}, '
            f'"data": {_boolean(extent.data)}, "compressed": {_boolean(extent.compressed)}{offset}}}',
            end="",
        )
        separator = ",\n"
    print("]")


def _boolean(value: bool) -> str:
    return "true" if value else "false"


def _print_human(extents: Iterator[Extent]) -> None:
    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    for extent in extents:
        if not extent.data or extent.zero:
            continue
        if extent.offset is None:
            raise NbdqError("File contains external, encrypted or compressed clusters.")
        print(f"{_hex(extent.start):<16}{_hex(extent.length):<16}{_hex(extent.offset):<16}{extent.path}")


def _hex(number: int) -> str:
    """As C prints it with ``%#x``: zero has no prefix."""
    return f"{number:#x}" if number else "0"

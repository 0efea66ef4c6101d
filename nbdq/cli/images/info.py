"""``nbdq info``: what an image says about itself, in the lines and keys of ``qemu-img info`` (section 4.2).

Human lines are those of QEMU 7.2. Without ``--backing-chain`` no backing file is opened (R-37).
"""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import click

from nbdq.chain.policy import Policy
from nbdq.chain.resolve import resolve_chain
from nbdq.cli.options import chain_arguments, chain_options
from nbdq.errors import printable
from nbdq.locks import READER, TOLERANT_READER, lock_image
from nbdq.ops.describe import describe_image
from nbdq.qcow2.format import read_header
from nbdq.storage import FileStorage

#: No line that is printed is longer; the longest name in an image has 1023 bytes.
_MAX_SHOWN = 4096


@click.command("info")
@chain_options
@click.option("--output", type=click.Choice(["human", "json"]), default="human", show_default=True)
@click.option("--backing-chain", is_flag=True, help="Show the layers below, too.")
@click.argument("image")
def info_command(image: str, output: str, backing_chain: bool, **options: Any) -> None:
    """Show what IMAGE says about itself."""
    arguments = chain_arguments(**options)
    layers = _describe_chain(image, arguments) if backing_chain else [_describe_image(image, arguments)]
    if output == "json":
        click.echo(json.dumps(layers if backing_chain else layers[0], indent=4))
    else:
        click.echo("\n\n".join("\n".join(human_lines(layer)) for layer in layers))


def _describe_image(path: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """One image, opened on its own: what it refers to need not exist, and it may be encrypted."""
    policy: Policy = arguments["policy"]
    with ExitStack() as opened:
        storage = FileStorage.open(path)
        opened.callback(storage.close)
        lock_image(storage.descriptor, path, TOLERANT_READER if policy.force_share else READER, policy.locking)
        header = read_header(storage, describe=True) if arguments["format"] == "qcow2" else None
        return describe_image(storage, header)


def _describe_chain(path: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The image and all layers below, which must be there and allowed; loops are errors."""
    with ExitStack() as opened:
        layers = resolve_chain(path, **arguments, describe=True)
        for layer in layers:
            opened.callback(layer.storage.close)
        return [describe_image(layer.storage, layer.header) for layer in layers]


def human_lines(layer: dict[str, Any]) -> Iterator[str]:
    """The lines of QEMU 7.2 for one layer."""
    yield f"image: {_shown(layer['filename'])}"
    yield f"file format: {layer['format']}"
    yield f"virtual size: {_readable(layer['virtual-size'])} ({layer['virtual-size']} bytes)"
    yield f"disk size: {_readable(layer['actual-size'])}"
    if "encrypted" in layer:
        yield "encrypted: yes"
    if "cluster-size" in layer:
        yield f"cluster_size: {layer['cluster-size']}"
    if layer["dirty-flag"]:
        yield "cleanly shut down: no"
    if "backing-filename" in layer:
        name, full = _shown(layer["backing-filename"]), _shown(layer["full-backing-filename"])
        yield f"backing file: {name}" + (f" (actual path: {full})" if full != name else "")
        if "backing-filename-format" in layer:
            yield f"backing file format: {layer['backing-filename-format']}"
    if "snapshots" in layer:
        yield "Snapshot list:"
        yield f"{'ID':<10}{'TAG':<17}{'VM SIZE':>8}{'DATE':>20}{'VM CLOCK':>13}{'ICOUNT':>11}"
        for snapshot in layer["snapshots"]:
            yield _snapshot_line(snapshot)
    if "format-specific" in layer:
        yield "Format specific information:"
        # What QEMU 7.2 does not know it does not print.
        yield from _tree(layer["format-specific"]["data"], 1, hidden={"detached-header"})


def _snapshot_line(snapshot: dict[str, Any]) -> str:
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot["date-sec"]))
    minutes, seconds = divmod(snapshot["vm-clock-sec"], 60)
    clock = f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}.{snapshot['vm-clock-nsec'] // 10**6:03}"
    size = _readable(snapshot["vm-state-size"])
    identity, name = _padded(_shown(snapshot["id"]), 9), _padded(_shown(snapshot["name"]), 16)
    return f"{identity} {name} {size:>8}{date:>20}{clock:>13}{snapshot.get('icount', ''):>11}"


def _tree(value: dict[str, Any] | list[Any], depth: int, hidden: set[str]) -> Iterator[str]:
    """Nested values, one per line, as QEMU prints what it has no words for."""
    items = value.items() if isinstance(value, dict) else ((f"[{n}]", item) for n, item in enumerate(value))
    for key, item in items:
        label = "    " * depth + key.replace("-", " ")
        if key in hidden:
            continue
        if isinstance(item, dict | list):
            yield f"{label}:"
            yield from _tree(item, depth + 1, hidden)
        else:
            yield f"{label}: {str(item).lower() if isinstance(item, bool) else _shown(str(item))}"


def _readable(size: int) -> str:
    """Bytes in the largest binary unit of which there is about one, with three digits, as QEMU rounds."""
    exponent = 0
    while size >= 1000 << 10 * exponent and exponent < 6:
        exponent += 1
    return f"{size / (1 << 10 * exponent):.3g} {('', 'Ki', 'Mi', 'Gi', 'Ti', 'Pi', 'Ei')[exponent]}B"


def _shown(text: str) -> str:
    return printable(text, _MAX_SHOWN)


def _padded(text: str, width: int) -> str:
    """C pads to bytes, not to characters."""
    return text + " " * (width - len(text.encode()))

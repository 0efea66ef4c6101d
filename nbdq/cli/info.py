"""``nbdq info``: what an image says about itself, in the lines and keys of ``qemu-img info`` (section 4.2).

Human lines are those of QEMU 7.2; JSON has the keys of the newest QEMU too. Neither the data file nor, without
``--backing-chain``, any backing file is opened (R-37).
"""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import click

from nbdq.chain.policy import Policy
from nbdq.chain.resolve import backing_path, resolve_chain
from nbdq.cli.options import chain_arguments, chain_options
from nbdq.errors import printable
from nbdq.locks import READER, TOLERANT_READER, lock_image
from nbdq.qcow2.bitmaps.directory import Bitmap, BitmapFlags, read_bitmaps
from nbdq.qcow2.format import Compatible, CompressionType, CryptMethod, Header, read_header
from nbdq.qcow2.luks import LuksHeader, read_luks_header
from nbdq.qcow2.snapshots import Snapshot, read_snapshots
from nbdq.storage import FileStorage

_logger = logging.getLogger(__name__)

#: QEMU cuts ids and names of snapshots to the bytes that its structures hold.
_MAX_SNAPSHOT_ID, _MAX_SNAPSHOT_NAME = 127, 255

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
        click.echo("\n\n".join("\n".join(_human_lines(layer)) for layer in layers))


def _describe_image(path: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """One image, opened on its own: what it refers to need not exist, and it may be encrypted."""
    policy: Policy = arguments["policy"]
    with ExitStack() as opened:
        storage = FileStorage.open(path)
        opened.callback(storage.close)
        lock_image(storage.descriptor, path, TOLERANT_READER if policy.force_share else READER, policy.locking)
        header = read_header(storage, describe=True) if arguments["format"] == "qcow2" else None
        return _describe(storage, header)


def _describe_chain(path: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The image and all layers below, which must be there and allowed; loops are errors."""
    with ExitStack() as opened:
        layers = resolve_chain(path, **arguments, describe=True)
        for layer in layers:
            opened.callback(layer.storage.close)
        return [_describe(layer.storage, layer.header) for layer in layers]


def _describe(storage: FileStorage, header: Header | None) -> dict[str, Any]:
    """One layer as QEMU's ``BlockGraphInfo``; ``header`` is None for raw."""
    # QEMU counts the length of files in sectors.
    file_length = -(-storage.size() // 512) * 512
    common = {"filename": _utf8(storage.path), "actual-size": storage.allocated_size(), "dirty-flag": False}
    file = {
        **common,
        "virtual-size": file_length,
        "format": "host_device" if storage.is_block_device else "file",
        "format-specific": {"type": "file", "data": {}},
        "children": [],
    }
    found: dict[str, Any] = {
        **common,
        "format": "raw",
        "virtual-size": file_length,
        "children": [{"name": "file", "info": file}],
    }
    if header is None:
        return found
    for warning in header.warnings:
        _logger.warning("%s: %s", printable(storage.path, _MAX_SHOWN), warning)
    found |= {
        "format": "qcow2",
        "virtual-size": header.guest_size,
        "cluster-size": header.cluster_size,
        "dirty-flag": header.is_dirty,
        "format-specific": {"type": "qcow2", "data": _describe_qcow2(storage, header)},
    }
    if header.crypt_method is not CryptMethod.NONE:
        found["encrypted"] = True
    if header.backing_name is not None:
        found["backing-filename"] = _utf8(header.backing_name)
        found["full-backing-filename"] = _utf8(backing_path(storage.path, header.backing_name))
        if header.backing_format is not None:
            found["backing-filename-format"] = header.backing_format
    if snapshots := read_snapshots(storage, header):
        found["snapshots"] = [_describe_snapshot(snapshot) for snapshot in snapshots]
    return found


def _describe_qcow2(storage: FileStorage, header: Header) -> dict[str, Any]:
    """QEMU's ``ImageInfoSpecificQCow2``, in the order in which QEMU prints it."""
    compression = "zstd" if header.compression_type is CompressionType.ZSTD else "zlib"
    refcount_bits = 1 << header.refcount_order
    encryption = _describe_encryption(storage, header)
    if header.version == 2:
        return {"compat": "0.10", "compression-type": compression, "refcount-bits": refcount_bits, **encryption}
    found: dict[str, Any] = {
        "compat": "1.1",
        "compression-type": compression,
        "lazy-refcounts": Compatible.LAZY_REFCOUNTS in header.compatible,
    }
    if bitmaps := read_bitmaps(storage, header):
        found["bitmaps"] = [_describe_bitmap(bitmap) for bitmap in bitmaps]
    found["refcount-bits"] = refcount_bits
    if header.data_file_name is not None:
        found["data-file"] = _utf8(header.data_file_name)
    found |= encryption
    if header.has_data_file:
        found["data-file-raw"] = header.data_file_raw
    return {**found, "corrupt": header.is_corrupt, "extended-l2": header.extended_l2}


def _describe_bitmap(bitmap: Bitmap) -> dict[str, Any]:
    names = {BitmapFlags.IN_USE: "in-use", BitmapFlags.AUTO: "auto"}
    return {
        "flags": [name for flag, name in names.items() if flag in bitmap.flags],
        "name": _utf8(bitmap.name),
        "granularity": bitmap.granularity,
    }


def _describe_encryption(storage: FileStorage, header: Header) -> dict[str, Any]:
    """The ``encrypt`` key, if the image has something to say about it."""
    if header.crypt_method is CryptMethod.AES:
        return {"encrypt": {"format": "aes"}}
    luks = read_luks_header(storage, header)
    return {} if luks is None else {"encrypt": _describe_luks(luks)}


def _describe_luks(luks: LuksHeader) -> dict[str, Any]:
    slots: list[dict[str, Any]] = [
        {"active": True, "iters": slot.iterations, "key-offset": slot.key_offset, "stripes": slot.stripes}
        if slot.active
        else {"active": False, "key-offset": slot.key_offset}
        for slot in luks.slots
    ]
    return {
        "ivgen-alg": luks.iv_generator,
        "detached-header": False,
        "hash-alg": luks.hash,
        "cipher-alg": luks.cipher,
        "uuid": luks.uuid,
        **({} if luks.iv_hash is None else {"ivgen-hash-alg": luks.iv_hash}),
        "format": "luks",
        "cipher-mode": luks.mode,
        "slots": slots,
        "payload-offset": luks.payload_offset,
        "master-key-iters": luks.master_key_iterations,
    }


def _describe_snapshot(snapshot: Snapshot) -> dict[str, Any]:
    seconds, nanoseconds = divmod(snapshot.vm_clock_ns, 10**9)
    return {
        "id": _utf8(snapshot.id, _MAX_SNAPSHOT_ID),
        "name": _utf8(snapshot.name, _MAX_SNAPSHOT_NAME),
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_seconds,
        "date-nsec": snapshot.date_nanoseconds,
        "vm-clock-sec": seconds,
        "vm-clock-nsec": nanoseconds,
        **({} if snapshot.icount is None else {"icount": snapshot.icount}),
    }


def _human_lines(layer: dict[str, Any]) -> Iterator[str]:
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


def _utf8(text: str, limit: int | None = None) -> str:
    """Foreign text cut to ``limit`` bytes and made valid Unicode, as QEMU does for JSON."""
    return text.encode("utf-8", "surrogateescape")[:limit].decode("utf-8", "replace")


def _shown(text: str) -> str:
    return printable(text, _MAX_SHOWN)


def _padded(text: str, width: int) -> str:
    """C pads to bytes, not to characters."""
    return text + " " * (width - len(text.encode()))

"""Questions about disks in use: what they are made of, what clients did, what is where, and whether all is well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nbdq.admin.commands.bitmaps import describe_bitmaps
from nbdq.admin.context import Context
from nbdq.admin.registry import NoArguments, Reply, command
from nbdq.chain.live import LiveChain
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.sealing import seal
from nbdq.chain.views import live_extents
from nbdq.errors import OperationError, printable
from nbdq.ops.describe import describe_image, json_text
from nbdq.qcow2.audit.check import check_image
from nbdq.qcow2.audit.repair import Repair, Repaired, repair_image
from nbdq.qcow2.format import CryptMethod, Header, read_header
from nbdq.server.exports.volume import Volume
from nbdq.server.monitoring.counters import Counters
from nbdq.server.threads import in_thread
from nbdq.storage import FileStorage

#: Extents in one answer: 8 MiB of text.
_EXTENTS_MAX = 65536
#: Findings of a check that are told in words.
_FINDINGS_MAX = 100

#: QEMU throttles disks; nbdq does not.
_NO_LIMITS = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)


@command("query-block", NoArguments)
async def query_block(context: Context, arguments: NoArguments) -> Reply:
    """Every disk as QEMU's BlockInfo, with the image information of its whole chain and its dirty bitmaps."""
    found = []
    for volume in context.volumes:
        async with volume.steady():
            layers = await in_thread(_layers, context, volume)
        inserted = _nested(layers)
        disk = {"device": volume.name, "locked": False, "removable": False, "type": "unknown", "inserted": inserted}
        found.append(disk | {"io-status": "ok"})
    return found


@dataclass(frozen=True)
class NodesRequest:
    """Arguments of query-named-block-nodes."""

    flat: bool = False
    """Leave out the images below each, which are listed anyway."""


@command("query-named-block-nodes", NodesRequest)
async def query_nodes(context: Context, arguments: NodesRequest) -> Reply:
    """Every layer of every disk as QEMU's BlockDeviceInfo, tops first."""
    found: list[dict[str, Any]] = []
    for volume in context.volumes:
        async with volume.steady():
            layers = await in_thread(_layers, context, volume)
        found += layers if arguments.flat else [_nested(layers[index:]) for index in range(len(layers))]
    return found


def _layers(context: Context, volume: Volume) -> list[dict[str, Any]]:
    """BlockDeviceInfo of each layer, without what is below it."""
    chain = volume.chain
    return [_layer(context, volume, chain, index) for index in range(len(chain.layers))]


def _layer(context: Context, volume: Volume, chain: LiveChain, index: int) -> dict[str, Any]:
    layer = chain.layers[index]
    image = describe_image(layer.storage, layer.header)
    found = {
        "file": json_text(layer.path),
        "node-name": chain.node_name(index) or (volume.name if index == 0 else ""),
        "ro": index > 0 or chain.read_only,
        "drv": str(layer.format),
        "encrypted": layer.header is not None and layer.header.crypt_method is not CryptMethod.NONE,
        "detect_zeroes": "off",
        **_NO_LIMITS,
        "write_threshold": (chain.write_threshold or 0) if index == 0 else 0,
        "cache": {"writeback": True, "direct": False, "no-flush": False},
        "backing_file_depth": len(chain.layers) - 1 - index,
        "image": image,
    }
    if index + 1 < len(chain.layers):
        found["backing_file"] = json_text(chain.layers[index + 1].path)
    if bitmaps := describe_bitmaps(context.exports, volume, index):
        found["dirty-bitmaps"] = bitmaps
    return found


def _nested(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The first layer, its image with those below it inside one another, as QEMU shows them."""
    image: dict[str, Any] | None = None
    for layer in reversed(layers):
        image = layer["image"] | ({"backing-image": image} if image is not None else {})
    return layers[0] | {"image": image}


@dataclass(frozen=True)
class StatsRequest:
    """Arguments of query-blockstats."""

    query_nodes: bool = False
    """As in QEMU; there is nothing to tell of layers that is not told of their disk."""


@command("query-blockstats", StatsRequest)
async def query_stats(context: Context, arguments: StatsRequest) -> Reply:
    """What the clients of each disk did, as QEMU's BlockStats, and of each export in x-nbdq-exports."""
    return [
        {
            "device": volume.name,
            "node-name": volume.name,
            "stats": _stats(volume, volume.counters(), in_flight=volume.gate.in_progress()),
            "x-nbdq-exports": {
                export.id: _stats(volume, export.account.total, in_flight=volume.gate.in_progress(export))
                | {"x-nbdq-clients": len(export.clients)}
                for export in volume.exports
            },
        }
        for volume in context.volumes
    ]


def _stats(volume: Volume, counters: Counters, *, in_flight: int) -> dict[str, Any]:
    device = volume.chain.device
    return {
        **counters.described(),
        "wr_highest_offset": device.top.storage.size() if isinstance(device, OverlayDisk) else 0,
        "account_invalid": True,
        "account_failed": True,
        "timed_stats": [],
        "x-nbdq-in-flight": in_flight,
    }


@dataclass(frozen=True)
class DeviceRequest:
    """Which disk."""

    device: str


@command("x-nbdq-info", DeviceRequest, changes=False)
async def info(context: Context, arguments: DeviceRequest) -> Reply:
    """What ``nbdq info --backing-chain`` says of the disk's layers, top first; true although the disk is in use."""
    volume = context.volumes.volume(arguments.device)
    async with volume.steady():
        layers = await in_thread(_layers, context, volume)
    return [layer["image"] for layer in layers]


@dataclass(frozen=True)
class MapRequest:
    """Which part of which disk."""

    device: str
    offset: int = 0
    length: int | None = None
    """To the end of the disk by default."""
    limit: int = _EXTENTS_MAX
    """So many extents at most; who wants more goes on behind the last one."""
    consistent: bool = False
    """Hold clients back meanwhile, so that all extents are those of one moment."""


@command("x-nbdq-map", MapRequest, changes=False)
async def map_disk(context: Context, arguments: MapRequest) -> Reply:
    """The extents of a disk in use, through its whole chain, as ``nbdq map --output=json`` shows them."""
    volume = context.volumes.volume(arguments.device)
    if arguments.offset < 0 or (arguments.length or 0) < 0 or not 0 < arguments.limit <= _EXTENTS_MAX:
        raise OperationError(f"offset and length must not be negative, and limit must be from 1 to {_EXTENTS_MAX}")
    async with volume.drained() if arguments.consistent else volume.steady():
        return await in_thread(_map, volume.chain, arguments)


def _map(chain: LiveChain, arguments: MapRequest) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    rest = max(0, chain.device.size - arguments.offset)
    length = rest if arguments.length is None else min(arguments.length, rest)
    for extent in live_extents(chain, arguments.offset, length) if length else ():
        shown = extent._asdict()
        del shown["path"]
        if extent.offset is None:
            del shown["offset"]
        found.append(shown)
        if len(found) == arguments.limit:
            break
    return found


@dataclass(frozen=True)
class CheckRequest:
    """Which image to check, and whether to mend it."""

    device: str
    layer: str | None = None
    """Path or node name; the top by default."""
    fix: Literal["none", "leaks"] = "none"
    """Leaks of the top can be mended while it is served."""


@command("x-nbdq-check", CheckRequest)
async def check(context: Context, arguments: CheckRequest) -> Reply:
    """Check one image of a disk in use, as ``nbdq check`` does; clients are held back while the top is checked."""
    volume = context.volumes.volume(arguments.device)
    chain = volume.chain
    index = 0 if arguments.layer is None else chain.index_of(arguments.layer)
    path = chain.layers[index].path
    if chain.layers[index].header is None:
        raise OperationError(f"{printable(path, 1024)} is raw: this format does not support checks")
    fix = arguments.fix == "leaks"
    if index > 0 or chain.read_only:
        if fix:
            raise OperationError(f"{printable(path, 1024)} is only read; nothing is mended")
        with context.jobs.exclusive(volume, "a check", frozenset({path}), shared=True):
            async with volume.steady():
                return await in_thread(_check_lower, chain, path)
    with context.jobs.exclusive(volume, "a check"):
        async with volume.drained():
            try:
                return await in_thread(_check_top, chain, fix)
            finally:
                volume.adopt()


def _check_lower(chain: LiveChain, path: str) -> dict[str, Any]:
    layer = chain.layers[chain.index_of(path)]  # which may have another place by now
    return _result(layer.path, _checked(layer.storage, read_header(layer.storage)))


def _checked(storage: FileStorage, header: Header) -> Repaired:
    return Repaired(check_image(storage, header), 0, 0)


def _check_top(chain: LiveChain, fix: bool) -> dict[str, Any]:
    """The engine knows freed clusters whose refcounts the file still has, and an auditor who changes refcounts must not
    be contradicted: so the engine brings everything into the file, and begins anew afterwards."""
    device = chain.device
    assert isinstance(device, OverlayDisk)
    seal(device, on_event=chain.on_event)
    try:
        storage = device.top.storage
        header = read_header(storage)
        repaired = repair_image(storage, header, Repair.LEAKS) if fix else _checked(storage, header)
    finally:
        chain.reopen_top()
    return _result(chain.path, repaired)


def _result(path: str, repaired: Repaired) -> dict[str, Any]:
    """QEMU's ImageCheck, and what was found in words."""
    result = repaired.result
    found: dict[str, Any] = {
        "filename": json_text(path),
        "format": "qcow2",
        "check-errors": result.check_errors,
        "corruptions": result.corruptions,
        "leaks": result.leaks,
        "corruptions-fixed": repaired.corruptions_fixed,
        "leaks-fixed": repaired.leaks_fixed,
        "image-end-offset": result.image_end_offset,
        "total-clusters": result.total_clusters,
        "allocated-clusters": result.allocated_clusters,
        "fragmented-clusters": result.fragmented_clusters,
        "compressed-clusters": result.compressed_clusters,
    }
    return found | {"x-nbdq-findings": [printable(finding) for finding in result.findings[:_FINDINGS_MAX]]}

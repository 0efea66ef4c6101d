"""Exports while the server runs: offer them, take them back, change them, hold their clients back; and resize disks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from nbdq.admin.context import Context
from nbdq.admin.registry import NoArguments, Reply, command
from nbdq.chain.views import View
from nbdq.errors import NotFound, OperationError, printable
from nbdq.server.admission.access import Access
from nbdq.server.exports.derived import Derivation
from nbdq.server.exports.export import Export
from nbdq.server.exports.rate import Rates
from nbdq.server.exports.volume import Volume
from nbdq.server.exports.wish import Wish
from nbdq.server.exports.writing import DetectZeroes

#: How long a pause lasts at most, unless the administrator says otherwise.
_PAUSE_SECONDS = 60


@dataclass(frozen=True)
class BitmapOfNode:
    """QEMU's other way to name a bitmap."""

    node: str
    """A layer; bitmaps are found by name in the topmost layer that has one, and this one has to be part of the disk."""
    name: str


@dataclass(frozen=True)
class AccessRequest:
    """What clients have to be or to prove; what is left out is not demanded."""

    tls: bool = False
    subjects: list[str] | None = None
    """Patterns for subjects or names of certificates, or PSK: and the name of a key."""
    networks: list[str] | None = None
    users: list[str | int] | None = None
    groups: list[str | int] | None = None
    """Users and groups by name or number."""

    def make(self) -> Access:
        """The demands, with names resolved.

        Raises:
            ExportError: a word means nothing.
        """
        return Access.of(**vars(self))


@dataclass(frozen=True)
class RatesRequest:
    """What all clients together may do in a second; 0 for no limit."""

    requests: int | float = 0
    bytes: int | float = 0
    burst: int | float = 1
    """Seconds' worth that clients who were idle may use at once."""

    def make(self) -> Rates:
        """The rates.

        Raises:
            ExportError: they make no sense.
        """
        return Rates(**vars(self))


@dataclass(frozen=True)
class ExportAdd:
    """Arguments of block-export-add, QEMU's and ours."""

    type: Literal["nbd"]
    id: str
    node_name: str
    """The disk, or a layer of it: that one and what is below it, read-only."""
    name: str | None = None
    """What clients ask for; the node name by default."""
    description: str = ""
    writable: bool = False
    writethrough: bool = False
    """Refused: clients flush when they want to, and FUA is offered."""
    bitmaps: list[str | BitmapOfNode] = field(default_factory=list)
    allocation_depth: bool = False
    x_nbdq_snapshot: str | None = None
    """Show this internal snapshot, by id or name, read-only."""
    x_nbdq_layer: str | None = None
    """Show this layer, by path or node name, and what is below it, read-only."""
    x_nbdq_max_connections: int = 0
    """Clients at once; 0: as many as the server's limits allow."""
    x_nbdq_access: AccessRequest = field(default_factory=AccessRequest)
    x_nbdq_rates: RatesRequest = field(default_factory=RatesRequest)
    x_nbdq_discard: Literal["unmap", "ignore"] = "unmap"
    x_nbdq_detect_zeroes: Literal["off", "on", "unmap"] = "off"
    x_nbdq_snapshots: bool = False
    """Offer the internal snapshots of the disk, too, as NAME@SNAPSHOT."""
    x_nbdq_layers: bool = False
    """Offer the layers of the disk, too, as NAME#1, NAME#2, …"""


@command("block-export-add", ExportAdd)
async def add(context: Context, arguments: ExportAdd) -> Reply:
    """Offer a disk, one of its layers or an internal snapshot to NBD clients, beside what is offered already."""
    if not arguments.id:
        raise OperationError("Invalid block export id")
    if arguments.writethrough:
        raise OperationError("'writethrough' is not supported; clients flush, or write with FUA")
    _check_discard(arguments.x_nbdq_discard, arguments.x_nbdq_detect_zeroes)
    volume = context.volumes.volume(arguments.node_name)
    view = View(_layer_of(volume, arguments), arguments.x_nbdq_snapshot)
    bitmaps = []
    for bitmap in arguments.bitmaps:
        if isinstance(bitmap, BitmapOfNode) and bitmap.node != volume.name:
            volume.chain.index_of(bitmap.node)
        bitmaps.append(bitmap.name if isinstance(bitmap, BitmapOfNode) else bitmap)
    wish = Wish(
        arguments.id,
        arguments.node_name if arguments.name is None else arguments.name,
        description=arguments.description,
        writable=arguments.writable,
        view=view,
        bitmaps=bitmaps,
        allocation_depth=arguments.allocation_depth,
        maximum_connections=_limit(arguments.x_nbdq_max_connections),
        access=arguments.x_nbdq_access.make(),
        rates=arguments.x_nbdq_rates.make(),
        discard=arguments.x_nbdq_discard == "unmap",
        detect_zeroes=DetectZeroes(arguments.x_nbdq_detect_zeroes),
    )
    if view == View():
        await volume.add(wish)
        derivation = Derivation(wish, snapshots=arguments.x_nbdq_snapshots, layers=arguments.x_nbdq_layers)
        volume.derive(wish.name, derivation)
        volume.derive_soon()
        return None
    if arguments.x_nbdq_snapshots or arguments.x_nbdq_layers:
        raise OperationError("snapshots and layers come along with exports of disks only")
    index = 0 if view.layer is None else volume.chain.index_of(view.layer)
    layers = frozenset(layer.path for layer in volume.chain.layers[index:])
    with context.jobs.exclusive(volume, "an export that begins", layers, shared=True):
        await volume.add(wish)
    return None


def _layer_of(volume: Volume, arguments: ExportAdd) -> str | None:
    """The layer that is meant; None for the disk itself."""
    if arguments.x_nbdq_layer is not None:
        return arguments.x_nbdq_layer
    named = arguments.node_name != volume.name and volume.chain.index_of(arguments.node_name) > 0
    return arguments.node_name if named else None


@dataclass(frozen=True)
class ExportDelete:
    """Arguments of block-export-del."""

    id: str
    mode: Literal["safe", "hard", "soft"] = "safe"
    """safe: only if nobody is connected; hard: clients get the answers to what they have asked, and are cut; soft
    (nbdq's own): nobody new gets in, and the export is gone when the last client has left."""


@command("block-export-del", ExportDelete)
async def delete(context: Context, arguments: ExportDelete) -> Reply:
    """Take an export back; the event BLOCK_EXPORT_DELETED tells when it is gone."""
    export = _export(context, arguments.id)
    if arguments.mode == "safe" and export.clients:
        raise OperationError(
            f"export '{printable(arguments.id)}' still in use by {len(export.clients)} clients; mode=hard cuts them, "
            "mode=soft waits until they leave"
        )
    _volume_of(context, export).delete(export, hard=arguments.mode == "hard")
    return None


@command("query-block-exports", NoArguments)
async def query(context: Context, arguments: NoArguments) -> Reply:
    """All exports as QEMU's BlockExportInfo, with clients, size and what else can be set."""
    return [_described(volume, export, context) for volume in context.volumes for export in volume.exports]


def _described(volume: Volume, export: Export, context: Context) -> dict[str, Any]:
    view = volume.view_of(export)
    found: dict[str, Any] = {
        "node-name": volume.name,
        "shutting-down": context.exports.by_name.get(export.info.name) is not export,
        "type": "nbd",
        "id": export.id,
        "x-nbdq-name": export.info.name,
        "x-nbdq-description": export.info.description,
        "x-nbdq-size": export.info.size,
        "x-nbdq-writable": export.admits_writers,
        "x-nbdq-clients": len(export.clients),
        "x-nbdq-max-connections": export.maximum_connections,
        "x-nbdq-paused": export.is_held,
        "x-nbdq-derived": export.is_derived,
    }
    access, rates = export.access, export.rates
    if access != Access():
        lists = {"subjects": access.subjects, "networks": [str(network) for network in access.networks]}
        numbers = {"users": sorted(access.users), "groups": sorted(access.groups)}
        given = {name: list(items) for name, items in (lists | numbers).items() if items}
        found["x-nbdq-access"] = {"tls": access.demands_tls, **given}
    if rates.are_limited:
        found["x-nbdq-rates"] = vars(rates)
    if export.writing is not None:
        found["x-nbdq-discard"] = "unmap" if export.writing.discards else "ignore"
        found["x-nbdq-detect-zeroes"] = export.writing.detect_zeroes.value
    if view.layer is not None:
        found["x-nbdq-layer"] = view.layer
    if view.snapshot is not None:
        found["x-nbdq-snapshot"] = view.snapshot
    return found


@dataclass(frozen=True)
class ExportSet:
    """What of an export is to be changed; None leaves it as it is."""

    id: str
    max_connections: int | None = None
    """For new clients; nobody is cut."""
    access: AccessRequest | None = None
    """For new clients, in place of all that was demanded before."""
    rates: RatesRequest | None = None
    """From now on, for all; in place of those before."""
    read_only: bool | None = None
    """For new clients; those that were told that they may write go on."""
    description: str | None = None
    discard: Literal["unmap", "ignore"] | None = None
    detect_zeroes: Literal["off", "on", "unmap"] | None = None


@command("x-nbdq-export-set", ExportSet)
async def change(context: Context, arguments: ExportSet) -> Reply:
    """Change an export while it is served."""
    export = _export(context, arguments.id)
    writing = export.writing
    wants_to_write = arguments.read_only is False or arguments.discard or arguments.detect_zeroes
    if wants_to_write and writing is None:
        raise OperationError(f"export '{printable(arguments.id)}' is read-only; add another one that is writable")
    limit = None if arguments.max_connections is None else _limit(arguments.max_connections)
    access = export.access if arguments.access is None else arguments.access.make()
    rates = export.rates if arguments.rates is None else arguments.rates.make()
    if writing is not None:
        discards = writing.discards if arguments.discard is None else arguments.discard == "unmap"
        detect = arguments.detect_zeroes or writing.detect_zeroes.value
        _check_discard("unmap" if discards else "ignore", detect)
    if arguments.description is not None:
        export.describe(arguments.description)
    export.obey(access=access, rates=rates, maximum_connections=export.maximum_connections if limit is None else limit)
    _volume_of(context, export).policy_changed(export)
    if writing is not None:
        writing.set(discard=discards, detect_zeroes=DetectZeroes(detect))
        if arguments.read_only is not None:
            export.admit_writers(not arguments.read_only)
    return None


@dataclass(frozen=True)
class Which:
    """An export by its id, or a disk with all its exports by its name."""

    id: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class PauseRequest(Which):
    """Whom to pause, and for how long."""

    seconds: int = _PAUSE_SECONDS
    """The clients go on by themselves after so long; 0 for never."""
    flush: bool = False
    """Make durable what was written until then, too."""


@command("x-nbdq-pause", PauseRequest)
async def pause(context: Context, arguments: PauseRequest) -> Reply:
    """Hold clients back. On return nothing that they have asked for is in progress; connections stay, and what clients
    send waits. The event X_NBDQ_RESUMED tells of a pause that ended by itself."""
    if arguments.seconds < 0:
        raise OperationError("Parameter 'seconds' must not be negative")
    paused, volume = _chosen(context, arguments)
    about = {"id": arguments.id} if arguments.id is not None else {"device": arguments.device}
    await paused.pause(arguments.seconds or None, lambda: context.emit("X_NBDQ_RESUMED", about))
    if arguments.flush:
        try:
            await volume.flush()
        except BaseException:
            paused.resume()
            raise
    return None


@command("x-nbdq-resume", Which)
async def resume(context: Context, arguments: Which) -> Reply:
    """End a pause."""
    _chosen(context, arguments)[0].resume()
    return None


@dataclass(frozen=True)
class Resize:
    """Arguments of block_resize, QEMU's and ours."""

    size: int
    device: str | None = None
    node_name: str | None = None
    x_nbdq_shrink: bool = False
    """Allow the disk to become smaller; what lies behind the new end is lost."""


@command("block_resize", Resize)
async def resize(context: Context, arguments: Resize) -> Reply:
    """Give a disk another size, durably; connected clients may use it at once."""
    names = [name for name in (arguments.device, arguments.node_name) if name is not None]
    if len(names) != 1:
        raise OperationError("Need exactly one of 'device' and 'node-name'")
    volume = context.volumes.volume(names[0])
    if arguments.size < 0:
        raise OperationError("Parameter 'size' expects a >0 size")
    if arguments.size % 512:
        raise OperationError("The new size must be a multiple of 512")
    with context.jobs.exclusive(volume, "a resize"):
        await volume.resize(arguments.size, shrink=arguments.x_nbdq_shrink)
    return None


def _export(context: Context, id: str) -> Export:
    try:
        return context.exports.by_id[id]
    except KeyError:
        raise NotFound(f"Export '{printable(id)}' is not found") from None


def _volume_of(context: Context, export: Export) -> Volume:
    return next(volume for volume in context.volumes if export in volume.exports)


def _chosen(context: Context, which: Which) -> tuple[Export | Volume, Volume]:
    """What is meant, and its disk."""
    if (which.id is None) == (which.device is None):
        raise OperationError("Need exactly one of 'id' and 'device'")
    if which.id is not None:
        export = _export(context, which.id)
        return export, _volume_of(context, export)
    assert which.device is not None
    volume = context.volumes.volume(which.device)
    return volume, volume


def _limit(connections: int) -> int:
    if connections < 0:
        raise OperationError("a number of connections must not be negative; 0 is no limit")
    return connections


def _check_discard(discard: str, detect_zeroes: str) -> None:
    if discard == "ignore" and detect_zeroes == "unmap":
        raise OperationError("detect-zeroes=unmap gives up space, which discard=ignore forbids")

"""Dirty bitmaps of disks that are served: QEMU's commands, alone or in transactions, and what backups ask (4.12, F2).

Each change happens at one moment of the disk, which stands still for it: writes that were answered before are marked,
or not, as it was then, and all others as it is afterwards. Unlike in QEMU a bitmap that is exported can be changed; it
only cannot be removed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nbdq.admin.context import Context
from nbdq.admin.registry import Reply, command
from nbdq.admin.state import Changes
from nbdq.admin.transaction import Action, carry_out
from nbdq.block import BlockDevice
from nbdq.chain.bitmaps import bitmaps_of, find_source, list_bitmaps, live_bitmap, written_image
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.raw_disk import RawDisk
from nbdq.errors import OperationError, printable
from nbdq.qcow2.bitmaps.bits import DirtyBits, dirty_extents
from nbdq.qcow2.bitmaps.tracking import BitmapState, DirtyBitmaps, Undo
from nbdq.qcow2.image import Qcow2Image
from nbdq.qcow2.writing.writable import WritableImage
from nbdq.server.exports.export import Exports
from nbdq.server.exports.volume import Volume
from nbdq.server.threads import in_thread

#: Ranges in one reply, if the client does not say.
_RANGES = 4096
_MOST_RANGES = 65536


@dataclass(frozen=True)
class BitmapAdd:
    """QEMU's BlockDirtyBitmapAdd."""

    node: str
    name: str
    granularity: int | None = None
    persistent: bool = False
    disabled: bool = False


@dataclass(frozen=True)
class Bitmap:
    """QEMU's BlockDirtyBitmap."""

    node: str
    name: str


@dataclass(frozen=True)
class BitmapMerge:
    """QEMU's BlockDirtyBitmapMerge."""

    node: str
    target: str
    bitmaps: list[str | Bitmap]


# Changes.


class BitmapAction:
    """An :class:`~nbdq.admin.transaction.Action`: a change of the bitmaps of a disk's top."""

    layers: frozenset[str] | None = frozenset()  # no layer is restructured

    def __init__(self, volume: Volume, node: str, what: str, change: Callable[[DirtyBitmaps], Undo]) -> None:
        """``change`` is called when it is time for it; ``node`` is how the client called the disk."""
        self.volume = volume
        self.what = what
        self._node = node
        self._change = change
        self._undo: Undo = lambda bitmaps: None

    async def prepare(self) -> None:
        """Nothing takes long."""

    async def apply(self) -> None:
        """Change the bitmaps of what is the top by now."""
        self._undo = await in_thread(lambda: self._change(self._bitmaps()))

    def _bitmaps(self) -> DirtyBitmaps:
        return bitmaps_of(_top(self.volume, self._node))

    def record(self, changes: Changes) -> None:
        """The image records its bitmaps itself."""

    async def settle(self) -> None:
        """Nothing is left to do while the disk stands still."""

    async def undo(self) -> None:
        """Take the change back."""
        await in_thread(lambda: self._undo(self._bitmaps()))

    async def finish(self) -> None:
        """Let the file follow where it must: a bitmap that was removed does not come back after a crash."""
        async with self.volume.steady():  # nobody is about to take a removal back
            try:
                await in_thread(self._finish)
            except OSError as error:
                what = f"the bitmap is removed, but after a crash it may be there again, inconsistent: {error.strerror}"
                raise OSError(error.errno, what) from error

    def _finish(self) -> None:
        device = self.volume.chain.device
        if isinstance(device, OverlayDisk):
            bitmaps_of(device.top).forget_removed(device.top)

    async def abandon(self) -> None:
        """Nothing was prepared."""


def _add(context: Context, arguments: BitmapAdd) -> Action:
    granularity = arguments.granularity
    if granularity is not None and (granularity < 512 or granularity & (granularity - 1)):
        raise OperationError("Granularity must be power of 2 and at least 512")
    bits = granularity.bit_length() - 1 if granularity is not None else None
    return _action(
        context,
        arguments.node,
        f"adding bitmap '{printable(arguments.name)}'",
        lambda bitmaps: bitmaps.add(
            arguments.name, granularity_bits=bits, persistent=arguments.persistent, disabled=arguments.disabled
        ),
    )


def _remove(context: Context, arguments: Bitmap) -> Action:
    def remove(bitmaps: DirtyBitmaps) -> Undo:
        if arguments.name not in bitmaps.inconsistent and (bits := bitmaps.find(arguments.name)) is not None:
            _refuse_if_exported(context.exports, arguments.name, bits)
        return bitmaps.remove(arguments.name)

    return _action(context, arguments.node, f"removing bitmap '{printable(arguments.name)}'", remove)


def _clear(context: Context, arguments: Bitmap) -> Action:
    what = f"clearing bitmap '{printable(arguments.name)}'"
    return _action(context, arguments.node, what, lambda bitmaps: bitmaps.clear(arguments.name))


def _enable(context: Context, arguments: Bitmap) -> Action:
    what = f"enabling bitmap '{printable(arguments.name)}'"
    return _action(context, arguments.node, what, lambda bitmaps: bitmaps.enable(arguments.name))


def _disable(context: Context, arguments: Bitmap) -> Action:
    what = f"disabling bitmap '{printable(arguments.name)}'"
    return _action(context, arguments.node, what, lambda bitmaps: bitmaps.disable(arguments.name))


def _merge(context: Context, arguments: BitmapMerge) -> Action:
    wanted = [each if isinstance(each, Bitmap) else Bitmap(arguments.node, each) for each in arguments.bitmaps]
    sources = [(context.volumes.volume(each.node), each) for each in wanted]

    def merge(bitmaps: DirtyBitmaps) -> Undo:
        bitmaps.usable(arguments.target)  # first, as QEMU asks first
        return bitmaps.merge(arguments.target, [_source(volume, each.node, each.name) for volume, each in sources])

    return _action(context, arguments.node, f"merging into bitmap '{printable(arguments.target)}'", merge)


#: What transactions can do with bitmaps: the class of the arguments, and what makes an action of them.
BITMAP_ACTIONS: dict[str, tuple[type[Any], Callable[[Context, Any], Action]]] = {
    "block-dirty-bitmap-add": (BitmapAdd, _add),
    "block-dirty-bitmap-remove": (Bitmap, _remove),
    "block-dirty-bitmap-clear": (Bitmap, _clear),
    "block-dirty-bitmap-enable": (Bitmap, _enable),
    "block-dirty-bitmap-disable": (Bitmap, _disable),
    "block-dirty-bitmap-merge": (BitmapMerge, _merge),
}


def _action(context: Context, node: str, what: str, change: Callable[[DirtyBitmaps], Undo]) -> Action:
    return BitmapAction(context.volumes.volume(node), node, what, change)


def _top(volume: Volume, node: str) -> WritableImage | RawDisk:
    """The image whose bitmaps can be changed.

    Raises:
        OperationError: ``node`` is a layer below, or the disk is read-only.
    """
    image = written_image(volume.chain.device)
    if image is None:
        raise OperationError(f"Node '{printable(node)}' is read-only: its bitmaps cannot be changed")
    if node != volume.name and volume.chain.index_of(node) > 0:
        raise OperationError(f"Node '{printable(node)}' is not the top of its disk: its bitmaps are readonly")
    return image


def _source(volume: Volume, node: str, name: str) -> DirtyBits:
    chain = volume.chain
    index = 0 if node == volume.name else chain.index_of(node)
    return find_source(chain.device if index == 0 else chain.slice(index, index), name)


def _exporting(exports: Exports, bits: DirtyBits) -> list[str]:
    """Names of the exports that show a bitmap."""
    shown = [export for export in list(exports.by_id.values()) if any(bits is each for each in export.bitmaps.values())]
    return [export.info.name for export in shown]


def _refuse_if_exported(exports: Exports, name: str, bits: DirtyBits) -> None:
    if names := _exporting(exports, bits):
        raise OperationError(
            f"Bitmap '{printable(name)}' is shown by export '{printable(names[0])}'; delete that first"
        )


@command("block-dirty-bitmap-add", BitmapAdd)
async def add(context: Context, arguments: BitmapAdd) -> Reply:
    """Make a bitmap that marks writes from now on; a persistent one is in the image when it is closed."""
    await carry_out(context, [_add(context, arguments)])
    return None


@command("block-dirty-bitmap-remove", Bitmap)
async def remove(context: Context, arguments: Bitmap) -> Reply:
    """Do without a bitmap, in the image too. The way out for one that is inconsistent."""
    await carry_out(context, [_remove(context, arguments)])
    return None


@command("block-dirty-bitmap-clear", Bitmap)
async def clear(context: Context, arguments: Bitmap) -> Reply:
    """Forget what a bitmap has marked."""
    await carry_out(context, [_clear(context, arguments)])
    return None


@command("block-dirty-bitmap-enable", Bitmap)
async def enable(context: Context, arguments: Bitmap) -> Reply:
    """Let a bitmap mark writes."""
    await carry_out(context, [_enable(context, arguments)])
    return None


@command("block-dirty-bitmap-disable", Bitmap)
async def disable(context: Context, arguments: Bitmap) -> Reply:
    """Let a bitmap stay as it is."""
    await carry_out(context, [_disable(context, arguments)])
    return None


@command("block-dirty-bitmap-merge", BitmapMerge)
async def merge(context: Context, arguments: BitmapMerge) -> Reply:
    """Mark in one bitmap what others mark, of this disk or another one of the same size."""
    await carry_out(context, [_merge(context, arguments)])
    return None


# Questions.


@command("x-debug-block-dirty-bitmap-sha256", Bitmap, changes=False)
async def digest(context: Context, arguments: Bitmap) -> Reply:
    """The SHA-256 of a bitmap's bits, as QEMU counts it."""
    volume = context.volumes.volume(arguments.node)
    async with volume.steady():
        bits = await in_thread(_source, volume, arguments.node, arguments.name)
    return {"sha256": await in_thread(bits.digest)}


@dataclass(frozen=True)
class RangesRequest:
    """Arguments of x-nbdq-bitmap-ranges."""

    node: str
    name: str
    offset: int = 0
    length: int | None = None
    """None: to the end."""
    limit: int = _RANGES


@command("x-nbdq-bitmap-ranges", RangesRequest, changes=False)
async def ranges(context: Context, arguments: RangesRequest) -> Reply:
    """The dirty ranges of a bitmap; if there are more than the limit, ``next`` says where to go on."""
    volume = context.volumes.volume(arguments.node)
    async with volume.steady():
        return await in_thread(_ranges, volume, arguments)


def _ranges(volume: Volume, arguments: RangesRequest) -> dict[str, Any]:
    bits = _source(volume, arguments.node, arguments.name)
    offset, end = arguments.offset, bits.size
    if arguments.length is not None:
        end = offset + arguments.length
    if not 0 <= offset <= end <= bits.size:
        raise OperationError(f"offset {offset} and length {end - offset} are no range of a disk of {bits.size} bytes")
    if not 1 <= arguments.limit <= _MOST_RANGES:
        raise OperationError(f"limit {arguments.limit} is not 1 to {_MOST_RANGES}")
    found, stop = dirty_extents(bits, offset, end - offset, limit=arguments.limit)
    reply: dict[str, Any] = {"size": bits.size, "granularity": 1 << bits.granularity_bits, "ranges": found}
    if stop < end:
        reply["next"] = stop
    return reply


@dataclass(frozen=True)
class ListRequest:
    """Arguments of x-nbdq-bitmap-list."""

    node: str


@command("x-nbdq-bitmap-list", ListRequest, changes=False)
async def list_all(context: Context, arguments: ListRequest) -> Reply:
    """The bitmaps of every layer of a disk that has some, top first, each layer by its path."""
    volume = context.volumes.volume(arguments.node)
    found = []
    async with volume.steady():
        for index, layer in enumerate(volume.chain.layers):
            if described := await in_thread(describe_bitmaps, context.exports, volume, index):
                found.append({"path": layer.path, "depth": index, "dirty-bitmaps": described})
    return found


def describe_bitmaps(exports: Exports, volume: Volume, index: int) -> list[dict[str, Any]]:
    """The bitmaps of one layer as QEMU's BlockDirtyInfo. May read the layer; the disk is steady.

    Raises:
        ImageError, OSError: its bitmaps cannot be read.
    """
    chain = volume.chain
    layer = written_image(chain.device) if index == 0 else None
    if layer is None:
        below = chain.slice(index, index).layers[0]
        if not isinstance(below, Qcow2Image):
            return []
        return [_described(state, is_busy=False) for state in list_bitmaps(below)]
    return [_described(state, is_busy=_is_shown(exports, chain.device, state.name)) for state in list_bitmaps(layer)]


def _is_shown(exports: Exports, device: BlockDevice, name: str) -> bool:
    bits = live_bitmap(device, name)
    return bits is not None and bool(_exporting(exports, bits))


def _described(state: BitmapState, *, is_busy: bool) -> dict[str, Any]:
    described = {
        "name": state.name,
        "count": state.dirty_length,
        "granularity": state.granularity,
        "recording": state.is_recording,
        "busy": is_busy,
        "persistent": state.is_persistent,
    }
    return {**described, "inconsistent": True} if state.is_inconsistent else described

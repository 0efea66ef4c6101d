"""Other views of a live chain than its disk: an internal snapshot, or a layer with what is below it. Read-only."""

from collections.abc import Iterator
from dataclasses import dataclass

from nbdq.block import Extent
from nbdq.chain.disk import ChainDisk, extents_of, sound_runs
from nbdq.chain.live import LiveChain
from nbdq.chain.open import read_only_layer
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.raw import size_of_raw
from nbdq.chain.resolve import ResolvedLayer
from nbdq.errors import OperationError, printable
from nbdq.qcow2.snapshots import read_snapshots, snapshot_selector


@dataclass(frozen=True)
class View:
    """What is shown of a chain."""

    layer: str | None = None
    """Path or node name of a layer; None for the top."""
    snapshot: str | None = None
    """Id or name of an internal snapshot of that layer; None for what it is now."""


@dataclass(frozen=True)
class SnapshotView:
    """An internal snapshot, and what shows it."""

    id: str
    name: str
    size: int
    """Bytes of the disk that it shows."""
    view: View


def size_of(layer: ResolvedLayer) -> int:
    """Bytes of the disk that the layer and what is below it are."""
    return size_of_raw(layer.storage) if layer.header is None else layer.header.guest_size


def snapshot_views(layer: ResolvedLayer) -> list[SnapshotView]:
    """The internal snapshots of a layer, in the order of its table, which is read; none of them is opened.

    Raises:
        ImageError, OSError: the table cannot be read.
    """
    if layer.header is None:
        return []
    return [
        SnapshotView(
            snapshot.id,
            snapshot.name,
            layer.header.guest_size if snapshot.disk_size is None else snapshot.disk_size // 512 * 512,
            View(layer.path, snapshot_selector(snapshot)),
        )
        for snapshot in read_snapshots(layer.storage, layer.header)
    ]


def open_view(chain: LiveChain, view: View) -> ChainDisk:
    """The disk that ``view`` shows, over the chain's own files: never to be closed, and to be opened anew whenever the
    chain was rearranged. It stays true while the layer is not written to, or the snapshot not deleted.

    Raises:
        NotFound: the layer is not, or no longer, part of the chain.
        OperationError: the layer is the top, which changes.
        ImageError: there is no such snapshot, or it cannot be believed.
    """
    index = chain.index_of(view.layer) if view.layer is not None else 0
    layers = chain.layers
    if view.snapshot is None:
        if index == 0 and not chain.read_only:
            raise OperationError(f"{printable(chain.path, 1024)} is being written to; export the disk itself")
        return chain.slice(index, len(layers) - 1)
    shown = read_only_layer(layers[index], view.snapshot)
    below = chain.slice(index + 1, len(layers) - 1).layers if index + 1 < len(layers) else []
    return ChainDisk([shown, *below], clusters=chain.clusters)


def live_extents(chain: LiveChain, offset: int, length: int) -> Iterator[Extent]:
    """What ``qemu-img map`` would say of the disk, while it is in use; each extent as it is when it is asked for.

    Raises:
        OSError: as :meth:`nbdq.chain.disk.ChainDisk.extents`.
    """
    device = chain.device
    if isinstance(device, ChainDisk):
        return device.extents(offset, length)
    if isinstance(device, OverlayDisk):
        files = [(layer.data_storage or layer.storage).path for layer in chain.layers]
        return extents_of(
            sound_runs(device.runs(offset, length), lambda layer: files[layer]), lambda layer: files[layer]
        )
    return ChainDisk([read_only_layer(chain.layers[0])], clusters=chain.clusters).extents(offset, length)

"""From a path to a disk: resolve the chain, make layers of its images, put the index over them."""

from collections.abc import Sequence
from itertools import chain

from nbdq.chain.clusters import ClusterCache
from nbdq.chain.disk import INDEX_BUDGET, ChainDisk
from nbdq.chain.index import Layer
from nbdq.chain.policy import Policy
from nbdq.chain.raw import RawImage
from nbdq.chain.resolve import resolve_chain
from nbdq.errors import UnsupportedImage
from nbdq.qcow2.bitmaps import iterate_bitmaps
from nbdq.qcow2.image import Qcow2Image
from nbdq.qcow2.snapshots import check_snapshot, find_snapshot, iterate_snapshots, read_snapshots


def open_disk(
    path: str,
    *,
    format: str,
    policy: Policy,
    clusters: ClusterCache,
    backing: Sequence[tuple[str, str]] | None = None,
    snapshot: str | None = None,
    index_budget: int = INDEX_BUDGET,
) -> ChainDisk:
    """Open the chain whose top image is ``path`` for reading. The caller owns the disk; ``clusters`` stays shared.

    Args:
        format: of the top image; never probed (R-34).
        backing: (format, path) of every layer below the top, overriding what headers say; empty ends the chain.
        snapshot: id or name of an internal snapshot of the top image to show instead of its active state.
        index_budget: bytes for the windows of the chain index.

    Raises:
        ImageError: a layer cannot be served; the message names it and the remedy.
    """
    resolved = resolve_chain(path, format=format, policy=policy, backing=backing)
    layers: list[Layer] = []
    try:
        for number, layer in enumerate(resolved):
            if layer.header is None:
                if number == 0 and snapshot is not None:
                    raise UnsupportedImage(path, "a raw image has no internal snapshots", "leave out --load-snapshot")
                layers.append(RawImage(layer.storage))
                continue
            # Read even when nobody asks, because QEMU refuses images in which they are broken (V24).
            for _ in chain(
                iterate_snapshots(layer.storage, layer.header), iterate_bitmaps(layer.storage, layer.header)
            ):
                pass
            chosen = None
            if number == 0 and snapshot is not None:
                chosen = find_snapshot(read_snapshots(layer.storage, layer.header), snapshot)
                check_snapshot(layer.storage, layer.header, chosen)
            layers.append(Qcow2Image(layer.storage, layer.header, data=layer.data_storage, snapshot=chosen))
    except BaseException:
        for layer in resolved:
            layer.storage.close()
            if layer.data_storage is not None:
                layer.data_storage.close()
        raise
    return ChainDisk(layers, clusters=clusters, index_budget=index_budget)

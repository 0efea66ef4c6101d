"""From a path to a disk: resolve the chain, make layers of its images, put the index over them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain

from nbdq.chain.clusters import ClusterCache
from nbdq.chain.disk import INDEX_BUDGET, ChainDisk
from nbdq.chain.index import Layer
from nbdq.chain.marker import check_not_committed, check_not_overlaid, remove_stale_marker
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.policy import Policy
from nbdq.chain.raw import RawImage
from nbdq.chain.raw_disk import RawDisk
from nbdq.chain.resolve import ResolvedLayer, resolve_chain
from nbdq.errors import UnsupportedImage
from nbdq.qcow2.bitmaps.directory import iterate_bitmaps
from nbdq.qcow2.bitmaps.takeover import take_over_bitmaps
from nbdq.qcow2.format import Header
from nbdq.qcow2.image import Qcow2Image
from nbdq.qcow2.snapshots import check_snapshot, find_snapshot, iterate_snapshots, read_snapshots
from nbdq.qcow2.writing.prepare import prepare_for_writing
from nbdq.qcow2.writing.writable import WritableImage
from nbdq.storage import FileStorage


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
    with _closing_on_failure(resolved):
        return ChainDisk(_layers(resolved, snapshot), clusters=clusters, index_budget=index_budget)


def open_writable(
    path: str,
    *,
    format: str,
    policy: Policy,
    clusters: ClusterCache,
    backing: Sequence[tuple[str, str]] | None = None,
    index_budget: int = INDEX_BUDGET,
    punch: bool = True,
    write_threshold: int | None = None,
    on_event: Callable[[str], None] = lambda text: None,
) -> RawDisk | OverlayDisk:
    """Open the chain whose top image is ``path`` to read and write it. The caller owns the disk.

    A dirty image is repaired first, and promises that will not be kept are withdrawn (Q15); both are durable on return.

    Args:
        punch: give the space of clusters that became free back to the file system.
        write_threshold: host offset; ``on_event`` is told once when an allocation in the top passes it.
        on_event: told in one line of what an operator should know; called from any thread, possibly with locks held.

    The others are those of :func:`open_disk`.

    Raises:
        ImageError: a layer cannot be served, or the top cannot be written to; the message names it and the remedy.
        OSError: the top cannot be read or written.
    """
    resolved = resolve_chain(path, format=format, policy=policy, backing=backing, writable=True)
    with _closing_on_failure(resolved):
        resolved[0] = check_top(resolved, policy)
        below = None
        if len(resolved) > 1:
            below = ChainDisk(_layers(resolved[1:]), clusters=clusters, index_budget=index_budget)
        disk = writable_disk(resolved[0], below, clusters=clusters, punch=punch, on_event=on_event)
        if isinstance(disk, OverlayDisk):
            disk.top.allocator.watch(
                write_threshold, lambda end: on_event(f"{path}: allocation has passed the write threshold: {end}")
            )
        return disk


def check_top(layers: Sequence[ResolvedLayer], policy: Policy) -> ResolvedLayer:
    """Refuse a top whose overlay would be damaged by writes, or that was committed into a layer below; the top with its
    header as it is then.

    A mark that is not true any more is removed, durably.

    Raises:
        ChainError: another image is the disk now.
        OSError: it cannot be read or written.
    """
    top = layers[0]
    if top.header is None:
        return top
    check_not_committed(top.storage, top.header, [layer.storage for layer in layers[1:]])
    check_not_overlaid(top.storage, top.header, policy)
    return replace(top, header=remove_stale_marker(top.storage, top.header))


def writable_disk(
    layer: ResolvedLayer,
    below: ChainDisk | None,
    *,
    clusters: ClusterCache,
    punch: bool = True,
    on_event: Callable[[str], None] = lambda text: None,
) -> RawDisk | OverlayDisk:
    """The disk of ``layer``, which is open for writing and claimed by us alone, over ``below``.

    A dirty image is repaired, promises that will not be kept are withdrawn, dirty bitmaps are taken over; durably.

    Raises:
        ImageError, OSError: as :func:`open_writable`. The storages stay the caller's.
    """
    if layer.header is None:
        return RawDisk(layer.storage)
    _check_directories(layer.storage, layer.header)
    header = prepare_for_writing(layer.storage, layer.header)
    image = WritableImage(layer.storage, header, data=layer.data_storage, below=below, punch=punch, on_event=on_event)
    taken = take_over_bitmaps(layer.storage, header)
    if taken.lost is not None:
        on_event(f"{layer.path}: dirty bitmaps are lost: {taken.lost}")
    image.header, image.bitmaps = taken.header, taken.bitmaps
    return OverlayDisk(image, below, clusters=clusters)


def _layers(resolved: Sequence[ResolvedLayer], snapshot: str | None = None) -> list[Layer]:
    """Layers that are only read; ``snapshot`` of the first one."""
    return [read_only_layer(layer, snapshot if depth == 0 else None) for depth, layer in enumerate(resolved)]


def read_only_layer(layer: ResolvedLayer, snapshot: str | None = None) -> Layer:
    """The image of ``layer`` as it is in the file, or one of its internal snapshots; over the same storages.

    Raises:
        ImageError: directories are broken, or there is no such snapshot.
    """
    if layer.header is None:
        if snapshot is not None:
            raise UnsupportedImage(layer.path, "a raw image has no internal snapshots", "leave out --load-snapshot")
        return RawImage(layer.storage)
    _check_directories(layer.storage, layer.header)
    chosen = None
    if snapshot is not None:
        chosen = find_snapshot(read_snapshots(layer.storage, layer.header), snapshot)
        check_snapshot(layer.storage, layer.header, chosen)
    return Qcow2Image(layer.storage, layer.header, data=layer.data_storage, snapshot=chosen)


def _check_directories(storage: FileStorage, header: Header) -> None:
    """Read snapshot table and bitmap directory even when nobody asks: QEMU refuses images in which they are broken."""
    for _ in chain(iterate_snapshots(storage, header), iterate_bitmaps(storage, header)):  # (V24)
        pass


@contextmanager
def _closing_on_failure(resolved: Sequence[ResolvedLayer]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for layer in resolved:
            layer.storage.close()
            if layer.data_storage is not None:
                layer.data_storage.close()
        raise

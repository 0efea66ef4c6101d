"""Exports that come along with a disk's own: ``disk@SNAPSHOT`` for its internal snapshots, ``disk#N`` for its layers.

They are read-only, under the policy of the export that they are derived from, and follow the disk: what is made or
deleted while it is served comes and goes. There may be hundreds of them, so what one shows is opened when somebody
reads it; that is done on a thread of the pool, and a client that only looks around costs nothing (R-07).
"""

import errno
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

from nbdq.block import Piece, Status
from nbdq.chain.disk import ChainDisk
from nbdq.chain.live import LiveChain
from nbdq.chain.resolve import ResolvedLayer
from nbdq.chain.views import SnapshotView, View, open_view, size_of, snapshot_views
from nbdq.errors import ImageError, NbdqError, printable
from nbdq.server.exports.rate import Rates
from nbdq.server.exports.wish import Wish

_log = logging.getLogger(__name__)

#: For the windows of the index of one: there may be hundreds, and clients choose how many of them are read.
_INDEX_BYTES = 2 << 20

#: Internal snapshots of one image that become exports. A file of 5 MB can have 65,536, each of which costs 7 KB of
#: memory and a part of every look at the list, and who may write image files must not be able to fill either.
SNAPSHOTS_MAX = 1000
#: Exports of a server beyond which nothing comes along any more.
EXPORTS_MAX = 20_000


@dataclass(frozen=True)
class Derivation:
    """What is derived from one export."""

    wish: Wish
    """The export."""
    snapshots: bool = False
    layers: bool = False


@dataclass(frozen=True)
class Derived:
    """An export to come along."""

    wish: Wish
    size: int
    parent: str
    """Name of the export that it comes along with."""


class LazyView:
    """A read-only :class:`~nbdq.block.BlockDevice` that shows a view of a chain, and opens it when that is read."""

    def __init__(self, chain: LiveChain, view: View, size: int) -> None:
        """``size``: bytes that it is known to have."""
        self.size = size
        self._chain = chain
        self._view = view
        self._disk: ChainDisk | None = None
        self._opening = threading.Lock()

    def _opened(self) -> ChainDisk:
        with self._opening:
            disk = self._disk
            if disk is None:
                try:
                    layers = open_view(self._chain, self._view).layers
                except NbdqError as error:
                    raise OSError(errno.EIO, str(error)) from None
                disk = ChainDisk(layers, clusters=self._chain.clusters, index_budget=_INDEX_BYTES)
                self._disk = disk
            return disk

    def forget(self) -> None:
        """Nobody reads it for now; what is being read still is read to its end."""
        self._disk = None

    def read_into(self, offset: int, view: memoryview) -> None:
        self._opened().read_into(offset, view)

    def read_cached(self, offset: int, view: memoryview) -> bool:
        disk = self._disk
        return disk is not None and disk.read_cached(offset, view)

    def gather_cached(self, offset: int, length: int) -> list[Piece] | None:
        disk = self._disk
        return None if disk is None else disk.gather_cached(offset, length)

    def gather(self, offset: int, length: int) -> list[Piece]:
        return self._opened().gather(offset, length)

    def status_cached(self, offset: int, length: int) -> bool:
        disk = self._disk
        return disk is not None and disk.status_cached(offset, length)

    def status(self, offset: int, length: int) -> Iterator[Status]:
        return self._opened().status(offset, length)

    def prefetch(self, offset: int, length: int) -> None:
        self._opened().prefetch(offset, length)

    def close(self) -> None:
        """The files are the chain's."""


def derived_wishes(chain: LiveChain, derivation: Derivation) -> list[Derived]:
    """What is to be offered now. Reads the table of snapshots, and opens nothing.

    A table that cannot be read, or has more than SNAPSHOTS_MAX entries, has nothing to offer, and the log says so. Of
    snapshots with the same name, as QEMU permits, the first counts (Q61); one without a name, or with control
    characters in it, goes by its id.
    """
    wish, layers = derivation.wish, chain.layers
    common = replace(wish, writable=False, bitmaps=(), rates=Rates())
    found: dict[str, Derived] = {}
    if derivation.snapshots:
        for snapshot in _snapshots(layers[0]):
            called = snapshot.name if snapshot.name and snapshot.name.isprintable() else snapshot.id
            if not called.isprintable():  # as names of files that are exports: clients show them to people
                continue
            name = f"{wish.name}@{called}"
            text = f"internal snapshot {snapshot.id}" if snapshot.id.isprintable() else ""
            derived = replace(common, id=name, name=name, description=text, view=snapshot.view)
            found.setdefault(name, Derived(derived, snapshot.size, wish.name))
    if derivation.layers:
        for depth, layer in enumerate(layers[1:], 1):
            name, view = f"{wish.name}#{depth}", View(layer.path)
            derived = replace(common, id=name, name=name, description=f"layer {depth}", view=view)
            found[name] = Derived(derived, size_of(layer), wish.name)
    return list(found.values())


def _snapshots(layer: ResolvedLayer) -> list[SnapshotView]:
    count = 0 if layer.header is None else layer.header.snapshot_count
    if count > SNAPSHOTS_MAX:
        what = f"{printable(layer.path, 1024)} has {count} internal snapshots"
        _log.warning("%s; none of them is offered, as no more than %d may be", what, SNAPSHOTS_MAX)
        return []
    try:
        return snapshot_views(layer)
    except (ImageError, OSError) as error:
        _log.warning("no internal snapshots are offered: %s", error)
        return []

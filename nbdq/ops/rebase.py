"""Rebase: a layer comes to lie over another chain, and the disk reads the same (4.9)."""

from collections.abc import Iterator
from contextlib import suppress

import numpy as np

from nbdq.chain.disk import ChainDisk, new_buffer
from nbdq.chain.live import LiveChain
from nbdq.chain.open import read_only_layer
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.resolve import ResolvedLayer, backing_path
from nbdq.errors import NotFound, OperationError, printable
from nbdq.ops.control import Control
from nbdq.ops.fill import Filling
from nbdq.ops.repoint import Repoint
from nbdq.ops.stretches import Stretches

#: Bytes compared at once, and bytes of zeros on both sides that are passed over at once.
_PIECE = 2 << 20
_ZEROS = 1 << 30
_ALL_LAYERS = 1 << 16


def change_backing_file(chain: LiveChain, index: int, name: str | None, format: str | None = None) -> None:
    """Change what a layer says of its backing file; the running disk goes on as it is (``rebase -u``).

    Nobody looks whether the file exists, or whether the disk will read the same over it. Durable on return.

    Args:
        format: of the backing file; by default the one that is recorded, or that the layer below has.

    Raises:
        OperationError: the disk is read-only, or the name cannot be recorded.
        ImageError, OSError: the header cannot be written.
    """
    if chain.read_only:
        raise OperationError(f"{printable(chain.path, 1024)} is served read-only; its layers stay as they are")
    layers = chain.layers
    header = layers[index].header
    if header is not None and name and format is None:
        format = header.backing_format
        if format is None and index + 1 < len(layers):
            format = str(layers[index + 1].format)
    chain.set_backing(index, name or None, format if name else None)


class Rebase(Filling):
    """Layer ``index`` takes over what would read otherwise over the new chain: like ``qemu-img rebase``, but live.

    Without any new chain it is a :class:`~nbdq.ops.stream.Stream` without a base.
    """

    def __init__(self, chain: LiveChain, *, index: int = 0, name: str, format: str, force: bool = False) -> None:
        """Look whether it can be done; nothing is opened or changed.

        Args:
            index: the layer that is to lie over another chain.
            name: the new backing file, as it will be recorded: relative to the layer.
            format: of the new backing file.
            force: also if the layer has internal snapshots, which read otherwise afterwards.

        Raises:
            OperationError: the disk is read-only, or the new backing file is not allowed.
        """
        super().__init__(chain, index, force=force)
        self._name = name
        self._format = format
        self._path = backing_path(chain.layers[index].path, name)
        if not chain.gate.admits(self._path):
            what = f"{printable(self._path, 1024)} lies outside the allowed directories"
            raise OperationError(f"{what}; allow its directory with --allow-backing DIR")
        with suppress(NotFound):
            if chain.index_of(self._path) <= index:
                raise _loop(self._path)
        self._new: ChainDisk | None = None
        self._open: Stretches | None = None
        self._buffers = new_buffer(_PIECE), new_buffer(_PIECE)

    def _plan(self) -> Repoint:
        resolved = self._chain.resolve(self._path, format=self._format)
        try:
            self._refuse_loop(resolved)
            # No file of a disk is open twice: the layers of the present chain take part as they are.
            present = {(layer.storage.identity, layer.format): layer for layer in self._chain.layers}
            layers = [present.get((layer.storage.identity, layer.format), layer) for layer in resolved]
            self._new = ChainDisk([read_only_layer(layer) for layer in layers], clusters=self._chain.clusters)
            repoint = Repoint(self._chain, self._index, layers, name=self._name, format=self._format)
        except BaseException:
            self._chain.drop(resolved)
            raise
        self._chain.drop([layer for layer in resolved if layer not in layers])
        return repoint

    def _refuse_loop(self, layers: list[ResolvedLayer]) -> None:
        above = {layer.storage.identity for layer in self._chain.layers[: self._index + 1]}
        for layer in layers:
            if layer.storage.identity in above:
                raise OperationError(
                    f"{printable(layer.path, 1024)} would lie over itself; choose another backing file"
                )

    def _begin(self, disk: OverlayDisk, control: Control) -> None:
        self._open = Stretches(disk, range(1, _ALL_LAYERS))
        control.expect(self._open.measure())

    def _fill(self, disk: OverlayDisk, start: int, control: Control) -> Iterator[int]:
        assert self._open is not None
        for stretch in self._open.within(start, disk.size):
            position = stretch.start
            while position < stretch.end:
                end = min(stretch.end, position - position % _ZEROS + _ZEROS)
                is_zero = _reads_zero(disk.below, position, end) and _reads_zero(self._new, position, end)
                if not is_zero:
                    end = min(end, position - position % _PIECE + _PIECE)
                    for low, high in self._differing(disk, position, end):
                        disk.populate(low, high - low)
                control.advance(end - position, cost=0 if is_zero else None)
                yield end
                position = end

    def _differing(self, disk: OverlayDisk, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Ranges of whole clusters that do not read alike over the old chain and the new one."""
        old, new = (buffer[: end - start] for buffer in self._buffers)
        _read(disk.below, start, old)
        _read(self._new, start, new)
        if old == new:
            return
        size = disk.top.cluster_size
        base = start - start % size
        different = np.flatnonzero(np.asarray(old) != np.asarray(new)) + (start - base)
        clusters = np.unique(different // size)
        breaks = np.flatnonzero(np.diff(clusters) > 1) + 1
        for group in np.split(clusters, breaks):
            first, last = int(group[0]), int(group[-1])
            yield max(start, base + first * size), min(end, base + (last + 1) * size)


def _loop(path: str) -> OperationError:
    return OperationError(f"{printable(path, 1024)} would lie over itself; choose another backing file")


def _reads_zero(disk: ChainDisk | None, start: int, end: int) -> bool:
    end = min(end, disk.size) if disk is not None else start
    return disk is None or start >= end or disk.reads_zero(start, end - start)


def _read(disk: ChainDisk | None, offset: int, view: memoryview) -> None:
    """Fill ``view``; behind the end of the disk there are zeros (S1)."""
    count = max(0, min(len(view), (disk.size if disk is not None else 0) - offset))
    if disk is not None and count:
        disk.read_into(offset, view[:count])
    view[count:] = bytes(len(view) - count)

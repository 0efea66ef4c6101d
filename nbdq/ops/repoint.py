"""One layer of a running disk comes to lie over other layers: the pivot of intermediate commits, streams and rebases.

The layer's header is changed first, durably, and then the running disk. What the disk reads as is the same before and
after, which the caller has seen to; so a crash at any moment leaves a chain that reads the same.
"""

import os
from collections.abc import Sequence

from nbdq.chain.live import LiveChain
from nbdq.chain.resolve import ResolvedLayer, backing_path
from nbdq.storage import FileStorage, identity_of


class Repoint:
    """Puts a layer over ``below``, and back. The caller has drained the disk whenever it calls."""

    def __init__(
        self,
        chain: LiveChain,
        index: int,
        below: Sequence[ResolvedLayer],
        *,
        name: str | None = None,
        format: str | None = None,
    ) -> None:
        """Plan it; nothing is changed.

        Args:
            below: the layers under layer ``index`` from then on; each is part of the chain, or was resolved for it.
            name: the backing name to record; by default one that leads there, relative if the present one is.
            format: the backing format to record; by default that of the first layer of ``below``.
        """
        self._chain = chain
        self._layer = chain.layers[index].storage
        self._below = [layer.storage for layer in below]
        self._added = [layer for layer in below if all(layer.storage is not known.storage for known in chain.layers)]
        self._name = name
        self._format = format
        if below:
            self._name = name or backing_name(chain.layers[index], below[0])
            self._format = format or str(below[0].format)
        self._before: tuple[list[FileStorage], str | None, str | None] | None = None
        self.out: list[ResolvedLayer] = list(self._added)
        """Layers that belong to us because they are not part of the disk: those to come, or those that have gone."""

    @property
    def path(self) -> str:
        """The absolute path of the layer that comes to lie over others."""
        return absolute_path(self._chain.layers[self._index].path)

    @property
    def _index(self) -> int:
        """Where the layer is now: others may have come in front of it."""
        return [layer.storage for layer in self._chain.layers].index(self._layer)

    def check(self) -> None:
        """Find out whether the layer's header can be changed, before anybody works for that in vain.

        Raises:
            ImageLocked: somebody else reads the layer.
            ImageError: it cannot be opened for writing.
        """
        if index := self._index:  # the active one is open for writing
            layer = self._chain.layers[index]
            self._chain.claims.begin_writing(layer)
            self._chain.claims.end_writing(layer)

    def do(self) -> None:
        """Change header and disk.

        Raises:
            ImageError, OperationError, OSError: it failed, and everything is as it was.
        """
        layers = self._chain.layers
        header = layers[self._index].header
        assert header is not None, "a raw layer lies over nothing"
        before = [layer.storage for layer in layers[self._index + 1 :]]
        self._before = before, header.backing_name, header.backing_format
        self._switch(self._below, self._name, self._format)

    def undo(self) -> None:
        """Change header and disk back; what had dropped out is part of the disk again.

        Raises:
            ImageError, OperationError, OSError: it failed; the disk reads the same either way.
        """
        assert self._before is not None, "nothing was done"
        self._switch(*self._before)
        self._before = None

    def _switch(self, below: Sequence[FileStorage], name: str | None, format: str | None) -> None:
        chain, index = self._chain, self._index
        header = chain.layers[index].header
        assert header is not None
        chain.set_backing(index, name, format)
        try:
            layers = chain.layers  # with the new header
            there = {layer.storage: layer for layer in (*self.out, *layers)}
            dropped = chain.rearrange([*layers[: index + 1], *(there[storage] for storage in below)])
        except BaseException:
            chain.set_backing(index, header.backing_name, header.backing_format)
            raise
        self.out = [layer for layer in self.out if layer.storage not in below] + dropped

    def drop(self) -> None:
        """Close the layers that are not part of the disk. Idempotent; the disk need not be drained."""
        out, self.out = self.out, []
        self._chain.drop(out)


def backing_name(layer: ResolvedLayer, base: ResolvedLayer) -> str:
    """A name for ``base`` to be recorded in ``layer``: relative if the one that is there now is, else absolute (N2)."""
    present = layer.header.backing_name if layer.header is not None else None
    if present is not None and not os.path.isabs(present):
        relative = os.path.relpath(base.path, os.path.dirname(layer.path) or ".")
        # Lexically right is not always right: a directory on the way may be a link.
        if _is_same(backing_path(layer.path, relative), base):
            # A colon before the first slash would make it a protocol (N1).
            return f"./{relative}" if ":" in relative.partition("/")[0] else relative
    return os.path.abspath(base.path) if _is_same(os.path.abspath(base.path), base) else os.path.realpath(base.path)


def absolute_path(path: str) -> str:
    """The path from the root, links not followed."""
    return os.path.abspath(path)


def _is_same(path: str, layer: ResolvedLayer) -> bool:
    try:
        return identity_of(path) == layer.storage.identity
    except OSError:
        return False

"""Other views of a live chain than its disk: an internal snapshot, or a layer with what is below it. Read-only."""

from dataclasses import dataclass

from nbdq.chain.disk import ChainDisk
from nbdq.chain.live import LiveChain
from nbdq.chain.open import read_only_layer
from nbdq.errors import OperationError, printable


@dataclass(frozen=True)
class View:
    """What is shown of a chain."""

    layer: str | None = None
    """Path or node name of a layer; None for the top."""
    snapshot: str | None = None
    """Id or name of an internal snapshot of that layer; None for what it is now."""


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

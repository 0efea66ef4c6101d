"""What streams and rebases have in common: a layer takes over what shows through it, then lies over other layers.

**The invariant.** A layer is only made to hold what it reads as already, so the disk reads the same at every moment,
and after a power cut at any moment; work that was done twice, or in vain, harms nobody. The guest may write to the
active layer meanwhile, and wins: what it has written, zeroed or given up is the layer's own, and stays so.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from nbdq.chain.live import LiveChain
from nbdq.chain.overlay import OverlayDisk
from nbdq.errors import OperationError, printable
from nbdq.ops.control import Control
from nbdq.ops.repoint import Repoint
from nbdq.ops.written import WrittenLayer


class Filling(ABC):
    """An :class:`~nbdq.ops.operation.Operation` on one layer, and those below it."""

    def __init__(self, chain: LiveChain, index: int, *, force: bool) -> None:
        """Look whether it can be done; nothing is changed.

        Raises:
            OperationError: the disk is read-only, or the layer has nothing below it; or without ``force``, it has
                internal snapshots, which lie over what is below it, too, and take nothing over.
        """
        layers = chain.layers
        if chain.read_only:
            raise OperationError(f"{printable(chain.path, 1024)} is served read-only; its layers stay as they are")
        header = layers[index].header
        if header is None:
            raise OperationError(f"{printable(layers[index].path, 1024)} is raw, and lies over nothing")
        if header.snapshot_count and not force:
            raise OperationError(
                f"{printable(layers[index].path, 1024)} has internal snapshots, which would not read the same over"
                " other layers; delete them, or force it"
            )
        self._chain = chain
        self._storage = layers[index].storage
        self._written: WrittenLayer | None = None
        self._repoint: Repoint | None = None
        self._begun = False
        self._position = 0

    @property
    def _index(self) -> int:
        return [layer.storage for layer in self._chain.layers].index(self._storage)

    @abstractmethod
    def _plan(self) -> Repoint:
        """What the layer will lie over; asked once, when it begins."""

    @abstractmethod
    def _begin(self, disk: OverlayDisk, control: Control) -> None:
        """Find out what there is to do, and tell ``control``. ``disk`` is the layer over all below it."""

    @abstractmethod
    def _fill(self, disk: OverlayDisk, start: int, control: Control) -> Iterator[int]:
        """Do it from a guest offset on; give the offset up to which it is done, now and then."""

    def run(self, control: Control) -> None:
        """Fill the layer; that is durable on return.

        Raises:
            Cancelled: ``control`` said so.
            ImageError, OperationError: a layer is in use by somebody else, or does not fit.
            OSError: a layer cannot be read or written; ``run`` can be called again.
        """
        if self._repoint is None:
            self._repoint = self._plan()
        if self._written is None:
            self._written = WrittenLayer(self._chain, self._index)
        disk = self._written.disk
        assert isinstance(disk, OverlayDisk)
        if not self._begun:
            self._begin(disk, control)
            self._begun = True
        for position in self._fill(disk, self._position, control):
            self._position = position
        disk.flush()

    def pivot(self) -> None:
        """Let the layer lie over what it is to lie over; see :class:`~nbdq.ops.operation.Operation`."""
        assert self._written is not None
        assert self._repoint is not None
        self._written.disk.flush()
        self._written.give_up()
        self._repoint.do()

    def revert(self) -> None:
        """Undo :meth:`pivot`; what the layer took over it keeps."""
        assert self._repoint is not None
        self._repoint.undo()

    def finish(self) -> None:
        """Close the layers that have dropped out; their files stay as they are."""
        if self._repoint is not None:
            self._repoint.drop()

    def abort(self) -> None:
        """Let the layer go; the disk is drained, and lies over what it lay over before.

        Raises:
            OSError: what was written last may not be durable; that harms nobody.
        """
        written, self._written = self._written, None
        try:
            if written is not None:
                written.give_up()
        finally:
            self.finish()

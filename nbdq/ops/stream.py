"""Stream: a layer takes over what layers below it hold, and they drop out of the chain (4.8)."""

from collections.abc import Iterator

from nbdq.chain.live import LiveChain
from nbdq.chain.overlay import OverlayDisk
from nbdq.errors import OperationError, printable
from nbdq.ops.control import Control
from nbdq.ops.fill import Filling
from nbdq.ops.repoint import Repoint
from nbdq.ops.transfer import Fill


class Stream(Filling):
    """Into layer ``index``, the active one or one below it. What was compressed stays so, where that is possible."""

    def __init__(
        self,
        chain: LiveChain,
        *,
        index: int = 0,
        base: int | None = None,
        backing_file: str | None = None,
        force: bool = False,
    ) -> None:
        """Look whether it can be done; nothing is changed.

        Args:
            index: the layer that takes over.
            base: the layer that it lies over afterwards; None: it will stand alone.
            backing_file: what is recorded as its backing file, instead of a name that leads to the base.
            force: also if the layer has internal snapshots, which lose what they read from below.

        Raises:
            OperationError: it makes no sense, or the disk is read-only.
        """
        super().__init__(chain, index, force=force)
        layers = chain.layers
        if base is not None and base <= index:
            names = f"{printable(layers[base].path, 1024)} does not lie below {printable(layers[index].path, 1024)}"
            raise OperationError(f"{names}; name a base that does")
        if base is None and backing_file is not None:
            raise OperationError("a layer that stands alone has no backing file; name a base, or no backing file")
        self._base = layers[base].storage if base is not None else None
        self._backing_file = backing_file
        self._copy: Fill | None = None

    @property
    def _base_index(self) -> int:
        """Behind the last layer if there will be no base."""
        return [*(layer.storage for layer in self._chain.layers), None].index(self._base)

    def _plan(self) -> Repoint:
        layers = self._chain.layers
        return Repoint(self._chain, self._index, layers[self._base_index :], name=self._backing_file)

    def _begin(self, disk: OverlayDisk, control: Control) -> None:
        index, base = self._index, self._base_index
        # Zeros have nothing to hide where nothing is below, or where the base has ended (S1).
        below = self._chain.slice(base, base).size if self._base is not None else 0
        self._copy = Fill(disk, range(1, base - index), disk, zeros_end=below)
        control.expect(self._copy.measure())

    def _fill(self, disk: OverlayDisk, start: int, control: Control) -> Iterator[int]:
        assert self._copy is not None
        return self._copy.copy(start, disk.size, control)

"""Commit: what some layers of a running disk hold goes into the layer below them, and they drop out (4.7, R-60).

**The invariant.** What is written to the base is hidden by the layers that are committed until the pivot: only ranges
that they decide are written, and a layer decides a range for as long as it is in the chain. So the disk reads the same
at every moment, and after a power cut at any moment: a layer above the base says what the base says, or hides it. Only
when all of the base is durable does the chain change, and that is one sector of a header, or the record of the new top.
Copying a second time what was copied already is harmless; so a commit can be begun again after a crash.
"""

from collections.abc import Callable, Collection
from contextlib import suppress
from time import monotonic

from nbdq.chain.live import LiveChain, WritableDisk
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.resolve import ResolvedLayer
from nbdq.errors import NbdqError, OperationError, printable
from nbdq.ops.control import Control
from nbdq.ops.preflight import check_no_overlays, find_overlays
from nbdq.ops.repoint import Repoint, absolute_path
from nbdq.ops.transfer import Transfer
from nbdq.ops.written import WrittenLayer
from nbdq.qcow2.header_area import set_overlay_marker

#: How much may be copied, and how many seconds may pass, before what was copied is made durable.
_DURABLE_BYTES = 1 << 30
_DURABLE_SECONDS = 30.0


def check_range(chain: LiveChain, *, top: int, base: int) -> None:
    """Refuse a commit of layers ``top`` to ``base - 1`` that cannot be.

    Raises:
        OperationError: it makes no sense, or the disk is read-only.
    """
    if chain.read_only:
        raise OperationError(f"{printable(chain.path, 1024)} is served read-only; nothing can be committed")
    layers = chain.layers
    if len(layers) < 2:
        raise OperationError("Image does not have a backing file.")
    assert 0 <= top < len(layers)
    assert 0 <= base < len(layers)
    if top == base:
        raise OperationError(f"{printable(layers[top].path, 1024)} is both top and base; name two layers")
    if base < top:
        names = f"{printable(layers[base].path, 1024)} lies above {printable(layers[top].path, 1024)}"
        raise OperationError(f"{names}; exchange base and top")


class Commit:
    """An :class:`~nbdq.ops.operation.Operation`: layers below the top go into a layer below them.

    The layer above them then lies over the base, by whose name it is recorded. A base that is smaller than the
    committed layers grows, one that is larger stays so, and what the layers above could see of its end becomes zero.
    """

    def __init__(
        self,
        chain: LiveChain,
        *,
        top: int,
        base: int,
        backing_file: str | None = None,
        start: int = 0,
        on_durable: Callable[[int], None] = lambda offset: None,
        directories: Collection[str] = (),
        force: bool = False,
    ) -> None:
        """Look whether it can be done; nothing is changed.

        Args:
            top, base: layers ``top`` to ``base - 1`` are committed; there is a layer above ``top``.
            backing_file: what the layer above records as its backing file, instead of a name that leads to the base.
            start: everything before this guest offset was committed by an earlier run, as ``on_durable`` was told.
            on_durable: told now and then up to which guest offset everything is committed, durably.
            directories: where to look for other overlays of the layers that change, besides these layers' own.
            force: do not look; what lies over the base elsewhere will be damaged.

        Raises:
            OperationError: it makes no sense, the disk is read-only, or there are other overlays.
        """
        check_range(chain, top=top, base=base)
        assert top, "the active layer is committed by ActiveCommit"
        if not force:
            check_no_overlays(chain, top=top, base=base, directories=directories)
        layers = chain.layers
        self._chain = chain
        self._top, self._base = layers[top].storage, layers[base].storage
        self._visible = min([chain.device.size, *(chain.slice(index, index).size for index in range(1, top))])
        self._repoint = Repoint(chain, top - 1, layers[base:], name=backing_file)
        self._position = start
        self._directories = directories
        self._on_durable = on_durable
        self._transfer: Transfer | None = None
        self._writer: WrittenLayer | None = None

    def run(self, control: Control) -> None:
        """Copy; everything is durable on return.

        Raises:
            Cancelled: ``control`` said so.
            ImageLocked: somebody else uses the base.
            ImageError, OSError: a layer cannot be read, or the base not be written; ``run`` can be called again.
        """
        if self._transfer is None:
            self._transfer = self._begin(control)
        assert self._writer is not None
        base = self._writer.disk
        durable, seconds = self._position, monotonic()
        for position in self._transfer.copy(self._position, base.size, control):
            self._position = position
            if self._position - durable > _DURABLE_BYTES or monotonic() - seconds > _DURABLE_SECONDS:
                base.flush()
                self._on_durable(self._position)
                durable, seconds = self._position, monotonic()
        base.flush()
        self._on_durable(self._position)

    def _begin(self, control: Control) -> Transfer:
        chain = self._chain
        self._repoint.check()
        storages = [layer.storage for layer in chain.layers]
        top, base = storages.index(self._top), storages.index(self._base)
        source = chain.slice(top, base)
        if self._writer is None:
            self._writer = WrittenLayer(chain, base, size=source.size)
        target = self._writer.disk
        # What is behind the end of the layers that go was hidden by that end (S1).
        if source.size < min(self._visible, target.size):
            target.zero(source.size, min(self._visible, target.size) - source.size, unmap=True)
        transfer = Transfer(source, base - top, target)
        control.expect(transfer.measure(self._position))
        return transfer

    def pivot(self) -> None:
        """Let the layer above lie over the base; see :class:`~nbdq.ops.operation.Operation`."""
        self._repoint.do()

    def revert(self) -> None:
        """Undo :meth:`pivot`: the base hides nothing, and is hidden."""
        self._repoint.undo()

    def finish(self) -> None:
        """Close what has dropped out, and let others read the base.

        Raises:
            OSError: the refcounts of what was freed may not be durable.
        """
        assert self._writer is not None
        try:
            move_mark(self._writer.disk, self._repoint.path)
            self._writer.release()
            self._mark_dropped()
        finally:
            self._repoint.drop()

    def _mark_dropped(self) -> None:
        """Let what was committed say so, that it does not stand in the way of the next commit as an overlay.

        But for layers that are themselves under other overlays: these would not be found through them any more.
        """
        chain = self._chain
        known = [layer.path for layer in (*chain.layers, *self._repoint.out)]
        base = next(layer for layer in chain.layers if layer.storage is self._base)
        for layer in self._repoint.out:
            with suppress(NbdqError, OSError):  # somebody reads it, or there is too much to look at
                if not find_overlays(layer.path, self._directories, known=known):
                    mark_committed(chain, layer, base)

    def abort(self) -> None:
        """Release the base; the disk is drained, and lies over what it lay over before.

        Raises:
            OSError: what was written to the base may not be durable; that harms nobody.
        """
        writer, self._writer, self._transfer = self._writer, None, None
        if writer is not None:
            writer.give_up()


def mark_committed(chain: LiveChain, layer: ResolvedLayer, base: ResolvedLayer) -> None:
    """Record in a layer that is no longer part of the disk that it was committed into ``base``. Durable.

    Raises:
        ImageError: somebody else reads it, or it cannot be written to.
        OSError: it cannot be written, or has no room for the name.
    """
    if layer.header is not None:
        chain.claims.begin_writing(layer)
        set_overlay_marker(layer.storage, layer.header, absolute_path(base.path))


def move_mark(disk: WritableDisk, overlay: str | None) -> None:
    """Let the base name another overlay, or none, if it bears the mark of one that was committed. Durable.

    Raises:
        OSError: the header cannot be written.
    """
    if isinstance(disk, OverlayDisk) and disk.top.header.overlay_marker is not None:
        disk.top.rewrite_header(lambda storage, header: set_overlay_marker(storage, header, overlay))

"""Active commit: the layers from the active one down go into a layer below them, which then is the active one (4.7).

The guest goes on writing to the top, so what it changes is noted and copied again, in passes that become shorter until
the rest is so little that it can be copied while the disk is drained. The invariant of :mod:`nbdq.ops.commit` holds
here, too: a range that the top has decided stays decided, whatever the guest does.

What is copied is what was there at some moment after its bit was cleared: the bit is cleared, then every request that
had begun before is waited for, then the disk is read. A request that begins later sets the bit again.
"""

import threading
from collections.abc import Callable, Collection
from contextlib import suppress

from nbdq.chain.bitmaps import bitmaps_of, carry_over_bitmaps
from nbdq.chain.live import LiveChain
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.resolve import ResolvedLayer
from nbdq.chain.sealing import or_never_written
from nbdq.errors import ImageError
from nbdq.ops.commit import check_range, mark_committed, move_mark
from nbdq.ops.control import Control
from nbdq.ops.preflight import check_no_overlays
from nbdq.ops.transfer import Transfer
from nbdq.ops.written import WrittenLayer
from nbdq.qcow2.bitmaps.bits import DirtyBits
from nbdq.qcow2.header_area import set_overlay_marker
from nbdq.qcow2.writing.writable import WritableImage

#: log2 of the granularity in which changes are noted: fine, for guests write in small pieces and all of it is copied …
_GRANULARITY_BITS = 12
#: … but coarser for disks that would need more bits than this.
_BITS_MAX = 1 << 26
#: What is so short is copied without asking first what it is.
_SHORT = 64 << 10
#: Bytes that may be left for the drain: some milliseconds.
_SMALL = 1 << 20
#: Passes after which a guest that writes as fast as we copy is not raced any longer.
_PASSES_MAX = 30
#: Seconds between passes that only keep up.
_IDLE = 0.1


class ActiveCommit:
    """A :class:`~nbdq.ops.operation.MirroringOperation`: everything above the base goes into it.

    A base that is smaller than the disk grows. One that is larger stays so, and after the pivot the disk is as large.
    The dirty bitmaps of the layers that go are not carried over, as in QEMU.
    """

    def __init__(
        self,
        chain: LiveChain,
        *,
        base: int,
        directories: Collection[str] = (),
        force: bool = False,
        workers: int = 1,
    ) -> None:
        """Look whether it can be done; nothing is changed.

        Args:
            base: the layer that is to be the active one; all above it are committed.
            directories: where to look for other overlays of the layers that change, besides these layers' own.
            force: do not look; what lies over the base elsewhere will be damaged.
            workers: threads that copy at once; one leaves most of the machine to the guests.

        Raises:
            OperationError: it makes no sense, the disk is read-only, or there are other overlays.
        """
        check_range(chain, top=0, base=base)
        if not force:
            check_no_overlays(chain, top=0, base=base, directories=directories)
        self._chain = chain
        self._base = chain.layers[base].storage
        self._workers = workers
        self.on_ready: Callable[[], None] = lambda: None
        self._is_ready = False
        self._wanted = threading.Event()
        self._position = 0
        self._pending: list[tuple[int, int]] = []
        """Ranges whose bits were cleared, and which have not been copied since."""
        self._writer: WrittenLayer | None = None
        self._transfer: Transfer | None = None
        self._image: WritableImage | None = None
        self._dirty: DirtyBits | None = None
        self._device = chain.device
        self._layers: list[ResolvedLayer] = []
        """What the disk consisted of before the pivot, as these layers are after it."""
        self._out: list[ResolvedLayer] = []
        self._mark: str | None = None
        """What the base named as its overlay before the pivot."""

    def complete(self) -> None:
        """Let :meth:`run` return as soon as what is left is small."""
        self._wanted.set()

    def run(self, control: Control) -> None:
        """Copy, tell that it is done, and keep up until :meth:`complete`.

        Raises:
            Cancelled: ``control`` said so.
            ImageLocked: somebody else uses the base.
            ImageError, OSError: a layer cannot be read, or the base not be written; ``run`` can be called again.
        """
        if self._transfer is None:
            self._transfer = self._begin(control)
        assert self._writer is not None
        assert self._image is not None
        size = self._chain.device.size
        for position in self._transfer.copy(self._position, size, control):
            self._position = position
        self._position = size
        passes = 0
        while True:
            passes += 1
            wanted = self._wanted.is_set()
            changed = self._catch_up(control)
            if changed or not self._is_ready:
                self._writer.disk.flush()  # so that there is little to be saved when the disk is drained
            if changed > _SMALL and passes < _PASSES_MAX:
                continue
            if not self._is_ready:
                self._is_ready = True
                self.on_ready()
            elif wanted:
                self._image.flush()  # the old top is saved when the disk is drained, too
                return
            else:
                passes = 0
            self._wanted.wait(_IDLE)
            control.advance()

    def _begin(self, control: Control) -> Transfer:
        chain = self._chain
        device = chain.device
        assert isinstance(device, OverlayDisk), "a raw disk lies over nothing"
        base = [layer.storage for layer in chain.layers].index(self._base)
        if self._writer is None:
            self._writer = WrittenLayer(chain, base, size=device.size)
        if self._dirty is None:
            self._image = device.top
            self._dirty = bitmaps_of(self._image).track(_granularity_bits(device.size))
        assert self._image is not None
        self._image.barrier()  # now nobody is left who does not mark
        transfer = Transfer(device, base, self._writer.disk, workers=self._workers)
        control.expect(transfer.measure())
        return transfer

    def _catch_up(self, control: Control) -> int:
        """Copy what has changed; the bytes that had."""
        assert self._transfer is not None
        assert self._image is not None
        assert self._dirty is not None
        self._pending += self._dirty.take(0, self._dirty.size)
        if not self._pending:
            return 0
        self._image.barrier()
        changed = sum(length for _, length in self._pending)
        control.expect(changed)
        while self._pending:
            offset, length = self._pending[-1]
            if length <= _SHORT:
                self._transfer.copy_short(offset, length, control)
            else:
                for _ in self._transfer.copy(offset, offset + length, control):
                    pass
            self._pending.pop()
        control.total = control.done  # of what had changed not everything had to be copied
        return changed

    def pivot(self) -> None:
        """Copy the rest, and let the base be the active layer; see :class:`~nbdq.ops.operation.Operation`.

        Everything that was written to the disk is durable in the base then. Until that is recorded, a restart from the
        old top is right, and from then on only one from the base.
        """
        assert self._writer is not None
        chain, disk = self._chain, self._writer.disk
        self._catch_up(Control())
        disk.flush()
        self._mark = disk.top.header.overlay_marker if isinstance(disk, OverlayDisk) else None
        move_mark(disk, None)
        layers = chain.layers
        base = [layer.storage for layer in layers].index(self._base)
        self._device = chain.device
        try:
            self._out = chain.rearrange(layers[base:], top=disk)
        except BaseException:
            self._protect_old_top()
            raise
        self._layers = [*self._out, *chain.layers]  # with the headers that they have now

    def mark(self) -> None:
        """Let the old top name the base as the disk; see :class:`~nbdq.ops.operation.MarkingOperation`.

        Raises:
            ImageError, OSError: it cannot be written to, or has no room for the name.
        """
        mark_committed(self._chain, self._out[0], self._chain.layers[0])

    def revert(self) -> None:
        """Let the old top be the active layer again; nothing has been written since the pivot.

        Raises:
            ImageError, OSError: it cannot be opened any more. The base stays, but nobody can write to it: whoever
                starts the server again finds the old top.
        """
        with or_never_written(self._chain.layers[0].storage, "the commit could not be taken back"):
            self._chain.rearrange(self._layers)
        self._protect_old_top()
        self._out = []
        carry_over_bitmaps(self._device, self._chain.device)
        assert isinstance(self._chain.device, OverlayDisk), "it was one before"
        self._image = self._chain.device.top

    def _protect_old_top(self) -> None:
        """Let the base bear its mark again: what lies over it is the disk still."""
        assert self._writer is not None
        disk = self._writer.disk
        if self._mark is not None and isinstance(disk, OverlayDisk):
            with suppress(ImageError, OSError):
                disk.top.rewrite_header(lambda storage, header: set_overlay_marker(storage, header, self._mark))

    def finish(self) -> None:
        """Close the layers that have dropped out; their files stay as they are."""
        assert self._writer is not None
        try:
            self._writer.release()
            for layer in self._out[1:]:
                with suppress(ImageError, OSError):  # somebody reads it
                    mark_committed(self._chain, layer, self._chain.layers[0])
        finally:
            self._chain.drop(self._out)

    def abort(self) -> None:
        """Release the base; the disk is drained.

        Raises:
            OSError: what was written to the base may not be durable; that harms nobody.
        """
        writer, self._writer, self._transfer = self._writer, None, None
        if self._image is not None and self._dirty is not None:
            bitmaps_of(self._image).untrack(self._dirty)
        if writer is not None:
            writer.give_up()


def _granularity_bits(size: int) -> int:
    bits = _GRANULARITY_BITS
    while size >> bits > _BITS_MAX:
        bits += 1
    return bits

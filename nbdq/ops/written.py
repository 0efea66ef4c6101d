"""A layer of a running disk that an operation writes to, beside the guest."""

from contextlib import ExitStack, suppress

from nbdq.chain.live import LiveChain, LowerLayer, WritableDisk
from nbdq.chain.overlay import OverlayDisk


class WrittenLayer:
    """The active layer, or one below it, open for writing. What is written must not change what the disk reads as."""

    def __init__(self, chain: LiveChain, index: int, *, size: int = 0) -> None:
        """Open layer ``index``, and make it ``size`` bytes large if it is smaller; that is durable on return.

        Raises:
            ImageError: it is in use by somebody else, or cannot be written to.
            OSError: it cannot be read or written, or cannot grow.
        """
        self._chain = chain
        self._lower: LowerLayer | None = None
        self._held = ExitStack()
        if index:
            self._lower = chain.begin_writing(index)
            self.disk: WritableDisk = self._lower.disk
            if isinstance(self.disk, OverlayDisk):
                self._held.enter_context(self.disk.top.hold())
        else:
            device = chain.device
            assert not chain.read_only
            self.disk = device  # type: ignore[assignment]
        if self.disk.size < size:
            try:
                self.disk.grow(size)
            except BaseException:
                with suppress(OSError):
                    self.release()
                raise

    def release(self) -> None:
        """Go back to reading it, unless it is the active layer. Idempotent.

        The layers have been exchanged since it was written to, or nothing that was written has freed anything.

        Raises:
            OSError: what was written last may not be durable.
        """
        self._held.close()
        self._release()

    def _release(self) -> None:
        if self._lower is not None:
            self._lower.release()

    def give_up(self) -> None:
        """Release it, with whatever was written. The disk is drained.

        Raises:
            OSError: as :meth:`release`; it is released nevertheless.
        """
        try:
            if self._lower is not None:
                self._chain.rearrange(self._chain.layers)  # the running disk forgets the places that become free now
        except BaseException:
            # It could not: so they do not become free, and leak. We hold them for as long as anybody could free them.
            with suppress(OSError):
                self._release()
            raise
        self.release()

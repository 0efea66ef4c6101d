"""The images of a disk become other kinds of images, while the disk is served: one of them, or the whole chain (4.11).

Layers below the top are amended beside the running disk, base first: what they map stays the same, so nobody notices.
The top is closed, amended and opened again while no request runs, which for a mere upgrade is a moment. Everything that
can be refused is refused before the first change, and the writer's locks of all layers are held until the end. A
failure in between leaves every layer whole; those that were amended before it stay so.
"""

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from nbdq.chain.live import LiveChain
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.resolve import ResolvedLayer
from nbdq.chain.sealing import seal
from nbdq.errors import NbdqError, OperationError, printable
from nbdq.ops.control import Cancelled, Control
from nbdq.ops.preflight import find_overlays
from nbdq.qcow2.amending.amend import amend_image
from nbdq.qcow2.amending.options import AmendOptions, check_options, is_amended
from nbdq.qcow2.format import Header
from nbdq.storage import FileStorage

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ChainRules:
    """Which layers of a chain may be amended (4.11, the oVirt rules)."""

    is_template: Callable[[str], bool] = lambda path: False
    """Whether the image at a path is one that others are made from, and never changes."""
    directories: Collection[str] = ()
    """Where overlays of other disks may lie, besides beside the layers."""


class Amend:
    """An :class:`~nbdq.ops.operation.Operation` on one layer of a chain, or on all of them."""

    def __init__(
        self,
        chain: LiveChain,
        options: AmendOptions,
        *,
        name: str,
        size: int | None = None,
        shrink: bool = False,
        whole_chain: ChainRules | None = None,
        on_layer: Callable[[str, int, int], None] = lambda path, done, total: None,
        audit: Callable[[int, str], None] = _log.log,
    ) -> None:
        """Look whether it can be done; nothing is changed.

        Args:
            name: of the disk, for the line that says how it ended.
            size: of the disk in bytes; smaller only with ``shrink``.
            whole_chain: amend every layer that is not yet what ``options`` say, by these rules; raw ones are passed
                over. Without, only the top.
            on_layer: told of every layer that was amended: its path, how many are done, of how many; from any thread.
            audit: told in one line how it ended, well or not; the first argument is a level of :mod:`logging`.

        Raises:
            OperationError: it cannot be done.
            ImageError, OSError: an image cannot be read.
        """
        self._chain = chain
        self._options = options
        self._name = name
        self._size = size
        self._on_layer = on_layer
        self._audit = audit
        self._layers: list[FileStorage] = []
        self._claimed: list[ResolvedLayer] = []
        self._done = 0
        with self._audited():
            self._choose_layers(whole_chain)
            top = chain.layers[0].header
            if size is not None and top is not None:
                self._check_size(size, top, shrink=shrink)

    def _choose_layers(self, whole_chain: ChainRules | None) -> None:
        if self._chain.read_only:
            raise OperationError(f"{printable(self._name)} is read-only")
        layers = self._chain.layers
        for layer in layers if whole_chain else layers[:1]:
            if layer.header is None:
                if whole_chain is None:
                    raise OperationError("Format driver 'raw' does not support option amendment")
                continue
            if is_amended(layer.header, self._options):
                continue
            if whole_chain is not None:
                self._check_owner(layer, whole_chain)
            check_options(layer.storage, layer.header, self._options)
            self._layers.append(layer.storage)

    def _check_owner(self, layer: ResolvedLayer, rules: ChainRules) -> None:
        path = printable(layer.path, 1024)
        if rules.is_template(layer.path):
            raise OperationError(f"{path} is a template, which other disks are made from; amend a copy of it")
        others = find_overlays(layer.path, rules.directories, known=[known.path for known in self._chain.layers])
        if others:
            raise OperationError(
                f"{path} is shared: {printable(others[0], 1024)} is an overlay of it, too; amend each disk by itself"
            )

    def _check_size(self, size: int, top: Header, *, shrink: bool) -> None:
        present = top.guest_size
        if size != present and top.snapshot_count and (self._options.version or top.version) < 3:
            raise OperationError("Can't resize a v2 image which has snapshots")
        if size % 512 or size < 0:
            raise OperationError(f"the new size, {size}, is not a multiple of 512")
        if size < present and not shrink:
            raise OperationError(
                f"{size} bytes are less than the {present} that {printable(self._name)} has; what lies behind would be"
                " lost. Use the --shrink option to perform a shrink operation."
            )

    def run(self, control: Control) -> None:
        """Amend the layers below the top, base first; the disk is served meanwhile.

        Raises:
            Cancelled: ``control`` said so.
            ImageError, OperationError, OSError: it failed.
        """
        with self._audited():
            lower = [layer for layer in self._chain.layers[1:] if layer.storage in self._layers]
            for layer in lower:  # all of them before any is changed
                self._chain.claims.begin_writing(layer)
                self._claimed.append(layer)
            control.expect(len(lower))  # a unit for each; tables that have to be rewritten count by bytes
            for layer in reversed(lower):
                assert layer.header is not None
                try:
                    amend_image(layer.storage, layer.header, self._options, control)
                finally:
                    self._chain.refresh(self._chain.index_of(layer.path))
                self._tell(layer)
                control.advance(1, cost=0)

    def pivot(self) -> None:
        """Amend the top; the caller has drained the disk.

        Raises:
            ImageError, OperationError, OSError: it failed; the disk is in order.
        """
        with self._audited():
            top = self._chain.layers[0]
            if top.storage in self._layers:
                if self._options.version == 2 and self._size is not None:  # downgrade last, as QEMU does
                    self._amend_top(replace(self._options, version=None))
                    self._resize()
                self._amend_top(self._options)
                self._tell(top)
            self._resize()
        self._audit(logging.INFO, succeeded(self._name))

    def _amend_top(self, options: AmendOptions) -> None:
        device = self._chain.device
        assert isinstance(device, OverlayDisk)
        seal(device, on_event=self._chain.on_event)
        try:
            amend_image(device.top.storage, device.top.header, options, Control())
        finally:
            self._chain.reopen_top()

    def _resize(self) -> None:
        device = self._chain.device
        if self._size is None or self._size == device.size:
            return
        assert isinstance(device, OverlayDisk)
        if self._size > device.size:
            device.grow(self._size)
        else:
            device.shrink(self._size)

    @contextmanager
    def _audited(self) -> Iterator[None]:
        """Says why amending the disk failed, if it does."""
        try:
            yield
        except (Cancelled, NbdqError, OSError) as error:
            self._audit(logging.WARNING, failed(self._name, error))
            raise

    def _tell(self, layer: ResolvedLayer) -> None:
        self._done += 1
        self._on_layer(layer.path, self._done, len(self._layers))

    def revert(self) -> None:
        """What was amended stays: the disk reads the same."""

    def finish(self) -> None:
        """Let others read the layers again."""
        claimed, self._claimed = self._claimed, []
        for layer in claimed:
            self._chain.claims.end_writing(layer)

    def abort(self) -> None:
        """As :meth:`finish`: every layer is whole, amended or not."""
        self.finish()


def succeeded(name: str) -> str:
    """What is said of a disk that has been amended."""
    return f"{printable(name, 1024)} has been amended successfully."


def failed(name: str, error: Cancelled | NbdqError | OSError) -> str:
    """What is said of one that has not."""
    why = str(error)
    if isinstance(error, Cancelled):
        why = "it was cancelled"
    elif isinstance(error, OSError):
        why = error.strerror or why
    return f"Failed to amend {printable(name, 1024)}: {why}"

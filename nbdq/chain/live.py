"""A chain whose layers can be exchanged while its disk is in use: what snapshots, commits and rebases are made of.

Two things make that simple. While requests run, nothing that they see changes: a layer below the top may be *written*
to (:meth:`LiveChain.begin_writing`), but only where layers above hide it, and what that frees is not used again, so the
index of the running disk stays true. And the layers are *exchanged* (:meth:`LiveChain.rearrange`) only while no request
runs: the caller has drained the disk. Must not know event loops or clients.

Every file is opened once: a layer that is to be written to keeps its ``FileStorage`` (:mod:`nbdq.chain.claims`).
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace

from nbdq.block import BlockDevice
from nbdq.chain.bitmaps import carry_over_bitmaps
from nbdq.chain.claims import Claims, storages_of
from nbdq.chain.clusters import ClusterCache
from nbdq.chain.disk import INDEX_BUDGET, ChainDisk
from nbdq.chain.index import Layer
from nbdq.chain.open import check_top, read_only_layer, writable_disk
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.policy import Gate, Policy
from nbdq.chain.raw_disk import RawDisk
from nbdq.chain.resolve import ResolvedLayer, resolve_chain
from nbdq.chain.sealing import or_never_written, seal
from nbdq.errors import ImageError, NotFound, OperationError, printable
from nbdq.qcow2.header_area import set_backing
from nbdq.storage import FileStorage, identity_of

#: A disk that can be written to.
WritableDisk = RawDisk | OverlayDisk


class LiveChain:
    """One disk, open: its layers, and the device over them. Owns both until :meth:`close`.

    The device is safe to use from any thread; the methods here are for one thread at a time.
    """

    def __init__(
        self,
        layers: list[ResolvedLayer],
        *,
        policy: Policy,
        clusters: ClusterCache,
        read_only: bool,
        index_budget: int,
        punch: bool,
        write_threshold: int | None,
        on_event: Callable[[str], None],
    ) -> None:
        """For :meth:`open`, which see."""
        self._layers = layers
        self.policy = policy
        self.clusters = clusters
        self.gate = Gate(layers[0].path, policy)
        """Where files of this disk may lie."""
        self.read_only = read_only
        self.write_threshold = write_threshold
        self.on_event = on_event
        self.on_threshold: Callable[[int, int], None] = lambda threshold, excess: None
        """Told of the write threshold and by how much it was exceeded; from any thread, with locks held."""
        self._index_budget = index_budget
        self._punch = punch
        self._names: dict[FileStorage, str] = {}
        self.claims = Claims(policy.locking)
        """The locks on its files."""
        self._lower: dict[FileStorage, LowerLayer] = {}
        #: Readers of layers as they are in their files: kept, so that the cache knows their clusters again.
        self._readers: dict[FileStorage, Layer] = {}
        self.device: OverlayDisk | RawDisk | ChainDisk
        """What exports show; another object after :meth:`rearrange` has put another top in front."""

    @classmethod
    def open(
        cls,
        path: str,
        *,
        format: str,
        policy: Policy,
        clusters: ClusterCache,
        backing: Sequence[tuple[str, str]] | None = None,
        read_only: bool = False,
        snapshot: str | None = None,
        index_budget: int = INDEX_BUDGET,
        punch: bool = True,
        write_threshold: int | None = None,
        on_event: Callable[[str], None] = lambda text: None,
    ) -> "LiveChain":
        """Open the chain whose top image is ``path``; the arguments are those of :func:`nbdq.chain.open.open_writable`.

        Args:
            snapshot: id or name of an internal snapshot to show; only with ``read_only``.

        Raises:
            ImageError: a layer cannot be served, or the top cannot be written to; the message names it and the remedy.
            OSError: the top cannot be read or written.
        """
        layers = resolve_chain(path, format=format, policy=policy, backing=backing, writable=not read_only)
        chain = cls(
            layers,
            policy=policy,
            clusters=clusters,
            read_only=read_only,
            index_budget=index_budget,
            punch=punch,
            write_threshold=write_threshold,
            on_event=on_event,
        )
        try:
            if read_only:
                if policy.force_share:
                    chain.claims.tolerate(layers)
                top = read_only_layer(layers[0], snapshot)
                chain.device = chain._disk([top, *map(chain._reader, layers[1:])])
            else:
                chain.claims.opened_for_writing(layers[0])
                layers[0] = check_top(layers, policy)
                chain.device = chain._open_disk(layers[0], layers[1:])
                chain._watch_threshold()
        except BaseException:
            chain._close_files(layers)
            raise
        return chain

    # What there is.

    @property
    def layers(self) -> list[ResolvedLayer]:
        """All layers, top first, with their present headers."""
        device = self.device
        if isinstance(device, OverlayDisk):
            self._layers[0] = replace(self._layers[0], header=device.top.header)
        return list(self._layers)

    @property
    def path(self) -> str:
        """The path of the top."""
        return self._layers[0].path

    def name_layer(self, index: int, name: str) -> None:
        """Give a layer a name by which :meth:`index_of` finds it, as QEMU's node names do.

        Raises:
            OperationError: another layer has it.
        """
        self.check_name(name)
        self._names[self._layers[index].storage] = name

    def check_name(self, name: str) -> None:
        """Refuse a node name that a layer has already.

        Raises:
            OperationError: another layer has it.
        """
        if name in self._names.values():
            raise OperationError(f'a layer is named "{printable(name)}" already; choose another name')

    def node_name(self, index: int) -> str | None:
        """The name that a layer was given."""
        return self._names.get(self._layers[index].storage)

    def index_of(self, name: str) -> int:
        """The layer of that node name or path: the path as opened, or another one that leads to the same file.

        Raises:
            NotFound: there is none.
        """
        for index, layer in enumerate(self._layers):
            if name in (layer.path, self._names.get(layer.storage)):
                return index
        with suppress(OSError, ValueError):
            identity = identity_of(name)
            for index, layer in enumerate(self._layers):
                if layer.storage.identity == identity:
                    return index
        raise NotFound(f'"{printable(name, 1024)}" is no layer of {printable(self.path, 1024)}; see nbdq ctl info')

    def slice(self, first: int, last: int) -> ChainDisk:
        """Layers ``first`` to ``last`` as a disk of its own, as they are in their files. Never to be closed."""
        assert first or self.read_only, "the top is not as it is in its file"
        return self._disk([self._reader(layer) for layer in self._layers[first : last + 1]])

    def _disk(self, layers: Sequence[Layer]) -> ChainDisk:
        return ChainDisk(layers, clusters=self.clusters, index_budget=self._index_budget)

    def _reader(self, layer: ResolvedLayer) -> Layer:
        reader = self._readers.get(layer.storage)
        if reader is None:
            reader = self._readers[layer.storage] = read_only_layer(layer)
        return reader

    # Opening and sealing.

    def resolve(self, path: str, *, format: str, alone: bool = False) -> list[ResolvedLayer]:
        """Open another chain by the rules of this one, as its readers, to become part of it.

        With ``alone`` only its first layer: the one that will come in front of this chain. What is not given to
        :meth:`rearrange` the caller gives to :meth:`drop`.

        Raises:
            ImageError: as :func:`nbdq.chain.resolve.resolve_chain`.
        """
        return resolve_chain(path, format=format, policy=self.policy, backing=[] if alone else None)

    def _open_disk(self, layer: ResolvedLayer, below: Sequence[ResolvedLayer]) -> WritableDisk:
        """``layer`` over ``below``, for writing; it is claimed already. Its header is read: nobody may have told us."""
        layer = layer.as_in_file()
        lower = self._disk(list(map(self._reader, below))) if below else None
        return writable_disk(layer, lower, clusters=self.clusters, punch=self._punch, on_event=self.on_event)

    def _become_reader(self, layer: ResolvedLayer) -> None:
        """Let others read a layer that we do not write to any more, and read it anew ourselves."""
        self.claims.end_writing(layer)
        self._readers.pop(layer.storage, None)

    # Writing to a layer below the top.

    def begin_writing(self, index: int) -> "LowerLayer":
        """Open a layer below the top for writing, beside the running disk. :meth:`LowerLayer.release` ends it.

        The caller changes only what layers above hide, or what reads the same afterwards.

        Raises:
            ImageError: it is in use by somebody else, or must not be written to; nothing has changed.
            OSError: it cannot be read or written.
        """
        layer = self._layers[index]
        assert index, "the top is written to already"
        assert layer.storage not in self._lower, "it is written to already"
        self.claims.begin_writing(layer)
        try:
            disk = self._open_disk(layer, self._layers[index + 1 :])
        except BaseException:
            self._become_reader(layer)
            raise
        lower = self._lower[layer.storage] = LowerLayer(self, layer, disk)
        return lower

    def end_writing(self, lower: "LowerLayer") -> None:
        """For :class:`LowerLayer`: nobody writes to it any more."""
        self._note_changes(lower)
        del self._lower[lower.layer.storage]
        if self.device is not lower.disk:
            self._become_reader(lower.layer)

    def _note_changes(self, lower: "LowerLayer") -> None:
        """What is opened from now on sees the layer as it is in its file now."""
        layer = lower.layer
        if isinstance(lower.disk, OverlayDisk):
            layer = replace(layer, header=lower.disk.top.header)
        lower.layer = layer
        self._layers = [layer if known.storage is layer.storage else known for known in self._layers]
        self._readers.pop(layer.storage, None)

    # Exchanging layers. The disk is drained.

    def rearrange(self, layers: Sequence[ResolvedLayer], *, top: WritableDisk | None = None) -> list[ResolvedLayer]:
        """Let the disk consist of ``layers`` from now on. No request may be in progress.

        A top that stays goes on as it is. One that does not is sealed: all its changes are durable on return, and
        others may read it; then the new one is opened for writing, unless ``top`` is its disk, open already by
        :meth:`begin_writing`. Nothing in the files is told of the exchange; that is the caller's part.

        Layers that are being written to (:meth:`begin_writing`) are seen with everything that was written so far; so
        what they freed can be used again when they are released.

        Returns:
            The layers that are no longer part of the disk, still open: for :meth:`drop`, or to come back.

        Raises:
            ImageError, OSError: the new top cannot be written to, or the old one not be saved; the disk is as it was.
        """
        for lower in self._lower.values():
            lower.flush()
            self._note_changes(lower)
        old = self.layers
        kept = {layer.storage for layer in layers}
        written = {storage: lower.layer for storage, lower in self._lower.items()}
        new = [written.get(layer.storage, layer) for layer in layers]
        if new[0].storage is old[0].storage:
            self._put_under(self.device, new[1:])
        else:
            new = self._exchange_top(old, new, top)
        self._layers = new
        return [layer for layer in old if layer.storage not in kept]

    def _exchange_top(
        self, old: list[ResolvedLayer], new: list[ResolvedLayer], top: WritableDisk | None
    ) -> list[ResolvedLayer]:
        with ExitStack() as undo:
            if top is None:
                self.claims.begin_writing(new[0])
                undo.callback(self._become_reader, new[0])
            old[0] = self._seal(old[0])
            undo.callback(self.reopen_top)
            self._layers = old
            new = [old[0] if layer.storage is old[0].storage else layer for layer in new]
            device = top or self._open_disk(new[0], new[1:])
            undo.pop_all()
        if old[0].storage not in self._lower:  # else it is given back with its LowerLayer
            self._become_reader(old[0])
        self.device = device
        self._watch_threshold()
        return new

    def _put_under(self, device: BlockDevice, below: Sequence[ResolvedLayer]) -> None:
        if isinstance(device, OverlayDisk):
            device.replace_below(self._disk(list(map(self._reader, below))) if below else None)

    def _seal(self, top: ResolvedLayer) -> ResolvedLayer:
        """Make everything that the top holds durable; as it is in the file now. It is not to be written to any more."""
        assert not isinstance(self.device, ChainDisk)
        seal(self.device, on_event=self.on_event)
        self._readers.pop(top.storage, None)
        return replace(top, header=self.device.top.header) if isinstance(self.device, OverlayDisk) else top

    def reopen_top(self) -> None:
        """Read the top anew, after something changed its file behind the engine's back. No request may be in progress.

        Raises:
            ImageError, OSError: it cannot be opened; the disk is as it was, but can no longer be written to.
        """
        layer, before = self._layers[0], self.device
        with or_never_written(layer.storage, "it was changed, and could not be opened anew"):
            self.device = self._open_disk(layer, self._layers[1:])
            carry_over_bitmaps(before, self.device)
        self._watch_threshold()

    def refresh(self, index: int) -> None:
        """Take note that the header of a layer below the top was changed in its file; what it maps is the same."""
        self._layers[index] = layer = self._layers[index].as_in_file()
        self._readers.pop(layer.storage, None)

    def drop(self, layers: Sequence[ResolvedLayer]) -> None:
        """Close layers that are not part of the disk any more, and let go of their locks."""
        for layer in layers:
            assert all(layer.storage is not known.storage for known in self._layers)
            self._names.pop(layer.storage, None)
            self._readers.pop(layer.storage, None)
            self.claims.forget(layer)
        self._close_files(layers)

    def set_backing(self, index: int, name: str | None, format: str | None) -> None:
        """Record in a layer what it is backed by, durably; after a crash it says the old thing or the new one (R-55).

        The running disk does not change. Requests may be in progress.

        Raises:
            ImageError: it is raw or in use by somebody else, or there is no room for the name.
            OSError: it cannot be written.
        """
        layer = self.layers[index]
        if layer.header is None:
            raise ImageError(layer.path, "is raw, and cannot record a backing file")
        if index == 0:
            assert isinstance(self.device, OverlayDisk)
            image = self.device.top
            image.rewrite_header(lambda storage, header: set_backing(storage, header, name=name, format=format))
            return
        self.claims.begin_writing(layer)
        try:
            set_backing(layer.storage, layer.header, name=name, format=format)
        finally:
            self._become_reader(layer)
        self.refresh(index)

    # Settings and the end.

    def set_write_threshold(self, threshold: int | None) -> None:
        """Have :attr:`on_threshold` told, once, when the top's file grows past this host offset; None: not at all.

        A new top that comes in front first is watched instead.
        """
        self.write_threshold = threshold
        self._watch_threshold()

    def _watch_threshold(self) -> None:
        if isinstance(self.device, OverlayDisk):
            self.device.top.allocator.watch(self.write_threshold, self._passed_threshold)

    def _passed_threshold(self, end: int) -> None:
        threshold, self.write_threshold = self.write_threshold, None
        if threshold is not None:
            self.on_event(f"{self.path}: allocation has passed the write threshold: {end}")
            self.on_threshold(threshold, end - threshold)

    def close(self) -> None:
        """Make everything durable, and close every file. No request may be in progress.

        Raises:
            OSError: what was written last may be lost. Everything is closed nevertheless.
        """
        try:
            if not isinstance(self.device, ChainDisk):
                self.device.finish()
        finally:
            self._close_files(self._layers)

    def _close_files(self, layers: Sequence[ResolvedLayer]) -> None:
        for layer in layers:
            for storage in storages_of(layer):
                storage.close()


class LowerLayer:
    """A layer below the top that is being written to, while the disk above it is in use."""

    def __init__(self, chain: LiveChain, layer: ResolvedLayer, disk: WritableDisk) -> None:
        """For :meth:`LiveChain.begin_writing`."""
        self.layer = layer
        self.disk = disk
        """What is written to: the layer over everything below it. The chain's, not to be closed."""
        self._chain = chain
        self._held = ExitStack()
        self._released = False
        if isinstance(disk, OverlayDisk):
            self._held.enter_context(disk.top.hold())  # the index of the running disk may name what is freed here

    def flush(self) -> None:
        """Make durable what was written.

        Raises:
            OSError: as the flush of a disk.
        """
        self.disk.flush()

    def release(self) -> None:
        """Make everything durable, and go back to reading, unless the disk is the chain's device by now. Idempotent.

        What was freed may be used again: the caller has exchanged layers since (:meth:`LiveChain.rearrange`, also to
        the same ones), so that the running disk does not know of it.

        Raises:
            OSError: what was written last may not be durable.
        """
        if self._released:
            return
        self._released = True
        self._held.close()
        try:
            if self._chain.device is not self.disk:
                self.disk.finish()
        finally:
            self._chain.end_writing(self)

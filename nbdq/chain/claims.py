"""The locks that a chain holds on its files, and how a layer changes between being read and being written to.

An open file keeps its ``FileStorage``: descriptor and lock change beneath it, so that those who read go on undisturbed.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack

from nbdq.chain.policy import check_writable
from nbdq.chain.resolve import ResolvedLayer, explain
from nbdq.errors import ChainError
from nbdq.locks import (
    DATA_FILE_WRITER,
    RAW_WRITER,
    READER,
    TOLERANT_READER,
    WRITER,
    Claim,
    Locking,
    change_claim,
    share_claim,
)
from nbdq.storage import FileStorage


class Claims:
    """What we claim on the files of one chain. Whoever is not known here is a :data:`~nbdq.locks.READER`."""

    def __init__(self, locking: Locking) -> None:
        self._locking = locking
        self._claims: dict[FileStorage, Claim] = {}

    def tolerate(self, layers: Iterable[ResolvedLayer]) -> None:
        """Note that these were opened with ``force_share``."""
        self._claims.update((storage, TOLERANT_READER) for layer in layers for storage in storages_of(layer))

    def opened_for_writing(self, layer: ResolvedLayer) -> None:
        """Note that this layer was opened and claimed for writing."""
        self._claims.update(_writers(layer))

    def begin_writing(self, layer: ResolvedLayer) -> None:
        """Make a layer that is only read ours alone, and its files writable; nothing to do if they are.

        Raises:
            ImageLocked: somebody else reads it. We read it still.
            ChainError: it cannot be opened for writing. We read it still.
        """
        with ExitStack() as undo:
            for storage, claim in _writers(layer).items():
                old = self._claims.get(storage, READER)
                if old == claim:
                    continue
                self._change(storage, claim)
                undo.callback(self._change, storage, old)
                try:
                    storage.become_writable(self._lock_too(claim))
                    check_writable(storage)
                except OSError as error:
                    raise ChainError(storage.path, *explain(error, writable=True)) from error
            undo.pop_all()

    def end_writing(self, layer: ResolvedLayer) -> None:
        """Let others read a layer that we do not write to any more."""
        for storage in storages_of(layer):
            self._change(storage, READER)

    def forget(self, layer: ResolvedLayer) -> None:
        """The files of this layer are about to be closed, which ends every claim."""
        for storage in storages_of(layer):
            self._claims.pop(storage, None)

    def _change(self, storage: FileStorage, claim: Claim) -> None:
        change_claim(storage.descriptor, storage.path, self._claims.get(storage, READER), claim, self._locking)
        self._claims[storage] = claim

    def _lock_too(self, claim: Claim) -> Callable[[int], None]:
        def lock(descriptor: int) -> None:
            if self._locking is not Locking.OFF:
                share_claim(descriptor, claim)

        return lock


def storages_of(layer: ResolvedLayer) -> list[FileStorage]:
    """The files of a layer."""
    return [layer.storage] if layer.data_storage is None else [layer.storage, layer.data_storage]


def _writers(layer: ResolvedLayer) -> dict[FileStorage, Claim]:
    """The claims of somebody who writes to a layer."""
    claims = {layer.storage: RAW_WRITER if layer.header is None else WRITER}
    if layer.data_storage is not None:
        claims[layer.data_storage] = DATA_FILE_WRITER
    return claims

"""The engine with one barrier removed, once for each: the exploration must find every one of them out.

A mutant patches the class that keeps the barrier. Barriers that are nothing but a sync are removed at the storage, for
the time that a method of the engine runs, so that they stay removed however that method is written.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from nbdq.qcow2.bitmaps.tracking import DirtyBitmaps
from nbdq.qcow2.writing.allocator import Allocator, Run
from nbdq.qcow2.writing.epochs import Epochs
from nbdq.qcow2.writing.mapping import Mapping
from nbdq.qcow2.writing.refcounts import Refcounts
from nbdq.qcow2.writing.tables import Taken
from nbdq.qcow2.writing.writable import WritableImage
from nbdq.storage import FileStorage


@dataclass(frozen=True)
class Mutant:
    """One barrier less."""

    barrier: str
    """What is not kept, with the rule that demands it."""
    installed: Callable[[], AbstractContextManager[Any]]
    workload: str
    """Whose states show it."""


class _Syncs:
    """Which syncs of a method take place."""

    def __init__(
        self, method: str, owner: type = WritableImage, *, keep_first: bool = False, keep_last: bool = False
    ) -> None:
        self._owner, self._method = owner, method
        self._keep_first, self._keep_last = keep_first, keep_last
        self._depth = 0
        self._waiting: list[FileStorage] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Patch the method and the storage."""
        original_method = getattr(self._owner, self._method)
        original_sync, original_write = FileStorage.sync, FileStorage.write

        def method(owner: Any, *arguments: Any) -> Any:
            self._depth += 1
            try:
                return original_method(owner, *arguments)
            finally:
                self._depth -= 1
                if self._keep_last:
                    for storage in self._waiting:
                        original_sync(storage)
                self._waiting.clear()

        def sync(storage: FileStorage) -> None:
            if self._depth:
                self._waiting.append(storage)
            else:
                original_sync(storage)

        def write(storage: FileStorage, *arguments: Any) -> None:
            if self._depth and self._waiting:  # the syncs that wait were not the last ones
                if self._keep_first:
                    for waiting in self._waiting:
                        original_sync(waiting)
                self._waiting.clear()
            original_write(storage, *arguments)

        with (
            patch.object(self._owner, self._method, method),
            patch.object(FileStorage, "sync", sync),
            patch.object(FileStorage, "write", write),
        ):
            yield


def _patched(owner: type, name: str, make: Callable[[Any], Any]) -> Callable[[], AbstractContextManager[Any]]:
    """``make`` gets the original method and returns the one that takes its place."""
    return lambda: patch.object(owner, name, make(getattr(owner, name)))


def _reuse_at_once(original: Any) -> Any:
    def free(allocator: Allocator, first: int, count: int = 1) -> None:
        for cluster in range(first, first + count):
            if allocator._refcounts.get(cluster) == 1:
                allocator._free.append(Run(cluster, 1))
            else:
                original(allocator, cluster)

    return free


def _lower_at_once(_original: Any) -> Any:
    def free(allocator: Allocator, first: int, count: int = 1) -> None:
        allocator._refcounts.lower(first, count)

    return free


def _punch_at_once(original: Any) -> Any:
    def free(allocator: Allocator, first: int, count: int = 1) -> None:
        original(allocator, first, count)
        for cluster in range(first, first + count):
            lost = sum(run.first <= cluster < run.first + run.clusters for run in allocator._freed)
            if allocator._refcounts.get(cluster) == lost:
                allocator._storage.punch(cluster * allocator._cluster_size, allocator._cluster_size)

    return free


def _new_tables_with_their_names(original: Any) -> Any:
    def take(mapping: Mapping) -> tuple[list[Taken], list[Taken]]:
        new, old = original(mapping)
        return [], [*new, *old]

    return take


def _block_entries_with_the_blocks(original: Any) -> Any:
    def take(refcounts: Refcounts) -> tuple[list[Taken], Taken | None]:
        blocks, table = original(refcounts)
        return ([*blocks, table], None) if table is not None else (blocks, None)

    return take


def _count_later(original: Any) -> Any:
    def raise_counts(refcounts: Refcounts, clusters: Any) -> None:
        dirty = set(refcounts._dirty)
        original(refcounts, clusters)
        refcounts._dirty &= dirty  # written when something else in the block has changed, too

    return raise_counts


def _forget_that_data_was_published(original: Any) -> Any:
    def flush(image: WritableImage, *arguments: Any) -> None:
        image.published = False
        original(image, *arguments)

    return flush


def _forget_who_is_under_way(_original: Any) -> Any:
    def oldest_active(_epochs: Epochs) -> int:
        return 1 << 63

    return oldest_active


MUTANTS: dict[str, Mutant] = {
    "no sync before entries": Mutant(
        "raised refcounts, new tables and data are durable before an entry names them (R-51, R-52, W1)",
        _Syncs("_flush", keep_last=True).installed,
        "small requests",
    ),
    "no last sync": Mutant(
        "a flush is answered when its entries are durable (W7)",
        _Syncs("_flush", keep_first=True).installed,
        "small requests",
    ),
    "copied data not synced": Mutant(
        "copied data is durable before the entry that shows it (R-52, W3)",
        _patched(WritableImage, "_flush", _forget_that_data_was_published),
        "extended L2 over a base",
    ),
    "shared clusters counted later": Mutant(
        "a compressed cluster in a host cluster with others is counted before an entry names it (R-51, W1)",
        _patched(Refcounts, "raise_counts", _count_later),
        "storing compressed clusters",
    ),
    "reuse at once": Mutant(
        "a freed cluster is not used again before its entry is durably gone (R-50, W2)",
        _patched(Allocator, "free", _reuse_at_once),
        "trimming",
    ),
    "lower at once": Mutant(
        "a refcount is lowered after the reference is durably gone (R-53, W2)",
        _patched(Allocator, "free", _lower_at_once),
        "trimming",
    ),
    "punch at once": Mutant(
        "a freed cluster is punched after the reference is durably gone (W2)",
        _patched(Allocator, "free", _punch_at_once),
        "compressed clusters overwritten",
    ),
    "L1 with new L2": Mutant(
        "a new L2 table is durable before the L1 entry that names it (R-52)",
        _patched(Mapping, "take", _new_tables_with_their_names),
        "many tables shared with a snapshot",
    ),
    "table with new blocks": Mutant(
        "a new refcount block is durable before the refcount table names it (R-54)",
        _patched(Refcounts, "take", _block_entries_with_the_blocks),
        "a growing refcount table",
    ),
    "header before table": Mutant(
        "a longer refcount table is durable before the header names it (R-54, W4)",
        _Syncs("grow_refcount_table", keep_last=True).installed,
        "a growing refcount table",
    ),
    "bitmaps not declared in use": Mutant(
        "bitmaps are durably in use before the guest writes (R-57)",
        _Syncs("begin_writing", DirtyBitmaps).installed,
        "with a bitmap",
    ),
    "bitmaps stored in any order": Mutant(
        "the bits are durable before the directory names them, and vouches for them (R-52, R-57)",
        _Syncs("store", DirtyBitmaps, keep_last=True).installed,
        "with a bitmap",
    ),
    "forgotten requests": Mutant(
        "a freed cluster is not used again before the requests end that may have looked it up (R-50)",
        _patched(Epochs, "oldest_active", _forget_who_is_under_way),
        "several at once, overlapping",
    ),
}

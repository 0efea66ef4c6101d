"""Which host clusters are free, and when a freed one may be used again.

A cluster that lost its last reference goes through three stations (R-50): *freed*, until the flush that makes the loss
durable has ended; *quarantine*, until no request that may have looked it up before is under way any more; then its
refcount is lowered, and it is free. QEMU reuses it at once, and after a crash shows one guest cluster the data of
another. Everything belongs under the lock of the image.
"""

import errno
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nbdq.qcow2.writing.protection import ProtectedClusters
from nbdq.qcow2.writing.refcounts import BrokenRefcounts, Refcounts
from nbdq.storage import FileStorage

#: Host offsets have 56 bits.
_MAX_HOST_END = 1 << 56


class TableFull(Exception):
    """The refcount table has to grow before anything can be allocated. Never leaves the engine."""


class Run(NamedTuple):
    """Neighbouring host clusters."""

    first: int
    clusters: int
    is_fresh: bool = False
    """They were never written, and read as zeros."""


class _Batch(NamedTuple):
    """Clusters that one flush has found durably unreferenced."""

    epoch: int
    """Requests that began later cannot know them."""
    runs: list[Run]


class Allocator:
    """The free clusters of one image that is open for writing."""

    def __init__(self, storage: FileStorage, cluster_size: int, refcounts: Refcounts, protected: ProtectedClusters):
        self._storage = storage
        self._cluster_size = cluster_size
        self._refcounts = refcounts
        self._protected = protected
        size = storage.size()
        #: A device has an end, and nobody knows what is on it.
        self._end = size // cluster_size if storage.is_block_device else _MAX_HOST_END // cluster_size
        self._fresh_from = self._end if storage.is_block_device else -(-size // cluster_size)
        self._free: list[Run] = []  # to be used from the end
        self._next_block = 0  # blocks before this one were searched; what became free in them since is in _free
        self._freed: list[Run] = []
        self._freed_count = 0
        self._quarantine: list[_Batch] = []
        self._threshold: int | None = None
        self._on_threshold: Callable[[int], None] = lambda end: None

    def watch(self, threshold: int | None, on_passed: Callable[[int], None]) -> None:
        """Call ``on_passed``, once, with the end of the first allocation that passes the host offset ``threshold``."""
        self._threshold, self._on_threshold = threshold, on_passed

    @property
    def freed_bytes(self) -> int:
        """Bytes that wait for a flush."""
        return self._freed_count * self._cluster_size

    @property
    def waiting(self) -> int:
        """Clusters that were freed, and still have a reference until nobody can touch them any more."""
        return sum(run.clusters for run in self._waiting_runs())

    def _waiting_runs(self) -> list[Run]:
        return [*self._freed, *(run for batch in self._quarantine for run in batch.runs)]

    def waiting_of(self, clusters: NDArray[np.uint64]) -> NDArray[np.int64]:
        """How many references to each of ``clusters`` wait for their end."""
        runs = self._waiting_runs()
        starts = np.sort(np.array([run.first for run in runs], dtype=np.uint64))
        ends = np.sort(np.array([run.first + run.clusters for run in runs], dtype=np.uint64))
        return np.searchsorted(starts, clusters, "right") - np.searchsorted(ends, clusters, "right")

    def allocate(self, count: int) -> Run:
        """Take at least one and at most ``count`` neighbouring clusters; their refcount is 1 from now on.

        Raises:
            TableFull: grow the refcount table, then try again.
            BrokenRefcounts: what should be free is metadata.
            OSError: ENOSPC at the end of a device, EFBIG at the end of the format; or a refcount block cannot be read.
        """
        while not self._free:
            self._search()
        first, available, _ = self._free[-1]
        run = self._take(first, min(count, available))
        if run.clusters == available:
            self._free.pop()
        else:
            self._free[-1] = Run(first + run.clusters, available - run.clusters)
        return run

    def allocate_at_once(self, count: int) -> Run | None:
        """Take ``count`` neighbouring clusters if they are at hand; None if anything would have to be looked for.

        Raises:
            BrokenRefcounts: as :meth:`allocate`.
        """
        return self.allocate(count) if self._free and self._free[-1].clusters >= count else None

    def allocate_neighbours(self, count: int) -> Run:
        """Take exactly ``count`` neighbouring clusters.

        Raises:
            TableFull, BrokenRefcounts, OSError: as :meth:`allocate`.
        """
        while True:
            for position in reversed(range(len(self._free))):
                first, available, _ = self._free[position]
                if available >= count:
                    self._free[position] = Run(first + count, available - count)
                    if available == count:
                        del self._free[position]
                    return self._take_all(first, count)
            self._search(neighbours=count)
            self._join_free()

    def _join_free(self) -> None:
        """Runs that touch become one, across blocks."""
        joined: list[Run] = []
        for run in sorted(self._free):
            if joined and joined[-1].first + joined[-1].clusters == run.first:
                joined[-1] = Run(joined[-1].first, joined[-1].clusters + run.clusters)
            else:
                joined.append(run)
        self._free = joined[::-1]

    def _take_all(self, first: int, count: int) -> Run:
        """As :meth:`_take`, across blocks."""
        is_fresh = True
        position = first
        while position < first + count:
            block_clusters = self._refcounts.block_clusters
            part = min(first + count - position, block_clusters - position % block_clusters)
            is_fresh &= self._take(position, part).is_fresh
            position += part
        return Run(first, count, is_fresh)

    def _take(self, first: int, count: int) -> Run:
        if first == 0 or self._protected.overlaps(first, count):
            raise BrokenRefcounts(f"cluster {first} has refcount 0, but holds metadata")
        self._refcounts.set_used(first, count)
        is_fresh = first >= self._fresh_from
        end = first + count
        if end > self._fresh_from:
            self._fresh_from = end
        if self._threshold is not None and end * self._cluster_size > self._threshold:
            self._threshold = None
            self._on_threshold(end * self._cluster_size)
        return Run(first, count, is_fresh)

    def _search(self, neighbours: int = 1) -> None:
        """Look into the next block for free clusters; make it if it is missing, when all its clusters are free.

        For more ``neighbours`` than fit between two blocks several blocks are made in one place.
        """
        refcounts = self._refcounts
        number = self._next_block
        first = number * refcounts.block_clusters
        if first >= self._end:
            raise OSError(errno.ENOSPC, "no cluster is left", self._storage.path)
        if first >= refcounts.covered_clusters:
            raise TableFull
        if not refcounts.has_block(number):
            count = -(-neighbours // (refcounts.block_clusters - 1))
            if any(refcounts.has_block(number + ahead) for ahead in range(count)):
                count = 1
            if (number + count) * refcounts.block_clusters > refcounts.covered_clusters:
                raise TableFull
            refcounts.make_blocks(number, count)
            self._fresh_from = max(self._fresh_from, first + count)
        runs = [Run(start, min(count, self._end - start)) for start, count in refcounts.free_runs(number)]
        self._free[:0] = [run for run in reversed(runs) if run.clusters > 0]
        self._next_block += 1

    def search_again(self) -> None:
        """Clusters have become free that were searched already."""
        self._free.clear()
        self._next_block = 0

    def claim(self, first: int, count: int) -> None:
        """Clusters behind all that were searched are in use now, and counted (A4)."""
        self._fresh_from = max(self._fresh_from, first + count)

    def undo(self, run: Run) -> None:
        """Give back clusters that no table has named yet."""
        self._free += [Run(*part) for part in self._refcounts.lower(run.first, run.clusters)]

    def free(self, first: int, count: int = 1) -> None:
        """Note that a reference to each cluster is gone from the tables in memory."""
        self._freed_count += count
        if self._freed:
            last = self._freed[-1]
            if last.first + last.clusters == first:
                self._freed[-1] = Run(last.first, last.clusters + count)
                return
        self._freed.append(Run(first, count))

    def take_freed(self) -> list[Run]:
        """What was freed until now; the caller makes that durable, then calls :meth:`retire` or :meth:`put_back`."""
        freed, self._freed, self._freed_count = self._freed, [], 0
        return freed

    def put_back(self, freed: list[Run]) -> None:
        """A flush failed: these are not durably unreferenced."""
        self._freed = freed + self._freed
        self._freed_count += sum(run.clusters for run in freed)

    def retire(self, freed: list[Run], epoch: int) -> None:
        """These are durably unreferenced; requests of ``epoch`` and before may still touch them."""
        if freed:
            self._quarantine.append(_Batch(epoch, freed))

    def release(self, oldest_active: int) -> list[Run]:
        """End the quarantine of what only requests before epoch ``oldest_active`` could know; the clusters that have
        become free, for whoever wants to punch them before anything else is allocated.

        What would change more refcount blocks than fit in memory stays in quarantine until after the next flush.

        Raises:
            BrokenRefcounts: one of them holds metadata, which a guest's entry or a bitmap had named.
            BrokenRefcounts, OSError: a refcount block cannot be read; what was left stays in quarantine.
        """
        released: list[Run] = []
        while self._quarantine and self._quarantine[0].epoch < oldest_active and not self._refcounts.is_crowded:
            runs = self._quarantine[0].runs
            while runs and not self._refcounts.is_crowded:
                first, count, _ = runs[-1]
                ended = [Run(*part) for part in self._refcounts.lower(first, count)]
                runs.pop()
                for run in ended:
                    if self._protected.overlaps(run.first, run.clusters):
                        raise BrokenRefcounts(f"cluster {run.first} or one behind it was given up, but holds metadata")
                released += ended
            if not runs:
                self._quarantine.pop(0)
        known = self._next_block * self._refcounts.block_clusters
        self._free += [run for run in released if run.first < known]
        return released

"""The L1 and L2 tables of an image that is open for writing: in memory, changed there, written by the flush.

Every table that is changed here is the image's own (COPIED, refcount 1): one that a snapshot shares is copied first
(A6). Everything but a look at ``tables`` belongs under the lock of the image.
"""

import errno
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from nbdq.qcow2.distinct import distinct
from nbdq.qcow2.entries import (
    ALL_SUBCLUSTERS,
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    READS_ZERO,
    SUBCLUSTERS,
    Geometry,
)
from nbdq.qcow2.writing.allocator import Allocator
from nbdq.qcow2.writing.protection import ProtectedClusters
from nbdq.qcow2.writing.refcounts import Refcounts
from nbdq.qcow2.writing.tables import Table, Taken
from nbdq.storage import FileStorage

#: Bytes of L2 tables kept in memory; 32 MiB map 256 GiB of disk in clusters of 64 KiB.
_L2_BUDGET = 32 << 20
_NOT_COPIED = np.uint64(~COPIED & (1 << 64) - 1)


class L2Table(Table):
    """One L2 table; entry ``i`` is word ``i``, or with extended L2 the words ``2 * i`` and ``2 * i + 1``."""

    __slots__ = ("forbidden", "is_own")

    is_own: bool
    """May be changed, and its COPIED flags are true: set only where the refcount is 1 and no metadata lies (R-28)."""
    forbidden: frozenset[int]
    """Entries that claim to own a cluster of metadata: who writes there has found a corrupt image (O2)."""


class Mapping:
    """The L1 table, and the L2 tables that are in memory."""

    def __init__(
        self,
        storage: FileStorage,
        geometry: Geometry,
        refcounts: Refcounts,
        allocator: Allocator,
        protected: ProtectedClusters,
        l1: Table,
    ) -> None:
        self._storage = storage
        self._geometry = geometry
        self._cluster_size = geometry.cluster_size
        #: Bits of a host offset that are zero, for clusters do not overlap.
        self._inside_mask = OFFSET_MASK & geometry.cluster_size - 1
        self.own_bits = OFFSET_MASK | COMPRESSED | READS_ZERO | (COPIED if geometry.has_data_file else 0)
        """Bits of a standard entry any of which says that the image decides what its cluster is (Q36, Q38)."""
        self._refcounts = refcounts
        self._allocator = allocator
        self._protected = protected
        self.l1 = l1
        self.tables: dict[int, L2Table] = {}
        """By L1 index. Who only looks may do so without the lock."""
        self._dirty: set[int] = set()
        self._flushing: set[int] = set()  # on their way to the file, which does not have them yet

    @property
    def dirty_bytes(self) -> int:
        """Memory of tables that wait for a flush."""
        return len(self._dirty) * self._cluster_size

    @property
    def needs_flush(self) -> bool:
        """Whether anything differs from the file."""
        return bool(self._dirty) or self.l1.needs_write

    def present(self, first: int, last: int) -> list[int]:
        """The L1 indexes in ``[first, last)`` that have an entry, ascending."""
        found: list[int] = (np.flatnonzero(self.l1.values[first:last]) + first).tolist()
        return found

    def by_tables(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(L1 index, first entry, count) of each L2 table's part of a guest range; clusters count whole."""
        geometry = self._geometry
        while start < end:
            l1_index = start // geometry.l2_coverage
            table_start = l1_index * geometry.l2_coverage
            stop = min(end, table_start + geometry.l2_coverage)
            first = start - table_start >> geometry.cluster_bits
            yield l1_index, first, (stop - table_start + self._cluster_size - 1 >> geometry.cluster_bits) - first
            start = stop

    def get(self, l1_index: int) -> L2Table | None:
        """The table that maps entry ``l1_index`` of the L1 table; None if nothing there was ever allocated.

        Raises:
            OSError: EIO if it lies nowhere, or cannot be read.
        """
        table = self.tables.get(l1_index)
        if table is None and l1_index < len(self.l1.words) and (entry := self.l1.words[l1_index]):
            table = self._load(l1_index, entry & OFFSET_MASK)
        return table

    def _load(self, l1_index: int, offset: int) -> L2Table | None:
        if offset == 0:  # only flags or reserved bits
            return None
        if offset % self._cluster_size or offset >= self._storage.size():
            raise OSError(errno.EIO, f"corrupt L1 entry {l1_index}: no L2 table at {offset:#x}", self._storage.path)
        data = self._storage.read(offset, self._cluster_size).ljust(self._cluster_size, b"\0")
        return self._keep(l1_index, L2Table.parse(offset, data))

    def _keep(self, l1_index: int, table: L2Table) -> L2Table:
        table.is_own = False
        table.forbidden = frozenset()
        if len(self.tables) * self._cluster_size >= _L2_BUDGET:
            for number in list(self.tables)[: len(self.tables) // 4]:  # those that were loaded first
                if number not in self._dirty and number not in self._flushing:
                    del self.tables[number]
        self.tables[l1_index] = table
        return table

    def own(self, l1_index: int) -> L2Table:
        """The same table, ready to be changed: made if there is none, copied if a snapshot shares it (A6).

        Raises:
            TableFull, BrokenRefcounts: as :meth:`Allocator.allocate`.
            OSError: ENOSPC if there is no room for it; EIO as :meth:`get`.
        """
        table = self.get(l1_index)
        if table is not None and table.is_own:
            return table
        if table is None:
            table = self._keep(l1_index, L2Table.empty(self._place(l1_index), self._cluster_size))
            self._dirty.add(l1_index)
        else:
            entry = self.l1.words[l1_index]
            old = table.offset // self._cluster_size
            if not (entry & COPIED and self._refcounts.get(old) == 1):
                table.offset = self._place(l1_index)
                table.is_new = True
                self._dirty.add(l1_index)
                if not entry & COPIED and self._refcounts.get(old) > 1:  # else refcounts lie: a leak is safer
                    self._allocator.free(old)
            self._verify(l1_index, table)
        table.is_own = True
        return table

    def shows_below(self, table: L2Table, index: int, *, subclusters: int = ALL_SUBCLUSTERS) -> bool:
        """Whether an entry decides nothing of its cluster, or of these ``subclusters`` of it: what is below shows."""
        if self._geometry.extended_l2:
            entry, bitmap = table.words[2 * index], table.words[2 * index + 1]
            return not entry & COMPRESSED and not bitmap & (subclusters | subclusters << SUBCLUSTERS)
        return not table.words[index] & self.own_bits

    def drop(self, l1_index: int) -> L2Table:
        """Take a table that exists out of the L1 table; its entries, whose references are gone with it.

        Raises:
            BrokenRefcounts, OSError: as :meth:`get`; nothing has changed.
        """
        table = self.get(l1_index)
        assert table is not None, "nothing to drop"
        if not table.is_own:
            self._verify(l1_index, table)
        entry = self.l1.words[l1_index]
        cluster = table.offset // self._cluster_size
        references = self._refcounts.get(cluster)
        self.l1.set(l1_index, 0)
        del self.tables[l1_index]
        self._dirty.discard(l1_index)
        if references == 1:
            self._protected.remove(cluster, 1)
        if bool(entry & COPIED) == (references == 1):  # else refcounts lie: a leak is safer
            self._allocator.free(cluster)
        return table

    def _place(self, l1_index: int) -> int:
        """Find room for an L2 table, and let the L1 entry name it."""
        run = self._allocator.allocate(1)
        offset = run.first * self._cluster_size
        try:
            self._storage.reserve(offset, self._cluster_size)
        except OSError:
            self._allocator.undo(run)
            raise
        self._protected.add(run.first, 1)
        self.l1.set(l1_index, offset | COPIED)
        return offset

    def _verify(self, l1_index: int, table: L2Table) -> None:
        """Believe COPIED only where the refcount says so too (R-28), and never where metadata lies (O4).

        The flag without an offset means nothing (Q36): a guest cluster that is not allocated must not be the header.
        """
        step = 2 if self._geometry.extended_l2 else 1
        entries = table.values[::step]
        owned = np.flatnonzero((entries & np.uint64(COPIED | COMPRESSED)) == COPIED)
        if self._geometry.has_data_file:  # the only right place is that of the guest's (Q77)
            places = (owned + l1_index * self._geometry.l2_count).astype(np.uint64)
            places <<= np.uint64(self._geometry.cluster_bits)
            entries[owned[(entries[owned] & np.uint64(OFFSET_MASK)) != places]] &= _NOT_COPIED
            return
        placed = (entries[owned] & np.uint64(OFFSET_MASK)) != 0
        entries[owned[~placed]] &= _NOT_COPIED
        owned = owned[placed]
        hosts = (entries[owned] & np.uint64(OFFSET_MASK)) >> np.uint64(self._geometry.cluster_bits)
        wrong = (self._refcounts.get_many(hosts) != 1) | ((entries[owned] & np.uint64(self._inside_mask)) != 0)
        order = np.argsort(hosts, kind="stable")
        same = hosts[order[1:]] == hosts[order[:-1]]
        wrong[order[1:][same]] = wrong[order[:-1][same]] = True  # two owners are none
        metadata = self._protected.among(hosts)
        table.forbidden = frozenset(owned[metadata].tolist())
        entries[owned[wrong | metadata]] &= _NOT_COPIED

    def changed(self, l1_index: int, first: int, count: int) -> None:
        """Note that ``count`` entries of an own table have changed, from ``first``."""
        table = self.tables[l1_index]
        step = 2 if self._geometry.extended_l2 else 1
        table.touch(first * step, count * step)
        self._dirty.add(l1_index)

    def take(self) -> tuple[list[Taken], list[Taken]]:
        """Changed tables: those that are new, which nothing in the file names yet, and all others with the L1 table.

        :meth:`settle` or :meth:`put_back` has to follow.
        """
        new: list[Taken] = []
        old: list[Taken] = []
        for l1_index in sorted(self._dirty):
            table = self.tables[l1_index]
            (new if table.is_new else old).append(table.take())
        self._flushing, self._dirty = self._dirty, set()
        if self.l1.needs_write:
            old.append(self.l1.take())
        return new, old

    def settle(self) -> None:
        """What was taken is in the file."""
        self._flushing = set()

    def put_back(self, taken: list[Taken]) -> None:
        """A flush failed: what it took is changed still."""
        for changes in taken:
            changes.put_back()
        self._dirty |= self._flushing & self.tables.keys()  # some may have been dropped meanwhile
        self._flushing = set()


def l1_problem(l1: NDArray[np.uint64], geometry: Geometry) -> str | None:
    """Why nobody should write to an image with this L1 table, or None (HARD list)."""
    entries = l1[l1 != 0]
    offsets = entries & np.uint64(OFFSET_MASK)
    if ((entries & ~np.uint64(OFFSET_MASK | COPIED)) != 0).any():
        return "reserved bits of the L1 table are set"
    if (offsets & np.uint64(geometry.cluster_size - 1)).any():
        return "an L1 entry points between clusters"
    if len(distinct(offsets)) != len(offsets):
        return "two L1 entries name one L2 table"
    return None

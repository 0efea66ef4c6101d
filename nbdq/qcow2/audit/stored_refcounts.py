"""The refcounts that an image stores, for who judges or mends them: read in pieces, and written back in place.

Believes nothing: a block may be misplaced, repeated or past the end of the file. Where there is none, refcounts are 0.
"""

from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from nbdq.qcow2.audit.reference_counts import PAGE, PAGE_BITS
from nbdq.qcow2.audit.sparse_tables import lies_in_data
from nbdq.qcow2.refcount_widths import max_refcount, pack, unpack
from nbdq.storage import FileStorage

BLOCK_OFFSET_MASK = np.uint64(0xFFFF_FFFF_FFFF_FE00)

#: Pages of refcounts kept unpacked, 256 KiB each, and how many neighbours are looked up in together.
_CACHED_PAGES, _NEAR_PAGES = 48, 32


class StoredRefcounts:
    """The refcount blocks that ``table`` names. Keeps a reference to the storage, does not own it. Not thread-safe."""

    def __init__(self, storage: FileStorage, table: NDArray[np.uint64], *, cluster_bits: int, order: int) -> None:
        """``table`` is the whole refcount table, as it is stored but in native byte order."""
        self._storage = storage
        self._order = order
        self._type = np.min_scalar_type(max_refcount(order))
        self._cluster_size = 1 << cluster_bits
        self.block_count = self._cluster_size * 8 >> order
        """Entries of a refcount block."""
        offsets = table & BLOCK_OFFSET_MASK
        misplaced = offsets & np.uint64(self._cluster_size - 1) != 0
        self.misplaced = np.flatnonzero(misplaced)
        """Table indices of blocks that are not at a cluster: nobody can tell what they say."""
        usable = np.flatnonzero((offsets != 0) & ~misplaced & (offsets < np.uint64(storage.size())))
        in_data = lies_in_data(storage, offsets[usable].astype(np.int64), self._cluster_size)
        self._offsets = np.zeros(len(table), dtype=np.int64)
        self._offsets[usable[in_data]] = offsets[usable[in_data]].astype(np.int64)
        self._cache: OrderedDict[int, NDArray[np.unsignedinteger]] = OrderedDict()

    def highest_block(self) -> int:
        """The last host cluster with a refcount block in it; -1 if there is none."""
        return int(self._offsets.max(initial=-1)) // self._cluster_size

    def are_blocks(self, clusters: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of ``clusters`` hold a refcount block."""
        return np.asarray(np.isin(clusters, self._offsets[self._offsets != 0] // self._cluster_size), dtype=np.bool_)

    def pages(self) -> Iterator[int]:
        """The numbers of all pages, of ``reference_counts.PAGE`` clusters, that may have refcounts; ascending."""
        last = -1
        for block in np.flatnonzero(self._offsets).tolist():
            first = block * self.block_count // PAGE
            for number in range(max(first, last + 1), ((block + 1) * self.block_count - 1) // PAGE + 1):
                yield number
                last = number

    def page(self, number: int) -> NDArray[np.unsignedinteger]:
        """The refcounts of clusters ``number * PAGE`` and on; not to be changed.

        Raises:
            OSError: the file cannot be read.
        """
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        found = np.zeros(PAGE, dtype=self._type)
        for begin, offset, length in self._pieces(number):
            entries = unpack(self._storage.read(offset, length).ljust(length, b"\0"), self._order)
            found[begin : begin + len(entries)] = entries
        self._cache[number] = found
        if len(self._cache) > _CACHED_PAGES:
            self._cache.popitem(last=False)
        return found

    def of(self, clusters: NDArray[np.int64]) -> NDArray[np.unsignedinteger]:
        """The refcount of each of ``clusters``.

        Raises:
            OSError: the file cannot be read.
        """
        if not clusters.size:
            return np.zeros(0, dtype=self._type)
        first, last = int(clusters.min()) >> PAGE_BITS, int(clusters.max()) >> PAGE_BITS
        if last - first < _NEAR_PAGES:
            near = [self.page(number) for number in range(first, last + 1)]
            return np.asarray((np.concatenate(near) if len(near) > 1 else near[0])[clusters - first * PAGE])
        found = np.zeros(len(clusters), dtype=self._type)
        numbers = clusters >> PAGE_BITS
        order = np.argsort(numbers)
        edges = (np.flatnonzero(np.diff(numbers[order])) + 1).tolist()
        for group in np.split(order, edges):
            number = int(numbers[group[0]])
            found[group] = self.page(number)[clusters[group] - number * PAGE]
        return found

    def are_known(self, clusters: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of ``clusters`` do not have their refcount in a misplaced block."""
        if not self.misplaced.size:
            return np.ones(len(clusters), dtype=bool)
        return np.asarray(~np.isin(clusters // self.block_count, self.misplaced), dtype=np.bool_)

    def replace_page(self, number: int, refcounts: NDArray[np.uint64]) -> None:
        """Write all refcounts of a page into the blocks that exist; those without a block must be 0. Not synced.

        Raises:
            OSError: the file cannot be written.
        """
        old = self.page(number)
        for begin, offset, length in self._pieces(number):
            end = begin + (length * 8 >> self._order)
            if not np.array_equal(old[begin:end], refcounts[begin:end]):
                self._storage.write(offset, pack(refcounts[begin:end], self._order))
        del self._cache[number]

    def _pieces(self, number: int) -> Iterator[tuple[int, int, int]]:
        """What the page is made of: first entry within it, file offset and byte length of pieces of blocks."""
        first = number * PAGE
        block, skipped = divmod(first, self.block_count)
        count = min(PAGE, self.block_count)
        for begin in range(0, PAGE, count):
            if block < len(self._offsets) and self._offsets[block]:
                skip = skipped << self._order >> 3
                yield begin, int(self._offsets[block]) + skip, count << self._order >> 3
            block += 1

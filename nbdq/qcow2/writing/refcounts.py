"""Reference counts of host clusters, in memory: blocks loaded when needed, made when missing, written by the flush.

Counts are only ever raised here before a reference is made, and lowered after it is durably gone (W1, W2); who calls
when is :mod:`nbdq.qcow2.writing.allocator`'s business. A new block lies in the first cluster that it counts, so that it
describes itself and nothing else has to exist for it (A3). Everything belongs under the lock of the image.
"""

import errno
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nbdq.qcow2.fields import MAX_REFCOUNT_TABLE
from nbdq.qcow2.format import Header
from nbdq.qcow2.refcount_widths import max_refcount, unpack
from nbdq.qcow2.writing.protection import ProtectedClusters
from nbdq.qcow2.writing.tables import Table, Taken, Write
from nbdq.storage import FileStorage

_BLOCK_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00
#: Bytes of memory for refcount blocks: those of an image of 4 TiB with clusters of 64 KiB.
_BLOCK_BUDGET = 128 << 20
#: So many bytes of a block that is not in memory are read instead of it, when they are all that is asked for.
_GLANCE = 4096


class BrokenRefcounts(Exception):
    """The refcounts contradict themselves or the tables; nothing may be allocated any more. Never leaves the engine."""


class Refcounts:
    """The refcount table and blocks of one image that is open for writing."""

    def __init__(self, storage: FileStorage, header: Header, protected: ProtectedClusters) -> None:
        """Load the refcount table.

        Raises:
            OSError: it cannot be read.
        """
        self._storage = storage
        self._protected = protected
        self._order = header.refcount_order
        self._cluster_size = header.cluster_size
        self.maximum = max_refcount(self._order)
        self.block_clusters = header.cluster_size * 8 >> self._order
        """Clusters that one block counts."""
        self._block_bits = self.block_clusters.bit_length() - 1
        self._blocks: dict[int, Table] = {}
        self._dirty: set[int] = set()
        self._flushing: set[int] = set()  # on their way to the file, which does not have them yet
        length = header.refcount_table_clusters * header.cluster_size
        data = storage.read(header.refcount_table_offset, length).ljust(length, b"\0")
        self.table = Table.parse(header.refcount_table_offset, data)

    @property
    def covered_clusters(self) -> int:
        """Host clusters that the table can count before it has to grow."""
        return len(self.table.words) * self.block_clusters

    def has_block(self, number: int) -> bool:
        """Whether any cluster of block ``number`` was ever counted."""
        return number < len(self.table.words) and bool(self.table.words[number] & _BLOCK_OFFSET_MASK)

    def block_offsets(self) -> NDArray[np.uint64]:
        """Host offsets of all blocks, in order of the table."""
        offsets: NDArray[np.uint64] = self.table.values & np.uint64(_BLOCK_OFFSET_MASK)
        return np.asarray(offsets[offsets != 0], dtype=np.uint64)

    def block(self, number: int) -> Table:
        """Block ``number``, which exists.

        Raises:
            BrokenRefcounts: its place in the file is impossible (1.14).
            OSError: it cannot be read.
        """
        found = self._blocks.get(number)
        if found is None:
            offset = self._place(number)
            data = self._storage.read(offset, self._cluster_size).ljust(self._cluster_size, b"\0")
            self._make_room()
            found = self._blocks[number] = Table.parse(offset, data, self._order)
        return found

    def _place(self, number: int) -> int:
        offset = int(self.table.words[number] & _BLOCK_OFFSET_MASK)
        if offset % self._cluster_size or offset == 0 or offset >= self._storage.size():
            raise BrokenRefcounts(f"refcount block {number} is said to be at {offset:#x}")
        return offset

    @property
    def is_crowded(self) -> bool:
        """Whether so many blocks wait for a flush that no more should be changed before it."""
        return len(self._dirty) * max(self._cluster_size, self.block_clusters) >= _BLOCK_BUDGET // 2

    def _make_room(self) -> None:
        """Forget the blocks that were loaded first, unless they wait to be written."""
        if len(self._blocks) * max(self._cluster_size, self.block_clusters) >= _BLOCK_BUDGET:
            for number in list(self._blocks)[: len(self._blocks) // 4]:
                if number not in self._dirty and number not in self._flushing:
                    del self._blocks[number]

    def make_blocks(self, number: int, count: int = 1) -> None:
        """Make the missing blocks from ``number`` side by side in the first clusters that they count, which are free.

        The table must cover them. One block at a time is enough but for more neighbours than fit between two blocks.

        Raises:
            BrokenRefcounts: metadata is there already.
            OSError: ENOSPC if there is no room for them.
        """
        first = number << self._block_bits
        if first == 0 or self._protected.overlaps(first, count):
            raise BrokenRefcounts(f"cluster {first} is in use, but has no refcount")
        self._storage.reserve(first * self._cluster_size, count * self._cluster_size)
        for made, block in self._new_blocks(number, count, used=count).items():
            self._blocks[made] = block
            self._dirty.add(made)
            self.table.set(made, block.offset)
        self._protected.add(first, count)

    def _new_blocks(self, number: int, count: int, *, used: int) -> dict[int, Table]:
        """Blocks that lie in the first clusters that they count, of which the first ``used`` are in use."""
        blocks = {}
        for position in range(count):
            block = Table.empty(
                ((number << self._block_bits) + position) * self._cluster_size, self._cluster_size, self._order
            )
            block.values[: max(0, used - position * self.block_clusters)] = 1
            blocks[number + position] = block
        return blocks

    def get(self, cluster: int) -> int:
        """The refcount of a host cluster.

        Raises:
            BrokenRefcounts, OSError: as :meth:`block`.
        """
        number = cluster >> self._block_bits
        if not self.has_block(number):
            return 0
        return int(self.block(number).words[cluster & self.block_clusters - 1])

    def get_many(self, clusters: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The refcounts of ``clusters``, in their order.

        Raises:
            BrokenRefcounts, OSError: as :meth:`block`.
        """
        counts = np.zeros(len(clusters), dtype=np.uint64)
        numbers = clusters >> np.uint64(self._block_bits)
        for number in np.unique(numbers).tolist():
            if self.has_block(number):
                here = numbers == number
                counts[here] = self._entries(number, clusters[here] & np.uint64(self.block_clusters - 1))
        return counts

    def _entries(self, number: int, slots: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Entries of an existing block, which is loaded if that is worth it: thousands of blocks may be asked once."""
        start = int(slots.min()) << self._order >> 3
        length = ((int(slots.max()) + 1 << self._order) + 7 >> 3) - start
        if number in self._blocks or length > _GLANCE:
            return np.asarray(self.block(number).values[slots], dtype=np.uint64)
        data = self._storage.read(self._place(number) + start, length).ljust(length, b"\0")
        return np.asarray(unpack(data, self._order)[slots - np.uint64(start << 3 >> self._order)], dtype=np.uint64)

    def set_used(self, first: int, count: int) -> None:
        """Set the refcount of free clusters of one existing block to 1."""
        number = first >> self._block_bits
        block = self.block(number)
        slot = first & self.block_clusters - 1
        if count == 1:
            block.words[slot] = 1
        else:
            block.values[slot : slot + count] = 1
        block.touch(slot, count)
        self._dirty.add(number)

    def raise_counts(self, clusters: NDArray[np.uint64]) -> None:
        """One more reference to each of ``clusters``, which are in use: ascending, and repeated for several.

        Everything is checked before anything is changed.

        Raises:
            BrokenRefcounts: one of them has no reference so far; or as :meth:`block`.
            OSError: EFBIG if ``refcount_bits`` is too small for so many references (Q31); or as :meth:`block`.
        """
        if not len(clusters):
            return
        numbers, starts = np.unique(clusters >> np.uint64(self._block_bits), return_index=True)
        changes: list[tuple[int, Table, NDArray[np.uint64], NDArray[np.uint64]]] = []
        for number, part in zip(numbers.tolist(), np.split(clusters, starts[1:]), strict=True):
            slots, added = np.unique(part & np.uint64(self.block_clusters - 1), return_counts=True)
            if not self.has_block(number):
                raise BrokenRefcounts(f"cluster {int(part[0])} is in use, but has no refcount")
            block = self.block(number)
            counts = block.values[slots].astype(np.uint64)
            if not counts.all():
                unused = (number << self._block_bits) + int(slots[counts == 0][0])
                raise BrokenRefcounts(f"cluster {unused} is in use, but has refcount 0")
            if (added.astype(np.uint64) > np.uint64(self.maximum) - counts).any():
                raise self.too_many_references()
            changes.append((number, block, slots, counts + added.astype(np.uint64)))
        for number, block, slots, counts in changes:
            self._blocks[number] = block  # it may have had to make room for those behind it
            self._put(number, slots, counts)

    def too_many_references(self) -> OSError:
        """What is said when a cluster would get more references than can be counted."""
        return OSError(
            errno.EFBIG,
            f"a cluster would get more references than refcount_bits={1 << self._order} can count; "
            "convert the image to one with more refcount_bits",
            self._storage.path,
        )

    def lower(self, first: int, count: int) -> list[tuple[int, int]]:
        """Take one reference from each cluster; (first, count) of those that have none left.

        A cluster that had none before is left alone: whoever believed in it leaks what the refcounts hide (R-28).

        Raises:
            BrokenRefcounts, OSError: as :meth:`block`.
        """
        released: list[tuple[int, int]] = []
        while count:
            number = first >> self._block_bits
            slot = first & self.block_clusters - 1
            part = min(count, self.block_clusters - slot)
            if self.has_block(number):
                block = self.block(number)
                values = block.values[slot : slot + part]
                ended = np.concatenate(([False], values == 1, [False]))
                values -= (values != 0).astype(values.dtype)
                block.touch(slot, part)
                self._dirty.add(number)
                edges = np.flatnonzero(ended[1:] != ended[:-1]).reshape(-1, 2)
                released += [(first + start, end - start) for start, end in edges.tolist()]
            first += part
            count -= part
        return released

    def free_runs(self, number: int) -> Iterator[tuple[int, int]]:
        """(first, count) of the free clusters of an existing block, ascending.

        Raises:
            BrokenRefcounts, OSError: as :meth:`block`.
        """
        free = np.concatenate(([False], self.block(number).values == 0, [False]))
        edges = np.flatnonzero(free[1:] != free[:-1])
        base = number << self._block_bits
        for start, end in edges.reshape(-1, 2).tolist():
            yield base + start, end - start

    def longer_table(self) -> "LongerTable":
        """A copy of the table with room for more blocks, laid behind everything that the present one can count (A4).

        In front of it lie the blocks that count it and themselves. Nothing changes before :meth:`adopt`.

        Raises:
            BrokenRefcounts: metadata is there already.
            OSError: EFBIG beyond the format's limit (R-24).
        """
        entries = len(self.table.words)
        per_cluster = self._cluster_size // 8
        first = entries * self.block_clusters
        block_count = 1
        while True:
            table_clusters = -(-max(entries * 3 // 2, entries + block_count) // per_cluster)
            needed = -(-(block_count + table_clusters) // self.block_clusters)
            if needed <= block_count:
                break
            block_count = needed
        if table_clusters * self._cluster_size > MAX_REFCOUNT_TABLE:
            raise OSError(errno.EFBIG, "the image file cannot become larger: its refcount table has reached its limit")
        count = block_count + table_clusters
        if self._protected.overlaps(first, count):
            raise BrokenRefcounts(f"metadata lies behind cluster {first}, where nothing is counted")
        blocks = self._new_blocks(entries, block_count, used=count)
        table = Table.empty((first + block_count) * self._cluster_size, table_clusters * self._cluster_size)
        table.values[:entries] = self.table.values
        for number, block in self._blocks.items():
            if block.is_new:  # not in the file yet: the next flush writes it, and then its entry
                table.words[number] = 0
        table.values[entries : entries + block_count] = [block.offset for block in blocks.values()]
        return LongerTable(first, count, table, blocks)

    def adopt(self, longer: "LongerTable") -> tuple[int, int]:
        """Go on with a table that the header in the file now names; first cluster and count of the old one."""
        old = self.table
        new = longer.table
        for number, block in self._blocks.items():
            if block.is_new:
                new.set(number, block.offset)
        self.table = new
        self._blocks.update(longer.blocks)
        self._protected.add(longer.first, longer.clusters)
        first, count = old.offset // self._cluster_size, len(old.words) * 8 // self._cluster_size
        self._protected.remove(first, count)
        return first, count

    # Changing many at once; see nbdq.qcow2.writing.switch.

    def counts(self, cluster_count: int) -> NDArray[Any]:
        """The refcounts of the first ``cluster_count`` clusters; a copy.

        Raises:
            BrokenRefcounts, OSError: as :meth:`block`.
            MemoryError: there is none for so many.
        """
        counts = Table.empty(0, (cluster_count << self._order) + 7 >> 3, self._order).values[:cluster_count]
        for number in range(-(-cluster_count // self.block_clusters)):
            if self.has_block(number):
                part = counts[number << self._block_bits : number + 1 << self._block_bits]
                part[:] = self.block(number).values[: len(part)]
        return counts

    def blocks_that_differ(self, old: NDArray[Any], new: NDArray[Any]) -> set[int]:
        """The numbers of the blocks whose clusters have other counts in ``new`` than in ``old``."""
        blocks = range(0, len(old), self.block_clusters)
        return {
            start >> self._block_bits
            for start in blocks
            if not np.array_equal(old[start : start + self.block_clusters], new[start : start + self.block_clusters])
        }

    def assign(self, numbers: Iterable[int], old: NDArray[Any], new: NDArray[Any]) -> None:
        """Take over what differs between ``old`` and ``new`` in existing blocks; other clusters keep their counts.

        Raises:
            BrokenRefcounts, OSError: as :meth:`block`.
        """
        for number in numbers:
            place = slice(number << self._block_bits, number + 1 << self._block_bits)
            slots = np.flatnonzero(old[place] != new[place])
            self._put(number, slots, new[place][slots])

    def clear(self, clusters: NDArray[np.uint64]) -> None:
        """Clusters of one existing block, ascending, have no reference any more.

        Raises:
            BrokenRefcounts, OSError: as :meth:`block`.
        """
        self._put(int(clusters[0]) >> self._block_bits, clusters & np.uint64(self.block_clusters - 1), 0)

    def _put(self, number: int, slots: NDArray[Any], counts: NDArray[Any] | int) -> None:
        block = self.block(number)
        block.values[slots] = counts
        block.touch(int(slots[0]), int(slots[-1] - slots[0]) + 1)
        self._dirty.add(number)

    def changed_in_place(self) -> set[int]:
        """Blocks that differ from those that the file has in their places."""
        return {number for number in self._dirty if not self._blocks[number].is_new}

    def move(self, places: dict[int, int], *, table_offset: int) -> list[int]:
        """Let blocks that have changed, by number, and the table be written to new places; the old ones of the blocks.

        The file must not name the new places before all of that is written (:meth:`take`) and durable.
        """
        old = []
        for number, offset in places.items():
            block = self._blocks[number]
            old.append(block.offset)
            block.offset, block.is_new = offset, True
            self.table.set(number, offset)
        self.table.offset, self.table.is_new = table_offset, True
        return old

    @property
    def needs_flush(self) -> bool:
        """Whether anything differs from the file."""
        return bool(self._dirty) or self.table.needs_write

    def take(self) -> tuple[list[Taken], Taken | None]:
        """Changed blocks, and the table's changes: to be written only when new blocks are durable (A4).

        :meth:`settle` or :meth:`put_back` has to follow.
        """
        blocks = [self._blocks[number].take() for number in sorted(self._dirty)]
        self._flushing, self._dirty = self._dirty, set()
        return blocks, self.table.take() if self.table.needs_write else None

    def settle(self) -> None:
        """What was taken is in the file."""
        self._flushing = set()

    def put_back(self, blocks: list[Taken], table: Taken | None) -> None:
        """A flush failed: what it took is changed still."""
        for taken in blocks:
            taken.put_back()
        if table is not None:
            table.put_back()
        self._dirty |= self._flushing
        self._flushing = set()


class LongerTable(NamedTuple):
    """A refcount table that is about to replace a shorter one: ``clusters`` from ``first``, blocks first."""

    first: int
    clusters: int
    table: Table
    blocks: dict[int, Table]

    def writes(self) -> list[Write]:
        """All of it, to be durable before the header names it (R-54)."""
        return [write for table in (*self.blocks.values(), self.table) for write in table.take().writes]

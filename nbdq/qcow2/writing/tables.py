"""A table of integers of an image, held in memory and written back page by page.

L1 and L2 tables, the refcount table and refcount blocks are all the same thing here: fixed-width big-endian integers
at one place of the file, of which a few change between two flushes. Knows bytes and pages. Must not know what the
integers mean, nor when it is safe to write them: that is the flush's business.
"""

from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from nbdq.qcow2.refcount_widths import pack, unpack

#: Unit in which changes are written. Entries never straddle it, nor a sector.
_PAGE = 4096
#: log2 of the bits of an entry of all tables but refcount blocks.
OFFSET_ORDER = 6

_MEMORY_TYPES = (np.uint8, np.uint8, np.uint8, np.uint8, np.uint16, np.uint32, np.uint64)


class Write(NamedTuple):
    """Bytes that are to be written at a host offset."""

    offset: int
    data: bytes


class Table:
    """One table. Every method but reading ``words`` and ``values`` belongs under the lock of the image."""

    __slots__ = ("_order", "dirty", "is_new", "offset", "values", "words")

    def __init__(self, offset: int, values: NDArray[Any], order: int, *, is_new: bool) -> None:
        self.offset = offset
        """Host offset in bytes."""
        self.values = values
        """The entries, native integers."""
        self.words = values.data
        """The same memory, for scalar access, which costs numpy five times as much."""
        self.dirty: set[int] = set()
        """Pages that differ from the file."""
        self.is_new = is_new
        """Nothing of the table is in the file yet."""
        self._order = order

    @classmethod
    def parse(cls, offset: int, data: bytes, order: int = OFFSET_ORDER) -> Self:
        """A table that the file holds as ``data``."""
        return cls(offset, unpack(data, order).astype(_MEMORY_TYPES[order]), order, is_new=False)

    @classmethod
    def empty(cls, offset: int, length: int, order: int = OFFSET_ORDER) -> Self:
        """A new table of ``length`` bytes, all zero."""
        return cls(offset, np.zeros(length * 8 >> order, dtype=_MEMORY_TYPES[order]), order, is_new=True)

    @property
    def needs_write(self) -> bool:
        return self.is_new or bool(self.dirty)

    def set(self, index: int, value: int) -> None:
        """Change one entry."""
        self.words[index] = value
        self.dirty.add(index << self._order >> 15)

    def touch(self, first: int, count: int) -> None:
        """Note that ``count`` ≥ 1 entries from ``first`` have changed."""
        page = first << self._order >> 15
        last = (first + count - 1) << self._order >> 15
        if page == last:
            self.dirty.add(page)
        else:
            self.dirty.update(range(page, last + 1))

    def take(self) -> "Taken":
        """What has to be written, copied; the table counts as clean, unless :meth:`Taken.put_back` takes that back."""
        taken = Taken(self, self.is_new, self.dirty, self._copy())
        self.is_new, self.dirty = False, set()
        return taken

    def _copy(self) -> list[Write]:
        if self.is_new:
            return [Write(self.offset, pack(self.values, self._order))]
        writes = []
        entries = _PAGE * 8 >> self._order
        pages = sorted(self.dirty)
        position = 0
        while position < len(pages):
            end = position + 1
            while end < len(pages) and pages[end] == pages[end - 1] + 1:
                end += 1
            values = self.values[pages[position] * entries : (pages[end - 1] + 1) * entries]
            writes.append(Write(self.offset + pages[position] * _PAGE, pack(values, self._order)))
            position = end
        return writes


class Taken(NamedTuple):
    """Changes of a table that a flush has in hand."""

    table: Table
    was_new: bool
    pages: set[int]
    writes: list[Write]

    def put_back(self) -> None:
        """They were not written, or nobody knows whether; the next flush writes them again."""
        self.table.is_new |= self.was_new
        self.table.dirty |= self.pages

"""The smallest writer of QCOW2 that survives crashes, and its siblings that do not: what the test itself is tested on.

For images without a base whose guest data fits one L2 table and one refcount block, with 16-bit refcounts.
"""

from enum import Flag, auto
from pathlib import Path

import numpy as np

from nbdq.qcow2.format import read_header
from nbdq.storage import FileStorage

_COPIED = 1 << 63
_ZERO = 1


class Omit(Flag):
    """Barriers that a sibling leaves out."""

    NOTHING = 0
    SYNC_BEFORE_ENTRIES = auto()
    LAST_SYNC = auto()
    QUARANTINE = auto()
    REFCOUNTS_FIRST = auto()


class PlainWriter:
    """A disk for one thread."""

    def __init__(self, path: Path, omit: Omit = Omit.NOTHING) -> None:
        """Open the image at ``path`` for writing."""
        self._omit = omit
        self._storage = storage = FileStorage.open(str(path), writable=True)
        header = read_header(storage)
        self.size = header.guest_size
        self._cluster = cluster = header.cluster_size
        self._block_offset = int.from_bytes(storage.read(header.refcount_table_offset, 8), "big")
        self._refcounts = np.frombuffer(storage.read(self._block_offset, cluster), dtype=">u2").copy()
        self._freed: list[int] = []
        self._table_offset = int.from_bytes(storage.read(header.l1_table_offset, 8), "big") & ~_COPIED
        if not self._table_offset:
            self._table_offset = self._allocate() * cluster
            storage.write(self._table_offset, bytes(cluster))
            storage.write(self._block_offset, self._refcounts.tobytes())
            storage.sync()
            storage.write(header.l1_table_offset, (self._table_offset | _COPIED).to_bytes(8, "big"))
            storage.sync()
        self._entries = np.frombuffer(storage.read(self._table_offset, cluster), dtype=">u8").copy()

    def _allocate(self) -> int:
        number = int(np.flatnonzero(self._refcounts == 0)[0])
        self._refcounts[number] = 1
        return number

    def write_cached(self, offset: int, view: memoryview) -> bool:
        """Never; everything takes the long way."""
        return False

    def write(self, offset: int, view: memoryview) -> None:
        """Write in place, or to a new cluster filled up with zeros."""
        while view:
            index, inside = divmod(offset, self._cluster)
            count = min(len(view), self._cluster - inside)
            host = int(self._entries[index]) & ~(_COPIED | _ZERO)
            if host:
                self._storage.write(host + inside, view[:count])
            else:
                content = bytearray(self._cluster)
                content[inside : inside + count] = view[:count]
                host = self._allocate() * self._cluster
                self._storage.write(host, content)
                self._entries[index] = host | _COPIED
            offset, view = offset + count, view[count:]

    def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Free whole clusters, overwrite the rest."""
        end = offset + length
        while offset < end:
            index, inside = divmod(offset, self._cluster)
            count = min(end - offset, self._cluster - inside)
            if count == self._cluster:
                host = int(self._entries[index]) & ~(_COPIED | _ZERO)
                self._entries[index] = _ZERO
                if host:
                    self._freed.append(host // self._cluster)
            else:
                self.write(offset, memoryview(bytes(count)))
            offset += count
        if Omit.QUARANTINE in self._omit:
            self._release()

    def discard(self, offset: int, length: int) -> None:
        """As :meth:`zero`."""
        self.zero(offset, length, unmap=True)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill whole clusters of ``view``."""
        for start in range(0, len(view), self._cluster):
            host = int(self._entries[(offset + start) // self._cluster]) & ~(_COPIED | _ZERO)
            if host:
                self._storage.read_into(host, view[start : start + self._cluster])

    def flush(self) -> None:
        """Refcounts and data, then the entries that name them, then reuse what is free."""
        refcounts, entries = (self._block_offset, self._refcounts), (self._table_offset, self._entries)
        first, second = (entries, refcounts) if Omit.REFCOUNTS_FIRST in self._omit else (refcounts, entries)
        self._storage.write(first[0], first[1].tobytes())
        if Omit.SYNC_BEFORE_ENTRIES not in self._omit:
            self._storage.sync()
        self._storage.write(second[0], second[1].tobytes())
        if Omit.LAST_SYNC not in self._omit:
            self._storage.sync()
        self._release()

    def _release(self) -> None:
        self._refcounts[self._freed] = 0
        self._freed.clear()

    def close(self) -> None:
        """Flush, and close."""
        self.flush()
        self._storage.close()

"""Zero clusters turned into something that version 2 of the format can say (4.11).

Without a backing file an unallocated cluster reads as zeros, too. With one, a cluster of zeros is allocated; it is a
hole of the file, so that it costs no space before somebody writes to it. Every L2 table is visited, those that only
snapshots name as well, and changed in place: whichever of its entries a crash leaves changed, the guest reads zeros.

The order (W1, W2, W3): new clusters counted and zero, durably; then the entries; then what they named before is freed.
QEMU writes zeros to a cluster that a zero cluster still has, even if another snapshot sees data there; here it is given
up instead.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from nbdq.errors import CorruptImage
from nbdq.qcow2.amending.options import Progress
from nbdq.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK, READS_ZERO
from nbdq.qcow2.format import Header
from nbdq.qcow2.snapshots import check_snapshot, iterate_snapshots
from nbdq.qcow2.writing.writable import WritableImage
from nbdq.storage import FileStorage

_OFFSET = np.uint64(OFFSET_MASK)
#: Clusters that are allocated, or given up, before they are flushed.
_BATCH = 64 << 20


class Tables:
    """The L2 tables of an image, of the active state and of all snapshots."""

    def __init__(self, storage: FileStorage, header: Header) -> None:
        """Read the L1 tables.

        Raises:
            CorruptImage: an entry cannot be one.
            ImageError, OSError: a table cannot be read.
        """
        self._storage = storage
        self._cluster_size = header.cluster_size
        self.references: Counter[int] = Counter()
        """How many entries of L1 tables name each table, by its host offset."""
        self.active = set(self._read_l1(header.l1_table_offset, header.l1_size))
        """Those that the disk uses now."""
        for snapshot in iterate_snapshots(storage, header):
            check_snapshot(storage, header, snapshot)
            self._read_l1(snapshot.l1_offset, snapshot.l1_size)

    def _read_l1(self, offset: int, count: int) -> list[int]:
        entries = np.frombuffer(self._storage.read(offset, count * 8), dtype=">u8").astype(np.uint64) & _OFFSET
        tables: list[int] = entries[entries != 0].tolist()
        for table in tables:
            if table % self._cluster_size or table >= self._storage.size():
                raise self.damaged(f"an L1 entry names an L2 table at {table:#x}")
        self.references.update(tables)
        return tables

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """(host offset, entries) of each table once, in the order of the file."""
        for offset in sorted(self.references):
            data = self._storage.read(offset, self._cluster_size).ljust(self._cluster_size, b"\0")
            yield offset, np.frombuffer(data, dtype=">u8").astype(np.uint64)

    def any_compressed(self) -> bool:
        """Whether any cluster is compressed."""
        return any(bool((entries & np.uint64(COMPRESSED)).any()) for _, entries in self)

    def damaged(self, what: str) -> CorruptImage:
        """What is said of tables that break the rules of the format."""
        return CorruptImage(self._storage.path, what, "repair it with nbdq check -r all")


def expand_zero_clusters(storage: FileStorage, header: Header, tables: Tables, progress: Progress) -> Header:
    """Leave no zero cluster in a quiet image without subclusters and data file; the header that it has then.

    Durable on return.

    Raises:
        ImageError: tables are damaged.
        OSError: the file cannot be read or written; ENOSPC if there is no room. Some clusters were changed then.
    """
    expansion = _Expansion(storage, header, tables)
    progress.expect(len(tables.references) * header.cluster_size)
    for offset, entries in tables:
        expansion.expand(offset, entries)
        progress.advance(header.cluster_size)
    expansion.commit()
    expansion.image.finish()
    return expansion.image.header


class _Expansion:
    """Goes through the tables, and makes its changes durable batch by batch."""

    def __init__(self, storage: FileStorage, header: Header, tables: Tables) -> None:
        self.image = WritableImage(storage, header)  # for its refcounts: the tables are not changed through it
        self._storage = storage
        self._header = header
        self._tables = tables
        self._changed: list[tuple[int, bytes]] = []
        self._given_up: list[int] = []
        self._pending = 0

    def expand(self, offset: int, entries: NDArray[np.uint64]) -> None:
        """Change the zero clusters of one table."""
        zero = (entries & np.uint64(READS_ZERO | COMPRESSED)) == READS_ZERO
        if not zero.any():
            return
        references = self._tables.references[offset]
        flag = COPIED if references == 1 and offset in self._tables.active else 0
        hosts = entries & _OFFSET
        for index in np.flatnonzero(zero & (hosts != 0)).tolist():
            host = int(hosts[index])
            if self._keep(host, references):
                entries[index] = host | flag
                zero[index] = False
        plain = np.flatnonzero(zero)
        if self._header.backing_name is None:
            entries[plain] = 0
        else:
            self._fill(entries, plain, references=references, flag=flag)
        self._changed.append((offset, entries.astype(">u8").tobytes()))
        self._pending += (len(plain) + 1) * self._header.cluster_size
        if self._pending >= _BATCH:
            self.commit()

    def _keep(self, host: int, references: int) -> bool:
        """Write zeros to a cluster that nobody else sees; where somebody does, give it up."""
        cluster, inside = divmod(host, self._header.cluster_size)
        with self.image.changing():
            count = self.image.refcounts.get(cluster)
        if inside or count < references:
            raise self._tables.damaged(f"a zero cluster names host offset {host:#x} with refcount {count}")
        if count == references:
            self._storage.write_zeros(host, self._header.cluster_size, allocated=True)
            return True
        self._given_up += [cluster] * references
        return False

    def _fill(self, entries: NDArray[np.uint64], indices: NDArray[np.intp], *, references: int, flag: int) -> None:
        """Let the entries name new clusters of zeros."""
        image, bits = self.image, self._header.cluster_bits
        position = 0
        while position < len(indices):
            run = image.growing(partial(image.allocator.allocate, len(indices) - position))
            self._storage.write_zeros(run.first << bits, run.clusters << bits)
            clusters = np.arange(run.first, run.first + run.clusters, dtype=np.uint64)
            with image.changing():
                image.refcounts.raise_counts(np.repeat(clusters, references - 1))
            entries[indices[position : position + run.clusters]] = clusters << np.uint64(bits) | np.uint64(flag)
            position += run.clusters

    def commit(self) -> None:
        """Make everything durable so far."""
        if not self._changed:
            return
        self.image.flush()
        for offset, table in self._changed:
            self._storage.write(offset, table)
        self._storage.sync()
        with self.image.lock:
            for cluster in self._given_up:
                self.image.allocator.free(cluster)
        self._changed, self._given_up, self._pending = [], [], 0

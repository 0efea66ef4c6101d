"""Zero clusters turned into something that version 2 of the format can say (4.11).

Without a backing file an unallocated cluster reads as zeros, too. With one, a cluster of zeros is allocated; it is a
hole of the file, so that it costs no space before somebody writes to it. Every L2 table is visited, those that only
snapshots name as well, and changed in place: whichever of its entries a crash leaves changed, the guest reads zeros.

The order (W1, W2, W3): new clusters counted and zero, durably; then the entries; then what they named before is freed.
QEMU writes zeros to a cluster that a zero cluster still has, even if another snapshot sees data there; here it is given
up instead.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

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


class L2Table(NamedTuple):
    """One L2 table, and who uses it."""

    offset: int
    """In the file."""
    references: int
    """How many entries of L1 tables name it."""
    is_active: bool
    """The disk uses it now."""
    entries: NDArray[np.uint64]


class Tables:
    """The L2 tables of an image, of the active state and of all snapshots."""

    def __init__(self, storage: FileStorage, header: Header) -> None:
        """Read the L1 tables. Somebody has seen to it that they are not too many for memory.

        Raises:
            CorruptImage: an entry cannot be one.
            ImageError, OSError: a table cannot be read.
        """
        self._storage = storage
        self._cluster_size = header.cluster_size
        active = self._read_l1(header.l1_table_offset, header.l1_size)
        parts = [active]
        for snapshot in iterate_snapshots(storage, header):
            check_snapshot(storage, header, snapshot)
            parts.append(self._read_l1(snapshot.l1_offset, snapshot.l1_size))
        self._offsets, self._references = np.unique(np.concatenate(parts), return_counts=True)
        self._is_active = np.isin(self._offsets, active)

    def _read_l1(self, offset: int, count: int) -> NDArray[np.uint64]:
        entries = np.frombuffer(self._storage.read(offset, count * 8), dtype=">u8").astype(np.uint64) & _OFFSET
        tables: NDArray[np.uint64] = entries[entries != 0]
        wrong = (tables % np.uint64(self._cluster_size) != 0) | (tables >= np.uint64(self._storage.size()))
        if wrong.any():
            raise self.damaged(f"an L1 entry names an L2 table at {int(tables[wrong][0]):#x}")
        return tables

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self) -> Iterator[L2Table]:
        """Each table once, in the order of the file."""
        for number, offset in enumerate(self._offsets.tolist()):
            data = self._storage.read(offset, self._cluster_size).ljust(self._cluster_size, b"\0")
            entries = np.frombuffer(data, dtype=">u8").astype(np.uint64)
            yield L2Table(offset, int(self._references[number]), bool(self._is_active[number]), entries)

    def any_compressed(self) -> bool:
        """Whether any cluster is compressed."""
        return any(bool((table.entries & np.uint64(COMPRESSED)).any()) for table in self)

    def damaged(self, what: str) -> CorruptImage:
        """What is said of tables that break the rules of the format."""
        return CorruptImage(self._storage.path, what, "repair it with nbdq check -r all")


def expand_zero_clusters(image: WritableImage, tables: Tables, progress: Progress) -> None:
    """Leave no zero cluster in a quiet image without subclusters and data file. Durable on return.

    Args:
        image: the image, for its refcounts; its tables are changed behind its back, and nobody may use them after that.

    Raises:
        ImageError: tables are damaged.
        OSError: the file cannot be read or written; ENOSPC if there is no room. Some clusters were changed then.
    """
    expansion = _Expansion(image, tables)
    progress.expect(len(tables) * image.cluster_size)
    for table in tables:
        expansion.expand(table)
        progress.advance(image.cluster_size)
    expansion.commit()
    image.finish()


class _Expansion:
    """Goes through the tables, and makes its changes durable batch by batch."""

    def __init__(self, image: WritableImage, tables: Tables) -> None:
        self._image = image
        self._tables = tables
        self._has_backing = image.header.backing_name is not None
        self._changed: list[tuple[int, bytes]] = []
        self._given_up: list[int] = []
        self._pending = 0

    def expand(self, table: L2Table) -> None:
        """Change the zero clusters of one table."""
        entries, references = table.entries, table.references
        zero = (entries & np.uint64(READS_ZERO | COMPRESSED)) == READS_ZERO
        if not zero.any():
            return
        flag = COPIED if references == 1 and table.is_active else 0
        hosts = entries & _OFFSET
        for index in np.flatnonzero(zero & (hosts != 0)).tolist():
            host = int(hosts[index])
            if self._keep(host, references):
                entries[index] = host | flag
                zero[index] = False
        plain = np.flatnonzero(zero)
        if self._has_backing:
            self._fill(entries, plain, references=references, flag=flag)
        else:
            entries[plain] = 0
        self._changed.append((table.offset, entries.astype(">u8").tobytes()))
        self._pending += (len(plain) + 1) * self._image.cluster_size
        if self._pending >= _BATCH:
            self.commit()

    def _keep(self, host: int, references: int) -> bool:
        """Write zeros to a cluster that nobody else sees; where somebody does, give it up."""
        cluster, inside = divmod(host, self._image.cluster_size)
        with self._image.changing():
            count = self._image.refcounts.get(cluster)
        if inside or count < references or self._image.protected.overlaps(cluster, 1):  # (O4)
            raise self._tables.damaged(f"a zero cluster names host offset {host:#x}, which cannot be its own")
        if count == references:
            self._image.storage.write_zeros(host, self._image.cluster_size, allocated=True)
            return True
        self._given_up += [cluster] * references
        return False

    def _fill(self, entries: NDArray[np.uint64], indices: NDArray[np.intp], *, references: int, flag: int) -> None:
        """Let the entries name new clusters of zeros."""
        image, bits = self._image, self._image.header.cluster_bits
        position = 0
        while position < len(indices):
            run = image.growing(partial(image.allocator.allocate, len(indices) - position))
            self._image.storage.write_zeros(run.first << bits, run.clusters << bits)
            clusters = np.arange(run.first, run.first + run.clusters, dtype=np.uint64)
            with image.changing():
                image.refcounts.raise_counts(np.repeat(clusters, references - 1))
            entries[indices[position : position + run.clusters]] = clusters << np.uint64(bits) | np.uint64(flag)
            position += run.clusters

    def commit(self) -> None:
        """Make everything durable so far."""
        if not self._changed:
            return
        self._image.flush()
        for offset, table in self._changed:
            self._image.storage.write(offset, table)
        self._image.storage.sync()
        with self._image.lock:
            for cluster in self._given_up:
                self._image.allocator.free(cluster)
        self._changed, self._given_up, self._pending = [], [], 0

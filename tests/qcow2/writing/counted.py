"""Refcounts of a small file, with the file's system calls recorded."""

import os

import numpy as np

from nbdq.qcow2.refcount_widths import pack
from nbdq.qcow2.writing.protection import ProtectedClusters
from nbdq.qcow2.writing.refcounts import Refcounts
from tests.qcow2.minimal import minimal_header, stored
from tests.support.engine import WatchedStorage

CLUSTER = 512


class Rig:
    """Refcounts of a file with clusters of 512 bytes: header, a refcount table, a block, an L1 table."""

    def __init__(self, order: int = 4, *, counts: dict[int, int] | None = None, table_clusters: int = 1) -> None:
        self.order = order
        self.per_block = CLUSTER * 8 >> order
        self.header = minimal_header(
            cluster_bits=9, size=64 * CLUSTER, refcount_order=order, refcount_table_clusters=table_clusters
        )
        values = np.zeros(self.per_block, dtype=np.uint64)
        values[:4] = 1
        for cluster, count in (counts or {}).items():
            values[cluster] = count
        file = bytearray(CLUSTER * (3 + table_clusters))
        block = 2 + table_clusters - 1
        file[CLUSTER : CLUSTER + 8] = (block * CLUSTER).to_bytes(8, "big")
        file[block * CLUSTER : (block + 1) * CLUSTER] = pack(values, order)
        plain = stored(file)
        self.storage = WatchedStorage(os.dup(plain.descriptor), plain.path)
        plain.close()
        self.protected = ProtectedClusters(np.arange(4, dtype=np.uint64))
        self.refcounts = Refcounts(self.storage, self.header, self.protected)

    def flush(self) -> None:
        """As the image does it: blocks, then the table."""
        blocks, table = self.refcounts.take()
        for taken in (*blocks, *([table] if table else [])):
            for offset, data in taken.writes:
                self.storage.write(offset, data)
        self.refcounts.settle()

    def reread(self) -> Refcounts:
        """What the file says now."""
        return Refcounts(self.storage, self.header, self.protected)

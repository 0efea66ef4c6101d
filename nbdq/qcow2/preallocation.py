"""The one question a reader asks of the refcounts: does the image look metadata-preallocated (P5)?

QEMU compares how many host clusters are referenced with how much of the file is really allocated; when metadata
promises much more than the file holds, block status looks for holes in the file too.
"""

import numpy as np

from nbdq.qcow2.format import Header
from nbdq.qcow2.refcount_widths import unpack
from nbdq.storage import FileStorage

_BLOCK_OFFSET_MASK = np.uint64(0xFFFF_FFFF_FFFF_FE00)
#: Bytes of refcount blocks that the question is worth, each counted as a page at least: 16 TiB of file in clusters of
#: 64 KiB. A sparse file that an attacker made names a million blocks, of 512 bytes or of 2 MiB.
_SCAN_BUDGET = 512 << 20
_PAGE = 4096


def is_metadata_preallocated(storage: FileStorage, header: Header) -> bool:
    """Whether referenced clusters exceed the file's real allocation by about a ninth, as QEMU judges it.

    Reads refcount blocks only for a file that is sparse enough to be in question, and gives up where they are too many.
    """
    cluster_size = header.cluster_size
    file_size = storage.size()
    end_cluster = -(-file_size // cluster_size)
    real_clusters = storage.allocated_size() // cluster_size
    threshold = max(real_clusters * 10 // 9, real_clusters + 2)
    if end_cluster < threshold:
        return False
    block_clusters = cluster_size * 8 >> header.refcount_order
    blocks = min(header.refcount_table_clusters * cluster_size // 8, -(-end_cluster // block_clusters))
    table = np.frombuffer(storage.read(header.refcount_table_offset, blocks * 8).ljust(blocks * 8, b"\0"), dtype=">u8")
    referenced = 0
    named = np.flatnonzero(table & _BLOCK_OFFSET_MASK)
    for number in named[: _SCAN_BUDGET // max(cluster_size, _PAGE)].tolist():
        block_offset = int(table[number] & _BLOCK_OFFSET_MASK)
        if block_offset % cluster_size:
            return False  # damaged refcounts do not hinder reading
        if block_offset >= file_size:
            continue  # reads as zeros
        block = storage.read(block_offset, cluster_size)
        counts = unpack(block[: len(block) // 8 * 8], header.refcount_order)
        referenced += int(np.count_nonzero(counts[: end_cluster - number * block_clusters]))
        if referenced >= threshold:
            return True
    return False

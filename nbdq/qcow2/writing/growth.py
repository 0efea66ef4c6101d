"""A larger disk: a longer L1 table if need be, zeros where a longer layer below would show through, then the size (R2).

Each step is durable before the next one begins (R-54, R-62): after a crash the disk has its old size, or its new one.
"""

import errno
from dataclasses import replace

from nbdq.qcow2.fields import MAX_L1_TABLE, l1_entries
from nbdq.qcow2.writing.tables import Table
from nbdq.qcow2.writing.writable import WritableImage
from nbdq.qcow2.writing.zeroing import Zeroing


def grow(image: WritableImage, zeroing: Zeroing, size: int) -> None:
    """Make the disk ``size`` bytes large; what is new reads as zeros. Durable on return.

    Requests must stay inside the old size until then.

    Raises:
        OSError: EINVAL if ``size`` is not larger, or no multiple of 512; EFBIG if the format cannot map so much;
            EOPNOTSUPP if the image has dirty bitmaps, which would have to grow with it; else as for a write.
    """
    old = image.size
    if size <= old or size % 512:
        raise OSError(errno.EINVAL, f"cannot grow a disk of {old} bytes to {size}", image.path)
    if image.bitmaps is not None:
        raise OSError(errno.EOPNOTSUPP, "the disk has dirty bitmaps, which cannot grow yet; remove them", image.path)
    geometry = image.geometry
    entries = l1_entries(size, cluster_bits=geometry.cluster_bits, extended_l2=geometry.extended_l2)
    if entries * 8 > MAX_L1_TABLE:
        raise OSError(errno.EFBIG, f"clusters of {geometry.cluster_size} bytes cannot map {size} bytes", image.path)
    if entries > image.header.l1_size:
        _lengthen_l1(image, entries)
    image.size = size
    try:
        # The rest of the last cluster may hold anything (QEMU never reads it), and so may a longer disk below (S2).
        hidden = min(size, -(-old // image.cluster_size) * image.cluster_size)
        if image.below is not None:
            hidden = max(hidden, min(size, image.below.size))
        if hidden > old:
            zeroing.zero(old, hidden - old, unmap=True, fast=False)
        image.flush()
        image.update_header(replace(image.header, size=size))
    except BaseException:
        image.size = old
        raise


def _lengthen_l1(image: WritableImage, entries: int) -> None:
    """Copy the L1 table to where it has room for ``entries``, and name it in the header (A5)."""
    length = entries * 8
    clusters = -(-length // image.cluster_size)
    offset = image.allocate_metadata(clusters)
    with image.quiescent():  # so the table in memory is the one in the file
        l1 = Table.empty(offset, length)
        old = image.mapping.l1
        l1.values[: len(old.values)] = old.values
        for _, data in l1.take().writes:
            image.storage.write(offset, data.ljust(clusters * image.cluster_size, b"\0"))
        image.storage.sync()
        image.write_header(replace(image.header, l1_table_offset=offset, l1_size=entries))
        image.mapping.l1 = l1
    if old.offset:
        image.free_metadata(old.offset, -(-len(old.values) * 8 // image.cluster_size))

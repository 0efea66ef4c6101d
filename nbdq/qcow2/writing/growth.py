"""A larger disk: a longer L1 table if need be, zeros where a longer layer below would show through, then the size (R2).

Each step is durable before the next one begins (R-54, R-62): after a crash the disk has its old size, or its new one.
"""

import errno
from dataclasses import replace
from functools import partial

import numpy as np

from nbdq.qcow2.entries import COPIED
from nbdq.qcow2.fields import MAX_L1_TABLE, l1_entries
from nbdq.qcow2.header_area import write_fields
from nbdq.qcow2.writing.tables import Table
from nbdq.qcow2.writing.writable import WritableImage
from nbdq.qcow2.writing.zeroing import Zeroing

_COPIED = np.uint64(COPIED)


def grow(image: WritableImage, zeroing: Zeroing, size: int) -> None:
    """Make the disk ``size`` bytes large; what is new reads as zeros. Durable on return. Bitmaps grow along.

    Requests must stay inside the old size until then. A data file becomes as long as the disk.

    Raises:
        OSError: EINVAL if ``size`` is not larger, or no multiple of 512; EFBIG if the format cannot map so much;
            EOPNOTSUPP as :func:`check_resize`, or if a bitmap cannot grow; else as for a write. The disk has its old
            size then.
    """
    old = image.size
    if size <= old or size % 512:
        raise OSError(errno.EINVAL, f"cannot grow a disk of {old} bytes to {size}", image.path)
    check_resize(image)
    geometry = image.geometry
    entries = l1_entries(size, cluster_bits=geometry.cluster_bits, extended_l2=geometry.extended_l2)
    if entries * 8 > MAX_L1_TABLE:
        raise OSError(errno.EFBIG, f"clusters of {geometry.cluster_size} bytes cannot map {size} bytes", image.path)
    if image.bitmaps is not None:
        image.bitmaps.resize(size)
    try:
        if entries > image.header.l1_size:
            _lengthen_l1(image, entries)
        image.size = size
        _clear(image, zeroing, old, size)
        image.flush()
        set_size(image, size)
    except BaseException:
        image.size = old
        if image.bitmaps is not None:
            image.bitmaps.resize(old)
        raise


def check_resize(image: WritableImage) -> None:
    """Refuse a disk whose size has to stay as it is.

    Raises:
        OSError: EOPNOTSUPP: snapshots of version 2 do not say how large the disk was when they were taken (R3).
    """
    if image.header.snapshot_count and image.header.version < 3:
        raise OSError(errno.EOPNOTSUPP, "cannot resize a v2 image which has snapshots; delete them", image.path)


def set_size(image: WritableImage, size: int) -> None:
    """Let the header say how large the disk is, durably (R-62).

    Raises:
        OSError: a failure that is final; or EROFS.
    """
    image.rewrite_header(lambda storage, header: write_fields(storage, replace(header, size=size)))


def _clear(image: WritableImage, zeroing: Zeroing, old: int, size: int) -> None:
    """Let everything between the two sizes read as zeros."""
    # The rest of the last cluster may hold anything (QEMU never reads it), and so may a longer disk below (S2).
    whole = -(-old // image.cluster_size) * image.cluster_size
    zeroing.abandon(whole)  # what a shrinking that was cut short has left
    hidden = min(size, whole)
    if image.below is not None:
        hidden = max(hidden, min(size, image.below.size))
    if hidden > old:
        zeroing.zero(old, hidden - old, unmap=True, fast=False)
    if image.geometry.has_data_file and not image.data.is_block_device:
        image.data.write_zeros(old, size - old)
        if image.header.data_file_raw and whole < size:
            _map_data_file(image, whole, size)


def _map_data_file(image: WritableImage, start: int, end: int) -> None:
    """Let every cluster of the range be where it is in the data file, which others may write to as well (Q80)."""
    geometry = image.geometry
    step = 2 if geometry.extended_l2 else 1

    def map_part(l1_index: int, first: int, count: int) -> None:
        numbers = np.arange(first, first + count, dtype=np.uint64) + np.uint64(l1_index * geometry.l2_count)
        table = image.mapping.own(l1_index)
        table.values[first * step : (first + count) * step : step] = (
            numbers << np.uint64(geometry.cluster_bits) | _COPIED
        )
        image.mapping.changed(l1_index, first, count)

    for part in image.mapping.by_tables(start, end):
        image.growing(partial(map_part, *part))
        image.relieve()


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

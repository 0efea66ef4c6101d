"""Emptying an image in next to no time, whatever it holds (3.8): new, empty tables, and the file cut off behind them.

QEMU overwrites the tables where they are, under the dirty bit; a crash in between leaves an image to be repaired. Here
they are built behind the end of the file, and the header is switched to them; then again in the front, where the old
ones were. After a crash the image is what it was, or empty.
"""

import errno
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from nbdq.qcow2.features import Autoclear, CryptMethod, Incompatible
from nbdq.qcow2.fields import MAX_REFCOUNT_TABLE
from nbdq.qcow2.format import Header
from nbdq.qcow2.header_area import write_fields
from nbdq.qcow2.refcount_widths import pack
from nbdq.storage import FileStorage

_DIRTY = int(Incompatible.DIRTY)


class _Tables(NamedTuple):
    """Where the tables of an empty image are: refcount blocks, refcount table and L1 table, one behind the other."""

    first: int
    """Number of the first cluster."""
    blocks: tuple[int, ...]
    """Numbers of the refcount blocks: that of the header, and those that count these clusters."""
    table_clusters: int
    l1_clusters: int

    @property
    def table(self) -> int:
        return self.first + len(self.blocks)

    @property
    def l1(self) -> int:
        return self.table + self.table_clusters

    @property
    def end(self) -> int:
        return self.l1 + self.l1_clusters


def can_make_empty(storage: FileStorage, header: Header) -> bool:
    """Whether nothing but guest data would get lost, and there is an end of the file to build behind."""
    return not (
        storage.is_block_device
        or header.is_corrupt
        or header.has_data_file
        or header.snapshot_count
        or header.bitmaps is not None
        or Autoclear.BITMAPS in header.autoclear
        or header.crypt_method is not CryptMethod.NONE
    )


def make_empty(storage: FileStorage, header: Header) -> Header:
    """Let an image hold nothing, so that it reads as its backing file; the header that it has then. Durable on return.

    Nobody else uses the image meanwhile, and :func:`can_make_empty` says that it goes.

    Raises:
        OSError: ENOSPC if there is no room for a second set of tables, EFBIG if that would lie too far behind; then the
            image is what it was. Else the file cannot be written; the image is what it was, or empty.
    """
    assert can_make_empty(storage, header), "the caller has asked"
    front = _plan(header, 1)
    behind = max(-(-storage.size() // header.cluster_size), front.end)
    header = _switch(storage, header, _plan(header, behind))
    header = _switch(storage, header, front)
    storage.truncate(front.end * header.cluster_size)
    storage.sync()
    return header


def _plan(header: Header, first: int) -> _Tables:
    """Tables from cluster ``first`` on, which count themselves and the header.

    Raises:
        OSError: EFBIG if the refcount table would exceed its limit (R-24).
    """
    cluster_size = header.cluster_size
    per_block = cluster_size * 8 >> header.refcount_order
    tables = _Tables(first, (), 0, -(-header.l1_size * 8 // cluster_size))
    while True:  # until the blocks suffice
        last = (tables.end - 1) // per_block
        blocks = tuple(sorted({0, *range(first // per_block, last + 1)}))
        grown = tables._replace(blocks=blocks, table_clusters=-(-(last + 1) * 8 // cluster_size))
        if grown == tables:
            break
        tables = grown
    if tables.table_clusters * cluster_size > MAX_REFCOUNT_TABLE:
        raise OSError(errno.EFBIG, "the image file is too long for new tables behind its end")
    return tables


def _switch(storage: FileStorage, header: Header, tables: _Tables) -> Header:
    """Write empty tables where nothing is, then let the header name them (W4, R-54)."""
    cluster_size = header.cluster_size
    start, length = tables.first * cluster_size, (tables.end - tables.first) * cluster_size
    storage.write_zeros(start, length, allocated=True)
    for offset, data in _contents(header, tables):
        storage.write(offset, data)
    storage.sync()
    return write_fields(
        storage,
        replace(
            header,
            l1_table_offset=tables.l1 * cluster_size if header.l1_size else 0,
            refcount_table_offset=tables.table * cluster_size,
            refcount_table_clusters=tables.table_clusters,
            incompatible=Incompatible(int(header.incompatible) & ~_DIRTY),  # these refcounts are right
        ),
    )


def _contents(header: Header, tables: _Tables) -> Iterator[tuple[int, bytes]]:
    """(host offset, bytes) of everything that is not zero."""
    cluster_size = header.cluster_size
    per_block = cluster_size * 8 >> header.refcount_order
    entries = np.zeros(tables.table_clusters * cluster_size // 8, dtype=">u8")
    for position, number in enumerate(tables.blocks):
        offset = (tables.first + position) * cluster_size
        entries[number] = offset
        clusters = np.arange(number * per_block, (number + 1) * per_block)
        is_used = (clusters == 0) | ((clusters >= tables.first) & (clusters < tables.end))
        yield offset, pack(is_used, header.refcount_order)
    yield tables.table * cluster_size, entries.tobytes()

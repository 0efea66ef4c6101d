"""New images: every option checked, the layout planned as arithmetic, then written so that no crash can fake an image.

A plan is a handful of numbers, whatever the size of the disk; tables are made from it in pieces. Clusters follow each
other without gaps, and each has refcount 1::

    header │ refcount table │ refcount blocks │ L1 table │ L2 tables │ data
    └─ always, in this order ───────────────────────────┘ └─ preallocated ─┘

A small image without preallocation is byte for byte the one that qemu-img makes (4.4). Knows one image file; where it
lies, what it replaces and who else uses it are decided in :mod:`nbdq.chain.create`.
"""

import errno
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from itertools import chain
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from nbdq.errors import NbdqError
from nbdq.qcow2.entries import Geometry
from nbdq.qcow2.features import Autoclear, Compatible, CompressionType, Incompatible
from nbdq.qcow2.fields import (
    FULL_LENGTH,
    MAX_BACKING_NAME,
    MAX_CLUSTER_BITS,
    MAX_L1_TABLE,
    MAX_REFCOUNT_TABLE,
    MIN_CLUSTER_BITS,
    V2_LENGTH,
    l1_entries,
)
from nbdq.qcow2.format import Header, build_header
from nbdq.qcow2.refcount_widths import pack
from nbdq.storage import FileStorage

#: Host offsets have 56 bits (Q33, Q35).
_MAX_OFFSET = 1 << 56
#: What a disk writes whole, so that a header in two halves never exists: it is published with its first sector.
_SECTOR = 512
_COPIED = np.uint64(1 << 63)
#: Entries of a table, and bytes of zeros, that are in memory at once.
_ENTRIES = 1 << 19
_PIECE = 4 << 20

_NEEDS_V3 = "needs version 3: use compat=1.1"


class Preallocation(StrEnum):
    """What of a new image is there before the guest writes (R1)."""

    OFF = "off"
    METADATA = "metadata"
    """Every cluster has its place; the file is sparse."""
    FALLOC = "falloc"
    """The file system promises the room, too."""
    FULL = "full"
    """The room is written with zeros."""


@dataclass(frozen=True, kw_only=True)
class CreateOptions:
    """What a new image is to be. An instance is valid; sizes in bytes.

    Raises:
        NbdqError: the options contradict the format or each other; the text begins with the option's name (4.4).
    """

    size: int
    """Of the disk; rounded up to whole sectors where it is used."""
    version: int = 3
    cluster_size: int = 64 << 10
    refcount_bits: int = 16
    preallocation: Preallocation = Preallocation.OFF
    """At least METADATA with ``data_file_raw``: readers may not ignore the tables (Q80)."""
    lazy_refcounts: bool = False
    compression_type: CompressionType = CompressionType.DEFLATE
    extended_l2: bool = False
    backing_name: str | None = None
    """As it is to be stored; nobody looks whether it exists."""
    backing_format: str | None = None
    data_file_name: str | None = None
    data_file_raw: bool = False

    def __post_init__(self) -> None:
        self._check_geometry()
        self._check_features()
        self._check_names()
        if self.data_file_raw and self.preallocation is Preallocation.OFF:
            object.__setattr__(self, "preallocation", Preallocation.METADATA)

    def _check_geometry(self) -> None:
        size = self.cluster_size
        if size < 1 or size & (size - 1) or not 1 << MIN_CLUSTER_BITS <= size <= 1 << MAX_CLUSTER_BITS:
            raise NbdqError(
                f"cluster_size is {size}; use a power of two between {1 << MIN_CLUSTER_BITS} and"
                f" {1 << MAX_CLUSTER_BITS - 10}k"
            )
        if self.extended_l2 and size < 16384:
            raise NbdqError(f"extended_l2 needs clusters of at least 16384 bytes, but cluster_size is {size}")
        if self.refcount_bits not in (1, 2, 4, 8, 16, 32, 64):
            raise NbdqError(f"refcount_bits is {self.refcount_bits}; use a power of two that does not exceed 64")
        if self.size < 0 or self.l1_size * 8 > MAX_L1_TABLE:
            self.refuse_size()

    def _check_features(self) -> None:
        if self.version not in (2, 3):
            raise NbdqError(f"version is {self.version}; QCOW2 has 2 (compat=0.10) and 3 (compat=1.1)")
        if self.version < 3:
            newer = {
                "extended_l2": self.extended_l2,
                "lazy_refcounts": self.lazy_refcounts,
                f"refcount_bits={self.refcount_bits}": self.refcount_bits != 16,
                "data_file": self.data_file_name is not None,
                "compression_type=zstd": self.compression_type is not CompressionType.DEFLATE,
            }
            for name, wanted in newer.items():
                if wanted:
                    raise NbdqError(f"{name} {_NEEDS_V3}")
        if self.backing_name is not None and self.preallocation is not Preallocation.OFF and not self.extended_l2:
            raise NbdqError("preallocation would hide the backing file; use it with a backing file only if extended_l2")
        if self.data_file_raw and self.data_file_name is None:
            raise NbdqError("data_file_raw requires data_file")
        if self.data_file_raw and self.backing_name is not None:
            raise NbdqError("data_file_raw cannot be used with a backing file, which a raw disk does not have")

    def _check_names(self) -> None:
        if self.backing_format is not None and self.backing_name is None:
            raise NbdqError("backing_fmt cannot be used without a backing file")
        if self.backing_name is not None and self.backing_format is None:
            raise NbdqError("backing_file needs its format; say it with backing_fmt")
        for option, name in (("backing_file", self.backing_name), ("data_file", self.data_file_name)):
            if name is None:
                continue
            if not name:
                raise NbdqError(f"{option} is an empty name")
            if any(c < " " or "\x7f" <= c <= "\x9f" for c in name):
                raise NbdqError(f"{option} has a control character in its name, which no reader should accept")
            if len(name.encode("utf-8", "surrogateescape")) > MAX_BACKING_NAME:
                raise NbdqError(f"{option} has a name longer than {MAX_BACKING_NAME} bytes; use a relative name")

    @property
    def guest_size(self) -> int:
        """Bytes of the disk: whole sectors (Q4)."""
        return -(-self.size // 512) * 512

    @property
    def geometry(self) -> Geometry:
        """How the new image divides guest offsets."""
        return Geometry(
            self.cluster_size.bit_length() - 1, self.extended_l2, self.version, self.data_file_name is not None
        )

    @property
    def l1_size(self) -> int:
        """Entries of the L1 table."""
        return l1_entries(self.guest_size, cluster_bits=self.geometry.cluster_bits, extended_l2=self.extended_l2)

    def refuse_size(self) -> NoReturn:
        """Say that no table of the format can map so much."""
        raise NbdqError(
            f"the image size is too large: {self.size} bytes in clusters of {self.cluster_size};"
            " try using a larger cluster size"
        )


@dataclass(frozen=True)
class Layout:
    """Where everything is in a new image: the number of clusters of each area, from which all offsets follow."""

    options: CreateOptions
    refcount_table_clusters: int
    refcount_block_count: int
    l2_table_count: int
    mapped_cluster_count: int
    """Guest clusters that have a place now: all or none."""

    @property
    def refcount_blocks_offset(self) -> int:
        return (1 + self.refcount_table_clusters) * self.options.cluster_size

    @property
    def l1_offset(self) -> int:
        return self.refcount_blocks_offset + self.refcount_block_count * self.options.cluster_size

    @property
    def l2_offset(self) -> int:
        return self.l1_offset + _l1_clusters(self.options) * self.options.cluster_size

    @property
    def data_offset(self) -> int:
        """Where the guest's clusters begin, which is the end of the metadata."""
        return self.l2_offset + self.l2_table_count * self.options.cluster_size

    @property
    def data_length(self) -> int:
        """Bytes of guest clusters in this file; those of a data file are not counted (Q29)."""
        return 0 if self.options.data_file_name is not None else self.mapped_cluster_count * self.options.cluster_size

    @property
    def cluster_count(self) -> int:
        """Clusters of the file; each has refcount 1, and no others have any."""
        return (self.data_offset + self.data_length) // self.options.cluster_size

    @property
    def file_size(self) -> int:
        """Length of the file. The last cluster may be partial, as after qemu-img, if it is that of the L1 table."""
        if self.data_offset + self.data_length > self.l2_offset:
            return self.data_offset + self.data_length
        return self.l1_offset + self.options.l1_size * 8

    @cached_property
    def header(self) -> Header:
        options = self.options
        features = {
            Incompatible.DATA_FILE: options.data_file_name is not None,
            Incompatible.COMPRESSION_TYPE: options.compression_type is not CompressionType.DEFLATE,
            Incompatible.EXTENDED_L2: options.extended_l2,
        }
        return Header(
            cluster_bits=options.geometry.cluster_bits,
            size=options.guest_size,
            l1_size=options.l1_size,
            l1_table_offset=self.l1_offset if options.l1_size else 0,  # Q41
            refcount_table_offset=options.cluster_size,
            refcount_table_clusters=self.refcount_table_clusters,
            version=options.version,
            backing_name=options.backing_name,
            backing_format=options.backing_format,
            incompatible=Incompatible(sum(bit for bit, wanted in features.items() if wanted)),
            compatible=Compatible.LAZY_REFCOUNTS if options.lazy_refcounts else Compatible.NONE,
            autoclear=Autoclear.DATA_FILE_RAW if options.data_file_raw else Autoclear.NONE,
            refcount_order=options.refcount_bits.bit_length() - 1,
            header_length=FULL_LENGTH if options.version >= 3 else V2_LENGTH,
            compression_type=options.compression_type,
            data_file_name=options.data_file_name,
        )


def plan_image(options: CreateOptions) -> Layout:
    """Place everything; touches no file.

    Raises:
        NbdqError: the tables would exceed the limits of the format, or the names do not fit into the first cluster.
    """
    cluster_size = options.cluster_size
    layout = Layout(options, 0, 0, 0, 0)
    if options.preallocation is not Preallocation.OFF:
        mapped = -(-options.guest_size // cluster_size)
        layout = replace(layout, l2_table_count=options.l1_size, mapped_cluster_count=mapped)
    # Refcount blocks count themselves and their table, too: grow both until they suffice.
    while (
        blocks := -(-layout.cluster_count * options.refcount_bits // (cluster_size * 8))
    ) > layout.refcount_block_count:
        layout = replace(layout, refcount_block_count=blocks, refcount_table_clusters=-(-blocks * 8 // cluster_size))
    last_offset = max(layout.cluster_count, layout.mapped_cluster_count) * cluster_size
    if layout.refcount_table_clusters * cluster_size > MAX_REFCOUNT_TABLE or last_offset > _MAX_OFFSET:
        options.refuse_size()
    try:
        build_header(layout.header)
    except OSError as error:
        raise NbdqError(f"{error.strerror}; use shorter names or a larger cluster_size") from None
    return layout


def create_image(storage: FileStorage, options: CreateOptions) -> Layout:
    """Make a new image of a whole file or device, whatever it held; durable on return. The storage stays the caller's.

    The data file, if there is one, is another storage: see :func:`write_disk`. On failure ``storage`` holds no image.

    Raises:
        NbdqError: as :func:`plan_image`; nothing was touched.
        OSError: a write failed; ENOSPC also for a device that is too small.
    """
    layout = plan_image(options)
    write_tables(storage, layout)
    write_header(storage, layout)
    return layout


def write_tables(storage: FileStorage, layout: Layout) -> None:
    """Write everything durably but the sector that makes an image of it: until :func:`write_header` there is none.

    Raises:
        OSError: as :func:`create_image`.
    """
    if storage.is_block_device:
        end = layout.cluster_count * layout.options.cluster_size
        _check_room(storage, end)
        storage.write_zeros(0, min(_PIECE, end))
        storage.sync()  # as in _empty
        storage.write_zeros(0, end)
    else:
        _empty(storage)
        storage.truncate(layout.file_size)
        storage.reserve(0, min(layout.data_offset, layout.file_size))
    blocks = _offsets(layout.refcount_blocks_offset, 0, layout.refcount_block_count, layout)
    storage.write(layout.options.cluster_size, blocks.astype(">u8").tobytes())
    for offset, piece in chain(_refcounts(layout), _l2_tables(layout)):
        storage.write(offset, piece)
    l2_tables = _offsets(layout.l2_offset, 0, layout.l2_table_count, layout) | _COPIED
    storage.write(layout.l1_offset, l2_tables.astype(">u8").tobytes())
    _reserve_data(storage, layout.data_offset, layout.data_length, layout.options.preallocation)
    if rest := build_header(layout.header)[_SECTOR:]:
        storage.write(_SECTOR, rest)
    storage.sync()


def write_header(storage: FileStorage, layout: Layout) -> None:
    """Turn what :func:`write_tables` wrote into an image: one sector, durable on return.

    Raises:
        OSError: a write failed.
    """
    storage.write(0, build_header(layout.header)[:_SECTOR].ljust(_SECTOR, b"\0"))
    storage.sync()


def write_disk(storage: FileStorage, size: int, preallocation: Preallocation) -> None:
    """Make a raw disk or a data file of ``size`` bytes of zeros of a whole file or device; durable on return.

    A device keeps its contents where nothing is preallocated, as it does with qemu-img; its first 4 KiB, by which
    programs would recognise what it was, become zeros.

    Raises:
        OSError: a write failed; ENOSPC also for a device that is too small.
    """
    if storage.is_block_device:
        _check_room(storage, size)
        if preallocation is Preallocation.METADATA:  # mapped: the guest will see it
            storage.write_zeros(0, size)
    else:
        _empty(storage)
        storage.truncate(size)
    # QEMU finds out the alignment of direct I/O by reading a block that is there.
    storage.write(0, bytes(min(size, 4096)))
    _reserve_data(storage, 0, size, preallocation)
    storage.sync()


def _empty(storage: FileStorage) -> None:
    """Cut a file to nothing, durably: an old header must not outlive its tables."""
    if storage.size():
        storage.truncate(0)
        storage.sync()


def _check_room(device: FileStorage, length: int) -> None:
    if device.size() < length:
        text = f"the device has {device.size()} bytes, but {length} are needed"
        raise OSError(errno.ENOSPC, text, device.path)


def _reserve_data(storage: FileStorage, offset: int, length: int, preallocation: Preallocation) -> None:
    """Find room for guest data that reads as zeros already."""
    if length == 0:
        return
    if preallocation is Preallocation.FALLOC:
        storage.write_zeros(offset, length, allocated=True)
    elif preallocation is Preallocation.FULL:
        zeros = memoryview(bytes(_PIECE))
        for position in range(offset, offset + length, _PIECE):
            storage.write(position, zeros[: offset + length - position])


def _l1_clusters(options: CreateOptions) -> int:
    return -(-options.l1_size * 8 // options.cluster_size)


def _offsets(base: int, first: int, count: int, layout: Layout) -> NDArray[np.uint64]:
    """Host offsets of ``count`` clusters in a row, the first of which is number ``first`` after ``base``."""
    numbers = np.arange(first, first + count, dtype=np.uint64)
    return numbers * np.uint64(layout.options.cluster_size) + np.uint64(base)


def _refcounts(layout: Layout) -> Iterator[tuple[int, bytes]]:
    """The refcount blocks, which are one array: (offset, bytes) with refcount 1 for every cluster (Q26)."""
    order = layout.header.refcount_order
    per_byte = max(8 >> order, 1)
    for first in range(0, layout.cluster_count, _ENTRIES):
        count = min(_ENTRIES, layout.cluster_count - first)
        values = np.zeros(-(-count // per_byte) * per_byte, dtype=np.uint64)
        values[:count] = 1
        yield layout.refcount_blocks_offset + (first << order) // 8, pack(values, order)


def _l2_tables(layout: Layout) -> Iterator[tuple[int, bytes]]:
    """The L2 tables, which are one array: (offset, bytes) that map guest clusters to clusters of data in order.

    With subclusters none is allocated yet: what is below, or nothing, is still what the guest sees (Q47, Q48).
    """
    width = layout.options.geometry.entry_size // 8
    base = 0 if layout.options.data_file_name is not None else layout.data_offset  # Q77
    for first in range(0, layout.mapped_cluster_count, _ENTRIES):
        count = min(_ENTRIES, layout.mapped_cluster_count - first)
        words = np.zeros((count, width), dtype=">u8")
        words[:, 0] = _offsets(base, first, count, layout) | _COPIED
        yield layout.l2_offset + first * width * 8, words.tobytes()

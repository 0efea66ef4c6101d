"""Bitmaps into the file: declared in use while writes are served, stored at the end, removed at once.

The file changes in steps after any of which a crash leaves bitmaps that are in use, bitmaps that nobody believes
because the autoclear bit is off, or right ones (Q69, R-57):

- The bits go to new clusters, and all of it is durable before any directory names them.
- A directory that keeps its length is rewritten where it is, as QEMU does it: the autoclear bit is off meanwhile.
- One of another length goes to a new place, is durable, and then one sector of the header names it (W4).
- Only then what the old directory named is given up.
"""

import errno
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nbdq.errors import CorruptImage, ImageError, UnsupportedImage
from nbdq.qcow2.bitmaps.bits import DirtyBits
from nbdq.qcow2.bitmaps.directory import Bitmap, BitmapFlags, build_directory
from nbdq.qcow2.bitmaps.tables import LOST, Table, data_clusters, read_table, write_bits
from nbdq.qcow2.extensions import BitmapsExtension
from nbdq.qcow2.features import Autoclear
from nbdq.qcow2.fields import SNAPSHOT_ENTRY_SIZE
from nbdq.qcow2.format import Header
from nbdq.qcow2.header_area import set_bitmaps_extension
from nbdq.storage import FileStorage

#: Where the header has its autoclear bits: eight bytes of one sector, which cannot tear (R-54).
_AUTOCLEAR_OFFSET = 88
_AUTOCLEAR = struct.Struct(">Q")


class MetadataImage(Protocol):
    """What storing needs of a ``WritableImage``."""

    @property
    def storage(self) -> FileStorage: ...
    @property
    def header(self) -> Header: ...
    def allocate_metadata(self, cluster_count: int, /) -> int: ...
    def free_metadata(self, host_offset: int, cluster_count: int, /) -> None: ...
    def rewrite_header(self, change: Callable[[FileStorage, Header], Header], /) -> None: ...
    def flush(self) -> None: ...


@dataclass(frozen=True, eq=False)
class Stored:
    """One bitmap as the directory in the file lists it."""

    entry: Bitmap
    """With the flags that it has when nobody writes: only an inconsistent bitmap is marked as in use."""
    table: Table
    """Empty if the bitmap is inconsistent."""


@dataclass(eq=False)
class DirtyBitmap:
    """One bitmap of an image that is written to."""

    name: str
    granularity_bits: int
    bits: DirtyBits | None
    """None if the bitmap is inconsistent."""
    is_enabled: bool
    """Whether writes are marked (Q70)."""
    is_persistent: bool
    stored: Stored | None = None
    """What the file has of it; None if it is new."""

    @property
    def is_recording(self) -> bool:
        return self.is_enabled and self.bits is not None

    @property
    def entry(self) -> Bitmap:
        """What a directory will say of it, but for the place of a table that is not written yet."""
        place = (self.stored.entry.table_offset, self.stored.entry.table_size) if self.stored else (0, 0)
        flags = BitmapFlags.AUTO if self.is_enabled else BitmapFlags(0)
        if self.bits is None:
            flags |= BitmapFlags.IN_USE
        return Bitmap(self.name, self.granularity_bits, flags, *place)


def declare_in_use(storage: FileStorage, header: Header, stored: Sequence[Stored]) -> None:
    """Say in the file, whose directory lists ``stored``, that all bitmaps are in use, so that the guest may write.

    In QEMU's order (Q69): whoever opens the image after a crash within finds no bitmaps, or all of them in use.

    Raises:
        UnsupportedImage: the directory cannot be written anew in its place. Nothing has changed.
        CorruptImage: to give up clusters of the bitmaps would be to give up something else. Nothing has changed.
        OSError: the file cannot be written.
    """
    if all(each.entry.is_inconsistent for each in stored):
        return
    _refuse_overlaps(storage.path, header, stored)
    directory = _directory_in_use(stored)
    assert header.bitmaps is not None, "the directory was read"
    if len(directory) != header.bitmaps.directory_size:
        raise UnsupportedImage(storage.path, "it has names of bitmaps with NUL characters")
    _rewrite_directory(storage, header, directory)


def store_bitmaps(image: MetadataImage, bitmaps: Iterable[DirtyBitmap], in_file: Sequence[Stored]) -> list[Stored]:
    """Write the bits of all persistent bitmaps and let a directory name them, in use no more. No write is under way.

    ``in_file`` is what the directory lists now. What the image no longer needs is freed with its next flush. Bitmaps
    without news keep their clusters.

    Returns:
        What the directory lists then. Durable.

    Raises:
        OSError: ENOSPC, ENOMEM or a failed medium. In the file bitmaps are still in use, or not believed, or stored.
    """
    kept = [each for each in bitmaps if each.is_persistent]
    if not kept and not in_file:
        return []
    if [each.stored for each in kept] == list(in_file) and all(each.bits is None for each in kept):
        return list(in_file)
    with _allocating(image) as allocate:
        stored = [_store_one(image, each, allocate) for each in kept]
        directory = build_directory(each.entry for each in stored)
        place = _write_directory(image, directory, allocate)
        image.flush()
    _name_directory(image, stored, directory, place)
    _free_replaced(image, in_file, stored)
    return stored


def forget_bitmaps(image: MetadataImage, left: Sequence[Stored], in_file: Sequence[Stored]) -> None:
    """Let the directory list ``left``, fewer than ``in_file``, which it lists now; all stay in use. Durable on return.

    Guest writes go on meanwhile.

    Raises:
        OSError: ENOSPC or a failed medium; the directory lists the one or the other.
    """
    directory = _directory_in_use(left)
    with _allocating(image) as allocate:
        place = _write_directory(image, directory, allocate)
        image.flush()
    _name_directory(image, left, directory, place)
    _free_replaced(image, in_file, left)


@contextmanager
def _allocating(image: MetadataImage) -> Iterator[Callable[[int], int]]:
    """A function that gives the host offset of so many contiguous clusters; all are given back if the block fails."""
    allocated: list[tuple[int, int]] = []

    def allocate(cluster_count: int) -> int:
        offset = image.allocate_metadata(cluster_count)
        allocated.append((offset, cluster_count))
        return offset

    try:
        yield allocate
    except (OSError, MemoryError) as error:
        for offset, cluster_count in allocated:
            image.free_metadata(offset, cluster_count)
        if isinstance(error, MemoryError):
            raise OSError(errno.ENOMEM, "no memory to store dirty bitmaps", image.storage.path) from error
        raise


def without_bitmaps(autoclear: Autoclear) -> Autoclear:
    """The bits of a header that does not promise bitmaps."""
    return Autoclear(int(autoclear) & ~int(Autoclear.BITMAPS))  # the complement of a flag has no unknown bits


def write_autoclear(storage: FileStorage, autoclear: Autoclear) -> None:
    """Change these bits of the header, durably.

    Raises:
        OSError: the file cannot be written.
    """
    storage.write(_AUTOCLEAR_OFFSET, _AUTOCLEAR.pack(autoclear))
    storage.sync()


# Directories.


def _directory_in_use(stored: Iterable[Stored]) -> bytes:
    return build_directory(replace(each.entry, flags=each.entry.flags | BitmapFlags.IN_USE) for each in stored)


def _write_directory(image: MetadataImage, directory: bytes, allocate: Callable[[int], int]) -> int | None:
    """Where ``directory`` was written; None if it goes where the old one is, or is empty. Nothing is durable yet."""
    extension = image.header.bitmaps
    if not directory or (extension is not None and len(directory) == extension.directory_size):
        return None
    cluster_size = image.header.cluster_size
    clusters = -(-len(directory) // cluster_size)
    offset = allocate(clusters)
    image.storage.write(offset, directory.ljust(clusters * cluster_size, b"\0"))
    return offset


def _name_directory(image: MetadataImage, listed: Sequence[Stored], directory: bytes, place: int | None) -> None:
    """Let ``directory``, which lists ``listed``, be the one that the header names. Durable.

    If this fails, nobody knows which one that is: both stay allocated.
    """
    old = image.header.bitmaps
    if place is None and listed:
        _rewrite_directory(image.storage, image.header, directory)
        return
    new = BitmapsExtension(len(listed), len(directory), place) if place is not None else None
    if new is None and old is None:
        return
    image.rewrite_header(lambda storage, header: set_bitmaps_extension(storage, header, new))
    if old is not None:
        image.free_metadata(old.directory_offset, -(-old.directory_size // image.header.cluster_size))


def _rewrite_directory(storage: FileStorage, header: Header, directory: bytes) -> None:
    """Replace the directory, of the same length, where it is; while it is half written, the header disowns it.

    Raises:
        OSError: the file cannot be written.
    """
    extension = header.bitmaps
    assert extension is not None, "there is a directory"
    write_autoclear(storage, without_bitmaps(header.autoclear))
    storage.write(extension.directory_offset, directory)
    storage.sync()
    write_autoclear(storage, header.autoclear)


# Bits.


def _store_one(image: MetadataImage, bitmap: DirtyBitmap, allocate: Callable[[int], int]) -> Stored:
    """``bitmap`` as the next directory lists it; its bits are written if the file has others."""
    entry = bitmap.entry
    if bitmap.bits is None:
        assert bitmap.stored is not None, "it was found in the file"
        return bitmap.stored
    if bitmap.stored is not None and not bitmap.bits.changed:
        return replace(bitmap.stored, entry=entry)
    table, offset = write_bits(image.storage, bitmap.bits, cluster_size=image.header.cluster_size, allocate=allocate)
    return Stored(replace(entry, table_offset=offset, table_size=len(table)), table)


def _free_replaced(image: MetadataImage, old: Sequence[Stored], new: Sequence[Stored]) -> None:
    """Give up the clusters that bitmaps have in ``old`` only."""
    header = image.header
    known = {each.entry.name: each for each in new}
    if any(each.entry.is_inconsistent and each.entry.name not in known for each in old):
        old, new = _with_tables(image, old), _with_tables(image, new)
    unused = np.setdiff1d(_clusters(old, header), _clusters(new, header))
    for offset, cluster_count in _runs(unused, header.cluster_size):
        image.free_metadata(offset, cluster_count)


def _with_tables(image: MetadataImage, stored: Iterable[Stored]) -> list[Stored]:
    """The same as if none were inconsistent. One whose table makes no sense is left out: its clusters leak."""
    found = []
    for each in stored:
        if each.entry.is_inconsistent:
            try:
                table = read_table(image.storage, image.header, each.entry)
            except (ImageError, OSError):
                continue
            each = Stored(replace(each.entry, flags=BitmapFlags(0)), table)
        found.append(each)
    return found


def _refuse_overlaps(path: str, header: Header, stored: Iterable[Stored]) -> None:
    """See that no two bitmaps share a cluster, and none has one that the header names for something else.

    Raises:
        CorruptImage: they do.
    """
    areas = [
        (0, header.cluster_size),
        (header.l1_table_offset, header.l1_size * 8),
        (header.refcount_table_offset, header.refcount_table_clusters * header.cluster_size),
        (header.snapshots_offset, header.snapshot_count * SNAPSHOT_ENTRY_SIZE),
    ]
    if header.bitmaps is not None:
        areas.append((header.bitmaps.directory_offset, header.bitmaps.directory_size))
    others = [np.arange(offset, offset + length, header.cluster_size, dtype=np.uint64) for offset, length in areas]
    places, counts = np.unique(np.concatenate([_clusters(stored, header), *others]), return_counts=True)
    if counts.max() > 1:
        place = int(places[counts.argmax()])
        raise CorruptImage(path, f"its dirty bitmaps share the cluster at {place:#x} with something else", LOST)


def _clusters(stored: Iterable[Stored], header: Header) -> NDArray[np.uint64]:
    """Host offsets of the clusters that the tables and data of consistent bitmaps occupy."""
    found = [np.zeros(0, dtype=np.uint64)]
    for each in stored:
        if not each.entry.is_inconsistent:
            start, end = each.entry.table_offset, each.entry.table_offset + len(each.table) * 8
            found += [np.arange(start, end, header.cluster_size, dtype=np.uint64), data_clusters(each.table)]
    return np.concatenate(found)


def _runs(clusters: NDArray[np.uint64], cluster_size: int) -> Iterator[tuple[int, int]]:
    """(host offset, cluster count) of neighbours among ascending ``clusters``."""
    breaks = np.flatnonzero(np.diff(clusters) != cluster_size) + 1
    for run in np.split(clusters, breaks):
        if len(run):
            yield int(run[0]), len(run)

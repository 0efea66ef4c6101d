"""The persistent bitmaps of an image that is written to: taken over at open, marked by every write, stored at the end.

While writes are served the file says of every bitmap that it is in use (Q69), so that after a crash nobody believes
bits that miss writes: a bitmap may say too much, never too little (R-57). The file changes in steps after any of which
a crash leaves bitmaps that are in use, bitmaps that nobody believes because the autoclear bit is off, or right ones.
"""

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nbdq.errors import CorruptImage, UnsupportedImage
from nbdq.qcow2.bitmaps.bits import DirtyBits, packed_length
from nbdq.qcow2.bitmaps.directory import Bitmap, BitmapFlags, build_directory, iterate_bitmaps
from nbdq.qcow2.bitmaps.tables import LOST, Table, data_clusters, read_bits, read_table, write_bits
from nbdq.qcow2.features import Autoclear
from nbdq.qcow2.fields import SNAPSHOT_ENTRY_SIZE
from nbdq.qcow2.format import Header
from nbdq.storage import FileStorage

#: Memory for the bits of all bitmaps of one image, as much as QEMU allows for a single one (Q68). Where nothing was
#: ever written bits take none.
MAX_MEMORY = 512 << 20

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
    def flush(self) -> None: ...


class TakenOver(NamedTuple):
    """What :func:`take_over_bitmaps` made of an image."""

    header: Header
    """As it is in the file now."""
    bitmaps: "DirtyBitmaps | None"
    """None if there are none to be marked or stored."""
    lost: str | None
    """Why the image had to lose its bitmaps, to be logged as a warning."""


@dataclass(frozen=True)
class _Tracked:
    """One bitmap of the directory."""

    entry: Bitmap
    """As in the file, but that only an inconsistent one is marked as in use."""
    bits: DirtyBits | None
    """None if the bitmap is inconsistent."""
    table: Table
    """As in the file; empty if the bitmap is inconsistent."""


def take_over_bitmaps(storage: FileStorage, header: Header) -> TakenOver:
    """Load the bitmaps of an image that is about to be written to, and declare them in use; the first step of writing.

    An image whose bitmaps cannot be maintained loses them: its autoclear bit is cleared, so that nobody believes
    them (Q70, R-57), and their clusters leak.

    Raises:
        InvalidImage, CorruptImage: directory or a table breaks a rule on which QEMU refuses the image (V24).
        OSError: the file cannot be read or written.
    """
    if header.bitmaps is None:
        if Autoclear.BITMAPS not in header.autoclear:
            return TakenOver(header, None, None)
        reason = "it promises bitmaps, but has no directory of them"  # (Q16)
    else:
        try:
            bitmaps = DirtyBitmaps.load(storage, header)
            return TakenOver(bitmaps.begin_writing(storage, header), bitmaps, None)
        except UnsupportedImage as error:
            reason = error.what
        except MemoryError:
            reason = "there is not enough memory for its bitmaps"
    header = replace(header, autoclear=_without_bitmaps(header.autoclear), bitmaps=None)
    _write_autoclear(storage, header.autoclear)
    return TakenOver(header, None, reason)


class DirtyBitmaps:
    """All bitmaps of one image, in directory order.

    They can be asked at any time, by any thread. Between :meth:`begin_writing` and :meth:`store` they must be told of
    every write.
    """

    def __init__(self, bitmaps: Iterable[_Tracked]) -> None:
        """For :meth:`load`."""
        self._bitmaps = list(bitmaps)
        self._marked: list[DirtyBits] | None = None  # of the enabled bitmaps, while writes are served

    @classmethod
    def load(cls, storage: FileStorage, header: Header, *, max_memory: int = MAX_MEMORY) -> "DirtyBitmaps":
        """Read the bits of every consistent bitmap. Keeps no reference to ``storage``.

        Raises:
            InvalidImage, CorruptImage: directory or a table breaks a rule; the message names the bitmap.
            UnsupportedImage: a bitmap has extra data, or the bits need more than ``max_memory`` bytes.
            OSError: the file cannot be read.
        """
        found = []
        memory = 0
        for entry in iterate_bitmaps(storage, header):
            if entry.is_inconsistent:
                found.append(_Tracked(entry, None, np.zeros(0, dtype=np.uint64)))
                continue
            memory += packed_length(header.guest_size, entry.granularity_bits)
            if memory > max_memory:
                raise UnsupportedImage(storage.path, f"its bitmaps need more than {max_memory} bytes of memory")
            table = read_table(storage, header, entry)
            found.append(_Tracked(entry, read_bits(storage, header, entry, table), table))
        return cls(found)

    def find(self, name: str) -> DirtyBits | None:
        """The bits of the bitmap called ``name``; None if there is no such bitmap.

        Raises:
            ExportError: it is inconsistent.
        """
        for tracked in self._bitmaps:
            if tracked.entry.name == name:
                tracked.entry.check_consistent()
                return tracked.bits
        return None

    @property
    def inconsistent(self) -> list[str]:
        """Names of the bitmaps whose bits are worthless; they stay in the image as they are."""
        return [tracked.entry.name for tracked in self._bitmaps if tracked.bits is None]

    def begin_writing(self, storage: FileStorage, header: Header) -> Header:
        """Declare in the file that the bitmaps are in use; then, and not before, the guest may write.

        In QEMU's order (Q69): whoever opens the image after a crash within finds no bitmaps, or all of them in use.
        Returns the header that the file has now, which is ``header``.

        Raises:
            UnsupportedImage: the directory cannot be written anew in its place. Nothing has changed.
            CorruptImage: to give up clusters of the bitmaps would be to give up something else. Nothing has changed.
            OSError: the file cannot be written.
        """
        assert self._marked is None, "bitmaps are in use already"
        consistent = [tracked for tracked in self._bitmaps if tracked.bits is not None]
        if consistent:
            _refuse_overlaps(storage.path, header, consistent)
            entries = [tracked.entry for tracked in self._bitmaps]
            _rewrite_directory(
                storage, header, [replace(entry, flags=entry.flags | BitmapFlags.IN_USE) for entry in entries]
            )
        self._marked = [each.bits for each in consistent if each.bits and BitmapFlags.AUTO in each.entry.flags]
        return header

    def mark(self, offset: int, length: int) -> None:
        """Note in all enabled bitmaps that a range, not empty, is about to change. Any thread; before the change.

        A disabled bitmap, one without the flag AUTO, stays as it is (Q70).
        """
        assert self._marked is not None, "a write before begin_writing, or after store"
        for bits in self._marked:
            bits.mark(offset, length)

    def store(self, image: MetadataImage) -> None:
        """Write all bits to ``image`` and declare the bitmaps in use no more, in an order that no crash can harm.

        No guest write may be under way. After this, successful or not, :meth:`begin_writing` comes before the next
        one. What the image no longer needs is freed with its next flush. Bitmaps without news keep their clusters.

        Raises:
            OSError: ENOSPC or a failed medium. In the file the bitmaps are still in use, or not believed; here they
                are as before.
        """
        assert self._marked is not None, "bitmaps are not in use"
        self._marked = None
        if all(tracked.bits is None for tracked in self._bitmaps):
            return
        allocated: list[tuple[int, int]] = []

        def allocate(cluster_count: int) -> int:
            offset = image.allocate_metadata(cluster_count)
            allocated.append((offset, cluster_count))
            return offset

        try:
            stored = [_store_one(image, tracked, allocate) for tracked in self._bitmaps]
            image.flush()
        except OSError:
            for offset, cluster_count in allocated:
                image.free_metadata(offset, cluster_count)
            raise
        # If this fails, nobody knows to which clusters the file refers: old and new ones stay allocated.
        _rewrite_directory(image.storage, image.header, [tracked.entry for tracked in stored])
        unused = np.setdiff1d(_clusters(self._bitmaps, image.header), _clusters(stored, image.header))
        self._bitmaps = stored
        for tracked in stored:
            if tracked.bits is not None:
                tracked.bits.changed = False
        for offset, cluster_count in _runs(unused, image.header.cluster_size):
            image.free_metadata(offset, cluster_count)


def _store_one(image: MetadataImage, tracked: _Tracked, allocate: Callable[[int], int]) -> _Tracked:
    """``tracked`` as the next directory lists it."""
    if tracked.bits is None or not tracked.bits.changed:
        return tracked
    table, offset = write_bits(image.storage, tracked.bits, cluster_size=image.header.cluster_size, allocate=allocate)
    return replace(tracked, entry=replace(tracked.entry, table_offset=offset), table=table)


def _without_bitmaps(autoclear: Autoclear) -> Autoclear:
    return Autoclear(int(autoclear) & ~int(Autoclear.BITMAPS))  # the complement of a flag has no unknown bits


def _write_autoclear(storage: FileStorage, autoclear: Autoclear) -> None:
    storage.write(_AUTOCLEAR_OFFSET, _AUTOCLEAR.pack(autoclear))
    storage.sync()


def _rewrite_directory(storage: FileStorage, header: Header, entries: Iterable[Bitmap]) -> None:
    """Replace the entries of the directory where it is; while it is half written, the header disowns it.

    Raises:
        UnsupportedImage: it would need another place. Nothing has changed.
        OSError: the file cannot be written.
    """
    extension = header.bitmaps
    assert extension is not None, "the directory was read"
    directory = build_directory(entries)
    if len(directory) != extension.directory_size:
        raise UnsupportedImage(storage.path, "it has names of bitmaps with NUL characters")
    _write_autoclear(storage, _without_bitmaps(header.autoclear))
    storage.write(extension.directory_offset, directory)
    storage.sync()
    _write_autoclear(storage, header.autoclear)


def _refuse_overlaps(path: str, header: Header, bitmaps: Iterable[_Tracked]) -> None:
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
    places, counts = np.unique(np.concatenate([_clusters(bitmaps, header), *others]), return_counts=True)
    if counts.max() > 1:
        place = int(places[counts.argmax()])
        raise CorruptImage(path, f"its dirty bitmaps share the cluster at {place:#x} with something else", LOST)


def _clusters(bitmaps: Iterable[_Tracked], header: Header) -> NDArray[np.uint64]:
    """Host offsets of the clusters that the tables and data of consistent bitmaps occupy."""
    found = [np.zeros(0, dtype=np.uint64)]
    for tracked in bitmaps:
        if tracked.bits is not None:
            start, end = tracked.entry.table_offset, tracked.entry.table_offset + len(tracked.table) * 8
            found += [np.arange(start, end, header.cluster_size, dtype=np.uint64), data_clusters(tracked.table)]
    return np.concatenate(found)


def _runs(clusters: NDArray[np.uint64], cluster_size: int) -> Iterator[tuple[int, int]]:
    """(host offset, cluster count) of neighbours among ascending ``clusters``."""
    breaks = np.flatnonzero(np.diff(clusters) != cluster_size) + 1
    for run in np.split(clusters, breaks):
        if len(run):
            yield int(run[0]), len(run)

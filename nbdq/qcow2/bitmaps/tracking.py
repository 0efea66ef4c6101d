"""The dirty bitmaps of an image that is written to: taken over at open, marked by every write, stored at the end.

While writes are served the file says of every bitmap that it is in use (Q69), so that after a crash nobody believes
bits that miss writes: a bitmap may say too much, never too little (R-57). What administrators change meanwhile is
changed in memory, as in QEMU, and comes to the file with :meth:`DirtyBitmaps.store`; only a removed bitmap leaves it at
once.

A change that decides which writes are marked (adding, enabling, clearing, …) takes effect for requests that begin after
it. Those that had begun may still change the disk without being marked: who wants to rely on the change has drained the
disk, or waits for them afterwards (``WritableImage.barrier``; :mod:`nbdq.qcow2.bitmaps.bits` has the argument).
"""

import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from nbdq.errors import NotFound, OperationError, UnsupportedImage, printable
from nbdq.qcow2.bitmaps.bits import DirtyBits, packed_length
from nbdq.qcow2.bitmaps.directory import iterate_bitmaps
from nbdq.qcow2.bitmaps.limits import (
    MAX_MEMORY,
    check_new_bitmap,
    check_persistence,
    default_granularity_bits,
    memory_needed,
)
from nbdq.qcow2.bitmaps.storing import (
    DirtyBitmap,
    MetadataImage,
    Stored,
    declare_in_use,
    forget_bitmaps,
    store_bitmaps,
)
from nbdq.qcow2.bitmaps.tables import read_bits, read_table
from nbdq.qcow2.format import Header
from nbdq.storage import FileStorage

#: Takes a change back; changes are undone in reverse order, with the disk drained since. It is given the bitmaps of the
#: image, which are other ones than those that were changed if the image was opened anew (:meth:`DirtyBitmaps.adopt`).
Undo = Callable[["DirtyBitmaps"], object]


class BitmapState(NamedTuple):
    """One bitmap, for those who list them."""

    name: str
    granularity: int
    """Guest bytes for one bit."""
    dirty_length: int
    """Guest bytes that are dirty; 0 if the bitmap is inconsistent."""
    is_recording: bool
    is_persistent: bool
    is_inconsistent: bool


class DirtyBitmaps:
    """All bitmaps of one image, in directory order, then in the order in which they were added; and what jobs track.

    They can be asked and changed at any time, by any thread. Between :meth:`begin_writing` and :meth:`store` they must
    be told of every write.
    """

    def __init__(self, path: str, header: Header | None, *, size: int) -> None:
        """No bitmaps yet, of the image at ``path``, a disk of ``size`` bytes; for a raw one there is no header.

        :meth:`begin_writing`, or :meth:`begin_marking` if no file has bitmaps, comes before the first mark.
        """
        self.size = size
        self._path = path
        self._header = header
        # These are replaced as a whole, so that nobody who looks needs a lock.
        self._bitmaps: tuple[DirtyBitmap, ...] = ()
        self._trackers: tuple[DirtyBits, ...] = ()
        self._marked: tuple[DirtyBits, ...] | None = None
        self._in_file: list[Stored] = []
        self._is_stored = True
        self._lock = threading.RLock()
        """Which bitmaps there are, and what they are; not their bits. Nothing is waited for under it."""
        self._file_lock = threading.Lock()  # what the file lists; taken before the lock of the image, and `_lock`

    @classmethod
    def load(cls, storage: FileStorage, header: Header, *, max_memory: int = MAX_MEMORY) -> "DirtyBitmaps":
        """Read the bits of every consistent bitmap. Keeps no reference to ``storage``.

        Raises:
            InvalidImage, CorruptImage: directory or a table breaks a rule; the message names the bitmap.
            UnsupportedImage: a bitmap has extra data, or the bits need more than ``max_memory`` bytes.
            OSError: the file cannot be read.
        """
        found = cls(storage.path, header, size=header.guest_size)
        loaded = []
        memory = 0
        for entry in iterate_bitmaps(storage, header):
            bits, table = None, np.zeros(0, dtype=np.uint64)
            if not entry.is_inconsistent:
                memory += packed_length(header.guest_size, entry.granularity_bits)
                if memory > max_memory:
                    raise UnsupportedImage(storage.path, f"its bitmaps need more than {max_memory} bytes of memory")
                table = read_table(storage, header, entry)
                bits = read_bits(storage, header, entry, table)
            stored = Stored(entry, table)
            found._in_file.append(stored)
            loaded.append(
                DirtyBitmap(
                    entry.name,
                    entry.granularity_bits,
                    bits,
                    is_enabled=entry.is_enabled,
                    is_persistent=True,
                    stored=stored,
                )
            )
        found._bitmaps = tuple(loaded)
        return found

    # Between the image and its file.

    def begin_writing(self, storage: FileStorage, header: Header) -> Header:
        """Declare in the file that the bitmaps are in use; then, and not before, the guest may write.

        Returns the header that the file has now, which is ``header``.

        Raises:
            UnsupportedImage, CorruptImage, OSError: as :func:`nbdq.qcow2.bitmaps.storing.declare_in_use`.
        """
        declare_in_use(storage, header, self._in_file)
        self.begin_marking()
        return header

    def begin_marking(self) -> None:
        """Be told of writes from now on; the file has no bitmaps, or says that they are in use."""
        assert self._marked is None, "bitmaps are in use already"
        with self._lock:
            self._is_stored = False
            self._marked = ()
            self._choose_marked()

    def mark(self, offset: int, length: int) -> None:
        """Note in all enabled bitmaps that a range, not empty, is about to change; before it does.

        Any thread; under the pin of the request. A disabled bitmap stays as it is (Q70).
        """
        assert self._marked is not None, "a write before begin_writing, or after store"
        for bits in self._marked:
            bits.mark(offset, length)

    def _choose_marked(self) -> None:
        if self._marked is not None:
            recording = [each.bits for each in self._bitmaps if each.is_recording and each.bits is not None]
            self._marked = (*recording, *self._trackers)

    def store(self, image: MetadataImage) -> None:
        """Write all bits to ``image`` and declare the bitmaps in use no more, in an order that no crash can harm.

        No guest write may be under way, and no change of the bitmaps. After this, successful or not,
        :meth:`begin_writing` comes before the next one. What the image no longer needs is freed with its next flush.
        Bitmaps without news keep their clusters. What is stored already is not stored again; what could not be, is
        tried again.

        Raises:
            OSError: ENOSPC or a failed medium. In the file the bitmaps are still in use, or not believed; here they
                are as before.
        """
        with self._file_lock:
            if self._is_stored:
                return
            self._marked = None
            self._in_file = store_bitmaps(image, self._bitmaps, self._in_file)
            by_name = {stored.entry.name: stored for stored in self._in_file}
            for each in self._bitmaps:
                each.stored = by_name.get(each.name)
                if each.stored is not None and each.bits is not None:
                    each.bits.changed = False
            self._is_stored = True

    def forget_removed(self, image: MetadataImage) -> None:
        """Make durable that bitmaps were removed: the file lists them no more, not even as inconsistent.

        Guest writes go on. Until this was called, :meth:`remove` can be undone.

        Raises:
            OSError: ENOSPC or a failed medium; the bitmaps are gone with the next :meth:`store` at the latest.
        """
        with self._file_lock:
            present = {id(each.stored) for each in self._bitmaps}
            left = [stored for stored in self._in_file if id(stored) in present]
            if len(left) < len(self._in_file):
                forget_bitmaps(image, left, self._in_file)
                self._in_file = left

    # Asking.

    def __iter__(self) -> Iterator[BitmapState]:
        for each in self._bitmaps:
            yield BitmapState(
                each.name,
                1 << each.granularity_bits,
                each.bits.dirty_length if each.bits is not None else 0,
                each.is_recording,
                each.is_persistent,
                each.bits is None,
            )

    @property
    def is_empty(self) -> bool:
        """Whether there are no bitmaps, and no jobs that track."""
        return not self._bitmaps and not self._trackers

    def find(self, name: str) -> DirtyBits | None:
        """The bits of the bitmap called ``name``; None if there is no such bitmap. They stay the same object.

        Raises:
            ExportError: it is inconsistent.
        """
        for each in self._bitmaps:
            if each.name == name:
                each.entry.check_consistent()
                return each.bits
        return None

    @property
    def inconsistent(self) -> list[str]:
        """Names of the bitmaps whose bits are worthless; they stay in the image as they are."""
        return [each.name for each in self._bitmaps if each.bits is None]

    # Changing, in QEMU's words (4.12). Each returns how it is undone.

    def add(
        self, name: str, *, granularity_bits: int | None = None, persistent: bool = False, disabled: bool = False
    ) -> Undo:
        """A new bitmap, clean. Without ``granularity_bits`` a bit is for a cluster, but for 4 to 64 KiB.

        A persistent one comes to the file with :meth:`store`.

        Raises:
            OperationError: there is one of that name, the image cannot keep it, or a limit of QEMU is passed (Q68).
        """
        if granularity_bits is None:
            granularity_bits = default_granularity_bits(self._header)
        with self._lock:
            check_new_bitmap(self._bitmaps, name, granularity_bits, size=self.size)
            if persistent:
                check_persistence(self._bitmaps, name, path=self._path, header=self._header)
            bits = DirtyBits(self.size, granularity_bits)
            bits.changed = True  # nothing is stored yet
            new = DirtyBitmap(name, granularity_bits, bits, is_enabled=not disabled, is_persistent=persistent)
            self._bitmaps += (new,)
            self._choose_marked()
        return lambda now: now.remove(name)

    def remove(self, name: str) -> Undo:
        """Do without a bitmap; also without one that is inconsistent. The file follows in :meth:`forget_removed`.

        Raises:
            NotFound: there is none of that name.
        """
        with self._lock:
            found = self._named(name)
            position = self._bitmaps.index(found)
            self._bitmaps = tuple(each for each in self._bitmaps if each is not found)
            self._choose_marked()
        return lambda now: now._put_back(found, position)

    def clear(self, name: str) -> Undo:
        """Forget all that was marked.

        Raises:
            NotFound, OperationError: there is no such bitmap, or it is inconsistent.
        """
        bits = self.usable(name)
        old = bits.clear()
        return lambda now: now.usable(name).restore(old | now.usable(name).packed)

    def enable(self, name: str) -> Undo:
        """Mark writes from now on.

        Raises:
            NotFound, OperationError: there is no such bitmap, or it is inconsistent.
        """
        return self._set_enabled(name, True)

    def disable(self, name: str) -> Undo:
        """Mark no writes from now on: what is marked stays as it is.

        Raises:
            NotFound, OperationError: there is no such bitmap, or it is inconsistent.
        """
        return self._set_enabled(name, False)

    def merge(self, target: str, sources: Sequence[DirtyBits]) -> Undo:
        """Mark in ``target`` all that is marked in any of ``sources``, of this image or others. All or nothing.

        Raises:
            NotFound, OperationError: there is no such target, it is inconsistent, or a source has another size.
        """
        bits = self.usable(target)
        for source in sources:
            if source.size != bits.size:
                raise OperationError(
                    f"Bitmaps are of different sizes (destination size is {bits.size}, source size is {source.size}) "
                    "and can't be merged"
                )
        old = bits.merge(sources)
        return lambda now: now.usable(target).restore(old)

    def usable(self, name: str) -> DirtyBits:
        """The bits of a bitmap that must be there.

        Raises:
            NotFound, OperationError: there is no such bitmap, or it is inconsistent.
        """
        bits = self._named(name).bits
        if bits is None:
            raise OperationError(
                f"Bitmap '{printable(name)}' is inconsistent and cannot be used; remove it with "
                "block-dirty-bitmap-remove, and make a full backup"
            )
        return bits

    def resize(self, size: int) -> None:
        """Fit a disk of ``size`` bytes: what is new is clean, what is behind the end is forgotten.

        Requests may go on where the smaller of both disks is. What the file has of the bitmaps fits again after
        :meth:`store`; until then they are in use there.

        Raises:
            OSError: EOPNOTSUPP if a bitmap is inconsistent, EFBIG if one would be too large. Nothing has changed.
        """
        with self._lock:
            if bad := self.inconsistent:
                what = f"Bitmap '{printable(bad[0])}' is inconsistent and cannot be resized; remove it"
                raise OSError(errno.EOPNOTSUPP, what, self._path)
            if size > self.size and memory_needed(self._bitmaps, size) > MAX_MEMORY:
                raise OSError(errno.EFBIG, "the dirty bitmaps would be too large; remove some", self._path)
            for each in self._bitmaps:
                if each.bits is not None:
                    each.bits.resize(size)
            for tracker in self._trackers:
                tracker.resize(size)
            self.size = size

    def adopt(self, before: "DirtyBitmaps") -> None:
        """Go on with the bits that ``before`` had when the same image was open: nobody has written to it since.

        So transient bitmaps and trackers survive, exports go on showing what is marked, and bits that could not be
        stored are not lost.
        """
        with self._lock:
            mine = {each.name: each for each in self._bitmaps}
            for each in before._bitmaps:
                if each.bits is None:
                    continue
                found = mine.get(each.name)
                each.bits.changed |= found is None or found.bits is None
                if found is None:
                    self._bitmaps += (replace(each, stored=None),)
                else:
                    found.bits, found.is_enabled = each.bits, each.is_enabled
            self._trackers += before._trackers
            for bits in (*(each.bits for each in self._bitmaps), *self._trackers):
                if bits is not None and bits.size != self.size:
                    bits.resize(self.size)
            self._choose_marked()

    # For jobs.

    def track(self, granularity_bits: int) -> DirtyBits:
        """Bits that are marked from now on, clean, and known to the caller only; until :meth:`untrack`.

        The caller waits for requests that had begun before (``WritableImage.barrier``).
        """
        with self._lock:
            tracker = DirtyBits(self.size, granularity_bits)
            self._trackers += (tracker,)
            self._choose_marked()
            return tracker

    def untrack(self, tracker: DirtyBits) -> None:
        """Mark ``tracker``, one of :meth:`track`, no more. Idempotent."""
        with self._lock:
            self._trackers = tuple(each for each in self._trackers if each is not tracker)
            self._choose_marked()

    # Within.

    def _named(self, name: str) -> DirtyBitmap:
        for each in self._bitmaps:
            if each.name == name:
                return each
        raise NotFound(f"Dirty bitmap '{printable(name)}' not found")

    def _put_back(self, bitmap: DirtyBitmap, position: int) -> None:
        """Undo a removal. An inconsistent bitmap that has left the file meanwhile stays away: it is worth nothing."""
        with self._lock:
            if all(bitmap.stored is not each for each in self._in_file):
                if bitmap.bits is None:
                    return
                bitmap.stored, bitmap.bits.changed = None, True
            self._bitmaps = (*self._bitmaps[:position], bitmap, *self._bitmaps[position:])
            self._choose_marked()

    def _set_enabled(self, name: str, is_enabled: bool) -> Undo:
        with self._lock:
            self.usable(name)
            bitmap = self._named(name)
            was_enabled, bitmap.is_enabled = bitmap.is_enabled, is_enabled
            self._choose_marked()
        return lambda now: now._set_enabled(name, was_enabled)

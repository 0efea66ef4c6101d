"""A guest's write that the event loop carries out itself: to new clusters, if nothing has to be waited for.

The same three steps as in :mod:`nbdq.qcow2.writing.guest_writes`, all under the lock, because what is written goes no
further than the page cache. Whatever would have to be looked up in the file, freed, inflated or flushed first is left
to a thread that may wait.
"""

from collections.abc import Callable
from typing import NamedTuple

from nbdq.qcow2.entries import ALL_SUBCLUSTERS, OFFSET_MASK, READS_ZERO, SUBCLUSTERS
from nbdq.qcow2.writing.guest_writes import GuestWrites, NewClusters
from nbdq.qcow2.writing.mapping import L2Table
from nbdq.qcow2.writing.refcounts import BrokenRefcounts
from nbdq.qcow2.writing.writable import WritableImage

#: How long a write that should not wait waits for the lock. Whoever holds it mostly needs nothing but the interpreter,
#: which waiting gives up; without that a single write in the pool sends all that follow there, too.
_LOCK_SECONDS = 0.0002
_ZEROS = memoryview(bytes(2 << 20))


class _Span(NamedTuple):
    """A guest range ``[start, stop)`` that has to be written so that ``part`` may be named."""

    part: NewClusters
    start: int
    stop: int
    head_is_zero: bool
    """What is in front of the guest's data in its first granule reads as zeros, whatever is below."""
    tail_is_zero: bool


class InlineWrites:
    """Writes to one image by one thread that does not wait."""

    def __init__(self, image: WritableImage, writes: GuestWrites) -> None:
        self._image = image
        self._writes = writes
        geometry = image.geometry
        self._bits = geometry.cluster_bits
        self._l2_count = geometry.l2_count
        self._extended = geometry.extended_l2
        self._granule = geometry.granule
        self._data_file = geometry.has_data_file
        #: What an entry may be where nothing is; version 2 has no zeros (Q38).
        self._free_flags = READS_ZERO if geometry.version >= 3 else 0
        #: One granule, to be put together under the lock.
        self._scratch = memoryview(bytearray(geometry.granule))

    def write(self, offset: int, view: memoryview, read_below: Callable[[int, memoryview], bool]) -> bool:
        """Write to new clusters if nothing has to be waited for but the lock, shortly; False, and nothing done, if not.

        ``read_below`` fills a view without waiting, or says that it cannot. The lock is held meanwhile: what is written
        here goes no further than the page cache.

        Raises:
            OSError: as :meth:`GuestWrites.write`.
        """
        image = self._image
        if self._data_file or not image.lock.acquire(timeout=_LOCK_SECONDS):
            return False
        try:
            first = offset >> self._bits
            count = (offset + len(view) - 1 >> self._bits) - first + 1
            l1_index, index = divmod(first, self._l2_count)
            table = image.mapping.tables.get(l1_index)
            if table is None or not table.is_own or image.is_corrupt or image.is_pressed:
                return False
            if index + count > self._l2_count or (
                image.in_flight and any(first + number in image.in_flight for number in range(count))
            ):
                return False
            span = self._span_of_subclusters if self._extended else self._span_of_clusters
            found = span(table, index, first, count, offset, len(view))
            return found is not None and self._write_span(found, table, index, offset, view, read_below)
        except BrokenRefcounts as error:
            raise image.corruption(str(error)) from error
        finally:
            image.lock.release()

    def _span_of_clusters(
        self, table: L2Table, index: int, first: int, count: int, offset: int, length: int
    ) -> _Span | None:
        entries = [table.words[index + number] for number in range(count)]
        if any(entry & ~self._free_flags for entry in entries):  # something is there, to be freed or copied
            return None
        run = self._image.allocator.allocate_at_once(count)
        if run is None:
            return None
        part = NewClusters(first, count, run.first << self._bits, run, is_unwritten=run.is_fresh)
        start = first << self._bits
        return _Span(part, start, start + (count << self._bits), bool(entries[0]), bool(entries[-1]))

    def _span_of_subclusters(
        self, table: L2Table, index: int, first: int, count: int, offset: int, length: int
    ) -> _Span | None:
        """Of one cluster, that is new or has unused subclusters."""
        if count > 1:
            return None
        entry, bitmap = table.words[2 * index], table.words[2 * index + 1]
        allocated = bitmap & ALL_SUBCLUSTERS
        if not entry and not allocated:
            run = self._image.allocator.allocate_at_once(1)
            if run is None:
                return None
            part = NewClusters(first, 1, run.first << self._bits, run, is_unwritten=run.is_fresh)
        elif self._writes.has_own_host(table, index) and index not in table.forbidden:
            if self._writes.is_new_metadata(table, index):
                return None
            part = NewClusters(first, 1, entry & OFFSET_MASK, None, is_unwritten=False)
        else:
            return None
        granule, cluster = self._granule, first << self._bits
        low, high = (offset - cluster) // granule, (offset - cluster + length - 1) // granule
        return _Span(
            part,
            # The rest of a subcluster that is in use stays as it is.
            offset if allocated >> low & 1 else cluster + low * granule,
            offset + length if allocated >> high & 1 else cluster + (high + 1) * granule,
            bool(bitmap >> SUBCLUSTERS + low & 1),
            bool(bitmap >> SUBCLUSTERS + high & 1),
        )

    def _write_span(
        self,
        span: _Span,
        table: L2Table,
        index: int,
        offset: int,
        view: memoryview,
        read_below: Callable[[int, memoryview], bool],
    ) -> bool:
        """Write and publish, all under the lock."""
        image, part = self._image, span.part
        try:
            assembled = self._assemble(span, offset, view, read_below)
            if assembled is not None:
                if image.bitmaps is not None:
                    image.bitmaps.mark(offset, len(view))
                image.data.write_vector(*assembled)
        except BaseException:
            if part.run is not None:
                image.allocator.undo(part.run)
            raise
        if assembled is None:
            if part.run is not None:
                image.allocator.undo(part.run)
            return False
        if self._extended:
            self._writes.set_extended(table, index, part, offset - (part.first << self._bits), len(view))
        else:
            self._writes.set_standard(table, index, part)
        image.mapping.changed(part.first // self._l2_count, index, part.clusters)
        image.published = True
        return True

    def _assemble(
        self, span: _Span, offset: int, view: memoryview, read_below: Callable[[int, memoryview], bool]
    ) -> tuple[int, list[memoryview]] | None:
        """Host offset and buffers of what has to be written; None if that cannot be told without waiting."""
        part, start, stop = span.part, span.start, span.stop
        host, end = part.host + start - (part.first << self._bits), offset + len(view)
        is_inside = start < offset and end < stop and stop - start == self._granule
        if is_inside and not span.head_is_zero and not self._is_zero_below(start, stop):
            # The usual copy on write: one read, one write, and memory that is still in the processor's cache.
            unit = self._scratch
            if not self._read_below(start, unit, read_below):
                return None
            unit[offset - start : end - start] = view
            return host, [unit]
        head = self._old(span.head_is_zero, start, offset, part, read_below)
        tail = self._old(span.tail_is_zero, end, stop, part, read_below)
        if head is None or tail is None:
            return None
        return host + offset - start - len(head), [buffer for buffer in (head, view, tail) if buffer]

    def _is_zero_below(self, start: int, end: int) -> bool:
        """Whether what shows through is known, without waiting, to read as zeros."""
        below = self._image.below
        if below is None or start >= below.size:
            return True
        return below.reads_zero_cached(start, min(end, below.size) - start)

    def _read_below(self, start: int, view: memoryview, read_below: Callable[[int, memoryview], bool]) -> bool:
        below = self._image.below
        count = max(0, min(len(view), below.size - start)) if below is not None else 0
        view[count:] = bytes(len(view) - count)
        return read_below(start, view[:count])

    def _old(
        self, is_zero: bool, start: int, end: int, part: NewClusters, read_below: Callable[[int, memoryview], bool]
    ) -> memoryview | None:
        """What a range reads as, empty for nothing; None if that cannot be told without waiting."""
        if start >= end or is_zero or self._is_zero_below(start, end):
            return _ZEROS[:0] if part.is_unwritten else _ZEROS[: max(0, end - start)]
        data = memoryview(bytearray(end - start))
        return data if self._read_below(start, data, read_below) else None

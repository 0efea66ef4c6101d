"""Compressed clusters as they are: bytes that somebody else has deflated become a cluster of this image (Q49-Q57).

They are packed: a host cluster holds as many as fit, even one that begins in one and ends in the next, and its refcount
says how many (Q54). The steps are those of a guest's write: find room, write, publish.
"""

import errno
from collections.abc import Callable

import numpy as np

from nbdq.qcow2.entries import COMPRESSED
from nbdq.qcow2.writing.allocator import Run, TableFull
from nbdq.qcow2.writing.writable import WritableImage
from nbdq.storage import Data

_SECTOR = 512


class CompressedWrites:
    """Compressed clusters of one image."""

    def __init__(self, image: WritableImage, forget: Callable[[int], None]) -> None:
        """``forget`` is told of every descriptor that comes into use: what it meant before is over."""
        self._image = image
        self._forget = forget
        self._bits = image.geometry.cluster_bits
        self._cluster_size = image.cluster_size
        self._extended = image.geometry.extended_l2
        #: Bits of a descriptor that are the host offset (Q49).
        self._offset_bits = 62 - (self._bits - 8)

    def store(self, offset: int, data: Data, *, if_open: bool) -> bool:
        """Let the cluster at ``offset`` be what ``data`` inflates to; False if nothing was done.

        Nothing is durable before the next flush. ``data`` is not looked at: what does not inflate is EIO for readers.

        Args:
            if_open: only if nothing in the image decides any part of the cluster, so that what is below shows. What
                the cluster reads as then should be what it reads as already: no bitmap is marked.

        Raises:
            OSError: EINVAL if that is no cluster, or ``data`` is longer than one; EOPNOTSUPP if clusters of the image
                cannot be compressed, because it has a data file; EFBIG if the descriptor cannot name a place so far
                behind; else ENOSPC, EROFS or EIO.
        """
        image = self._image
        if offset % self._cluster_size or offset >= image.size or not 0 < len(data) <= self._cluster_size:
            text = f"{len(data)} compressed bytes at guest offset {offset} are no cluster"
            raise OSError(errno.EINVAL, text, image.path)
        if image.geometry.has_data_file:
            raise OSError(errno.EOPNOTSUPP, "an image with a data file has no compressed clusters", image.path)
        with image.epochs.pinned():
            if image.bitmaps is not None and not if_open:
                image.bitmaps.mark(offset, min(self._cluster_size, image.size - offset))
            while True:
                try:
                    with image.changing():
                        found = self._claim(offset, len(data), if_open=if_open)
                    break
                except TableFull:
                    image.grow_refcount_table()
            if found is not None:
                self._write(offset >> self._bits, *found, data)
        image.relieve()
        return found is not None

    def _claim(self, offset: int, length: int, *, if_open: bool) -> tuple[int, Run] | None:
        """Host offset of ``length`` free bytes, and the clusters that they touch, which are counted; the guest cluster
        is in flight from now on. None if it is not open, and has to be."""
        image = self._image
        cluster = offset >> self._bits
        while cluster in image.in_flight:
            image.changed.wait()
            image.check_writable()
        l1_index, index = divmod(cluster, image.geometry.l2_count)
        table = image.mapping.own(l1_index)
        if if_open and not image.mapping.shows_below(table, index):
            return None
        host, touched = self._find_room(length)
        image.in_flight.add(cluster)
        return host, touched

    def _find_room(self, length: int) -> tuple[int, Run]:
        """Take ``length`` bytes behind the last compressed cluster, or a new host cluster."""
        image = self._image
        host = image.packing
        first, inside = host >> self._bits, host & self._cluster_size - 1
        left = self._cluster_size - inside
        can_share = inside != 0 and 0 < image.refcounts.get(first) < image.refcounts.maximum
        if can_share and length <= left:
            touched = Run(first, 1)
            image.refcounts.raise_counts(np.array([first], dtype=np.uint64))
        else:
            run = image.allocator.allocate(1)
            if can_share and run.first == first + 1:  # what does not fit ends in the new one
                touched = Run(first, 2)
                image.refcounts.raise_counts(np.array([first], dtype=np.uint64))
            else:
                host, touched = run.first << self._bits, run
        if host + length > 1 << min(self._offset_bits, 56):
            image.allocator.undo(touched)
            raise OSError(errno.EFBIG, "compressed clusters cannot lie so far behind in the file", image.path)
        image.packing = host + length
        return host, touched

    def _write(self, cluster: int, host: int, touched: Run, data: Data) -> None:
        """Write and publish."""
        image = self._image
        is_published = False
        try:
            image.storage.write(host, data)
            with image.changing():
                l1_index, index = divmod(cluster, image.geometry.l2_count)
                table = image.mapping.own(l1_index)
                sectors = (host + len(data) - 1) // _SECTOR - host // _SECTOR
                descriptor = sectors << self._offset_bits | host
                position = 2 * index if self._extended else index
                self._forget(descriptor)
                old = table.words[position]
                table.words[position] = COMPRESSED | descriptor
                if self._extended:  # second, as ever: a reader without the lock sees that it does not fit
                    table.words[position + 1] = 0
                image.mapping.changed(l1_index, index, 1)
                image.published = is_published = True
                image.in_flight.discard(cluster)
                image.changed.notify_all()
                image.free_entry(old)  # last, because it can fail: what is not freed leaks
        except BaseException:
            if not is_published:
                with image.lock:
                    image.packing = 0  # its cluster may be free again
                    image.allocator.undo(touched)
                    image.in_flight.discard(cluster)
                    image.changed.notify_all()
            raise

"""What a disk is to everything above it: kinds of data, extents, and the :class:`BlockDevice` that a server exports.

The neutral ground between the two cores. Knows neither NBD nor QCOW2 nor asyncio.
"""

from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nbdq.storage import FileStorage

#: Guest or host offsets in bytes.
Offsets = NDArray[np.uint64]
#: One :class:`Kind` each.
Kinds = NDArray[np.uint8]


class Kind(IntEnum):
    """What a piece of a layer is, and so how it reads and what block status says of it."""

    UNALLOCATED = 0
    """Nothing here: the layer below decides; zeros where there is none."""
    UNALLOCATED_OFFSET = 1
    """As UNALLOCATED, in a subcluster whose cluster has a host offset (extended L2; P4)."""
    ZERO = 2
    """Reads as zeros and hides the layers below."""
    ZERO_OFFSET = 3
    """ZERO with preallocated host space."""
    HOLE = 4
    """A hole of a raw layer: reads as zeros, has an offset, holds no data (M4)."""
    DATA = 5
    """Bytes in the file at the host offset."""
    DATA_HOLE = 6
    """DATA whose host range is a hole of the file: known to read as zeros (P5). Block status only."""
    COMPRESSED = 7
    """One compressed cluster; the host value is its descriptor, not an offset."""
    CORRUPT = 8
    """Metadata that breaks a rule of the format: reads and status fail with EIO."""


class Granules(NamedTuple):
    """The allocated granules of one layer in a range: three arrays of one length.

    A granule is the layer's smallest unit of allocation (cluster or subcluster). Granules that are not listed are
    unallocated in this layer.
    """

    position: NDArray[np.int64]
    """Ascending positions in granules, counted from the start of the range that was asked for."""
    kind: Kinds
    host: Offsets
    """Host offset in bytes; for COMPRESSED the cluster descriptor."""


class Extent(NamedTuple):
    """What a range of guest space is, seen through the whole chain: one line of ``qemu-img map`` (P1-P5)."""

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool
    offset: int | None
    path: str
    """The file that ``offset`` points into."""


class Status(NamedTuple):
    """Contiguous block status as parallel arrays; the end of the last entry is ``end``."""

    start: Offsets
    kind: Kinds
    depth: NDArray[np.uint16]
    """0: allocated nowhere; 1: by the top layer; 2: by the one below it, and so on (P7)."""
    end: int
    host: Offsets
    """Where the data is in the file of its layer, for kinds that have an offset (M4); anything for others."""


class FilePiece(NamedTuple):
    """Bytes of a disk that lie in one place of a file."""

    storage: FileStorage
    offset: int
    length: int


#: A part of a reply: memory that does not change any more, or bytes of a file.
Piece = memoryview | FilePiece


class BlockDevice(Protocol):
    """A disk. Offset first, then length or data; safe to call from any thread; failures are ``OSError``.

    Ranges must lie inside the disk. ``view`` always stays the caller's; after a failure its bytes are undefined.
    """

    @property
    def size(self) -> int:
        """Bytes, a multiple of 512."""
        ...

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``; may wait for a disk and inflate.

        Raises:
            OSError: EIO where metadata is corrupt or the medium fails.
        """
        ...

    def read_cached(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` without ever waiting; False if only :meth:`read_into` can."""
        ...

    def gather_cached(self, offset: int, length: int) -> list[Piece] | None:
        """The range as pieces, in order, if all of it is in memory or the page cache; never waits."""
        ...

    def gather(self, offset: int, length: int) -> list[Piece]:
        """The range as pieces of memory, shared with caches where that saves a copy; may wait for a disk and inflate.

        Raises:
            OSError: EIO where metadata is corrupt or the medium fails.
        """
        ...

    def status_cached(self, offset: int, length: int) -> bool:
        """Whether :meth:`status` can answer for the range from memory."""
        ...

    def status(self, offset: int, length: int) -> Iterator[Status]:
        """Block status of the range, in ascending chunks that together cover it exactly."""
        ...

    def prefetch(self, offset: int, length: int) -> None:
        """Bring the range nearer, as far as that is cheap. A hint."""
        ...

    def close(self) -> None: ...


class LowerDisk(Protocol):
    """What an image needs of the disk that shows through where it holds nothing. That disk does not change."""

    @property
    def size(self) -> int:
        """Bytes; behind it there are zeros."""
        ...

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``, as :meth:`BlockDevice.read_into`."""
        ...

    def reads_zero(self, offset: int, length: int) -> bool:
        """Whether metadata alone says that the range reads as zeros; False is no promise of the contrary.

        Raises:
            OSError: a table cannot be read.
        """
        ...

    def reads_zero_cached(self, offset: int, length: int) -> bool:
        """The same without ever waiting: False also if it is not known."""
        ...


class WritableBlockDevice(BlockDevice, Protocol):
    """A disk that can be changed. What a call has changed is seen by every read that begins after it returned.

    Nothing is durable before a :meth:`flush` that began afterwards has returned; FUA is the caller's flush. After a
    failure the range may hold old or new data in any mixture, and nothing else has changed.
    """

    def write_cached(self, offset: int, view: memoryview) -> bool:
        """Write ``view`` if that needs nothing but a copy into the page cache; False, and nothing done, if not.

        For one thread only. May be slow when the kernel throttles writers; the caller watches the time.

        Raises:
            OSError: the write failed.
        """
        ...

    def write(self, offset: int, view: memoryview) -> None:
        """Write ``view``; may allocate, copy and wait for a disk.

        Raises:
            OSError: ENOSPC if the medium or the format has no room, EROFS after corruption was found, else EIO.
        """
        ...

    def zero(self, offset: int, length: int, *, unmap: bool, fast: bool = False) -> None:
        """Make the range read as zeros (P96). Without ``unmap`` it keeps the space that it has.

        Raises:
            OSError: EOPNOTSUPP, and nothing changed, if ``fast`` and it would take as long as writing zeros; else as
                :meth:`write`.
        """
        ...

    def discard(self, offset: int, length: int) -> None:
        """Give up the contents of the range, as far as whole units of allocation go; never shows a layer below (P95).

        Raises:
            OSError: as :meth:`write`.
        """
        ...

    def flush(self) -> None:
        """Make durable everything that was written by calls that have returned.

        Raises:
            OSError: it could not be; ENOSPC if another flush may succeed, else final (R-63).
        """
        ...

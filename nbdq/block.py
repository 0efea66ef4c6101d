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

    index: NDArray[np.int64]
    """Ascending positions in granules, counted from the start of the range that was asked for."""
    kind: Kinds
    host: Offsets
    """Host offset in bytes; for COMPRESSED the cluster descriptor."""


class Layer(Protocol):
    """One image of a chain, as the chain index sees it. Immutable while it is open, and safe to use from any thread."""

    @property
    def path(self) -> str: ...

    @property
    def size(self) -> int:
        """Guest bytes, a multiple of 512."""
        ...

    @property
    def data(self) -> FileStorage:
        """The file that host offsets of DATA point into."""
        ...

    def close(self) -> None: ...


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


class BlockDevice(Protocol):
    """A disk. Offset first, then length or data; synchronous; safe to call from any thread; failures are ``OSError``."""

    @property
    def size(self) -> int:
        """Bytes, a multiple of 512."""
        ...

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view``, which the caller owns, from ``offset``; the range must lie inside the disk.

        Raises:
            OSError: EIO where metadata is corrupt or the medium fails; ``view`` is then undefined.
        """
        ...

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Contiguous extents that cover exactly the range, neighbours that differ in nothing already merged."""
        ...

    def close(self) -> None: ...

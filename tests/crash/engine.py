"""The engine under test, as ``nbdq serve`` opens it, and its own opinions about what a crash left."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np

from nbdq.chain.clusters import ClusterCache
from nbdq.chain.open import open_writable
from nbdq.errors import ImageError
from nbdq.qcow2.audit.check import check_image
from nbdq.qcow2.bitmaps.bits import DirtyBits
from nbdq.qcow2.bitmaps.directory import BitmapFlags, read_bitmaps
from nbdq.qcow2.bitmaps.tables import load_bits
from nbdq.qcow2.features import Autoclear
from nbdq.qcow2.format import read_header
from nbdq.qcow2.writing import guest_writes, mapping, refcounts, writable
from nbdq.storage import FileStorage
from tests.crash.guest import Disk
from tests.crash.recorder import SECTOR
from tests.crash.stamps import Values
from tests.crash.verdict import POLICY, Bench, Fault, Finding


class _NoReadAhead(ClusterCache):
    """Inflates nothing ahead: that would be done by threads that follow no schedule."""

    def get_ahead(self, key: object, load: Callable[[], bytes]) -> None:
        """Leave it."""


def open_engine(path: Path) -> Disk:
    """The chain whose top is at ``path``, for writing."""
    return open_writable(str(path), format="qcow2", policy=POLICY, clusters=_NoReadAhead(budget=1 << 20))


@contextlib.contextmanager
def crowded() -> Iterator[None]:
    """Let the engine have so little memory that it forgets tables, flushes and splits writes all the time."""
    with (
        patch.object(mapping, "_L2_BUDGET", 8 << 9),
        patch.object(refcounts, "_BLOCK_BUDGET", 4 << 9),
        patch.object(writable, "_FREED_BUDGET", 16 << 10),
        patch.object(writable, "_DIRTY_BUDGET", 6 << 9),
        patch.object(guest_writes, "_PART_BYTES", 4 << 10),
    ):
        yield


def own_check(bench: Bench, _values: Values) -> Finding | None:
    """What nbdq's check finds besides leaks (C2)."""
    with contextlib.closing(FileStorage.open(str(bench.top))) as storage:
        try:
            result = check_image(storage, read_header(storage))
        except (ImageError, OSError) as error:
            return Finding(Fault.CORRUPT, f"nbdq check: {error}")
    if result.corruptions or result.check_errors:
        return Finding(Fault.CORRUPT, f"nbdq check: {'; '.join(result.findings[:4])}")
    return None


def believed_bitmaps(bench: Bench, values: Values) -> Finding | None:
    """Whether a bitmap that the image vouches for misses a sector that has changed since it was made (C7)."""
    changed = np.flatnonzero(values != bench.prepared.initial)
    with contextlib.closing(FileStorage.open(str(bench.top))) as storage:
        try:
            for name, bits in _believed(storage):
                granules = changed * SECTOR >> bits.granularity_bits
                missed = changed[bits.packed[granules >> 3] >> (granules & 7) & 1 == 0]
                if len(missed):
                    return Finding(Fault.LOST, f"bitmap {name} is believed, but misses sectors {missed[:8]}")
        except (ImageError, OSError) as error:
            return Finding(Fault.CORRUPT, f"a bitmap that is believed: {error}")
    return None


def _believed(storage: FileStorage) -> Iterator[tuple[str, DirtyBits]]:
    """Names and bits of the bitmaps that a backup would trust."""
    header = read_header(storage)
    if Autoclear.BITMAPS in header.autoclear:
        for bitmap in read_bitmaps(storage, header):
            if BitmapFlags.IN_USE not in bitmap.flags:
                bits = load_bits(storage, header, bitmap.name)
                assert bits is not None
                yield bitmap.name, bits

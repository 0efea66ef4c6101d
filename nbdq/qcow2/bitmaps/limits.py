"""What a new bitmap must keep to: QEMU's limits (Q68), checked in QEMU's order and told in its words."""

from collections.abc import Sequence
from dataclasses import replace

from nbdq.errors import OperationError, printable
from nbdq.qcow2.bitmaps.bits import packed_length
from nbdq.qcow2.bitmaps.directory import (
    MAX_BITMAP_BYTES,
    MAX_GRANULARITY_BITS,
    MAX_NAME,
    MIN_GRANULARITY_BITS,
    entry_length,
)
from nbdq.qcow2.bitmaps.storing import DirtyBitmap
from nbdq.qcow2.extensions import MAX_BITMAP_DIRECTORY, MAX_BITMAPS, BitmapsExtension
from nbdq.qcow2.format import Header, build_area

#: Memory for the bits of all bitmaps of one image, as much as QEMU allows for a single one (Q68). Where nothing was
#: ever written bits take none.
MAX_MEMORY = 512 << 20

_SECTOR = 512

#: log2 of the granularities between which QEMU chooses.
_DEFAULT_BITS = range(12, 17)


def default_granularity_bits(header: Header | None) -> int:
    """A bit for each cluster, but for 4 to 64 KiB; a raw image has no header."""
    return min(max(header.cluster_bits, _DEFAULT_BITS[0]), _DEFAULT_BITS[-1]) if header else _DEFAULT_BITS[-1]


def memory_needed(bitmaps: Sequence[DirtyBitmap], size: int) -> int:
    """Bytes that the bits of ``bitmaps`` take at most, for a disk of ``size`` bytes."""
    return sum(packed_length(size, each.granularity_bits) for each in bitmaps if each.bits is not None)


def check_new_bitmap(bitmaps: Sequence[DirtyBitmap], name: str, granularity_bits: int, *, size: int) -> None:
    """See that a disk of ``size`` bytes with ``bitmaps`` may have one more.

    Raises:
        OperationError: it may not.
    """
    if not name:
        raise OperationError("Bitmap name cannot be empty")
    if any(each.name == name for each in bitmaps):
        raise OperationError(f"Bitmap already exists: {printable(name)}")
    if len(bitmaps) >= MAX_BITMAPS:  # each one costs every write
        raise OperationError("Maximum number of bitmaps is already reached")
    if _length(name) > MAX_NAME:
        raise OperationError(f"Bitmap name too long: {printable(name)}")
    if granularity_bits < MIN_GRANULARITY_BITS:
        raise OperationError(f"Granularity is under minimum ({1 << MIN_GRANULARITY_BITS} bytes)")
    if granularity_bits > MAX_GRANULARITY_BITS:
        raise OperationError(f"Granularity exceeds maximum ({1 << MAX_GRANULARITY_BITS} bytes)")
    needed = packed_length(size, granularity_bits)
    if needed > MAX_BITMAP_BYTES or memory_needed(bitmaps, size) + needed > MAX_MEMORY:
        raise OperationError("Too much space will be occupied by the bitmap. Use larger granularity")


def check_persistence(bitmaps: Sequence[DirtyBitmap], name: str, *, path: str, header: Header | None) -> None:
    """See that the image at ``path``, with this header, can keep one more bitmap; a raw image can keep none.

    Raises:
        OperationError: it cannot.
    """
    if header is None:
        raise OperationError(f"Can't store persistent bitmaps to {printable(path)}: a raw image has no place for them")
    kept = [each.name for each in bitmaps if each.is_persistent]
    if header.version < 3:
        problem = "Cannot store dirty bitmaps in qcow2 v2 files"  # (Q71)
    elif len(kept) >= MAX_BITMAPS:
        problem = "Maximum number of persistent bitmaps is already reached"
    elif sum(map(entry_length, [*kept, name])) > MAX_BITMAP_DIRECTORY:
        problem = "Not enough space in the bitmap directory"
    elif not _has_room(header):
        problem = "Not enough space in the header"
    else:
        return
    raise OperationError(f"Can't make bitmap '{printable(name)}' persistent in '{printable(path)}': {problem}")


def _has_room(header: Header) -> bool:
    """Whether the header can name a directory: extensions are in its first sector, the backing name there or behind."""
    needed = len(build_area(replace(header, bitmaps=BitmapsExtension(1, 0, 0)), feature_names=0))
    name = len((header.backing_name or "").encode("utf-8", "surrogateescape"))
    return needed <= _SECTOR and (needed + name <= _SECTOR or _SECTOR + name <= header.cluster_size)


def _length(name: str) -> int:
    return len(name.encode("utf-8", "surrogateescape"))

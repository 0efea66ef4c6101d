"""The directory of persistent dirty bitmaps: which there are, not what is in them (Q65-Q71)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntFlag
from hashlib import blake2b
from typing import Any

from construct import Int8ub, Int16ub, Int32ub, Int64ub, Struct

from nbdq.errors import ExportError, InvalidImage, UnsupportedImage, printable
from nbdq.qcow2.cursor import TableCursor
from nbdq.qcow2.format import Header
from nbdq.storage import FileStorage

#: QEMU's limits (Q68): table entries, bytes of one bitmap, bytes of a name, log2 of the granularity.
MAX_TABLE_ENTRIES = 0x8000000
MAX_BITMAP_BYTES = 512 << 20
MAX_NAME = 1023
MIN_GRANULARITY_BITS, MAX_GRANULARITY_BITS = 9, 31

_DIRTY_TRACKING = 1
_MEND = "without its bitmaps the image is usable: qemu-img convert it to a new one"

# Compiled, because a hostile directory has 65 535 of them.
_ENTRY = Struct(
    "table_offset" / Int64ub,
    "table_size" / Int32ub,
    "flags" / Int32ub,
    "type" / Int8ub,
    "granularity_bits" / Int8ub,
    "name_length" / Int16ub,
    "extra_length" / Int32ub,
).compile()
_ENTRY_SIZE = 24


class BitmapFlags(IntFlag):
    """What a directory entry says about its bitmap."""

    IN_USE = 1 << 0
    """Not saved properly: the stored bits are worthless (Q69)."""
    AUTO = 1 << 1
    """Must track all writes (Q70)."""


#: An integer, whose complement has the unknown bits.
_KNOWN_FLAGS = int(BitmapFlags.IN_USE | BitmapFlags.AUTO)


@dataclass(frozen=True)
class Bitmap:
    """One entry of the bitmap directory."""

    name: str
    granularity_bits: int
    flags: BitmapFlags
    table_offset: int
    table_size: int
    """Entries."""

    @property
    def granularity(self) -> int:
        """Guest bytes that one bit stands for."""
        return 1 << self.granularity_bits

    @property
    def is_enabled(self) -> bool:
        """Whether writes are to be marked (Q70)."""
        return BitmapFlags.AUTO in self.flags

    @property
    def is_inconsistent(self) -> bool:
        """Whether what is stored of the bitmap is worthless (Q69)."""
        return BitmapFlags.IN_USE in self.flags

    def check_consistent(self) -> None:
        """See that the bitmap may be asked.

        Raises:
            ExportError: it is inconsistent; QEMU's words.
        """
        if self.is_inconsistent:
            raise ExportError(
                f"Bitmap '{printable(self.name)}' is inconsistent and cannot be used: its image was not closed "
                "properly; make a full backup and remove it with qemu-img bitmap --remove"
            )


def read_bitmaps(storage: FileStorage, header: Header) -> tuple[Bitmap, ...]:
    """The bitmaps of the image, in directory order; none where the extension is missing or not to be believed.

    Raises:
        ImageError, OSError: as :func:`iterate_bitmaps`.
    """
    return tuple(iterate_bitmaps(storage, header))


def iterate_bitmaps(storage: FileStorage, header: Header) -> Iterator[Bitmap]:
    """The same, one at a time.

    Holds a piece of the directory, whose size and count the header's checks have limited; names alone may be 64 MiB.

    Raises:
        InvalidImage: the directory or an entry breaks a rule on which QEMU refuses the image (V24).
        UnsupportedImage: an entry has extra data, which QEMU does not know either.
        CorruptImage: the directory goes on past the end of the file.
        OSError: the file cannot be read.
    """
    extension = header.bitmaps
    if extension is None:
        return
    path = storage.path
    cursor = TableCursor(storage, extension.directory_offset, name="bitmap directory")
    found: set[bytes] = set()  # digests of the names, which are shorter
    while cursor.consumed < extension.directory_size:
        if len(found) == extension.count:
            raise InvalidImage(path, f"the bitmap directory has more than nb_bitmaps={extension.count} entries", _MEND)
        bitmap = _read_entry(path, cursor, header, directory_size=extension.directory_size)
        digest = blake2b(bitmap.name.encode("utf-8", "surrogateescape"), digest_size=16).digest()
        if digest in found:
            raise InvalidImage(path, f"two bitmaps have the name '{printable(bitmap.name)}'", _MEND)
        found.add(digest)
        yield bitmap
    if len(found) < extension.count:
        raise InvalidImage(
            path, f"the bitmap directory has {len(found)} entries, but nb_bitmaps is {extension.count}", _MEND
        )


def entry_length(name: str) -> int:
    """Bytes of the directory entry of a bitmap called ``name``."""
    return -(-(_ENTRY_SIZE + len(name.encode("utf-8", "surrogateescape"))) // 8) * 8


def build_directory(bitmaps: Iterable[Bitmap]) -> bytes:
    """The directory that lists ``bitmaps``; the inverse of :func:`read_bitmaps`, but for what QEMU ignores in names."""
    records = []
    for bitmap in bitmaps:
        name = bitmap.name.encode("utf-8", "surrogateescape")
        fixed = _ENTRY.build(
            {
                "table_offset": bitmap.table_offset,
                "table_size": bitmap.table_size,
                "flags": bitmap.flags,
                "type": _DIRTY_TRACKING,
                "granularity_bits": bitmap.granularity_bits,
                "name_length": len(name),
                "extra_length": 0,
            }
        )
        records.append(fixed + name + bytes(-(len(fixed) + len(name)) % 8))
    return b"".join(records)


def _read_entry(path: str, cursor: TableCursor, header: Header, *, directory_size: int) -> Bitmap:
    start = cursor.consumed
    broken = InvalidImage(path, f"the bitmap directory of {directory_size} bytes ends within an entry", _MEND)
    if start + _ENTRY_SIZE > directory_size:
        raise broken
    entry = _ENTRY.parse(cursor.take(_ENTRY_SIZE))
    if start + -(-(_ENTRY_SIZE + entry.extra_length + entry.name_length) // 8) * 8 > directory_size:
        raise broken
    if entry.extra_length:
        raise UnsupportedImage(path, f"a bitmap has {entry.extra_length} bytes of extra data", _MEND)
    raw_name = cursor.take(entry.name_length)
    cursor.align()
    if problem := _entry_problem(entry, header):
        raise InvalidImage(path, f"bitmap '{printable(raw_name)}' {problem}", _MEND)
    return Bitmap(
        name=raw_name.partition(b"\0")[0].decode("utf-8", "surrogateescape"),
        granularity_bits=entry.granularity_bits,
        flags=BitmapFlags(entry.flags),
        table_offset=entry.table_offset,
        table_size=entry.table_size,
    )


def _entry_problem(entry: Any, header: Header) -> str | None:
    """The first rule of Q68 that an entry breaks, for the end of a sentence about it."""
    stored_bytes = entry.table_size * header.cluster_size
    if not 1 <= entry.name_length <= MAX_NAME:
        return f"has a name of {entry.name_length} bytes, not 1 to {MAX_NAME}"
    if entry.type != _DIRTY_TRACKING:
        return f"has type {entry.type}, not {_DIRTY_TRACKING}"
    if entry.flags & ~_KNOWN_FLAGS:
        return f"has flags {entry.flags:#x}, not all known"
    if not MIN_GRANULARITY_BITS <= entry.granularity_bits <= MAX_GRANULARITY_BITS:
        return f"has granularity_bits {entry.granularity_bits}, not {MIN_GRANULARITY_BITS} to {MAX_GRANULARITY_BITS}"
    if not 1 <= entry.table_size <= MAX_TABLE_ENTRIES or stored_bytes > MAX_BITMAP_BYTES:
        return f"has a table of {entry.table_size} entries, which is none or too many"
    if entry.table_offset == 0 or entry.table_offset % header.cluster_size:
        return f"has its table at {entry.table_offset:#x}, which is not a cluster"
    if not entry.flags & BitmapFlags.IN_USE and header.guest_size > stored_bytes * 8 << entry.granularity_bits:
        return f"has a table of {entry.table_size} entries, too small for the disk"
    return None

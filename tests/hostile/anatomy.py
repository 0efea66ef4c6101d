"""Where everything is in a QCOW2 file, for those who want to break it.

A second, independent reading of the format (sections 1.2 to 1.10), with no check at all: it is pointed at images
that qemu-img made. It shares no code with nbdq, so that a misunderstanding there cannot hide itself here.
"""

from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import NamedTuple

HEADER_FIELDS = {
    "magic": (0, 4),
    "version": (4, 4),
    "backing_file_offset": (8, 8),
    "backing_file_size": (16, 4),
    "cluster_bits": (20, 4),
    "size": (24, 8),
    "crypt_method": (32, 4),
    "l1_size": (36, 4),
    "l1_table_offset": (40, 8),
    "refcount_table_offset": (48, 8),
    "refcount_table_clusters": (56, 4),
    "nb_snapshots": (60, 4),
    "snapshots_offset": (64, 8),
    "incompatible_features": (72, 8),
    "compatible_features": (80, 8),
    "autoclear_features": (88, 8),
    "refcount_order": (96, 4),
    "header_length": (100, 4),
    "compression_type": (104, 1),
    "padding": (105, 7),
}
_BITMAPS = 0x23852875
#: Names and widths of the fields of an entry, in order.
_SNAPSHOT_ENTRY = (
    ("l1_offset", 8),
    ("l1_size", 4),
    ("id_length", 2),
    ("name_length", 2),
    ("date_seconds", 4),
    ("date_nanoseconds", 4),
    ("vm_clock", 8),
    ("vm_state_size", 4),
    ("extra_length", 4),
)
_BITMAP_ENTRY = (
    ("table_offset", 8),
    ("table_size", 4),
    ("flags", 4),
    ("type", 1),
    ("granularity_bits", 1),
    ("name_length", 2),
    ("extra_length", 4),
)

OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1


class Area(StrEnum):
    """The parts of an image, as an attacker sees them."""

    HEADER = "header"
    EXTENSIONS = "extensions"
    L1 = "L1 table"
    L2 = "L2 table"
    SUBCLUSTERS = "subcluster bitmap"
    PAYLOAD = "compressed data"
    SNAPSHOTS = "snapshot table"
    BITMAPS = "bitmap directory"
    REFCOUNTS = "refcounts"
    LENGTH = "file length"


class Field(NamedTuple):
    """A big-endian integer in the file."""

    area: Area
    name: str
    offset: int
    width: int


class Layout:
    """The header of an image, and the way through its tables to a guest offset. Believes everything."""

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        """``read`` returns the bytes at an offset, fewer at the end of the file."""
        self._read = read
        self.header = {name: self.number(*place) for name, place in HEADER_FIELDS.items()}
        self.version = self.header["version"]
        self.cluster_bits = self.header["cluster_bits"]
        self.cluster_size = 1 << self.cluster_bits
        self.header_length = self.header["header_length"] if self.version > 2 else 72
        self.extended_l2 = self.version > 2 and bool(self.header["incompatible_features"] & 1 << 4)
        self.entry_size = 16 if self.extended_l2 else 8

    def number(self, offset: int, width: int) -> int:
        """The integer of ``width`` bytes at ``offset``; zeros follow the end of the file."""
        return int.from_bytes(self._read(offset, width).ljust(width, b"\0"), "big")

    def compressed_range(self, entry: int) -> tuple[int, int]:
        """Offset and length in the file that a compressed L2 entry describes (Q49, Q50)."""
        bits = 62 - (self.cluster_bits - 8)
        offset = entry & (1 << bits) - 1
        return offset, (((entry & (1 << 62) - 1) >> bits) + 1) * 512 - offset % 512

    def entry_offsets(self, guest_offset: int, *, snapshots: bool) -> Iterator[int]:
        """Where in the file the L2 entry for a guest offset is, as each snapshot has it, or the active state (Q3)."""
        tables = [(self.header["l1_table_offset"], self.header["l1_size"])]
        if snapshots:
            tables = [(entry["l1_offset"], entry["l1_size"]) for _, entry in self.snapshot_entries()]
        number, index = divmod(guest_offset >> self.cluster_bits, self.cluster_size // self.entry_size)
        for offset, size in tables:
            table = self.number(offset + number * 8, 8) & OFFSET_MASK if number < size else 0
            if table:
                yield table + index * self.entry_size

    def snapshot_entries(self) -> Iterator[tuple[int, dict[str, int]]]:
        """Offset and fields of each entry of the snapshot table (Q58)."""
        start = self.header["snapshots_offset"]
        for _ in range(self.header["nb_snapshots"]):
            entry, position = {}, start
            for name, width in _SNAPSHOT_ENTRY:
                entry[name] = self.number(position, width)
                position += width
            yield start, entry
            start += -(-(40 + entry["extra_length"] + entry["id_length"] + entry["name_length"]) // 8) * 8


class Anatomy(Layout):
    """The fields of one valid image, by area, and the file offsets at which something begins."""

    def __init__(self, content: bytes) -> None:
        super().__init__(lambda offset, width: content[offset : offset + width])
        self.length = len(content)
        self.fields: dict[Area, list[Field]] = {}
        self.payloads: list[tuple[int, int]] = []
        """Offset and greatest length of each compressed cluster's data."""
        self.places: set[int] = {0, self.length}
        for field in self._find():
            self.fields.setdefault(field.area, []).append(field)
        if self.payloads:
            self.fields[Area.PAYLOAD] = []
        self.places |= {self.header[name] for name in self.header if name.endswith("table_offset")}

    def _find(self) -> Iterator[Field]:
        for name, (offset, width) in HEADER_FIELDS.items():
            if offset < self.header_length:
                yield Field(Area.HEADER, name, offset, width)
        yield from self._find_extensions()
        yield from self._find_tables(self.header["l1_table_offset"], self.header["l1_size"], "")
        yield from self._find_snapshots()
        yield from self._find_refcounts()

    def _find_extensions(self) -> Iterator[Field]:
        position = self.header_length
        end = self.header["backing_file_offset"] or self.cluster_size
        while position + 8 <= end:
            kind, length = self.number(position, 4), self.number(position + 4, 4)
            yield Field(Area.EXTENSIONS, f"type of {kind:#x}", position, 4)
            yield Field(Area.EXTENSIONS, f"length of {kind:#x}", position + 4, 4)
            if kind == 0:
                break
            position += 8
            if kind == _BITMAPS:
                names = (("count", 0, 4), ("reserved", 4, 4), ("directory size", 8, 8), ("directory offset", 16, 8))
                for name, offset, width in names:
                    yield Field(Area.EXTENSIONS, f"bitmap {name}", position + offset, width)
                yield from self._find_bitmaps(size=self.number(position + 8, 8), start=self.number(position + 16, 8))
            else:
                for offset in (0, length // 2, length - 1):
                    yield Field(Area.EXTENSIONS, f"byte {offset} of {kind:#x}", position + offset, 1)
            position += -(-length // 8) * 8
        if self.header["backing_file_offset"]:
            yield Field(Area.EXTENSIONS, "first byte of the backing name", end, 1)

    def _find_tables(self, l1_offset: int, l1_size: int, owner: str) -> Iterator[Field]:
        """An L1 table, and the L2 tables that it names."""
        self.places.add(l1_offset)
        for number in range(l1_size):
            field = Field(Area.L1, f"{owner}L1[{number}]", l1_offset + 8 * number, 8)
            yield field
            table = self.number(field.offset, 8) & OFFSET_MASK
            if table and table not in self.places:
                self.places.add(table)
                yield from self._find_entries(table, f"{owner}L2[{number}]")

    def _find_entries(self, table: int, name: str) -> Iterator[Field]:
        """The entries of an L2 table up to the last used one, and one more; the very last one, too."""
        step = self.entry_size
        count = self.cluster_size // step
        used = [index for index in range(count) if self.number(table + index * step, step)]
        for index in {*range(min(used[-1] + 2, count) if used else 1), count - 1}:
            offset = table + index * step
            yield Field(Area.L2, f"{name}[{index}]", offset, 8)
            if self.extended_l2:
                yield Field(Area.SUBCLUSTERS, f"{name}[{index}]", offset + 8, 8)
            entry = self.number(offset, 8)
            if entry & COMPRESSED:
                self.payloads.append(self.compressed_range(entry))
            elif entry & OFFSET_MASK:
                self.places.add(entry & OFFSET_MASK)

    def _find_snapshots(self) -> Iterator[Field]:
        for number, (start, entry) in enumerate(self.snapshot_entries()):
            self.places.add(start)
            position = start
            for name, width in _SNAPSHOT_ENTRY:
                yield Field(Area.SNAPSHOTS, f"snapshot {number} {name}", position, width)
                position += width
            for offset in range(0, entry["extra_length"], 8):
                yield Field(Area.SNAPSHOTS, f"snapshot {number} extra +{offset}", position + offset, 8)
            yield Field(Area.SNAPSHOTS, f"snapshot {number} id and name", position + entry["extra_length"], 1)
            yield from self._find_tables(entry["l1_offset"], entry["l1_size"], f"snapshot {number} ")

    def _find_bitmaps(self, *, size: int, start: int) -> Iterator[Field]:
        self.places.add(start)
        position, number = start, 0
        while position < start + size:
            values = {}
            begin = position
            for name, width in _BITMAP_ENTRY:
                values[name] = self.number(position, width)
                yield Field(Area.BITMAPS, f"bitmap {number} {name}", position, width)
                position += width
            yield Field(Area.BITMAPS, f"bitmap {number} name", position, 1)
            yield Field(Area.BITMAPS, f"bitmap {number} table", values["table_offset"], 8)
            self.places.add(values["table_offset"])
            position = begin + -(-(24 + values["extra_length"] + values["name_length"]) // 8) * 8
            number += 1

    def _find_refcounts(self) -> Iterator[Field]:
        table = self.header["refcount_table_offset"]
        for index in (0, 1, self.cluster_size // 8 - 1):
            yield Field(Area.REFCOUNTS, f"refcount table [{index}]", table + 8 * index, 8)
        block = self.number(table, 8) & ~511
        self.places.add(block)
        for index in (0, 1, 5):
            yield Field(Area.REFCOUNTS, f"refcount block [{index}]", block + 8 * index, 8)

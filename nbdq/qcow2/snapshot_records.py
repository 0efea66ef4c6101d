"""The snapshot table entry by entry, as it is stored and however damaged: for who audits, mends or moves it (Q58-Q60).

:mod:`nbdq.qcow2.snapshots` reads what entries mean, and refuses damage; here unknown extra data survives.
"""

import struct
from dataclasses import dataclass, replace

from nbdq.errors import CorruptImage
from nbdq.qcow2.cursor import TableCursor
from nbdq.qcow2.fields import MAX_SNAPSHOTS, SNAPSHOT_ENTRY_SIZE
from nbdq.qcow2.format import Header
from nbdq.qcow2.snapshots import MAX_EXTRA_DATA, MAX_SNAPSHOT_TABLE
from nbdq.storage import FileStorage

#: L1 offset and entries; lengths of id and name; 20 bytes of dates and clock, kept as they are; length of extra data.
_ENTRY = struct.Struct(">QIHH20sI")
_OLD_VM_STATE_SIZE = struct.Struct(">16xI")
#: Extra data that an entry of version 3 must have: VM state size, disk size (Q59). A writer adds the icount (Q61).
_LEAST_EXTRA, _NO_ICOUNT = 16, b"\xff" * 8


@dataclass(frozen=True)
class SnapshotRecord:
    """One entry of the table."""

    l1_offset: int
    l1_size: int
    times: bytes
    """Date, clock and the old size of the VM state."""
    extra: bytes
    id: bytes
    name: bytes

    @classmethod
    def of_disk(
        cls,
        *,
        id: str,
        name: str,
        l1_offset: int,
        l1_size: int,
        disk_size: int,
        date_seconds: int,
        date_nanoseconds: int,
        vm_clock_ns: int,
    ) -> "SnapshotRecord":
        """The record of a snapshot that holds no state of a machine, with all that QEMU writes (Q61).

        Args:
            l1_size: entries.
            disk_size: bytes.
        """
        times = struct.pack(">IIQI", date_seconds, date_nanoseconds, vm_clock_ns, 0)
        extra = struct.pack(">QQ", 0, disk_size) + _NO_ICOUNT
        return cls(l1_offset, l1_size, times, extra, id.encode(), name.encode("utf-8", "surrogateescape"))

    @property
    def is_incomplete(self) -> bool:
        """Whether version 3 asks for more extra data."""
        return len(self.extra) < _LEAST_EXTRA

    def completed(self, disk_size: int) -> "SnapshotRecord":
        """The record with all the extra data that QEMU writes; ``disk_size`` is of the image now (Q59)."""
        (vm_state_size,) = _OLD_VM_STATE_SIZE.unpack(self.times)
        defaults = vm_state_size.to_bytes(8, "big") + disk_size.to_bytes(8, "big") + _NO_ICOUNT
        whole = len(self.extra) // 8 * 8 if len(self.extra) < len(defaults) else len(self.extra)
        return replace(self, extra=self.extra[:whole] + defaults[whole:])

    def pack(self) -> bytes:
        """The bytes of the entry, without padding."""
        fixed = _ENTRY.pack(self.l1_offset, self.l1_size, len(self.id), len(self.name), self.times, len(self.extra))
        return fixed + self.extra + self.id + self.name


@dataclass(frozen=True)
class SnapshotTable:
    """What could be read of the table."""

    records: tuple[SnapshotRecord, ...]
    length: int
    """Bytes from its start to the end of the last record."""
    problem: str = ""
    """What QEMU would refuse the image for."""
    mendable: bool = True
    """Whether ``records`` are what can be kept; not so if the file ends within the table."""


def read_snapshot_table(storage: FileStorage, header: Header) -> SnapshotTable:
    """The records up to the first that cannot be. Extra data above the limit is cut off (Q60).

    Raises:
        OSError: the file cannot be read.
    """
    cursor = TableCursor(storage, header.snapshots_offset, name="snapshot table")
    records: list[SnapshotRecord] = []
    problem, length, mendable = "", 0, True
    if header.snapshot_count > MAX_SNAPSHOTS:
        problem = f"{header.snapshot_count} entries, more than {MAX_SNAPSHOTS}"
    for number in range(min(header.snapshot_count, MAX_SNAPSHOTS)):
        try:
            cursor.align()
            l1_offset, l1_size, id_length, name_length, times, extra_length = _ENTRY.unpack(
                cursor.take(SNAPSHOT_ENTRY_SIZE)
            )
            if extra_length > MAX_SNAPSHOT_TABLE:
                problem, mendable = f"entry {number} has {extra_length} bytes of extra data", False
                break
            extra = cursor.take(min(extra_length, MAX_EXTRA_DATA))
            if extra_length > MAX_EXTRA_DATA:
                problem = f"entry {number} has {extra_length} bytes of extra data, more than {MAX_EXTRA_DATA}"
                for start in range(MAX_EXTRA_DATA, extra_length, MAX_EXTRA_DATA):
                    cursor.take(min(MAX_EXTRA_DATA, extra_length - start))
            record = SnapshotRecord(l1_offset, l1_size, times, extra, cursor.take(id_length), cursor.take(name_length))
        except CorruptImage as error:
            problem, mendable = f"entry {number}: {error.what}", False
            break
        if cursor.consumed > MAX_SNAPSHOT_TABLE:
            problem = f"larger than {MAX_SNAPSHOT_TABLE} bytes from entry {number} on"
            break
        records.append(record)
        length = cursor.consumed
    return SnapshotTable(tuple(records), length, problem, mendable)


def pack_snapshot_table(records: tuple[SnapshotRecord, ...]) -> bytes:
    """The whole table; each entry begins at a multiple of 8."""
    return b"".join(entry.ljust(-(-len(entry) // 8) * 8, b"\0") for entry in (record.pack() for record in records))

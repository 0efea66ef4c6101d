"""The table of internal snapshots: which states of the disk the image also holds (Q58-Q64).

Reads only. Every entry is validated while it is read, in QEMU's order and with QEMU's limits (V24); what a snapshot's
L1 table must be is checked when somebody wants to use it (Q63).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from construct import Int16ub, Int32ub, Int64ub, Struct

from nbdq.errors import CorruptImage, ExportError, InvalidImage, printable
from nbdq.qcow2.cursor import TableCursor
from nbdq.qcow2.fields import MAX_L1_TABLE, SNAPSHOT_ENTRY_SIZE, check_table, l1_entries
from nbdq.qcow2.format import Header
from nbdq.storage import FileStorage

#: QEMU's limits (Q60).
MAX_SNAPSHOT_TABLE = 64 << 20
MAX_EXTRA_DATA = 1024

_NO_ICOUNT = (1 << 64) - 1
_REPAIR = "qemu-img check -r all repairs the table"

# Compiled, because a hostile table has 65 536 of them.
_ENTRY = Struct(
    "l1_offset" / Int64ub,
    "l1_size" / Int32ub,
    "id_length" / Int16ub,
    "name_length" / Int16ub,
    "date_seconds" / Int32ub,
    "date_nanoseconds" / Int32ub,
    "vm_clock_ns" / Int64ub,
    "vm_state_size" / Int32ub,
    "extra_length" / Int32ub,
).compile()


@dataclass(frozen=True)
class Snapshot:
    """One state of the disk, kept in the image under an id and a name; names may repeat (Q61)."""

    id: str
    name: str
    l1_offset: int
    l1_size: int
    """Entries."""
    date_seconds: int
    """Seconds since the epoch when it was taken, and nanoseconds."""
    date_nanoseconds: int
    vm_clock_ns: int
    vm_state_size: int
    disk_size: int | None
    """Bytes of the disk then; None where the entry does not say and the image's present size holds (Q59)."""
    icount: int | None


def read_snapshots(storage: FileStorage, header: Header) -> tuple[Snapshot, ...]:
    """All snapshots, in table order.

    Raises:
        ImageError, OSError: as :func:`iterate_snapshots`.
    """
    return tuple(iterate_snapshots(storage, header))


def iterate_snapshots(storage: FileStorage, header: Header) -> Iterator[Snapshot]:
    """The snapshots, in table order. Holds a piece of the table at a time: names alone may be 64 MiB.

    Raises:
        InvalidImage: an entry or the table is larger than QEMU accepts.
        CorruptImage: the table goes on past the end of the file.
        OSError: the file cannot be read.
    """
    cursor = TableCursor(storage, header.snapshots_offset, name="snapshot table")
    for index in range(header.snapshot_count):
        yield _read_entry(storage.path, cursor, index)


def snapshot_table_length(storage: FileStorage, header: Header) -> int:
    """Bytes of the snapshot table, from its first entry to the end of its last.

    Raises:
        ImageError, OSError: as :func:`iterate_snapshots`.
    """
    cursor = TableCursor(storage, header.snapshots_offset, name="snapshot table")
    for index in range(header.snapshot_count):
        _read_entry(storage.path, cursor, index)
    return cursor.consumed


def find_snapshot(snapshots: Sequence[Snapshot], wanted: str) -> Snapshot:
    """The snapshot that ``qemu-nbd -l wanted`` means.

    ``wanted`` is an id, else a name, else ``snapshot.id=ID``, ``snapshot.name=NAME`` or both joined by a comma, where
    a comma in a value is doubled. The first that matches wins.

    Raises:
        ExportError: there is none, or ``wanted`` does not parse; the message lists what there is.
    """
    if wanted.startswith("snapshot."):
        options = _parse_options(wanted)
        for snapshot in snapshots:
            if options.get("id", snapshot.id) == snapshot.id and options.get("name", snapshot.name) == snapshot.name:
                return snapshot
    else:
        for attribute in ("id", "name"):
            for snapshot in snapshots:
                if getattr(snapshot, attribute) == wanted:
                    return snapshot
    raise ExportError(f"there is no internal snapshot '{printable(wanted)}'; the image has {_listing(snapshots)}")


def snapshot_selector(snapshot: Snapshot) -> str:
    """What :func:`find_snapshot` finds this snapshot by, whatever others are called."""
    identity, name = (text.replace(",", ",,") for text in (snapshot.id, snapshot.name))
    return f"snapshot.id={identity},snapshot.name={name}"


def check_snapshot(storage: FileStorage, header: Header, snapshot: Snapshot) -> None:
    """Refuse a snapshot whose L1 table cannot be used (Q63); to be called before it is.

    Raises:
        InvalidImage: the table is too large, misplaced, or too small for the snapshot's disk.
        CorruptImage: it lies outside of the file.
    """
    name = f"the L1 table of snapshot '{printable(snapshot.name)}'"
    offset, length = snapshot.l1_offset, snapshot.l1_size * 8
    check_table(storage.path, name, offset=offset, length=length, limit=MAX_L1_TABLE, cluster_size=header.cluster_size)
    if snapshot.disk_size is not None:
        needed = l1_entries(snapshot.disk_size, cluster_bits=header.cluster_bits, extended_l2=header.extended_l2)
        if snapshot.l1_size < needed:
            raise InvalidImage(
                storage.path,
                f"{name} has {snapshot.l1_size} entries, but {snapshot.disk_size} bytes need {needed}",
                _REPAIR,
            )
    if offset + length > storage.size():
        raise CorruptImage(
            storage.path, f"{name} lies outside of the file", "the file was cut off: restore the image from a copy"
        )


def _read_entry(path: str, cursor: TableCursor, index: int) -> Snapshot:
    cursor.align()
    entry = _ENTRY.parse(cursor.take(SNAPSHOT_ENTRY_SIZE))
    if entry.extra_length > MAX_EXTRA_DATA:
        raise InvalidImage(
            path,
            f"snapshot table entry {index} has {entry.extra_length} bytes of extra data, more than {MAX_EXTRA_DATA}",
            _REPAIR,
        )
    extra = cursor.take(entry.extra_length)
    identity = _text(cursor.take(entry.id_length))
    name = _text(cursor.take(entry.name_length))
    if cursor.consumed > MAX_SNAPSHOT_TABLE:
        raise InvalidImage(path, f"the snapshot table is larger than {MAX_SNAPSHOT_TABLE} bytes", _REPAIR)
    icount = _extra_field(extra, 16)
    vm_state_size = _extra_field(extra, 0)
    return Snapshot(
        id=identity,
        name=name,
        l1_offset=entry.l1_offset,
        l1_size=entry.l1_size,
        date_seconds=entry.date_seconds,
        date_nanoseconds=entry.date_nanoseconds,
        vm_clock_ns=entry.vm_clock_ns,
        vm_state_size=entry.vm_state_size if vm_state_size is None else vm_state_size,
        disk_size=_extra_field(extra, 8),
        icount=None if icount == _NO_ICOUNT else icount,
    )


def _extra_field(extra: bytes, offset: int) -> int | None:
    """One of the 64-bit fields that later versions appended (Q59)."""
    return int.from_bytes(extra[offset : offset + 8], "big") if len(extra) >= offset + 8 else None


def _text(raw: bytes) -> str:
    """An id or a name; C programs end it at a NUL."""
    return raw.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _parse_options(wanted: str) -> dict[str, str]:
    """``snapshot.id=…,snapshot.name=…`` as {"id": …, "name": …}."""
    options = {}
    for part in wanted.replace(",,", "\0").split(","):
        key, equals, value = part.partition("=")
        if not equals or key not in ("snapshot.id", "snapshot.name"):
            raise ExportError(
                f"'{printable(wanted)}' does not name a snapshot; say snapshot.id=ID, snapshot.name=NAME or both"
            )
        options[key.removeprefix("snapshot.")] = value.replace("\0", ",")
    return options


def _listing(snapshots: Iterable[Snapshot]) -> str:
    """The first few snapshots for a message."""
    shown = [f"{printable(s.id, 20)} '{printable(s.name, 60)}'" for s in islice(snapshots, 9)]
    return ", ".join(shown[:8]) + (", …" if len(shown) > 8 else "") or "none"

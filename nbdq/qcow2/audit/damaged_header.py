"""Opening an image to check it: its refcounts and snapshot table may be broken, for that is what is to be found out.

As QEMU does for ``check`` only (V14, V16). Everything else in the header must be sound.
"""

import struct
from dataclasses import replace

from nbdq.errors import CorruptImage, InvalidImage
from nbdq.qcow2.fields import MAX_REFCOUNT_TABLE
from nbdq.qcow2.format import Header, read_header
from nbdq.storage import FileStorage

#: Offset and entries of the refcount table, number of snapshots, offset of their table: 24 bytes of one sector.
TABLES_OFFSET = 48
TABLES = struct.Struct(">QIIQ")


def read_header_to_check(storage: FileStorage) -> Header:
    """The header, even if it places the refcount table or the snapshot table where none can be.

    A refcount table that cannot be one at all is given as none: offset and clusters are 0.

    Raises:
        ImageError, OSError: as :func:`~nbdq.qcow2.format.read_header`, for other reasons.
    """
    try:
        return read_header(storage, describe=True)
    except (CorruptImage, InvalidImage) as error:
        fields = storage.read(TABLES_OFFSET, TABLES.size)
        if len(fields) < TABLES.size:
            raise
        refcount_offset, refcount_clusters, snapshot_count, snapshots_offset = TABLES.unpack(fields)
        header = read_header(_Patched(storage, TABLES_OFFSET, TABLES.pack(0, 1, 0, 0)), describe=True)
        aligned = refcount_offset % header.cluster_size == 0 and refcount_offset < 1 << 62
        if not aligned or refcount_clusters > MAX_REFCOUNT_TABLE // header.cluster_size:
            refcount_offset = refcount_clusters = 0
        warnings = tuple(warning for warning in header.warnings if "the refcount table" not in warning)
        if snapshots_offset % header.cluster_size or (snapshots_offset >= storage.size() and snapshot_count):
            raise error  # a snapshot table that is nowhere could only be given up
        return replace(
            header,
            refcount_table_offset=refcount_offset,
            refcount_table_clusters=refcount_clusters,
            snapshot_count=snapshot_count,
            snapshots_offset=snapshots_offset,
            warnings=warnings,
        )


class _Patched(FileStorage):
    """A view of another storage, with some bytes replaced. Owns nothing."""

    def __init__(self, storage: FileStorage, offset: int, data: bytes) -> None:
        self.path = storage.path
        self._inner = storage
        self._offset = offset
        self._data = data

    def read(self, offset: int, length: int) -> bytes:
        found = bytearray(self._inner.read(offset, length))
        begin, end = max(offset, self._offset), min(offset + len(found), self._offset + len(self._data))
        if begin < end:
            found[begin - offset : end - offset] = self._data[begin - self._offset : end - self._offset]
        return bytes(found)

    def size(self) -> int:
        return self._inner.size()

"""From version 2 to version 3 and back: one sector each, once the tables are such as both versions accept (R-61)."""

from dataclasses import replace

from nbdq.errors import OperationError, printable
from nbdq.qcow2.amending.options import Progress
from nbdq.qcow2.amending.zero_clusters import Tables, expand_zero_clusters
from nbdq.qcow2.features import Autoclear, Compatible, CompressionType, Incompatible
from nbdq.qcow2.fields import FULL_LENGTH, V2_LENGTH
from nbdq.qcow2.format import Header
from nbdq.qcow2.header_area import rewrite_header_area
from nbdq.qcow2.snapshot_records import pack_snapshot_table, read_snapshot_table
from nbdq.qcow2.snapshots import MAX_SNAPSHOT_TABLE, snapshot_table_length
from nbdq.qcow2.writing.writable import WritableImage
from nbdq.storage import FileStorage


def upgrade(storage: FileStorage, header: Header) -> Header:
    """Make an image of version 2 one of version 3, on a quiet file. Durable on return; no data is touched.

    Snapshots get the extra data that version 3 asks for (Q59), in a new table.

    Raises:
        OperationError: there are too many snapshots.
        ImageError: the snapshot table is damaged.
        OSError: no room for tables or for the longer header, or the file cannot be read or written.
    """
    if header.snapshot_count:
        header = _complete_snapshots(storage, header)
    return rewrite_header_area(storage, replace(header, version=3, header_length=FULL_LENGTH))


def downgrade(storage: FileStorage, header: Header, progress: Progress) -> Header:
    """Make an image of version 3 one of version 2, on a quiet file. Durable on return.

    Zero clusters, which version 2 does not have, become unallocated, or clusters of zeros where something below would
    show through. Nobody may have to lose anything (:func:`~nbdq.qcow2.amending.options.check_options`).

    Raises:
        OperationError: compressed clusters that version 2 cannot have; nothing was changed.
        ImageError: tables are damaged.
        OSError: the file cannot be read or written; ENOSPC if there is no room for the zeros.
    """
    image = WritableImage(storage, header)  # refuses what has too many tables
    tables = Tables(storage, header)
    if header.compression_type is not CompressionType.DEFLATE and tables.any_compressed():
        raise OperationError(
            f"{printable(storage.path, 1024)}: Cannot downgrade an image with zstd compression type"
            " and existing compressed clusters"
        )
    expand_zero_clusters(image, tables, progress)
    return rewrite_header_area(
        storage,
        replace(
            image.header,
            version=2,
            header_length=V2_LENGTH,
            unknown_fields=b"",
            incompatible=Incompatible.NONE,
            compatible=Compatible.NONE,
            autoclear=Autoclear.NONE,
            compression_type=CompressionType.DEFLATE,
        ),
    )


def _complete_snapshots(storage: FileStorage, header: Header) -> Header:
    """A new snapshot table, if the old one lacks anything: written, counted and named in this order (W4)."""
    length = snapshot_table_length(storage, header)  # refuses what is damaged
    records = read_snapshot_table(storage, header).records
    if not any(record.is_incomplete for record in records):
        return header
    table = pack_snapshot_table(tuple(record.completed(header.guest_size) for record in records))
    if len(table) > MAX_SNAPSHOT_TABLE:
        what = "the snapshot table would become larger than QEMU accepts; delete some snapshots first"
        raise OperationError(f"{printable(storage.path, 1024)}: {what}")
    image = WritableImage(storage, header)
    offset = image.allocate_metadata(_clusters(len(table), header))
    storage.write(offset, table)
    image.flush()
    image.update_header(replace(image.header, snapshots_offset=offset))
    image.free_metadata(header.snapshots_offset, _clusters(length, header))
    image.finish()
    return image.header


def _clusters(length: int, header: Header) -> int:
    return -(-length // header.cluster_size)

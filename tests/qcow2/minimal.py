"""The smallest valid image, made without any tool, as raw material for damage.

Cluster 0 holds the header, 1 the refcount table, 2 its only block, 3 the L1 table; no guest cluster is allocated.
"""

import os
from typing import Any

from nbdq.qcow2.format import Header, build_header
from nbdq.storage import FileStorage

#: Offset and width of the header fields, from the format's specification.
FIELDS = {
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


def minimal_header(**fields: Any) -> Header:
    """The header of an empty disk of 1 MiB, with ``fields`` changed."""
    cluster_size = 1 << fields.get("cluster_bits", 16)
    defaults: dict[str, Any] = {
        "cluster_bits": 16,
        "size": 1 << 20,
        "l1_size": 1,
        "l1_table_offset": 3 * cluster_size,
        "refcount_table_offset": cluster_size,
        "refcount_table_clusters": 1,
        "header_length": 72 if fields.get("version") == 2 else 112,
    }
    return Header(**(defaults | fields))


def minimal_image(header: Header | None = None) -> bytearray:
    """The file that ``header`` describes: four clusters, all with refcount 1."""
    header = header or minimal_header()
    cluster_size = header.cluster_size
    head = build_header(header)
    image = bytearray(4 * cluster_size)
    image[: len(head)] = head
    image[cluster_size : cluster_size + 8] = (2 * cluster_size).to_bytes(8, "big")
    image[2 * cluster_size : 2 * cluster_size + 8] = bytes.fromhex("0001 0001 0001 0001")
    return image


def poke(image: bytearray, **fields: int) -> bytearray:
    """Overwrite header fields; longer headers are not moved, so extensions stay where they were."""
    for name, value in fields.items():
        offset, width = FIELDS[name]
        image[offset : offset + width] = value.to_bytes(width, "big")
    return image


def stored(content: bytes | bytearray, length: int | None = None) -> FileStorage:
    """``content`` as an image file in memory, cut or extended to ``length``."""
    descriptor = os.memfd_create("image", os.MFD_CLOEXEC)
    os.pwrite(descriptor, content, 0)
    if length is not None:
        os.truncate(descriptor, length)
    return FileStorage(descriptor, "disk.qcow2")

"""Empty qcow2 images that refer to other files: valid but for the name, which can be any bytes at all.

For names that qemu-img refuses to write, and for chains of hundreds of layers, which it makes slowly.
"""

import struct

_CLUSTER_BITS = 12
_CLUSTER = 1 << _CLUSTER_BITS
_BACKING_FORMAT, _DATA_FILE = 0xE2792ACA, 0x44415441
_HEADER_LENGTH = 112


def refer(
    backing: bytes = b"", *, format: bytes | None = b"qcow2", data_file: bytes | None = None, size: int = 1 << 20
) -> bytes:
    """The file of an empty disk of ``size`` bytes, at most 2 MiB, that names a backing or a data file."""
    extensions = b""
    if backing and format is not None:
        extensions += _extension(_BACKING_FORMAT, format)
    if data_file is not None:
        extensions += _extension(_DATA_FILE, data_file)
    extensions += struct.pack(">II", 0, 0)
    header = struct.pack(
        ">4sIQIIQIIQQIIQ",
        b"QFI\xfb",
        3,
        _HEADER_LENGTH + len(extensions) if backing else 0,
        len(backing),
        _CLUSTER_BITS,
        size,
        0,  # not encrypted
        1,  # entries of the L1 table, in cluster 3
        3 * _CLUSTER,
        1 * _CLUSTER,  # refcount table, in cluster 1
        1,
        0,  # no snapshots
        0,
    ) + struct.pack(">QQQIIB7x", 0 if data_file is None else 1 << 2, 0, 0, 4, _HEADER_LENGTH, 0)
    clusters = [
        header + extensions + backing,
        struct.pack(">Q", 2 * _CLUSTER),  # the refcount block, in cluster 2
        struct.pack(">4H", 1, 1, 1, 1),
        b"",
    ]
    return b"".join(cluster.ljust(_CLUSTER, b"\0") for cluster in clusters)


def _extension(kind: int, data: bytes) -> bytes:
    return struct.pack(">II", kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0")

"""The fixed-size fields of cluster 0: declared once, limited and checked as QEMU does (V2-V19).

Bytes in, a construct container out; no files. Limits come before anything is read or allocated by them (R-24).
"""

from collections.abc import Iterator
from typing import Any

from construct import Bytes, Int8ub, Int32ub, Int64ub, Struct

from nbdq.errors import InvalidImage, UnsupportedImage
from nbdq.qcow2.extensions import DAMAGED_HEADER, unsupported_features
from nbdq.qcow2.features import KNOWN_INCOMPATIBLE, CompressionType, CryptMethod, Incompatible

MAGIC = b"QFI\xfb"
MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
MAX_BACKING_NAME = 1023
#: Bytes of the tables that are named in the header (R-24).
MAX_L1_TABLE = 32 << 20
MAX_REFCOUNT_TABLE = 8 << 20
MAX_SNAPSHOTS = 65536
#: Bytes of a snapshot table entry before its variable part.
SNAPSHOT_ENTRY_SIZE = 40

#: Header lengths: version 2, the least and the usual one of version 3 (Q6, Q7).
V2_LENGTH, V3_LENGTH, FULL_LENGTH = 72, 104, 112

_V2_FIELDS = Struct(
    "magic" / Bytes(4),
    "version" / Int32ub,
    "backing_file_offset" / Int64ub,
    "backing_file_size" / Int32ub,
    "cluster_bits" / Int32ub,
    "size" / Int64ub,
    "crypt_method" / Int32ub,
    "l1_size" / Int32ub,
    "l1_table_offset" / Int64ub,
    "refcount_table_offset" / Int64ub,
    "refcount_table_clusters" / Int32ub,
    "nb_snapshots" / Int32ub,
    "snapshots_offset" / Int64ub,
)
_V3_FIELDS = Struct(
    "incompatible_features" / Int64ub,
    "compatible_features" / Int64ub,
    "autoclear_features" / Int64ub,
    "refcount_order" / Int32ub,
    "header_length" / Int32ub,
)
_ADDITIONAL_FIELDS = Struct("compression_type" / Int8ub, "padding" / Bytes(7))
#: What the version 3 fields mean for an image that does not have them (Q6).
_V2_DEFAULTS = {
    "incompatible_features": 0,
    "compatible_features": 0,
    "autoclear_features": 0,
    "refcount_order": 4,
    "header_length": V2_LENGTH,
}


def l1_entries(size: int, *, cluster_bits: int, extended_l2: bool) -> int:
    """Entries that the L1 table of a disk of ``size`` bytes needs (Q3)."""
    return -(-size >> (2 * cluster_bits - (4 if extended_l2 else 3)))


def build_fields(values: dict[str, Any]) -> bytes:
    """The fields named as in the declarations, of both versions: 112 bytes, to be cut to the header's length."""
    fixed: bytes = b"".join(part.build(values) for part in (_V2_FIELDS, _V3_FIELDS, _ADDITIONAL_FIELDS))
    return fixed


def parse_fields(path: str, fixed: bytes) -> Any:
    """The fields of both versions, as far as they can be told apart (V2-V7)."""
    fields = _V2_FIELDS.parse(fixed)
    if fields.magic != MAGIC:
        raise InvalidImage(
            path, f"not a QCOW2 image: magic is {fields.magic.hex()}, not {MAGIC.hex()}", "if it is raw, say -f raw"
        )
    if fields.version not in (2, 3):
        raise UnsupportedImage(path, f"QCOW2 version is {fields.version}, not 2 or 3", "convert it with qemu-img")
    if not MIN_CLUSTER_BITS <= fields.cluster_bits <= MAX_CLUSTER_BITS:
        raise InvalidImage(
            path, f"cluster_bits is {fields.cluster_bits}, not {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}", DAMAGED_HEADER
        )
    cluster_size = 1 << fields.cluster_bits
    fields.update(_V2_DEFAULTS if fields.version == 2 else _V3_FIELDS.parse(fixed[V2_LENGTH:]))
    if fields.version == 3 and fields.header_length < V3_LENGTH:
        raise InvalidImage(path, f"header_length is {fields.header_length}, less than {V3_LENGTH}", DAMAGED_HEADER)
    if fields.header_length > cluster_size:
        raise InvalidImage(path, f"header_length is {fields.header_length}, more than a cluster", DAMAGED_HEADER)
    additional = fixed[V3_LENGTH : max(fields.header_length, V3_LENGTH)].ljust(8, b"\0")
    fields.update(_ADDITIONAL_FIELDS.parse(additional))
    if fields.backing_file_offset > cluster_size:
        raise InvalidImage(
            path, f"backing_file_offset is {fields.backing_file_offset}, more than a cluster", DAMAGED_HEADER
        )
    return fields


def check_features(path: str, fields: Any, area: bytes) -> None:
    """Feature bits and the fields that depend on them (V8, V9, V11-V13)."""
    # As integers: the complement of a flag set has the known bits only.
    if unknown := fields.incompatible_features & ~int(KNOWN_INCOMPATIBLE):
        raise unsupported_features(path, unknown, area)
    incompatible = Incompatible(fields.incompatible_features)
    if fields.compression_type not in iter(CompressionType):
        raise UnsupportedImage(
            path, f"compression_type is {fields.compression_type}, unknown to nbdq", "convert the image with qemu-img"
        )
    if (fields.compression_type != CompressionType.DEFLATE) != (Incompatible.COMPRESSION_TYPE in incompatible):
        raise InvalidImage(
            path,
            f"compression_type is {fields.compression_type}, but incompatible_features is {incompatible:#x}",
            DAMAGED_HEADER,
        )
    if Incompatible.EXTENDED_L2 in incompatible and fields.cluster_bits < 14:
        raise InvalidImage(
            path, f"cluster_bits is {fields.cluster_bits}, but extended L2 entries need at least 14", DAMAGED_HEADER
        )
    if fields.refcount_order > 6:
        raise InvalidImage(path, f"refcount_order is {fields.refcount_order}, more than 6", DAMAGED_HEADER)
    if fields.crypt_method not in iter(CryptMethod):
        raise InvalidImage(path, f"crypt_method is {fields.crypt_method}, not 0 to 2", DAMAGED_HEADER)


def check_tables(path: str, fields: Any) -> None:
    """Size and offset of every table that the header names (V14-V19); R-32 bounds the virtual size."""
    cluster_size = 1 << fields.cluster_bits
    if fields.refcount_table_clusters == 0:
        raise InvalidImage(path, "refcount_table_clusters is 0", "qemu-img check -r all can rebuild the refcounts")
    tables = (
        (
            "refcount table",
            fields.refcount_table_offset,
            fields.refcount_table_clusters * cluster_size,
            MAX_REFCOUNT_TABLE,
        ),
        (
            "snapshot table",
            fields.snapshots_offset,
            fields.nb_snapshots * SNAPSHOT_ENTRY_SIZE,
            MAX_SNAPSHOTS * SNAPSHOT_ENTRY_SIZE,
        ),
        ("L1 table", fields.l1_table_offset, fields.l1_size * 8, MAX_L1_TABLE),
    )
    for name, offset, length, limit in tables:
        check_table(path, name, offset=offset, length=length, limit=limit, cluster_size=cluster_size)
    needed = l1_entries(
        fields.size,
        cluster_bits=fields.cluster_bits,
        extended_l2=Incompatible.EXTENDED_L2 in Incompatible(fields.incompatible_features),
    )
    if fields.size > (1 << 63) - 512 or needed > MAX_L1_TABLE // 8:
        raise InvalidImage(
            path, f"size is {fields.size}, more than clusters of {cluster_size} bytes can map", DAMAGED_HEADER
        )
    if fields.l1_size < needed:
        raise InvalidImage(
            path, f"l1_size is {fields.l1_size}, but size {fields.size} needs {needed} entries", DAMAGED_HEADER
        )


def odd_fields(fields: Any) -> Iterator[str]:
    """What QEMU does not look at, and what no writer that keeps to the format produces (HARD list)."""
    if fields.header_length % 8:
        yield f"header_length is {fields.header_length}, not a multiple of 8"
    if any(fields.padding):
        yield f"the header padding is not zero: {fields.padding.hex()}"
    if fields.size % 512:
        yield f"size is {fields.size}, not a multiple of 512; the guest does not see the rest"


def check_table(path: str, name: str, *, offset: int, length: int, limit: int, cluster_size: int) -> None:
    """A table of ``length`` bytes must respect QEMU's ``limit``, begin at a cluster and end below 2^63 (V15-V17).

    Raises:
        InvalidImage: it does not; ``name`` begins the message.
    """
    if length > limit:
        raise InvalidImage(path, f"{name} has {length} bytes, more than {limit}", DAMAGED_HEADER)
    if offset % cluster_size or offset + length >= 1 << 63:
        raise InvalidImage(path, f"{name} offset {offset:#x} is not a cluster of the file", DAMAGED_HEADER)

"""The QCOW2 header: cluster 0 of an image as one checked value, and back to bytes.

The only door through which an image enters: :func:`read_header` applies QEMU's checks in its order (V1-V23), then the
ones that QEMU lacks (HARD list). Snapshots and bitmaps have tables of their own, see their modules (V24).
"""

import errno
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import itemgetter
from typing import Any

from nbdq.errors import CorruptImage, InvalidImage, UnsupportedImage
from nbdq.qcow2.extensions import (
    DAMAGED_HEADER,
    BitmapsExtension,
    EncryptionPointer,
    Extensions,
    UnknownExtension,
    build_extensions,
    name_from_image,
    parse_extensions,
)
from nbdq.qcow2.features import FEATURE_NAMES, Autoclear, Compatible, CompressionType, CryptMethod, Incompatible
from nbdq.qcow2.fields import (
    FULL_LENGTH,
    MAGIC,
    MAX_BACKING_NAME,
    SNAPSHOT_ENTRY_SIZE,
    V2_LENGTH,
    V3_LENGTH,
    build_fields,
    check_features,
    check_tables,
    odd_fields,
    parse_fields,
)
from nbdq.storage import FileStorage

__all__ = [
    "Autoclear",
    "Compatible",
    "CompressionType",
    "CryptMethod",
    "Header",
    "Incompatible",
    "build_area",
    "build_header",
    "has_feature_names",
    "read_header",
    "update_fields",
]

#: Where and how long the backing name is.
_NAME = slice(8, 20)

_TRUNCATED = "the file was cut off: restore the image from a copy"


@dataclass(frozen=True)
class Header:
    """What cluster 0 of one image says; offsets and sizes in bytes unless the name says otherwise.

    A value of :func:`read_header` has passed all checks; one made by hand for :func:`build_header` has not.
    """

    cluster_bits: int
    size: int
    """As stored; see :attr:`guest_size`."""
    l1_size: int
    """Entries, at least as many as ``size`` needs (Q40)."""
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    version: int = 3
    backing_name: str | None = None
    """As stored, not resolved; a path of any bytes (surrogates stand for what is not UTF-8)."""
    backing_format: str | None = None
    crypt_method: CryptMethod = CryptMethod.NONE
    snapshot_count: int = 0
    snapshots_offset: int = 0
    incompatible: Incompatible = Incompatible.NONE
    compatible: Compatible = Compatible.NONE
    autoclear: Autoclear = Autoclear.NONE
    refcount_order: int = 4
    header_length: int = FULL_LENGTH
    compression_type: CompressionType = CompressionType.DEFLATE
    data_file_name: str | None = None
    encryption: EncryptionPointer | None = None
    bitmaps: BitmapsExtension | None = None
    """None also where the extension exists but cannot be believed (Q16)."""
    overlay_marker: str | None = None
    """The absolute path of the overlay that took over from this image, as nbdq recorded it then."""
    unknown_extensions: tuple[UnknownExtension, ...] = ()
    unknown_fields: bytes = b""
    """Header bytes from 112 on, to be written back untouched (Q8)."""
    warnings: tuple[str, ...] = ()
    """What is wrong but does not hinder reading (HARD list)."""
    overlaps: tuple[str, ...] = ()
    """Those of the warnings that say where tables overlap: nobody may write to such an image."""

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def guest_size(self) -> int:
        """Bytes of the disk that the guest sees: whole sectors only, as in QEMU (Q4)."""
        return self.size // 512 * 512

    @property
    def extended_l2(self) -> bool:
        return Incompatible.EXTENDED_L2 in self.incompatible

    @property
    def has_data_file(self) -> bool:
        return Incompatible.DATA_FILE in self.incompatible

    @property
    def data_file_raw(self) -> bool:
        return Autoclear.DATA_FILE_RAW in self.autoclear

    @property
    def is_dirty(self) -> bool:
        return Incompatible.DIRTY in self.incompatible

    @property
    def is_corrupt(self) -> bool:
        return Incompatible.CORRUPT in self.incompatible


def read_header(storage: FileStorage, *, describe: bool = False) -> Header:
    """Read and check the header in two reads of at most one cluster. Keeps no reference to ``storage``.

    With ``describe`` the header is wanted for its own sake, not to read guest data: an encrypted image and one whose
    data file cannot be told are then accepted too, as by ``qemu-img info``.

    Raises:
        InvalidImage: not QCOW2, or a field holds an impossible value.
        UnsupportedImage: a version, feature or encryption method that nbdq does not have.
        CorruptImage: a table lies outside of the file.
        OSError: the file cannot be read.
    """
    path = storage.path
    fixed = _read_padded(storage, 0, FULL_LENGTH)
    fields = parse_fields(path, fixed)
    cluster_size = 1 << fields.cluster_bits
    name_offset = fields.backing_file_offset
    # One read covers the extensions, which end where the backing name begins, and the name.
    end = min(cluster_size, name_offset + MAX_BACKING_NAME) if name_offset else cluster_size
    head = fixed + _read_padded(storage, FULL_LENGTH, max(end - FULL_LENGTH, 0))
    area = head[fields.header_length : name_offset or cluster_size]

    check_features(path, fields, area)
    check_tables(path, fields)
    crypt_method = CryptMethod(fields.crypt_method)
    extensions = parse_extensions(
        path,
        area,
        version=fields.version,
        cluster_size=cluster_size,
        crypt_method=crypt_method,
        autoclear=Autoclear(fields.autoclear_features),
    )
    header = Header(
        cluster_bits=fields.cluster_bits,
        size=fields.size,
        l1_size=fields.l1_size,
        l1_table_offset=fields.l1_table_offset,
        refcount_table_offset=fields.refcount_table_offset,
        refcount_table_clusters=fields.refcount_table_clusters,
        version=fields.version,
        backing_name=_backing_name(path, fields, head),
        backing_format=extensions.backing_format,
        crypt_method=crypt_method,
        snapshot_count=fields.nb_snapshots,
        snapshots_offset=fields.snapshots_offset,
        incompatible=Incompatible(fields.incompatible_features),
        compatible=Compatible(fields.compatible_features),
        autoclear=Autoclear(fields.autoclear_features),
        refcount_order=fields.refcount_order,
        header_length=fields.header_length,
        compression_type=CompressionType(fields.compression_type),
        data_file_name=extensions.data_file_name,
        encryption=extensions.encryption,
        bitmaps=extensions.bitmaps,
        overlay_marker=extensions.overlay_marker,
        unknown_extensions=extensions.unknown,
        unknown_fields=head[FULL_LENGTH : fields.header_length],
    )
    _check_references(path, header, describe=describe)
    overlaps = _check_placement(path, header, file_size=storage.size())
    warnings = (*odd_fields(fields), *extensions.warnings, *overlaps)
    return replace(header, warnings=warnings, overlaps=tuple(overlaps))


def build_header(header: Header) -> bytes:
    """Cluster 0 up to the end of the backing name: fields, extensions, name. The inverse of :func:`read_header`.

    Nothing is checked but the space: what a caller lays out is its own affair.

    Raises:
        OSError: ENOSPC if extensions and backing name do not fit into the first cluster (Q12).
    """
    feature_names = len(FEATURE_NAMES) if has_feature_names(header) else 0
    name = (header.backing_name or "").encode("utf-8", "surrogateescape")
    name_offset = len(build_area(header, feature_names=feature_names))
    if name_offset + len(name) > header.cluster_size:
        raise OSError(errno.ENOSPC, "header extensions and backing file name do not fit into the first cluster")
    place = {"name_offset": name_offset, "name_length": len(name)} if name else {}
    return build_area(header, feature_names=feature_names, **place) + name


def build_area(header: Header, *, feature_names: int, name_offset: int = 0, name_length: int = 0) -> bytes:
    """Fields and extensions, with the given place of the backing name. Nothing is checked.

    Args:
        feature_names: entries of the feature name table.
    """
    extensions = Extensions(
        backing_format=header.backing_format,
        data_file_name=header.data_file_name,
        encryption=header.encryption,
        bitmaps=header.bitmaps,
        overlay_marker=header.overlay_marker,
        unknown=header.unknown_extensions,
    )
    fixed = _build_fixed(header, name_offset=name_offset, name_length=name_length) + header.unknown_fields
    return fixed[: header.header_length] + build_extensions(extensions, feature_names=feature_names)


def has_feature_names(header: Header) -> bool:
    """Whether the header has a feature name table: QEMU leaves it out where clusters are small (Q22)."""
    return header.version >= 3 and header.cluster_size > 4096


def update_fields(sector: bytes, header: Header) -> bytes:
    """The first sector of cluster 0 with the fields of ``header`` in it, and everything else as it was.

    Extensions and backing name, which another program may have laid out differently, stay where they are; so only what
    is in the fixed fields may differ from the header in the file.
    """
    fixed = _build_fixed(header, name_offset=0, name_length=0)
    kept = V3_LENGTH if header.version >= 3 else V2_LENGTH
    return fixed[: _NAME.start] + sector[_NAME] + fixed[_NAME.stop : kept] + sector[kept:]


def _build_fixed(header: Header, *, name_offset: int, name_length: int) -> bytes:
    return build_fields(
        {
            "magic": MAGIC,
            "version": header.version,
            "backing_file_offset": name_offset,
            "backing_file_size": name_length,
            "cluster_bits": header.cluster_bits,
            "size": header.size,
            "crypt_method": header.crypt_method,
            "l1_size": header.l1_size,
            "l1_table_offset": header.l1_table_offset,
            "refcount_table_offset": header.refcount_table_offset,
            "refcount_table_clusters": header.refcount_table_clusters,
            "nb_snapshots": header.snapshot_count,
            "snapshots_offset": header.snapshots_offset,
            "incompatible_features": header.incompatible,
            "compatible_features": header.compatible,
            "autoclear_features": header.autoclear,
            "refcount_order": header.refcount_order,
            "header_length": header.header_length,
            "compression_type": header.compression_type,
            "padding": bytes(7),
        }
    )


def _backing_name(path: str, fields: Any, head: bytes) -> str | None:
    """The stored name (V23), which lies behind the header (Q10)."""
    start, length = fields.backing_file_offset, fields.backing_file_size
    if start == 0:
        return None
    if start < fields.header_length:
        raise InvalidImage(path, f"backing_file_offset is {start}, inside the header", DAMAGED_HEADER)
    limit = min(MAX_BACKING_NAME, (1 << fields.cluster_bits) - start)
    if length > limit:
        raise InvalidImage(path, f"backing_file_size is {length}, more than {limit}", "rebase the image")
    return name_from_image(path, "the backing file name", head[start : start + length]) or None


def _check_references(path: str, header: Header, *, describe: bool) -> None:
    """Data file and encryption (V21, V22, Q17)."""
    if describe:
        return
    if header.data_file_raw and not header.has_data_file:
        raise InvalidImage(path, "autoclear_features says raw external data, but there is no data file", DAMAGED_HEADER)
    if header.has_data_file and header.data_file_name is None:
        raise InvalidImage(path, "the image has an external data file, but does not name it", DAMAGED_HEADER)
    if header.crypt_method is CryptMethod.LUKS and header.encryption is None:
        raise InvalidImage(
            path, "crypt_method is 2 (LUKS), but there is no encryption header extension", DAMAGED_HEADER
        )
    if header.crypt_method is not CryptMethod.NONE:
        method = "LUKS" if header.crypt_method is CryptMethod.LUKS else "legacy AES"
        raise UnsupportedImage(path, f"the image is encrypted ({method})", "convert it without encryption")


def _check_placement(path: str, header: Header, *, file_size: int) -> list[str]:
    """Where the tables lie (HARD list): refuse what the file does not hold, warn of overlaps.

    QEMU reads zeros past the end of the file: a cut-off L1 table would make an empty disk out of a full one.
    """
    cluster_size = header.cluster_size
    # The L1 table must be there to its last entry; the others may end in the file's last, partial cluster (Q2).
    l1_limit, limit = file_size, -(-file_size // cluster_size) * cluster_size
    tables = [
        (header.l1_table_offset, header.l1_size * 8, "the L1 table", l1_limit),
        (header.refcount_table_offset, header.refcount_table_clusters * cluster_size, "the refcount table", limit),
        (header.snapshots_offset, header.snapshot_count * SNAPSHOT_ENTRY_SIZE, "the snapshot table", limit),
    ]
    if header.bitmaps:
        tables.append((header.bitmaps.directory_offset, header.bitmaps.directory_size, "the bitmap directory", limit))
    if header.encryption:
        tables.append((header.encryption.offset, header.encryption.length, "the encryption header", limit))
    areas = [(0, cluster_size, "the header")]
    for offset, length, name, end in tables:
        if length == 0:
            continue
        if offset + length > end:
            raise CorruptImage(
                path, f"{name} at {offset:#x} ends at {offset + length:#x}, after the file ({file_size:#x})", _TRUNCATED
            )
        areas.append((offset, length, name))
    areas.sort(key=itemgetter(0))
    overlaps = []
    for (offset, length, name), (next_offset, _, next_name) in pairwise(areas):
        if offset + length > next_offset:
            overlaps.append(f"{name} overlaps {next_name} at {next_offset:#x}")
    return overlaps


def _read_padded(storage: FileStorage, offset: int, length: int) -> bytes:
    """A short file reads as if zeros followed (V1)."""
    return storage.read(offset, length).ljust(length, b"\0")

"""Header extensions: the typed records between the header and the backing name in cluster 0 (section 1.4).

Bytes in, values out, and back; no files. Extensions of unknown type are kept in order, because whoever rewrites
the header must write them again (Q23).
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice

from construct import Aligned, Bytes, GreedyBytes, Int8ub, Int32ub, Int64ub, Prefixed, Struct

from nbdq.errors import InvalidImage, UnsupportedImage, printable
from nbdq.qcow2.features import FEATURE_NAMES, Autoclear, CryptMethod

#: QEMU's limits (R-24).
MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY = 1024 * MAX_BITMAPS
MAX_BACKING_FORMAT = 15
#: Our own limit: a cluster of 2 MiB could hold 262 144 empty extensions, each an object in memory.
MAX_EXTENSIONS = 1024

#: How to mend a header that no writer produces.
DAMAGED_HEADER = "the header is damaged: restore the image from a copy"


class ExtensionType(IntEnum):
    """The extension types that mean something to nbdq."""

    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    ENCRYPTION_HEADER = 0x0537BE77
    DATA_FILE = 0x44415441
    OVERLAY = 0x6E626471
    """nbdq's own ("nbdq"): the absolute path of the overlay that took over from this image. Others preserve it."""


@dataclass(frozen=True)
class BitmapsExtension:
    """Where the bitmap directory is, and how many bitmaps it lists."""

    count: int
    directory_size: int
    directory_offset: int


@dataclass(frozen=True)
class EncryptionPointer:
    """Where the LUKS header is, in bytes of the image file."""

    offset: int
    length: int


@dataclass(frozen=True)
class UnknownExtension:
    """An extension of a type that nbdq does not know."""

    type: int
    data: bytes


@dataclass(frozen=True)
class Extensions:
    """What the extensions of one header say."""

    backing_format: str | None = None
    data_file_name: str | None = None
    encryption: EncryptionPointer | None = None
    bitmaps: BitmapsExtension | None = None
    overlay_marker: str | None = None
    unknown: tuple[UnknownExtension, ...] = ()
    warnings: tuple[str, ...] = ()


_EXTENSION = Aligned(8, Struct("type" / Int32ub, "data" / Prefixed(Int32ub, GreedyBytes)))
_EXTENSION_HEAD = Struct("type" / Int32ub, "length" / Int32ub)
_BITMAPS = Struct("count" / Int32ub, "reserved" / Int32ub, "directory_size" / Int64ub, "directory_offset" / Int64ub)
_ENCRYPTION_POINTER = Struct("offset" / Int64ub, "length" / Int64ub)
_FEATURE_NAME = Struct("set" / Int8ub, "bit" / Int8ub, "name" / Bytes(46))


def name_from_image(path: str, field: str, raw: bytes) -> str:
    """A file name stored in an image; bytes that are not UTF-8 survive as surrogates, as in ``os.fsdecode``.

    Raises:
        InvalidImage: a NUL or another control character, which no tool writes and no terminal should see (Q24).
    """
    if any(byte < 0x20 or byte == 0x7F for byte in raw):
        raise InvalidImage(path, f"{field} has a control character: '{printable(raw)}'", DAMAGED_HEADER)
    return raw.decode("utf-8", "surrogateescape")


def parse_extensions(
    path: str, area: bytes, *, version: int, cluster_size: int, crypt_method: CryptMethod, autoclear: Autoclear
) -> Extensions:
    """Everything that the extension ``area`` of the image at ``path`` says (V20).

    Raises:
        InvalidImage: an extension that QEMU refuses, a duplicate, or a name that cannot be one (Q20, Q24).
    """
    found: dict[ExtensionType, bytes] = {}
    unknown = []
    for kind, data in _split(path, area):
        try:
            known = ExtensionType(kind)
        except ValueError:
            unknown.append(UnknownExtension(kind, data))
            continue
        if known in found:
            raise InvalidImage(path, f"header extension {kind:#x} appears twice", DAMAGED_HEADER)
        found[known] = data

    bitmaps, warnings = _parse_bitmaps(
        path, found.get(ExtensionType.BITMAPS), version=version, cluster_size=cluster_size, autoclear=autoclear
    )
    data_file_name = found.get(ExtensionType.DATA_FILE, b"")
    overlay_marker = found.get(ExtensionType.OVERLAY, b"")
    return Extensions(
        backing_format=_parse_backing_format(path, found.get(ExtensionType.BACKING_FORMAT, b"")),
        data_file_name=name_from_image(path, "the data file name", data_file_name) or None,
        encryption=_parse_encryption(
            path, found.get(ExtensionType.ENCRYPTION_HEADER), cluster_size=cluster_size, crypt_method=crypt_method
        ),
        bitmaps=bitmaps,
        overlay_marker=name_from_image(path, "the name of the overlay", overlay_marker) or None,
        unknown=tuple(unknown),
        warnings=warnings,
    )


def unsupported_features(path: str, unknown: int, area: bytes) -> UnsupportedImage:
    """The error for incompatible bits that nbdq does not know, named by the image's own table if it has one (Q13)."""
    names: dict[int, bytes] = {}
    with suppress(InvalidImage):  # the bits are the news, not a damaged extension
        for kind, data in _split(path, area):
            if kind == ExtensionType.FEATURE_NAMES:
                for start in range(0, min(len(data) // 48, 192) * 48, 48):
                    entry = _FEATURE_NAME.parse(data[start : start + 48])
                    if entry.set == 0:
                        names[entry.bit] = entry.name.rstrip(b"\0")
    bits = [bit for bit in range(64) if unknown >> bit & 1]
    shown = [f"'{printable(names[bit])}' (bit {bit})" if names.get(bit) else f"bit {bit}" for bit in bits]
    return UnsupportedImage(
        path,
        f"incompatible_features has {', '.join(shown)}, unknown to nbdq",
        "use a program that knows the feature, or convert the image with it",
    )


def area_length(path: str, area: bytes) -> int:
    """Bytes of ``area`` that its extensions take, with their end mark.

    Raises:
        InvalidImage: as :func:`parse_extensions`, for a record that does not fit.
    """
    records = sum(8 + -(-len(data) // 8) * 8 for _, data in _split(path, area))
    return min(records + 8, len(area))


def build_extensions(extensions: Extensions, *, feature_names: int) -> bytes:
    """The extension area with its end mark, in the order that QEMU writes (Q12).

    Args:
        feature_names: how many names the feature name table has; 0 leaves it out (Q22).
    """
    records: list[tuple[int, bytes]] = []
    if extensions.backing_format is not None:
        records.append((ExtensionType.BACKING_FORMAT, extensions.backing_format.encode("ascii")))
    if extensions.data_file_name is not None:
        records.append((ExtensionType.DATA_FILE, extensions.data_file_name.encode("utf-8", "surrogateescape")))
    if extensions.encryption is not None:
        records.append((ExtensionType.ENCRYPTION_HEADER, _ENCRYPTION_POINTER.build(vars(extensions.encryption))))
    if feature_names:
        table = [
            _FEATURE_NAME.build({"set": group, "bit": bit, "name": name.encode("ascii").ljust(46, b"\0")})
            for (group, bit), name in islice(FEATURE_NAMES.items(), feature_names)
        ]
        records.append((ExtensionType.FEATURE_NAMES, b"".join(table)))
    if extensions.bitmaps is not None:
        records.append((ExtensionType.BITMAPS, _BITMAPS.build({"reserved": 0, **vars(extensions.bitmaps)})))
    if extensions.overlay_marker is not None:
        records.append((ExtensionType.OVERLAY, extensions.overlay_marker.encode("utf-8", "surrogateescape")))
    records += [(extension.type, extension.data) for extension in extensions.unknown]
    records.append((ExtensionType.END, b""))
    return b"".join(_EXTENSION.build({"type": kind, "data": data}) for kind, data in records)


def _split(path: str, area: bytes) -> Iterator[tuple[int, bytes]]:
    """The raw (type, data) records of ``area``, up to its end mark or its last eight bytes."""
    position = 0
    for _ in range(MAX_EXTENSIONS + 1):  # and the end mark
        if len(area) - position < 8:
            return
        head = _EXTENSION_HEAD.parse(area[position : position + 8])
        position += 8
        if head.length > len(area) - position:
            raise InvalidImage(
                path,
                f"header extension {head.type:#x} has length {head.length}, but {len(area) - position} bytes are left",
                DAMAGED_HEADER,
            )
        if head.type == ExtensionType.END:
            return
        yield head.type, area[position : position + head.length]
        position += -(-head.length // 8) * 8
    raise InvalidImage(path, f"more than {MAX_EXTENSIONS} header extensions", DAMAGED_HEADER)


def _parse_backing_format(path: str, raw: bytes) -> str | None:
    if len(raw) > MAX_BACKING_FORMAT:
        raise InvalidImage(
            path, f"the backing format has {len(raw)} bytes, more than {MAX_BACKING_FORMAT}", "rebase the image with -F"
        )
    if not all(0x20 < byte < 0x7F for byte in raw):
        raise InvalidImage(path, f"the backing format is not a word: '{printable(raw)}'", "rebase the image with -F")
    return raw.decode("ascii") or None


def _parse_encryption(
    path: str, raw: bytes | None, *, cluster_size: int, crypt_method: CryptMethod
) -> EncryptionPointer | None:
    if raw is None:
        return None
    if crypt_method is not CryptMethod.LUKS:
        raise InvalidImage(path, f"an encryption header extension with crypt_method {crypt_method}", DAMAGED_HEADER)
    if len(raw) != _ENCRYPTION_POINTER.sizeof():
        raise InvalidImage(path, f"the encryption header extension has length {len(raw)}, not 16", DAMAGED_HEADER)
    pointer = _ENCRYPTION_POINTER.parse(raw)
    if pointer.offset % cluster_size or pointer.offset + pointer.length > 1 << 63:
        raise InvalidImage(path, f"the encryption header offset {pointer.offset:#x} is invalid", DAMAGED_HEADER)
    return EncryptionPointer(pointer.offset, pointer.length)


def _parse_bitmaps(
    path: str, raw: bytes | None, *, version: int, cluster_size: int, autoclear: Autoclear
) -> tuple[BitmapsExtension | None, tuple[str, ...]]:
    """The bitmaps extension, if it can be believed, and the warning if not (Q16)."""
    if raw is None:
        if Autoclear.BITMAPS in autoclear:
            return None, ("autoclear_features promises bitmaps, but the image has no bitmaps extension",)
        return None, ()
    if len(raw) != _BITMAPS.sizeof():
        raise InvalidImage(path, f"the bitmaps extension has length {len(raw)}, not 24", DAMAGED_HEADER)
    if Autoclear.BITMAPS not in autoclear:
        writer = "a version 2 image cannot keep bitmaps" if version < 3 else "a program without bitmap support wrote it"
        return None, (f"the bitmaps of the image are ignored because {writer}",)
    found = _BITMAPS.parse(raw)
    problem = None
    if found.reserved:
        problem = f"reserved field is {found.reserved:#x}, not 0"
    elif not 1 <= found.count <= MAX_BITMAPS:
        problem = f"nb_bitmaps is {found.count}, not 1 to {MAX_BITMAPS}"
    elif found.directory_offset % cluster_size or found.directory_offset + found.directory_size > 1 << 63:
        problem = f"bitmap_directory_offset {found.directory_offset:#x} is invalid"
    elif found.directory_size > MAX_BITMAP_DIRECTORY:
        problem = f"bitmap_directory_size is {found.directory_size}, more than {MAX_BITMAP_DIRECTORY}"
    if problem:
        raise InvalidImage(path, f"the bitmaps extension is invalid: {problem}", DAMAGED_HEADER)
    return BitmapsExtension(found.count, found.directory_size, found.directory_offset), ()

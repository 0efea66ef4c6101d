"""The header of an existing image, changed so that a crash leaves the old one or the new one, whole (R-55).

Fields and extensions are kept within the first sector, which a medium writes whole or not at all. The backing name goes
there too if there is room; else to a place of cluster 0 that the old header does not use, and is durable before the
sector that names it. The names of features give way to what an image needs. What the old header used behind the first
sector stays there unread, until a later name takes its place.
"""

import errno
from dataclasses import replace

from nbdq.errors import OperationError
from nbdq.qcow2.extensions import MAX_BACKING_FORMAT, BitmapsExtension, area_length
from nbdq.qcow2.features import FEATURE_NAMES, Autoclear
from nbdq.qcow2.fields import MAX_BACKING_NAME, V2_LENGTH
from nbdq.qcow2.format import Header, build_area, has_feature_names, update_fields
from nbdq.storage import FileStorage

#: What a medium writes whole.
_SECTOR = 512
#: Bytes of a feature name, and of what stands before the first one.
_FEATURE_NAME, _RECORD_HEAD = 48, 8


def rewrite_header_area(storage: FileStorage, header: Header) -> Header:
    """Make the image in ``storage`` say ``header``: fields, extensions and backing name. Durable on return.

    Nobody else changes cluster 0 meanwhile. What ``header`` was made from by :func:`dataclasses.replace` brings
    extensions and fields that nobody knows along (Q8, Q23). Returns ``header``.

    Raises:
        OSError: ENOSPC if fields and extensions exceed one sector, or cluster 0 has no room for both backing names;
            nothing was changed then. Else the file cannot be read or written.
        InvalidImage: the header in the file is damaged.
    """
    least = len(build_area(header, feature_names=0))
    if least > _SECTOR:
        what = f"the header would have {least} bytes, but only {_SECTOR} can be replaced safely; use shorter names"
        raise OSError(errno.ENOSPC, what, storage.path)
    feature_names = 0
    if has_feature_names(header):
        room = _SECTOR - least - _RECORD_HEAD
        feature_names = min(max(room, 0) // _FEATURE_NAME, len(FEATURE_NAMES))
    end = len(build_area(header, feature_names=feature_names))
    name = (header.backing_name or "").encode("utf-8", "surrogateescape")
    name_offset = 0
    inside = b""
    if name and end + len(name) <= _SECTOR:
        name_offset, inside = end, name
    elif name:
        name_offset = _place_name(storage, header, name)
    area = build_area(header, feature_names=feature_names, name_offset=name_offset, name_length=len(name))
    storage.write(0, (area + inside).ljust(_SECTOR, b"\0"))
    storage.sync()
    return header


def write_fields(storage: FileStorage, header: Header) -> Header:
    """Make the fixed fields of the image say ``header``, which differs from the file in nothing else.

    Durable on return. Extensions and backing name, however they are laid out, stay where they are. Returns ``header``.

    Raises:
        OSError: the file cannot be read or written.
    """
    storage.write(0, update_fields(storage.read(0, _SECTOR), header))
    storage.sync()
    return header


def set_backing(storage: FileStorage, header: Header, *, name: str | None, format: str | None) -> Header:
    """Let ``name``, as it is to be stored, be the backing file, or none; nobody looks whether it exists (4.9).

    Durable on return; the header that the image has then.

    Raises:
        OperationError: the name or format cannot be stored; nothing was changed.
        OSError, InvalidImage: as :func:`rewrite_header_area`.
    """
    if not name:
        name = format = None
    else:
        if len(name.encode("utf-8", "surrogateescape")) > MAX_BACKING_NAME:
            raise OperationError(f"the backing file name has more than {MAX_BACKING_NAME} bytes; use a relative name")
        if any(c < " " or "\x7f" <= c <= "\x9f" for c in name):
            raise OperationError("the backing file name has a control character, which no reader should accept")
        if format is not None and (len(format) > MAX_BACKING_FORMAT or any(not "!" <= c <= "~" for c in format)):
            raise OperationError("the backing format is not the name of a format")
        if header.data_file_raw:
            raise OperationError(
                f"{storage.path}: an image with a raw data file cannot have a backing file, which the data file lacks"
            )
    return rewrite_header_area(storage, replace(header, backing_name=name, backing_format=format))


def set_overlay_marker(storage: FileStorage, header: Header, overlay: str | None) -> Header:
    """Record that ``overlay``, an absolute path, has taken over from this image, or that none has. Durable on return.

    The mark protects the overlay: who opens this image for writing is told of it (:mod:`nbdq.chain.marker`).

    Raises:
        OSError, InvalidImage: as :func:`rewrite_header_area`; with ENOSPC the path is too long for a mark.
    """
    assert overlay is None or overlay.startswith("/"), "a mark is an absolute path"
    return rewrite_header_area(storage, replace(header, overlay_marker=overlay))


def set_bitmaps_extension(storage: FileStorage, header: Header, extension: BitmapsExtension | None) -> Header:
    """Let the header name another bitmap directory, or none, and promise its bitmaps or not (Q15, W4).

    The directory is durable, and the old one's space is freed by the caller afterwards. Durable on return.

    Raises:
        OSError, InvalidImage: as :func:`rewrite_header_area`.
    """
    autoclear = header.autoclear | Autoclear.BITMAPS if extension else Autoclear(header.autoclear & ~Autoclear.BITMAPS)
    return rewrite_header_area(storage, replace(header, autoclear=autoclear, bitmaps=extension))


def _place_name(storage: FileStorage, header: Header, name: bytes) -> int:
    """Where a backing name lies behind the first sector, durably, and out of the way of what the file says now."""
    head = storage.read(0, header.cluster_size).ljust(header.cluster_size, b"\0")
    old_offset, old_length = int.from_bytes(head[8:16], "big"), int.from_bytes(head[16:20], "big")
    if old_offset >= _SECTOR and head[old_offset : old_offset + old_length] == name:
        return old_offset
    old_start = int.from_bytes(head[100:104], "big") if int.from_bytes(head[4:8], "big") >= 3 else V2_LENGTH
    old_area = head[old_start : old_offset or header.cluster_size]
    used = [(old_start, old_start + area_length(storage.path, old_area)), (old_offset, old_offset + old_length)]
    for start in sorted({_SECTOR, *(max(end, _SECTOR) for _, end in used)}):
        end = start + len(name)
        if end <= header.cluster_size and all(end <= first or last <= start for first, last in used):
            storage.write(start, name)
            storage.sync()
            return start
    what = f"cluster 0 has no room for another backing file name of {len(name)} bytes; use a shorter name"
    raise OSError(errno.ENOSPC, what, storage.path)

"""What an image says about itself, as QEMU's structures: for ``nbdq info``, and for administrators (section 4.2).

JSON has the keys of the newest QEMU. Neither the data file nor any backing file is opened (R-37).
"""

import logging
from typing import Any

from nbdq.chain.resolve import backing_path
from nbdq.errors import printable
from nbdq.qcow2.bitmaps.directory import Bitmap, BitmapFlags, read_bitmaps
from nbdq.qcow2.format import Compatible, CompressionType, CryptMethod, Header
from nbdq.qcow2.luks import LuksHeader, read_luks_header
from nbdq.qcow2.snapshots import Snapshot, read_snapshots
from nbdq.storage import FileStorage

_logger = logging.getLogger(__name__)

#: QEMU cuts ids and names of snapshots to the bytes that its structures hold.
_MAX_SNAPSHOT_ID, _MAX_SNAPSHOT_NAME = 127, 255
#: No line of the log is longer; the longest name in an image has 1023 bytes.
_MAX_SHOWN = 4096


def describe_image(storage: FileStorage, header: Header | None) -> dict[str, Any]:
    """One image as QEMU's ``BlockGraphInfo``; ``header`` is None for raw.

    Raises:
        ImageError, OSError: tables that the header names cannot be read.
    """
    # QEMU counts the length of files in sectors.
    file_length = -(-storage.size() // 512) * 512
    common = {"filename": json_text(storage.path), "actual-size": storage.allocated_size(), "dirty-flag": False}
    file = {
        **common,
        "virtual-size": file_length,
        "format": "host_device" if storage.is_block_device else "file",
        "format-specific": {"type": "file", "data": {}},
        "children": [],
    }
    found: dict[str, Any] = {
        **common,
        "format": "raw",
        "virtual-size": file_length,
        "children": [{"name": "file", "info": file}],
    }
    if header is None:
        return found
    for warning in header.warnings:
        _logger.warning("%s: %s", printable(storage.path, _MAX_SHOWN), warning)
    found |= {
        "format": "qcow2",
        "virtual-size": header.guest_size,
        "cluster-size": header.cluster_size,
        "dirty-flag": header.is_dirty,
        "format-specific": {"type": "qcow2", "data": _describe_qcow2(storage, header)},
    }
    if header.crypt_method is not CryptMethod.NONE:
        found["encrypted"] = True
    if header.backing_name is not None:
        found["backing-filename"] = json_text(header.backing_name)
        found["full-backing-filename"] = json_text(backing_path(storage.path, header.backing_name))
        if header.backing_format is not None:
            found["backing-filename-format"] = header.backing_format
    if snapshots := read_snapshots(storage, header):
        found["snapshots"] = [_describe_snapshot(snapshot) for snapshot in snapshots]
    return found


def _describe_qcow2(storage: FileStorage, header: Header) -> dict[str, Any]:
    """QEMU's ``ImageInfoSpecificQCow2``, in the order in which QEMU prints it."""
    compression = "zstd" if header.compression_type is CompressionType.ZSTD else "zlib"
    refcount_bits = 1 << header.refcount_order
    encryption = _describe_encryption(storage, header)
    if header.version == 2:
        return {"compat": "0.10", "compression-type": compression, "refcount-bits": refcount_bits, **encryption}
    found: dict[str, Any] = {
        "compat": "1.1",
        "compression-type": compression,
        "lazy-refcounts": Compatible.LAZY_REFCOUNTS in header.compatible,
    }
    if bitmaps := read_bitmaps(storage, header):
        found["bitmaps"] = [_describe_bitmap(bitmap) for bitmap in bitmaps]
    found["refcount-bits"] = refcount_bits
    if header.data_file_name is not None:
        found["data-file"] = json_text(header.data_file_name)
    found |= encryption
    if header.has_data_file:
        found["data-file-raw"] = header.data_file_raw
    return {**found, "corrupt": header.is_corrupt, "extended-l2": header.extended_l2}


def _describe_bitmap(bitmap: Bitmap) -> dict[str, Any]:
    names = {BitmapFlags.IN_USE: "in-use", BitmapFlags.AUTO: "auto"}
    return {
        "flags": [name for flag, name in names.items() if flag in bitmap.flags],
        "name": json_text(bitmap.name),
        "granularity": bitmap.granularity,
    }


def _describe_encryption(storage: FileStorage, header: Header) -> dict[str, Any]:
    """The ``encrypt`` key, if the image has something to say about it."""
    if header.crypt_method is CryptMethod.AES:
        return {"encrypt": {"format": "aes"}}
    luks = read_luks_header(storage, header)
    return {} if luks is None else {"encrypt": _describe_luks(luks)}


def _describe_luks(luks: LuksHeader) -> dict[str, Any]:
    slots: list[dict[str, Any]] = [
        {"active": True, "iters": slot.iterations, "key-offset": slot.key_offset, "stripes": slot.stripes}
        if slot.active
        else {"active": False, "key-offset": slot.key_offset}
        for slot in luks.slots
    ]
    return {
        "ivgen-alg": luks.iv_generator,
        "detached-header": False,
        "hash-alg": luks.hash,
        "cipher-alg": luks.cipher,
        "uuid": luks.uuid,
        **({} if luks.iv_hash is None else {"ivgen-hash-alg": luks.iv_hash}),
        "format": "luks",
        "cipher-mode": luks.mode,
        "slots": slots,
        "payload-offset": luks.payload_offset,
        "master-key-iters": luks.master_key_iterations,
    }


def _describe_snapshot(snapshot: Snapshot) -> dict[str, Any]:
    seconds, nanoseconds = divmod(snapshot.vm_clock_ns, 10**9)
    return {
        "id": json_text(snapshot.id, _MAX_SNAPSHOT_ID),
        "name": json_text(snapshot.name, _MAX_SNAPSHOT_NAME),
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_seconds,
        "date-nsec": snapshot.date_nanoseconds,
        "vm-clock-sec": seconds,
        "vm-clock-nsec": nanoseconds,
        **({} if snapshot.icount is None else {"icount": snapshot.icount}),
    }


def json_text(text: str, limit: int | None = None) -> str:
    """Foreign text cut to ``limit`` bytes and made valid Unicode, as QEMU does for JSON."""
    return text.encode("utf-8", "surrogateescape")[:limit].decode("utf-8", "replace")

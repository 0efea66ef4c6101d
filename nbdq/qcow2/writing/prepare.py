"""Before the first write: refuse what must not be written to, mend what has to be mended, withdraw broken promises."""

import struct
from dataclasses import replace

from nbdq.errors import CorruptImage
from nbdq.qcow2.audit.repair import repair_dirty
from nbdq.qcow2.features import Autoclear
from nbdq.qcow2.format import Header
from nbdq.storage import FileStorage

_AUTOCLEAR_OFFSET = 88
_KNOWN_AUTOCLEAR = int(Autoclear.BITMAPS | Autoclear.DATA_FILE_RAW)


def check_sound(path: str, header: Header) -> None:
    """Refuse an image that nobody should write to.

    Raises:
        CorruptImage: it is marked as corrupt (V10), or its tables overlap (HARD list).
    """
    if header.is_corrupt:
        raise CorruptImage(path, "is marked as corrupt", "repair it with nbdq check -r all, or use --read-only")
    if header.overlaps:
        raise CorruptImage(path, header.overlaps[0], "use --read-only, and copy what can be read")


def prepare_for_writing(storage: FileStorage, header: Header) -> Header:
    """Make the image fit for :class:`~nbdq.qcow2.writing.writable.WritableImage`; the header that it has then.

    A dirty image gets its refcounts rebuilt (Q32, V25). Autoclear bits that nobody knows are cleared, because what they
    promise will not be kept (Q15). All of that is durable on return.

    Raises:
        CorruptImage: the image is marked as corrupt (V10), or its tables overlap (HARD list).
        ImageError: a dirty image cannot be repaired.
        OSError: the file cannot be read or written.
    """
    check_sound(storage.path, header)
    if header.is_dirty:
        header = repair_dirty(storage, header)
    known = Autoclear(int(header.autoclear) & _KNOWN_AUTOCLEAR)
    if known != header.autoclear:
        storage.write(_AUTOCLEAR_OFFSET, struct.pack(">Q", known))
        storage.sync()
        header = replace(header, autoclear=known)
    return header

"""The first step of writing to an image that has bitmaps: they are loaded, and declared in use; or given up."""

from dataclasses import replace
from typing import NamedTuple

from nbdq.errors import UnsupportedImage
from nbdq.qcow2.bitmaps.storing import without_bitmaps, write_autoclear
from nbdq.qcow2.bitmaps.tracking import DirtyBitmaps
from nbdq.qcow2.features import Autoclear
from nbdq.qcow2.format import Header
from nbdq.storage import FileStorage


class TakenOver(NamedTuple):
    """What :func:`take_over_bitmaps` made of an image."""

    header: Header
    """As it is in the file now."""
    bitmaps: DirtyBitmaps | None
    """None if there are none to be marked or stored."""
    lost: str | None
    """Why the image had to lose its bitmaps, to be logged as a warning."""


def take_over_bitmaps(storage: FileStorage, header: Header) -> TakenOver:
    """Load the bitmaps of an image that is about to be written to, and declare them in use; the first step of writing.

    An image whose bitmaps cannot be maintained loses them: its autoclear bit is cleared, so that nobody believes
    them (Q70, R-57), and their clusters leak.

    Raises:
        InvalidImage, CorruptImage: directory or a table breaks a rule on which QEMU refuses the image (V24).
        OSError: the file cannot be read or written.
    """
    if header.bitmaps is None:
        if Autoclear.BITMAPS not in header.autoclear:
            return TakenOver(header, None, None)
        reason = "it promises bitmaps, but has no directory of them"  # (Q16)
    else:
        try:
            bitmaps = DirtyBitmaps.load(storage, header)
            return TakenOver(bitmaps.begin_writing(storage, header), bitmaps, None)
        except UnsupportedImage as error:
            reason = error.what
        except MemoryError:
            reason = "there is not enough memory for its bitmaps"
    header = replace(header, autoclear=without_bitmaps(header.autoclear), bitmaps=None)
    write_autoclear(storage, header.autoclear)
    return TakenOver(header, None, reason)

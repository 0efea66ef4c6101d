"""The dirty bitmaps of a disk: those of the top, which are live, and those of layers below, as in their files."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from nbdq.block import BlockDevice
from nbdq.chain.disk import ChainDisk
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.raw_disk import RawDisk
from nbdq.errors import ExportError, ImageError, NotFound, OperationError, printable
from nbdq.qcow2.bitmaps.bits import AllDirty, DirtyBits
from nbdq.qcow2.bitmaps.directory import iterate_bitmaps
from nbdq.qcow2.bitmaps.tables import load_bits
from nbdq.qcow2.bitmaps.tracking import BitmapState, DirtyBitmaps
from nbdq.qcow2.image import Qcow2Image
from nbdq.qcow2.writing.writable import WritableImage

#: Held while an image gets its first bitmaps.
_MAKING = threading.Lock()


def bitmaps_of(image: WritableImage | RawDisk) -> DirtyBitmaps:
    """The bitmaps of an image that is being written to; from the first call on, each write marks them.

    Requests that began before a change of them are waited for with :meth:`WritableImage.barrier`; a raw disk is
    drained for it.
    """
    with _MAKING:
        if image.bitmaps is None:
            header = image.header if isinstance(image, WritableImage) else None
            bitmaps = DirtyBitmaps(image.path, header, size=image.size)
            bitmaps.begin_marking()
            image.bitmaps = bitmaps
        assert isinstance(image.bitmaps, DirtyBitmaps)
        return image.bitmaps


def written_image(disk: BlockDevice) -> WritableImage | RawDisk | None:
    """The image of ``disk`` that is being written to, and so has bitmaps that change; None for a read-only disk."""
    if isinstance(disk, OverlayDisk):
        return disk.top
    return disk if isinstance(disk, RawDisk) else None


def carry_over_bitmaps(before: BlockDevice, after: BlockDevice) -> None:
    """Let ``after``, the same image opened anew, go on with the bits of ``before``, which has been finished.

    Nobody has written to the image in between, and no request is in progress.
    """
    old, new = written_image(before), written_image(after)
    if old is not None and new is not None and isinstance(old.bitmaps, DirtyBitmaps):
        bitmaps_of(new).adopt(old.bitmaps)


def find_bitmaps(
    disk: BlockDevice, names: Iterable[str], *, on_event: Callable[[str], None] | None = None
) -> dict[str, DirtyBits | AllDirty]:
    """What an export shows as each bitmap of ``names``: of the topmost layer that has one, as ``qemu-nbd -B`` does.

    Those of a layer that is being written to are live: they change with every write. With ``on_event``, which is told
    so, a bitmap that is inconsistent is shown as if everything were dirty, so that a backup copies too much and not too
    little (F2).

    Raises:
        ExportError: there is no bitmap of a name, or it is inconsistent and there is nobody to be told.
        ImageError: a bitmap cannot be believed.
        OSError: a layer cannot be read.
    """
    found: dict[str, DirtyBits | AllDirty] = {}
    for name in names:
        try:
            bits = _find(disk, name)
        except ExportError as error:
            if on_event is None:
                raise
            on_event(f"{error}; until then all is shown as dirty")
            found[name] = AllDirty()
            continue
        if bits is None:
            raise ExportError(
                f"Bitmap '{printable(name)}' is not found in the image or its backing files; nbdq info lists them"
            )
        found[name] = bits
    return found


def find_source(disk: BlockDevice, name: str) -> DirtyBits:
    """The bits of a bitmap that is to be merged into another one, of whichever layer.

    Raises:
        NotFound: there is no such bitmap.
        OperationError: it is inconsistent.
        ImageError, OSError: as :func:`find_bitmaps`.
    """
    try:
        bits = _find(disk, name)
    except ExportError as error:
        raise OperationError(str(error)) from None
    if bits is None:
        raise NotFound(f"Dirty bitmap '{printable(name)}' not found")
    return bits


def list_bitmaps(layer: Qcow2Image | WritableImage | RawDisk) -> Iterator[BitmapState]:
    """The bitmaps of one layer. Those that nobody writes to are read for it; a damaged one counts as inconsistent.

    Raises:
        ImageError: there is no telling which bitmaps there are.
        OSError: the layer cannot be read.
    """
    if not isinstance(layer, Qcow2Image):
        if isinstance(layer.bitmaps, DirtyBitmaps):
            yield from layer.bitmaps
        return
    for entry in iterate_bitmaps(layer.storage, layer.header):
        bits = None
        with suppress(ExportError, ImageError):
            bits = load_bits(layer.storage, layer.header, entry.name)
        yield BitmapState(
            entry.name,
            entry.granularity,
            bits.dirty_length if bits is not None else 0,
            is_recording=False,  # nobody writes here
            is_persistent=True,
            is_inconsistent=bits is None,
        )


def live_bitmap(disk: BlockDevice, name: str) -> DirtyBits | None:
    """The bits of a bitmap of the image that is being written to; None if it has none of that name to be believed."""
    try:
        return _find_live(disk, name)
    except ExportError:
        return None


def _find_live(disk: BlockDevice, name: str) -> DirtyBits | None:
    image = written_image(disk)
    return image.bitmaps.find(name) if image is not None and isinstance(image.bitmaps, DirtyBitmaps) else None


def _find(disk: BlockDevice, name: str) -> DirtyBits | None:
    if (bits := _find_live(disk, name)) is not None:
        return bits
    below: BlockDevice | None = disk.below if isinstance(disk, OverlayDisk) else disk
    for layer in below.layers if isinstance(below, ChainDisk) else ():
        if isinstance(layer, Qcow2Image) and (bits := load_bits(layer.storage, layer.header, name)) is not None:
            return bits
    return None

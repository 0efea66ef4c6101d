"""Finding the dirty bitmaps that an export shows, in whichever layer of the chain they are."""

from collections.abc import Iterable

from nbdq.block import BlockDevice
from nbdq.chain.disk import ChainDisk
from nbdq.chain.overlay import OverlayDisk
from nbdq.errors import ExportError, printable
from nbdq.qcow2.bitmaps.bits import DirtyBits
from nbdq.qcow2.bitmaps.tables import load_bits
from nbdq.qcow2.bitmaps.tracking import DirtyBitmaps
from nbdq.qcow2.image import Qcow2Image


def find_bitmaps(disk: BlockDevice, names: Iterable[str]) -> dict[str, DirtyBits]:
    """The bits of each bitmap of ``names``, from the topmost layer that has one of that name, as ``qemu-nbd -B`` finds
    it.

    Those of a layer that is being written to are live: they change with every write.

    Raises:
        ExportError: there is no bitmap of a name, or the first one is inconsistent.
        ImageError: a bitmap cannot be believed.
        OSError: a layer cannot be read.
    """
    return {name: _find(disk, name) for name in names}


def _find(disk: BlockDevice, name: str) -> DirtyBits:
    below: BlockDevice | None = disk
    if isinstance(disk, OverlayDisk):
        below = disk.below
        if isinstance(disk.top.bitmaps, DirtyBitmaps) and (bits := disk.top.bitmaps.find(name)) is not None:
            return bits
    for layer in below.layers if isinstance(below, ChainDisk) else ():
        if isinstance(layer, Qcow2Image) and (bits := load_bits(layer.storage, layer.header, name)) is not None:
            return bits
    raise ExportError(
        f"Bitmap '{printable(name)}' is not found in the image or its backing files; nbdq info lists them"
    )

"""A smaller disk: first the size, then what lies behind it is given up (R3, R-62).

So a crash leaves the old disk as it was, or the new one, in whose file something may still lie behind the end; growing
removes that before it can be seen.
"""

import errno

from nbdq.qcow2.writing.growth import check_resize, set_size
from nbdq.qcow2.writing.writable import WritableImage
from nbdq.qcow2.writing.zeroing import Zeroing


def shrink(image: WritableImage, zeroing: Zeroing, size: int) -> None:
    """Make the disk ``size`` bytes large; what was behind is lost. Durable on return. Bitmaps shrink along.

    The caller has drained the disk. The L1 table stays as long as it is, a data file becomes as short as the disk.
    Internal snapshots keep what they hold.

    Raises:
        OSError: EINVAL if ``size`` is not smaller, or no multiple of 512; EOPNOTSUPP as :func:`check_resize`, or if a
            bitmap cannot shrink; else as for a write. Whether the disk has become smaller nevertheless, its size says.
    """
    old = image.size
    if not 0 < size < old or size % 512:
        raise OSError(errno.EINVAL, f"cannot shrink a disk of {old} bytes to {size}", image.path)
    check_resize(image)
    if image.bitmaps is not None:
        image.bitmaps.resize(old)  # refuses what cannot shrink, before anything is lost
    set_size(image, size)
    if image.bitmaps is not None:
        image.bitmaps.resize(size)
    image.size = size
    zeroing.abandon(-(-size // image.cluster_size) * image.cluster_size)
    if image.data is not image.storage and not image.data.is_block_device:
        image.data.truncate(size)
    image.flush()

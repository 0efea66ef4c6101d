"""The end of writing to a top, and the begin of writing to it anew; and what follows if they do not succeed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.raw_disk import RawDisk
from nbdq.errors import ImageError
from nbdq.qcow2.bitmaps.tracking import DirtyBitmaps
from nbdq.storage import FileStorage


def seal(disk: RawDisk | OverlayDisk, *, on_event: Callable[[str], None]) -> None:
    """Make everything durable that ``disk`` holds, its dirty bitmaps included. No request may be in progress.

    If that fails, requests may go on all the same: to open the image anew would lose what is in memory only.

    Raises:
        OSError: as :meth:`OverlayDisk.finish`; the disk reads as it did.
    """
    try:
        disk.finish()
    except BaseException:
        if isinstance(disk, OverlayDisk) and not disk.top.is_corrupt:
            _use_bitmaps_again(disk, on_event)
        raise


def _use_bitmaps_again(disk: OverlayDisk, on_event: Callable[[str], None]) -> None:
    """Declare in the file that bitmaps are in use, which ended with storing them (R-57)."""
    image = disk.top
    if image.bitmaps is None:
        return
    assert isinstance(image.bitmaps, DirtyBitmaps)
    try:
        image.bitmaps.begin_writing(image.storage, image.header)
    except (ImageError, OSError) as error:
        image.storage.give_up("dirty bitmaps that the file vouches for would miss what is written")
        image.bitmaps = None
        on_event(f"{image.path}: dirty bitmaps are lost: {error}")


@contextmanager
def or_never_written(storage: FileStorage, why: str) -> Iterator[None]:
    """If what is done inside fails, nothing is written to the file any more: what is in memory is not to be trusted."""
    try:
        yield
    except BaseException:
        storage.give_up(why)
        raise

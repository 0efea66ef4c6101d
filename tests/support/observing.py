"""Looking on while files are changed, at the seam of the system calls."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

from nbdq.storage import Data, FileStorage

_PUNCH_HOLE = 2


@contextmanager
def observed(
    *,
    on_write: Callable[[int, int], None] = lambda offset, length: None,
    on_punch: Callable[[int, int], None] = lambda offset, length: None,
    on_sync: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Call out before anything happens to a file."""
    pwritev, fallocate, fdatasync = FileStorage._pwritev, FileStorage._fallocate, FileStorage._fdatasync

    def watched_pwritev(storage: FileStorage, buffers: Sequence[Data], offset: int) -> int:
        on_write(offset, sum(map(len, buffers)))
        return pwritev(storage, buffers, offset)

    def watched_fallocate(storage: FileStorage, mode: int, offset: int, length: int) -> None:
        if mode & _PUNCH_HOLE:
            on_punch(offset, length)
        fallocate(storage, mode, offset, length)

    def watched_fdatasync(storage: FileStorage) -> None:
        on_sync()
        fdatasync(storage)

    with (
        patch.object(FileStorage, "_pwritev", watched_pwritev),
        patch.object(FileStorage, "_fallocate", watched_fallocate),
        patch.object(FileStorage, "_fdatasync", watched_fdatasync),
    ):
        yield

"""A log of everything that is done to some files through FileStorage, in one order, with begin and end of each act.

Records at the seam of the four system calls that change files, for every storage on the files, however it was opened.
"""

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any
from unittest.mock import patch

from nbdq.storage import Data, FileStorage

SECTOR = 512
_KEEP_SIZE = 1
NEVER = 1 << 62


class Act(Enum):
    """What was done to a file."""

    WRITE = "write"
    ZERO = "zero"
    """A punched or zeroed range; as a punch it makes no file longer."""
    LENGTH = "length"
    """The file was made as long as ``offset``, or cut there."""
    RESERVE = "reserve"
    """The file was made as long as ``offset`` if it was shorter."""
    SYNC = "sync"


@dataclass(slots=True, eq=False)
class Entry:
    """One act on file number ``file``, begun and ended at moments of the recorder's clock."""

    file: int
    act: Act
    offset: int
    length: int
    data: bytes
    begun: int
    ended: int = NEVER
    keeps_size: bool = False

    @property
    def first_sector(self) -> int:
        return self.offset // SECTOR

    @property
    def sector_count(self) -> int:
        """Sectors of the medium that are touched; lengths change in one piece."""
        if self.act in (Act.LENGTH, Act.RESERVE):
            return 1
        return (self.offset + self.length - 1) // SECTOR - self.first_sector + 1

    def __str__(self) -> str:
        return f"{self.act.value} file {self.file} at {self.offset:#x}+{self.length:#x} (begun {self.begun})"


class Recorder:
    """Records while :meth:`installed`. Its clock also counts what the guest does, see :meth:`tick`."""

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        pause: Callable[[], None] = lambda: None,
        linger: Callable[[], None] = lambda: None,
        limit: int | None = None,
    ) -> None:
        """Watch the existing files ``paths``, numbered in this order.

        Args:
            pause: called inside of every act, where another thread may run.
            linger: called before every write.
            limit: bytes that a file can have before the medium is full.
        """
        self.entries: list[Entry] = []
        self._pause = pause
        self._linger = linger
        self._limit = limit
        self._now = 0
        self._lock = threading.Lock()
        statuses = [os.stat(path) for path in paths]
        self._numbers = {(status.st_dev, status.st_ino): number for number, status in enumerate(statuses)}

    def tick(self) -> int:
        """The next moment."""
        with self._lock:
            self._now += 1
            return self._now

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Record every storage of the process that has one of the files open."""
        with ExitStack() as stack:
            for name, method in (
                ("_pwritev", self._pwritev),
                ("_fdatasync", self._fdatasync),
                ("_fallocate", self._fallocate),
                ("_ftruncate", self._ftruncate),
            ):
                stack.enter_context(patch.object(FileStorage, name, _bound(method, getattr(FileStorage, name))))
            yield

    def _pwritev(self, original: Any, storage: FileStorage, buffers: Sequence[Data], offset: int) -> int:
        self._linger()
        data = b"".join(buffers)
        self._demand_room(storage, offset + len(data))
        begun = self.tick()
        count: int = original(storage, buffers, offset)
        assert count == len(data)
        self._note(storage, Act.WRITE, offset, count, begun, data=data)
        return count

    def _fallocate(self, original: Any, storage: FileStorage, mode: int, offset: int, length: int) -> None:
        if not mode & _KEEP_SIZE:
            self._demand_room(storage, offset + length)
        begun = self.tick()
        original(storage, mode, offset, length)
        if mode & ~_KEEP_SIZE:
            self._note(storage, Act.ZERO, offset, length, begun, keeps_size=bool(mode & _KEEP_SIZE))
        elif not mode:
            self._note(storage, Act.RESERVE, offset + length, 0, begun)

    def _ftruncate(self, original: Any, storage: FileStorage, size: int) -> None:
        self._demand_room(storage, size)
        begun = self.tick()
        original(storage, size)
        self._note(storage, Act.LENGTH, size, 0, begun)

    def _fdatasync(self, _original: Any, storage: FileStorage) -> None:
        """Only noted: on a temporary file there is nothing to wait for."""
        self._note(storage, Act.SYNC, 0, 0, self.tick())

    def _note(
        self,
        storage: FileStorage,
        act: Act,
        offset: int,
        length: int,
        begun: int,
        *,
        data: bytes = b"",
        keeps_size: bool = False,
    ) -> None:
        """Enter an act that the kernel has carried out; it ends only after others had their chance to run."""
        number = self._numbers.get(storage.identity)
        if number is None:
            return
        entry = Entry(number, act, offset, length, data, begun, keeps_size=keeps_size)
        self.entries.append(entry)
        self._pause()
        entry.ended = self.tick()

    def _demand_room(self, storage: FileStorage, end: int) -> None:
        if self._limit is not None and storage.identity in self._numbers and end > max(self._limit, storage.size()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _bound(record: Callable[..., Any], original: Any) -> Any:
    """A method that passes its storage to ``record``."""

    def method(storage: FileStorage, *arguments: Any) -> Any:
        return record(original, storage, *arguments)

    return method

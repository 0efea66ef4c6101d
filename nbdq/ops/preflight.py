"""What an operation would cost and whom it would hurt, found out before anything is changed.

Only looks: nothing is locked, and no image is changed. What is found may change the next moment; locks protect what is
running, this protects what is not.
"""

import json
import os
import stat
import struct
from collections.abc import Collection, Iterator
from contextlib import closing, suppress
from typing import Any

from nbdq.chain.live import LiveChain
from nbdq.chain.resolve import backing_path
from nbdq.errors import OperationError, printable
from nbdq.qcow2.fields import MAGIC, MAX_BACKING_NAME
from nbdq.storage import FileStorage

#: Files that are looked at in all directories together: some seconds of work.
_FILES_MAX = 20_000
#: Magic, version, place and length of the backing name: the same in every version of the format.
_NAME_FIELDS = struct.Struct(">4sIQI")

#: What identifies a file or device; see ``FileStorage.identity``.
Identity = tuple[int, int]


def find_overlays(base_path: str, directories: Collection[str], *, known: Collection[str] = ()) -> list[str]:
    """Images that have ``base_path`` as their backing file, but for those in ``known``: changing it would damage them.

    Looked at are the files and devices in ``directories`` and in the directory of ``base_path``, without their
    subdirectories; of each no more than the backing name. What cannot be opened or is no QCOW2 image is passed over, an
    image that could not be served (encrypted, of a feature that nbdq does not have) is not: it would be damaged, too.

    Raises:
        OperationError: so many files that looking at all of them would take long.
        OSError: a directory cannot be read.
    """
    base = _identity(base_path)
    passed = {_identity(path) for path in known} | {base}
    found = []
    looked_at = 0
    for directory in dict.fromkeys(map(os.path.realpath, (os.path.dirname(base_path), *directories))):
        for path in _files_in(directory):
            looked_at += 1
            if looked_at > _FILES_MAX:
                what = f"more than {_FILES_MAX} files would have to be looked at for overlays of"
                raise OperationError(f"{what} {printable(base_path, 1024)}; name fewer directories, or force it")
            identity = _identity(path)
            if identity in passed:
                continue
            passed.add(identity)  # a second name of the same file
            if base is not None and base in map(_identity, _backing_paths(path)):
                found.append(path)
    return sorted(found)


def check_no_overlays(chain: LiveChain, *, top: int, base: int, directories: Collection[str] = ()) -> None:
    """Refuse to commit layers ``top`` to ``base - 1`` into ``base`` under other overlays of layers that will change.

    These are the base and the layers over it but for ``top``, which reads the same for as long as nobody writes to the
    base; that the active layer has no other overlays goes without saying.

    Raises:
        OperationError: there are some, or there is too much to look at.
        OSError: a directory cannot be read.
    """
    known = [layer.path for layer in chain.layers]
    for layer in chain.layers[top + 1 : base + 1]:
        if overlays := find_overlays(layer.path, directories, known=known):
            names = ", ".join(printable(path, 1024) for path in overlays[:4]) + (", …" if len(overlays) > 4 else "")
            what = f"{printable(layer.path, 1024)} has other overlays, which would be damaged: {names}"
            raise OperationError(f"{what}; commit or remove them first, or force it")


def _files_in(directory: str) -> Iterator[str]:
    with os.scandir(directory) as entries:
        for entry in entries:
            with suppress(OSError):  # it has just gone, or is a link that leads nowhere
                mode = entry.stat().st_mode
                if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
                    yield entry.path


def _identity(path: str) -> Identity | None:
    """As that of a storage; None if nothing is there."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # a name in an image may hold a zero byte
        return None
    return (0, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)


def _backing_paths(path: str) -> list[str]:
    """The files that the image at ``path`` may mean by its backing name; none if it has none or is no image."""
    try:
        with closing(FileStorage.open(path)) as storage:
            fields = storage.read(0, _NAME_FIELDS.size)
            if len(fields) < _NAME_FIELDS.size:
                return []
            magic, _, offset, length = _NAME_FIELDS.unpack(fields)
            if magic != MAGIC or not offset or length > MAX_BACKING_NAME or offset > storage.size():
                return []
            name = os.fsdecode(storage.read(offset, length))
    except OSError:
        return []
    names = _filenames(name.removeprefix("json:")) if name.startswith("json:") else [name.removeprefix("file:")]
    return [backing_path(path, name) for name in names]


def _filenames(description: str) -> list[str]:
    """Every file name in a description of a block device (N6)."""

    def search(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                # Options of inner nodes may be written with dots: "file.filename".
                if isinstance(inner, str) and key.rpartition(".")[2] == "filename":
                    yield inner.removeprefix("file:")
                yield from search(inner)

    with suppress(ValueError, RecursionError):
        return list(search(json.loads(description)))
    return []

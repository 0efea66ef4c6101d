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
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbdq.block import Kind
from nbdq.chain.disk import ChainDisk
from nbdq.chain.live import LiveChain
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.resolve import backing_path
from nbdq.errors import ImageError, OperationError, printable
from nbdq.ops.stretches import Content, Stretches
from nbdq.qcow2.fields import MAGIC, MAX_BACKING_NAME
from nbdq.qcow2.format import read_header
from nbdq.qcow2.image import Qcow2Image
from nbdq.storage import FileStorage, Identity, identity_of

#: Files that are looked at in all directories together: some seconds of work.
_FILES_MAX = 20_000
#: Magic, version, place and length of the backing name: the same in every version of the format.
_NAME_FIELDS = struct.Struct(">4sIQI")

#: Unit in which file systems give space to raw files.
_PAGE = 4096


@dataclass(frozen=True)
class CommitPlan:
    """What a commit would do."""

    bytes_to_copy: int
    """Zeros included, which cost no time."""
    base_grows_by: int
    """Bytes by which the disk in the base becomes larger."""
    space_needed: int
    """Bytes by which the file of the base grows, at most about; what it does not hold of what will be copied to it."""
    space_free: int
    """Bytes that the file system of the base has left for it."""
    dropped: list[str]
    """Paths of the layers that are not part of the disk afterwards."""
    invalid: list[str]
    """Those among them that read otherwise afterwards, even before anybody writes to the disk again."""
    overlays: list[str]
    """Other overlays of layers that change, which would be damaged."""


def plan_commit(chain: LiveChain, *, top: int, base: int, directories: Collection[str] = ()) -> CommitPlan:
    """Foresee the commit of layers ``top`` to ``base - 1`` into ``base``, for which the guest may go on meanwhile.

    Raises:
        OperationError: there is too much to look at; see :func:`find_overlays`.
        OSError: a layer or directory cannot be read.
    """
    layers = chain.layers
    device = chain.device
    source = device if not top and isinstance(device, OverlayDisk) else chain.slice(top, base)
    target = chain.slice(base, base)
    stretches = Stretches(source, range(base - top))
    paths = [layer.path for layer in layers]
    return CommitPlan(
        bytes_to_copy=stretches.measure(),
        base_grows_by=max(0, source.size - target.size),
        space_needed=_space_needed(stretches, source.size, target),
        space_free=free_space(paths[base]),
        dropped=paths[top:base],
        invalid=paths[top + 1 : base],
        overlays=_other_overlays(chain, top=top, base=base, directories=directories),
    )


def free_space(path: str) -> int:
    """Bytes that the file system of the file or directory at ``path``, or of its directory, has left for us.

    Raises:
        OSError: there is none.
    """
    status = os.statvfs(path if os.path.exists(path) else os.path.dirname(path) or ".")
    return status.f_bavail * status.f_frsize


def _space_needed(stretches: Stretches, size: int, target: ChainDisk) -> int:
    """Bytes of the clusters that hold no data in ``target`` yet and will, and of the tables for them."""
    (layer,) = target.layers
    cluster_size, coverage, table_size = _PAGE, size, 0
    if isinstance(layer, Qcow2Image):
        cluster_size, coverage, table_size = layer.cluster_size, layer.geometry.l2_coverage, layer.cluster_size
    needed = 0
    tables: set[int] = set()
    done = 0
    for stretch in stretches.within(0, size):
        if stretch.content == Content.ZEROS:
            continue
        start = max(done, stretch.start - stretch.start % cluster_size)
        done = -(-stretch.end // cluster_size) * cluster_size
        there = min(done, target.size)
        needed += max(0, done - max(start, target.size))
        for runs, end in target.runs(start, there - start) if start < there else ():
            lengths = np.append(runs.start[1:], np.uint64(end)) - runs.start
            needed += int(lengths[runs.kind != Kind.DATA].sum())
        tables.update(range(start // coverage, -(-done // coverage)))
    return needed + len(tables) * table_size


def find_overlays(base_path: str, directories: Collection[str], *, known: Collection[str] = ()) -> list[str]:
    """Images that have ``base_path`` as their backing file, but for those in ``known``: changing it would damage them.

    Looked at are the files and devices in ``directories`` and in the directory of ``base_path``, without their
    subdirectories; of each no more than its header. What cannot be opened or is no QCOW2 image is passed over, and an
    overlay whose mark says that it was committed into the base; an image that could not be served (encrypted, of a
    feature that nbdq does not have) is not: it would be damaged, too.

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
            if base is None or base not in map(_identity, backing_paths(path)):
                continue
            if not _was_committed(path, base):
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
    if overlays := _other_overlays(chain, top=top, base=base, directories=directories):
        names = ", ".join(printable(path, 1024) for path in overlays[:4]) + (", …" if len(overlays) > 4 else "")
        what = f"{printable(chain.layers[base].path, 1024)}, or a layer over it, has other overlays: {names}"
        raise OperationError(f"{what}; they would be damaged: commit or remove them first, or force it")


def _other_overlays(chain: LiveChain, *, top: int, base: int, directories: Collection[str]) -> list[str]:
    paths = [layer.path for layer in chain.layers]
    changing = paths[top + 1 : base + 1]
    return sorted({found for path in changing for found in find_overlays(path, directories, known=paths)})


def _was_committed(path: str, base: Identity) -> bool:
    """Whether the image bears the mark of one that was committed into ``base``, and so is worth nothing any more."""
    try:
        with closing(FileStorage.open(path)) as storage:
            mark = read_header(storage, describe=True).overlay_marker
    except (ImageError, OSError):
        return False
    return mark is not None and _identity(backing_path(path, mark)) == base


def _files_in(directory: str) -> Iterator[str]:
    with os.scandir(directory) as entries:
        for entry in entries:
            with suppress(OSError):  # it has just gone, or is a link that leads nowhere
                mode = entry.stat().st_mode
                if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
                    yield entry.path


def _identity(path: str) -> Identity | None:
    """As that of a storage; None if nothing is there."""
    with suppress(OSError, ValueError):  # a name in an image may hold a zero byte
        return identity_of(path)
    return None


def backing_paths(path: str) -> list[str]:
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

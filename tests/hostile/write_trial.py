"""What a damaged image makes of a fixed set of changes: the changes, and the rules that hold whatever the damage is.

Of an image that the audit finds free of corruption everything is demanded: the disk afterwards holds what was written
and, everywhere else, what it held before; snapshots stay as they were; the audit finds nothing new.
"""

import contextlib
import errno
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdCompressor
else:
    from backports.zstd import ZstdCompressor

from nbdq.block import BlockDevice
from nbdq.chain.clusters import ClusterCache
from nbdq.chain.open import open_disk, open_writable
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.policy import Policy
from nbdq.errors import NbdqError
from nbdq.qcow2.audit.check import check_image
from nbdq.qcow2.audit.damaged_header import read_header_to_check
from nbdq.qcow2.audit.result import CheckResult
from nbdq.qcow2.features import CompressionType
from nbdq.storage import FileStorage

#: Guest bytes that are looked at and changed, at both ends of a disk.
_HEAD, _TAIL = 1 << 20, 1 << 16
_PIECE = 64 << 10
#: Header fields that writing may change: refcount table, corrupt bit, autoclear bits; a repair also the snapshot table
#: and the dirty bit.
_FREE_TO_CHANGE = (*range(48, 60), 79, *range(88, 96))
_REPAIRED = (*range(60, 72), *range(72, 80))


class Outcome(NamedTuple):
    """How a trial went."""

    opened: bool
    was_sound: bool
    refusal: str
    failures: list[str]


class Disk(NamedTuple):
    """A damaged image, and what of its file nobody may change."""

    path: Path
    allow: str
    snapshots: tuple[str, ...]
    frozen: tuple[tuple[int, int], ...]
    """(offset, length) of metadata of snapshots."""


class _Content:
    """The ends of a disk: bytes, and for each what is known of it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._tail = max(min(_HEAD, size), size - _TAIL)
        length = min(_HEAD, size) + size - self._tail
        self.data: NDArray[np.uint8] = np.zeros(length, dtype=np.uint8)
        self.known: NDArray[np.bool_] = np.ones(length, dtype=bool)

    @classmethod
    def of(cls, disk: BlockDevice) -> "_Content":
        """What can be read of ``disk``; the rest is not known."""
        content = cls(disk.size)
        for start, end in ((0, min(_HEAD, disk.size)), (content._tail, disk.size)):
            for offset in range(start, end, _PIECE):
                content._read(disk, offset, min(_PIECE, end - offset))
        return content

    def _read(self, disk: BlockDevice, offset: int, length: int) -> None:
        place = self.place(offset, length)
        try:
            disk.read_into(offset, memoryview(self.data)[place])
        except OSError:
            if length <= 512:
                self.known[place] = False
                return
            for start in range(offset, offset + length, length // 8):
                self._read(disk, start, min(length // 8, offset + length - start))

    def place(self, offset: int, length: int) -> slice:
        start = offset if offset < min(_HEAD, self._size) else offset - self._tail + min(_HEAD, self._size)
        return slice(start, start + length)

    def clip(self, offset: int, length: int) -> tuple[int, int]:
        """As much of a range as lies in one end of the disk."""
        head = min(_HEAD, self._size)
        limit = head if offset < head else self._size if offset >= self._tail else offset
        return offset, min(length, limit - offset)

    def differs(self, other: "_Content") -> str:
        """Where ``other`` lacks or contradicts what is known here."""
        wrong = self.known & (~other.known | (self.data != other.data))
        if not wrong.any():
            return ""
        first = int(wrong.argmax())
        return f"{int(wrong.sum())} bytes, the first at {first:#x}" + ("" if other.known[first] else " cannot be read")


def changes(cluster: int, size: int) -> Iterator[tuple[str, int, int]]:
    """(what, offset, length) of everything that is done to a disk, in order; ranges may have to be clipped."""
    yield "write", 0, 512
    yield "write", cluster - 512, 1024
    yield "write", 5 * cluster + 100, 3000
    yield "write", 2 * cluster, 2 * cluster
    yield "zero", 4 * cluster + 512, 1024
    yield "unmap", 7 * cluster, 3 * cluster
    yield "discard", 9 * cluster, 4 * cluster
    yield "populate", 0, 16 * cluster
    yield "flush", 0, 0
    yield "write", 10 * cluster, cluster
    yield "compressed", 3 * cluster, cluster
    yield "compressed", 11 * cluster, cluster
    yield "write", size - 512, 512
    yield "unmap", max(size - 3 * cluster - 700, 0), 3 * cluster
    yield "flush", 0, 0
    yield "discard", 0, 64 * cluster
    yield "write", size - _TAIL, 4096
    yield "flush", 0, 0
    yield "write", 6 * cluster, cluster + 1
    yield "compressed", 6 * cluster, cluster
    yield "zero", 20 * cluster, 5 * cluster
    yield "populate", 0, size
    yield "flush", 0, 0


def attempt(target: Disk) -> Outcome:
    """Open, change and close the image; judge what became of it."""
    before = audit(target.path)
    was_sound = before is not None and not before.corruptions and not before.check_errors
    content, snapshots = look(target) if was_sound else (None, [])
    head = _read(target.path, ((0, 4096), *target.frozen))
    others = [path for path in target.path.parent.rglob("*") if path.is_file()]
    for path in others:
        os.utime(path, (0, 0))
    failures: list[str] = []
    refusal = ""
    events: list[str] = []
    spoiled: list[str] = []
    try:
        with contextlib.closing(ClusterCache(budget=4 << 20)) as clusters:
            disk = open_writable(
                str(target.path), format="qcow2", policy=_policy(target), clusters=clusters, on_event=events.append
            )
            assert isinstance(disk, OverlayDisk)
            size = disk.size
            try:
                spoiled = _change(disk, content)
                if content is not None and (difference := content.differs(_Content.of(disk))):
                    failures.append(f"the disk differs in {difference}")
                is_corrupt = disk.top.is_corrupt
            finally:
                spoiled += _failure("close", disk.close)
    except (NbdqError, OSError) as error:
        _one_line(str(error))
        refusal = str(error)
    for event in events:
        _one_line(event)
    failures += [f"{path.name} was written" for path in others if _is_foreign(path, target) and path.stat().st_mtime]
    failures += _judge_bytes(target, head, is_repaired=bool(head[0][79] & 1))
    if refusal or content is None or not size:
        return Outcome(not refusal, was_sound, refusal, failures)
    assert before is not None
    if is_corrupt:
        failures.append("a sound image was marked corrupt")
    # What is lost, leaks: bitmaps that cannot be maintained (Q70).
    failures += _judge_audit(before, audit(target.path), is_whole=not spoiled and not events)
    if not failures:
        again, snapshots_again = look(target)
        if again is None or (difference := content.differs(again)):
            failures.append(f"opened again the disk differs in {difference if again else 'everything'}")
        if snapshots != snapshots_again:
            failures.append("a snapshot changed")
    return Outcome(True, True, "", failures)


def _policy(target: Disk) -> Policy:
    return Policy(roots=(target.allow,), allow_data_file=True)


def _one_line(text: str) -> None:
    assert text
    assert "\n" not in text, f"not one line: {text!r}"


def _change(disk: OverlayDisk, content: _Content | None) -> list[str]:
    """Do everything; ``content`` keeps up with it. The changes that failed."""
    spoiled: list[str] = []
    cluster = disk.top.cluster_size
    book = content or _Content(disk.size)
    for number, (what, wanted, length) in enumerate(changes(cluster, disk.size)):
        offset, length = book.clip(max(wanted, 0), length)
        if what != "flush" and length <= 0:
            continue
        if what == "compressed" and (length < cluster or disk.top.geometry.has_data_file):
            continue
        data = bytes([number + 1]) * length
        failed = _failure(f"{what} {offset:#x}+{length:#x}", _action(disk, what, offset, data))
        spoiled += failed
        place = book.place(offset, length)
        if what in ("zero", "unmap", "write", "compressed"):
            book.data[place] = number + 1 if what in ("write", "compressed") else 0
            book.known[place] = not failed
        elif what == "discard":
            book.known[place] = False
    return spoiled


def _action(disk: OverlayDisk, what: str, offset: int, data: bytes) -> Callable[[], object]:
    def write() -> None:
        if not disk.write_cached(offset, memoryview(data)):
            disk.write(offset, memoryview(data))

    return {
        "write": write,
        "zero": lambda: disk.zero(offset, len(data), unmap=False),
        "unmap": lambda: disk.zero(offset, len(data), unmap=True),
        "discard": lambda: disk.discard(offset, len(data)),
        "populate": lambda: disk.populate(offset, len(data)),
        "compressed": lambda: disk.write_compressed(offset, _compressed(disk, data)),
        "flush": disk.flush,
    }[what]


def _compressed(disk: OverlayDisk, data: bytes) -> bytes:
    if disk.top.header.compression_type is CompressionType.ZSTD:
        return ZstdCompressor().compress(data, ZstdCompressor.FLUSH_FRAME)
    stream = zlib.compressobj(wbits=-12)
    return stream.compress(data) + stream.flush()


def _failure(what: str, action: Callable[[], object]) -> list[str]:
    try:
        action()
    except OSError as error:
        if error.errno in (errno.EIO, errno.EROFS, errno.ENOSPC, errno.EFBIG):
            return [what]
        raise AssertionError(f"{what}: {error!r}") from error
    return []


def _is_foreign(path: Path, target: Disk) -> bool:
    """Whether writing to the disk must not change a file: layers below the top."""
    return path != target.path and "data" not in path.name


def _read(path: Path, places: tuple[tuple[int, int], ...]) -> list[bytes]:
    with path.open("rb", buffering=0) as file:
        return [os.pread(file.fileno(), length, offset).ljust(length, b"\0") for offset, length in places]


def _judge_bytes(target: Disk, before: list[bytes], *, is_repaired: bool) -> list[str]:
    """The header but for a few fields, and the metadata of snapshots, are as they were."""
    after = _read(target.path, ((0, 4096), *target.frozen))
    changed = {i for i in range(104) if before[0][i] != after[0][i]}
    changed -= {*_FREE_TO_CHANGE, *(_REPAIRED if is_repaired else ())}
    failures = [f"bytes {sorted(changed)} of the header changed"] if changed else []
    for (offset, _), old, new in zip(target.frozen, before[1:], after[1:], strict=True):
        if old != new:
            failures.append(f"the metadata of snapshots at {offset:#x} changed")
    return failures


def _judge_audit(before: CheckResult, after: CheckResult | None, *, is_whole: bool) -> list[str]:
    if after is None:
        return ["cannot be checked any more"]
    if after.corruptions or after.check_errors:
        return [f"is corrupt now: {after.findings[:4]}"]
    if is_whole and after.leaks > before.leaks:
        return [f"leaks {after.leaks} clusters, {before.leaks} before: {after.findings[:4]}"]
    return []


def audit(path: Path) -> CheckResult | None:
    """None if the image cannot be checked at all."""
    with contextlib.closing(FileStorage.open(str(path))) as storage:
        try:
            return check_image(storage, read_header_to_check(storage))
        except (NbdqError, OSError):
            return None


def look(target: Disk) -> tuple[_Content | None, list[int]]:
    """What can be read of the disk, None if nothing; and checksums of its snapshots."""
    policy: Any = _policy(target)
    sums: list[int] = []
    with contextlib.closing(ClusterCache(budget=4 << 20)) as clusters:
        try:
            with contextlib.closing(
                open_disk(str(target.path), format="qcow2", policy=policy, clusters=clusters)
            ) as disk:
                content = _Content.of(disk)
            for name in target.snapshots:
                with contextlib.closing(
                    open_disk(str(target.path), format="qcow2", policy=policy, clusters=clusters, snapshot=name)
                ) as disk:
                    sums.append(zlib.crc32(_Content.of(disk).data))
        except (NbdqError, OSError):
            return None, sums
    return content, sums

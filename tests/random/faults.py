"""The single-fault sweep: let the N-th change of a file fail, for N = 1, 2, 3 … until a run meets no fault any more.

After every fault: no exception but the right ``OSError``; the disk that is still open reads as the guest knows it; the
file is clean or only leaks; what a flush promised is there; and the same operations succeed on the reopened image. To
sweep everything:

    .venv/bin/python -m tests.random.faults

which prints each failure with its scenario, fault and N, and figures at the end.
"""

import argparse
import contextlib
import errno
import hashlib
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from nbdq.block import WritableBlockDevice
from nbdq.errors import ImageError
from nbdq.qcow2.bitmaps.directory import BitmapFlags, read_bitmaps
from nbdq.qcow2.bitmaps.tables import load_bits
from nbdq.qcow2.features import Autoclear
from nbdq.qcow2.format import read_header
from nbdq.storage import Data, FileStorage
from tests.random.scenarios import SCENARIOS, Scenario
from tests.support.images import Image, build
from tests.support.operations import SECTOR, Guest, Operation, Verb
from tests.support.scratch import scratch
from tests.support.tools import execute, run
from tests.support.writing import contents, perform, read_in_process, writable_disk


class Fault(Enum):
    """What goes wrong with one change of a file, or with one read."""

    BROKEN = "EIO"
    """The change fails, and nothing was done."""
    TORN = "EIO after a part"
    """A write fails when half of it is there, or all if it is small."""
    NO_SPACE = "ENOSPC once"
    FULL = "ENOSPC from then on"
    """Nothing makes a file longer any more, until there is room again after the last operation."""
    SHORT = "short write"
    """A write does half of what it should, and says so: no failure."""
    UNREADABLE = "EIO on read"


LASTING = (Fault.BROKEN, Fault.TORN)
"""After these nothing more is written (R-63)."""
ONCE = (Fault.NO_SPACE, Fault.UNREADABLE)
"""After these everything goes on."""
_WANTED = {
    Fault.BROKEN: "EIO",
    Fault.TORN: "EIO",
    Fault.NO_SPACE: "ENOSPC",
    Fault.FULL: "ENOSPC",
    Fault.UNREADABLE: "EIO",
}


class FaultyFiles:
    """Counts the changes of all files (or their reads) from 1, and lets number ``at`` fail. Not thread-safe."""

    def __init__(self, fault: Fault, at: int) -> None:
        self.fault, self.at = fault, at
        self.count = 0
        self.met = ""
        """What was going on when the fault was met; empty until then."""
        self._is_paused = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Until the block ends nothing fails, and nothing is counted."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def _is_due(self, what: str) -> bool:
        self.count += 1
        if self.count == self.at:
            self.met = what
        return self.count == self.at

    def _raise(self) -> None:
        number = getattr(errno, _WANTED[self.fault])
        raise OSError(number, os.strerror(number))

    def _check(self, what: str, *, grows: bool) -> None:
        if self._is_paused:
            return
        due = self._is_due(what)
        if self.fault is Fault.FULL:
            if grows and self.met:
                self._raise()
        elif due and self.fault is not Fault.SHORT:
            self._raise()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Until the block ends, every storage is at the mercy of this one."""
        changes = {name: getattr(FileStorage, name) for name in ("_pwritev", "_fdatasync", "_fallocate", "_ftruncate")}
        reads = {name: getattr(FileStorage, name) for name in ("read", "read_into", "read_cached")}

        def pwritev(storage: FileStorage, buffers: Sequence[Data], offset: int, *rest: Any) -> int:
            length = sum(map(len, buffers))
            partial = self.fault in (Fault.TORN, Fault.SHORT) and not self._is_paused
            if partial and self.count + 1 == self.at and length > 1:
                self._is_due(f"write {offset}+{length}")
                done = length // 2
                if self.fault is Fault.TORN:  # between sectors: a medium does not tear inside one
                    done = length if length < 2 * SECTOR else done - done % SECTOR
                done = int(changes["_pwritev"](storage, (b"".join(buffers)[:done],), offset, *rest))
                if self.fault is Fault.TORN:
                    self._raise()
                return done
            self._check(f"write {offset}+{length}", grows=offset + length > storage.size())
            return int(changes["_pwritev"](storage, buffers, offset, *rest))

        def fdatasync(storage: FileStorage) -> None:
            if self.fault is not Fault.NO_SPACE:  # a sync that fails is final, for whatever reason
                self._check("sync", grows=False)
            changes["_fdatasync"](storage)

        def fallocate(storage: FileStorage, mode: int, offset: int, length: int) -> None:
            self._check(f"fallocate {mode} {offset}+{length}", grows=mode & 2 == 0)  # all but punching takes space
            changes["_fallocate"](storage, mode, offset, length)

        def ftruncate(storage: FileStorage, size: int) -> None:
            self._check(f"truncate {size}", grows=size > storage.size())
            changes["_ftruncate"](storage, size)

        def read(storage: FileStorage, offset: int, *rest: Any) -> Any:
            self._check(f"read {offset}", grows=False)
            return reads["read"](storage, offset, *rest)

        def read_into(storage: FileStorage, offset: int, view: memoryview) -> Any:
            self._check(f"read {offset}+{len(view)}", grows=False)
            return reads["read_into"](storage, offset, view)

        def read_cached(storage: FileStorage, offset: int, view: memoryview) -> bool:
            return False  # everything is read where it can fail

        if self.fault is Fault.UNREADABLE:
            replaced = {"read": read, "read_into": read_into, "read_cached": read_cached}
        else:
            replaced = {"_pwritev": pwritev, "_fdatasync": fdatasync, "_fallocate": fallocate, "_ftruncate": ftruncate}
        with contextlib.ExitStack() as stack:
            for name, function in replaced.items():
                stack.enter_context(patch.object(FileStorage, name, function))
            yield


class Expected:
    """What each byte may read as: one value, or several where an operation failed or no flush has answered since."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._since_flush: list[bytes] = [bytes(guest.content)]
        self._failed: list[tuple[bytes, bytes]] = []

    def did(self, operation: Operation, *, failed: bool) -> None:
        """``operation`` was answered."""
        before = bytes(self._guest.content)
        self._guest.apply(operation)
        after = bytes(self._guest.content)
        if failed:
            self._failed.append((before, after))
            self._guest.content[:] = before
            return
        if operation.verb is Verb.FLUSH or operation.fua:
            self._since_flush.clear()
        self._since_flush.append(after)

    def judge(self, found: bytes | bytearray, *, unflushed: bool) -> None:
        """Whatever succeeded is seen, and where something failed, the old or the new.

        ``unflushed``: what was not flushed may be lost.
        """
        wrong = _differs(found, self._guest.content)
        for before, after in self._failed:
            wrong &= ~_differs(before, after) | (_differs(found, before) & _differs(found, after))
        for state in self._since_flush if unflushed else ():
            wrong &= _differs(found, state)
        assert not wrong.any(), f"wrong from byte {int(wrong.argmax())} on, {int(wrong.sum())} bytes"


def _differs(left: bytes | bytearray, right: bytes | bytearray) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.frombuffer(left, dtype=np.uint8) != np.frombuffer(right, dtype=np.uint8)


@dataclass
class Sweep:
    """All faults of one kind in one scenario."""

    scenario: Scenario
    fault: Fault
    directory: Path
    points: int = 0
    leaking: int = 0
    """Points after which the image leaked."""
    _checked: dict[str, int] = field(default_factory=dict)

    def run(self, *, stride: int = 1) -> None:
        """Let change number 1, 1 + ``stride``, … fail, up to the first run without a fault.

        Raises:
            AssertionError: a fault did more than it may; the message says which.
        """
        prepared = self.directory / "prepared"
        prepared.mkdir()
        source = build(self.scenario.variant, prepared)
        if self.scenario.bitmap:
            run("qemu-img", "bitmap", "--add", "-g", "4k", "-f", "qcow2", source.top, self.scenario.bitmap)
        self._content = bytes(read_in_process(source))
        at = 1
        while self._survives(source, at):
            self.points += 1
            at += stride

    def _survives(self, source: Image, at: int) -> bool:
        """Judge the run in which change number ``at`` fails; False if there is none."""
        home = self.directory / f"run{at}"
        shutil.copytree(source.directory, home)
        image = Image(source.variant, home, [home / path.relative_to(source.directory) for path in source.paths])
        files = FaultyFiles(self.fault, at)
        try:
            self._try(image, files)
        except Exception as error:
            what = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
            where = f"{self.scenario.name}, {self.fault.value} at change {at} ({files.met})"
            raise AssertionError(f"{where}: {what}") from error
        shutil.rmtree(home)
        return bool(files.met)

    def _try(self, image: Image, files: FaultyFiles) -> None:
        expected = Expected(self.scenario.guest(self._content))
        unflushed = self._operate(image, files, expected)
        self._judge_file(image)
        found = read_in_process(image)
        expected.judge(found, unflushed=unflushed)
        self._judge_bitmap(image, found)
        self._retry(image)

    def _operate(self, image: Image, files: FaultyFiles, expected: Expected) -> bool:
        """Do all operations with the fault ahead; say whether those that were not flushed may be lost."""
        with files.installed():
            manager = writable_disk(image)
            try:
                disk = manager.__enter__()
            except (OSError, ImageError):
                assert files.met, "an image that cannot be opened, without a fault"
                return True
            try:
                for operation in self.scenario.operations:
                    self._perform(disk, operation, files, expected)
                with files.paused():
                    expected.judge(contents(disk), unflushed=False)
            finally:
                met = bool(files.met)
                closed = self._close(manager, files)
            lasting = met and self.fault in LASTING
            assert closed or lasting or (files.met and not met), "an image that cannot be closed"
            return lasting or not closed

    def _perform(self, disk: WritableBlockDevice, operation: Operation, files: FaultyFiles, expected: Expected) -> None:
        met = bool(files.met)
        outcome = perform(disk, operation)
        failed = isinstance(outcome, str) and outcome != ""
        if operation.verb is not Verb.READ:
            expected.did(operation, failed=failed)
        if failed:
            wanted = _WANTED.get(self.fault)
            assert files.met, f"{operation} failed with {outcome} before any fault"
            assert outcome == wanted, f"{operation} failed with {outcome}, not {wanted}"
            assert not (met and self.fault in ONCE), f"{operation} failed with {outcome}, too"

    def _close(self, manager: contextlib.AbstractContextManager[WritableBlockDevice], files: FaultyFiles) -> bool:
        """Close the disk, which writes; a full medium has room again if it was full before."""
        with files.paused() if self.fault is Fault.FULL and files.met else contextlib.nullcontext():
            try:
                manager.__exit__(None, None, None)
            except OSError:
                return False
        return True

    def _judge_file(self, image: Image) -> None:
        """Clean, or leaks only; QEMU looks at each distinct file once."""
        key = hashlib.sha1(image.top.read_bytes()).hexdigest()
        if key not in self._checked:
            check = execute("qemu-img", "check", "-f", "qcow2", image.top, cwd=image.directory)
            self._checked[key] = check.returncode
            assert check.returncode in (0, 3), f"check: status {check.returncode}\n{check.stdout}{check.stderr}"
        self.leaking += self._checked[key] == 3

    def _judge_bitmap(self, image: Image, found: bytes | bytearray) -> None:
        """If the image vouches for its bitmap, that knows of every byte that has changed (R-57)."""
        with contextlib.closing(FileStorage.open(str(image.top))) as storage:
            header = read_header(storage)
            bitmaps = read_bitmaps(storage, header) if Autoclear.BITMAPS in header.autoclear else []
            for bitmap in bitmaps:
                if BitmapFlags.IN_USE not in bitmap.flags:
                    bits = load_bits(storage, header, bitmap.name)
                    assert bits is not None
                    dirty = np.unpackbits(bits.packed, bitorder="little").astype(bool)
                    known = np.repeat(dirty, 1 << bits.granularity_bits)[: len(found)]
                    assert not (_differs(found, self._content) & ~known).any(), "a bitmap misses what has changed"

    def _retry(self, image: Image) -> None:
        """On the reopened image all operations succeed, and then the disk is what it should be."""
        guest = self.scenario.guest(read_in_process(image))
        with writable_disk(image) as disk:
            for operation in self.scenario.operations:
                outcome = perform(disk, operation)
                assert isinstance(outcome, int) or not outcome, f"{operation}, tried again, failed with {outcome}"
                guest.apply(operation)
        assert read_in_process(image) == guest.content, "wrong contents after trying again"
        self._judge_file(image)


def main() -> int:
    """Sweep all scenarios, or those named."""
    parser = argparse.ArgumentParser(prog="python -m tests.random.faults")
    parser.add_argument("names", nargs="*", help="scenarios; all by default")
    parser.add_argument("--stride", type=int, default=1)
    words = parser.parse_args()
    begun, points, leaking, failures = time.monotonic(), 0, 0, 0
    for scenario in SCENARIOS:
        if words.names and scenario.name not in words.names:
            continue
        for fault in Fault:
            with scratch() as directory:
                sweep = Sweep(scenario, fault, directory)
                try:
                    sweep.run(stride=words.stride)
                except AssertionError as error:
                    failures += 1
                    print("FAILED", error, flush=True)
                points, leaking = points + sweep.points, leaking + sweep.leaking
                print(f"{scenario.name}, {fault.value}: {sweep.points} points, {sweep.leaking} leaking", flush=True)
    took = time.monotonic() - begun
    print(f"{points} points, after {leaking} of them an image that leaks, {failures} failures, {took:.0f} s")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())

"""Power cuts while an internal snapshot is made, deleted or gone back to: the file says the old thing or the new one.

And it says it exactly: with one sector of the header everything changes, so there is nothing in between to repair.
"""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from nbdq.chain.overlay import OverlayDisk
from nbdq.errors import ImageError
from nbdq.qcow2.audit.check import check_image
from nbdq.qcow2.format import read_header
from nbdq.qcow2.snapshots import read_snapshots
from nbdq.qcow2.writing.internal_snapshots import apply_snapshot, create_snapshot, delete_snapshot
from nbdq.qcow2.writing.switch import Switch, reclaim
from nbdq.storage import FileStorage
from tests.crash.explore import scratch
from tests.crash.operations import crash_states
from tests.support.engine import K, make_image
from tests.support.tools import execute, requires, run
from tests.support.writing import writable_file

pytestmark = requires("qemu-img")

_SIZE = 512 * K
#: How each image differs from one of 4 KiB clusters.
_IMAGES = {
    "4 KiB": {"cluster_size": 4 * K},
    "tiny, wide refcounts": {"cluster_size": 512, "refcount_bits": 64},
    "subclusters": {"cluster_size": 16 * K, "extended_l2": True},
    "version 2": {"cluster_size": 4 * K, "version": 2},
}


def prepare(path: Path, **options: object) -> None:
    """A disk with two snapshots, which share some and differ in some."""
    make_image(path, _SIZE, **options)
    with writable_file(path) as disk:
        assert isinstance(disk, OverlayDisk)
        for number, name in enumerate(("first", "second", "")):
            for offset in range(number * 16 * K, _SIZE, 48 * K):
                disk.write(offset, memoryview(bytes([number + 1]) * 12 * K))
            if name:
                create_snapshot(disk.top, name, date_seconds=1, date_nanoseconds=0)


def operate(path: Path, verb: str) -> None:
    """One operation, between requests of a guest; ends as if the process were killed after the last reply."""
    with writable_file(path) as disk:
        assert isinstance(disk, OverlayDisk)
        image = disk.top
        disk.write(100 * K, memoryview(b"\xaa" * 8 * K))
        disk.zero(8 * K, 8 * K, unmap=True)
        first = read_snapshots(image.storage, image.header)[0]
        if verb == "create":
            create_snapshot(image, "third", date_seconds=2, date_nanoseconds=0)
        elif verb == "delete":
            delete_snapshot(image, first)
        else:
            reclaim(image, apply_snapshot(image, first))
        disk.write(0, memoryview(b"\xbb" * 40 * K))


def held(path: Path) -> dict[str, bytes]:
    """What each snapshot holds."""
    with closing(FileStorage.open(str(path))) as storage:
        names = [snapshot.name for snapshot in read_snapshots(storage, read_header(storage))]
    return {name: contents(path, "-l", name) for name in names}


def contents(path: Path, *options: str) -> bytes:
    raw = path.with_suffix(".raw")
    run("qemu-img", "convert", *options, "-f", "qcow2", "-O", "raw", path, raw)
    return raw.read_bytes()


@pytest.mark.parametrize("verb", ["create", "delete", "apply"])
@pytest.mark.parametrize("kind", _IMAGES)
def test_after_a_power_cut_there_is_the_old_state_or_the_new_one(kind: str, verb: str) -> None:
    with scratch() as directory:
        live, bench = directory / "live", directory / "bench"
        prepare(live, **_IMAGES[kind])
        before = held(live)
        states = list(crash_states([live], lambda: operate(live, verb), seed=1, per_cut=3))
        after = held(live)
        assert {"create": len(after) == 3, "delete": len(after) == 1, "apply": after == before}[verb]
        found: list[bool] = []
        judge = _judge(before, after)
        for number, (content,) in enumerate(states):
            bench.write_bytes(content)
            found.append(judge(bench, number))
        assert found[0] is False
        assert verb == "apply" or found[-1] is True
        assert len(states) > 20


def test_a_switch_without_the_sync_before_its_header_is_found_out() -> None:
    """Or the test above shows nothing."""
    make, sync = Switch.make, FileStorage.sync

    def careless(switch: Switch, *arguments: Any) -> None:
        syncs = []

        def first_dropped(storage: FileStorage) -> None:
            syncs.append(storage)
            if len(syncs) > 1:
                sync(storage)

        with patch.object(FileStorage, "sync", first_dropped):
            make(switch, *arguments)

    with scratch() as directory:
        live, bench = directory / "live", directory / "bench"
        prepare(live, cluster_size=4 * K)
        before = held(live)
        with patch.object(Switch, "make", careless):
            states = list(crash_states([live], lambda: operate(live, "create"), seed=1, per_cut=8))
        judge = _judge(before, held(live))
        with pytest.raises((AssertionError, ImageError)):  # noqa: PT012
            for (content,) in states:
                bench.write_bytes(content)
                judge(bench, 1)


def _judge(before: dict[str, bytes], after: dict[str, bytes]) -> Callable[[Path, int], bool]:
    def judge(path: Path, number: int) -> bool:
        """Whether a state is the new one."""
        with closing(FileStorage.open(str(path))) as storage:
            result = check_image(storage, read_header(storage))
            assert not result.corruptions, result.findings
            assert not result.check_errors
            names = [snapshot.name for snapshot in read_snapshots(storage, read_header(storage))]
        assert names in (list(before), list(after))
        if number % 8 == 0:  # the expensive ones
            assert execute("qemu-img", "check", "-f", "qcow2", path).returncode in (0, 3)
            assert held(path) in (before, after)
            contents(path)
        return names == list(after) != list(before)

    return judge

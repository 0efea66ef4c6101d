"""A job that copies a disk in use: it takes what changed, waits for what is under way, reads, and misses nothing."""

import random
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from nbdq.chain.bitmaps import bitmaps_of
from nbdq.chain.clusters import ClusterCache
from nbdq.chain.open import open_writable
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.policy import Policy
from tests.support.tools import requires, run

pytestmark = requires("qemu-img")

SIZE = 256 << 10
SLOT = 4096
PASSES = 20


def read(disk: OverlayDisk, offset: int, length: int) -> bytes:
    data = bytearray(length)
    disk.read_into(offset, memoryview(data))
    return bytes(data)


def inline_guest(disk: OverlayDisk, chosen: random.Random) -> None:
    """Small writes, as the loop thread carries them out."""
    offset = chosen.randrange(SIZE // 512) * 512
    view = memoryview(chosen.randbytes(512))
    if not disk.write_cached(offset, view):
        disk.write(offset, view)


def pool_guest(disk: OverlayDisk, chosen: random.Random) -> None:
    """Everything else, as a thread of the pool carries it out."""
    offset = chosen.randrange(SIZE // SLOT) * SLOT
    length = min(SIZE - offset, chosen.randrange(1, 40) * 512)
    match chosen.randrange(4):
        case 0:
            disk.zero(offset, length, unmap=chosen.random() < 0.5)
        case 1:
            disk.discard(offset, length)
        case _:
            disk.write(offset, memoryview(chosen.randbytes(length)))
    if chosen.random() < 0.05:
        disk.flush()


@pytest.mark.parametrize("options", ["cluster_size=4k", "cluster_size=64k,extended_l2=on"])
@pytest.mark.parametrize("granularity_bits", [9, 16])
def test_a_copy_of_a_busy_disk_becomes_equal_to_it(options: str, granularity_bits: int, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(SIZE))
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    stop = threading.Event()
    failures: list[BaseException] = []

    def keep_busy(guest: Callable[[OverlayDisk, random.Random], None], number: int) -> None:
        chosen = random.Random(seed + number)
        try:
            while not stop.is_set():
                guest(disk, chosen)
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    clusters = ClusterCache(budget=SIZE)
    with (
        closing(clusters),
        closing(open_writable(str(path), format="qcow2", policy=Policy(), clusters=clusters)) as disk,
    ):
        assert isinstance(disk, OverlayDisk)
        guests = [threading.Thread(target=keep_busy, args=(inline_guest, 0))]
        guests += [threading.Thread(target=keep_busy, args=(pool_guest, number)) for number in (1, 2)]
        sys.setswitchinterval(1e-5)
        try:
            for each in guests:
                each.start()
            tracker = bitmaps_of(disk.top).track(granularity_bits)  # the guests are at work already
            disk.top.barrier()
            copy = bytearray(read(disk, 0, SIZE))
            for _ in range(PASSES):
                taken = tracker.take(0, SIZE)
                disk.top.barrier()
                for offset, length in taken:
                    copy[offset : offset + length] = read(disk, offset, length)
        finally:
            stop.set()
            for each in guests:
                each.join()
            sys.setswitchinterval(interval)
        assert not failures
        for offset, length in tracker.take(0, SIZE):
            copy[offset : offset + length] = read(disk, offset, length)
        bitmaps_of(disk.top).untrack(tracker)
        assert copy == read(disk, 0, SIZE)

"""Dirty bitmaps of a disk whose layers are exchanged: those of an image that comes back go on where they were."""

from pathlib import Path

import pytest

from nbdq.chain.bitmaps import bitmaps_of, find_bitmaps, live_bitmap
from nbdq.chain.overlay import OverlayDisk
from nbdq.ops.active_commit import ActiveCommit
from nbdq.ops.control import Control
from tests.ops.harness import served
from tests.support.images import Image, Layer, Variant, build
from tests.support.tools import requires

pytestmark = requires("qemu-img", "qemu-io")

M = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return build(Variant("two", (Layer("4M", ("write 0 2M",)), Layer("4M", ("write 1M 1M",)))), tmp_path)


def test_they_survive_an_active_commit_that_is_taken_back(image: Image) -> None:
    """Also the transient ones, and those that an export shows."""
    with served(image) as disk:
        assert isinstance(disk.device, OverlayDisk)
        bitmaps_of(disk.device.top).add("transient")
        bitmaps_of(disk.device.top).add("kept", persistent=True)
        shown = find_bitmaps(disk.device, ["transient", "kept"])
        disk.device.write(0, memoryview(b"x" * 512))
        operation = ActiveCommit(disk.chain, base=1)
        operation.complete()
        operation.run(Control())
        with disk.gate.drained():
            operation.pivot()
            assert live_bitmap(disk.chain.device, "kept") is None, "as in QEMU"
            operation.revert()
        disk.give_up(operation)
        assert isinstance(disk.chain.device, OverlayDisk)
        disk.device.write(M, memoryview(b"x" * 512))
        for name, bits in shown.items():
            assert live_bitmap(disk.chain.device, name) is bits
            assert bits.take(0, 4 * M) == [(0, 65536), (M, 65536)]
        bitmaps = bitmaps_of(disk.chain.device.top)
        bitmaps.remove("transient")
        bitmaps.remove("kept")
        assert bitmaps.is_empty, "the job tracks no more"

"""Media that are full, or fail, in the middle of an operation: it goes on, or is given up, and the disk is in order."""

import errno
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from nbdq.chain.live import LiveChain, LowerLayer
from nbdq.errors import ImageLocked
from nbdq.ops.active_commit import ActiveCommit
from nbdq.ops.commit import Commit
from nbdq.ops.control import Control
from nbdq.ops.operation import MirroringOperation, Operation
from nbdq.ops.rebase import Rebase
from nbdq.ops.stream import Stream
from nbdq.qcow2.header_area import set_overlay_marker
from nbdq.storage import FileStorage
from tests.ops.harness import Served, check, info, qemu_reads, served
from tests.support.images import Image, Layer, Variant, build
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io")

OPERATIONS: dict[str, Callable[[LiveChain], Operation]] = {
    "active commit": lambda chain: ActiveCommit(chain, base=2),
    "commit": lambda chain: Commit(chain, top=1, base=2),
    "stream": lambda chain: Stream(chain, base=2),
    "stream below the active layer": lambda chain: Stream(chain, index=1),
    "rebase": lambda chain: Rebase(chain, name="new", format="qcow2"),
}
every = pytest.mark.parametrize("make", OPERATIONS.values(), ids=OPERATIONS)


@pytest.fixture
def image(tmp_path: Path) -> Image:
    layers = (Layer("16M", ("write 0 8M",)), Layer("20M", ("write 4M 10M",)), Layer("20M", ("write 15M 1M",)))
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "new", "20M")
    return build(Variant("test", layers), tmp_path)


@contextmanager
def _failing(after: int, number: int) -> Iterator[None]:
    """Every large write fails after so many."""
    original = FileStorage._pwritev
    count = 0

    def write(self: FileStorage, buffers: Any, offset: int) -> int:
        nonlocal count
        count += 1
        if count > after:
            raise OSError(number, "injected")
        return original(self, buffers, offset)

    with patch.object(FileStorage, "_pwritev", write):
        yield


@every
@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_operation_goes_on_when_there_is_room_again(
    image: Image, make: Callable[[LiveChain], Operation], after: int
) -> None:
    with served(image) as disk:
        before = disk.read()
        operation = make(disk.chain)
        if isinstance(operation, MirroringOperation):
            operation.complete()
        with _failing(after, errno.ENOSPC), pytest.raises(OSError, match="injected"):
            operation.run(Control())
        assert disk.read() == before
        disk.carry_out(operation)
        assert disk.read() == before
        paths = [Path(layer.path) for layer in disk.chain.layers]
    assert qemu_reads(paths[0]) == before
    check(*paths)


@every
@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_operation_whose_medium_has_failed_leaves_a_chain_that_reads_the_same(
    image: Image, make: Callable[[LiveChain], Operation], after: int
) -> None:
    disk = served(image)
    before = disk.read()
    operation = make(disk.chain)
    with _failing(after, errno.EIO):
        with pytest.raises(OSError, match="injected"):
            operation.run(Control())
        with suppress(OSError):  # what was written to a layer below may not be durable
            disk.give_up(operation)
    assert disk.read() == before
    with suppress(OSError), closing(disk.clusters):  # nor may be what was written to the active layer
        disk.chain.close()
    assert qemu_reads(image.top) == before


def test_what_would_become_free_in_the_base_stays_taken_if_the_disk_cannot_forget_it(tmp_path: Path) -> None:
    pieces = tuple(f"write {number * 64 + 4}k 4k" for number in range(64))
    layers = (Layer("4M", ("compress 0 4M",)), Layer("4M", pieces, "cluster_size=4k"), Layer("4M"))
    image = build(Variant("test", layers), tmp_path)
    with Served(image.top, cluster_budget=1) as disk:
        before = disk.read()
        operation = Commit(disk.chain, top=1, base=2)
        operation.run(Control())
        with (
            patch.object(LowerLayer, "flush", side_effect=OSError(errno.ENOSPC, "injected")),
            pytest.raises(OSError, match="injected"),
        ):
            disk.give_up(operation)
        assert disk.read() == before  # by the index from before the commit
        disk.carry_out(Commit(disk.chain, top=1, base=2))
        assert disk.read() == before
    assert qemu_reads(image.top) == before


def test_a_commit_under_a_layer_that_others_read_ends_before_it_has_begun(image: Image) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "2.qcow2", "-F", "qcow2", image.directory / "over", "20M")
    with Served(image.directory / "over") as disk, Served(image.top, read_only=True):
        operation = Commit(disk.chain, top=2, base=3, force=True)
        control = Control()
        with pytest.raises(ImageLocked):
            operation.run(control)
        assert control.total == 0
        disk.give_up(operation)


def test_the_mark_of_a_committed_overlay_moves_to_the_one_above(image: Image) -> None:
    with served(image) as disk:
        base = disk.chain.layers[2]
        assert base.header is not None
        disk.chain.claims.begin_writing(base)
        set_overlay_marker(base.storage, base.header, str(image.paths[1]))
        disk.chain.claims.end_writing(base)
        disk.chain.refresh(2)
        disk.carry_out(Commit(disk.chain, top=1, base=2))
        header = disk.chain.layers[1].header
        assert header is not None
        assert header.overlay_marker == str(image.top)
    assert info(image.paths[0])["virtual-size"] == 20 << 20

"""Streams: a layer takes over what shows through it; the disk reads the same at any moment."""

from pathlib import Path

import pytest

from nbdq.chain.overlay import OverlayDisk
from nbdq.errors import OperationError
from nbdq.ops.control import Cancelled, Control
from nbdq.ops.stream import Stream
from tests.ops.harness import Served, check, info, qcow2_paths, qemu_reads, served
from tests.support.images import Image, Layer, Variant, build
from tests.support.oracles import map_extents
from tests.support.tools import requires, run
from tests.support.variants import VARIANTS

pytestmark = requires("qemu-img", "qemu-io")

CHAINS = [variant for variant in VARIANTS if 2 <= len(variant.layers) <= 9 and not variant.huge]
DEEP = [variant for variant in CHAINS if len(variant.layers) >= 3]


def _chain(directory: Path, *layers: Layer) -> Image:
    return build(Variant("test", layers), directory)


@pytest.mark.parametrize("variant", CHAINS, ids=str)
def test_a_disk_that_has_taken_over_everything_stands_alone(variant: Variant, tmp_path: Path) -> None:
    image = build(variant, tmp_path)
    with served(image) as disk:
        before = disk.read()
        control = Control()
        disk.carry_out(Stream(disk.chain, force=True), control=control)
        assert control.done == control.total
        assert disk.read() == before
        assert len(disk.chain.layers) == 1
    for path in image.paths[:-1]:
        path.unlink()
    assert qemu_reads(image.top) == before
    assert "backing-filename" not in info(image.top)
    check(image.top)


@pytest.mark.parametrize("variant", DEEP, ids=str)
def test_layers_between_target_and_base_drop_out_and_nothing_changes(variant: Variant, tmp_path: Path) -> None:
    last = len(variant.layers) - 1
    for target, base in sorted({(0, 2), (0, last), (last - 2, last)}):
        directory = tmp_path / f"{target}over{base}"
        directory.mkdir()
        image = build(variant, directory)
        paths = image.paths[::-1]
        with served(image) as disk:
            before = disk.read()
            disk.carry_out(Stream(disk.chain, index=target, base=base))
            assert disk.read() == before
            assert [Path(layer.path).resolve() for layer in disk.chain.layers] == paths[: target + 1] + paths[base:]
        for path in paths[target + 1 : base]:
            path.unlink()
        assert qemu_reads(image.top) == before
        assert info(paths[target])["backing-filename-format"] == variant.layers[-1 - base].format
        check(*[path for path in qcow2_paths(image) if path.exists()])


@pytest.mark.parametrize("variant", DEEP, ids=str)
def test_a_layer_below_the_active_one_can_take_over_everything_too(variant: Variant, tmp_path: Path) -> None:
    image = build(variant, tmp_path)
    with served(image) as disk:
        before = disk.read()
        disk.carry_out(Stream(disk.chain, index=1))
        assert disk.read() == before
    for path in image.paths[:-2]:
        path.unlink()
    assert qemu_reads(image.top) == before
    check(*[path for path in qcow2_paths(image) if path.exists()])


def test_compressed_clusters_stay_compressed(tmp_path: Path) -> None:
    image = _chain(tmp_path, Layer("4M", ("compress 0 4M",)), Layer("4M"), Layer("4M", ("write 0 64k",)))
    with served(image) as disk:
        before = disk.read()
        disk.carry_out(Stream(disk.chain))
        assert disk.read() == before
    assert qemu_reads(image.top) == before
    assert "98.44% compressed" in run("qemu-img", "check", image.top)


def test_zeros_cost_no_space_and_hide_the_base(tmp_path: Path) -> None:
    image = _chain(tmp_path, Layer("4M", ("write 0 4M",)), Layer("4M", ("zero 0 4M",)), Layer("4M"))
    with served(image) as disk:
        disk.carry_out(Stream(disk.chain, base=2))
        assert disk.read() == bytes(4 << 20)
    assert [(each["zero"], each["data"]) for each in map_extents(image)] == [(True, False)]


def test_a_pivot_can_be_reverted(tmp_path: Path) -> None:
    for index in (0, 1):
        directory = tmp_path / str(index)
        directory.mkdir()
        image = _chain(directory, Layer("1M", ("write 0 1M",)), Layer("1M", ("write 0 64k",)), Layer("1M"))
        with served(image) as disk:
            before = disk.read()
            operation = Stream(disk.chain, index=index)
            operation.run(Control())
            with disk.gate.drained():
                operation.pivot()
                operation.revert()
            disk.give_up(operation)
            assert [layer.path for layer in disk.chain.layers] == [str(path) for path in image.paths[::-1]]
            assert disk.read() == before
            disk.carry_out(Stream(disk.chain, index=index))
            assert disk.read() == before
        check(*image.paths)


def test_a_cancelled_one_can_be_begun_again(tmp_path: Path) -> None:
    image = _chain(tmp_path, Layer("8M", ("write 0 8M",)), Layer("8M"), Layer("8M"))
    with served(image) as disk:
        before = disk.read()
        for index in (0, 1):
            control = Control()
            operation = Stream(disk.chain, index=index)
            control.advance = _cancelling(control)  # type: ignore[method-assign]
            with pytest.raises(Cancelled):
                operation.run(control)
            disk.give_up(operation)
            disk.give_up(operation)
            assert disk.read() == before
        disk.carry_out(Stream(disk.chain))
        assert disk.read() == before
    check(*image.paths)


def _cancelling(control: Control):  # type: ignore[no-untyped-def]
    """Cancels after the first piece."""
    advance = control.advance

    def advance_and_cancel(length: int = 0, *, cost: int | None = None) -> None:
        advance(length, cost=cost)
        control.cancel()

    return advance_and_cancel


def test_nonsense_is_refused_in_words(tmp_path: Path) -> None:
    image = _chain(tmp_path, Layer("1M", format="raw"), Layer("1M"))
    with served(image) as disk:
        with pytest.raises(OperationError, match="does not lie below"):
            Stream(disk.chain, base=0)
        with pytest.raises(OperationError, match="is raw"):
            Stream(disk.chain, index=1)
        with pytest.raises(OperationError, match="stands alone"):
            Stream(disk.chain, backing_file="x")
    with Served(image.top, read_only=True) as disk, pytest.raises(OperationError, match="read-only"):
        Stream(disk.chain)


def test_the_rest_of_a_compressed_cluster_is_taken_over_when_the_guest_writes_a_part_of_it_meanwhile(
    tmp_path: Path,
) -> None:
    """With subclusters a cluster can be half the top's own, and then cannot be stored as it is."""
    options = "cluster_size=64k,extended_l2=on"
    image = _chain(tmp_path, Layer("1M", ("compress 0 1M",), options), Layer("1M", (), options))
    with served(image) as disk:
        expected = bytearray(disk.read())
        device = disk.device
        assert isinstance(device, OverlayDisk)
        store = device.write_compressed

        def write_compressed(offset: int, data: bytes, *, if_open: bool) -> bool:
            device.write(offset + 2048, memoryview(b"x" * 2048))
            expected[offset + 2048 : offset + 4096] = b"x" * 2048
            return store(offset, data, if_open=if_open)

        device.write_compressed = write_compressed  # type: ignore[method-assign]
        disk.carry_out(Stream(disk.chain))
        assert disk.read() == expected
    assert expected.count(b"x" * 2048) == 16
    image.paths[0].unlink()
    assert qemu_reads(image.top) == expected
    check(image.top)

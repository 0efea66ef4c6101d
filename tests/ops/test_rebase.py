"""Rebases: the disk reads the same over another chain."""

from pathlib import Path

import pytest

from nbdq.errors import ChainError, OperationError
from nbdq.ops.control import Control
from nbdq.ops.rebase import Rebase, change_backing_file
from tests.ops.harness import check, info, qemu_reads, served
from tests.support.images import Image, Layer, Variant, build
from tests.support.tools import requires, run
from tests.support.variants import VARIANTS

pytestmark = requires("qemu-img", "qemu-io")

CHAINS = [variant for variant in VARIANTS if 2 <= len(variant.layers) <= 9 and not variant.huge]

BASES = {
    "other contents": Layer("40c", ("write 4c 3c", "write 20c 10c", "zero 12c 4c"), name="new.qcow2"),
    "a shorter one": Layer("700k+512", ("write 0 700k",), "cluster_size=4k", name="new.qcow2"),
    "a raw one": Layer("64M", ("write 100k 1M", "write 20M 1M"), format="raw", name="new.raw"),
    "an empty one": Layer("0", name="new.qcow2"),
    "a long one": Layer("64M", ("write 0 64M",), name="new.qcow2"),
}


#: Every chain with some of the bases, every base with many of the chains.
_PAIRS = [
    (variant, list(BASES)[(number + more) % len(BASES)]) for number, variant in enumerate(CHAINS) for more in (0, 2)
]


@pytest.mark.parametrize(("variant", "base_name"), _PAIRS, ids=str)
def test_a_disk_reads_the_same_over_another_base(variant: Variant, base_name: str, tmp_path: Path) -> None:
    base = BASES[base_name]
    image = build(variant, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    new = build(Variant("base", (base,)), other).top
    with served(image) as disk:
        before = disk.read()
        control = Control()
        rebase = Rebase(disk.chain, name=f"other/{new.name}", format=base.format, force=True)  # for its snapshots' sake
        disk.carry_out(rebase, control=control)
        assert control.done == control.total
        assert disk.read() == before
    for path in image.paths[:-1]:
        path.unlink()
    assert qemu_reads(image.top) == before
    assert info(image.top)["backing-filename"] == f"other/{new.name}"
    check(image.top)


def _chain(directory: Path, *layers: Layer) -> Image:
    return build(Variant("test", layers), directory)


def test_only_what_differs_is_copied(tmp_path: Path) -> None:
    image = _chain(tmp_path, Layer("4M", ("write 0 4M",)), Layer("4M"))
    run("cp", "0.qcow2", "new", cwd=tmp_path)
    run("qemu-io", "-f", "qcow2", "-c", "write 1M 512", "new", cwd=tmp_path)
    with served(image) as disk:
        before = disk.read()
        disk.carry_out(Rebase(disk.chain, name="new", format="qcow2"))
        assert disk.read() == before
    assert qemu_reads(image.top) == before
    assert "1/64 =" in run("qemu-img", "check", image.top)


def test_a_layer_below_the_active_one_can_be_rebased_onto_a_layer_of_its_own_chain(tmp_path: Path) -> None:
    layers = (Layer("4M", ("write 0 4M",)), Layer("4M", ("write 1M 1M",)), Layer("4M", ("zero 64k 64k",)), Layer("4M"))
    image = _chain(tmp_path, *layers)
    with served(image) as disk:
        before = disk.read()
        disk.chain.name_layer(3, "bottom")
        disk.carry_out(Rebase(disk.chain, index=1, name="0.qcow2", format="qcow2"))
        assert disk.read() == before
        assert len(disk.chain.layers) == 3
        assert disk.chain.index_of("bottom") == 2
    image.paths[1].unlink()
    assert qemu_reads(image.top) == before
    check(image.paths[0], image.paths[2], image.paths[3])


def test_a_pivot_can_be_reverted(tmp_path: Path) -> None:
    image = _chain(tmp_path, Layer("1M", ("write 0 1M",)), Layer("1M"))
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "new", "1M")
    with served(image) as disk:
        before = disk.read()
        operation = Rebase(disk.chain, name="new", format="qcow2")
        operation.run(Control())
        with disk.gate.drained():
            operation.pivot()
            operation.revert()
        disk.give_up(operation)
        assert disk.read() == before
        assert [layer.path for layer in disk.chain.layers] == [str(path) for path in image.paths[::-1]]
    assert info(image.top)["backing-filename"] == "0.qcow2"
    check(*image.paths)


def test_nothing_is_opened_that_is_not_allowed_or_would_be_a_loop(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    image = _chain(tmp_path / "disk", Layer("1M"), Layer("1M"))
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "outside", "1M")
    (tmp_path / "disk" / "link").symlink_to("../outside")
    with served(image) as disk:
        for name in ("../outside", "link"):
            with pytest.raises(OperationError, match="allowed directories"):
                Rebase(disk.chain, name=name, format="qcow2")
        with pytest.raises(OperationError, match="over itself"):
            Rebase(disk.chain, name="1.qcow2", format="qcow2")
        operation = Rebase(disk.chain, name="missing", format="qcow2")
        with pytest.raises(ChainError, match="is missing"):
            operation.run(Control())
        disk.give_up(operation)
    check(*image.paths)


def test_a_new_name_can_be_recorded_unseen(tmp_path: Path) -> None:
    image = _chain(tmp_path, Layer("1M", ("write 0 1M",)), Layer("1M"), Layer("1M"))
    with served(image) as disk:
        before = disk.read()
        change_backing_file(disk.chain, 0, "nowhere")
        change_backing_file(disk.chain, 1, "elsewhere", "raw")
        assert disk.read() == before
    assert info(image.top)["backing-filename"] == "nowhere"
    assert info(image.top)["backing-filename-format"] == "qcow2"
    assert info(image.paths[1])["backing-filename"] == "elsewhere"
    assert info(image.paths[1])["backing-filename-format"] == "raw"

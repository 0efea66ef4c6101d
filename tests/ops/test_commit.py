"""Commits: the disk reads the same before, meanwhile and after; what is left behind is what QEMU would leave."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nbdq.chain.bitmaps import bitmaps_of
from nbdq.chain.overlay import OverlayDisk
from nbdq.errors import ChainError, ImageLocked, OperationError
from nbdq.locks import READER, lock_image
from nbdq.ops.active_commit import ActiveCommit
from nbdq.ops.commit import Commit
from nbdq.ops.control import Cancelled, Control
from nbdq.qcow2.format import read_header
from nbdq.qcow2.header_area import set_overlay_marker
from nbdq.storage import FileStorage
from tests.ops.harness import Served, check, info, qcow2_paths, qemu_reads, served
from tests.support.images import Image, Layer, Variant, build
from tests.support.oracles import HOLE, block_status, map_extents, status_of_map
from tests.support.tools import requires, run
from tests.support.variants import VARIANTS

pytestmark = requires("qemu-img", "qemu-io")

CHAINS = [variant for variant in VARIANTS if 2 <= len(variant.layers) <= 9 and not variant.huge]
DEEP = [variant for variant in CHAINS if len(variant.layers) >= 3]


def _copy(image: Image, directory: Path) -> Image:
    """The same files elsewhere."""
    shutil.copytree(image.directory, directory)
    return Image(image.variant, directory, [directory / path.relative_to(image.directory) for path in image.paths])


def _movable(variant: Variant) -> bool:
    """Whether no name in the images leads out of their directory."""
    return not any("{directory}" in layer.options + layer.backing or ".." in layer.name for layer in variant.layers)


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.suffix == ".raw" else qemu_reads(path)


def _sectors_with_data(image: Image) -> set[int]:
    return {
        sector
        for offset, length, value in status_of_map(map_extents(image))
        if not value & HOLE
        for sector in range(offset >> 9, offset + length >> 9)
    }


@pytest.mark.parametrize("variant", CHAINS, ids=str)
def test_an_active_commit_leaves_a_base_that_reads_as_the_disk_did(variant: Variant, tmp_path: Path) -> None:
    for depth in sorted({1, len(variant.layers) - 1}):
        directory = tmp_path / f"into{depth}"
        directory.mkdir()
        image = build(variant, directory)
        with served(image) as disk:
            before = disk.read()
            disk.carry_out(ActiveCommit(disk.chain, base=depth, force=True))
            assert disk.read(0, len(before)) == before
            assert len(disk.chain.layers) == len(variant.layers) - depth
        assert _bytes(image.paths[-1 - depth])[: len(before)].ljust(len(before), b"\0") == before
        assert qemu_reads(image.top) == before
        check(*qcow2_paths(image))


@pytest.mark.parametrize("variant", [variant for variant in CHAINS if _movable(variant)], ids=str)
def test_an_active_commit_copies_what_qemu_copies_and_no_more(variant: Variant, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    ours = build(variant, tmp_path / "ours")
    theirs = _copy(ours, tmp_path / "theirs")
    run("qemu-img", "commit", "-q", "-t", "unsafe", "-d", "-f", "qcow2", theirs.top)
    with served(ours) as disk:
        disk.carry_out(ActiveCommit(disk.chain, base=1, force=True))
    bases = [Image(Variant("base", variant.layers[:-1]), image.directory, image.paths[:-1]) for image in (ours, theirs)]
    formats = [base.format for base in bases]
    run("qemu-img", "compare", "-f", formats[0], "-F", formats[1], bases[0].top, bases[1].top)
    if "raw" not in formats:
        assert bases[0].size == bases[1].size
        # QEMU copies whole granules of 64 KiB, where we copy what is there.
        ours_has, theirs_has = map(_sectors_with_data, bases)
        assert ours_has <= theirs_has


@pytest.mark.parametrize("variant", DEEP, ids=str)
def test_an_intermediate_commit_changes_neither_the_disk_nor_what_qemu_reads(variant: Variant, tmp_path: Path) -> None:
    layers = len(variant.layers)
    for top, base in [(1, 2), (1, layers - 1), (layers - 2, layers - 1)]:
        if top == base or base >= layers:
            continue
        directory = tmp_path / f"{top}into{base}"
        if directory.exists():
            continue
        directory.mkdir()
        image = build(variant, directory)
        paths = image.paths[::-1]
        with served(image) as disk:
            before = disk.read()
            disk.carry_out(Commit(disk.chain, top=top, base=base, force=True))
            assert disk.read() == before
            assert [Path(layer.path).resolve() for layer in disk.chain.layers] == paths[:top] + paths[base:]
        for path in paths[top:base]:
            path.unlink()
        assert qemu_reads(image.top) == before
        check(*[path for path in qcow2_paths(image) if path.exists()])
        assert info(paths[top - 1])["backing-filename-format"] == variant.layers[-1 - base].format


def _chain(directory: Path, *layers: Layer) -> Image:
    return build(Variant("test", layers), directory)


_FULL = Layer("4M", ("write 0 4M",))
_THREE = (_FULL, Layer("4M", ("write 1M 1M", "zero 3M 64k")), Layer("4M", ("write 0 64k",)))


class TestSizes:
    def test_a_base_that_is_smaller_grows(self, tmp_path: Path) -> None:
        image = _chain(tmp_path, Layer("1M", ("write 0 1M",)), Layer("2M+512", ("write 1M+64k 64k",)), Layer("3M"))
        with served(image) as disk:
            before = disk.read()
            disk.carry_out(Commit(disk.chain, top=1, base=2))
            assert disk.read() == before
        assert info(image.paths[0])["virtual-size"] == (2 << 20) + 512
        assert qemu_reads(image.top) == before

    def test_the_end_of_a_longer_base_does_not_show_through(self, tmp_path: Path) -> None:
        image = _chain(tmp_path, _FULL, Layer("1M", ("write 0 64k",)), Layer("3M", ("write 2M 64k",)))
        with served(image) as disk:
            before = disk.read()
            disk.carry_out(Commit(disk.chain, top=1, base=2))
            assert disk.read() == before
        assert qemu_reads(image.top) == before
        assert info(image.paths[0])["virtual-size"] == 4 << 20

    def test_nor_does_it_when_the_disk_has_grown_since_a_commit_was_first_looked_at(self, tmp_path: Path) -> None:
        image = _chain(tmp_path, _FULL, Layer("1M", ("write 0 64k",)), Layer("1M", ("write 64k 64k",)))
        with served(image) as disk:
            Commit(disk.chain, top=1, base=2)
            disk.device.grow(4 << 20)
            before = disk.read()
            disk.carry_out(Commit(disk.chain, top=1, base=2))
            assert disk.read() == before
        assert qemu_reads(image.top) == before

    def test_an_active_commit_into_a_longer_base_never_cuts_it_off(self, tmp_path: Path) -> None:
        image = _chain(tmp_path, _FULL, Layer("1M", ("write 0 64k",)))
        old = qemu_reads(image.paths[0])
        with served(image) as disk:
            before = disk.read()
            disk.carry_out(ActiveCommit(disk.chain, base=1))
            assert disk.read() == before + old[1 << 20 :]


class TestNames:
    def test_stay_relative_where_they_were(self, tmp_path: Path) -> None:
        image = _chain(
            tmp_path,
            Layer("1M", name="store/base.qcow2"),
            Layer("1M", ("write 0 64k",), name="store/deep/mid.qcow2"),
            Layer("1M"),
        )
        with served(image) as disk:
            disk.carry_out(Commit(disk.chain, top=1, base=2))
        assert info(image.top)["backing-filename"] == "store/base.qcow2"

    def test_stay_absolute_where_they_were(self, tmp_path: Path) -> None:
        image = _chain(tmp_path, Layer("1M"), Layer("1M"), Layer("1M", backing="{directory}/1.qcow2"))
        with served(image) as disk:
            disk.carry_out(Commit(disk.chain, top=1, base=2))
        assert info(image.top)["backing-filename"] == str(image.paths[0])

    def test_are_those_that_the_administrator_wants(self, tmp_path: Path) -> None:
        image = _chain(tmp_path, Layer("1M"), Layer("1M"), Layer("1M"))
        (tmp_path / "alias").symlink_to(image.paths[0])
        with served(image) as disk:
            disk.carry_out(Commit(disk.chain, top=1, base=2, backing_file="alias"))
        assert info(image.top)["backing-filename"] == "alias"

    def test_lead_to_the_base_even_through_links_to_directories(self, tmp_path: Path) -> None:
        (tmp_path / "far" / "away").mkdir(parents=True)
        (tmp_path / "near").symlink_to("far/away")
        image = _chain(
            tmp_path,
            Layer("1M", ("write 0 64k",), name="far/base.qcow2"),
            Layer("1M", ("write 64k 64k",), name="far/away/mid.qcow2", backing="../base.qcow2"),
            Layer("1M", backing="near/mid.qcow2"),
        )
        with served(image) as disk:
            before = disk.read()
            disk.carry_out(Commit(disk.chain, top=1, base=2))
        assert qemu_reads(image.top) == before


class TestCompressedClusters:
    def test_stay_compressed(self, tmp_path: Path) -> None:
        image = _chain(tmp_path, Layer("4M"), Layer("4M", ("compress 0 4M",)), Layer("4M", ("write 1M 64k",)))
        with served(image) as disk:
            before = disk.read()
            disk.carry_out(Commit(disk.chain, top=1, base=2))
            assert disk.read() == before
        assert qemu_reads(image.top) == before
        assert "100.00% compressed" in run("qemu-img", "check", image.paths[0])

    @pytest.mark.parametrize("options", ["compression_type=zstd", "cluster_size=32k", "data_file={directory}/data"])
    def test_are_inflated_where_the_base_would_not_understand_them(self, tmp_path: Path, options: str) -> None:
        image = _chain(tmp_path, Layer("4M", options=options), Layer("4M", ("compress 0 4M",)), Layer("4M"))
        with Served(image.top, options=["--allow-data-file"]) as disk:
            before = disk.read()
            disk.carry_out(Commit(disk.chain, top=1, base=2))
            assert disk.read() == before
        assert qemu_reads(image.top) == before
        check(image.paths[0])

    def test_that_lie_open_only_in_part_are_inflated(self, tmp_path: Path) -> None:
        image = _chain(
            tmp_path,
            Layer("4M", ("write 0 1M",)),
            Layer("4M", ("compress 0 4M",)),
            Layer("4M", ("write 4k 4k", "zero 80k 4k"), "cluster_size=4k"),
            Layer("4M"),
        )
        with served(image) as disk:
            before = disk.read()
            disk.carry_out(Commit(disk.chain, top=1, base=3))
            assert disk.read() == before
        assert qemu_reads(image.top) == before


def test_bitmaps_of_a_disk_whose_commit_was_taken_back_are_in_use_in_its_file(tmp_path: Path) -> None:
    image = _chain(tmp_path, *_THREE[:2])
    with served(image) as disk:
        assert isinstance(disk.device, OverlayDisk)
        bitmaps_of(disk.device.top).add("b", persistent=True)
        operation = ActiveCommit(disk.chain, base=1)
        operation.complete()
        operation.run(Control())
        operation.pivot()  # stores the bitmap, to which no header points that was read before
        operation.revert()
        disk.give_up(operation)
        said = json.loads(run("qemu-img", "info", "-U", "--output=json", image.top))
        assert "in-use" in said["format-specific"]["data"]["bitmaps"][0]["flags"]
    check(*image.paths)


def test_a_base_whose_commit_was_taken_back_names_its_overlay_still(tmp_path: Path) -> None:
    image = _chain(tmp_path, *_THREE[:2])
    with contextlib.closing(FileStorage.open(str(image.paths[0]), writable=True)) as base:
        set_overlay_marker(base, read_header(base), str(image.top))
    with served(image) as disk:
        operation = ActiveCommit(disk.chain, base=1)
        operation.complete()
        operation.run(Control())
        operation.pivot()
        operation.revert()
        with contextlib.closing(FileStorage.open(str(image.paths[0]))) as base, pytest.raises(ImageLocked):
            lock_image(base.descriptor, base.path, READER)  # it is still written to
        disk.give_up(operation)
    with contextlib.closing(FileStorage.open(str(image.paths[0]))) as base:
        lock_image(base.descriptor, base.path, READER)
        assert read_header(base).overlay_marker == str(image.top)
    check(*image.paths)


def test_nobody_writes_to_a_base_that_is_not_recorded_as_the_disk_and_cannot_be_left(tmp_path: Path) -> None:
    image = _chain(tmp_path, *_THREE[:2])
    disk = served(image)
    before = disk.read()
    operation = ActiveCommit(disk.chain, base=1)
    operation.complete()
    operation.run(Control())
    operation.pivot()
    with contextlib.closing(FileStorage.open(str(image.top))) as other:
        lock_image(other.descriptor, other.path, READER)
        with pytest.raises(ImageLocked):
            operation.revert()
    with pytest.raises(OSError, match="could not be taken back"):
        disk.device.write(0, memoryview(b"x" * 512))
    assert disk.read() == before
    with contextlib.closing(disk.clusters), pytest.raises(OSError, match="could not be taken back"):
        disk.chain.close()
    assert qemu_reads(image.top) == before


@pytest.mark.parametrize(
    "make", [lambda chain: Commit(chain, top=1, base=2), lambda chain: ActiveCommit(chain, base=2)]
)
class TestEnds:
    def test_a_pivot_can_be_reverted(self, tmp_path: Path, make: Any) -> None:
        image = _chain(tmp_path, *_THREE)
        with served(image) as disk:
            before = disk.read()
            operation = make(disk.chain)
            if isinstance(operation, ActiveCommit):
                operation.complete()
            operation.run(Control())
            with disk.gate.drained():
                operation.pivot()
                operation.revert()
            disk.give_up(operation)
            assert [layer.path for layer in disk.chain.layers] == [str(path) for path in image.paths[::-1]]
            assert disk.read() == before
            disk.device.write(0, memoryview(b"x" * 512))
            disk.carry_out(make(disk.chain))
            assert disk.read() == b"x" * 512 + before[512:]
        check(*image.paths)

    def test_a_cancelled_one_leaves_the_chain_as_it_was(self, tmp_path: Path, make: Any) -> None:
        image = _chain(tmp_path, *_THREE)
        with served(image) as disk:
            before = disk.read()
            operation, control = make(disk.chain), Control()
            control.cancel()
            with pytest.raises(Cancelled):
                operation.run(control)
            disk.give_up(operation)
            disk.give_up(operation)
            assert disk.read() == before
            check(*image.paths[:2])
            disk.carry_out(make(disk.chain))
        check(*image.paths)

    def test_a_base_that_somebody_else_uses_is_left_alone(self, tmp_path: Path, make: Any) -> None:
        image = _chain(tmp_path, *_THREE)
        with served(image) as disk, Served(image.paths[0], read_only=True):
            operation = make(disk.chain)
            with pytest.raises(ImageLocked):
                operation.run(Control())
            disk.give_up(operation)
        check(*image.paths)

    def test_a_base_with_other_overlays_is_left_alone_unless_forced(self, tmp_path: Path, make: Any) -> None:
        image = _chain(tmp_path, *_THREE)
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "0.qcow2", "-F", "qcow2", "sibling", cwd=tmp_path)
        with served(image) as disk:
            with pytest.raises(OperationError, match="sibling"):
                make(disk.chain)
            disk.carry_out(Commit(disk.chain, top=1, base=2, force=True))

    def test_a_read_only_disk_is_left_alone(self, tmp_path: Path, make: Any) -> None:
        image = _chain(tmp_path, *_THREE)
        with Served(image.top, read_only=True) as disk, pytest.raises(OperationError, match="read-only"):
            make(disk.chain)


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_what_becomes_free_in_the_base_is_not_used_again_while_the_disk_may_know_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cancelled: bool
) -> None:
    monkeypatch.setattr("nbdq.ops.commit._DURABLE_BYTES", 1)
    pieces = tuple(f"write {number * 64 + 4}k 4k" for number in range(64))
    image = _chain(tmp_path, Layer("4M", ("compress 0 4M",)), Layer("4M", pieces, "cluster_size=4k"), Layer("4M"))
    with Served(image.top, cluster_budget=1) as disk:
        before = disk.read()
        operation = Commit(disk.chain, top=1, base=2)
        operation.run(Control())
        assert disk.read() == before  # by the index from before the commit
        if not is_cancelled:
            with disk.gate.drained():
                operation.pivot()
            operation.finish()
        else:
            disk.give_up(operation)
        assert disk.read() == before
    assert qemu_reads(image.top) == before
    check(image.paths[0])


def test_the_old_top_is_not_opened_for_writing_again(tmp_path: Path) -> None:
    image = _chain(tmp_path, *_THREE)
    with served(image) as disk:
        disk.carry_out(ActiveCommit(disk.chain, base=2))
    with pytest.raises(ChainError, match="has been the disk since"):
        served(image)
    with Served(image.paths[0]) as disk:
        disk.device.write(0, memoryview(b"x" * 512))
    check(*image.paths)


def test_what_was_committed_does_not_stand_in_the_way_of_the_next_commit(tmp_path: Path) -> None:
    image = _chain(tmp_path, *_THREE, Layer("4M", ("write 2M 64k",)), Layer("4M"))
    with served(image) as disk:
        before = disk.read()
        disk.carry_out(Commit(disk.chain, top=3, base=4))
        disk.carry_out(Commit(disk.chain, top=1, base=3))
        disk.carry_out(ActiveCommit(disk.chain, base=1))
        assert disk.read() == before
    assert qemu_reads(image.paths[0]) == before
    check(*image.paths)


def test_a_layer_that_was_committed_goes_on_protecting_its_other_overlays(tmp_path: Path) -> None:
    image = _chain(tmp_path, *_THREE)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "1.qcow2", "-F", "qcow2", "sibling", cwd=tmp_path)
    before = qemu_reads(tmp_path / "sibling")
    with served(image) as disk:
        disk.carry_out(Commit(disk.chain, top=1, base=2))
        assert qemu_reads(tmp_path / "sibling") == before
        with pytest.raises(OperationError, match=r"1\.qcow2"):
            ActiveCommit(disk.chain, base=1)


@pytest.mark.parametrize("is_active", [False, True])
def test_dirty_bitmaps_of_the_base_note_what_was_committed(tmp_path: Path, is_active: bool) -> None:
    image = _chain(tmp_path, Layer("2M"), Layer("4M", ("write 1M 64k", "zero 3M 64k")), Layer("4M"))
    run("qemu-img", "bitmap", "--add", "-g", "64k", image.paths[0], "bitmap")
    with served(image) as disk:
        disk.carry_out(ActiveCommit(disk.chain, base=2) if is_active else Commit(disk.chain, top=1, base=2))
    bitmap = info(image.paths[0])["format-specific"]["data"]["bitmaps"]
    assert bitmap == [{"flags": ["auto"], "name": "bitmap", "granularity": 65536}]
    server = ["[", "qemu-nbd", "-r", "-f", "qcow2", "-B", "bitmap", str(image.paths[0]), "]"]
    found = block_status(server, "qemu:dirty-bitmap:bitmap")
    dirty = [(each.offset, each.length) for each in found if each.value and each.offset < 2 << 20]
    assert dirty == [(1 << 20, 64 << 10)]  # what is behind the old end may count as changed
    check(image.paths[0])


def test_nonsense_is_refused_in_words(tmp_path: Path) -> None:
    image = _chain(tmp_path, *_THREE)
    with served(image) as disk:
        with pytest.raises(OperationError, match="both top and base"):
            Commit(disk.chain, top=1, base=1)
        with pytest.raises(OperationError, match="lies above"):
            Commit(disk.chain, top=2, base=1)
    with (
        Served(image.paths[0]) as alone,
        pytest.raises(OperationError, match=r"^Image does not have a backing file\.$"),
    ):
        ActiveCommit(alone.chain, base=0)


def test_a_commit_can_go_on_from_where_another_one_was_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdq.ops.commit._DURABLE_BYTES", 1)
    image = _chain(tmp_path, _FULL, Layer("16M", ("write 0 1M", "write 4M 8M")), Layer("16M", ("write 64k 64k",)))
    reached: list[int] = []
    with served(image) as disk:
        before = disk.read()
        control = Control()

        def stop(offset: int) -> None:
            reached.append(offset)
            if offset > 5 << 20:
                control.cancel()

        operation = Commit(disk.chain, top=1, base=2, on_durable=stop)
        with pytest.raises(Cancelled):
            operation.run(control)
        disk.give_up(operation)
    with served(image) as disk:
        control = Control()
        disk.carry_out(Commit(disk.chain, top=1, base=2, start=reached[-1]), control=control)
        assert control.done == control.total == 12 * (1 << 20) - reached[-1]
        assert disk.read() == before
    assert qemu_reads(image.top) == before


def test_corrupt_tables_end_a_commit_and_leave_the_chain(tmp_path: Path) -> None:
    image = _chain(tmp_path, _FULL, Layer("4M", ("write 0 64k", "poke 262152 8 0x8000000000050200")), Layer("4M"))
    with served(image) as disk:
        operation = Commit(disk.chain, top=1, base=2)
        with pytest.raises(OSError, match="corrupt table entry"):
            operation.run(Control())
        disk.give_up(operation)
        assert len(disk.chain.layers) == 3

"""QEMU as referee: whatever qemu-img made, nbdq must show the same disk, the same block status and the same map.

Every test runs over every variant of ``tests/support/variants.py``; one server per variant serves all its tests.
"""

import filecmp
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import oracles
from tests.support.cli import nbdq, run_nbdq
from tests.support.images import Image, Layer, Variant, build
from tests.support.oracles import Status
from tests.support.serving import Server, qemu_nbd, refusal, serve
from tests.support.tools import execute, requires, run
from tests.support.variants import KINDS, SNAPSHOTS, VARIANTS, single

pytestmark = requires("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo", "nbdcopy")


@pytest.fixture(scope="module")
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The variant on disk, made once."""
    variant: Variant = request.param
    return build(variant, tmp_path_factory.mktemp(variant.name, numbered=False))


@pytest.fixture(scope="module")
def server(image: Image) -> Iterator[Server]:
    """nbdq serving the variant, with allocation depth, once for all its tests."""
    with serve("-r", "-A", "-f", image.format, *image.options, image.top, cwd=image.directory) as running:
        yield running


@pytest.fixture(scope="module")
def allocation(server: Server) -> list[Status]:
    """base:allocation of the whole export, asked once for all that compare it."""
    return oracles.block_status([server.uri()])


every_variant = pytest.mark.parametrize("image", VARIANTS, indirect=True, ids=str)
every_copyable_variant = pytest.mark.parametrize("image", [v for v in VARIANTS if not v.huge], indirect=True, ids=str)
every_huge_variant = pytest.mark.parametrize("image", [v for v in VARIANTS if v.huge], indirect=True, ids=str)


def assert_same_map(image: Image, *window: str) -> None:
    ours = nbdq("map", "--output=json", *window, "-f", image.format, *image.options, image.top)
    assert oracles.without_compressed(ours) == oracles.map_text(image, *window), window


@every_copyable_variant
def test_nbdcopy_reads_what_qemu_img_converts(image: Image, server: Server, tmp_path: Path) -> None:
    run("qemu-img", "convert", "-f", image.format, "-O", "raw", image.top, tmp_path / "qemu", cwd=image.directory)
    run("nbdcopy", server.uri(), tmp_path / "nbdq")
    assert (tmp_path / "nbdq").stat().st_size == (tmp_path / "qemu").stat().st_size
    assert filecmp.cmp(tmp_path / "nbdq", tmp_path / "qemu", shallow=False)


@every_copyable_variant
def test_qemu_img_compare_finds_no_difference(image: Image, server: Server) -> None:
    verdict = run("qemu-img", "compare", "-f", "raw", "-F", image.format, server.uri(), image.top, cwd=image.directory)
    assert "identical" in verdict


@every_huge_variant
def test_a_huge_disk_reads_the_same_around_every_piece_of_data(image: Image, server: Server) -> None:
    """qemu-img compare would ask for the status of every 2 GiB; it is shown a window of the disk instead."""

    def window(path: Path, offset: int) -> str:
        length = min(1 << 20, image.size - offset)
        return f"driver=raw,offset={offset},size={length},file.driver=nbd,file.server.type=unix,file.server.path={path}"

    mapped = [extent["start"] for extent in oracles.map_extents(image) if extent["data"]]
    assert mapped
    with qemu_nbd("-f", image.format, image.top) as peer:
        for start in mapped:
            offset = max(0, start - (64 << 10))
            pair = (window(server.socket, offset), window(peer, offset))
            assert "identical" in run("qemu-img", "compare", "--image-opts", *pair)


@every_variant
def test_base_allocation_is_what_qemu_img_map_implies(image: Image, allocation: list[Status]) -> None:
    """P6, P118."""
    assert allocation == oracles.status_of_map(oracles.map_extents(image))


@every_variant
def test_base_allocation_is_what_qemu_nbd_answers(image: Image, allocation: list[Status]) -> None:
    assert allocation == oracles.block_status(oracles.qemu_nbd(image))


@every_variant
def test_allocation_depth_is_what_qemu_nbd_answers(image: Image, server: Server) -> None:
    """P7."""
    context = "qemu:allocation-depth"
    assert oracles.block_status([server.uri()], context) == oracles.block_status(oracles.qemu_nbd(image, "-A"), context)


@every_variant
def test_map_prints_the_json_of_qemu_img(image: Image) -> None:
    assert_same_map(image)


@every_variant
def test_map_prints_the_table_of_qemu_img(image: Image) -> None:
    """The human form names files, and gives up where data has no offset to show: both as qemu-img."""
    theirs = execute("qemu-img", "map", "-f", image.format, image.top, cwd=image.directory)
    ours = run_nbdq("map", "-f", image.format, *image.options, image.top)
    assert ours.stdout == theirs.stdout
    assert (ours.exit_code == 0) == (theirs.returncode == 0), ours.stderr


@every_variant
def test_map_of_a_window_is_cut_at_its_ends(image: Image) -> None:
    """Windows that begin and end inside clusters."""
    size = image.size
    for start, length in ((0, 512), (size // 3 + 100, size // 2), (size // 2 - 1, 1)):
        if 0 <= start < size:
            assert_same_map(image, "-s", str(start), "-l", str(length))


def test_map_of_nothing_is_one_extent_without_length(tmp_path: Path) -> None:
    """Scripts that index the first extent of qemu-img's list find it in ours, too."""
    image = build(single("any"), tmp_path)
    for window in (("-l", "0"), ("-s", str(image.size)), ("-s", str(2 * image.size), "-l", "512")):
        assert_same_map(image, *window)


@pytest.mark.parametrize(("variant", "name"), SNAPSHOTS, ids=str)
def test_an_internal_snapshot_is_served_as_qemu_nbd_serves_it(variant: Variant, name: str, tmp_path: Path) -> None:
    image = build(variant, tmp_path)
    peer = oracles.qemu_nbd(image, "-A", "-l", f"snapshot.name={name}")
    run("nbdcopy", "--", *peer, tmp_path / "qemu.raw")
    with serve("-r", "-A", "-l", name, image.top) as server:
        run("nbdcopy", server.uri(), tmp_path / "nbdq.raw")
        assert filecmp.cmp(tmp_path / "nbdq.raw", tmp_path / "qemu.raw", shallow=False)
        for context in ("base:allocation", "qemu:allocation-depth"):
            assert oracles.block_status([server.uri()], context) == oracles.block_status(peer, context)
    mapped = json.loads(nbdq("map", "--output=json", "-S", name, image.top))
    assert oracles.status_of_map(mapped) == oracles.block_status(peer)


@pytest.mark.parametrize("resize", ["resize 80c", "resize 20c"])
def test_a_snapshot_has_the_size_that_the_disk_had_when_it_was_taken(resize: str, tmp_path: Path) -> None:
    """Q64. QEMU gives a snapshot the size of now; up to the smaller of the two sizes both read the same."""
    image = build(single("resized", steps=("write 0 2c", "write 30c 4c", "snapshot then", resize)), tmp_path)
    run("qemu-img", "convert", "-l", "then", "-O", "raw", image.top, tmp_path / "qemu.raw")
    with serve("-r", "-l", "then", image.top) as server:
        run("nbdcopy", server.uri(), tmp_path / "nbdq.raw")
    ours, theirs = (tmp_path / "nbdq.raw").read_bytes(), (tmp_path / "qemu.raw").read_bytes()
    assert len(ours) == 40 << 16
    common = min(len(ours), len(theirs))
    assert ours[:common] == theirs[:common]


def test_a_relative_data_file_is_found_beside_its_image(tmp_path: Path) -> None:
    """Q76: QEMU looks in its working directory, so only from there do the two agree."""
    image = build(single("relative", "data_file=guest.data"), tmp_path)
    run("qemu-img", "convert", "-O", "raw", image.top, tmp_path / "qemu", cwd=tmp_path)
    with serve("-r", "--allow-data-file", image.top, cwd=Path("/")) as server:
        run("nbdcopy", server.uri(), tmp_path / "nbdq")
    assert filecmp.cmp(tmp_path / "nbdq", tmp_path / "qemu", shallow=False)


def test_an_explicit_chain_is_served_whatever_the_headers_say(tmp_path: Path) -> None:
    """F4: the layers were moved since, and their headers name files that are gone."""
    chain = Variant(
        "moved", (Layer("4M", KINDS, format="raw"), Layer("4M", ("write 3c 2c",)), Layer("4M", ("zero 5c 1c",)))
    )
    image = build(chain, tmp_path)
    run("qemu-img", "convert", "-O", "raw", image.top, tmp_path / "qemu")
    moved = [path.rename(path.with_name(f"moved-{path.name}")) for path in image.paths]
    assert "0.raw" in refusal(moved[1])
    with serve("-r", "--backing", f"qcow2:{moved[1]}", "--backing", f"raw:{moved[0]}", moved[2]) as server:
        run("nbdcopy", server.uri(), tmp_path / "nbdq")
    assert filecmp.cmp(tmp_path / "nbdq", tmp_path / "qemu", shallow=False)
    with serve("-r", "--backing", "none", moved[2]) as server:
        assert oracles.block_status([server.uri()]) == [(0, 4 << 20, 3)]

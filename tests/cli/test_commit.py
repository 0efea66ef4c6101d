"""``nbdq commit`` against ``qemu-img commit``."""

import shutil
from pathlib import Path

import pytest

from tests.ops.harness import check, info, qemu_reads
from tests.support.cli import nbdq, run_nbdq
from tests.support.images import Image, Layer, Variant, build
from tests.support.oracles import map_extents
from tests.support.tools import execute, requires, run

pytestmark = requires("qemu-img", "qemu-io")

_LAYERS = (
    Layer("2M", ("write 0 2M",)),
    Layer("3M", ("write 1M 1M", "zero 64k 64k")),
    Layer("4M", ("write 0 64k", "compress 2M 1M", "zero 1M 128k")),
)


@pytest.fixture
def image(tmp_path: Path) -> Image:
    (tmp_path / "ours").mkdir()
    return build(Variant("test", _LAYERS), tmp_path / "ours")


def _both(image: Image, *words: str) -> tuple[Path, Path]:
    """Commit with nbdq, and a copy with QEMU; both directories."""
    theirs = image.directory.with_name("theirs")
    shutil.copytree(image.directory, theirs)
    assert nbdq("commit", *words, image.top) == run("qemu-img", "commit", *words, theirs / image.top.name)
    return image.directory, theirs


def _assert_alike(ours: Path, theirs: Path, *names: str) -> None:
    for name in names:
        run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", ours / name, theirs / name)
        assert info(ours / name)["virtual-size"] == info(theirs / name)["virtual-size"]
        check(ours / name)


def test_the_image_goes_into_its_backing_file_and_is_empty_then(image: Image) -> None:
    before = qemu_reads(image.top)
    ours, theirs = _both(image)
    _assert_alike(ours, theirs, "1.qcow2", "2.qcow2")
    assert qemu_reads(image.top) == qemu_reads(image.paths[1]) == before
    assert image.top.stat().st_size == (theirs / image.top.name).stat().st_size
    assert "allocated" not in run("qemu-img", "check", image.top)


def test_with_d_the_image_keeps_what_it_holds(image: Image) -> None:
    size = image.top.stat().st_size
    _assert_alike(*_both(image, "-d"), "1.qcow2", "2.qcow2")
    assert image.top.stat().st_size == size


def test_with_b_it_goes_into_a_deeper_layer(image: Image) -> None:
    before = qemu_reads(image.top)
    assert nbdq("commit", "-b", "0.qcow2", image.top) == "Image committed.\n"
    assert qemu_reads(image.paths[0]) == qemu_reads(image.top) == before
    check(*image.paths)


def test_progress_ends_at_all_of_it_and_quiet_is_quiet(image: Image) -> None:
    out = nbdq("commit", "-p", "-d", image.top)
    assert out.startswith("    (0.00/100%)\r")
    assert out.endswith("    (100.00/100%)\nImage committed.\n")
    assert nbdq("commit", "-q", "-p", image.top) == ""


@pytest.mark.parametrize("words", [["0.qcow2"], ["-b", "nothing", "2.qcow2"]])
def test_what_cannot_be_done_is_refused_in_the_words_of_qemu(image: Image, words: list[str]) -> None:
    words = [str(image.directory / word) if word.endswith("qcow2") else word for word in words]
    theirs = execute("qemu-img", "commit", *words)
    ours = run_nbdq("commit", *words)
    assert ours.exit_code == theirs.returncode == 1
    assert ours.stderr.replace("nbdq:", "qemu-img:") == theirs.stderr


@pytest.mark.parametrize(
    "command",
    [["snapshot", "-c", "snapshot"], ["bitmap", "--add", "--enable"]],
    ids=["an internal snapshot", "a bitmap"],
)
def test_what_else_is_in_the_image_stays_there(image: Image, command: list[str]) -> None:
    words = [*command, str(image.top), *(["bitmap"] if command[0] == "bitmap" else [])]
    run("qemu-img", *words)
    before = qemu_reads(image.top)
    ours, theirs = _both(image)
    _assert_alike(ours, theirs, "1.qcow2", "2.qcow2")
    assert qemu_reads(image.top) == qemu_reads(image.paths[1]) == before
    named = [extent for extent in map_extents(image) if extent["depth"] == 0 and extent["present"]]
    assert named == []
    if command[0] == "bitmap":
        assert [bitmap["name"] for bitmap in info(image.top)["format-specific"]["data"]["bitmaps"]] == ["bitmap"]
    else:
        run("qemu-img", "convert", "-l", "snapshot", "-O", "raw", image.top, image.directory / "flat")
        assert (image.directory / "flat").read_bytes() == before


def test_a_base_with_other_overlays_is_left_alone_unless_forced(image: Image) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "1.qcow2", "-F", "qcow2", "sibling", cwd=image.directory)
    before = image.paths[1].read_bytes()
    refused = run_nbdq("commit", image.top)
    assert refused.exit_code == 1
    assert "sibling" in refused.stderr
    assert image.paths[1].read_bytes() == before
    assert nbdq("commit", "--force", "-q", image.top) == ""

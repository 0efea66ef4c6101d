"""The mark that a snapshot leaves in the image below: it refuses writers as long as the overlay stands on it."""

import os
from contextlib import closing
from pathlib import Path

import pytest

from nbdq.chain.clusters import ClusterCache
from nbdq.chain.marker import check_not_overlaid, remove_stale_marker
from nbdq.chain.open import open_disk, open_writable
from nbdq.chain.policy import Policy
from nbdq.errors import ChainError
from nbdq.qcow2.format import Header, read_header
from nbdq.qcow2.header_area import set_overlay_marker
from nbdq.storage import FileStorage
from tests.support.tools import requires, run

pytestmark = requires("qemu-img")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An image with an overlay, which it names."""
    path = tmp_path / "base.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", tmp_path / "top.qcow2")
    mark(path, tmp_path / "top.qcow2")
    return path


def mark(path: Path, overlay: Path) -> None:
    with closing(FileStorage.open(str(path), writable=True)) as storage:
        set_overlay_marker(storage, read_header(storage), str(overlay))


def header_of(path: Path) -> Header:
    with closing(FileStorage.open(str(path))) as storage:
        return read_header(storage)


def check(path: Path, policy: Policy | None = None) -> None:
    with closing(FileStorage.open(str(path))) as storage:
        check_not_overlaid(storage, read_header(storage), policy or Policy())


def test_an_image_with_an_overlay_is_not_opened_for_writing(base: Path) -> None:
    with closing(ClusterCache(budget=1 << 20)) as clusters, pytest.raises(ChainError) as caught:
        open_writable(str(base), format="qcow2", policy=Policy(), clusters=clusters)
    assert f'{base}: overlay "{base.parent}/top.qcow2"' in str(caught.value)
    assert "open the overlay instead" in caught.value.mend


def test_an_image_with_an_overlay_can_be_read_and_so_can_the_overlay_be_written(base: Path) -> None:
    with closing(ClusterCache(budget=1 << 20)) as clusters:
        open_disk(str(base), format="qcow2", policy=Policy(), clusters=clusters).close()
        open_writable(str(base.with_name("top.qcow2")), format="qcow2", policy=Policy(), clusters=clusters).close()
    assert header_of(base).overlay_marker is not None


def test_qemu_keeps_the_mark_when_it_rewrites_the_header(base: Path) -> None:
    run("qemu-img", "amend", "-f", "qcow2", "-o", "lazy_refcounts=on", base)
    run("qemu-img", "check", base)
    with pytest.raises(ChainError):
        check(base)


def test_a_mark_is_stale_once_the_overlay_is_gone(base: Path) -> None:
    base.with_name("top.qcow2").unlink()
    with closing(ClusterCache(budget=1 << 20)) as clusters:
        open_writable(str(base), format="qcow2", policy=Policy(), clusters=clusters).close()
    assert header_of(base).overlay_marker is None, "and is removed by who opens the image"


@pytest.mark.parametrize("target", ["", "other.qcow2"])
def test_a_mark_is_stale_once_the_overlay_stands_on_another_image(base: Path, target: str) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", base.with_name("other.qcow2"), "1M")
    top = base.with_name("top.qcow2")
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", target, *(["-F", "qcow2"] if target else []), top)
    check(base)


def test_a_mark_is_stale_if_there_is_no_image_any_more_where_it_leads(base: Path) -> None:
    base.with_name("top.qcow2").write_bytes(b"something else")
    check(base)


def test_the_overlay_is_found_to_stand_on_the_image_by_another_name_of_it(base: Path) -> None:
    os.link(base, base.with_name("link.qcow2"))
    top = base.with_name("top.qcow2")
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "link.qcow2", "-F", "qcow2", top)
    with pytest.raises(ChainError, match="damaged by writes"):
        check(base)


def test_an_overlay_outside_of_the_allowed_directories_counts_as_one(base: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    overlay = elsewhere / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay)
    inner = tmp_path / "inner"
    inner.mkdir()
    moved = base.rename(inner / "base.qcow2")
    mark(moved, overlay)
    with pytest.raises(ChainError, match=r"outside the allowed directories.*--allow-backing"):
        check(moved)
    overlay.unlink()
    with pytest.raises(ChainError):
        check(moved)
    check(moved, Policy(roots=(str(elsewhere),)))


def test_a_mark_that_leads_to_a_fifo_does_not_hang_and_refuses(base: Path) -> None:
    fifo = base.with_name("fifo")
    os.mkfifo(fifo)
    mark(base, fifo)
    with pytest.raises(ChainError, match="FIFO"):
        check(base)


def test_a_stale_mark_that_cannot_be_removed_safely_stays(base: Path) -> None:
    with closing(FileStorage.open(str(base), writable=True)) as storage:
        header = read_header(storage)
        area = storage.read(0, 112) + (0x12345678).to_bytes(4, "big") + (600).to_bytes(4, "big") + bytes(600)
        marker = b"/top"
        area += (0x6E626471).to_bytes(4, "big") + len(marker).to_bytes(4, "big") + marker.ljust(8, b"\0") + bytes(8)
        storage.write(0, area)
        header = read_header(storage)
        assert header.overlay_marker == "/top"
        assert remove_stale_marker(storage, header) == header == read_header(storage)


def test_an_overlay_that_was_committed_is_not_opened_for_writing_again(base: Path) -> None:
    top = base.with_name("top.qcow2")
    mark(top, base)
    with closing(ClusterCache(budget=1 << 20)) as clusters, pytest.raises(ChainError) as caught:
        open_writable(str(top), format="qcow2", policy=Policy(), clusters=clusters)
    assert f'was committed into "{base}"' in str(caught.value)
    run("qemu-img", "rebase", "-u", "-b", "", top)
    with closing(ClusterCache(budget=1 << 20)) as clusters:
        open_writable(str(top), format="qcow2", policy=Policy(), clusters=clusters).close()
    assert header_of(top).overlay_marker is None, "what it was committed into is not below it any more"

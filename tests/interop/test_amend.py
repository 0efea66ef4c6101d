"""``nbdq amend`` on the command line: what qemu-img amend does, what it says, and what it had better refused."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nbdq.locks import WRITER, lock_image
from nbdq.qcow2.format import read_header
from nbdq.qcow2.header_area import set_backing, set_overlay_marker
from nbdq.storage import FileStorage
from tests.interop.test_block_devices import loop_device
from tests.support.cli import nbdq, run_nbdq
from tests.support.tools import execute, requires, run

pytestmark = requires("qemu-img", "qemu-io")


def make(path: Path, options: str = "compat=1.1", *, base: Path | None = None, size: str = "4M") -> Path:
    backing = ["-b", base.name, "-F", "qcow2"] if base else []
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *backing, path, size)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 1M", path)
    return path


def info(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("qemu-img", "info", "--output=json", path))
    return found | found["format-specific"]["data"]


@pytest.mark.parametrize(
    ("before", "options", "field", "value"),
    [
        ("compat=0.10", "compat=1.1", "compat", "1.1"),
        ("compat=0.10", "compat=v3", "compat", "1.1"),
        ("compat=1.1", "compat=0.10", "compat", "0.10"),
        ("compat=1.1", "lazy_refcounts", "lazy-refcounts", True),
        ("lazy_refcounts=on", "nolazy_refcounts", "lazy-refcounts", False),
        ("compat=1.1", "refcount_bits=64", "refcount-bits", 64),
        ("compat=1.1", "size=5M", "virtual-size", 5 << 20),
        ("compat=0.10", "size=5M,compat=1.1,refcount_bits=0x20", "refcount-bits", 32),
    ],
)
def test_an_option_is_amended_without_a_word(
    tmp_path: Path, before: str, options: str, field: str, value: object
) -> None:
    ours, theirs = make(tmp_path / "ours.qcow2", before), make(tmp_path / "theirs.qcow2", before)
    assert nbdq("amend", "-f", "qcow2", "-o", options, ours) == ""
    if not options.startswith("no"):
        run("qemu-img", "amend", "-f", "qcow2", "-o", options, theirs)
        assert info(ours)["format-specific"] == info(theirs)["format-specific"]
    assert info(ours)[field] == value
    run("qemu-img", "check", ours)
    run("qemu-img", "compare", ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        "cluster_size=4k",
        "extended_l2=on",
        "compression_type=zstd",
        "preallocation=full",
        "nonsense=1",
        "compat=0.5",
        "refcount_bits=3",
        "refcount_bits=many",
        "data_file_raw=on",
        "backing_file=elsewhere,backing_fmt=qcow2",
        "backing_file=elsewhere",
    ],
)
def test_what_qemu_refuses_is_refused_with_its_exit_status(tmp_path: Path, options: str) -> None:
    path = make(tmp_path / "disk.qcow2", base=make(tmp_path / "base.qcow2"))
    before = path.read_bytes()
    ours = run_nbdq("amend", "-o", options, path)
    assert path.read_bytes() == before
    theirs = execute("qemu-img", "amend", "-f", "qcow2", "-o", options, path)
    assert (ours.exit_code, ours.stdout) == (theirs.returncode, theirs.stdout) == (1, "")
    assert len(ours.stderr.splitlines()) == 1
    said = theirs.stderr.splitlines()[0].removeprefix("qemu-img: ")
    if said.startswith("Invalid parameter") or "Refcount" in said:
        assert said in ours.stderr
    assert ("only supported for image creation" in ours.stderr) == (
        "only supported for image creation" in theirs.stderr
    )


def test_a_smaller_disk_has_to_be_asked_for_where_qemu_cuts_it(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2")
    refused = run_nbdq("amend", "-o", "size=1M", path)
    assert refused.exit_code == 1
    assert "Use the --shrink option to perform a shrink operation." in refused.stderr
    assert info(path)["virtual-size"] == 4 << 20
    nbdq("amend", "--shrink", "-o", "size=1M", path)
    assert info(path)["virtual-size"] == 1 << 20
    run("qemu-img", "check", path)


def test_a_larger_overlay_does_not_show_what_lies_below_the_old_end(tmp_path: Path) -> None:
    base = make(tmp_path / "base.qcow2")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 8 2M 2M", base)
    path = make(tmp_path / "disk.qcow2", base=base, size="2M")
    nbdq("amend", "-o", "size=4M", path)
    assert "Pattern verification failed" not in run("qemu-io", "-f", "qcow2", "-r", "-c", "read -P 0 2M 2M", path)


def test_the_format_of_the_backing_file_can_be_recorded(tmp_path: Path) -> None:
    make(tmp_path / "base.qcow2")
    path = make(tmp_path / "disk.qcow2")
    with closing(FileStorage.open(str(path), writable=True)) as storage:
        set_backing(storage, read_header(storage), name="base.qcow2", format=None)
    assert "backing-filename-format" not in info(path)
    nbdq("amend", "-o", "backing_fmt=qcow2", path)
    assert info(path)["backing-filename-format"] == "qcow2"
    nbdq("amend", "-o", "backing_file=base.qcow2,backing_fmt=qcow2", path)
    (tmp_path / "base.qcow2").write_bytes(b"raw" * 1000)
    assert run_nbdq("amend", "-o", "backing_fmt=raw", path).exit_code == 0
    refused = run_nbdq("amend", "-o", "backing_fmt=qcow2", path)
    assert refused.exit_code == 1
    assert "not a QCOW2 image" in refused.stderr


def test_another_backing_file_is_a_rebase_so_that_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", base=make(tmp_path / "base.qcow2"))
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 4M", tmp_path / "base.qcow2")
    run("qemu-img", "create", "-q", "-f", "raw", tmp_path / "other.raw", "4M")
    flat = tmp_path / "flat.raw"
    run("qemu-img", "convert", "-O", "raw", path, flat)
    nbdq("amend", "-o", "backing_file=other.raw,backing_fmt=raw,compat=0.10", path)
    shown = info(path)
    assert (shown["backing-filename"], shown["backing-filename-format"], shown["compat"]) == (
        "other.raw",
        "raw",
        "0.10",
    )
    run("qemu-img", "compare", path, flat)
    nbdq("amend", "-o", "backing_file=", path)
    assert "backing-filename" not in info(path)
    run("qemu-img", "compare", path, flat)
    run("qemu-img", "check", path)


def test_neither_backing_nor_data_file_has_to_be_there(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", base=make(tmp_path / "base.qcow2", "compat=0.10"))
    (tmp_path / "base.qcow2").unlink()
    nbdq("amend", "-o", "refcount_bits=8", path)
    data = make(tmp_path / "data.qcow2", f"data_file={tmp_path}/data,data_file_raw=on")
    (tmp_path / "data").rename(tmp_path / "moved")
    nbdq("amend", "-o", f"data_file={tmp_path}/moved,data_file_raw=off", data)
    shown = info(data)
    assert (shown["data-file"], shown["data-file-raw"]) == (f"{tmp_path}/moved", False)


def test_a_whole_chain_is_amended_with_a_line_for_each_layer_and_one_for_the_disk(tmp_path: Path) -> None:
    base = make(tmp_path / "base.qcow2", "compat=0.10")
    middle = make(tmp_path / "middle.qcow2", "compat=0.10", base=base)
    top = make(tmp_path / "top.qcow2", "compat=1.1", base=middle)
    assert nbdq("amend", "--chain", "-o", "compat=1.1", top).splitlines() == [
        f"{base}: amended (1 of 2)",
        f"{middle}: amended (2 of 2)",
        f"{top} has been amended successfully.",
    ]
    assert [info(path)["compat"] for path in (base, middle, top)] == ["1.1"] * 3
    assert nbdq("amend", "--chain", "-q", "-o", "compat=1.1", top) == ""
    run("qemu-img", "check", top)


def test_a_chain_with_a_template_or_a_shared_layer_is_refused_whole(tmp_path: Path) -> None:
    base = make(tmp_path / "base.qcow2", "compat=0.10")
    top = make(tmp_path / "top.qcow2", "compat=0.10", base=base)
    refused = run_nbdq("amend", "--chain", "--template", "*/base.qcow2", "-o", "compat=1.1", top)
    assert refused.exit_code == 1
    assert refused.stderr.startswith(f"nbdq: Failed to amend {top}: {base} is a template")
    make(tmp_path / "other.qcow2", base=base)
    refused = run_nbdq("amend", "--chain", "-o", "compat=1.1", top)
    assert "other.qcow2 is an overlay of it" in refused.stderr
    assert [info(path)["compat"] for path in (base, top)] == ["0.10"] * 2
    assert run_nbdq("amend", "--chain", "-o", "size=8M", top).exit_code == 1


def test_an_image_in_use_is_not_amended(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", "compat=0.10")
    storage = FileStorage.open(str(path), writable=True)
    lock_image(storage.descriptor, str(path), WRITER)
    refused = run_nbdq("amend", "-o", "compat=1.1", path)
    storage.close()
    assert refused.exit_code == 1
    assert "lock" in refused.stderr.lower()


def test_the_mark_of_an_overlay_can_be_forgotten(tmp_path: Path) -> None:
    path = make(tmp_path / "base.qcow2")
    make(tmp_path / "top.qcow2", base=path)
    with closing(FileStorage.open(str(path), writable=True)) as storage:
        set_overlay_marker(storage, read_header(storage), str(tmp_path / "top.qcow2"))
    refused = run_nbdq("amend", "-o", "size=8M", path)
    assert "top.qcow2" in refused.stderr
    assert "--forget-overlay" in refused.stderr
    nbdq("amend", "--forget-overlay", path)
    nbdq("amend", "-o", "size=8M", path)


@requires("losetup")
def test_an_image_on_a_device_is_amended_within_it_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"\xee" * (4 << 20))
    with loop_device(file) as device:
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", device, "4M")
        run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", device)
        for options in ("refcount_bits=64", "refcount_bits=1", "compat=0.10,refcount_bits=16", "compat=1.1"):
            nbdq("amend", "-o", options, device)
            run("qemu-img", "check", "-f", "qcow2", device)
            run("qemu-io", "-f", "qcow2", "-c", "read -P 7 0 1M", device)
        execute("qemu-io", "-f", "qcow2", "-c", "write 0 4M", device)  # until no cluster is left
        before = file.read_bytes()
        refused = run_nbdq("amend", "-o", "refcount_bits=64", device)
        assert refused.exit_code == 1
        assert "no room" in refused.stderr
        assert file.read_bytes() == before


def test_help_lists_what_qemu_lists(tmp_path: Path) -> None:
    def names(text: str) -> set[str]:
        return {line.split("=")[0].strip() for line in text.splitlines()[1:] if "=<" in line}

    theirs = names(run("qemu-img", "amend", "-f", "qcow2", "-o", "help"))
    ours = names(nbdq("amend", "-o", "help"))
    assert ours == {name for name in theirs if not name.startswith("encrypt.")}


def test_progress_ends_at_one_hundred(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2")
    assert nbdq("amend", "-p", "-o", "refcount_bits=8", path).endswith("(100.00/100%)\n")

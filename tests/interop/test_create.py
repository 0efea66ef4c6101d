"""``nbdq create`` against ``qemu-img create``: the same disks, the same words, the same refusals.

Each case makes the image once with each tool. What may differ is where preallocated clusters lie: QEMU scatters its
tables among them.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.interop.test_block_devices import loop_device
from tests.support.cli import nbdq, run_nbdq
from tests.support.tools import execute, requires, run

pytestmark = requires("qemu-img", "qemu-io")

#: Options and sizes, as for both tools.
MATRIX = [
    ("", "0"),
    ("", "3000000"),
    ("", "1.5G"),
    ("", "2P"),
    ("", "16T"),
    ("compat=0.10", "64M"),
    ("compat=v2,cluster_size=512", "10M"),
    ("compat=v3,lazy_refcounts=on", "64M"),
    ("compression_type=zstd", "64M"),
    ("extended_l2=on", "64M"),
    ("extended_l2,cluster_size=16k", "64M"),
    ("nolazy_refcounts,nocow=on,encryption=off", "64M"),
    ("cluster_size=512", "1M"),
    ("cluster_size=4k", "100G"),
    ("cluster_size=2M", "1E"),
    ("refcount_bits=1", "64M"),
    ("refcount_bits=0x40", "64M"),
    ("cluster_size=512,refcount_bits=64", "2G"),
    ("preallocation=metadata", "3000000"),
    ("preallocation=metadata", "20G"),
    ("preallocation=falloc", "3000000"),
    ("preallocation=full", "3000000"),
    ("preallocation=metadata", "0"),
    ("preallocation=full,cluster_size=512,refcount_bits=1", "4M"),
    ("preallocation=metadata,cluster_size=512,refcount_bits=64", "4M"),
    ("preallocation=falloc,cluster_size=1k,refcount_bits=2", "4M"),
    ("preallocation=metadata,cluster_size=4k,refcount_bits=4", "70M"),
    ("preallocation=metadata,cluster_size=4k,refcount_bits=8", "70M"),
    ("preallocation=metadata,cluster_size=4k,refcount_bits=32", "70M"),
    ("preallocation=metadata,cluster_size=2M", "1T"),
    ("preallocation=metadata,extended_l2=on", "70M"),
    ("preallocation=falloc,extended_l2=on,cluster_size=16k", "7M"),
    ("preallocation=full,extended_l2=on", "3000000"),
    ("preallocation=metadata,compat=0.10", "70M"),
    ("data_file=data", "3000000"),
    ("data_file=data,preallocation=metadata", "3000000"),
    ("data_file=data,preallocation=falloc", "3000000"),
    ("data_file=data,preallocation=full", "3000000"),
    ("data_file=data,data_file_raw=on", "3000000"),
    ("data_file=data,data_file_raw=on,preallocation=falloc,cluster_size=512", "300000"),
    ("data_file=data,extended_l2=on,preallocation=metadata", "3000000"),
    ("data_file=da,,ta", "3000000"),
]

matrix = pytest.mark.parametrize(("options", "size"), MATRIX)

#: Words of the command line that both tools must refuse, in a directory with ``base.raw`` and ``base.qcow2``.
REFUSED = [
    "image",
    "image 1x",
    "image 9E",
    "image 1M 2M",
    "-o size=3M image 4M",
    "image 3P",
    "-o cluster_size=512 image 129G",
    "-o cluster_size=2M,extended_l2=on image 1.5E",
    "-o cluster_size=2M,preallocation=metadata image 1E",
    "-b missing image",
    "-b base.raw image",
    "-b base.raw image 1M",
    "-b base.raw -F qcow2 image",
    "-b base.raw -F nonsense image",
    "-u -b base.raw -F raw image",
    "-u -b base.raw image 1M",
    "-u -b base.raw -F nonsense image 1M",
    "-b image -F qcow2 image 1M",
    "-F raw image 1M",
    "-o backing_file=,backing_fmt=raw image 1M",
    "-o backing_file=base.raw image 1M",
    "-o preallocation=metadata -b base.raw -F raw image",
    "-o data_file=data,data_file_raw=on -b base.raw -F raw image",
    "-o data_file_raw=on image 1M",
    "-o unknown=3 image 1M",
    "-o lazy_refcounts=maybe image 1M",
    "-o preallocation=some image 1M",
    "-o compat=0.9 image 1M",
    "-o compression_type=lz4 image 1M",
    "-o refcount_bits=3 image 1M",
    "-o refcount_bits=0 image 1M",
    "-o refcount_bits=128 image 1M",
    "-o refcount_bits=many image 1M",
    "-o cluster_size=100 image 1M",
    "-o cluster_size=256 image 1M",
    "-o cluster_size=4M image 1M",
    "-o cluster_size=0 image 1M",
    "-o cluster_size image 1M",
    "-o ,cluster_size=4k image 1M",
    "-o cluster_size=4k, image 1M",
    "-o extended_l2=on,cluster_size=8k image 1M",
    "-o compat=0.10,compression_type=zstd image 1M",
    "-o compat=0.10,extended_l2=on image 1M",
    "-o compat=0.10,data_file=data image 1M",
    "-o compat=0.10,refcount_bits=1 image 1M",
    "-o compat=0.10,lazy_refcounts=on image 1M",
    "-o encryption=on image 1M",
    "-o encrypt.format=luks image 1M",
    f"-u -F raw -b {'x' * 1024} image 1M",
    f"-u -F raw -o cluster_size=512 -b {'x' * 400} image 1M",
    "missing/image 1M",
    "image/ 1M",
    ". 1M",
    "-f raw -b base.raw -F raw image 1M",
    "-f raw -o cluster_size=64k image 1M",
    "-f raw -o preallocation=metadata image 1M",
    "-f raw image",
    "-f raw -o size=-1 image",
    "-f raw image 7E",
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a subdirectory for each tool, so that both see the same relative names."""
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "ours")
    return tmp_path


def info(path: Path, format: str = "qcow2") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        run("qemu-img", "info", "-f", format, "--output=json", path.name, cwd=path.parent)
    )
    del found["actual-size"]
    return found


def mapping(path: Path, *, format: str = "qcow2", merged: tuple[str, ...]) -> list[dict[str, Any]]:
    """Extents with the keys of ``merged`` only, where neighbours that agree in them are one."""
    extents: list[dict[str, Any]] = []
    # A huge disk is empty, and QEMU looks at each of its clusters.
    part = ["-l", "16M"] if info(path, format)["virtual-size"] > 1 << 35 else []
    for extent in json.loads(run("qemu-img", "map", "-f", format, "--output=json", *part, path.name, cwd=path.parent)):
        kept = {key: extent.get(key) for key in merged}
        if extents and {key: extents[-1][key] for key in merged} == kept:
            extents[-1]["length"] += extent["length"]
        else:
            extents.append({"start": extent["start"], "length": extent["length"], **kept})
    return extents


def assert_sound(path: Path, *options: str) -> None:
    report = json.loads(run("qemu-img", "check", "--output=json", *options, path.name, cwd=path.parent))
    assert not {"corruptions", "leaks"} & report.keys(), report
    assert report["check-errors"] == 0


@matrix
def test_a_new_image_is_that_of_qemu_img(here: Path, options: str, size: str) -> None:
    words = [*(["-o", options] if options else []), "image", size]
    ours, theirs = here / "ours" / "image", here / "theirs" / "image"
    announced = nbdq("create", *words)
    assert announced == run("qemu-img", "create", "-f", "qcow2", *words, cwd=theirs.parent)
    assert_sound(ours)
    assert info(ours) == info(theirs)
    if "preallocation" not in options:
        assert mapping(ours, merged=("depth", "present", "zero", "data")) == mapping(
            theirs, merged=("depth", "present", "zero", "data")
        )
    # Whether preallocated space counts as zeros depends on how the file system rounds it.
    assert mapping(ours, merged=("depth", "present", "data")) == mapping(theirs, merged=("depth", "present", "data"))
    assert sorted(os.listdir(ours.parent)) == sorted(os.listdir(theirs.parent))


@matrix
def test_qemu_writes_into_a_new_image_and_finds_it_sound(here: Path, options: str, size: str) -> None:
    nbdq("create", "-q", *(["-o", options] if options else []), "image", size)
    path = here / "ours" / "image"
    end = info(path)["virtual-size"]
    if end == 0:
        return
    writes = [f"write -P 7 {offset} {min(1 << 16, end - offset)}" for offset in (0, end // 2 // 512 * 512, end - 512)]
    run("qemu-io", "-f", "qcow2", *(word for write in writes for word in ("-c", write)), path.name, cwd=path.parent)
    assert_sound(path)
    seen = run("qemu-io", "-f", "qcow2", "-c", f"read -P 7 {end - 512} 512", path.name, cwd=path.parent)
    assert "verification failed" not in seen


@pytest.mark.parametrize(
    ("options", "size"),
    [case for case in MATRIX if case[0].startswith(("compat", "compression", "extended", "refcount"))],
)
def test_a_small_image_without_preallocation_is_that_of_qemu_img_byte_for_byte(
    here: Path, options: str, size: str
) -> None:
    nbdq("create", "-q", "-o", options, "image", size)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "image", size, cwd=here / "theirs")
    ours, theirs = ((here / name / "image").read_bytes() for name in ("ours", "theirs"))
    assert ours == theirs


@pytest.mark.parametrize("backing_format", ["raw", "qcow2"])
@pytest.mark.parametrize("options", ["", "extended_l2=on,preallocation=metadata", "compat=0.10,cluster_size=512"])
def test_an_overlay_takes_its_size_and_shows_the_image_below(here: Path, options: str, backing_format: str) -> None:
    found = []
    for directory in (here / "ours", here / "theirs"):
        run("qemu-img", "create", "-q", "-f", backing_format, "base", "5000192", cwd=directory)
        run("qemu-io", "-f", backing_format, "-c", "write -P 5 1M 64k", "base", cwd=directory)
        words = ["-b", "base", "-F", backing_format, *(["-o", options] if options else []), "image"]
        if directory.name == "ours":
            announced = nbdq("create", *words)
        else:
            assert announced == run("qemu-img", "create", "-f", "qcow2", *words, cwd=directory)
        assert_sound(directory / "image")
        run("qemu-img", "compare", "-f", "qcow2", "-F", backing_format, "image", "base", cwd=directory)
        found.append((info(directory / "image"), mapping(directory / "image", merged=("depth", "zero", "data"))))
    assert found[0] == found[1]
    assert found[0][0]["virtual-size"] == 5000192


@pytest.mark.parametrize("options", ["", "preallocation=falloc", "preallocation=full,nocow=on"])
@pytest.mark.parametrize("size", ["0", "1000", "3000000"])
def test_a_raw_disk_is_that_of_qemu_img(here: Path, options: str, size: str) -> None:
    words = ["-f", "raw", *(["-o", options] if options else []), "image", size]
    assert nbdq("create", *words) == run("qemu-img", "create", *words, cwd=here / "theirs")
    ours, theirs = here / "ours" / "image", here / "theirs" / "image"
    assert ours.read_bytes() == theirs.read_bytes()
    assert info(ours, "raw") == info(theirs, "raw")
    assert ours.stat().st_blocks == theirs.stat().st_blocks


@pytest.mark.parametrize("words", REFUSED)
def test_what_qemu_img_refuses_is_refused_and_leaves_nothing(here: Path, words: str) -> None:
    ours, theirs = here / "ours", here / "theirs"
    for directory in (ours, theirs):
        run("qemu-img", "create", "-q", "-f", "raw", "base.raw", "1M", cwd=directory)
    listed = sorted(os.listdir(ours))
    arguments = [word for word in words.split(" ") if word]
    qemu = arguments if arguments[:2] == ["-f", "raw"] else ["-f", "qcow2", *arguments]
    assert execute("qemu-img", "create", *qemu, cwd=theirs).returncode == 1
    done = run_nbdq("create", *arguments)
    assert done.exit_code == (2 if words in USAGE else 1), done.output
    if words not in USAGE:
        assert done.stderr.startswith("nbdq: ")
        assert done.stderr.count("\n") == 1
    assert sorted(os.listdir(ours)) == listed


#: Mistakes in the words themselves, for which all commands of nbdq have status 2.
USAGE = {"image 1M 2M"}


def test_the_help_of_options_lists_those_of_qemu_img_but_encryption() -> None:
    for format in ("qcow2", "raw"):
        theirs = run("qemu-img", "create", "-f", format, "-o", "help", "image").splitlines()
        ours = nbdq("create", "-f", format, "-o", "help", "image").splitlines()
        names = [line.partition(">")[0] for line in theirs if not line.strip().startswith("encrypt.")]
        assert [line.partition(">")[0] for line in ours] == names


@pytest.mark.parametrize("role", ["image", "data"])
def test_a_file_in_use_by_qemu_is_not_replaced(here: Path, role: str) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", role, "1M", cwd=here / "ours")
    before = (here / "ours" / role).read_bytes()
    listed = os.listdir(here / "ours")
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", role], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=here / "ours"
    ) as user:
        assert user.stdin
        assert user.stdout
        assert user.stdout.read(8) == b"qemu-io>"  # it has opened the image
        done = run_nbdq("create", "-q", "-o", "data_file=data", "image", "2M")
        user.stdin.close()
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert 'failed to get "write" lock' in done.stderr
    assert (here / "ours" / role).read_bytes() == before
    assert os.listdir(here / "ours") == listed


def test_the_image_below_may_be_in_use_by_a_guest(here: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "base", "1M", cwd=here / "ours")
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", "base"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=here / "ours"
    ) as user:
        assert user.stdin
        assert user.stdout
        assert user.stdout.read(8) == b"qemu-io>"
        nbdq("create", "-q", "-b", "base", "-F", "qcow2", "image")
        user.stdin.close()
    assert info(here / "ours" / "image")["virtual-size"] == 1 << 20


def test_a_sparse_image_of_16_tib_with_all_its_tables_is_sound(here: Path) -> None:
    nbdq("create", "-q", "-o", "preallocation=metadata,cluster_size=2M", "image", "15T")
    path = here / "ours" / "image"
    if path.stat().st_size < 15 << 40:
        pytest.skip("the file system has no files so large")
    assert_sound(path)


@pytest.mark.parametrize("options", ["", "preallocation=metadata", "preallocation=full,extended_l2=on"])
def test_an_image_on_a_device_shows_nothing_of_what_was_there(here: Path, options: str) -> None:
    medium = here / "medium"
    medium.write_bytes(os.urandom(1 << 20) * 8)
    with loop_device(medium) as device:
        run("qemu-img", "create", "-q", "-f", "qcow2", device, "1M")
        nbdq("create", "-q", *(["-o", options] if options else []), device, "4M")
        run("qemu-img", "check", "-f", "qcow2", device)
        seen = run("qemu-io", "-f", "qcow2", "-c", "read -P 0 0 4M", "-c", "write -P 3 1M 64k", device)
        assert "verification failed" not in seen
        run("qemu-img", "check", "-f", "qcow2", device)


def test_a_device_that_is_too_small_is_left_as_it_was(here: Path) -> None:
    medium = here / "medium"
    medium.write_bytes(os.urandom(1 << 20))
    with loop_device(medium) as device:
        before = device.read_bytes()
        done = run_nbdq("create", "-q", "-o", "preallocation=metadata", device, "1M")
        assert done.exit_code == 1
        assert "needed" in done.stderr
        assert device.read_bytes() == before


@pytest.mark.parametrize("size", ["8M", "200G"])
def test_a_full_file_system_is_left_with_what_it_had(here: Path, size: str) -> None:
    small = here / "small"
    small.mkdir()
    if execute("mount", "-t", "tmpfs", "-o", "size=1M", "none", small).returncode:
        pytest.skip("no right to mount a file system")
    try:
        (small / "image").write_bytes(b"old")
        for name in ("image", "new"):
            done = run_nbdq("create", "-q", "-o", "preallocation=full,data_file=data", small / name, size)
            assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
            assert "No space left on device" in done.stderr
        assert os.listdir(small) == ["image"]
        assert (small / "image").read_bytes() == b"old"
    finally:
        run("umount", small)


def test_a_data_file_lies_beside_its_image_and_the_operator_hears_where_qemu_looks(here: Path) -> None:
    (here / "ours" / "deep").mkdir()
    done = run_nbdq("create", "-q", "-o", "data_file=data,data_file_raw=on", "deep/image", "1M")
    assert done.exit_code == 0
    assert "deep/data" in done.stderr
    assert sorted(os.listdir(here / "ours" / "deep")) == ["data", "image"]
    assert '"data": true' in nbdq("map", "--output=json", "--allow-data-file", "deep/image")
    assert run_nbdq("create", "-q", "-o", "data_file=data", "image", "1M").stderr == ""


def test_all_layers_of_the_new_chain_must_be_there_and_allowed(here: Path) -> None:
    base, middle = here / "theirs" / "base", here / "ours" / "middle"
    nbdq("create", "-q", base, "2M")
    nbdq("create", "-q", "-b", base, "-F", "qcow2", middle)
    refused = run_nbdq("create", "-q", "-b", "middle", "-F", "qcow2", "top")
    assert refused.exit_code == 1
    assert "--allow-backing" in refused.stderr
    nbdq("create", "-q", "--allow-backing", base.parent, "-b", "middle", "-F", "qcow2", "top")
    assert info(here / "ours" / "top")["virtual-size"] == 2 << 20
    before = base.read_bytes()
    refused = run_nbdq("create", "-q", "--allow-backing", base.parent, "-b", "middle", "-F", "qcow2", "../theirs/base")
    assert refused.exit_code == 1
    assert base.read_bytes() == before

"""Amending against qemu-img amend: the same image, the same refusals, and more care where QEMU loses something."""

import json
import random
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nbdq.errors import CorruptImage, OperationError
from nbdq.qcow2.features import Autoclear, Compatible
from nbdq.qcow2.format import read_header
from nbdq.storage import FileStorage
from tests.crash.operations import crash_states
from tests.qcow2.amending.images import amend, busy_image, check, contents, info, io, make
from tests.support.tools import execute, requires, run

pytestmark = requires("qemu-img", "qemu-io")

V2, V3 = "compat=0.10", "compat=1.1"


def twins(path: Path, options: str, **arguments: Any) -> tuple[Path, Path]:
    """Two equal images."""
    ours = busy_image(path, options, **arguments)
    theirs = path.with_name(f"theirs-{path.name}")
    theirs.write_bytes(ours.read_bytes())
    return ours, theirs


def qemu(path: Path, options: str) -> str:
    return execute("qemu-img", "amend", "-t", "unsafe", "-f", "qcow2", "-o", options, path).stderr


# --- upgrade ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_an_upgraded_image_is_the_one_that_qemu_makes(tmp_path: Path, cluster_size: int) -> None:
    ours, theirs = twins(tmp_path / "disk.qcow2", f"{V2},cluster_size={cluster_size}", seed=11)
    amend(ours, version=3)
    assert not qemu(theirs, V3)
    assert info(ours) == info(theirs)
    assert contents(ours) == contents(theirs)
    check(ours)


def test_an_upgrade_touches_nothing_but_the_header(tmp_path: Path) -> None:
    path = busy_image(tmp_path / "disk.qcow2", V2, seed=12)
    before = path.read_bytes()
    amend(path, version=3)
    assert path.read_bytes()[512:] == before[512:]


def test_an_upgrade_keeps_backing_file_and_mark(tmp_path: Path) -> None:
    base = make(tmp_path / "base.qcow2", V2)
    path = busy_image(tmp_path / "disk.qcow2", V2, seed=13, base=base)
    before = contents(path)
    header = amend(path, version=3)
    assert (header.backing_name, header.backing_format, header.header_length) == ("base.qcow2", "qcow2", 112)
    assert contents(path) == before


def test_an_upgrade_gives_old_snapshots_the_size_that_they_had(tmp_path: Path) -> None:
    path = busy_image(tmp_path / "disk.qcow2", V2, seed=14)
    run("qemu-img", "snapshot", "-c", "one", path)
    io(path, "write -P 9 0 2M")
    _strip_extra_data(path)
    one = contents(path, "-l", "one")
    amend(path, version=3)
    check(path)
    assert contents(path, "-l", "one") == one
    with closing(FileStorage.open(str(path))) as storage:
        header = read_header(storage)
        entry = storage.read(header.snapshots_offset, 64)
    assert int.from_bytes(entry[36:40], "big") >= 16
    assert int.from_bytes(entry[48:56], "big") == 4 << 20
    run("qemu-img", "snapshot", "-a", "one", path)
    assert contents(path) == one


def _strip_extra_data(path: Path) -> None:
    """As a program made the snapshot that knew no version 3."""
    with path.open("r+b") as file:
        file.seek(64)
        offset = int.from_bytes(file.read(8), "big")
        file.seek(offset)
        entry = file.read(40 + 24 + 64)
        extra = int.from_bytes(entry[36:40], "big")
        file.seek(offset)
        file.write((entry[:36] + bytes(4) + entry[40 + extra :]).ljust(128, b"\0"))


@pytest.mark.parametrize("snapshots", [False, True])
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_a_power_cut_during_an_upgrade_leaves_version_2_or_3(
    tmp_path: Path, snapshots: bool, cluster_size: int
) -> None:
    path = busy_image(tmp_path / "disk.qcow2", f"{V2},cluster_size={cluster_size}", seed=15)
    if snapshots:
        run("qemu-img", "snapshot", "-c", "one", path)
        _strip_extra_data(path)
    _look_at_states(tmp_path, path, {"version": 3}, {"0.10", "1.1"}, leaks=snapshots)


# --- downgrade -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_a_downgraded_image_reads_as_before_and_as_qemus(tmp_path: Path, backed: bool, cluster_size: int) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    base = busy_image(tmp_path / "base.qcow2", V3, seed=seed + 1) if backed else None
    ours, theirs = twins(tmp_path / "disk.qcow2", f"{V3},cluster_size={cluster_size}", seed=seed, base=base)
    before = contents(ours)
    amend(ours, version=2)
    assert not qemu(theirs, V2)
    assert info(ours)["compat"] == "0.10"
    check(ours)
    assert contents(ours) == contents(theirs) == before


def test_zeros_over_a_backing_file_cost_no_space(tmp_path: Path) -> None:
    base = make(tmp_path / "base.qcow2", V3)
    io(base, "write -P 1 0 4M")
    path = make(tmp_path / "disk.qcow2", V3, base=base)
    io(path, "write -z 0 4M")
    amend(path, version=2)
    assert contents(path) == bytes(4 << 20)
    assert path.stat().st_blocks * 512 < 1 << 20


def test_snapshots_survive_a_downgrade_with_their_zeros_and_their_data(tmp_path: Path) -> None:
    """A zero cluster may still name a cluster in which a snapshot has data; QEMU would write zeros to it."""
    base = make(tmp_path / "base.qcow2", V3)
    io(base, "write -P 1 0 4M")
    path = make(tmp_path / "disk.qcow2", f"{V3},cluster_size=4k", base=base)
    io(path, "write -P 2 0 1M", "write -z 1M 64k")
    run("qemu-img", "snapshot", "-c", "data", path)
    io(path, "write -z 0 512k", "write -z -u 512k 64k")
    run("qemu-img", "snapshot", "-c", "zeros", path)
    io(path, "write -P 3 0 64k")
    states = [contents(path, "-l", "data"), contents(path, "-l", "zeros"), contents(path)]
    amend(path, version=2)
    check(path)
    assert [contents(path, "-l", "data"), contents(path, "-l", "zeros"), contents(path)] == states
    io(path, "write -P 4 0 2M")
    check(path)
    assert contents(path, "-l", "data") == states[0]


def test_compressed_clusters_stay_and_those_of_zstd_refuse_version_2(tmp_path: Path) -> None:
    source = busy_image(tmp_path / "source.qcow2", V3, seed=16)
    for kind in ("zlib", "zstd"):
        path = tmp_path / f"{kind}.qcow2"
        run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", f"compression_type={kind}", source, path)
        if kind == "zlib":
            amend(path, version=2)
            assert contents(path) == contents(source)
        else:
            with pytest.raises(OperationError, match="zstd compression type and existing compressed clusters"):
                amend(path, version=2)
        check(path)
    empty = make(tmp_path / "empty.qcow2", f"{V3},compression_type=zstd")
    amend(empty, version=2)
    assert info(empty)["compat"] == "0.10"


@pytest.mark.parametrize("host", [0x10000, 0x30000, 0x40000, 0x50200, 0x500000])
def test_a_zero_cluster_on_metadata_or_nowhere_is_not_written_to(tmp_path: Path, host: int) -> None:
    path = make(tmp_path / "disk.qcow2", V3)
    io(path, "write -P 1 0 64k")
    with path.open("r+b") as file:
        file.seek(0x40000)  # the L2 table
        file.write((host | 1 << 63 | 1).to_bytes(8, "big"))
    before = path.read_bytes()
    with pytest.raises(CorruptImage, match="nbdq check"):
        amend(path, version=2)
    assert path.read_bytes() == before


@pytest.mark.parametrize("backed", [False, True])
def test_a_power_cut_during_a_downgrade_loses_nothing(tmp_path: Path, backed: bool) -> None:
    base = make(tmp_path / "base.qcow2", V3) if backed else None
    if base:
        io(base, "write -P 1 0 4M")
    path = busy_image(tmp_path / "disk.qcow2", f"{V3},cluster_size=4k", seed=17, base=base)
    _look_at_states(tmp_path, path, {"version": 2}, {"0.10", "1.1"}, leaks=True)


def test_dirty_bitmaps_refuse_a_downgrade_where_qemu_loses_them(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", V3)
    run("qemu-img", "bitmap", "--add", "-f", "qcow2", path, "b0")
    before = path.read_bytes()
    with pytest.raises(OperationError, match="remove 'b0' first"):
        amend(path, version=2)
    assert path.read_bytes() == before


def test_a_snapshot_of_another_size_refuses_a_downgrade(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", V3)
    run("qemu-img", "snapshot", "-c", "small", path)
    run("qemu-img", "resize", "-q", "-f", "qcow2", path, "8M")
    theirs = qemu(path, V2)
    with pytest.raises(OperationError, match="Internal snapshots prevent downgrade of image") as caught:
        amend(path, version=2)
    assert "'small'" in str(caught.value)
    assert "Internal snapshots prevent downgrade of image" in theirs


# --- the rest --------------------------------------------------------------------------------------------------------


def test_lazy_refcounts_come_and_go(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", V3)
    assert Compatible.LAZY_REFCOUNTS in amend(path, lazy_refcounts=True).compatible
    assert info(path)["lazy-refcounts"] is True
    amend(path, lazy_refcounts=False)
    assert info(path)["lazy-refcounts"] is False


def test_turning_lazy_refcounts_off_makes_the_image_clean(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", f"{V3},lazy_refcounts=on")
    execute("qemu-io", "-f", "qcow2", "-c", "write -P 5 0 128k", "-c", "abort", path)
    with closing(FileStorage.open(str(path))) as storage:
        assert read_header(storage).is_dirty
    amend(path, lazy_refcounts=False)
    check(path)
    assert contents(path)[: 128 << 10] == b"\5" * (128 << 10)


def test_a_raw_data_file_becomes_an_ordinary_one_and_gets_another_name(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", f"{V3},data_file={tmp_path}/disk.data,data_file_raw=on")
    header = amend(path, data_file_raw=False)
    assert header.autoclear == Autoclear.NONE
    (tmp_path / "disk.data").rename(tmp_path / "other.data")
    amend(path, data_file_name=f"{tmp_path}/other.data")
    assert info(path)["data-file"] == f"{tmp_path}/other.data"
    check(path)


def test_several_things_are_amended_at_once_in_the_order_of_qemu(tmp_path: Path) -> None:
    ours, theirs = twins(tmp_path / "disk.qcow2", V2, seed=18)
    amend(ours, version=3, refcount_bits=8, lazy_refcounts=True)
    assert not qemu(theirs, f"{V3},refcount_bits=8,lazy_refcounts=on")
    assert info(ours) == info(theirs)
    amend(ours, version=2, refcount_bits=16, lazy_refcounts=False)
    assert not qemu(theirs, f"{V2},refcount_bits=16,lazy_refcounts=off")
    assert info(ours) == info(theirs)
    check(ours)
    assert contents(ours) == contents(theirs)


@pytest.mark.parametrize(
    ("image", "arguments", "options"),
    [
        (V2, {"refcount_bits": 8}, "refcount_bits=8"),
        (V2, {"lazy_refcounts": True}, "lazy_refcounts=on"),
        (f"{V3},refcount_bits=8", {"version": 2}, V2),
        (V3, {"refcount_bits": 7}, "refcount_bits=7"),
        (V3, {"data_file_name": "x"}, "data_file=x"),
        (V3, {"data_file_raw": True}, "data_file_raw=on"),
        (f"{V3},extended_l2=on", {"version": 2}, V2),
        (f"{V3},data_file=DATA", {"version": 2}, V2),
    ],
)
def test_what_qemu_refuses_is_refused_in_its_words_before_anything_changes(
    tmp_path: Path, image: str, arguments: dict[str, Any], options: str
) -> None:
    path = make(tmp_path / "disk.qcow2", image.replace("DATA", f"{tmp_path}/data"))
    before = path.read_bytes()
    with pytest.raises(OperationError) as caught:
        amend(path, **arguments)
    assert path.read_bytes() == before
    assert str(caught.value).removeprefix(f"{path}: ") in qemu(path, options).replace("\n", " ")


def _look_at_states(
    tmp_path: Path, path: Path, options: dict[str, Any], versions: set[str], *, leaks: bool = False
) -> None:
    """After a power cut anywhere the image is consistent, of one of ``versions``, and reads as before."""
    before = contents(path)
    states = [content for (content,) in crash_states([path], lambda: amend(path, **options), seed=1, per_cut=6)]
    crashed = tmp_path / "crashed.qcow2"
    found = set()
    for number in sorted({0, len(states) - 1, *random.Random(1).sample(range(len(states)), min(25, len(states)))}):
        crashed.write_bytes(states[number])
        verdict = execute("qemu-img", "check", "--output=json", "-f", "qcow2", crashed)
        assert verdict.returncode in ((0, 3) if leaks else (0,)), verdict
        assert not json.loads(verdict.stdout).get("corruptions")
        found.add(info(crashed)["compat"])
        assert contents(crashed) == before
    assert found == versions

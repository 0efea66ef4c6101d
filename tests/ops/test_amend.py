"""Amending a disk that is being served: the guest notices nothing, and whoever else owns a layer is not surprised."""

import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from nbdq.errors import ImageLocked, NbdqError, OperationError
from nbdq.ops.amend import Amend, ChainRules
from nbdq.ops.control import Cancelled, Control
from nbdq.qcow2.amending.options import AmendOptions
from nbdq.storage import FileStorage
from tests.ops.harness import Served, check, guests, info, qemu_reads
from tests.support.operations import Operation as Request
from tests.support.operations import Verb
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io")

SIZE = 4 << 20
V2 = "compat=0.10"


def chain(directory: Path, *options: str, raw: bool = False) -> list[Path]:
    """A chain with some data in each layer; base first. ``options`` are those of each qcow2 layer."""
    paths: list[Path] = []
    if raw:
        paths.append(directory / "base.raw")
        paths[0].write_bytes(random.Random(1).randbytes(SIZE))
    for number, text in enumerate(options):
        path = directory / f"layer{number}.qcow2"
        below = ["-b", paths[-1].name, "-F", paths[-1].suffix[1:]] if paths else []
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", text, *below, path, str(SIZE))
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {number + 1} {number}M 512k", path)
        paths.append(path)
    return paths


def teller(lines: list[str]) -> Callable[[str, int, int], None]:
    return lambda path, done, total: lines.append(f"{path}: amended ({done} of {total})")


def upgrade(disk: Served, *, rules: ChainRules | None = None, told: list[str] | None = None, **more: Any) -> Amend:
    lines = [] if told is None else told
    return Amend(
        disk.chain,
        AmendOptions(version=3),
        name="disk",
        whole_chain=rules,
        on_layer=teller(lines),
        audit=lambda level, text: lines.append(text),
        **more,
    )


def compat(path: Path) -> str:
    return str(info(path)["format-specific"]["data"]["compat"])


def test_the_top_is_upgraded_while_the_guest_writes_and_nothing_is_lost(tmp_path: Path) -> None:
    path = chain(tmp_path, V2, V2)[-1]
    lock_step = random.Random(2)
    expected = bytearray(SIZE)
    with Served(path) as disk:
        expected[:] = disk.read()

        def write() -> None:
            request = Request(Verb.WRITE, lock_step.randrange(SIZE - 4096) & ~511, 4096, lock_step.randrange(1, 255))
            disk.perform(request)
            expected[request.offset : request.offset + request.length] = request.payload()

        with guests(disk, write):
            for options in (AmendOptions(version=3), AmendOptions(refcount_bits=64), AmendOptions(refcount_bits=16)):
                disk.carry_out(Amend(disk.chain, options, name="disk"))
            disk.carry_out(Amend(disk.chain, AmendOptions(version=2), name="disk"))
            disk.carry_out(upgrade(disk))
        assert disk.read() == expected
    assert compat(path) == "1.1"
    check(path)
    assert qemu_reads(path) == expected


def test_an_upgraded_top_has_zero_clusters_from_then_on(tmp_path: Path) -> None:
    path = chain(tmp_path, V2, V2)[-1]
    with Served(path) as disk:
        disk.carry_out(upgrade(disk))
        disk.perform(Request(Verb.ZERO, 0, 1 << 20))
        assert disk.read(0, 1 << 20) == bytes(1 << 20)
    assert path.stat().st_blocks * 512 < 1 << 20
    check(path)


def test_a_whole_chain_is_upgraded_base_first_and_raw_layers_are_passed_over(tmp_path: Path) -> None:
    paths = chain(tmp_path, V2, V2, "compat=1.1", V2, raw=True)
    told: list[str] = []
    with Served(paths[-1]) as disk:
        before = disk.read()
        disk.carry_out(upgrade(disk, rules=ChainRules(), told=told))
        assert disk.read() == before
        assert [layer.header.version for layer in disk.chain.layers if layer.header] == [3, 3, 3, 3]
    assert [compat(path) for path in paths[1:]] == ["1.1"] * 4
    assert told == [
        f"{paths[1]}: amended (1 of 3)",
        f"{paths[2]}: amended (2 of 3)",
        f"{paths[4]}: amended (3 of 3)",
        "disk has been amended successfully.",
    ]
    check(*paths[1:])
    assert qemu_reads(paths[-1]) == before


def test_the_chain_below_is_upgraded_although_the_top_is_new_already(tmp_path: Path) -> None:
    paths = chain(tmp_path, V2, "compat=1.1")
    with Served(paths[-1]) as disk:
        disk.carry_out(upgrade(disk, rules=ChainRules()))
    assert [compat(path) for path in paths] == ["1.1", "1.1"]


def test_a_template_and_a_shared_layer_are_refused_before_anything_changes(tmp_path: Path) -> None:
    paths = chain(tmp_path, V2, V2)
    with Served(paths[-1]) as disk:
        with pytest.raises(OperationError, match=r"layer0\.qcow2 is a template"):
            upgrade(disk, rules=ChainRules(is_template=lambda path: path.endswith("layer0.qcow2")))
        other = tmp_path / "elsewhere"
        other.mkdir()
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", paths[0], "-F", "qcow2", other / "clone.qcow2")
        upgrade(disk, rules=ChainRules())  # nobody has said where to look
        with pytest.raises(OperationError, match=r"is shared: .*clone\.qcow2 is an overlay"):
            upgrade(disk, rules=ChainRules(directories=[str(other)]))
    assert [compat(path) for path in paths] == ["0.10", "0.10"]


def test_a_template_that_needs_no_change_is_no_reason_to_refuse(tmp_path: Path) -> None:
    paths = chain(tmp_path, "compat=1.1", V2)
    with Served(paths[-1]) as disk:
        disk.carry_out(upgrade(disk, rules=ChainRules(is_template=lambda path: path.endswith("layer0.qcow2"))))
    assert compat(paths[-1]) == "1.1"


def test_a_layer_that_somebody_else_uses_is_refused_before_anything_changes(tmp_path: Path) -> None:
    paths = chain(tmp_path, V2, V2, V2)
    clone = tmp_path / "sub" / "clone.qcow2"
    clone.parent.mkdir()
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", paths[0], "-F", "qcow2", clone)
    told: list[str] = []
    with Served(clone, options=["--allow-backing", str(tmp_path)]), Served(paths[-1]) as disk:
        operation = upgrade(disk, rules=ChainRules(), told=told)
        with pytest.raises(ImageLocked):
            operation.run(Control())
        disk.give_up(operation)
        assert disk.read()[: 1 << 19] == b"\1" * (1 << 19)
    assert [compat(path) for path in paths] == ["0.10"] * 3
    assert told[-1].startswith("Failed to amend disk: ")


def test_a_failure_halfway_leaves_every_layer_whole_and_the_disk_in_service(tmp_path: Path) -> None:
    paths = chain(tmp_path, "compat=1.1", "compat=1.1")
    told: list[str] = []
    with Served(paths[-1]) as disk:
        before = disk.read()
        operation = Amend(
            disk.chain,
            AmendOptions(refcount_bits=64),
            name="disk",
            whole_chain=ChainRules(),
            on_layer=teller(told),
            audit=lambda level, text: told.append(text),
        )
        operation.run(Control())
        full = OSError(errno.ENOSPC, "No space left on device")
        with disk.gate.drained():
            with patch.object(FileStorage, "_fallocate", side_effect=full), pytest.raises(OSError, match="No space"):
                operation.pivot()
            operation.abort()
        assert disk.read() == before
        disk.perform(Request(Verb.WRITE, 0, 65536, 9))
    assert told == [f"{paths[0]}: amended (1 of 2)", "Failed to amend disk: No space left on device"]
    assert [info(path)["format-specific"]["data"]["refcount-bits"] for path in paths] == [64, 16]
    check(*paths)


def test_a_cancelled_amendment_leaves_every_layer_whole(tmp_path: Path) -> None:
    paths = chain(tmp_path, V2, V2)
    with Served(paths[-1]) as disk:
        operation = upgrade(disk, rules=ChainRules())
        control = Control()
        control.cancel()
        with pytest.raises(Cancelled):
            operation.run(control)
        disk.give_up(operation)
        disk.carry_out(upgrade(disk, rules=ChainRules()))
    check(*paths)
    assert [compat(path) for path in paths] == ["1.1", "1.1"]


def test_dirty_bitmaps_see_what_is_written_before_and_after(tmp_path: Path) -> None:
    path = chain(tmp_path, "compat=1.1")[0]
    run("qemu-img", "bitmap", "--add", "-f", "qcow2", path, "b")
    with Served(path) as disk:
        disk.perform(Request(Verb.WRITE, 0, 65536, 1))
        disk.carry_out(Amend(disk.chain, AmendOptions(lazy_refcounts=True, refcount_bits=32), name="disk"))
        disk.perform(Request(Verb.WRITE, 1 << 20, 65536, 1))
    bitmaps = info(path)["format-specific"]["data"]["bitmaps"]
    assert bitmaps == [{"flags": ["auto"], "name": "b", "granularity": 65536}], "valid, and not in use"
    run("qemu-img", "bitmap", "--add", "-f", "qcow2", path, "c")
    check(path)


def test_the_size_follows_the_rules_of_resize(tmp_path: Path) -> None:
    path = chain(tmp_path, V2)[0]

    def resized(size: int, **more: Any) -> Amend:
        return Amend(disk.chain, AmendOptions(version=3), name="disk", size=size, **more)

    with Served(path) as disk:
        with pytest.raises(OperationError, match="Use the --shrink option"):
            resized(1 << 20)
        with pytest.raises(OperationError, match="multiple of 512"):
            resized(SIZE + 1)
        header = disk.chain.layers[0].header
        assert header is not None
        assert header.version == 2
        disk.carry_out(resized(2 * SIZE))
        assert disk.device.size == 2 * SIZE
        disk.carry_out(resized(1 << 20, shrink=True))
        assert disk.device.size == 1 << 20
    assert info(path)["virtual-size"] == 1 << 20
    check(path)


def test_a_downgrade_comes_after_the_size(tmp_path: Path) -> None:
    path = chain(tmp_path, "compat=1.1")[0]
    with Served(path) as disk:
        disk.carry_out(Amend(disk.chain, AmendOptions(version=2), name="disk", size=2 * SIZE))
    assert (compat(path), info(path)["virtual-size"]) == ("0.10", 2 * SIZE)
    run("qemu-img", "snapshot", "-c", "one", path)
    with Served(path) as disk, pytest.raises(OperationError, match="Can't resize a v2 image which has snapshots"):
        Amend(disk.chain, AmendOptions(), name="disk", size=SIZE, shrink=True)
    check(path)


def test_raw_and_read_only_disks_cannot_be_amended(tmp_path: Path) -> None:
    paths = chain(tmp_path, V2, raw=True)
    with Served(paths[0], format="raw") as disk, pytest.raises(NbdqError, match="'raw' does not support"):
        upgrade(disk)
    with Served(paths[1], read_only=True) as disk, pytest.raises(OperationError, match="read-only"):
        upgrade(disk)

"""Internal snapshots of disks in use, over the admin socket (4.5, R-56), and exports that show them."""

import time
from pathlib import Path

import pytest

from tests.support.administration import administered, check, qemu_io, verified_load
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io", "fio")

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    run("qemu-io", "-c", "write -P 1 0 4M", path)
    return path


def read_snapshot(disk: Path, name: str, *commands: str) -> None:
    """Let qemu-io read what an internal snapshot of a disk at rest holds."""
    raw = disk.with_suffix(".raw")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-l", name, disk, raw)
    run("qemu-io", "-f", "raw", *(word for command in commands for word in ("-c", command)), raw)


def test_snapshots_are_made_listed_deleted_and_gone_back_to(disk: Path) -> None:
    with administered(disk) as server:
        qemu_io(server, "write -P 2 1M 1M")
        server("blockdev-snapshot-internal-sync", device="disk", name="one")
        qemu_io(server, "write -P 3 2M 1M")
        server("blockdev-snapshot-internal-sync", device="disk", name="two")
        qemu_io(server, "write -P 4 0 4M")
        listed = server("x-nbdq-snapshot-list", device="disk")
        assert [(each["id"], each["name"], each["x-nbdq-disk-size"]) for each in listed] == [
            ("1", "one", 64 * MIB),
            ("2", "two", 64 * MIB),
        ]
        assert abs(listed[0]["date-sec"] - time.time()) < 600
        applied = server("x-nbdq-snapshot-apply", device="disk", name="two")
        assert applied == listed[1]
        qemu_io(server, "read -P 1 0 1M", "read -P 2 1M 1M", "read -P 3 2M 1M", "read -P 1 3M 1M")
        assert server("blockdev-snapshot-delete-internal-sync", device="disk", id="2", name="two") == listed[1]
        qemu_io(server, "read -P 3 2M 1M", "write -P 5 3M 1M")
    check(disk)
    read_snapshot(disk, "one", "read -P 2 1M 1M", "read -P 1 2M 2M")
    run("qemu-io", "-c", "read -P 3 2M 1M", "-c", "read -P 5 3M 1M", disk)


def test_clients_notice_nothing_of_snapshots_under_load(disk: Path) -> None:
    names = [f"s{number}" for number in range(6)]
    with administered(disk) as server:
        with verified_load(server, disk):
            for name in names:
                time.sleep(0.05)
                server("blockdev-snapshot-internal-sync", device="disk", name=name)
            for name in names[1::2]:
                time.sleep(0.05)
                server("blockdev-snapshot-delete-internal-sync", device="disk", name=name)
        qemu_io(server, "read -P 1 0 4M")
    check(disk)
    for name in names[::2]:
        read_snapshot(disk, name, "read -P 1 0 4M")


def test_an_exported_snapshot_stays_what_it_is_and_cannot_be_deleted(disk: Path) -> None:
    with administered(disk) as server:
        for name in ("kept", "other"):
            server("blockdev-snapshot-internal-sync", device="disk", name=name)
            qemu_io(server, "write -P 9 1M 1M")
        server("block-export-add", type="nbd", id="e", node_name="disk", name="kept", x_nbdq_snapshot="kept")
        qemu_io(server, "read -P 1 0 4M", export="kept")
        server("blockdev-snapshot-delete-internal-sync", device="disk", name="other")
        qemu_io(server, "write -P 8 0 8M")
        server("blockdev-snapshot-internal-sync", device="disk", name="later")
        qemu_io(server, "write -P 7 0 8M")
        qemu_io(server, "read -P 1 0 4M", "read -P 0 4M 60M", export="kept")
        refused = server.refusal("blockdev-snapshot-delete-internal-sync", device="disk", name="kept")
        assert "is shown by export 'kept'" in refused
        server("block-export-del", id="e")
        server("blockdev-snapshot-delete-internal-sync", device="disk", name="kept")
    check(disk)


def test_what_cannot_be_done_is_said_in_qemus_words(disk: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw.img"
    raw.write_bytes(bytes(MIB))
    with administered(disk) as server:
        server("blockdev-snapshot-internal-sync", device="disk", name="one")
        for arguments, answer in (
            ({"device": "none", "name": "x"}, "Cannot find device='none'"),
            ({"device": "disk", "name": ""}, "Name is empty"),
            ({"device": "disk", "name": "one"}, "Snapshot with name 'one' already exists on device 'disk'"),
            ({"device": "disk", "name": "x" * 300}, "1 to 255 bytes"),
        ):
            assert answer in server.refusal("blockdev-snapshot-internal-sync", **arguments)
        for arguments, answer in (
            ({"device": "disk"}, "Name or id must be provided"),
            ({"device": "disk", "id": "1", "name": "x"}, "Snapshot with id '1' and name 'x' does not exist"),
        ):
            assert answer in server.refusal("blockdev-snapshot-delete-internal-sync", **arguments)
            assert answer in server.refusal("x-nbdq-snapshot-apply", **arguments)
    with administered("-f", "raw", raw) as server:
        refused = server.refusal("blockdev-snapshot-internal-sync", device="raw", name="x")
        assert "Block format 'raw'" in refused
    with administered("-r", disk) as server:
        refused = server.refusal("blockdev-snapshot-internal-sync", device="disk", name="x")
        assert "is read only" in refused


def test_a_transaction_takes_a_snapshot_of_several_disks_or_of_none(disk: Path) -> None:
    action = {"type": "blockdev-snapshot-internal-sync", "data": {"device": "disk", "name": "one"}}
    with administered(disk) as server:
        refused = server.refusal("transaction", actions=[action, {"type": "abort", "data": {}}])
        assert "abort" in refused.lower()
        assert server("x-nbdq-snapshot-list", device="disk") == []
        bitmap = {"type": "block-dirty-bitmap-add", "data": {"node": "disk", "name": "b"}}
        server("transaction", actions=[action, bitmap])
        assert len(server("x-nbdq-snapshot-list", device="disk")) == 1
        assert "dirty bitmaps" in server.refusal("x-nbdq-snapshot-apply", device="disk", id="1")
    check(disk)


def test_a_client_that_is_connected_sees_the_size_that_the_disk_had_then(disk: Path) -> None:
    with administered(disk) as server:
        server("blockdev-snapshot-internal-sync", device="disk", name="small")
        server("block_resize", device="disk", size=128 * MIB)
        qemu_io(server, "write -P 6 100M 1M")
        server("x-nbdq-snapshot-apply", device="disk", name="small")
        assert run("nbdinfo", "--size", server.uri()).strip() == str(64 * MIB)
        server("block_resize", device="disk", size=128 * MIB)
        qemu_io(server, "read -P 0 64M 64M")
    check(disk)

"""Checkpoints (F1): one moment of running disks, read by a backup program while guests go on, without a trace after."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.server.client import Client
from tests.support.administration import Administered, administered, chain, check, qemu_io, verified_load
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io", "nbdinfo", "nbdcopy", "fio")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    run("qemu-io", "-c", "write -P 1 0 4M", path)
    return path


def dirty(server: Administered, export: str, bitmap: str) -> list[tuple[int, int]]:
    """What a client reads as changed: ranges in units of 64 KiB."""
    found = json.loads(run("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{bitmap}", server.uri(export)))
    return [(extent["offset"] >> 16, extent["length"] >> 16) for extent in found if extent["type"]]


def bitmaps(path: Path) -> dict[str, list[str]]:
    data: dict[str, Any] = chain(path)[0]["format-specific"]["data"]
    return {each["name"]: each["flags"] for each in data.get("bitmaps", [])}


def test_a_checkpoint_shows_its_moment_while_the_guest_goes_on(disk: Path, tmp_path: Path) -> None:
    with administered(disk) as server:
        qemu_io(server, "write -P 2 1M 64k")
        begun = server("x-nbdq-checkpoint", id="monday", disks=[{"node": "disk", "new-bitmap": "b0"}])
        export = begun["disks"][0]["export"]
        qemu_io(server, "write -P 3 1M 64k", "write -P 3 32M 128k", "flush")
        qemu_io(server, "read -P 2 1M 64k", "read -P 0 32M 128k", export=export)
        run("nbdcopy", server.uri(export), tmp_path / "full.raw")
        qemu_io(server, "read -P 3 1M 64k", "read -P 3 32M 128k")
        overlay = str(tmp_path / "overlay.qcow2")
        assert "part of checkpoint 'monday'" in server.refusal(
            "blockdev-snapshot-sync", device="disk", snapshot_file=overlay
        )
        server("x-nbdq-checkpoint-end", id="monday")
        server.wait_for_jobs()
        assert server("x-nbdq-query-checkpoints") == []
        qemu_io(server, "read -P 3 1M 64k", "read -P 3 32M 128k")
    check(disk)
    assert len(chain(disk)) == 1
    assert bitmaps(disk) == {"b0": ["auto"]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.qcow2", "full.raw"], "no trace"
    run("qemu-io", "-f", "raw", "-c", "read -P 2 1M 64k", "-c", "read -P 0 32M 128k", tmp_path / "full.raw")


def test_increments_hold_what_changed_between_checkpoints_and_nothing_else(disk: Path) -> None:
    with administered(disk) as server:

        def cycle(name: str, old: str | None, new: str) -> list[tuple[int, int]]:
            wish = {"node": "disk", "new-bitmap": new, **({"bitmap": old} if old else {})}
            export = server("x-nbdq-checkpoint", id=name, disks=[wish])["disks"][0]["export"]
            qemu_io(server, "write -P 9 20M 64k")  # while the backup reads
            found = dirty(server, export, old) if old else []
            server("x-nbdq-checkpoint-end", id=name)
            server.wait_for_jobs()
            return found

        cycle("full", None, "b0")
        qemu_io(server, "write -P 2 1M 64k", "write -z 2M 128k")
        assert cycle("one", "b0", "b1") == [(16, 1), (32, 2), (320, 1)]
        assert cycle("two", "b1", "b2") == [(320, 1)]
        qemu_io(server, "discard 3M 64k")
        assert cycle("three", "b2", "b3") == [(48, 1), (320, 1)]
    check(disk)
    assert bitmaps(disk) == {"b3": ["auto"]}


def test_after_a_failed_backup_the_next_one_has_the_changes_of_both(disk: Path) -> None:
    with administered(disk) as server:
        server("block-dirty-bitmap-add", node="disk", name="b0", persistent=True)
        qemu_io(server, "write -P 2 1M 64k")
        server("x-nbdq-checkpoint", id="one", disks=[{"node": "disk", "bitmap": "b0", "new-bitmap": "b1"}])
        qemu_io(server, "write -P 3 2M 64k")
        server("x-nbdq-checkpoint-end", id="one", success=False)
        server.wait_for_jobs()
        qemu_io(server, "write -P 4 3M 64k")
        begun = server("x-nbdq-checkpoint", id="two", disks=[{"node": "disk", "bitmap": "b0", "new-bitmap": "b1"}])
        assert dirty(server, begun["disks"][0]["export"], "b0") == [(16, 1), (32, 1), (48, 1)]
        server("x-nbdq-checkpoint-end", id="two")
        server.wait_for_jobs()
    assert bitmaps(disk) == {"b1": ["auto"]}
    check(disk)


def test_a_checkpoint_survives_the_server_with_its_bitmap(disk: Path, tmp_path: Path) -> None:
    words = ("--state", tmp_path / "state", disk)
    with administered(*words) as server:
        server("block-dirty-bitmap-add", node="disk", name="b0", persistent=True)
        server("x-nbdq-checkpoint", id="one", disks=[{"node": "disk", "bitmap": "b0", "new-bitmap": "b1"}])
        qemu_io(server, "write -P 3 2M 64k")
    with administered(*words) as server:
        qemu_io(server, "read -P 3 2M 64k")
        server("block-commit", device="disk", job_id="merge", base=str(disk))
        while (server("query-jobs") or [{"status": "gone"}])[0]["status"] != "ready":
            pass
        server("job-complete", id="merge")
        server.wait_for_jobs()
        begun = server("x-nbdq-checkpoint", id="two", disks=[{"node": "disk", "bitmap": "b1", "new-bitmap": "b2"}])
        assert dirty(server, begun["disks"][0]["export"], "b1") == [(32, 1)]
        server("x-nbdq-checkpoint-end", id="two")
        server.wait_for_jobs()
    check(disk)
    assert len(chain(disk)) == 1


def test_several_disks_stand_still_at_one_moment_or_none_does(tmp_path: Path) -> None:
    disks = [tmp_path / f"{name}.qcow2" for name in ("one", "two")]
    for path in disks:
        run("qemu-img", "create", "-q", "-f", "qcow2", path, "16M")
    with administered(*disks) as server:
        wishes = [{"node": path.stem, "new-bitmap": "b0"} for path in disks]
        server("block-dirty-bitmap-add", node="two", name="b0", persistent=True)
        assert "already exists" in server.refusal("x-nbdq-checkpoint", id="all", disks=wishes)
        assert server("x-nbdq-query-checkpoints") == []
        assert {path.name for path in tmp_path.iterdir()} == {"one.qcow2", "two.qcow2"}
        assert [len(found["dirty-bitmaps"]) for found in server("x-nbdq-bitmap-list", node="one")] in ([], [0])
        server("block-dirty-bitmap-remove", node="two", name="b0")
        server("x-nbdq-checkpoint", id="all", disks=wishes)
        assert "part of checkpoint" in server.refusal("x-nbdq-checkpoint", id="again", disks=wishes[:1])
        server("x-nbdq-checkpoint-end", id="all")
        server.wait_for_jobs()
    check(*disks)
    assert all(bitmaps(path) == {"b0": ["auto"]} for path in disks)


def test_a_reader_keeps_its_checkpoint_unless_it_is_ended_hard(disk: Path) -> None:
    with administered(disk) as server:
        export = server("x-nbdq-checkpoint", id="one", disks=[{"node": "disk"}])["disks"][0]["export"]
        with Client(str(server.server.socket)).go(export):
            assert "still in use" in server.refusal("x-nbdq-checkpoint-end", id="one")
            server("x-nbdq-checkpoint-end", id="one", mode="hard")
            server.wait_for_jobs()
    check(disk)


def test_clients_notice_nothing_of_checkpoints_under_load(disk: Path) -> None:
    with administered(disk) as server, verified_load(server, disk):
        for number in range(3):
            export = server("x-nbdq-checkpoint", id=f"c{number}", disks=[{"node": "disk"}])["disks"][0]["export"]
            qemu_io(server, "read -P 1 0 4M", export=export)
            server("x-nbdq-checkpoint-end", id=f"c{number}")
            server.wait_for_jobs()
    check(disk)
    assert len(chain(disk)) == 1


def test_a_bitmap_that_would_not_outlive_the_server_is_none_for_backups(disk: Path) -> None:
    with administered(disk) as server:
        server("block-dirty-bitmap-add", node="disk", name="b0")
        wish = {"node": "disk", "bitmap": "b0", "new-bitmap": "b1"}
        assert "is not persistent" in server.refusal("x-nbdq-checkpoint", id="one", disks=[wish])
        wish["bitmap"] = "b9"
        assert "b9" in server.refusal("x-nbdq-checkpoint", id="one", disks=[wish])
        qemu_io(server, "write -P 2 0 64k")
        (found,) = server("x-nbdq-bitmap-list", node="disk")
        assert [(each["name"], each["count"]) for each in found["dirty-bitmaps"]] == [("b0", 64 << 10)], "it goes on"
    assert len(chain(disk)) == 1


def test_a_raw_disk_is_frozen_without_bitmaps(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(b"\x01" * (4 << 20))
    with administered("-f", "raw", raw) as server:
        export = server("x-nbdq-checkpoint", id="one", disks=[{"node": "disk"}])["disks"][0]["export"]
        qemu_io(server, "write -P 2 1M 64k")
        qemu_io(server, "read -P 1 0 4M", export=export)
        server("x-nbdq-checkpoint-end", id="one")
        server.wait_for_jobs()
        qemu_io(server, "read -P 2 1M 64k", "read -P 1 2M 2M")
    assert raw.read_bytes()[1 << 20 : (1 << 20) + (64 << 10)] == b"\x02" * (64 << 10)
    assert [path.name for path in tmp_path.iterdir()] == ["disk.raw"]

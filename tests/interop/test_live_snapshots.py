"""External snapshots of disks in use, over the admin socket (4.6, R-59): one at a time, several at one moment."""

import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.administration import administered, chain, check, qemu_io, verified_load
from tests.support.serving import refusal
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io", "fio")

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    run("qemu-io", "-c", "write -P 1 0 4M", path)
    return path


def test_what_is_written_after_a_snapshot_is_in_the_overlay_alone(disk: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    before = tmp_path / "before.raw"
    with administered(disk) as server:
        qemu_io(server, "write -P 2 1M 1M", "flush")
        server("blockdev-snapshot-sync", device="disk", snapshot_file=str(overlay))
        qemu_io(server, "write -P 3 2M 1M", "flush", "read -P 1 0 1M", "read -P 2 1M 1M", "read -P 3 2M 1M")
        run("qemu-img", "convert", "-O", "raw", disk, before)  # nobody writes to it any more: it can be read
        run("qemu-io", "-f", "raw", "-c", "read -P 2 1M 1M", "-c", "read -P 1 2M 2M", before)
    check(disk, overlay)
    top, bottom = chain(overlay)
    assert (top["full-backing-filename"], top["backing-filename-format"]) == (str(disk), "qcow2")
    assert top["virtual-size"] == bottom["virtual-size"]
    run("qemu-io", "-c", "read -P 1 0 1M", "-c", "read -P 2 1M 1M", "-c", "read -P 3 2M 1M", overlay)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", before, disk)


def test_clients_notice_nothing_of_snapshots_under_load(disk: Path, tmp_path: Path) -> None:
    layers = [disk, *(tmp_path / f"s{number}.qcow2" for number in range(6))]
    with administered(disk) as server:
        with verified_load(server, disk):
            for layer in layers[1:]:
                time.sleep(0.1)
                server("blockdev-snapshot-sync", device="disk", snapshot_file=str(layer))
        qemu_io(server, "read -P 1 0 4M")
    check(*layers)
    assert [Path(image["filename"]) for image in chain(layers[-1])] == layers[::-1]


def test_a_raw_disk_gets_an_overlay(tmp_path: Path) -> None:
    raw, overlay = tmp_path / "disk.raw", tmp_path / "overlay.qcow2"
    raw.write_bytes(b"\x01" * 4 * MIB)
    with administered("-f", "raw", raw) as server:
        qemu_io(server, "write -P 2 0 64k")
        server("blockdev-snapshot-sync", device="disk", snapshot_file=str(overlay))
        qemu_io(server, "write -P 3 64k 64k", "read -P 2 0 64k", "read -P 3 64k 64k", "read -P 1 128k 1M")
    check(overlay)
    assert chain(overlay)[0]["backing-filename-format"] == "raw"
    assert raw.read_bytes()[: 128 << 10] == b"\x02" * (64 << 10) + b"\x01" * (64 << 10)


def test_a_restart_with_the_same_command_line_serves_the_new_top(disk: Path, tmp_path: Path) -> None:
    overlay, state = tmp_path / "overlay.qcow2", tmp_path / "state"
    with administered("--state", state, disk) as server:
        server("blockdev-snapshot-sync", device="disk", snapshot_file=str(overlay))
        qemu_io(server, "write -P 7 0 1M")
    with administered("--state", state, disk) as server:
        qemu_io(server, "read -P 7 0 1M", "read -P 1 1M 3M")

    check(disk, overlay)


def test_without_a_state_file_the_old_top_names_the_overlay_when_it_is_served_again(disk: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    with administered(disk) as server:
        server("blockdev-snapshot-sync", device="disk", snapshot_file=str(overlay))
        qemu_io(server, "write -P 7 0 1M")
    assert str(overlay) in refusal(disk)
    with administered(overlay) as server:
        qemu_io(server, "read -P 7 0 1M", "read -P 1 1M 3M")


@pytest.mark.parametrize("size", ["32M", "65M"])
def test_an_overlay_of_another_size_is_refused_and_left_alone(disk: Path, tmp_path: Path, size: str) -> None:
    overlay = tmp_path / "overlay.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "qcow2", overlay, size)
    was = overlay.read_bytes()
    with administered(disk) as server:
        said = server.refusal("blockdev-snapshot-sync", device="disk", snapshot_file=str(overlay), mode="existing")
        assert "is a disk of" in said
        qemu_io(server, "write -P 5 0 64k")
    assert overlay.read_bytes() == was
    assert len(chain(disk)) == 1


def test_an_overlay_that_is_there_already_is_taken_if_that_is_asked_for(disk: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", overlay, "64M")
    with administered(disk) as server:
        assert "exists already" in server.refusal("blockdev-snapshot-sync", device="disk", snapshot_file=str(overlay))
        server("blockdev-snapshot-sync", device="disk", snapshot_file=str(overlay), mode="existing")
        qemu_io(server, "write -P 5 0 64k", "read -P 5 0 64k", "read -P 1 64k 1M")
    check(disk, overlay)
    assert len(chain(overlay)) == 2


def test_an_overlay_that_was_there_keeps_its_backing_file_whatever_its_header_is_to_say_next(
    disk: Path, tmp_path: Path
) -> None:
    overlay, next_one = tmp_path / "overlay.qcow2", tmp_path / "next.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", overlay, "64M")
    with administered(disk) as server:
        server("blockdev-snapshot-sync", device="disk", snapshot_file=str(overlay), mode="existing")
        server("block-dirty-bitmap-add", node="disk", name="b", persistent=True)
        server("blockdev-snapshot-sync", device="disk", snapshot_file=str(next_one))
    assert [layer["filename"] for layer in chain(next_one)] == [str(next_one), str(overlay), str(disk)]


def test_nothing_that_was_there_is_recorded_as_ours_to_be_removed_after_a_crash(disk: Path, tmp_path: Path) -> None:
    other, state = tmp_path / "other.raw", tmp_path / "state"
    other.write_bytes(bytes(1 << 20))
    with administered("--state", state, disk) as server:
        assert "exists already" in server.refusal("blockdev-snapshot-sync", device="disk", snapshot_file=str(other))
        assert not state.exists()


@pytest.mark.parametrize("place", ["/nbdq-test.qcow2", "../elsewhere.qcow2"])
def test_no_overlay_is_made_outside_of_the_allowed_directories(disk: Path, place: str) -> None:
    target = disk.parent / place
    with administered(disk) as server:
        said = server.refusal("blockdev-snapshot-sync", device="disk", snapshot_file=str(target))
        assert "--allow-backing" in said
    assert not target.exists()


def test_a_snapshot_that_fails_leaves_nothing_behind(disk: Path, tmp_path: Path) -> None:
    with administered("--state", tmp_path / "state", disk) as server:
        names = sorted(path.name for path in tmp_path.iterdir())
        arguments = {"device": "disk", "snapshot_file": str(tmp_path / "overlay.qcow2")}
        assert "bytes free" in server.refusal("blockdev-snapshot-sync", x_nbdq_minimum_free=1 << 62, **arguments)
        assert "power of two" in server.refusal("blockdev-snapshot-sync", x_nbdq_cluster_size=1000, **arguments)

        qemu_io(server, "write -P 5 0 64k", "read -P 5 0 64k")
        left = {path.name for path in tmp_path.iterdir()} - {"state"}
        assert left == set(names) - {"state"}


def test_disks_of_a_transaction_change_together_or_not_at_all(tmp_path: Path) -> None:
    disks = [tmp_path / f"{name}.qcow2" for name in ("one", "two")]
    for path in disks:
        run("qemu-img", "create", "-q", "-f", "qcow2", path, "16M")
    overlays = [tmp_path / f"{name}-new.qcow2" for name in ("one", "two")]

    def actions(*more: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            *(
                {"type": "blockdev-snapshot-sync", "data": {"device": path.stem, "snapshot-file": str(overlay)}}
                for path, overlay in zip(disks, overlays, strict=True)
            ),
            *more,
        ]

    with administered(*disks) as server:
        assert "Abort" in server.refusal("transaction", actions=actions({"type": "abort", "data": {}}))
        overlays[1].write_bytes(b"in the way")
        assert "exists already" in server.refusal("transaction", actions=actions())
        assert not overlays[0].exists()
        assert overlays[1].read_bytes() == b"in the way"
        overlays[1].unlink()
        for path in disks:
            qemu_io(server, "write -P 1 0 64k", "flush", export=path.stem)
        server("transaction", actions=actions())
        for path in disks:
            qemu_io(server, "write -P 2 64k 64k", "read -P 1 0 64k", export=path.stem)
    check(*disks, *overlays)
    for path, overlay in zip(disks, overlays, strict=True):
        run("qemu-io", "-c", "read -P 0 64k 64k", path)
        run("qemu-io", "-c", "read -P 2 64k 64k", overlay)


def test_one_transaction_makes_no_two_overlays_of_one_disk(disk: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.qcow2" for number in range(2)]
    with administered(disk) as server:
        said = server.refusal(
            "transaction",
            actions=[
                {"type": "blockdev-snapshot-sync", "data": {"device": "disk", "snapshot-file": str(file)}}
                for file in files
            ],
        )
        assert "no overlay of the disk's top any more" in said
        assert not any(file.exists() for file in files)
        qemu_io(server, "write -P 4 0 64k", "read -P 4 0 64k")
        server("blockdev-snapshot-sync", device="disk", snapshot_file=str(files[0]))
    check(disk, files[0])


def test_overlays_are_what_the_policy_of_their_directory_says(disk: Path, tmp_path: Path) -> None:
    policy, overlay = tmp_path / "policy.toml", tmp_path / "overlay.qcow2"
    policy.write_text(f'[[directory]]\npath = "{tmp_path}"\ncompat = "0.10"\ncluster_size = "128k"\n')
    with administered("--volume-policy", policy, disk) as server:
        server("blockdev-snapshot-sync", device="disk", snapshot_file=str(overlay))
    (top, _) = chain(overlay)
    assert (top["cluster-size"], top["format-specific"]["data"]["compat"]) == (128 << 10, "0.10")


def test_a_snapshot_of_a_read_only_disk_is_refused(disk: Path, tmp_path: Path) -> None:
    with administered("-r", disk) as server:
        said = server.refusal("blockdev-snapshot-sync", device="disk", snapshot_file=str(tmp_path / "x.qcow2"))
        assert "read-only" in said


def test_a_manager_is_told_once_when_the_file_grows_past_the_write_threshold(disk: Path, tmp_path: Path) -> None:
    def passed() -> list[dict[str, Any]]:
        server("query-status")  # what was emitted before its answer has come
        return [event["data"] for event in server.client.taken_events() if event["event"] == "BLOCK_WRITE_THRESHOLD"]

    with administered(disk) as server:
        server("block-set-write-threshold", node_name="disk", write_threshold=16 * MIB)
        qemu_io(server, "write 4M 1M", "flush")
        assert passed() == []
        qemu_io(server, "write 8M 16M")
        (told,) = passed()
        assert (told["node-name"], told["write-threshold"]) == ("disk", 16 * MIB)
        assert 0 < told["amount-exceeded"] <= disk.stat().st_size - 16 * MIB
        qemu_io(server, "write 24M 16M")
        assert passed() == []
        server("block-set-write-threshold", node_name="disk", write_threshold=1 * MIB)
        server("blockdev-snapshot-sync", device="disk", snapshot_file=str(tmp_path / "overlay.qcow2"))
        assert passed() == [], "the file of the new top is small"
        qemu_io(server, "write 0 2M")
        assert [each["write-threshold"] for each in passed()] == [MIB]
        server("block-set-write-threshold", node_name="disk", write_threshold=0)
        assert "expects an offset" in server.refusal("block-set-write-threshold", node_name="disk", write_threshold=-1)

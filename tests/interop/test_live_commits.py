"""Commits, streams and rebases of disks under load: clients notice nothing, and QEMU reads what they wrote."""

import shutil
from pathlib import Path

import pytest

from tests.support.administration import Administered, administered, chain, check, qemu_io, verified_load
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io", "fio")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    run("qemu-io", "-c", "write -P 1 0 4M", path)
    return path


def _snapshot(server: Administered, *paths: Path) -> None:
    for path in paths:
        server("blockdev-snapshot-sync", device="disk", snapshot_file=str(path))


def _run_job(server: Administered, command: str, *, completed: bool = False, **arguments: object) -> None:
    server(command, device="disk", job_id="job", **arguments)
    if completed:
        events = server.client.events()
        while next(events)["event"] != "BLOCK_JOB_READY":
            pass
        server("block-job-complete", device="job")
    server.wait_for_jobs()


def test_clients_notice_nothing_while_chains_grow_and_shrink(disk: Path, tmp_path: Path) -> None:
    layers = [disk, *(tmp_path / f"s{number}.qcow2" for number in range(6))]
    other = tmp_path / "other.qcow2"
    shutil.copy(disk, other)
    with administered(disk) as server:
        with verified_load(server, disk):
            _snapshot(server, *layers[1:5])
            _run_job(server, "block-commit", top=str(layers[2]), base=str(layers[1]))
            _run_job(server, "block-stream", base=str(layers[1]))
            layers[3].unlink()  # it is as good as ever, and would be damaged
            _run_job(server, "block-commit", base=str(layers[1]), completed=True)
            _snapshot(server, layers[5])
            _run_job(server, "x-nbdq-rebase", backing_file=str(other), backing_format="qcow2")
            _snapshot(server, layers[6])
            _run_job(server, "block-stream")
        qemu_io(server, "read -P 1 0 4M")
    check(layers[6])
    assert len(chain(layers[6])) == 1


def test_a_disk_that_was_committed_is_refused_by_its_old_name_and_serves_by_its_base(
    disk: Path, tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay.qcow2"
    with administered(disk) as server:
        _snapshot(server, overlay)
        with verified_load(server, overlay):
            _run_job(server, "block-commit", base=str(disk), completed=True)
        qemu_io(server, "write -P 9 0 1M", "flush")
    check(disk)
    with administered(disk) as server:
        qemu_io(server, "read -P 9 0 1M", "read -P 1 1M 3M")


@pytest.mark.parametrize("command", ["block-stream", "x-nbdq-rebase"])
def test_what_internal_snapshots_read_from_below_is_not_taken_from_them(
    disk: Path, tmp_path: Path, command: str
) -> None:
    top = tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "qcow2", top)
    run("qemu-img", "snapshot", "-c", "before", top)
    rebase: dict[str, object] = {"backing_file": ""} if command == "x-nbdq-rebase" else {}
    with administered(top) as server:
        said = server.refusal(command, device="top", job_id="job", **rebase)
        assert "internal snapshots" in said
        server("blockdev-snapshot-delete-internal-sync", device="top", name="before")
        server(command, device="top", job_id="job", **rebase)
        server.wait_for_jobs()
        qemu_io(server, "read -P 1 0 4M")
    check(top)
    assert len(chain(top)) == 1

"""``nbdq ctl``: one command, one call; errors in one line; jobs that show how they go on."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result

from nbdq.admin.client import AdminError
from nbdq.cli.ctl.command import VERBS
from nbdq.cli.ctl.follow import follow
from tests.support.administration import Administered, administered, qemu_io
from tests.support.cli import run_nbdq
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io")


class Ctl:
    """The command line of an administrator."""

    def __init__(self, server: Administered, directory: Path) -> None:
        self.server = server
        self.directory = directory
        self.socket = server.client.path

    def run(self, *words: str | Path) -> Result:
        return run_nbdq("ctl", "-s", self.socket, *words)

    def __call__(self, *words: str | Path) -> str:
        """What a command that must succeed prints."""
        result = self.run(*words)
        assert (result.exit_code, result.stderr) == (0, ""), (words, result.stderr)
        return result.stdout

    def refusal(self, *words: str | Path) -> str:
        """The one line that a command must end in."""
        result = self.run(*words)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1
        return result.stderr


@pytest.fixture
def ctl(tmp_path: Path) -> Iterator[Ctl]:
    base, top = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "16M")
    run("qemu-io", "-c", "write -P 1 0 16M", base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    run("qemu-io", "-c", "write -P 2 2M 4M", top)
    with administered(top) as server:
        yield Ctl(server, tmp_path)


def test_status_shows_disks_exports_and_jobs(ctl: Ctl) -> None:
    heading, disk = ctl("status").splitlines()
    assert heading.split() == ["DISK", "SIZE", "USED", "LAYERS", "TOP", "EXPORTS"]
    assert disk.split()[:3] == ["disk", "16", "MiB"]
    assert set(json.loads(ctl("--json", "status"))) == {"disks", "exports", "jobs"}


def test_a_snapshot_and_a_commit_back_take_one_line_each(ctl: Ctl) -> None:
    overlay = ctl.directory / "overlay.qcow2"
    assert ctl("snapshot", "disk", overlay) == ""
    assert "exists" in ctl.refusal("snapshot", "disk", overlay)
    assert str(overlay) in ctl("status")
    said = ctl("commit", "disk", "--base", ctl.directory / "disk.qcow2").splitlines()
    assert said[-1].startswith("disk: done")
    assert str(overlay) not in ctl("status")


def test_a_commit_can_be_left_ready_and_completed_later(ctl: Ctl) -> None:
    assert "nbdq ctl job complete disk" in ctl("commit", "disk", "--keep-ready").splitlines()[-1]
    assert "ready" in ctl("jobs")
    assert ctl("job", "complete", "disk") == ""
    ctl.server.wait_for_jobs()
    assert ctl("jobs") == ""
    assert "not there" in ctl.refusal("job", "wait", "disk")  # nobody can say any more how it ended


def test_a_job_that_waits_for_somebody_already_is_not_waited_for(ctl: Ctl) -> None:
    ctl("commit", "disk", "--keep-ready")
    assert "nbdq ctl job complete disk" in ctl("job", "wait", "disk")
    ctl("job", "cancel", "disk")
    ctl.server.wait_for_jobs()
    ctl("block-stream", "--device", "disk", "--job-id", "s", "--no-auto-finalize")
    assert "nbdq ctl job finalize s" in ctl("job", "wait", "s").splitlines()[-1]


def test_jobs_are_steered_from_another_command(ctl: Ctl) -> None:
    ctl("stream", "disk", "--speed", "1", "--background")
    assert "disk: stream running" in ctl("jobs")
    ctl("job", "pause", "disk")
    assert "paused" in ctl("jobs")
    assert "already paused" in ctl.refusal("job", "pause", "disk")
    ctl("job", "resume", "disk")
    ctl("job", "speed", "disk", "2k")
    assert json.loads(ctl("--json", "jobs"))[0]["speed"] == 2048
    ctl("job", "cancel", "disk")
    ctl.server.wait_for_jobs()
    assert "not found" in ctl.refusal("job", "cancel", "disk")


def test_a_job_that_fails_while_it_is_watched_is_an_error(ctl: Ctl) -> None:
    ctl("stream", "disk", "--speed", "1", "--background")
    with subprocess.Popen(
        [sys.executable, "-m", "nbdq", "ctl", "-s", ctl.socket, "job", "wait", "disk"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watcher:
        assert watcher.stdout is not None
        assert "running" in watcher.stdout.readline()
        ctl("job", "cancel", "disk")
        assert watcher.communicate()[1] == "nbdq: job disk was cancelled\n"
    assert watcher.returncode == 1


def test_of_several_jobs_none_fails_unnoticed(tmp_path: Path) -> None:
    images = []
    for name in ("one", "two"):
        base, top = tmp_path / f"{name}-base.qcow2", tmp_path / f"{name}.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
        run("qemu-io", "-c", "write 0 1M", base)
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
        images.append(top)
    with administered(*images) as server:
        server("block-stream", device="one")
        server("block-stream", device="two", speed=1)
        server("block-job-cancel", device="two", force=True)
        server.wait_for_jobs()
        with pytest.raises(AdminError, match="job two was cancelled"):
            follow(server.client, ["one", "two"], complete=True, as_json=True)


def test_who_interrupts_the_watching_of_a_job_is_told_that_it_goes_on(ctl: Ctl) -> None:
    ctl("stream", "disk", "--speed", "1", "--background")
    with subprocess.Popen(
        [sys.executable, "-m", "nbdq", "ctl", "-s", ctl.socket, "job", "wait", "disk"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watcher:
        assert watcher.stdout is not None
        assert "running" in watcher.stdout.readline()
        watcher.send_signal(signal.SIGINT)
        assert watcher.communicate()[1] == "\njob disk goes on; nbdq ctl job cancel disk ends it\n"
    assert watcher.returncode == 130
    assert "running" in ctl("jobs")


def test_every_command_of_the_server_has_options_of_its_own(ctl: Ctl) -> None:
    assert ctl("block-dirty-bitmap-add", "--node", "disk", "--name", "b", "--granularity", "64k") == ""
    listed = json.loads(ctl("--json", "bitmaps", "disk"))
    assert [bitmap["name"] for bitmap in listed[0]["dirty-bitmaps"]] == ["b"]
    result = ctl.run("block-dirty-bitmap-add", "--node", "disk")
    assert result.exit_code == 2
    assert "--name" in result.stderr
    help = ctl("block-commit", "--help")
    assert "--x-nbdq-dry-run" in help
    assert "[report|ignore|enospc|stop]" in help


def test_call_takes_arguments_as_the_server_describes_them(ctl: Ctl) -> None:
    ctl("call", "block-dirty-bitmap-add", "node=disk", "name=7", "persistent=yes", "granularity=128k")
    actions = [{"type": "block-dirty-bitmap-remove", "data": {"node": "disk", "name": "7"}}]
    ctl("call", "transaction", f"actions={json.dumps(actions)}")
    actions[0]["type"] = "block-dirty-bitmap-add"
    ctl("transaction", "--actions", json.dumps(actions))
    ctl("transaction", "--actions", json.dumps({**actions[0], "type": "block-dirty-bitmap-remove"}))
    assert ctl("bitmaps", "disk") == ""
    assert "Parameter 'name' is missing" in ctl.refusal("call", "block-dirty-bitmap-add", "node=disk")
    assert "not been found" in ctl.refusal("call", "frobnicate")
    assert ctl.run("call", "query-block", "nonsense").exit_code == 2
    assert "'granularity'" in ctl.run("call", "block-dirty-bitmap-add", "granularity=x").stderr


def test_what_the_server_refuses_is_said_in_one_line(ctl: Ctl) -> None:
    assert "Cannot find device='nobody'" in ctl.refusal("snapshot", "nobody", "x")
    assert "would be lost" in ctl.refusal("resize", "disk", "8M")
    ctl("resize", "disk", "8M", "--shrink")
    assert "8 MiB" in ctl("status")


def test_a_command_that_nobody_knows_and_a_missing_socket_are_misuse(ctl: Ctl, tmp_path: Path) -> None:
    assert ctl.run("frobnicate").exit_code == 2
    assert run_nbdq("ctl", "status").exit_code == 2
    missing = run_nbdq("ctl", "-s", tmp_path / "nothing", "status")
    assert missing.exit_code == 1
    assert "cannot connect" in missing.stderr
    clients = ctl.server.server.socket
    wrong = run_nbdq("ctl", "-s", clients, "status")
    assert (wrong.exit_code, wrong.stderr) == (1, f"nbdq: {clients}: not an admin socket\n")


def test_events_are_watched_as_they_come(ctl: Ctl) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "nbdq", "ctl", "-s", ctl.socket, "--json", "watch"], stdout=subprocess.PIPE, text=True
    ) as watcher:
        assert watcher.stdout is not None
        while not any("watch" in line for line in _arguments_of_clients(ctl, watcher.pid)):
            pass
        ctl("stream", "disk", "--background")
        events = []
        while not events or events[-1]["data"].get("status") != "null":
            events.append(json.loads(watcher.stdout.readline()))
        watcher.terminate()
    assert {"JOB_STATUS_CHANGE", "BLOCK_JOB_COMPLETED"} <= {event["event"] for event in events}


def _arguments_of_clients(ctl: Ctl, pid: int) -> list[str]:
    """A watcher that is connected: it has opened a socket, and the server has answered its negotiation."""
    ctl("query-status")
    sockets = [name for name in os.listdir(f"/proc/{pid}/fd") if _is_socket(f"/proc/{pid}/fd/{name}")]
    return ["watch"] if sockets and Path(f"/proc/{pid}/wchan").exists() and _sleeps(pid) else []


def _is_socket(path: str) -> bool:
    try:
        return os.readlink(path).startswith("socket:")
    except OSError:
        return False


def _sleeps(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_a_checkpoint_begins_and_ends(ctl: Ctl) -> None:
    ctl("bitmap", "add", "disk", "b0")
    begun = ctl("checkpoint", "c1", "disk,bitmap=b0,new-bitmap=b1").splitlines()
    assert begun[1].split() == ["c1", "disk", "disk-c1", "b0", "b1"]
    assert ctl("checkpoints").splitlines() == begun
    assert json.loads(ctl("--json", "checkpoints"))[0]["disks"][0]["new-bitmap"] == "b1"
    assert "done" in ctl("checkpoint-end", "c1")
    assert ctl("checkpoints") == ""


def test_bitmaps_are_changed_and_listed_in_lines(ctl: Ctl) -> None:
    ctl("bitmap", "add", "disk", "a", "--granularity", "128k")
    ctl("bitmap", "add", "disk", "b", "--transient", "--disabled")
    qemu_io(ctl.server, "write 0 64k")
    a, b = (line.split("  ") for line in ctl("bitmaps", "disk").splitlines()[1:])
    assert {"a", "128 KiB", "recording, persistent"} <= {cell.strip() for cell in a}
    assert {"b", "0 B", "disabled, transient"} <= {cell.strip() for cell in b}
    ctl("bitmap", "disable", "disk", "a")
    ctl("bitmap", "enable", "disk", "b")
    assert "recording, transient" in ctl("bitmaps", "disk")
    ctl("bitmap", "merge", "disk", "b", "a")
    ctl("bitmap", "clear", "disk", "a")
    assert [bitmap["count"] for bitmap in json.loads(ctl("--json", "bitmaps", "disk"))[0]["dirty-bitmaps"]] == [
        0,
        128 << 10,
    ]
    ctl("bitmap", "remove", "disk", "b")
    ctl("bitmap", "enable", "disk", "a")
    ctl("snapshot", "disk", ctl.directory / "above.qcow2")
    qemu_io(ctl.server, "write 1M 64k")
    assert "frozen, persistent" in ctl("bitmaps", "disk")
    ctl("commit", "disk", "--base", ctl.directory / "disk.qcow2")
    (a,) = ctl("bitmaps", "disk").splitlines()[1:]
    assert a.split()[1:3] == ["128", "KiB"]
    assert "recording, persistent" in a
    ctl("bitmap", "remove", "disk", "a")
    assert ctl("bitmaps", "disk") == ""
    assert "not found" in ctl.refusal("bitmap", "clear", "disk", "a")


def test_internal_snapshots_are_kept_applied_exported_and_deleted(ctl: Ctl) -> None:
    ctl("internal", "create", "disk", "before")
    qemu_io(ctl.server, "write -P 9 0 64k")
    assert "before" in ctl("internal", "list", "disk")
    ctl("export", "disk", "old", "--internal", "before", "-D", "as it was")
    qemu_io(ctl.server, "read -P 1 0 64k", export="old")
    shown = ctl("exports")
    assert "@ before" in shown
    assert "as it was" in shown
    ctl("unexport", "old")
    ctl("internal", "apply", "disk", "before")
    qemu_io(ctl.server, "read -P 1 0 64k")
    ctl("internal", "delete", "disk", "before")
    assert ctl("internal", "list", "disk") == ""


def test_internal_snapshots_that_would_read_otherwise_are_a_reason_to_refuse_unless_forced(ctl: Ctl) -> None:
    ctl("internal", "create", "disk", "before")
    for words in (("stream", "disk"), ("rebase", "disk", "")):
        assert "internal snapshot" in ctl.run(*words).stderr
    assert "done" in ctl("stream", "disk", "--force")


def test_the_page_of_options_names_every_verb() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "options.md").read_text()
    assert [verb for verb in [*VERBS, "call"] if f"`{verb}" not in page] == []


def test_a_layer_can_be_exported_and_clients_be_held_back(ctl: Ctl) -> None:
    ctl("export", "disk", "below", "--layer", ctl.directory / "base.qcow2", "-e", "2")
    qemu_io(ctl.server, "read -P 1 2M 64k", export="below")
    below = ctl("exports").splitlines()[2]
    assert "read-only" in below
    assert "0 of 2" in below
    ctl("pause", "disk", "--seconds", "0", "--flush")
    assert "paused" in ctl("exports")
    ctl("resume", "disk")
    assert "paused" not in ctl("exports")
    ctl("unexport", "disk")
    ctl("export", "disk", "", "--writable")
    qemu_io(ctl.server, "write -P 3 0 64k")
    assert ctl("exports").splitlines()[2].split()[:3] == ["disk", '""', "disk"]


def test_images_are_amended_with_the_options_of_nbdq_amend(ctl: Ctl) -> None:
    ctl("amend", "disk", "-o", "lazy_refcounts=on,refcount_bits=64")
    ctl("amend", "disk", "-o", "lazy_refcounts=off")
    ctl("amend", "disk", "-o", "size=8M", "--shrink")
    about = json.loads(ctl("--json", "info", "disk"))[0]
    assert about["virtual-size"] == 8 << 20
    assert (about["format-specific"]["data"]["lazy-refcounts"], about["format-specific"]["data"]["refcount-bits"]) == (
        False,
        64,
    )
    assert "lazy_refcounts" in ctl("amend", "-o", "help")
    assert "nbdq ctl rebase" in ctl.refusal("amend", "disk", "-o", "backing_file=x")
    assert "image creation" in ctl.refusal("amend", "disk", "-o", "cluster_size=1M")
    assert ctl.run("amend", "disk").exit_code == 2


def test_layers_and_the_plan_of_a_commit_are_shown_in_lines(ctl: Ctl) -> None:
    shown = ctl("info", "disk")
    assert [line for line in shown.splitlines() if line.startswith("image: ")] == [
        f"image: {ctl.directory / name}" for name in ("disk.qcow2", "base.qcow2")
    ]
    plan = ctl("commit", "disk", "--dry-run").splitlines()
    assert plan[0].startswith("copies 4 MiB")
    assert plan[2] == f"{ctl.directory / 'disk.qcow2'}: drops out of the disk"
    ctl("threshold", "disk", "1G")
    assert json.loads(ctl("--json", "query-block"))[0]["inserted"]["write_threshold"] == 1 << 30


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("nbdq ctl -s SOCKET sn", "snapshot"),
        ("nbdq ctl -s SOCKET block-com", "block-commit"),
        ("nbdq ctl -s SOCKET commit d", "disk"),
        ("nbdq ctl -s SOCKET unexport d", "disk"),
        ("nbdq ctl -s SOCKET call query-blocks", "query-blockstats"),
        ("nbdq ctl -s SOCKET block-commit --top-n", "--top-node"),
        ("nbdq ctl -s SOCKET block-commit --on-error en", "enospc"),
    ],
)
def test_the_shell_completes_verbs_commands_options_and_names(ctl: Ctl, words: str, wanted: str) -> None:
    words = words.replace("SOCKET", ctl.socket)
    environment = {
        "_NBDQ_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    program = "from nbdq.cli import main; main(prog_name='nbdq')"
    process = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert f"plain,{wanted}" in process.stdout.splitlines(), process.stderr


def test_completion_without_a_server_offers_nothing_and_says_nothing(tmp_path: Path) -> None:
    environment = {"COMP_WORDS": f"nbdq ctl -s {tmp_path}/none commit d", "COMP_CWORD": "5"}
    program = "from nbdq.cli import main; main(prog_name='nbdq')"
    process = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "_NBDQ_COMPLETE": "bash_complete", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.stdout.strip(), process.stderr) == ("", "")

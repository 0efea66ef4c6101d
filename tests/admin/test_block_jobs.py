"""Commit, stream and rebase over the admin socket, on real disks: what QEMU's clients ask, and what a crash leaves."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdq.admin.client import AdminError, Client
from tests.support.administration import Administered, administered, chain, check, qemu_io, verified_load
from tests.support.serving import PATIENCE, Server
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io")


@pytest.fixture
def layers(tmp_path: Path) -> list[Path]:
    """base, middle and top of a disk that reads 1, 2, 3 and 4 in its first four MiB, and 0 behind."""
    paths = [tmp_path / f"{name}.qcow2" for name in ("base", "middle", "upper", "top")]
    below: list[str | Path] = []
    for number, path in enumerate(paths):
        run("qemu-img", "create", "-q", "-f", "qcow2", *below, path, "16M")
        run("qemu-io", "-c", f"write -P {number + 1} {number}M {4 - number}M", path)
        below = ["-b", path.name, "-F", "qcow2"]
    return paths


READS = ("read -P 1 0 1M", "read -P 2 1M 1M", "read -P 3 2M 1M", "read -P 4 3M 1M", "read -P 0 4M 12M")


def _names(path: Path) -> list[str]:
    return [Path(image["filename"]).name for image in chain(path)]


def test_an_intermediate_commit_takes_layers_out_of_the_chain(layers: list[Path]) -> None:
    base, _middle, upper, top = layers
    with administered(top) as server:
        server("block-commit", device="top", job_id="j", top=str(upper), base=str(base))
        server.wait_for_jobs()
        qemu_io(server, *READS)
    assert _names(top) == ["top.qcow2", "base.qcow2"]
    run("qemu-io", "-c", READS[0], "-c", READS[1], "-c", "read -P 3 2M 2M", base)
    check(base, top)


def test_a_commit_of_the_active_layer_waits_until_it_is_completed_and_sees_what_was_written_meanwhile(
    layers: list[Path],
) -> None:
    base, *_, top = layers
    with administered(top) as server:
        server("block-commit", device="top")
        events = server.client.events()
        while next(events)["event"] != "BLOCK_JOB_READY":
            pass
        qemu_io(server, "write -P 9 8M 1M", "flush")
        server("block-job-complete", device="top")
        server.wait_for_jobs()
        qemu_io(server, *READS[:4], "read -P 9 8M 1M")
        qemu_io(server, "write -P 8 9M 1M", "flush")
    run("qemu-io", *(word for read in READS[:4] for word in ("-c", read)), "-c", "read -P 9 8M 1M", base)
    run("qemu-io", "-c", "read -P 8 9M 1M", base)
    check(base)


def test_a_stream_takes_over_down_to_its_base(layers: list[Path]) -> None:
    _base, middle, _, top = layers
    with administered(top) as server:
        server("block-stream", device="top", base=str(middle))
        server.wait_for_jobs()
        assert _names(top) == ["top.qcow2", "middle.qcow2", "base.qcow2"]
        server("block-stream", device="top", bottom=str(middle))
        server.wait_for_jobs()
        qemu_io(server, *READS)
    assert _names(top) == ["top.qcow2", "base.qcow2"]
    check(top)


def test_a_rebase_over_nothing_leaves_one_image(layers: list[Path]) -> None:
    top = layers[-1]
    with administered(top) as server:
        assert "backing format must be specified" in server.refusal("x-nbdq-rebase", device="top", backing_file="x")
        server("x-nbdq-rebase", device="top", backing_file="")
        server.wait_for_jobs()
    assert _names(top) == ["top.qcow2"]
    run("qemu-io", *(word for read in READS for word in ("-c", read)), top)


def test_the_name_of_a_backing_file_is_changed_alone(layers: list[Path]) -> None:
    *_, upper, top = layers
    with administered(top) as server:
        server("change-backing-file", device="top", image_node_name=str(top), backing_file=str(upper))
        qemu_io(server, *READS)
    assert chain(top)[0]["backing-filename"] == str(upper)


def test_what_makes_no_sense_is_refused_and_changes_nothing(layers: list[Path]) -> None:
    base, middle, upper, top = map(str, layers)
    before = [path.read_bytes() for path in layers]
    with administered(top) as server:
        for refusal, arguments in {
            "is no layer": {"base": "/nowhere"},
            "both top and base": {"top": base, "base": base},
            "lies above": {"top": middle, "base": upper},
            "mutually exclusive": {"top": middle, "top_node": middle},
            "'top' is the active layer": {"backing_file": "x"},
            "negative": {"top": middle, "speed": -1},
            "would lose data": {"top": middle, "on_error": "ignore"},
            "Invalid job ID": {"top": middle, "job_id": "1 2"},
        }.items():
            assert refusal in server.refusal("block-commit", device="top", **arguments), refusal
        assert "Cannot find device" in server.refusal("block-commit", device="nobody")
        assert "mutually exclusive" in server.refusal("block-stream", device="top", base=base, bottom=middle)
        assert "does not lie below" in server.refusal("block-stream", device="top", x_nbdq_layer=base, base=top)
        assert server("query-jobs") == []
    assert [path.read_bytes() for path in layers] == before


def test_a_dry_run_says_what_a_commit_would_do_and_does_nothing(layers: list[Path]) -> None:
    base, middle, _, top = layers
    other = base.with_name("other.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", other)
    with administered(top) as server:
        plan = server("block-commit", device="top", top=str(middle), base=str(base), x_nbdq_dry_run=True)
        assert (plan["bytes"], plan["grows-by"], plan["drops"], plan["overlays"]) == (
            3 << 20,
            0,
            [str(middle)],
            [str(other)],
        )
        assert str(other) in server.refusal("block-commit", device="top", top=str(middle), base=str(base))
        server("block-commit", device="top", top=str(middle), base=str(base), x_nbdq_force=True)
        server.wait_for_jobs()
        qemu_io(server, *READS)


def test_a_template_is_not_committed_into(layers: list[Path], tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(f'[[directory]]\npath = "{tmp_path}"\ntemplates = ["base*"]\n')
    with administered("--volume-policy", policy, layers[-1]) as server:
        assert "is a template" in server.refusal("block-commit", device="top")


def test_a_second_operation_on_a_disk_is_refused_with_the_name_of_the_first(layers: list[Path]) -> None:
    base, middle, upper, top = map(str, layers)
    with administered(top) as server:
        server("block-commit", device="top", job_id="first", top=upper, base=middle, speed=1)
        server("block-commit", device="top", job_id="first", top=upper, base=middle, speed=1)
        for command, arguments in {
            "block-stream": {"job_id": "second"},
            "block-commit": {"job_id": "second", "top": middle, "base": base},
            "change-backing-file": {"image_node_name": top, "backing_file": upper},
        }.items():
            assert "job 'first'" in server.refusal(command, device="top", **arguments)
        assert "already in use" in server.refusal("block-stream", device="top", job_id="first")
        server("job-cancel", id="first")
        server.wait_for_jobs()
        qemu_io(server, *READS)
    assert _names(layers[-1]) == ["top.qcow2", "upper.qcow2", "middle.qcow2", "base.qcow2"]
    check(*layers)


@requires("fio")
def test_clients_notice_nothing_of_commits_and_streams_under_load(tmp_path: Path) -> None:
    disk, overlays = tmp_path / "disk.qcow2", [tmp_path / f"overlay-{number}.qcow2" for number in range(3)]
    run("qemu-img", "create", "-q", "-f", "qcow2", disk, "64M")
    run("qemu-io", "-c", "write -P 1 0 4M", disk)
    with administered(disk) as server:
        with verified_load(server, disk):
            for overlay in overlays:
                server("blockdev-snapshot-sync", device="disk", snapshot_file=str(overlay))
            server("block-commit", device="disk", top=str(overlays[1]), base=str(overlays[0]))
            server.wait_for_jobs()
            server("block-stream", device="disk", base=str(disk))
            server.wait_for_jobs()
            assert str(overlays[0]) in server.refusal("block-commit", device="disk", base=str(disk))
            overlays[0].unlink()  # it has dropped out, but still lies over the disk
            server("block-commit", device="disk", base=str(disk))
            while server("query-jobs")[0]["status"] != "ready":
                time.sleep(0.01)
            server("job-complete", id="disk")
            server.wait_for_jobs()
        qemu_io(server, "read -P 1 0 4M")
        assert [block["inserted"]["file"] for block in server("query-block")] == [str(disk)]
    check(disk)


class Restartable:
    """A server whose admin socket and state file stay where they are."""

    def __init__(self, directory: Path, image: Path) -> None:
        self._directory = directory
        self._words = ["--admin", directory / "admin", "--state", directory / "state", image]
        self.start()

    def start(self) -> None:
        self.server = Server(*self._words, directory=self._directory)
        self.server.wait_until_ready()
        self.administered = Administered(self.server, Client(str(self._directory / "admin"), timeout=PATIENCE))

    def kill(self) -> None:
        self.server.process.send_signal(signal.SIGKILL)
        self.server.kill()

    def end(self) -> None:
        assert self.server.terminate() == 0, self.server.stderr
        assert "Traceback" not in self.server.stderr
        self.server.kill()


@pytest.fixture
def restartable(layers: list[Path], tmp_path: Path) -> Iterator[Restartable]:
    server = Restartable(tmp_path, layers[-1])
    yield server
    server.server.kill()


@pytest.mark.parametrize(
    ("command", "ends"),
    [("block-commit", "kill"), ("block-commit", "end"), ("block-stream", "kill"), ("active", "kill")],
)
def test_a_job_goes_on_after_the_server_was_started_again(
    restartable: Restartable, layers: list[Path], command: str, ends: str
) -> None:
    base, _middle, upper, _top = map(str, layers)
    arguments = {
        "block-commit": {"top": upper, "base": base},
        "block-stream": {"base": base},
        "active": {"base": base},
    }[command]
    name = "block-commit" if command == "active" else command
    restartable.administered(name, device="top", job_id="j", speed=1, **arguments)
    getattr(restartable, ends)()
    restartable.start()
    server = restartable.administered
    assert [job["id"] for job in server("query-jobs")] == ["j"]
    server("block-job-set-speed", device="j", speed=0)
    if command == "active":
        while server("query-jobs")[0]["status"] != "ready":
            pass
        server("job-complete", id="j")
    server.wait_for_jobs()
    qemu_io(server, *READS)
    qemu_io(server, "write -P 7 10M 1M", "flush")
    restartable.kill()
    restartable.start()
    assert restartable.administered("query-jobs") == []
    qemu_io(restartable.administered, *READS[:4], "read -P 7 10M 1M")
    restartable.end()
    present = layers[0] if command == "active" else layers[-1]
    assert _names(present) == (["base.qcow2"] if command == "active" else ["top.qcow2", "base.qcow2"])
    check(present)


def test_the_new_top_is_opened_after_a_restart_wherever_it_lies(
    restartable: Restartable, layers: list[Path], tmp_path: Path
) -> None:
    for number in range(3):
        directory = tmp_path / f"directory-{number}"
        directory.mkdir()
        restartable.administered("blockdev-snapshot-sync", device="top", snapshot_file=str(directory / "overlay"))
        qemu_io(restartable.administered, f"write -P {number + 5} {number + 4}M 1M", "flush")
    restartable.kill()
    restartable.start()
    qemu_io(restartable.administered, *READS[:4], "read -P 5 4M 1M", "read -P 6 5M 1M", "read -P 7 6M 1M")
    restartable.end()
    state = json.loads((tmp_path / "state").read_text())
    assert state["disks"][str(layers[-1])]["top"]["path"] == str(tmp_path / "directory-2" / "overlay")


def test_a_damaged_state_file_keeps_the_server_from_starting(layers: list[Path], tmp_path: Path) -> None:
    (tmp_path / "state").write_text("{}")
    server = Server("--state", tmp_path / "state", layers[-1], directory=tmp_path)
    assert server.process.wait(PATIENCE) == 1
    server.kill()
    assert "not a usable state file" in server.stderr
    assert len(server.stderr.splitlines()) == 1


def test_a_commit_goes_on_where_it_was_durable_and_still_waits_to_be_finalized(
    restartable: Restartable, layers: list[Path], tmp_path: Path
) -> None:
    base, _, upper, _ = map(str, layers)
    for attempt in range(2):
        server = restartable.administered
        if attempt == 0:
            server("block-commit", device="top", top=upper, base=base, auto_finalize=False)
        while server("query-jobs")[0]["status"] != "pending":
            pass
        record = json.loads((tmp_path / "state").read_text())["disks"][str(layers[-1])]["jobs"][0]
        assert record["offset"] == 4 << 20  # there is nothing behind it
        if attempt == 0:
            restartable.kill()
            restartable.start()
    assert server("query-jobs")[0]["total-progress"] == 0  # nothing was left to be copied
    server("job-finalize", id="top")
    server.wait_for_jobs()
    qemu_io(server, *READS)
    restartable.end()
    assert _names(layers[-1]) == ["top.qcow2", "base.qcow2"]
    check(layers[0], layers[-1])


def test_two_servers_do_not_share_a_state_file(restartable: Restartable, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    run("qemu-img", "create", "-q", "-f", "qcow2", other / "disk.qcow2", "1M")
    server = Server("--state", tmp_path / "state", other / "disk.qcow2", directory=other)
    assert server.process.wait(PATIENCE) == 1
    server.kill()
    assert "another server uses this state file" in server.stderr
    restartable.end()
    restartable.start()


def test_a_client_that_hangs_up_in_the_middle_of_a_job_changes_nothing_for_it(layers: list[Path]) -> None:
    _base, *_, top = map(str, layers)
    with administered(top) as server:
        path = server.client.path
        with Client(path, timeout=PATIENCE) as starter:
            starter.call("block-stream", {"device": "top", "job-id": "j", "speed": 1})
        server("block-job-set-speed", device="j", speed=0)
        server.wait_for_jobs()
        qemu_io(server, *READS)
        with pytest.raises(AdminError, match="not found"):
            server("job-cancel", id="j")
    assert _names(layers[-1]) == ["top.qcow2"]

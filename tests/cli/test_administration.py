"""The options of ``nbdq serve`` that let administrators in, and how jobs are shown on a terminal."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from nbdq.admin.client import Client
from nbdq.cli.ctl.follow import Progress, job_text
from nbdq.cli.ctl.output import size_text
from tests.support.cli import run_nbdq
from tests.support.serving import PATIENCE, refusal, serve
from tests.support.tools import requires, run

pytestmark = requires("qemu-img")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    return path


def test_the_admin_socket_has_the_mode_and_the_group_that_were_wanted(disk: Path, tmp_path: Path) -> None:
    admin = tmp_path / "admin"
    with serve("--admin", admin, "--admin-mode", "0660", "--admin-group", str(os.getegid()), disk):
        status = admin.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, os.getegid())
    assert not admin.exists()


def test_a_change_is_logged_with_the_user_however_quiet_the_server_is(disk: Path, tmp_path: Path) -> None:
    with serve("--admin", tmp_path / "admin", disk) as server:
        with Client(str(tmp_path / "admin"), timeout=PATIENCE) as client:
            client.call("query-block")
            client.call("block_resize", {"device": "disk", "size": 2 << 20})
        assert f"uid {os.geteuid()}" in server.stderr
        assert "block_resize" in server.stderr
        assert "query-block" not in server.stderr


def test_an_admin_socket_that_somebody_listens_on_is_left_alone(disk: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", other, "1M")
    with serve("--admin", tmp_path / "admin", disk):
        assert "another server listens there" in refusal("--admin", tmp_path / "admin", other)
        with Client(str(tmp_path / "admin"), timeout=PATIENCE) as client:
            assert client.call("query-status")["running"]


def test_a_policy_that_cannot_be_is_one_line(disk: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("[[directory]]\npath = 1\n")
    assert len(refusal("--volume-policy", policy, disk).splitlines()) == 1


@pytest.mark.parametrize(
    "words", [("--admin-user", "nobody-of-that-name"), ("--admin-group", "no-such-group"), ("--admin-mode", "9")]
)
def test_what_is_no_user_group_or_mode_is_misuse(disk: Path, words: tuple[str, str]) -> None:
    result = run_nbdq("serve", *words, disk)
    assert result.exit_code == 2
    assert words[1] in result.stderr


JOB: dict[str, Any] = {
    "device": "disk",
    "type": "commit",
    "status": "running",
    "offset": 3 << 29,
    "len": 3 << 30,
    "x-nbdq-rate": 1 << 28,
    "x-nbdq-eta": 6,
}


def test_a_job_is_one_line_with_its_speed_and_the_time_that_is_left() -> None:
    assert job_text(JOB) == "disk: commit running, 50.0% (1.5 GiB of 3 GiB), 256 MiB/s, 6 s left"
    assert job_text(JOB | {"status": "concluded", "error": "a\nb"}).endswith(": a\\nb")
    assert [size_text(size) for size in (0, 1023, 1024, 1 << 60)] == ["0 B", "1023 B", "1 KiB", "1 EiB"]


def test_on_a_terminal_one_line_changes_and_elsewhere_each_tenth_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for on_terminal in (True, False):
        monkeypatch.setattr("sys.stdout.isatty", lambda on_terminal=on_terminal: on_terminal)
        progress = Progress(as_json=False)
        for percent in range(101):
            progress.show(JOB | {"offset": percent * JOB["len"] // 100})
        progress.end("done")
        said = capsys.readouterr().out
        assert said.endswith("done\n")
        assert said.count("\n") == (1 if on_terminal else 12)
        assert ("\r" in said) is on_terminal

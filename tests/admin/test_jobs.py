"""Jobs as administrators see them: states, orders, events, and who may work on a disk at the same time."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdq.admin.client import AdminError, Client
from nbdq.errors import OperationError
from tests.admin.laboratory import AdminServer

Event = dict[str, Any]


def _until(client: Client, wanted: Callable[[Event], bool]) -> list[tuple[str, str]]:
    """Events up to the wanted one: names, with the status where there is one."""
    seen = []
    for event in client.events():
        seen.append((event["event"], event["data"].get("status", "")))
        if wanted(event):
            break
    return seen


def _is(name: str, status: str = "") -> Callable[[Event], bool]:
    return lambda event: event["event"] == name and event["data"].get("status", "") == status


def _statuses(*names: str) -> list[tuple[str, str]]:
    return [("JOB_STATUS_CHANGE", name) for name in names]


def _start(client: Client, **arguments: Any) -> None:
    given = {name.replace("_", "-"): value for name, value in arguments.items()}
    client.call("x-test-job", {"device": "disk", "job-id": "j"} | given)


def _work(server: AdminServer, pieces: int = 1) -> None:
    server.operations["j"].may_work.release(pieces)


GONE = _is("JOB_STATUS_CHANGE", "null")


def test_a_job_goes_through_the_states_that_qemu_has_and_pivots_while_the_disk_is_drained(server: AdminServer) -> None:
    with server.client() as client:
        _start(client, pieces=3)
        assert client.call("query-jobs") == [
            {"id": "j", "type": "commit", "status": "running", "current-progress": 0, "total-progress": 3}
        ]
        _work(server, 3)
        assert _until(client, GONE) == [
            *_statuses("created", "running", "waiting", "pending"),
            ("BLOCK_JOB_COMPLETED", ""),
            *_statuses("concluded", "null"),
        ]
        assert server.operations["j"].calls == ["run", "pivot", "finish"]
        assert client.call("query-jobs") == []


def test_a_mirroring_job_gets_ready_and_changes_the_disk_only_when_it_is_completed(server: AdminServer) -> None:
    with server.client() as client:
        _start(client, mirror=True)
        with pytest.raises(AdminError, match="state 'running' cannot accept command verb 'complete'"):
            client.call("block-job-complete", {"device": "j"})
        _work(server)
        assert _until(client, _is("BLOCK_JOB_READY"))[-2:] == [("JOB_STATUS_CHANGE", "ready"), ("BLOCK_JOB_READY", "")]
        assert client.call("query-block-jobs")[0]["ready"]
        client.call("job-pause", {"id": "j"})
        assert client.call("query-jobs")[0]["status"] == "standby"
        with pytest.raises(AdminError, match="cannot be completed"):
            client.call("job-complete", {"id": "j"})
        client.call("job-resume", {"id": "j"})
        client.call("block-job-complete", {"device": "j"})
        events = _until(client, GONE)
    assert events[:4] == _statuses("standby", "ready", "waiting", "pending")
    assert server.operations["j"].calls == ["run", "pivot", "finish"]


@pytest.mark.parametrize("force", [True, False])
def test_a_ready_job_that_is_cancelled_leaves_the_disk_alone(server: AdminServer, force: bool) -> None:
    with server.client() as client:
        _start(client, mirror=True)
        _work(server)
        _until(client, _is("BLOCK_JOB_READY"))
        client.call("block-job-cancel", {"device": "j", "force": force})
        names = [name for name, _ in _until(client, GONE)]
    assert ("BLOCK_JOB_CANCELLED" in names) is force
    assert ("BLOCK_JOB_COMPLETED" in names) is not force
    assert server.operations["j"].calls == ["run", "abort"]


@pytest.mark.parametrize("paused", [False, True])
def test_a_running_job_can_be_cancelled_and_says_so(server: AdminServer, paused: bool) -> None:
    with server.client() as client:
        _start(client, pieces=1000)
        if paused:
            client.call("job-pause", {"id": "j"})
        client.call("job-cancel", {"id": "j"})
        assert _until(client, GONE)[-4:] == [
            *_statuses("aborting"),
            ("BLOCK_JOB_CANCELLED", ""),
            *_statuses("concluded", "null"),
        ]
    assert server.operations["j"].calls == ["run", "abort"]


def test_a_paused_job_does_nothing_until_it_is_resumed(server: AdminServer) -> None:
    with server.client() as client:
        _start(client, pieces=2)
        client.call("block-job-pause", {"device": "j"})
        with pytest.raises(AdminError, match="already paused"):
            client.call("job-pause", {"id": "j"})
        info = client.call("query-block-jobs")[0]
        assert (info["status"], info["paused"], info["busy"]) == ("paused", True, False)
        _work(server, 2)
        assert client.call("query-jobs")[0]["status"] == "paused"
        client.call("block-job-resume", {"device": "j"})
        _until(client, GONE)
        with pytest.raises(AdminError, match="not found"):
            client.call("job-resume", {"id": "j"})


def test_a_job_waits_to_be_finalized_and_to_be_dismissed_if_that_is_wanted(server: AdminServer) -> None:
    with server.client() as client:
        _start(client, auto_finalize=False, auto_dismiss=False)
        _work(server)
        _until(client, _is("BLOCK_JOB_PENDING"))
        assert server.operations["j"].calls == ["run"]
        with pytest.raises(AdminError, match="cannot accept command verb 'dismiss'"):
            client.call("job-dismiss", {"id": "j"})
        client.call("job-finalize", {"id": "j"})
        _until(client, _is("JOB_STATUS_CHANGE", "concluded"))
        assert client.call("query-jobs")[0]["status"] == "concluded"
        _start(client, auto_finalize=False, auto_dismiss=False)  # asked for twice: it has been done
        client.call("job-dismiss", {"id": "j"})
        assert client.call("query-jobs") == []


def test_a_pending_job_can_still_be_cancelled(server: AdminServer) -> None:
    with server.client() as client:
        _start(client, auto_finalize=False)
        _work(server)
        _until(client, _is("BLOCK_JOB_PENDING"))
        client.call("job-cancel", {"id": "j"})
        assert ("BLOCK_JOB_CANCELLED", "") in _until(client, GONE)
    assert server.operations["j"].calls == ["run", "abort"]


@pytest.mark.parametrize("phase", ["run", "pivot"])
@pytest.mark.parametrize("number", [errno.EIO, 0])
def test_a_job_that_fails_says_why_and_gives_up_what_it_holds(server: AdminServer, phase: str, number: int) -> None:
    with server.client() as client:
        _start(client, fail_in=phase, errno=number, auto_dismiss=False)
        _work(server)
        assert ("JOB_STATUS_CHANGE", "aborting") in _until(client, _is("JOB_STATUS_CHANGE", "concluded"))
        assert client.call("query-jobs")[0]["error"] == (os.strerror(errno.EIO) if number else "no")
    assert server.operations["j"].calls[-1] == "abort"


@pytest.mark.parametrize("phase", ["run", "pivot", "finish", "abort"])
def test_no_bug_keeps_a_job_from_its_end(server: AdminServer, phase: str) -> None:
    with server.client() as client:
        _start(client, fail_in="run" if phase == "abort" else None, bug_in=phase, auto_dismiss=False)
        _work(server)
        _until(client, _is("JOB_STATUS_CHANGE", "concluded"))
        assert ("internal error" in client.call("query-jobs")[0]["error"]) is (phase != "abort")
        client.call("job-dismiss", {"id": "j"})
        _start(client)
        _work(server)
        _until(client, GONE)


def test_a_job_whose_end_cannot_be_recorded_takes_back_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AdminServer(tmp_path, state=str(tmp_path / "state")) as server, server.client() as client:
        _start(client, persistent=True, auto_dismiss=False)
        real = os.rename

        def full(old: str, new: str) -> None:
            monkeypatch.setattr(os, "rename", real)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), new)

        monkeypatch.setattr(os, "rename", full)
        _work(server)
        _until(client, _is("JOB_STATUS_CHANGE", "concluded"))
        assert "No space left" in client.call("query-jobs")[0]["error"]
    assert server.operations["j"].calls == ["run", "pivot", "revert", "abort"]


def test_a_full_medium_pauses_a_job_that_is_to_stop_for_it(server: AdminServer) -> None:
    with server.client() as client:
        _start(client, fail_in="run", errno=errno.ENOSPC, on_error="enospc")
        events = _until(client, _is("JOB_STATUS_CHANGE", "paused"))
        assert ("BLOCK_JOB_ERROR", "") in events
        info = client.call("query-block-jobs")[0]
        assert (info["io-status"], info["status"]) == ("nospace", "paused")
        client.call("job-resume", {"id": "j"})
        _work(server)
        assert ("BLOCK_JOB_COMPLETED", "") in _until(client, GONE)
    assert server.operations["j"].calls == ["run", "run", "pivot", "finish"]


def test_asking_twice_for_a_job_is_answered_twice_and_another_of_its_name_is_refused(server: AdminServer) -> None:
    with server.client() as client:
        _start(client, pieces=3)
        first = server.operations["j"]
        _start(client, pieces=3)
        assert server.operations["j"] is first
        with pytest.raises(AdminError, match="Job ID 'j' already in use"):
            _start(client, pieces=4)
        with pytest.raises(AdminError, match="Invalid job ID"):
            _start(client, job_id="a b")


def test_one_job_at_a_time_restructures_a_disk_and_the_second_is_told_of_the_first(server: AdminServer) -> None:
    with server.client() as client:
        _start(client, layers=["b", "c"])
        for layers in (["a", "b"], ["a"], None):
            with pytest.raises(AdminError, match=r"in use by job 'j' \(commit\)"):
                _start(client, job_id="k", layers=layers)
        _start(client, job_id="l", device="other")
        _work(server)
        _until(client, GONE)
        _start(client, job_id="m", layers=["b", "c"])


def test_who_looks_at_layers_is_in_the_way_of_those_who_change_these_alone(server: AdminServer) -> None:
    async def look(layers: frozenset[str] | None, *, shared: bool) -> bool:
        try:
            with server.administration.jobs.exclusive(volume, "a look", layers, shared=shared):
                return True
        except OperationError:
            return False

    def can(layers: set[str] | None, *, shared: bool) -> bool:
        return server.run(look(None if layers is None else frozenset(layers), shared=shared))

    volume: Any = server.volumes[0]
    with server.client() as client:
        _start(client, layers=["b", "c"])
        assert can({"a"}, shared=True)
        assert can(set(), shared=False)
        assert not can({"b"}, shared=True)
        assert not can({"a"}, shared=False)
        assert not can(None, shared=True)


def test_a_job_survives_the_client_that_started_it(server: AdminServer) -> None:
    with server.client() as watcher:
        with server.client() as starter:
            _start(starter)
        _work(server)
        assert _until(watcher, GONE)
    assert server.operations["j"].calls == ["run", "pivot", "finish"]


def test_the_speed_of_a_job_can_be_set_while_it_runs(server: AdminServer) -> None:
    with server.client() as client:
        _start(client)
        client.call("block-job-set-speed", {"device": "j", "speed": 4096})
        assert client.call("query-block-jobs")[0]["speed"] == 4096
        with pytest.raises(AdminError, match="negative"):
            client.call("block-job-set-speed", {"device": "j", "speed": -1})


def test_a_persistent_job_starts_again_with_the_next_server_and_ends_once(tmp_path: Path) -> None:
    path = tmp_path / "state"
    for attempt in range(3):
        with AdminServer(tmp_path, state=str(path)) as server, server.client() as client:
            if attempt == 0:
                _start(client, persistent=True)
            elif attempt == 1:
                assert client.call("query-jobs")[0]["id"] == "j"
                _work(server)
                _until(client, GONE)
                assert server.operations["j"].calls == ["run", "pivot", "finish"]
            else:
                assert client.call("query-jobs") == []
        if attempt == 0:
            assert server.operations["j"].calls == ["run", "abort"]
            assert json.loads(path.read_text())["disks"][server.image]["jobs"][0]["id"] == "j"


def test_a_job_that_cannot_start_again_is_dropped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state"
    with AdminServer(tmp_path, state=str(path)) as server, server.client() as client:
        _start(client, persistent=True)
    path.write_text(path.read_text().replace("x-test-job", "x-former-job"))
    with AdminServer(tmp_path, state=str(path)) as server, server.client() as client:
        assert client.call("query-jobs") == []
    assert "does not go on" in caplog.text
    assert "x-former-job" not in path.read_text()

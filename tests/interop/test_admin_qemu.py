"""QEMU's own client library, and scripts that were written for its storage daemon, on the admin socket: the same calls
to both servers, and answers, events and errors that such a script cannot tell apart.
"""

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient
from qemu.qmp.qmp_client import ExecuteError

from nbdq.admin.client import Client
from tests.random.live_sides import Daemon, Nbdq, Side
from tests.support.operations import Operation, Verb
from tests.support.oracles import block_status
from tests.support.serving import PATIENCE
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io", "qemu-storage-daemon")

Talk = Callable[[QMPClient, Side], Awaitable[Any]]
LAYERS = ("base", "disk")


class _Daemon(Daemon):
    """With the node names that nbdq has."""

    def node_of(self, path: Path) -> str:
        return path.stem


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[tuple[Nbdq, Daemon]]:
    """Both servers, each with a disk of two layers whose node is called "disk" and whose export "disk"."""
    ours, theirs = Nbdq(), _Daemon()
    with ExitStack() as stack:
        for side in (ours, theirs):
            (tmp_path / side.name).mkdir()
            base, top = (tmp_path / side.name / f"{name}.qcow2" for name in LAYERS)
            run("qemu-img", "create", "-q", "-f", "qcow2", base, "16M")
            run("qemu-io", "-c", "write -P 1 0 4M", base)
            run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
            run("qemu-io", "-c", "write -P 2 2M 4M", top)
            stack.enter_context(side.serving([base, top], ["qcow2", "qcow2"], []))
        yield ours, theirs


def talk_to(side: Side, talk: Talk) -> Any:
    """What ``talk`` returns of its conversation with one server."""

    async def converse() -> Any:
        client = QMPClient(side.name)
        await client.connect(side.client.path)
        try:
            return await talk(client, side)
        finally:
            await client.disconnect()

    side.client.close()  # QEMU's monitor has one client at a time
    try:
        return asyncio.run(asyncio.wait_for(converse(), 20))
    finally:
        side.client = Client(side.client.path, timeout=PATIENCE)


def same(sides: tuple[Nbdq, Daemon], talk: Talk) -> Any:
    """What both conversations return alike."""
    ours, theirs = (talk_to(side, talk) for side in sides)
    assert ours == theirs
    return ours


async def until(client: QMPClient, job: str, *wanted: str) -> list[tuple[str, Any]]:
    """Listen until the job has one of these states; what was told of it, in order."""
    told = []
    async for event in client.events:
        data = event["data"]
        if data.get("id", data.get("device")) != job:
            continue
        about = {key: value for key, value in data.items() if key in ("status", "type", "error", "id", "device")}
        told.append((event["event"], about))
        if data.get("status") in wanted:
            return told
    raise AssertionError("the events have ended")


async def snapshot(client: QMPClient, side: Side, name: str, node: str = "disk") -> None:
    """Put a node of that name in front of another one."""
    file = str(side.layers[-1].with_name(f"{name}.qcow2"))
    await client.execute(
        "blockdev-snapshot-sync", {"node-name": node, "snapshot-file": file, "snapshot-node-name": name}
    )


def test_a_snapshot_and_its_commit_are_told_as_qemu_tells_them(sides: tuple[Nbdq, Daemon]) -> None:
    async def talk(client: QMPClient, side: Side) -> Any:
        await snapshot(client, side, "overlay")
        commit = {"device": "overlay", "job-id": "j", "auto-dismiss": False, "auto-finalize": False}
        await client.execute("block-commit", commit | {"base": str(side.layers[-1])})
        told = await until(client, "j", "ready")
        await client.execute("job-complete", {"id": "j"})
        told += await until(client, "j", "pending")
        (job,) = await client.execute("query-jobs")
        assert job["status"] == "pending"
        await client.execute("job-finalize", {"id": "j"})
        told += await until(client, "j", "concluded")
        await client.execute("job-dismiss", {"id": "j"})
        return told + await until(client, "j", "null")

    told = same(sides, talk)
    assert [event for event, _ in told].count("JOB_STATUS_CHANGE") == 7
    for side in sides:
        run("qemu-io", "-r", "-f", "raw", "-c", "read -P 1 0 2M", "-c", "read -P 2 2M 4M", side.uri)


def test_an_intermediate_commit_and_a_stream_are_told_as_qemu_tells_them(sides: tuple[Nbdq, Daemon]) -> None:
    async def talk(client: QMPClient, side: Side) -> Any:
        await snapshot(client, side, "one")
        await snapshot(client, side, "two", "one")
        await snapshot(client, side, "three", "two")
        await client.execute(
            "block-commit", {"device": "three", "job-id": "j", "top-node": "two", "base-node": "one", "speed": 0}
        )
        told = await until(client, "j", "null")
        await client.execute("block-stream", {"device": "three", "job-id": "j", "base": str(side.layers[-1])})
        return told + await until(client, "j", "null")

    same(sides, talk)


def test_a_cancelled_job_is_told_as_qemu_tells_it(sides: tuple[Nbdq, Daemon]) -> None:
    async def talk(client: QMPClient, side: Side) -> Any:
        await snapshot(client, side, "one")
        await client.execute("block-stream", {"device": "one", "job-id": "j", "speed": 65536})
        told = await until(client, "j", "running")
        await client.execute("block-job-pause", {"device": "j"})
        told += await until(client, "j", "paused")
        (job,) = await client.execute("query-block-jobs")
        assert (job["paused"], job["ready"], job["io-status"], job["speed"]) == (True, False, "ok", 65536)
        await client.execute("block-job-resume", {"device": "j"})
        told += await until(client, "j", "running")
        await client.execute("block-job-cancel", {"device": "j"})
        told += await until(client, "j", "null")
        await client.execute("block-commit", {"device": "one", "job-id": "j", "base": str(side.layers[-1])})
        told += await until(client, "j", "ready")
        await client.execute("block-job-cancel", {"device": "j"})
        return told + await until(client, "j", "null")

    same(sides, talk)


#: Questions whose answers must have the same members. What only one of them has to tell is told elsewhere.
QUESTIONS = ("query-jobs", "query-block-jobs", "query-block-exports", "query-named-block-nodes")


def test_answers_have_the_members_that_scripts_for_qemu_read(sides: tuple[Nbdq, Daemon]) -> None:
    async def talk(client: QMPClient, side: Side) -> dict[str, dict[str, type]]:
        await snapshot(client, side, "one")
        await client.execute("block-dirty-bitmap-add", {"node": "one", "name": "b", "persistent": True})
        await client.execute("block-stream", {"device": "one", "job-id": "j", "speed": 65536})
        await until(client, "j", "running")
        found = {}
        for question in QUESTIONS:
            answers = await client.execute(question)
            if question == "query-named-block-nodes":
                answers = [each for each in answers if each["node-name"] == "one"]
            found[question] = _shape(answers)
        await client.execute("job-cancel", {"id": "j"})
        await until(client, "j", "null")
        return found

    ours, theirs = (talk_to(side, talk) for side in sides)
    for question in QUESTIONS:
        missing = {path: kind for path, kind in theirs[question].items() if ours[question].get(path) is not kind}
        assert not missing, (question, missing)


def _shape(answer: Any, path: str = "") -> dict[str, type]:
    """Every member, by the way to it, with its type; lists by their first item."""
    if isinstance(answer, dict):
        return {way: kind for key, value in answer.items() for way, kind in _shape(value, f"{path}.{key}").items()}
    if isinstance(answer, list):
        return _shape(answer[0], f"{path}[]") if answer else {}
    return {path: type(answer)}


#: What cannot be done, and why; {overlay} is a path for an overlay.
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("frobnicate", {}),
    ("query-jobs", {"a": 1}),
    ("job-cancel", {}),
    ("job-cancel", {"id": "nobody"}),
    ("job-dismiss", {"id": "nobody"}),
    ("block-job-cancel", {"device": "nobody"}),
    ("block-job-set-speed", {"device": "nobody", "speed": 1}),
    ("block-job-dismiss", {"id": "nobody"}),
    ("block-commit", {"device": "nobody", "job-id": "j"}),
    ("block-commit", {"device": "disk", "job-id": "0 j"}),
    ("block-commit", {"device": "disk", "job-id": "j", "base": "/nowhere"}),
    ("block-stream", {"device": "nobody", "job-id": "j"}),
    ("block-stream", {"device": "disk", "job-id": "j", "base": "/nowhere"}),
    ("block-stream", {"device": "disk", "job-id": "j", "speed": -1}),
    ("block_resize", {"node-name": "nobody", "size": 1 << 20}),
    ("block_resize", {"node-name": "disk", "size": -512}),
    ("block-dirty-bitmap-add", {"node": "nobody", "name": "b"}),
    ("block-dirty-bitmap-add", {"node": "disk", "name": "b", "granularity": 3}),
    ("block-dirty-bitmap-remove", {"node": "disk", "name": "nothing"}),
    ("block-dirty-bitmap-merge", {"node": "disk", "target": "nothing", "bitmaps": []}),
    ("blockdev-snapshot-sync", {"node-name": "nobody", "snapshot-file": "{overlay}"}),
    ("blockdev-snapshot-sync", {"node-name": "disk", "snapshot-file": "{overlay}", "mode": "sometimes"}),
    ("blockdev-snapshot-internal-sync", {"device": "nobody", "name": "x"}),
    ("blockdev-snapshot-internal-sync", {"device": "disk", "name": ""}),
    ("blockdev-snapshot-delete-internal-sync", {"device": "disk", "name": "x"}),
    ("block-export-add", {"type": "nbd", "id": "f", "node-name": "nobody"}),
    ("block-export-add", {"type": "nbd", "id": "", "node-name": "disk"}),
    ("block-export-del", {"id": "nobody"}),
    ("transaction", {"actions": [{"type": "frobnicate", "data": {}}]}),
    ("transaction", {"actions": [{"type": "abort", "data": {}}]}),
    ("change-backing-file", {"device": "nobody", "image-node-name": "disk", "backing-file": "x"}),
]


def test_errors_are_of_the_classes_that_qemu_gives_them_or_say_more(sides: tuple[Nbdq, Daemon]) -> None:
    async def talk(client: QMPClient, side: Side) -> list[tuple[str, dict[str, Any], str]]:
        found = []
        for command, arguments in REFUSED:
            overlay = str(side.layers[-1].with_name("overlay.qcow2"))
            given = {key: overlay if value == "{overlay}" else value for key, value in arguments.items()}
            try:
                await client.execute(command, given)
            except ExecuteError as error:
                found.append((command, arguments, error.error_class))
            else:
                found.append((command, arguments, "done"))
        return found

    ours, theirs = (talk_to(side, talk) for side in sides)
    for mine, other in zip(ours, theirs, strict=True):
        # Of something that is not there QEMU says so in some commands only, nbdq in all.
        assert mine == other or (mine[2], other[2]) == ("DeviceNotFound", "GenericError"), (mine, other)


def test_backups_that_libvirts_clients_make_work_unchanged(sides: tuple[Nbdq, Daemon]) -> None:
    """A full backup with a new bitmap, then an incremental one that shows the old one: bitmaps and exports."""

    async def talk(client: QMPClient, side: Side) -> Any:
        await client.execute(
            "transaction",
            {
                "actions": [
                    {"type": "block-dirty-bitmap-add", "data": {"node": "disk", "name": "b0", "persistent": True}}
                ]
            },
        )
        export = {"type": "nbd", "id": "backup", "node-name": "disk", "name": "backup"}
        await client.execute("block-export-add", export)
        await client.execute("block-export-del", {"id": "backup", "mode": "hard"})
        await until_deleted(client)
        side.guest([Operation(Verb.WRITE, 1 << 20, 1 << 20, 1), Operation(Verb.FLUSH)])
        actions = [
            {"type": "block-dirty-bitmap-add", "data": {"node": "disk", "name": "b1", "persistent": True}},
            {"type": "block-dirty-bitmap-disable", "data": {"node": "disk", "name": "b0"}},
            {"type": "block-dirty-bitmap-add", "data": {"node": "disk", "name": "shown", "disabled": True}},
            {"type": "block-dirty-bitmap-merge", "data": {"node": "disk", "target": "shown", "bitmaps": ["b0"]}},
        ]
        await client.execute("transaction", {"actions": actions})
        await client.execute("block-export-add", export | {"bitmaps": ["shown"]})
        shown = block_status([side.uri.replace("///disk", "///backup")], "qemu:dirty-bitmap:shown")
        await client.execute("block-export-del", {"id": "backup", "mode": "hard"})
        await until_deleted(client)
        await client.execute("block-dirty-bitmap-remove", {"node": "disk", "name": "shown"})
        await client.execute(
            "block-dirty-bitmap-merge", {"node": "disk", "target": "b1", "bitmaps": [{"node": "disk", "name": "b0"}]}
        )
        await client.execute("block-dirty-bitmap-remove", {"node": "disk", "name": "b0"})
        nodes = await client.execute("query-named-block-nodes", {"flat": True})
        (node,) = [node for node in nodes if node["node-name"] == "disk"]
        return shown, node["dirty-bitmaps"]

    shown, _ = same(sides, talk)
    assert [(each.offset, each.length) for each in shown if each.value] == [(1 << 20, 1 << 20)]


async def until_deleted(client: QMPClient) -> None:
    async for event in client.events:
        if event["event"] == "BLOCK_EXPORT_DELETED":
            return


def test_qmp_shell_speaks_to_the_socket(sides: tuple[Nbdq, Daemon]) -> None:
    ours, _ = sides
    lines = "query-version\nblock-dirty-bitmap-add node=disk name=shell persistent=true\nquery-block-jobs\n"
    shell = [sys.executable, "-m", "qemu.qmp.qmp_shell", ours.client.path]
    done = subprocess.run(shell, input=lines, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert ours.bitmaps() == ["shell"], done.stdout

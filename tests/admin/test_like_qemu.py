"""The same orders to qemu-storage-daemon and to nbdq: the same answers, errors of the same class, the same events."""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdq.admin.client import AdminError, Client
from tests.support.administration import administered
from tests.support.serving import PATIENCE
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io", "qemu-storage-daemon")

NAMES = ("base", "middle", "upper", "top")


def _layers(directory: Path) -> list[Path]:
    directory.mkdir()
    paths = [directory / f"{name}.qcow2" for name in NAMES]
    below: list[str | Path] = []
    for number, path in enumerate(paths):
        run("qemu-img", "create", "-q", "-f", "qcow2", *below, path, "16M")
        run("qemu-io", "-c", f"write -P {number + 1} {number}M 1M", path)
        below = ["-b", path, "-F", "qcow2"]
    return paths


@contextmanager
def _qemu(layers: list[Path]) -> Iterator[Client]:
    """A qemu-storage-daemon that has the chain open, with the node names of NAMES."""
    with tempfile.TemporaryDirectory(prefix="nbdq-") as directory:
        socket = Path(directory, "qmp")
        node: dict[str, Any] | None = None
        for name, path in zip(NAMES, layers, strict=True):
            file = {"driver": "file", "filename": str(path)}
            node = {"driver": "qcow2", "node-name": name, "file": file, "backing": node}
        command = [
            *("qemu-storage-daemon", "--blockdev", json.dumps(node)),
            *("--chardev", f"socket,path={socket},server=on,wait=off,id=c", "--monitor", "chardev=c"),
        ]
        with subprocess.Popen(command) as process:
            try:
                with _connected(socket) as client:
                    yield client
            finally:
                process.kill()


def _connected(socket: Path) -> Client:
    """A client of somebody who is about to listen there."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return Client(str(socket), timeout=PATIENCE)
        except AdminError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@contextmanager
def _nbdq(layers: list[Path]) -> Iterator[Client]:
    with administered(layers[-1]) as server:
        yield server.client


class Story:
    """What a client hears."""

    def __init__(self, client: Client, layers: list[Path]) -> None:
        self.client = client
        self.path = {name: str(path) for name, path in zip(NAMES, layers, strict=True)}
        self.heard: list[Any] = []

    def call(self, command: str, **arguments: Any) -> None:
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            self.heard.append(self.client.call(command, given))
        except AdminError as error:
            self.heard.append(error.kind)

    def until(self, name: str, status: str | None = None) -> None:
        """Listen up to this event."""
        for event in self.client.events():
            if not event["event"].startswith(("JOB_", "BLOCK_JOB")):
                continue  # nbdq says more than QEMU, on other things
            self.heard.append([event["event"], {**event["data"], "len": 0, "offset": 0}])
            if event["event"] == name and status in (None, event["data"].get("status")):
                return

    def the_end(self) -> None:
        self.until("JOB_STATUS_CHANGE", "null")
        self.call("query-jobs")


def _intermediate_commit(story: Story) -> None:
    story.call("block-commit", job_id="j", device="top", top=story.path["middle"], base=story.path["base"])
    story.the_end()


def _active_commit(story: Story) -> None:
    story.call("block-commit", job_id="j", device="top", base=story.path["middle"])
    story.until("BLOCK_JOB_READY")
    story.call("block-job-complete", device="j")
    story.the_end()


def _cancelled_when_ready(story: Story, *, force: bool) -> None:
    story.call("block-commit", job_id="j", device="top", base=story.path["middle"])
    story.until("BLOCK_JOB_READY")
    story.call("block-job-cancel", device="j", force=force)
    story.the_end()


def _finalized_and_dismissed_by_hand(story: Story) -> None:
    story.call("block-stream", job_id="j", device="top", auto_finalize=False, auto_dismiss=False)
    story.until("BLOCK_JOB_PENDING")
    story.call("job-dismiss", id="j")
    story.call("job-pause", id="j")
    story.call("job-complete", id="j")
    story.call("job-finalize", id="j")
    story.until("JOB_STATUS_CHANGE", "concluded")
    story.call("job-finalize", id="j")
    story.call("job-cancel", id="j")
    story.call("job-dismiss", id="j")
    story.the_end()


def _cancelled_when_pending(story: Story) -> None:
    story.call("block-stream", job_id="j", device="top", base=story.path["middle"], auto_finalize=False)
    story.until("BLOCK_JOB_PENDING")
    story.call("block-job-cancel", device="j")
    story.the_end()


def _mistakes(story: Story) -> None:
    story.call("frobnicate")
    story.call("block-commit")
    story.call("block-commit", device=1)
    story.call("block-commit", device="top", colour="red")
    story.call("block-commit", device="top", on_error="cry")
    story.call("block-commit", device="top", speed="fast")
    story.call("block-commit", device="nobody")
    story.call("block-commit", device="top", job_id="a b")
    story.call("block-commit", device="top", backing_file="x", base=story.path["middle"])
    story.call("block-stream", device="top", base="x", bottom="y")
    story.call("block-job-cancel", device="nobody")
    story.call("qmp_capabilities")
    story.call("query-jobs")


STORIES: dict[str, Callable[[Story], None]] = {
    "an intermediate commit": _intermediate_commit,
    "an active commit": _active_commit,
    "a ready job that is cancelled": lambda story: _cancelled_when_ready(story, force=False),
    "a ready job that is cancelled by force": lambda story: _cancelled_when_ready(story, force=True),
    "a job that is finalized and dismissed by hand": _finalized_and_dismissed_by_hand,
    "a pending job that is cancelled": _cancelled_when_pending,
    "mistakes": _mistakes,
}


@pytest.mark.parametrize("name", STORIES)
def test_clients_hear_what_qemu_would_have_told_them(tmp_path: Path, name: str) -> None:
    heard = []
    for server in (_qemu, _nbdq):
        layers = _layers(tmp_path / server.__name__)
        with server(layers) as client:
            story = Story(client, layers)
            STORIES[name](story)
            heard.append(story.heard)
    assert heard[1] == heard[0]

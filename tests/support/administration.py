"""A server under test with an admin socket, and a client that gives it orders."""

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbdq.admin.client import AdminError, Client
from tests.support.serving import PATIENCE, Server, serve
from tests.support.tools import run


class Administered:
    """A running server, and a connection to its admin socket."""

    def __init__(self, server: Server, client: Client) -> None:
        self.server = server
        self.client = client

    def uri(self, export: str = "") -> str:
        """Where an NBD client finds ``export``."""
        return self.server.uri(export)

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Have a command executed; underscores of argument names are dashes on the wire."""
        return self.client.call(command, {name.replace("_", "-"): value for name, value in arguments.items()})

    def refusal(self, command: str, **arguments: Any) -> str:
        """The error that a command must end in."""
        try:
            done = self(command, **arguments)
        except AdminError as error:
            return str(error)
        raise AssertionError(f"{command} succeeded: {done}")

    def wait_for_jobs(self) -> None:
        """Return when no job is left; each must have ended well."""
        deadline = time.monotonic() + PATIENCE
        while jobs := self("query-jobs"):
            failed = [job for job in jobs if "error" in job]
            assert not failed, failed
            assert time.monotonic() < deadline, jobs
            time.sleep(0.02)


@contextlib.contextmanager
def administered(*words: str | Path, cwd: Path | None = None) -> Iterator[Administered]:
    """``nbdq serve`` with an admin socket; see :func:`tests.support.serving.serve`."""
    with tempfile.TemporaryDirectory(prefix="nbdq-") as directory:
        path = str(Path(directory, "admin"))
        with serve("--admin", path, *words, cwd=cwd) as server, Client(path, timeout=PATIENCE) as client:
            yield Administered(server, client)


def qemu_io(server: Administered, *commands: str, export: str = "") -> str:
    """Let qemu-io carry out ``commands`` on an export."""
    words = [word for command in commands for word in ("-c", command)]
    if all(command.startswith("read") for command in commands):
        words.insert(0, "-r")
    return run("qemu-io", "-f", "raw", *words, server.uri(export))


def chain(path: Path) -> list[dict[str, Any]]:
    """What QEMU says of the image and all layers below it."""
    found: list[dict[str, Any]] = json.loads(run("qemu-img", "info", "-U", "--backing-chain", "--output=json", path))
    return found


def check(*paths: Path) -> None:
    """Have QEMU look for leaks and corruption."""
    for path in paths:
        run("qemu-img", "check", path)


@contextlib.contextmanager
def verified_load(server: Administered, image: Path, *, jobs: int = 2) -> Iterator[None]:
    """Clients that write and read back what they wrote, all the time, at first to ``image``; any error or wrong byte
    fails the test."""
    command = [
        *("fio", "--name=load", "--ioengine=nbd", f"--uri={server.uri()}", "--rw=randrw", "--bs=4k", "--iodepth=8"),
        *("--size=8M", f"--numjobs={jobs}", "--offset_increment=8M", "--offset=16M", "--verify=crc32c"),
        *("--verify_backlog=64", "--verify_fatal=1", "--time_based", "--runtime=60", "--verify_state_save=0"),
        *("--fsync=50", "--eta=never"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        length = image.stat().st_size
        while image.stat().st_size == length and process.poll() is None:
            time.sleep(0.01)
        yield
        assert process.poll() is None, process.communicate()[0]
    finally:
        process.send_signal(2)
        said = process.communicate()[0]
    assert said.count("err= 0") == jobs, said

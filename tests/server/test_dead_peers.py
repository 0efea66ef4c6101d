"""Clients whose host is gone, or whose window stays closed: the kernel is asked to notice (reliability.md 3.2, 3.4)."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdq.server.exports.export import Export
from nbdq.server.limits import Limits
from tests.qcow2.minimal import minimal_image
from tests.server.client import PATIENCE, READ, Client, Disconnected, request
from tests.server.harness import LoopServer, ZeroDisk
from tests.support.tools import execute, requires, run

ROOT = Path(__file__).parents[2]

#: What the vanishing client does: use the export, say so, and keep still.
CLIENT = """
import sys, time
from tests.server.client import Client
client = Client((sys.argv[1], int(sys.argv[2]))).go()
print("connected", flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("seconds", [0, 0.5])
def test_tcp_clients_are_served_however_soon_the_kernel_is_to_ask_for_them(seconds: float) -> None:
    limits = Limits(keepalive_seconds=seconds, user_timeout_seconds=0)
    with LoopServer(Export.read_only("", ZeroDisk(1 << 20)), limits=limits, tcp=True) as server:
        server.connect().go()


def test_a_tcp_client_whose_window_stays_closed_is_ended_by_the_kernel() -> None:
    limits = Limits(user_timeout_seconds=1, reply_stall_seconds=10 * PATIENCE)
    with LoopServer(Export.read_only("", ZeroDisk(1 << 30)), limits=limits, tcp=True) as server:
        client = server.connect().go()
        client.socket.sendall(b"".join(request(READ, number, 0, 32 << 20) for number in range(8)))
        server.wait_for_connections(0)


def test_who_is_silent_is_not_taken_for_dead() -> None:
    limits = Limits(user_timeout_seconds=1, keepalive_seconds=1, keepalive_interval_seconds=1, keepalive_probes=1)
    with LoopServer(Export.read_only("", ZeroDisk(1 << 20)), limits=limits, tcp=True) as server:
        client = server.connect().go()
        time.sleep(2.5)
        assert client.read(0, 512) == bytes(512)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces, 192.0.2.1 and 192.0.2.2, with a cable between them."""
    here, there = f"nbdq-{os.getpid()}-a", f"nbdq-{os.getpid()}-b"
    try:
        for name in (here, there):
            done = execute("ip", "netns", "add", name)
            if done.returncode:
                pytest.skip(f"ip cannot make a network namespace here: {done.stderr.strip()}")
        run("ip", "-n", here, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", there)
        for number, name in enumerate((here, there), 1):
            run("ip", "-n", name, "address", "add", f"192.0.2.{number}/24", "dev", "cable")
            run("ip", "-n", name, "link", "set", "cable", "up")
        yield here, there
    finally:
        for name in (here, there):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@requires("ip")
@pytest.mark.skipif(os.getuid() != 0, reason="needs network namespaces")
def test_the_place_of_a_client_whose_host_has_vanished_is_free_again(tmp_path: Path) -> None:
    """A half-open connection: no FIN and no RST ever comes."""
    image = tmp_path / "disk.qcow2"
    image.write_bytes(minimal_image())
    path = tmp_path / "s"
    limits = ["keepalive-seconds=1", "keepalive-interval-seconds=1", "keepalive-probes=2", "user-timeout-seconds=3"]
    with two_hosts() as (here, there), contextlib.ExitStack() as stack:

        def start(place: str, *words: str) -> subprocess.Popen[str]:
            process = stack.enter_context(
                subprocess.Popen(
                    ["ip", "netns", "exec", place, sys.executable, *words], stdout=subprocess.PIPE, text=True, cwd=ROOT
                )
            )
            stack.callback(process.kill)
            return process

        options = [f"--limit={limit}" for limit in limits]
        server = start(
            here, "-m", "nbdq", "serve", "-e1", "-k", str(path), "-b", "192.0.2.1", "-p0", *options, str(image)
        )
        assert server.stdout is not None
        uris = [server.stdout.readline() for _ in range(2)]
        (port,) = re.findall(r"192\.0\.2\.1:(\d+)", "".join(uris))
        client = start(there, "-c", CLIENT, "192.0.2.1", port)
        assert client.stdout is not None
        assert client.stdout.readline() == "connected\n"
        assert not _is_free(path)
        run("ip", "-n", there, "link", "delete", "cable")
        deadline = time.monotonic() + PATIENCE
        while not _is_free(path):
            assert time.monotonic() < deadline, "it is still held for the client that has vanished"
            time.sleep(0.2)


def _is_free(path: Path) -> bool:
    """Whether an export that takes one client takes one now."""
    with Client(str(path)) as client:
        try:
            client.go()
        except Disconnected:
            raise
        except AssertionError as error:
            assert "has its 1 clients" in str(error)  # noqa: PT017
            return False
        return True

"""A server that ends and comes back under clients that connect again: no request fails, nothing is lost (R-78, R-79).

QEMU with ``reconnect-delay`` sends again what was not answered when its connection broke, but hands an error reply to
its guest, ESHUTDOWN among them; ``nbd-client -persist`` connects again and insists on the same size. So a server that
comes back closes connections, and answers with no error. ``NBDQ_RESTARTS=50 ./run-tests tests/interop/test_restart.py``
ends many a server.
"""

import contextlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.client import FLUSH, READ, WRITE, Client, Disconnected
from tests.support.serving import PATIENCE, Server
from tests.support.tools import requires, run

pytestmark = [requires("qemu-img", "qemu-io", "qemu-storage-daemon", "fio", "stdbuf"), pytest.mark.timeout(3600)]

SIZE = 64 << 20
#: How often a server is ended under load; QEMU takes a second or three to try again.
RESTARTS = int(os.environ.get("NBDQ_RESTARTS", "1"))


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="nbdq-") as path:
        yield Path(path)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An overlay, empty, over an empty base, so that writes allocate and copy."""
    base, top = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, str(SIZE))
    run("qemu-io", "-c", f"write -P 1 0 {SIZE}", base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    return top


def start(disk: Path, directory: Path) -> Server:
    server = Server(disk, directory=directory)
    try:
        server.wait_until_ready()
    except BaseException:
        server.kill()
        raise
    return server


def wait_until_busy(server: Server) -> None:
    """Return when the server has read and written a good deal."""
    deadline = time.monotonic() + PATIENCE
    while int(re.findall(r"syscw: (\d+)", Path(f"/proc/{server.process.pid}/io").read_text())[0]) < 300:
        assert time.monotonic() < deadline, "the load does not go on"
        time.sleep(0.01)


@contextlib.contextmanager
def reconnecting(server: Path, directory: Path, *, write_through: bool = False) -> Iterator[Path]:
    """QEMU as a client of the ``server``'s socket that connects again, for whoever connects to the socket it yields."""
    path = directory / "guest"
    command = [
        *("qemu-storage-daemon", "--nbd-server", f"addr.type=unix,addr.path={path}"),
        *("--blockdev", f"nbd,node-name=disk,server.type=unix,server.path={server},reconnect-delay={PATIENCE}"),
        *("--export", f"nbd,id=guest,node-name=disk,name=,writable=on,writethrough={'on' if write_through else 'off'}"),
    ]
    with (directory / "qemu").open("wb") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            while not path.exists():
                assert process.poll() is None, (directory / "qemu").read_text()
                assert time.monotonic() < deadline, "QEMU does not listen"
                time.sleep(0.01)
            yield path
        finally:
            process.terminate()


@contextlib.contextmanager
def verifying_load(socket: Path) -> Iterator[None]:
    """A guest that writes, and reads back what it wrote, all the time; an error or a wrong byte fails the test."""
    command = [
        *("fio", "--name=load", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={socket}", "--rw=randrw"),
        *("--bsrange=4k-128k", f"--size={SIZE // 2}", "--iodepth=16", "--time_based", "--runtime=300"),
        *("--verify=crc32c", "--verify_backlog=32", "--verify_fatal=1", "--verify_state_save=0", "--fsync=64"),
        *("--rate_iops=2000", "--eta=never"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield
        assert process.poll() is None, process.communicate()[0]
    finally:
        process.send_signal(2)
        said = process.communicate(timeout=PATIENCE)[0]
    assert "err= 0" in said, said
    issued = re.search(r"issued rwts: total=(\d+),(\d+)", said)
    assert issued is not None, said
    assert min(map(int, issued.groups())) > 100, said


@pytest.mark.parametrize("way", ["SIGTERM", "SIGKILL"])
def test_a_guest_of_qemu_notices_nothing_of_a_server_that_comes_back(disk: Path, directory: Path, way: str) -> None:
    """After SIGKILL, what a guest has not flushed is lost, as with a real disk, although QEMU goes on as if nothing had
    happened; so a guest that is to survive that writes through."""
    server = start(disk, directory)
    try:
        with (
            reconnecting(server.socket, directory, write_through=way == "SIGKILL") as guest,
            verifying_load(guest),
        ):
            for _ in range(RESTARTS):
                wait_until_busy(server)
                if way == "SIGTERM":
                    assert server.terminate() == 0, server.stderr
                    assert server.stderr == ""
                server.kill()
                server = start(disk, directory)
            wait_until_busy(server)
    finally:
        server.kill()
    if way == "SIGTERM":
        run("qemu-img", "check", disk)


def test_what_was_on_its_way_is_neither_failed_nor_lost(disk: Path, directory: Path) -> None:
    """A client by the letter: every reply up to the end is a success, and what was answered is there afterwards."""
    server = start(disk, directory)
    try:
        with Client(str(server.socket)).go() as client:
            size, flags = client.size, client.flags
            pattern = {}
            with contextlib.suppress(OSError):  # whatever the server takes until it hangs up
                for number in range(400):
                    cookie = client.send(WRITE, number << 16, 1 << 15, payload=bytes([number % 251 + 1]) * (1 << 15))
                    pattern[cookie] = number
                    if number == 200:
                        server.process.terminate()
            written = []
            with contextlib.suppress(Disconnected, OSError):
                while client.outstanding:
                    reply = client.reply()
                    assert reply.error == 0
                    written.append(pattern[reply.cookie])
            assert written
        assert server.process.wait(PATIENCE) == 0
        server.kill()
        server = start(disk, directory)
        with Client(str(server.socket)).go() as again:
            assert (again.size, again.flags) == (size, flags)
            for number in written:
                assert again.read(number << 16, 1 << 15) == bytes([number % 251 + 1]) * (1 << 15)
            assert again.error(FLUSH) == 0
    finally:
        server.kill()


def test_qemu_io_reads_and_writes_across_a_restart(disk: Path, directory: Path) -> None:
    server = start(disk, directory)
    try:
        target = f"driver=nbd,server.type=unix,server.path={server.socket},reconnect-delay={PATIENCE}"
        words = [
            "write -P 7 1M 64k",
            "flush",
            "sleep 1500",
            "read -P 7 1M 64k",
            "write -P 8 2M 64k",
            "read -P 8 2M 64k",
        ]
        command = [
            "stdbuf",
            "-oL",
            "qemu-io",
            "--image-opts",
            target,
            *(part for word in words for part in ("-c", word)),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as client:
            assert client.stdout is not None
            assert "wrote 65536" in client.stdout.readline()
            assert server.terminate() == 0
            server.kill()
            server = start(disk, directory)
            said = client.communicate(timeout=PATIENCE)[0]
        assert client.returncode == 0, said
        assert "failed" not in said
        assert "Pattern verification" not in said
        assert said.count("wrote 65536") == 1
        assert said.count("read 65536") == 2
    finally:
        server.kill()


def test_a_client_that_persists_finds_the_same_disk_again(disk: Path, directory: Path) -> None:
    """What ``nbd-client -persist`` does: it connects again with the same words, and demands the same size and flags."""
    server = start(disk, directory)
    try:
        seen = set()
        for _ in range(3):
            with Client(str(server.socket)).go() as client:
                seen.add((client.size, client.flags))
                client.send(READ, 0, 4096)
                assert server.terminate() == 0
                with contextlib.suppress(Disconnected):
                    assert client.reply().error == 0
            server.kill()
            server = start(disk, directory)
        assert len(seen) == 1
    finally:
        server.kill()

"""``nbdq serve`` as a process: signals, sockets, files, descriptors (3.4, P99, R-41, R-42; scorecard 16, 17)."""

import os
import resource
import signal
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.server.client import PATIENCE, READ, Client, Disconnected, connect, handshake
from tests.server.conftest import CONTENT
from tests.server.harness import has_ipv6
from tests.support.serving import Server, refusal, serve

RAW = ("-f", "raw")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw image."""
    path = tmp_path_factory.mktemp("image") / "disk"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def server(image: Path) -> Iterator[Server]:
    with serve(*RAW, image) as running:
        yield running


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="nbdq-") as path:
        yield Path(path)


def serves(path: Path) -> bool:
    """Whether a client can read there."""
    with Client(str(path)) as client:
        return client.go().read(0, 512) == CONTENT[:512]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_everything_in_order(image: Path, directory: Path, number: signal.Signals) -> None:
    pid_file = directory / "pid"
    server = Server(*RAW, "--pid-file", pid_file, image, directory=directory)
    try:
        server.wait_until_ready()
        assert pid_file.read_text() == f"{server.process.pid}\n"
        address = str(server.socket)
        idle = Client(address).go()
        half = [Client(address) for _ in range(10)]
        for count, client in enumerate(half):
            client.hello()
            client.socket.sendall(handshake()[: count * 3])
        busy = [Client(address).go() for _ in range(10)]
        for client in busy:
            client.socket.sendall(b"".join(client.pack(READ, n << 14, 1 << 18) for n in range(200)))
            client.socket.recv(1, socket.MSG_PEEK)  # the server has all of them, and no room for all replies
        server.process.send_signal(number)
        for client in busy:
            assert len(client.replies()) == 200
            assert client.is_closed()
        assert idle.is_closed()
        for client in half:
            with pytest.raises(Disconnected):
                client.receive(1 << 20)
        assert server.process.wait(PATIENCE) == 0
        assert not server.socket.exists()
        assert not pid_file.exists()
        assert server.stderr == ""
        for client in (idle, *half, *busy):
            client.socket.close()
    finally:
        server.kill()


def test_a_socket_has_one_server_at_a_time(image: Path, directory: Path) -> None:
    server = Server(*RAW, "-r", image, directory=directory)
    try:
        server.wait_until_ready()
        assert "another server listens there" in refusal(*RAW, "-r", "-k", server.socket, image)
        assert serves(server.socket)
    finally:
        server.kill()
    after_a_crash = Server(*RAW, image, directory=directory)
    try:
        after_a_crash.wait_until_ready()
        assert serves(after_a_crash.socket)
        assert after_a_crash.terminate() == 0
        assert not after_a_crash.socket.exists()
    finally:
        after_a_crash.kill()


def test_a_server_that_cannot_start_leaves_no_socket_behind(image: Path, directory: Path) -> None:
    path = directory / "socket"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = refusal(*RAW, "-k", path, "-b", "127.0.0.1", "-p", str(taken.getsockname()[1]), image)
    assert "cannot listen on 127.0.0.1" in said
    assert not path.exists()


@pytest.mark.parametrize("mode", ["", "0660", "0666"])
def test_the_socket_has_the_mode_that_was_asked_for(image: Path, mode: str) -> None:
    words = ("--socket-mode", mode) if mode else ()
    with serve(*RAW, *words, image) as server:
        assert stat.S_IMODE(server.socket.stat().st_mode) == int(mode or "0600", 8)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_server_prints_a_uri_that_leads_to_it(image: Path, host: str) -> None:
    if ":" in host and not has_ipv6():
        pytest.skip("no IPv6 here")
    with serve(*RAW, "-x", "a disk/1", "-b", host, "-p", "0", image) as server:
        assert server.process.stdout is not None
        assert server.printed_uri == server.uri("a disk/1").replace("%2F", "/")
        uri = urlsplit(server.process.stdout.readline().decode().strip())
        assert (uri.scheme, uri.hostname, uri.path) == ("nbd", host, "/a%20disk/1")
        assert uri.port
        with Client((host, uri.port)) as client:
            assert client.go("a disk/1").read(0, 512) == CONTENT[:512]


def test_without_descriptors_a_server_waits_and_does_not_spin(server: Server) -> None:
    address = str(server.socket)
    served = Client(address).go()
    assert served.read(0, 512) == CONTENT[:512]
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (48, 48))
    waiting = [connect(address) for _ in range(100)]
    deadline = time.monotonic() + PATIENCE
    while "cannot accept a client" not in server.stderr:
        assert time.monotonic() < deadline, server.stderr
        time.sleep(0.01)
    before = processor_seconds(server)
    time.sleep(1)
    assert processor_seconds(server) - before < 0.3
    assert server.stderr.count("cannot accept a client") < 10
    assert served.read(512, 512) == CONTENT[512:1024]
    for sock in (*waiting, served.socket):
        sock.close()
    assert serves(server.socket)


def processor_seconds(server: Server) -> float:
    """Processor time that the server has used."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_connections_without_number_leave_descriptors_and_memory_as_they_were(server: Server) -> None:
    address = str(server.socket)

    def open_files() -> int:
        return len(os.listdir(f"/proc/{server.process.pid}/fd"))

    def resident() -> int:
        return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()

    def come_and_go(count: int) -> None:
        for number in range(count):
            with Client(address) as client:
                client.go().send(READ, 0, 1 << 20)
                if number % 2:
                    client.reply()

    come_and_go(300)
    files, memory = open_files(), resident()
    come_and_go(1500)
    with Client(address).go() as last:
        last.read(0, 512)
    assert open_files() <= files + 1
    assert resident() - memory < 16 << 20

"""``nbdq wait``: the return of it means that a client can go to work (F6, U1)."""

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.client import PATIENCE, Client
from tests.support.serving import Server, serve

WAIT = [sys.executable, "-m", "nbdq", "wait"]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw image."""
    path = tmp_path_factory.mktemp("image") / "disk"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="nbdq-") as path:
        yield Path(path)


def wait(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*WAIT, *words], capture_output=True, text=True, timeout=PATIENCE)


def test_waiting_ends_silently_when_a_client_can_enter(image: Path, directory: Path) -> None:
    path = directory / "socket"
    waiting = subprocess.Popen(
        [*WAIT, f"nbd+unix:///?socket={path}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    time.sleep(0.5)  # so that there is something to wait for
    assert waiting.poll() is None
    server = Server("-f", "raw", image, directory=directory)
    try:
        assert waiting.communicate(timeout=PATIENCE) == ("", None)
        assert waiting.returncode == 0
        with Client(str(path)) as client:
            assert client.go().size == 1 << 20
    finally:
        server.kill()


def test_waiting_is_for_the_export_and_not_for_the_socket(image: Path) -> None:
    with serve("-f", "raw", "-x", "disk", image) as server:
        assert wait("--timeout", "0", server.uri("disk")).returncode == 0
        missing = wait("--timeout", "0.2", server.uri("other"))
    assert missing.returncode == 1
    assert missing.stderr.startswith(f"nbdq: {server.uri('other')}: cannot be used, after 0.2 s: ")
    assert "no export is named 'other'" in missing.stderr


def test_waiting_for_a_server_that_says_nothing_comes_to_an_end(directory: Path) -> None:
    path = directory / "socket"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        done = wait("--timeout", "0.2", f"nbd+unix:///?socket={path}")
    assert done.returncode == 1
    assert "the server does not answer" in done.stderr


def test_what_is_no_uri_is_refused_at_once() -> None:
    done = wait("--timeout", "1000", "/a/path")
    assert done.returncode == 1
    assert "is not the URI of an NBD export" in done.stderr


def test_a_key_or_certificate_that_cannot_be_used_is_not_waited_for(directory: Path) -> None:
    for query in ("tls-psk-file=none", f"tls-certificates={directory}/none"):
        done = wait("--timeout", "1000", f"nbds://me@localhost:1/?{query}")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)

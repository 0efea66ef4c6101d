"""A server under test as a child process on a unix socket: started, watched, ended, and heard when a test fails."""

import contextlib
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

#: Seconds until a server that says nothing counts as hung; generous, because it only bounds failures.
PATIENCE = 30


class Server:
    """``nbdq serve`` over some images. Use :func:`serve`; it ends the process and judges how it ended."""

    #: Those that run now, for the report of a failing test (``conftest.py``).
    running: ClassVar[list["Server"]] = []

    def __init__(self, *words: str | Path, directory: Path, cwd: Path | None = None) -> None:
        """Start the server with these options and images, its socket and log in ``directory``. A ``--config`` has to
        name the socket itself."""
        self.socket = directory / "socket"
        self.log = directory / "stderr"
        place = [] if "--config" in words else ["-k", str(self.socket)]
        self.command = [sys.executable, "-m", "nbdq", "serve", *place, *map(str, words)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, cwd=cwd
            )
        self.printed_uri = ""

    def uri(self, export: str = "") -> str:
        """Where a client finds ``export``."""
        return f"nbd+unix:///{quote(export)}?socket={quote(str(self.socket))}"

    @property
    def stderr(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until_ready(self) -> None:
        """Return when the server has printed its URI; fail with its own words if it ends or hangs instead."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            ready = selector.select(PATIENCE)
        self.printed_uri = self.process.stdout.readline().decode().strip() if ready else ""
        if not self.printed_uri:
            self.kill()
            raise AssertionError(f"no URI from {' '.join(self.command)}:\n{self.stderr}")

    def terminate(self) -> int:
        """Ask the server to end, as an operator does; return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        """End the process whatever it does; harmless when it has ended."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


@contextlib.contextmanager
def serve(*words: str | Path, cwd: Path | None = None) -> Iterator[Server]:
    """Serve until the block ends. Afterwards the server must end with status 0 and leave no traceback behind."""
    with tempfile.TemporaryDirectory(prefix="nbdq-") as directory:  # short: a socket path has 107 bytes
        server = Server(*words, directory=Path(directory), cwd=cwd)
        Server.running.append(server)
        try:
            server.wait_until_ready()
            yield server
            status = server.terminate()
            assert status == 0, f"status {status} after SIGTERM:\n{server.stderr}"
            assert "Traceback" not in server.stderr, server.stderr
        finally:
            Server.running.remove(server)
            server.kill()


def refusal(*words: str | Path, cwd: Path | None = None) -> str:
    """What ``nbdq serve`` says on stderr when it cannot serve; fails if it starts all the same."""
    with tempfile.TemporaryDirectory(prefix="nbdq-") as directory:
        server = Server(*words, directory=Path(directory), cwd=cwd)
        try:
            status = server.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"served instead of refusing: {' '.join(server.command)}") from None
        finally:
            server.kill()
        assert status > 0, f"status {status}:\n{server.stderr}"
        assert "Traceback" not in server.stderr, server.stderr
        return server.stderr


@contextlib.contextmanager
def qemu_nbd(*words: str | Path) -> Iterator[Path]:
    """The peer: a read-only qemu-nbd; yields its socket."""
    with tempfile.TemporaryDirectory(prefix="nbdq-") as directory:
        path = Path(directory, "socket")
        ready = Path(directory, "pid")
        command = ["qemu-nbd", "-r", "-t", "-k", str(path), f"--pid-file={ready}", *map(str, words)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + PATIENCE
            while not (ready.exists() and path.exists()):  # the pid file is written once it listens
                if process.poll() is not None or time.monotonic() > deadline:
                    process.kill()
                    raise AssertionError(f"{' '.join(command)}: {process.communicate()[1]}")
                time.sleep(0.005)
            yield path
        finally:
            process.kill()
            process.communicate()

"""``nbdq-qemu-nbd`` as programs start it: a process that may go into the background."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.support.serving import PATIENCE

COMMAND = [sys.executable, "-c", "from nbdq.cli.qemu_nbd.main import main; main()"]


def call(*words: str | Path, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run it to its end, or with ``--fork`` to the moment when it serves."""
    return subprocess.run(
        [*COMMAND, *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, **(environment or {})},
        check=False,
    )


def refusal(*words: str | Path, environment: Mapping[str, str] | None = None) -> str:
    """What it says when it refuses: status 1, and nothing but lines of its own."""
    done = call(*words, environment=environment)
    assert done.returncode == 1, done
    assert done.stderr.startswith("qemu-nbd: "), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


class Daemon:
    """A server that went into the background."""

    def __init__(self, process: int, socket: Path, stderr: str) -> None:
        self.process = process
        self.socket = socket
        self.stderr = stderr
        """What it said until it served."""

    def uri(self, export: str = "") -> str:
        """Where a client finds ``export``."""
        return f"nbd+unix:///{export}?socket={self.socket}"

    @property
    def is_running(self) -> bool:
        """Whether the process is there, and no zombie that nobody has waited for."""
        try:
            return Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    def wait(self) -> None:
        """Return when it has ended."""
        deadline = time.monotonic() + PATIENCE
        while self.is_running:
            assert time.monotonic() < deadline, "it goes on and on"
            time.sleep(0.005)


@contextlib.contextmanager
def serve(
    *words: str | Path, pid_file: Path | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[Daemon]:
    """Serve on a unix socket, in the background, until the block ends; ``pid_file`` if ``words`` name one."""
    with tempfile.TemporaryDirectory(prefix="nbdq-") as directory:
        socket, file = Path(directory, "socket"), pid_file or Path(directory, "pid")
        done = call("--fork", f"--pid-file={file}", "-k", socket, *words, environment=environment)
        assert done.returncode == 0, done.stderr
        daemon = Daemon(int(file.read_text()), socket, done.stderr)
        try:
            yield daemon
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(daemon.process, signal.SIGTERM)
            daemon.wait()

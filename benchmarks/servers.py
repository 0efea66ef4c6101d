"""The servers that race: how each is started on an image, and what it costs while it runs."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from images import Image

GREETING = b"NBDMAGIC"
START_DEADLINE_S = 30.0
STOP_DEADLINE_S = 10.0
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class ServerError(Exception):
    """A server did not come up, or went away. The message holds the end of what it said on stderr."""


@dataclass(frozen=True)
class ServerKind:
    """A command line with `{socket}` and `{image}` in it. `raw` servers get the raw twin of the image instead."""

    label: str
    argv: tuple[str, ...]
    raw: bool = False

    def writable(self) -> "ServerKind":
        """The same without `-r`."""
        return ServerKind(self.label, tuple(word for word in self.argv if word != "-r"), self.raw)


NBDQ_ARGV = (sys.executable, "-m", "nbdq", "serve", "-r", "-k", "{socket}", "{image}")


def _qemu_nbd(aio: str) -> ServerKind:
    options = ("-r", "-t", "-e", "16", "-f", "qcow2", "--cache=writeback", f"--aio={aio}")
    return ServerKind(f"qemu {aio}", ("qemu-nbd", *options, "-k", "{socket}", "{image}"))


QEMU_THREADS = _qemu_nbd("threads")
QEMU_IO_URING = _qemu_nbd("io_uring")
NBDKIT_RAW = ServerKind("nbdkit raw", ("nbdkit", "-f", "-r", "-U", "{socket}", "file", "{image}"), raw=True)


def nbdq(argv: Sequence[str] = NBDQ_ARGV) -> ServerKind:
    return ServerKind("nbdq", tuple(argv))


class Server:
    """One running server process on one image, listening on a unix socket in a directory of its own."""

    def __init__(self, kind: ServerKind, image: Image, work_dir: Path, *, scratch: bool = False) -> None:
        """Start it and wait until it greets a client. Raises ServerError if it exits or stays silent."""
        self.kind = kind
        self.image = image
        self.work_dir = work_dir
        self.image_path = image.raw_path(work_dir) if kind.raw else image.path(work_dir)
        if scratch:
            self.image_path = image.scratch_path(work_dir)
        self._directory = Path(tempfile.mkdtemp(prefix="race-"))
        self._socket_path = self._directory / "s"
        self._log_path = self._directory / "stderr"
        words = {"{socket}": str(self._socket_path), "{image}": str(self.image_path)}
        argv = [words.get(word, word) for word in kind.argv]
        started = time.perf_counter()
        try:
            with self._log_path.open("wb") as log:
                self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        except OSError as error:
            shutil.rmtree(self._directory)
            raise ServerError(f"{kind.label} cannot be started: {error}") from error
        try:
            self._await_greeting()
        except BaseException:
            self.stop()
            raise
        self.startup_s = time.perf_counter() - started
        """From before the fork until the first bytes of the greeting were read."""

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self._socket_path}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def check_alive(self) -> None:
        if self._process.poll() is not None:
            raise ServerError(f"{self.kind.label} exited with status {self._process.returncode}: {self.last_words()}")

    def cpu_seconds(self) -> float:
        """User and system time of all its threads so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND

    def disk_bytes(self) -> int:
        """What it had to fetch from the disk so far. Nothing, where the page cache holds the image."""
        lines = Path(f"/proc/{self.pid}/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["read_bytes"])

    def set_affinity(self, cores: Set[int]) -> None:
        """Bind all its threads, and those it will start, to these cores."""
        for thread in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.sched_setaffinity(int(thread.name), cores)

    def peak_rss_mib(self) -> float:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
        raise ServerError(f"{self.kind.label} has no VmHWM in /proc/{self.pid}/status")

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _await_greeting(self) -> None:
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline:
            self.check_alive()
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(START_DEADLINE_S)
                with contextlib.suppress(FileNotFoundError, ConnectionError):
                    client.connect(str(self._socket_path))
                    if client.recv(len(GREETING)) == GREETING:
                        return
            time.sleep(0.0005)
        raise ServerError(f"{self.kind.label} sent no greeting within {START_DEADLINE_S:.0f} s: {self.last_words()}")

    def last_words(self) -> str:
        """The end of its stderr."""
        return " / ".join(self._log_path.read_text(errors="replace").splitlines()[-3:]) or "it said nothing"


class Servers:
    """The servers that are up: at most one per kind and image, started when first asked for."""

    def __init__(self, work_dir: Path) -> None:
        self._work_dir = work_dir
        self._running: dict[tuple[ServerKind, str], Server] = {}

    def get(self, kind: ServerKind, image: Image) -> Server:
        key = (kind, image.name)
        if key not in self._running:
            self._running[key] = Server(kind, image, self._work_dir)
        self._running[key].check_alive()
        return self._running[key]

    @contextlib.contextmanager
    def fresh(self, kind: ServerKind, image: Image) -> Iterator[Server]:
        """A server that nobody has talked to, for one measurement."""
        server = Server(kind, image, self._work_dir)
        try:
            yield server
        finally:
            server.stop()

    @contextlib.contextmanager
    def writing(self, kind: ServerKind, image: Image) -> Iterator[Server]:
        """A server that may write to a fresh copy of the image, which has to be without fault afterwards."""
        image.copy(self._work_dir)
        server = Server(kind.writable(), image, self._work_dir, scratch=True)
        try:
            yield server
        finally:
            server.stop()
        path = image.scratch_path(self._work_dir)
        check = subprocess.run(["qemu-img", "check", "-q", path], capture_output=True, text=True)
        if check.returncode:
            raise ServerError(f"{kind.label} left an image with which qemu-img check is not content: {check.stderr}")
        path.unlink()

    def stop_all(self) -> None:
        for server in self._running.values():
            server.stop()
        self._running.clear()

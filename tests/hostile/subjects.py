"""Servers to be put under load: nbdq and its peers, each with one export on a TCP port of 127.0.0.1."""

import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.server.client import Address, Client
from tests.support.tools import SEARCH_PATH

#: What serves, and what peers would call a disk.
SIZE = 256 << 20


@dataclass
class Subject:
    """A running server."""

    name: str
    process: int
    address: Address
    export: str = ""

    @property
    def is_alive(self) -> bool:
        with contextlib.suppress(ChildProcessError):  # nbd-server is nobody's child
            os.waitpid(self.process, os.WNOHANG)
        return Path(f"/proc/{self.process}").exists()

    @property
    def processes(self) -> list[int]:
        """It, and the processes that it has made for its clients."""
        found = [self.process]
        for process in found:
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{process}/task").iterdir():
                    found += map(int, (task / "children").read_text().split())
        return found

    @property
    def memory(self) -> int:
        """Bytes of memory of its own, with its share of what processes have in common."""
        return sum(map(_proportional_bytes, self.processes))

    @property
    def processor_seconds(self) -> float:
        """Processor time used so far."""
        fields = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def descriptors(self) -> int:
        """Open files."""
        return len(os.listdir(f"/proc/{self.process}/fd"))

    def connect(self) -> Client:
        """A client that has said nothing."""
        return Client(self.address)

    def go(self, *, structured: bool = True) -> Client:
        """A client that uses the export."""
        return self.connect().go(self.export, structured=structured and self.name != "nbd-server")


def _proportional_bytes(process: int) -> int:
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss: +(\d+) kB", text, re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def _nbdq(directory: Path, port: int, options: list[str]) -> list[str]:
    image = directory / "disk.qcow2"
    return [sys.executable, "-m", "nbdq", "serve", "-p", str(port), *options, str(image)]


def _qemu_nbd(directory: Path, port: int, options: list[str]) -> list[str]:
    return ["qemu-nbd", "-t", "-e", "100000", "-f", "qcow2", "-p", str(port), str(directory / "disk.qcow2")]


def _nbdkit(directory: Path, port: int, options: list[str]) -> list[str]:
    return ["nbdkit", "-f", "-p", str(port), "file", str(directory / "disk.raw")]


def _nbd_server(directory: Path, port: int, options: list[str]) -> list[str]:
    config = directory / "nbd-server.conf"
    config.write_text(f"[generic]\nport = {port}\nallowlist = true\n[default]\nexportname = {directory / 'disk.raw'}\n")
    return ["nbd-server", "-C", str(config), "-p", str(directory / "pid")]


SUBJECTS: dict[str, Callable[[Path, int, list[str]], list[str]]] = {
    "nbdq": _nbdq,
    "qemu-nbd": _qemu_nbd,
    "nbdkit": _nbdkit,
    "nbd-server": _nbd_server,
}


@contextlib.contextmanager
def running(name: str, directory: Path, *options: str, files: int = 0) -> Iterator[Subject]:
    """Serve a disk of SIZE, full of data, until the block ends. ``options`` are nbdq's; ``files``: how many may be
    open, as many as possible by default."""
    _make_disk(directory)
    (directory / "pid").unlink(missing_ok=True)  # of another process by now
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def limit() -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (files or hard, files or hard))

    process = subprocess.Popen(
        SUBJECTS[name](directory, port, list(options)),
        env={**os.environ, "PATH": SEARCH_PATH},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=limit,
    )
    try:
        _wait_for(port, process)
        address = ("127.0.0.1", port)
        if name != "nbd-server":
            yield Subject(name, process.pid, address)
            return
        daemon = _daemon(directory / "pid")  # it has no option to stay, and serve more than one client
        try:
            yield Subject(name, daemon, address, "default")
        finally:
            os.kill(daemon, signal.SIGTERM)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(port: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            Client(("127.0.0.1", port)).socket.close()
            return
        except OSError:
            assert not process.poll(), f"ended with {process.returncode}"
            assert time.monotonic() < deadline, "does not listen"
            time.sleep(0.05)


def _daemon(path: Path) -> int:
    """The process whose id will be in the file, which is written some time after it listens."""
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(OSError, ValueError):
            return int(path.read_text())
        assert time.monotonic() < deadline, "no pid file"
        time.sleep(0.05)


def _make_disk(directory: Path) -> None:
    raw, image = directory / "disk.raw", directory / "disk.qcow2"
    if not raw.exists():
        piece = bytes(range(1, 251)) * 4195
        with raw.open("wb") as file:
            while file.tell() < SIZE:
                file.write(piece[: SIZE - file.tell()])
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image], check=True)

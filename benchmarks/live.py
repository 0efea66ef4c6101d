"""How long guests wait while their disk is operated on: nbdq against qemu-storage-daemon, the same operations in turns.

    python benchmarks/live.py [--rounds N] [--seconds-between S] [--json FILE]

A load of fio (random 4 KiB writes and reads, verified) runs on the disk; beside it a probe writes and reads back 4 KiB
at a time and notes how long each took. For every operation the longest wait of the probe is shown, and how long the
operation took; "idle" is the same without any operation. README.md says what would make the numbers meaningless.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from workloads import libnbd_python

_SIZE = "1G"
_LOAD_BYTES = 192 << 20
_PROBE_OFFSET = 768 << 20
_PATIENCE = 120

#: Run by the Python that has libnbd: prints begin and length of every request, in seconds of the monotonic clock.
_PROBE = """
import nbd, random, signal, sys, time
h = nbd.NBD(); h.connect_uri(sys.argv[1])
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
base = int(sys.argv[2]); found = []
generator = random.Random(1)
while not stop:
    offset = base + generator.randrange(4096) * 4096
    data = generator.randbytes(16) * 256
    for act in (lambda: h.pwrite(data, offset), lambda: h.pread(4096, offset)):
        begun = time.monotonic(); got = act(); found.append((begun, time.monotonic() - begun))
    assert got == data, offset
    time.sleep(0.0005)
h.shutdown()
print("\\n".join(f"{begun} {length}" for begun, length in found))
"""


class Qmp:
    """One connection to an admin socket, nbdq's or QEMU's."""

    def __init__(self, path: Path) -> None:
        deadline = time.monotonic() + _PATIENCE
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                self._socket.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self._file = self._socket.makefile("rw")
        self._file.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._file.write(json.dumps({"execute": command, "arguments": named}) + "\n")
        self._file.flush()
        while True:
            message = json.loads(self._file.readline())
            if "error" in message:
                raise click.ClickException(f"{command}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]

    def wait_for(self, job: str, *, complete: bool = False) -> None:
        """Return when the job is gone; complete it as soon as it is ready."""
        deadline = time.monotonic() + _PATIENCE
        while jobs := [each for each in self("query-jobs") if each["id"] == job]:
            if "error" in jobs[0]:
                raise click.ClickException(f"{job}: {jobs[0]['error']}")
            if complete and jobs[0]["status"] == "ready":
                self("job-complete", id=job)
                complete = False
            if time.monotonic() > deadline:
                raise click.ClickException(f"{job} does not end: {jobs}")
            time.sleep(0.002)


class Side:
    """A server with one disk over a base, being loaded; operations by name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "nbd"
        self.number = 0
        self.layers = [directory / "base.qcow2", directory / "top.qcow2"]
        _create(self.layers[0])
        subprocess.run(
            ["qemu-io", "-c", "write -P 1 0 256M", str(self.layers[0])], check=True, stdout=subprocess.DEVNULL
        )
        _create(self.layers[1], self.layers[0])
        self.process = self.start()
        self.qmp = Qmp(directory / "qmp")

    @property
    def uri(self) -> str:
        return f"nbd+unix:///disk?socket={self.socket}"

    def start(self) -> "subprocess.Popen[bytes]":
        raise NotImplementedError

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(_PATIENCE)

    def new_overlay(self) -> Path:
        self.number += 1
        return self.directory / f"s{self.number}.qcow2"

    @property
    def operations(self) -> dict[str, Callable[[], None]]:
        return {
            "idle": lambda: time.sleep(1),
            "snapshot": self.snapshot,
            "commit of a middle layer": self.commit_middle,
            "snapshot, commit of the active layer": self.commit_active,
            "snapshot, stream of what is below": self.stream,
            **self.own_operations,
        }

    @property
    def own_operations(self) -> dict[str, Callable[[], None]]:
        return {}

    def snapshot(self) -> None:
        raise NotImplementedError

    def commit_middle(self) -> None:
        raise NotImplementedError

    def commit_active(self) -> None:
        raise NotImplementedError

    def stream(self) -> None:
        raise NotImplementedError


class Nbdq(Side):
    name = "nbdq"

    def start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "nbdq", "serve", "-k", str(self.socket), "-x", "disk"),
                *("--admin", str(self.directory / "qmp"), "--state", str(self.directory / "state")),
                str(self.layers[-1]),
            ],
            stdout=subprocess.DEVNULL,
            stderr=(self.directory / "log").open("wb"),
        )

    def snapshot(self) -> None:
        self.layers.append(self.new_overlay())
        self.qmp("blockdev-snapshot-sync", device="disk", snapshot_file=str(self.layers[-1]))

    def commit_middle(self) -> None:
        top = self.layers.pop(-2)
        self.qmp("block-commit", device="disk", job_id="job", top=str(top), base=str(self.layers[-2]))
        self.qmp.wait_for("job")
        top.unlink()  # else the next commit is refused: it would damage an overlay

    def commit_active(self) -> None:
        self.snapshot()
        time.sleep(0.5)
        top = self.layers.pop()
        self.qmp("block-commit", device="disk", job_id="job", top=str(top), base=str(self.layers[-1]))
        self.qmp.wait_for("job", complete=True)
        top.unlink()

    def stream(self) -> None:
        self.snapshot()
        dropped = self.layers.pop(-2)
        self.qmp("block-stream", device="disk", job_id="job", base=str(self.layers[-2]))
        self.qmp.wait_for("job")
        dropped.unlink()

    @property
    def own_operations(self) -> dict[str, Callable[[], None]]:
        return {"checkpoint, begun and ended": self.checkpoint}

    def checkpoint(self) -> None:
        self.number += 1
        self.qmp("x-nbdq-checkpoint", id=f"c{self.number}", disks=[{"node": "disk"}])
        (job,) = self.qmp("x-nbdq-checkpoint-end", id=f"c{self.number}")["jobs"]
        self.qmp.wait_for(job)


class QemuStorageDaemon(Side):
    name = "qemu-storage-daemon"

    def start(self) -> "subprocess.Popen[bytes]":
        nodes = []
        backing: dict[str, Any] | None = None
        for number, layer in enumerate(self.layers):
            node: dict[str, Any] = {"driver": "qcow2", "node-name": f"n{number}", "discard": "unmap"}
            node["file"] = {"driver": "file", "filename": str(layer)}
            node["backing"] = backing and backing["node-name"]
            backing = node
            nodes += ["--blockdev", json.dumps(node)]
        self.nodes = ["n0", "n1"]
        export = {"type": "nbd", "id": "e", "node-name": "n1", "name": "disk", "writable": True}
        return subprocess.Popen(
            [
                *("qemu-storage-daemon", "--chardev", f"socket,path={self.directory / 'qmp'},server=on,wait=off,id=c"),
                *("--monitor", "chardev=c", *nodes),
                *("--nbd-server", f"addr.type=unix,addr.path={self.socket},max-connections=100"),
                *("--export", json.dumps(export)),
            ],
            stderr=(self.directory / "log").open("wb"),
        )

    def snapshot(self) -> None:
        self.layers.append(self.new_overlay())
        _create(self.layers[-1], self.layers[-2])
        node = f"s{self.number}"
        self.qmp(
            "blockdev-add",
            driver="qcow2",
            node_name=node,
            discard="unmap",
            backing=None,
            file={"driver": "file", "filename": str(self.layers[-1])},
        )
        self.qmp("blockdev-snapshot", node=self.nodes[-1], overlay=node)
        self.nodes.append(node)

    def commit_middle(self) -> None:
        self.layers.pop(-2)
        top = self.nodes.pop(-2)
        self.qmp("block-commit", device=self.nodes[-1], job_id="job", top_node=top, base_node=self.nodes[-2])
        self.qmp.wait_for("job")
        self.qmp("blockdev-del", node_name=top)

    def commit_active(self) -> None:
        self.snapshot()
        time.sleep(0.5)
        self.layers.pop()
        top = self.nodes.pop()
        self.qmp("block-commit", device=top, job_id="job", top_node=top, base_node=self.nodes[-1])
        self.qmp.wait_for("job", complete=True)
        self.qmp("blockdev-del", node_name=top)

    def stream(self) -> None:
        self.snapshot()
        self.layers.pop(-2)
        self.nodes.pop(-2)
        self.qmp("block-stream", device=self.nodes[-1], job_id="job", base_node=self.nodes[-2])
        self.qmp.wait_for("job")


def _create(path: Path, backing: Path | None = None) -> None:
    below = ["-b", str(backing), "-F", "qcow2"] if backing else []
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *below, str(path), _SIZE], check=True)


@contextlib.contextmanager
def load(uri: str, *, directory: Path) -> Iterator[None]:
    """fio on the disk; an error of it fails the measurement."""
    process = subprocess.Popen(
        [
            *("fio", "--name=load", "--ioengine=nbd", f"--uri={uri}", "--rw=randrw", "--bs=4k", "--iodepth=16"),
            *(f"--size={_LOAD_BYTES // 2}", "--numjobs=2", f"--offset_increment={_LOAD_BYTES // 2}"),
            *("--verify=crc32c", "--verify_backlog=256", "--verify_state_save=0", "--time_based", "--runtime=600"),
            *("--rate_iops=2000", "--eta=never"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=directory,
    )
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)
        said = process.communicate()[0]
    if said.count("err= 0") != 2:
        raise click.ClickException(f"the load met errors:\n{said}")


@contextlib.contextmanager
def probe(uri: str) -> Iterator[list[tuple[float, float]]]:
    """Begin and length of the probe's requests, in seconds; complete when the block has ended."""
    found: list[tuple[float, float]] = []
    process = subprocess.Popen(
        [libnbd_python(), "-c", _PROBE, uri, str(_PROBE_OFFSET)], stdout=subprocess.PIPE, text=True
    )
    try:
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[0]
    if process.returncode:
        raise click.ClickException("the probe met an error")
    found += [(float(begun), float(length)) for begun, length in (line.split() for line in said.splitlines())]


def measure(kind: type[Side], *, rounds: int, pause: float) -> dict[str, list[tuple[float, float]]]:
    """Operation → (longest wait, duration) in seconds, of each round."""
    directory = Path(tempfile.mkdtemp(prefix="nbdq-live-"))
    try:
        side = kind(directory)
        spans: list[tuple[str, float, float]] = []
        with load(side.uri, directory=directory), probe(side.uri) as waits:
            time.sleep(2)
            for _ in range(rounds):
                for name, operation in side.operations.items():
                    begun = time.monotonic()
                    operation()
                    spans.append((name, begun, time.monotonic()))
                    time.sleep(pause)
        side.stop()
        subprocess.run(["qemu-img", "check", "-q", str(side.layers[-1])], check=True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    results: dict[str, list[tuple[float, float]]] = {}
    for name, begun, ended in spans:
        longest = max(length for start, length in waits if start <= ended and start + length >= begun)
        results.setdefault(name, []).append((longest, ended - begun))
    return results


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds-between", "pause", default=0.5, show_default=True)
@click.option("--json", "output", type=click.Path(), help="Write all numbers here.")
def main(rounds: int, pause: float, output: str | None) -> None:
    """Measure both sides, and print a table."""
    results = {kind.name: measure(kind, rounds=rounds, pause=pause) for kind in (Nbdq, QemuStorageDaemon)}
    if output is not None:
        Path(output).write_text(json.dumps(results))
    print("| operation | longest wait: nbdq | qemu-storage-daemon | duration: nbdq | qemu-storage-daemon |")
    print("|---|---|---|---|---|")
    for name in results["nbdq"]:
        cells = []
        for number in (0, 1):
            for kind in results:
                values = [value[number] for value in results[kind].get(name, [])]
                cells.append(f"{statistics.median(values) * 1000:.0f} ms" if values else "")
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\nmedians of {rounds} rounds; {os.cpu_count()} processors")


if __name__ == "__main__":
    main()

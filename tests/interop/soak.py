"""A soak: several clients write, zero, discard and read one disk for as long as one likes, and judge every answer.

    .venv/bin/python -m tests.interop.soak --seconds 600 --seed 1

Memory and descriptors of the server must stay flat. In the end the disk holds what was written, without a leak.
"""

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.server import client as nbd
from tests.server.client import Client
from tests.support.images import Image, Layer, Variant, build
from tests.support.load import Ledger, LoadClient
from tests.support.operations import random_operations
from tests.support.scratch import scratch
from tests.support.serving import PATIENCE, Server
from tests.support.tools import execute, run

CONNECTIONS = 5
STRIPE = 8 << 20
#: Operations of one turn.
_TURN = 150
#: Growth of the resident memory after the first half that counts as flat. In a short soak payloads in flight alone make
#: such a difference; a long one needs no more.
ALLOWED_GROWTH = 24 << 20

_BASE = Layer("40M", ("write 0 10M", "compress 16M 8M"))
_STEPS = ("compress 8M 4M", "write 20M 1M", "zero 30M 1M")
DISKS = {
    "overlay": Variant("overlay", (_BASE, Layer("40M", _STEPS))),
    "subclusters": Variant("subclusters", (_BASE, Layer("40M", _STEPS, "extended_l2=on"))),
    "small-clusters": Variant("small-clusters", (_BASE, Layer("40M", _STEPS, "cluster_size=4k"))),
    "tiny-clusters": Variant("tiny-clusters", (Layer("40M", _STEPS, "cluster_size=512,refcount_bits=64"),)),
    "snapshot": Variant("snapshot", (Layer("40M", (*_STEPS, "snapshot one")),)),
}


@dataclass
class Figures:
    """What a soak did, and what it saw."""

    requests: int = 0
    connections: int = 0
    seconds: float = 0.0
    descriptors_before: int = 0
    descriptors_after: int = 0
    samples: list[int] = field(default_factory=list)
    """Resident bytes of the server while all clients are busy."""

    @property
    def resident(self) -> tuple[int, int]:
        """The most memory in the second and in the last quarter of the time, in bytes."""
        quarter = max(1, len(self.samples) // 4)
        second, last = self.samples[quarter : 2 * quarter] or self.samples, self.samples[-quarter:]
        return max(second), max(last)

    def __str__(self) -> str:
        early, late = (resident >> 20 for resident in self.resident)
        return (
            f"{self.requests} requests over {self.connections} connections in {self.seconds:.0f} s; "
            f"memory {early} MiB, later {late} MiB; "
            f"descriptors {self.descriptors_before} before, {self.descriptors_after} after"
        )

    def judge(self) -> None:
        """Memory is flat in the second half, and nothing is left of clients that are gone.

        Raises:
            AssertionError: it is not so.
        """
        early, late = self.resident
        assert late - early < ALLOWED_GROWTH, str(self)
        assert self.descriptors_after <= self.descriptors_before, str(self)


def soak(variant: Variant, *, seed: int, go_on: Callable[[int], bool]) -> Figures:
    """Load a server of ``variant`` from many threads while ``go_on(turns done by each)``; judge all that it leaves.

    Raises:
        AssertionError: something was read that was not written, or the image is not clean.
    """
    figures = Figures()
    begun = time.monotonic()
    with scratch() as directory, tempfile.TemporaryDirectory(prefix="nbdq-") as home:
        image = build(variant, directory)
        content = _raw(image)
        server = Server("--allow-backing", directory, image.top, directory=Path(home))
        Server.running.append(server)
        try:
            server.wait_until_ready()
            figures.descriptors_before = _descriptors(server.process.pid)
            workers = [_Worker(server, image, content, number, seed, go_on) for number in range(CONNECTIONS)]
            for worker in workers:
                worker.thread.start()
            while any(worker.thread.is_alive() for worker in workers):
                time.sleep(0.1)
                if all(worker.turns for worker in workers):
                    figures.samples.append(_resident(server.process.pid))
            for worker in workers:
                if worker.failure is not None:
                    raise worker.failure
            deadline = time.monotonic() + PATIENCE
            while (now := _descriptors(server.process.pid)) > figures.descriptors_before:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)  # it has yet to see that the last clients are gone
            figures.descriptors_after = now
            status = server.terminate()
            assert status == 0, f"status {status}\n{server.stderr}"
            assert "Traceback" not in server.stderr, server.stderr
        finally:
            Server.running.remove(server)
            server.kill()
        _judge(image, workers)
    figures.requests = sum(worker.requests for worker in workers)
    figures.connections = sum(worker.connections for worker in workers)
    figures.seconds = time.monotonic() - begun
    return figures


class _Worker:
    """One client at a time, on a part of the disk of its own."""

    def __init__(
        self, server: Server, image: Image, content: bytes, number: int, seed: int, go_on: Callable[[int], bool]
    ) -> None:
        self.origin = number * STRIPE
        cluster_size = image.variant.layers[-1].cluster_size
        self.ledger = Ledger(content[self.origin : self.origin + STRIPE], cluster_size=cluster_size)
        self.turns = self.requests = self.connections = 0
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self._server = server
        self._go_on = go_on
        self._generator = random.Random(f"{seed}:{number}")
        self._first_number = number << 48

    def _run(self) -> None:
        try:
            while self._go_on(self.turns):
                with Client(str(self._server.socket)) as client:
                    self.connections += 1
                    client.go(contexts=("base:allocation",))
                    for _ in range(self._generator.randrange(1, 6)):
                        self._turn(client)
                    client.send(nbd.DISC)
        except BaseException as error:
            self.failure = error

    def _turn(self, client: Client) -> None:
        load = LoadClient(client, self.ledger, origin=self.origin)
        load.play(
            random_operations(
                self._generator.randrange(1 << 30),
                _TURN,
                size=STRIPE,
                cluster_size=self.ledger.cluster_size,
                number=self._first_number + self.turns * _TURN,
                whole_sectors=True,
            )
        )
        reply = client.ask(nbd.BLOCK_STATUS, self.origin, STRIPE)
        assert not reply.error, reply.message
        self.requests += load.answered + 1
        self.turns += 1


def _resident(pid: int) -> int:
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGESIZE")


def _descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def _raw(image: Image) -> bytes:
    copy = image.directory / "copy.raw"
    run("qemu-img", "convert", "-O", "raw", image.top, copy)
    return copy.read_bytes()


def _judge(image: Image, workers: list[_Worker]) -> None:
    check = execute("qemu-img", "check", "-f", "qcow2", image.top)
    assert check.returncode == 0, check.stdout + check.stderr
    content = _raw(image)
    for worker in workers:
        found = content[worker.origin : worker.origin + STRIPE]
        assert found == worker.ledger.current(0, STRIPE), f"the part of the disk at {worker.origin} is wrong"


def main() -> int:
    """Soak for some time and print figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.interop.soak")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--disk", choices=DISKS, default="overlay")
    words = parser.parse_args()
    end = time.monotonic() + words.seconds
    figures = soak(DISKS[words.disk], seed=words.seed, go_on=lambda turns: time.monotonic() < end)
    print(figures)
    figures.judge()
    return 0


if __name__ == "__main__":
    sys.exit(main())

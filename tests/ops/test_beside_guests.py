"""Operations beside guests that write all the time: nothing that was written is lost, and nothing else appears.

Each guest has a part of the disk of its own, and knows what it must read as. The seed of a run is its parameter.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdq.chain.live import LiveChain
from nbdq.chain.overlay import OverlayDisk
from nbdq.ops.active_commit import ActiveCommit
from nbdq.ops.commit import Commit
from nbdq.ops.operation import Operation
from nbdq.ops.rebase import Rebase
from nbdq.ops.stream import Stream
from tests.ops.harness import Served, check, guests, qemu_reads, served
from tests.support.images import Image, Layer, Variant, build
from tests.support.operations import Guest, Verb, random_operations
from tests.support.scratch import scratch
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io")

SIZE = 12 << 20
GUESTS = 3
PART = SIZE // GUESTS

_STEPS = ("write 0 3M", "write 4M+512 1M", "zero 6M 1M", "compress 8M 1M", "discard 1M 512k", "write 10M 2M")
_MORE = ("write 2M 2M", "zero 4M 64k", "compress 5M 512k", "write 9M 1k")
CHAINS = {
    "64k": tuple(Layer("12M", steps) for steps in (_STEPS, _MORE, ("write 3M 1M", "zero 0 128k"), _MORE)),
    "mixed": (
        Layer("12M", ("write 0 12M",), format="raw"),
        Layer("12M", _MORE, "cluster_size=4k"),
        Layer("12M", _STEPS, "extended_l2=on"),
        Layer("12M", _MORE, "cluster_size=16k,extended_l2=on"),
    ),
    "version 2": tuple(Layer("12M", steps, "compat=0.10") for steps in (_STEPS, _MORE, _STEPS, _MORE)),
    "short": (
        Layer("12M", ("write 0 12M",)),
        Layer("5M", ("write 1M 1M",)),
        Layer("12M", _STEPS, "cluster_size=32k"),
        Layer("12M", ("write 0 64k",), "cluster_size=4k"),
    ),
}

OPERATIONS: dict[str, Callable[[LiveChain], Operation]] = {
    "active commit": lambda chain: ActiveCommit(chain, base=len(chain.layers) - 1),
    "active commit into the next layer": lambda chain: ActiveCommit(chain, base=1),
    "intermediate commit": lambda chain: Commit(chain, top=1, base=3),
    "intermediate commit of one layer": lambda chain: Commit(chain, top=2, base=3),
    "stream": lambda chain: Stream(chain),
    "stream down to a base": lambda chain: Stream(chain, base=2),
    "stream into a layer below": lambda chain: Stream(chain, index=1, base=3),
    "rebase": lambda chain: Rebase(chain, name="other", format="qcow2"),
}


class _Writer:
    """One guest, and what its part of the disk must hold."""

    def __init__(self, disk: Served, part: int, seed: int) -> None:
        self.disk = disk
        self.start = part * PART
        assert isinstance(disk.device, OverlayDisk)
        self.cluster_size = disk.device.top.cluster_size
        self.model = Guest(disk.read(self.start, PART), cluster_size=self.cluster_size)
        self.random = random.Random(seed * GUESTS + part)
        self.number = part << 32

    def work(self) -> None:
        """Some requests, and a look at what is there."""
        for request in random_operations(
            self.random.randrange(1 << 30), 8, size=PART, cluster_size=self.cluster_size, number=self.number
        ):
            self.number += 1
            if request.verb is Verb.DISCARD:
                continue  # which clusters it takes depends on the active layer, and that changes
            length = min(request.length, 256 << 10)
            moved = request._replace(length=length, offset=request.offset + self.start)
            payload = request._replace(length=length)
            if request.verb in (Verb.WRITE, Verb.BLANK):
                data = payload.payload()
                with self.disk.gate.request():
                    device = self.disk.device
                    is_loop = self.start == 0  # one thread only may try to write without waiting
                    if not (is_loop and device.write_cached(moved.offset, memoryview(data))):
                        device.write(moved.offset, memoryview(data))
            else:
                self.disk.perform(moved)
            self.model.apply(payload)
        with self.disk.gate.request():
            self.look()
        time.sleep(0.001)

    def look(self) -> None:
        assert self.disk.read(self.start, PART) == bytes(self.model.content), f"guest {self.start // PART}"


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_guests_never_notice(name: str, chain: str) -> None:
    seed = random.randrange(1 << 20)
    print(f"seed {seed}")
    with scratch() as directory:
        image = build(Variant("test", CHAINS[chain]), directory)
        run("qemu-img", "create", "-q", "-f", "qcow2", directory / "other", str(SIZE))
        run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 2M", directory / "other")
        _run(image, OPERATIONS[name], seed)


def _run(image: Image, make: Callable[[LiveChain], Operation], seed: int) -> None:
    with served(image) as disk:
        writers = [_Writer(disk, part, seed) for part in range(GUESTS)]
        with guests(disk, *(writer.work for writer in writers)):
            time.sleep(0.05)
            disk.carry_out(make(disk.chain))
            time.sleep(0.05)
        for writer in writers:
            writer.look()
        content = disk.read()
        paths = [Path(layer.path) for layer in disk.chain.layers]
    assert qemu_reads(paths[0]) == content if paths[0].suffix != ".raw" else paths[0].read_bytes() == content
    check(*[path for path in paths if path.suffix != ".raw"])

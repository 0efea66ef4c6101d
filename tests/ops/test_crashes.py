"""Power cuts at any moment of a commit, a stream or a rebase, while a guest writes and flushes.

After each the disk, from the top that was recorded last, is sound and holds what was flushed, or was written since.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from nbdq.chain.clusters import ClusterCache
from nbdq.chain.live import LiveChain, LowerLayer
from nbdq.chain.open import open_disk
from nbdq.chain.overlay import OverlayDisk
from nbdq.ops import active_commit, commit, transfer
from nbdq.ops.active_commit import ActiveCommit
from nbdq.ops.commit import Commit
from nbdq.ops.control import Control
from nbdq.ops.operation import MarkingOperation, MirroringOperation, Operation
from nbdq.ops.rebase import Rebase
from nbdq.ops.stream import Stream
from tests.crash.guest import Guest, Habits, History
from tests.crash.live.images import Layer, build
from tests.crash.recorder import Act, Recorder
from tests.crash.stamps import read_stamps
from tests.crash.states import Timeline, choices, materialise
from tests.crash.verdict import POLICY, compare
from tests.ops.harness import qemu_reads
from tests.support.scratch import scratch
from tests.support.tools import execute, requires

pytestmark = requires("qemu-img", "qemu-io")

_HABITS = Habits(write=60, zero=8, zero_mapped=4, discard=10, flush=18, largest=24, aligned_to=8)
_STATES = 80
_PER_CUT = 6
#: Every how many states QEMU is asked as well.
_QEMU = 10

_KIB = 1024
CHAINS = {
    "plain": (Layer(), Layer(filled=0.3, zeroed=0.2), Layer(filled=0.4), Layer(filled=0.2)),
    "mixed": (
        Layer("cluster_size=16k,extended_l2=on"),
        Layer("cluster_size=512", filled=0.3, size=128 * _KIB),
        Layer("cluster_size=8k", filled=0.3, compressed=True),
        Layer("cluster_size=4k", filled=0.2),
    ),
    "compressed": (
        Layer(compressed=True),
        Layer(filled=0.3, compressed=True),
        Layer(filled=0.4, compressed=True),
        Layer(filled=0.2),
    ),
    "growing": (
        Layer(size=64 * _KIB),
        Layer("cluster_size=2k", filled=0.4, size=192 * _KIB),
        Layer(filled=0.3),
        Layer(filled=0.2),
    ),
}
OPERATIONS: dict[str, Callable[[LiveChain], Operation]] = {
    "active commit": lambda chain: ActiveCommit(chain, base=3),
    "intermediate commit": lambda chain: Commit(chain, top=1, base=3),
    "stream": lambda chain: Stream(chain),
    "stream to a base": lambda chain: Stream(chain, base=2),
    "stream below the active layer": lambda chain: Stream(chain, index=1, base=3),
    "rebase": lambda chain: Rebase(chain, name="layer0", format="qcow2"),
}


class _Device:
    """The disk as the guest sees it: whatever is the device now."""

    def __init__(self, chain: LiveChain) -> None:
        self._chain = chain

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chain.device, name)


class _Acting(Control):
    """Lets the guest make a request after some pieces of work."""

    def __init__(self, guest: Guest, generator: random.Random) -> None:
        super().__init__()
        self._guest = guest
        self._random = generator

    def advance(self, length: int = 0, *, cost: int | None = None) -> None:
        super().advance(length, cost=cost)
        if self._random.random() < 0.5:
            self._guest.work(1, cached=self._random.random() < 0.5)


@dataclass
class _Recording:
    recorder: Recorder
    history: History
    before: list[bytes]
    paths: list[Path]
    tops: list[tuple[int, str]]
    """From which moment on which file is the top."""

    def top(self, moment: int) -> str:
        return [name for since, name in self.tops if since <= moment][-1]


def _record(paths: list[Path], make: Callable[[LiveChain], Operation], generator: random.Random) -> _Recording:
    before = [path.read_bytes() for path in paths]
    recorder = Recorder(paths)
    history = History(recorder, read_stamps(qemu_reads(paths[0])), first_number=1000)
    recording = _Recording(recorder, history, before, paths, [(0, paths[0].name)])
    with recorder.installed(), closing(ClusterCache(budget=1 << 20)) as clusters:
        chain = LiveChain.open(str(paths[0]), format="qcow2", policy=POLICY, clusters=clusters)
        guest = Guest(_Device(chain), history, _HABITS, generator)
        guest.work(5, cached=True)
        operation = make(chain)
        if isinstance(operation, MirroringOperation):
            operation.on_ready = operation.complete
        operation.run(_Acting(guest, generator))
        operation.pivot()
        recording.tops.append((recorder.tick(), Path(chain.layers[0].path).name))
        if isinstance(operation, MarkingOperation):
            operation.mark()
        guest.work(4, cached=True)
        operation.finish()
        guest.work(4, cached=True)
        chain.close()
    return recording


def _states(recording: _Recording, generator: random.Random) -> Iterator[tuple[int, list[bytearray]]]:
    timeline = Timeline(recording.before, recording.recorder.entries)
    entries = sorted(recording.recorder.entries, key=lambda entry: entry.begun)
    cuts = [entry for entry in entries if entry.act is not Act.SYNC]
    share = min(1.0, _STATES / _PER_CUT / len(cuts))
    for entry in cuts:
        if generator.random() < share:
            moment = timeline.at(entry.begun)
            for fates in choices(moment, entry, generator, count=_PER_CUT):
                yield entry.begun, materialise(moment, fates)


def _explore(make: Callable[[LiveChain], Operation], chain: str, seed: int) -> str | None:
    """What is wrong with a state, if any is."""
    generator = random.Random(f"{chain} {seed}")
    with scratch() as directory:
        images = directory / "images"
        images.mkdir()
        build(images, "layer", CHAINS[chain], number=1)
        paths = [images / f"layer{number}" for number in reversed(range(len(CHAINS[chain])))]
        recording = _record(paths, make, generator)
        for count, (moment, contents) in enumerate(_states(recording, generator)):
            for path, content in zip(paths, contents, strict=True):
                path.write_bytes(content)
            top = images / recording.top(moment)
            if finding := _judge(top, recording, moment, is_qemu_asked=count % _QEMU == 0):
                return f"seed {seed}, power cut at {moment}, {top.name} on top: {finding}"
    return None


def _judge(top: Path, recording: _Recording, moment: int, *, is_qemu_asked: bool) -> str | None:
    with closing(ClusterCache(budget=1 << 20)) as clusters:
        disk = open_disk(str(top), format="qcow2", policy=POLICY, clusters=clusters)
        with closing(disk):
            content = bytearray(disk.size)
            disk.read_into(0, memoryview(content))
            files = [layer.path for layer in disk.layers]
    if finding := compare(read_stamps(content), recording.history.allowed(moment)):
        return str(finding)
    if is_qemu_asked:
        if qemu_reads(top) != content:
            return "QEMU reads something else"
        for file in files:
            done = execute("qemu-img", "check", "-f", "qcow2", file)
            if done.returncode not in (0, 3):
                return f"qemu-img check {file}: {done.stdout}"
    return None


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disks of 256 KiB are copied in many pieces and passes."""
    monkeypatch.setattr(transfer, "_PIECE", 16 << 10)
    monkeypatch.setattr(transfer, "_ZEROS", 32 << 10)
    monkeypatch.setattr(commit, "_DURABLE_BYTES", 48 << 10)
    monkeypatch.setattr(active_commit, "_SMALL", 8 << 10)
    monkeypatch.setattr(active_commit, "_GRANULARITY_BITS", 12)
    monkeypatch.setattr(active_commit, "_IDLE", 0)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_power_cut_loses_nothing_that_was_flushed(name: str, chain: str) -> None:
    for seed in range(int(os.environ.get("NBDQ_CRASH_SEEDS", "1"))):
        assert _explore(OPERATIONS[name], chain, seed) is None


class _UnflushedCommit(Commit):
    def run(self, control: Control) -> None:
        transfer = self._begin(control)
        assert self._writer is not None
        for _ in transfer.copy(0, self._writer.disk.size, control):
            pass


class _HastyCommit(Commit):
    def run(self, control: Control) -> None:
        self._chain.set_backing(0, "layer0", "qcow2")
        super().run(control)


class _UnflushedStream(Stream):
    def pivot(self) -> None:
        assert self._repoint is not None
        with patch.object(OverlayDisk, "flush", lambda disk: None):
            self._repoint.do()

    def run(self, control: Control) -> None:
        flush = OverlayDisk.flush

        def only_for_guests(disk: OverlayDisk) -> None:
            if not control.total or control.done < control.total:
                flush(disk)

        with patch.object(OverlayDisk, "flush", only_for_guests):
            super().run(control)


class _DeafCommit(ActiveCommit):
    def _catch_up(self, control: Control) -> int:
        return 0


MUTANTS: dict[str, Callable[[LiveChain], Operation]] = {
    "the base is not durable when the chain changes": lambda chain: _UnflushedCommit(chain, top=1, base=3),
    "the chain changes before anything is copied": lambda chain: _HastyCommit(chain, top=1, base=3),
    "what was filled is not durable when the chain changes": _UnflushedStream,
    "what the guest writes meanwhile is not copied": lambda chain: _DeafCommit(chain, base=3),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_an_operation_without_a_barrier_is_found_out(
    mutant: Callable[[LiveChain], Operation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LowerLayer, "flush", lambda layer: None)
    assert any(_explore(mutant, chain, seed) for seed in range(5) for chain in CHAINS)

"""What is done to a disk between two pieces of a long change (P124) is done as between two requests; QEMU judges."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdq.ops.commit import Commit
from nbdq.ops.control import Control
from nbdq.ops.operation import Operation
from nbdq.ops.snapshot import ExternalSnapshot, SnapshotPlan
from nbdq.qcow2.bitmaps.tables import load_bits
from nbdq.qcow2.format import read_header
from nbdq.server.exports.export import Export, Exports
from nbdq.server.exports.volume import Volume
from nbdq.server.exports.wish import Wish
from nbdq.server.threads import in_thread
from nbdq.server.transmission import long_change, pending
from nbdq.server.transmission.perform import Performer
from nbdq.storage import FileStorage
from tests.ops.harness import Served
from tests.server.client import ENOSPC, FUA, PATIENCE, TRIM, WRITE, WRITE_ZEROES, Client
from tests.server.harness import LoopServer
from tests.support.engine import shown
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io")

M = 1 << 20
SIZE = 8 * M
OLD = b"\7" * SIZE


class Bench:
    """A disk that is served, one piece of whose long changes is carried out when a test lets it: a MiB each."""

    def __init__(self, directory: Path, served: Served, server: LoopServer, volume: Volume, export: Export) -> None:
        self.directory = directory
        self.served = served
        self.server = server
        self.volume = volume
        self.export = export
        self.may_change = threading.Semaphore(0)
        self.pieces: list[tuple[int, int]] = []
        """(offset, length) of those that have been carried out."""
        self.client: Client = server.connect().go("disk", extended=True)

    def change(self, perform: Callable[..., None], *arguments: Any) -> None:
        """In the place of the performer's method."""
        operation, offset, length = arguments[1:4]
        if operation & 0xFFFF != WRITE:
            assert self.may_change.acquire(timeout=PATIENCE)
            self.pieces.append((offset, length))
        perform(*arguments)

    def let(self, count: int) -> None:
        """Let so many pieces happen, and wait until they have begun."""
        wanted = len(self.pieces) + count
        self.may_change.release(count)
        self.server.wait_for(lambda: len(self.pieces) == wanted, f"{wanted} pieces")

    def within(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do something for which the disk has to be drained, which it is after one more piece."""
        task = self.server.call(lambda: asyncio.get_running_loop().create_task(work()))
        self.server.wait_for(lambda: self.server.call(lambda: self.volume.gate.is_closed), "somebody who drains")
        before = len(self.pieces)
        self.may_change.release()
        self.server.wait(lambda: asyncio.wait([task]))
        task.result()
        assert len(self.pieces) == before + 1

    def operate(self, operation: Operation) -> None:
        """What a job does, with one more piece at its pivot."""

        async def pivot() -> None:
            async with self.volume.drained():
                await in_thread(operation.pivot)
                self.volume.adopt()

        operation.run(Control())
        self.within(pivot)
        operation.finish()

    def end(self) -> int:
        """Let everything happen that is left; the error number of the reply."""
        self.may_change.release(1000)
        return self.client.reply().error


@pytest.fixture
def bench(loop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Three layers; the lowest has data everywhere, and the top some, and a bitmap."""
    for name, below in (("base", []), ("middle", ["-b", "base"]), ("top", ["-b", "middle"])):
        options = [*below, "-F", "qcow2"] if below else []
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", *options, name, str(SIZE), cwd=tmp_path)
    run("qemu-io", "-c", f"write -q -P 7 0 {SIZE}", "base", cwd=tmp_path)
    run("qemu-io", "-c", f"write -q -P 7 {2 * M} {M}", "-c", f"write -q -P 7 {6 * M} 64k", "top", cwd=tmp_path)
    run("qemu-img", "bitmap", "--add", "-g", "64k", "top", "changes", cwd=tmp_path)
    for module in (long_change, pending):
        monkeypatch.setattr(module, "LONG", M)
    monkeypatch.setattr(long_change, "_STEP", M)
    monkeypatch.setattr(long_change, "_QUICK_SECONDS", -1)
    monkeypatch.setattr(long_change, "_SLOW_SECONDS", PATIENCE)
    perform = Performer.change
    with Served(tmp_path / "top") as served:
        volume = Volume("disk", served.chain, Exports())
        export = volume.offer(volume.make(Wish("disk", "disk", writable=True)))
        with LoopServer(export, loop=loop) as server:
            made = Bench(tmp_path, served, server, volume, export)
            monkeypatch.setattr(Performer, "change", lambda *arguments: made.change(perform, *arguments))
            yield made


@pytest.mark.parametrize("command", [WRITE_ZEROES, TRIM])
def test_after_a_snapshot_the_rest_goes_to_the_overlay_and_the_snapshot_keeps_what_was_there(
    bench: Bench, command: int
) -> None:
    bench.client.send(command, M // 2, 6 * M, flags=FUA)
    bench.let(2)
    overlay = bench.directory / "overlay"
    bench.operate(ExternalSnapshot(bench.served.chain, SnapshotPlan(str(overlay), {"cluster_size": 64 << 10})))
    done = sum(bench.pieces[-1])
    assert M < done < 6 * M
    other = bench.server.connect().go("disk")
    assert other.error(WRITE, M, 4096, payload=b"x" * 4096) == 0
    assert other.error(WRITE, 6 * M, 4096, payload=b"x" * 4096) == 0
    assert bench.end() == 0
    expected = bytearray(OLD)
    expected[M // 2 : 6 * M + M // 2] = bytes(6 * M)
    expected[M : M + 4096] = b"x" * 4096  # behind the change; the other one was before it
    assert bench.served.read() == expected
    bench.served.chain.device.finish()  # type: ignore[union-attr]
    assert shown(overlay) == expected
    assert shown(bench.directory / "top") == OLD[: M // 2] + bytes(done - M // 2) + OLD[done:]
    run("qemu-img", "check", "-U", overlay)
    run("qemu-img", "check", "-U", bench.directory / "top")


def test_a_commit_below_takes_nothing_of_it_along_and_a_bitmap_has_all_of_it(bench: Bench) -> None:
    bench.client.send(WRITE_ZEROES, M // 2, 6 * M)
    bench.let(1)
    bench.operate(Commit(bench.served.chain, top=1, base=2))
    assert bench.end() == 0
    expected = OLD[: M // 2] + bytes(6 * M) + OLD[6 * M + M // 2 :]
    assert bench.served.read() == expected
    assert shown(bench.directory / "base") == OLD
    bench.served.chain.device.finish()  # type: ignore[union-attr]
    storage = FileStorage.open(str(bench.directory / "top"))
    bits = load_bits(storage, read_header(storage), "changes")
    storage.close()
    assert bits is not None
    granules = range(M // 2 >> 16, 6 * M + M // 2 >> 16)
    assert [number for number in range(SIZE >> 16) if bits.packed[number >> 3] >> (number & 7) & 1] == list(granules)


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("smaller", [5 * M + 512, M + 512], ids=["ahead", "behind"])
def test_what_a_smaller_disk_has_lost_is_left_out_and_does_not_come_back_when_it_grows(
    bench: Bench, smaller: int, grows: bool
) -> None:
    bench.client.send(WRITE_ZEROES, 512, 7 * M)
    bench.let(2)
    bench.within(lambda: bench.volume.resize(smaller, shrink=True))
    if grows:
        bench.server.wait(lambda: bench.volume.resize(SIZE))
    assert bench.end() == 0
    assert bench.served.read() == OLD[:512] + bytes((SIZE if grows else smaller) - 512)
    assert all(length > 0 and start + length <= 7 * M + 512 for start, length in bench.pieces)


def test_a_client_that_is_cut_leaves_the_rest_as_it_was(bench: Bench) -> None:
    bench.client.send(WRITE_ZEROES, 0, SIZE)
    bench.let(2)
    bench.server.call(lambda: bench.export.cut(at_once=True))
    bench.server.wait_for_connections(0)
    bench.may_change.release(1000)
    bench.server.wait_until_idle()
    done = sum(bench.pieces[-1])
    assert done < SIZE
    assert bench.served.read() == bytes(done) + OLD[done:]


def test_a_medium_that_is_full_in_the_middle_is_the_answer_and_what_came_before_is_done(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.client.send(WRITE_ZEROES, 0, SIZE, flags=FUA)
    bench.let(3)

    def no_room(*_: object) -> None:
        raise OSError(ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(FileStorage, "reserve", no_room)
        full.setattr(FileStorage, "truncate", no_room, raising=False)
        assert bench.end() == ENOSPC
    done = sum(bench.pieces[-2])
    left = bench.served.read()
    assert left[:done] == bytes(done)
    assert set(left[done:]) <= {0, 7}
    assert bench.client.error(WRITE_ZEROES, 0, SIZE) == 0
    assert bench.served.read() == bytes(SIZE)

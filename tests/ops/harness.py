"""A live chain with a guest on it, in one process: what drains the disk here is a lock, and not a server."""

import contextlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nbdq.chain.clusters import ClusterCache
from nbdq.chain.disk import ChainDisk
from nbdq.chain.live import LiveChain, WritableDisk
from nbdq.chain.policy import Policy
from nbdq.ops.control import Control
from nbdq.ops.operation import MarkingOperation, MirroringOperation, Operation
from tests.support.images import Image
from tests.support.operations import Operation as Request
from tests.support.operations import Verb
from tests.support.tools import execute, run


class Gate:
    """Many requests or one drain; who waits to drain goes first."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._requests = 0
        self._drains = 0

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """While a request runs."""
        with self._condition:
            self._condition.wait_for(lambda: not self._drains)
            self._requests += 1
        try:
            yield
        finally:
            with self._condition:
                self._requests -= 1
                self._condition.notify_all()

    @contextlib.contextmanager
    def drained(self) -> Iterator[None]:
        """While no request runs. Within a drain there may be another one of the same thread."""
        with self._condition:
            self._drains += 1
            self._condition.wait_for(lambda: not self._requests)
        try:
            yield
        finally:
            with self._condition:
                self._drains -= 1
                self._condition.notify_all()


class Served:
    """A chain that is open as a server has it."""

    def __init__(
        self,
        path: Path,
        *,
        format: str = "qcow2",
        options: tuple[str, ...] | list[str] = (),
        cluster_budget: int = 8 << 20,
        **more: Any,
    ) -> None:
        """``options`` are those of ``nbdq serve``."""
        self.clusters = ClusterCache(budget=cluster_budget)
        self.events: list[str] = []
        roots = tuple(value for option, value in itertools.pairwise(options) if option == "--allow-backing")
        policy = Policy(roots=roots, allow_data_file="--allow-data-file" in options)
        self.chain = LiveChain.open(
            str(path), format=format, policy=policy, clusters=self.clusters, on_event=self.events.append, **more
        )
        self.gate = Gate()

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.closing(self.clusters):
            self.chain.close()

    @property
    def device(self) -> WritableDisk:
        assert not isinstance(self.chain.device, ChainDisk)
        return self.chain.device

    def perform(self, request: Request) -> None:
        """Carry a guest's request out."""
        with self.gate.request():
            disk = self.device
            match request.verb:
                case Verb.WRITE | Verb.BLANK:
                    disk.write(request.offset, memoryview(request.payload()))
                case Verb.ZERO | Verb.UNMAP:
                    disk.zero(request.offset, request.length, unmap=request.verb is Verb.UNMAP)
                case Verb.DISCARD:
                    disk.discard(request.offset, request.length)
                case Verb.READ:
                    self.read(request.offset, request.length)
                case Verb.FLUSH:
                    disk.flush()

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """What the guest reads; everything by default."""
        content = bytearray((self.device.size if length is None else length) or 0)
        for position in range(0, len(content), 1 << 20):
            self.device.read_into(offset + position, memoryview(content)[position : position + (1 << 20)])
        return bytes(content)

    def carry_out(self, operation: Operation, *, control: Control | None = None) -> None:
        """What a job does."""
        if isinstance(operation, MirroringOperation):
            operation.on_ready = operation.complete
        operation.run(control or Control())
        with self.gate.drained():
            operation.pivot()
            if isinstance(operation, MarkingOperation):
                operation.mark()
        operation.finish()

    def give_up(self, operation: Operation) -> None:
        """What a job does when it was cancelled, or has failed."""
        with self.gate.drained():
            operation.abort()


@contextlib.contextmanager
def guests(served: Served, *jobs: Callable[[], None]) -> Iterator[None]:
    """While threads do their jobs over and over."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def work(job: Callable[[], None]) -> None:
        try:
            while not stop.is_set():
                job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def check(*paths: Path) -> None:
    """``qemu-img check`` finds nothing at all."""
    for path in paths:
        done = execute("qemu-img", "check", "-f", "qcow2", path, cwd=path.parent)
        assert done.returncode == 0, f"{path.name}: {done.stdout}{done.stderr}"


def qemu_reads(path: Path, *, format: str = "qcow2") -> bytes:
    """What QEMU reads through the chain of an image."""
    flat = path.with_name("flat.raw")
    run("qemu-img", "convert", "-t", "unsafe", "-f", format, "-O", "raw", path, flat, cwd=path.parent)
    try:
        return flat.read_bytes()
    finally:
        flat.unlink()


def info(path: Path) -> dict[str, Any]:
    """``qemu-img info``."""
    return json.loads(run("qemu-img", "info", "-f", "qcow2", "--output=json", path, cwd=path.parent))  # type: ignore[no-any-return]


def served(image: Image) -> Served:
    """A built image, open."""
    return Served(image.top, format=image.format, options=image.options)


def qcow2_paths(image: Image) -> list[Path]:
    """Top first, and no raw ones."""
    return [path for path in reversed(image.paths) if path.suffix != ".raw"]

"""All of ``nbdq serve`` but its sockets, on one thread: opened as the command does, ordered as administrators do."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from nbdq.admin.arguments import parse
from nbdq.admin.job import Job
from nbdq.admin.job_request import JobRequest
from nbdq.admin.monitor import Access
from nbdq.admin.policies import Policies
from nbdq.admin.recovery import remove_obsolete_overlays, remove_pending_overlays
from nbdq.admin.registry import Reply, known_commands
from nbdq.admin.service import Administration
from nbdq.admin.state import State
from nbdq.chain.clusters import ClusterCache
from nbdq.chain.live import LiveChain
from nbdq.chain.policy import Policy
from nbdq.errors import ChainError
from nbdq.locks import Locking
from nbdq.ops.operation import Operation
from nbdq.qcow2.format import read_header
from nbdq.server.exports.export import Exports
from nbdq.server.exports.volume import Volume
from nbdq.server.exports.wish import Wish
from nbdq.storage import FileStorage

STATE = "state.json"


@dataclass(frozen=True)
class Disk:
    """What the command line says of a disk."""

    name: str
    image: str
    format: str = "qcow2"


class _NoReadAhead(ClusterCache):
    """Inflates nothing ahead, which would be done by other threads."""

    def get_ahead(self, key: object, load: Callable[[], bytes]) -> None:
        """Leave it."""


class Server:
    """The disks of one directory, open. Owns them until :meth:`close` or :meth:`kill`."""

    def __init__(self, directory: Path, disks: Sequence[Disk], *, state: bool) -> None:
        """Open them as a start of the server does, with or without a state file.

        Raises:
            NbdqError, OSError: some cannot be opened; none is then.
        """
        self._clusters = _NoReadAhead(budget=1 << 20)
        self.state = State(str(directory / STATE) if state else None)
        self.administration = Administration(self.state, Policies(), None, Access())
        self.exports = Exports()
        self.volumes: dict[str, Volume] = {}
        try:
            for disk in disks:
                volume = Volume(disk.name, self._open(directory, disk, state=state), self.exports)
                self.volumes[disk.name] = volume
                volume.offer(volume.make(Wish(disk.name, disk.name, writable=True)))
        except BaseException:
            self.kill()
            raise

    def _open(self, directory: Path, disk: Disk, *, state: bool) -> LiveChain:
        policy = Policy(locking=Locking.OFF, allow_data_file=True)
        image = str(directory / disk.image)
        path, format, policy = self.administration.top_of(disk.name, image, format=disk.format, policy=policy)
        try:
            return LiveChain.open(path, format=format, policy=policy, clusters=self._clusters)
        except ChainError:
            named = _mark_of(path)
            if state or named is None:
                raise
            # Without a state file the administrator does what the message says.
            return LiveChain.open(named, format="qcow2", policy=policy, clusters=self._clusters)

    def clean_up(self) -> None:
        """Remove what was made and never used, as :meth:`start` does."""
        for name in self.volumes:
            remove_pending_overlays(self.state, name, self.used())
            remove_obsolete_overlays(self.state, name, self.used())

    def used(self) -> set[str]:
        """Paths of all layers."""
        return {layer.path for volume in self.volumes.values() for layer in volume.chain.layers}

    async def start(self) -> None:
        """Clean up, and go on with jobs."""
        await self.administration.start(self.volumes.values(), self.exports, lambda: None)
        await self.jobs_end()

    async def order(self, name: str, /, **arguments: Any) -> Reply:
        """Execute a command of the admin socket; jobs that it starts have ended well on return.

        Raises:
            NbdqError, OSError: it failed.
        """
        command = known_commands()[name]
        words = {word.rstrip("_").replace("_", "-"): value for word, value in arguments.items()}
        reply = await command.run(self.administration._context, parse(command.arguments, words))
        await self.jobs_end()
        return reply

    async def job(self, volume: Volume, make: Callable[[], Operation]) -> None:
        """Carry an operation out as a job, for which there is no command.

        Raises:
            NbdqError, OSError: it failed.
        """
        request = JobRequest(id="job", type="amend", volume=volume, command="none")
        await self.administration._context.jobs.start(request, make)
        await self.jobs_end()

    async def jobs_end(self) -> None:
        """Wait until no job is left."""
        jobs = self.administration._context.jobs
        for each in list(jobs):
            while each.is_active:
                await asyncio.sleep(0)
            if each.error is not None:
                raise JobFailed(each.error)

    def read(self, name: str) -> bytearray:
        """What the guest finds on a disk."""
        device = self.volumes[name].chain.device
        content = bytearray(device.size)
        device.read_into(0, memoryview(content))
        return content

    def close(self) -> None:
        """Stop cleanly."""
        self._clusters.close()
        for volume in self.volumes.values():
            volume.close()

    def kill(self) -> None:
        """Close the files, save nothing."""
        self._clusters.close()
        for volume in self.volumes.values():
            chain = volume.chain
            with suppress(OSError):
                chain._close_files(chain._layers)


class JobFailed(Exception):
    """A job ended with an error."""


def _mark_of(path: str) -> str | None:
    storage = FileStorage.open(path)
    try:
        return read_header(storage).overlay_marker
    finally:
        storage.close()


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Let what the admin side does in shared threads be done at once, so that runs can be repeated; jobs complete."""

    async def at_once(function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options)

    def complete(self: Job) -> None:
        self._operation.complete()  # type: ignore[attr-defined]

    with ExitStack() as stack:
        stack.enter_context(patch.object(asyncio, "to_thread", at_once))
        stack.enter_context(patch.object(Job, "_on_ready", complete))
        yield

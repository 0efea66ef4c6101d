"""Everything that a server needs to be administered, put together: state, policies, jobs and the socket.

Before the disks are opened, :meth:`Administration.top_of` says which image is the top of each; then it is given the
volumes, and goes on with the jobs that a former server had begun.
"""

import logging
import os
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from functools import partial

from nbdq.admin.arguments import parse
from nbdq.admin.checkpoints import Checkpoints
from nbdq.admin.context import Context, Peer, Resumed, Volumes
from nbdq.admin.jobs import Jobs
from nbdq.admin.monitor import Access, Monitor
from nbdq.admin.policies import Policies
from nbdq.admin.recovery import remove_obsolete_overlays, remove_pending_overlays
from nbdq.admin.registry import known_commands
from nbdq.admin.state import JobRecord, State
from nbdq.chain.policy import Policy
from nbdq.errors import NbdqError, OperationError, printable
from nbdq.server.exports.export import Exports
from nbdq.server.exports.volume import Volume
from nbdq.server.listener import Listener
from nbdq.server.threads import in_thread
from nbdq.storage import FileStorage

_log = logging.getLogger(__name__)


class Administration:
    """The administrators' side of a server. Owns the listener until :meth:`close`."""

    def __init__(
        self,
        state: State,
        policies: Policies,
        listener: Listener | None,
        access: Access,
        *,
        held: FileStorage | None = None,
    ) -> None:
        """Without a ``listener`` nobody can administer, but the state is kept; ``held`` is to be closed at the end."""
        self._state = state
        self._held = held
        self._policies = policies
        self._listener = listener
        self._access = access
        self.monitor: Monitor | None = None
        self.jobs = Jobs(state, self._emit)

    def top_of(self, name: str, image: str, *, format: str, policy: Policy) -> tuple[str, str, Policy]:
        """The image to open for the disk ``name``, its format, and what its chain may consist of.

        That is ``image`` itself, unless a former server took snapshots of it or committed it.
        """
        record = self._state.name_disk(name, image)
        if record.top is None:
            return image, format, policy
        _log.info("%s: the top is %s", printable(image), printable(record.top.path))
        known = (os.path.dirname(os.path.realpath(image)), *record.directories)
        return record.top.path, record.top.format, replace(policy, roots=(*policy.roots, *known))

    def is_passing(self, image: str) -> bool:
        """Whether the image is about to become part of a disk, or to be removed, and so is nobody else's business."""
        return self._state.is_passing(image)

    async def start(
        self,
        volumes: Iterable[Volume],
        exports: Exports,
        quit: Callable[[], None],
        reload: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Let administrators in, and go on with what was begun; ``quit`` has the server stop, ``reload`` read its
        configuration again.

        Raises:
            OSError: the state file cannot be written.
        """
        self._volumes = Volumes(volumes)
        exports.on_deleted = lambda export: self._emit("BLOCK_EXPORT_DELETED", {"id": export.id})
        self._context = Context(
            volumes=self._volumes,
            exports=exports,
            jobs=self.jobs,
            state=self._state,
            policies=self._policies,
            checkpoints=Checkpoints(),
            emit=self._emit,
            quit=quit,
            reload=reload,
            peer=Peer(os.getpid(), os.geteuid(), os.getegid()),
        )
        self.jobs.on_claimed = lambda volume, layers: volume.withdraw_derived(layers)
        self.jobs.on_released = lambda volume: volume.derive_soon()
        try:
            await self._recover(self._volumes)
        except BaseException:
            await self.jobs.stop()
            raise
        if self._listener is not None:
            known_commands()  # now, while nobody waits for the first answer
            self.monitor = Monitor(self._listener, self._context_of, self._access)
            self.monitor.start()

    async def admit(self, volume: Volume) -> None:
        """Let a disk be administered that was opened while the server runs, and go on with what was begun on it.

        Raises:
            OSError: the state file cannot be written.
        """
        self._volumes.add(volume)
        try:
            await self._recover([volume])
        except BaseException:
            self._volumes.remove(volume)
            raise

    async def dismiss(self, volume: Volume) -> None:
        """Close a disk that has no exports left, durably.

        Raises:
            OperationError: a job or command is at work on it; nothing was done.
            OSError: what was written last may be lost; it is closed nevertheless.
        """
        with self.jobs.exclusive(volume, "its end"):
            async with volume.drained():
                if volume.exports:
                    raise OperationError(f"{printable(volume.name)} is being exported again")
                self._volumes.remove(volume)
                await in_thread(volume.close)

    async def _recover(self, volumes: Iterable[Volume]) -> None:
        """Put away what a former server left behind, and go on with what it had begun."""
        used = {os.path.realpath(layer.path) for volume in self._volumes for layer in volume.chain.layers}
        for volume in volumes:
            volume.is_restructured = partial(self.jobs.restructures, volume)
            await in_thread(remove_pending_overlays, self._state, volume.name, used)
            await in_thread(remove_obsolete_overlays, self._state, volume.name, used)
            for job in self._state.disk(volume.name).jobs:
                await self._start_again(volume, job)

    async def stop(self, *, within: float) -> None:
        """Let administrators go, stop jobs; those that persist go on with the next server. No thread is left.

        Commands that have begun may take ``within`` seconds, unless they are told to :meth:`hurry`.
        """
        if self.monitor is not None:
            await self.monitor.stop(within=within)
        await self.jobs.stop()

    def hurry(self) -> None:
        """Cancel the commands that :meth:`stop` waits for."""
        if self.monitor is not None:
            self.monitor.hurry()

    def close(self) -> None:
        """Close the socket, and let others have the state file."""
        if self._listener is not None:
            self._listener.close()
        if self._held is not None:
            self._held.close()

    def _context_of(self, peer: Peer) -> Context:
        return replace(self._context, peer=peer)

    def _emit(self, event: str, data: dict[str, object]) -> None:
        if self.monitor is not None:
            self.monitor.emit(event, data)

    async def _start_again(self, volume: Volume, job: JobRecord) -> None:
        """A job that cannot be started again is over, whatever it had done; the disk is whole in any case."""
        try:
            command = known_commands()[job.command]
            arguments = parse(command.arguments, job.arguments, spell=str)
            await command.run(replace(self._context, resumed=Resumed(volume, job)), arguments)
            _log.info("job %s goes on", printable(job.id))
        except (NbdqError, OSError, KeyError) as error:
            _log.warning("job %s does not go on; it had ended, or cannot: %s", printable(job.id), error)
            await in_thread(self._forget, volume.name, job.id)

    def _forget(self, name: str, job_id: str) -> None:
        with self._state.transaction() as changes:
            changes.remove_job(name, job_id)

"""All jobs, and who may restructure which layers.

Two operations that change the structure of one chain exclude each other, and whoever looks at layers excludes those
that change these: the second is refused with the name of the first. That is what :meth:`Jobs.exclusive` is for, which
short commands use too. Loop thread only.
"""

import asyncio
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nbdq.admin.job import Job
from nbdq.admin.job_request import JobRequest
from nbdq.admin.state import JobRecord, State
from nbdq.errors import NotFound, OperationError, printable
from nbdq.ops.operation import Operation
from nbdq.server.exports.volume import Volume
from nbdq.server.threads import in_thread

_log = logging.getLogger(__name__)

#: QEMU's rule for identifiers.
_WELL_FORMED = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*", re.ASCII)


@dataclass(frozen=True, eq=False)
class _Claim:
    volume: Volume
    layers: frozenset[str] | None
    """Paths; None for the whole disk."""
    shared: bool
    """Whether the layers are only looked at."""
    holder: str
    """In words."""

    def conflicts(self, other: "_Claim") -> bool:
        if self.volume is not other.volume or (self.shared and other.shared):
            return False
        if self.layers is None or other.layers is None:
            return True
        if self.shared or other.shared:
            return bool(self.layers & other.layers)
        return bool(self.layers and other.layers)  # the chain of a disk is changed by one at a time


class NotActive(NotFound):
    """There is no block job of that name (any more)."""


class Jobs:
    """The jobs of a server."""

    def __init__(self, state: State, emit: Callable[[str, dict[str, Any]], None]) -> None:
        self._state = state
        self._emit = emit
        self._jobs: dict[str, Job] = {}
        self._claims: list[_Claim] = []
        self._starting = asyncio.Lock()
        self.on_claimed: Callable[[Volume, frozenset[str] | None], None] = lambda volume, layers: None
        """Told when a job begins to have layers of a disk for itself, by their paths, or None for all."""
        self.on_released: Callable[[Volume], None] = lambda volume: None
        """Told when somebody who had a disk, or layers of it, for himself is done."""

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._jobs.values()))

    def job(self, job_id: str) -> Job:
        """The job of that name.

        Raises:
            NotFound: there is none (any more).
        """
        try:
            return self._jobs[job_id]
        except KeyError:
            raise NotFound(f"Job '{printable(job_id)}' not found") from None

    def block_job(self, job_id: str) -> Job:
        """As :meth:`job`, for the commands that QEMU has for block jobs.

        Raises:
            NotActive: there is none (any more).
        """
        try:
            return self._jobs[job_id]
        except KeyError:
            raise NotActive(f"Block job '{printable(job_id)}' not found") from None

    def find_same(self, job_id: str, command: str, arguments: dict[str, Any]) -> Job | None:
        """The job of that name, if it is there; a client that lost its connection may ask for it twice.

        Raises:
            OperationError: the name is taken by another request.
        """
        there = self._jobs.get(job_id)
        if there is None or (there.request.command, there.request.arguments) == (command, arguments):
            return there
        raise OperationError(f"Job ID '{printable(job_id)}' already in use")

    @contextmanager
    def exclusive(
        self, volume: Volume, what: str, layers: frozenset[str] | None = None, *, shared: bool = False
    ) -> Iterator[None]:
        """Inside the block nobody else restructures the disk; ``what`` says who does.

        Args:
            layers: paths of the layers that take part; empty: only the top as such, which jobs do not mind; None: all.
            shared: they are only looked at, and must not change meanwhile; what happens to others does not matter.

        Raises:
            OperationError: somebody does; the text names the job.
        """
        claim = self._claim(volume, what, layers, shared=shared)
        try:
            yield
        finally:
            self._release(claim)

    def restructures(self, volume: Volume) -> bool:
        """Whether somebody may be writing to layers of the disk below its top."""
        return any(
            claim.volume is volume and not claim.shared and claim.layers != frozenset() for claim in self._claims
        )

    def _release(self, claim: _Claim) -> None:
        self._claims.remove(claim)
        self.on_released(claim.volume)

    def _claim(self, volume: Volume, what: str, layers: frozenset[str] | None, *, shared: bool = False) -> _Claim:
        wanted = _Claim(volume, layers, shared, what)
        for claim in self._claims:
            if claim.conflicts(wanted):
                raise OperationError(
                    f"disk '{printable(volume.name)}' is in use by {claim.holder}; wait until it ends, or cancel it"
                )
        self._claims.append(wanted)
        return wanted

    async def start(self, request: JobRequest, make: Callable[[], Operation]) -> Job:
        """Start what ``make`` returns (called in a thread, once the layers are ours); the job is recorded on return.

        The same request again, while its job is there, is answered with that job.

        Raises:
            OperationError: the name is taken by another request or not well-formed, or the layers are in use.
            ImageError, OSError: from ``make``, or the state file cannot be written.
        """
        async with self._starting:
            there = self.find_same(request.id, request.command, request.arguments)
            if there is not None:
                return there
            if not _WELL_FORMED.fullmatch(request.id) and request.id != request.volume.name:
                raise OperationError(f"Invalid job ID '{printable(request.id)}'")
            claim = self._claim(request.volume, f"job '{request.id}' ({request.type})", request.layers)
            self.on_claimed(request.volume, request.layers)
            try:
                operation = await in_thread(make)
                try:
                    if request.persistent:
                        await in_thread(self._record, request)
                except BaseException:
                    await in_thread(operation.abort)
                    raise
            except BaseException:
                self._release(claim)
                raise
            job = Job(
                request,
                operation,
                state=self._state,
                emit=self._emit,
                on_concluded=lambda job: self._release(claim),
                on_null=self._forget,
            )
            self._jobs[request.id] = job
            job.start()
            return job

    def _forget(self, job: Job) -> None:
        del self._jobs[job.id]

    def _record(self, request: JobRequest) -> None:
        with self._state.transaction() as changes:
            changes.put_job(
                request.volume.name, JobRecord(request.id, request.command, request.arguments, request.paths)
            )

    async def stop(self) -> None:
        """The server ends: stop all jobs; those that persist go on after a restart. No thread of a job is left."""
        jobs: Sequence[Job] = list(self._jobs.values())
        await asyncio.gather(*(job.stop() for job in jobs))

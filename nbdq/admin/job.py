"""One job: the life of a long operation, in QEMU's states, steered from any client and heard by all.

::

    created ─► running ◄─► paused        waiting ─► pending ─► concluded ─► null
                  │  └──► ready ◄─► standby │          │           ▲
                  └───────────┴─────────────┴──────────┴─► aborting┘

The operation itself runs in a thread of its own; everything here happens on the loop thread. A job belongs to no
client: who started it may leave.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from enum import StrEnum
from time import monotonic
from typing import Any

from nbdq.admin.job_request import JobRequest
from nbdq.admin.state import State
from nbdq.errors import ImageError, NbdqError, OperationError, in_words, printable
from nbdq.ops.control import Cancelled, Control
from nbdq.ops.operation import MarkingOperation, MirroringOperation, Operation
from nbdq.server.threads import in_thread
from nbdq.storage import FULL_ERRORS

_log = logging.getLogger(__name__)


class Status(StrEnum):
    """QEMU's JobStatus."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


_BEFORE_END = {Status.CREATED, Status.RUNNING, Status.PAUSED, Status.READY, Status.STANDBY}

#: In which states a job listens to which order (QEMU's JobVerb).
_VERBS: dict[str, set[Status]] = {
    "cancel": _BEFORE_END | {Status.WAITING, Status.PENDING},
    "pause": _BEFORE_END,
    "resume": _BEFORE_END,
    "set-speed": _BEFORE_END,
    "complete": {Status.READY, Status.STANDBY},
    "finalize": {Status.PENDING},
    "dismiss": {Status.CONCLUDED},
}


class Job:
    """A job from its creation until nobody can see it any more. Loop thread only."""

    def __init__(
        self,
        request: JobRequest,
        operation: Operation,
        *,
        state: State,
        emit: Callable[[str, dict[str, Any]], None],
        on_concluded: Callable[["Job"], None],
        on_null: Callable[["Job"], None],
    ) -> None:
        self.request = request
        self.status = Status.CREATED
        self.error: str | None = None
        """Why it failed; None while and if it did not."""
        self.control = Control(speed=request.speed)
        self.io_status = "ok"
        self._operation = operation
        self._state = state
        self._emit = emit
        self._on_concluded = on_concluded
        self._on_null = on_null
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._unpaused = asyncio.Event()
        self._unpaused.set()
        self._finalize = asyncio.Event()
        self._cancelled = False
        self._cancelled_softly = False  # READY, and told to end without changing the disk: no failure
        self._stopping = False  # the server ends: the record of the job stays
        self._begun = monotonic()
        emit("JOB_STATUS_CHANGE", {"id": self.id, "status": str(self.status)})

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def is_active(self) -> bool:
        """Whether it still has a claim to its layers."""
        return self.status not in (Status.CONCLUDED, Status.NULL)

    def start(self) -> None:
        """Begin, in the background."""
        if isinstance(self._operation, MirroringOperation):
            self._operation.on_ready = self._on_ready
        _log.info("job %s (%s) of disk %s begins", printable(self.id), self.request.type, self.request.volume.name)
        self._task = self._loop.create_task(self._live(), name=f"job {self.id}")

    # What clients may order; each raises OperationError if the job's state forbids it.

    def pause(self) -> None:
        """Stop working, after the piece in hand, until :meth:`resume`."""
        self._check_verb("pause")
        if not self._unpaused.is_set():
            raise OperationError("Job is already paused")
        self._pause()

    def resume(self) -> None:
        """Go on."""
        self._check_verb("resume")
        if self._unpaused.is_set():
            raise OperationError("Can't resume a job that was not paused")
        self._resume()

    def set_speed(self, speed: int) -> None:
        """Limit the work to so many bytes per second; 0 for no limit."""
        self._check_verb("set-speed")
        if speed < 0:
            raise OperationError("Invalid parameter 'speed': it must not be negative")
        self.control.speed = speed

    def complete(self) -> None:
        """READY: let it finish its work and change the disk."""
        self._check_verb("complete")
        if not isinstance(self._operation, MirroringOperation) or not self._unpaused.is_set():
            raise OperationError(f"The active block job '{self.id}' cannot be completed")
        self._operation.complete()

    def cancel(self, *, force: bool) -> None:
        """End it, without changing the disk. In READY and without ``force``, that counts as success, as in QEMU."""
        self._check_verb("cancel")
        if self.status in (Status.READY, Status.STANDBY) and not force:
            self._cancelled_softly = True
        self._cancelled = True
        self.control.cancel()
        self._resume()
        self._finalize.set()

    def finalize(self) -> None:
        """PENDING: change the disk now."""
        self._check_verb("finalize")
        self._finalize.set()

    def dismiss(self) -> None:
        """CONCLUDED: forget it."""
        self._check_verb("dismiss")
        self._become(Status.NULL)
        self._on_null(self)

    async def stop(self) -> None:
        """The server ends: stop the work, keep the record. On return no thread of the job is left."""
        self._stopping = True
        if self._task is not None and not self._task.done():
            self._cancelled = True
            self.control.cancel()
            self._resume()
            self._finalize.set()
            await asyncio.wait([self._task])

    def info(self) -> dict[str, Any]:
        """QEMU's JobInfo."""
        info = {
            "id": self.id,
            "type": self.request.type,
            "status": str(self.status),
            "current-progress": self.control.done,
            "total-progress": self.control.total,
        }
        return info if self.error is None else {**info, "error": self.error}

    def block_info(self) -> dict[str, Any]:
        """QEMU's BlockJobInfo, with the speed measured and the time left in seconds where it can be told."""
        seconds = monotonic() - self._begun
        rate = int(self.control.done / seconds) if seconds > 0 else 0
        info = {
            **self._progress(),
            "busy": self.status in (Status.RUNNING, Status.READY),
            "paused": not self._unpaused.is_set(),
            "io-status": self.io_status,
            "ready": self.status in (Status.READY, Status.STANDBY),
            "status": str(self.status),
            "auto-finalize": self.request.auto_finalize,
            "auto-dismiss": self.request.auto_dismiss,
            "x-nbdq-volume": self.request.volume.name,
            "x-nbdq-rate": rate,
        }
        if rate and self.is_active:
            info["x-nbdq-eta"] = max(0, self.control.total - self.control.done) // rate
        return info if self.error is None else {**info, "error": self.error}

    # Its life.

    async def _live(self) -> None:
        try:
            await self._run()
            self._become(Status.WAITING)
            self._become(Status.PENDING)
            if not self._cancelled:
                await self._await_finalization()
                await self._pivot()
        except Cancelled:
            await self._abort()
        except Exception as error:
            self.error = self._told(error)
            await self._abort()
        else:
            await self._finish()
        await self._conclude()

    async def _run(self) -> None:
        """The long part; returns when the disk can be changed, or when it was cancelled softly."""
        self._become(Status.RUNNING)
        while True:
            try:
                await _in_own_thread(f"nbdq-job-{self.id}", self._operation.run, self.control)
                await self._unpaused.wait()
                self.control.check()
                return
            except Cancelled:
                if not self._cancelled_softly:
                    raise
                await self._release()
                return
            except OSError as error:
                if not self._stops_for(error):
                    raise
                await self._unpaused.wait()

    def _stops_for(self, error: OSError) -> bool:
        """Whether to pause after this error, instead of failing; pauses if so."""
        full = error.errno in FULL_ERRORS
        stops = not self._cancelled and (
            self.request.on_error == "stop" or (self.request.on_error == "enospc" and full)
        )
        action = "stop" if stops else "report"
        self._emit("BLOCK_JOB_ERROR", {"device": self.id, "operation": "write" if full else "read", "action": action})
        if stops:
            _log.warning("job %s pauses: %s; job-resume lets it go on", printable(self.id), in_words(error))
            self.io_status = "nospace" if full else "failed"
            if self._unpaused.is_set():
                self._pause()
        return stops

    async def _await_finalization(self) -> None:
        if not self.request.auto_finalize:
            self._emit("BLOCK_JOB_PENDING", {"type": self.request.type, "id": self.id})
            await self._finalize.wait()
        if self._cancelled:
            raise Cancelled

    async def _pivot(self) -> None:
        """Change the disk, and record durably what it is now, before any request goes on (R-59, R-60)."""
        volume = self.request.volume
        await volume.flush()  # so that there is little to be saved while requests wait
        begun = monotonic()
        async with volume.drained():
            try:
                await in_thread(self._operation.pivot)
                try:
                    if self._state.path is None:  # then what is left behind in images is all that outlives us
                        await self._mark()
                    await in_thread(self._record_end)
                except BaseException:
                    await in_thread(self._operation.revert)
                    raise
                if self._state.path is not None:
                    await self._try_to_mark()
            finally:
                volume.adopt()
        _log.info("job %s: requests paused for %.1f ms", printable(self.id), (monotonic() - begun) * 1000)

    async def _mark(self) -> None:
        """Protect a file that was the disk from being taken for it."""
        if isinstance(self._operation, MarkingOperation):
            await in_thread(self._operation.mark)

    async def _try_to_mark(self) -> None:
        """The same where not to be able to is no reason to go back."""
        try:
            await self._mark()
        except (ImageError, OSError) as error:
            _log.warning("job %s could not mark the old top: %s", printable(self.id), in_words(error))

    def _record_end(self) -> None:
        volume = self.request.volume
        top = volume.chain.layers[0]
        with self._state.transaction() as changes:
            changes.set_top(volume.name, top.path, top.format)
            changes.remove_job(volume.name, self.id)
            if self.request.obsolete is not None:
                changes.add_obsolete(volume.name, self.request.obsolete)

    async def _finish(self) -> None:
        if self._cancelled_softly:
            return
        try:
            await in_thread(self._operation.finish)
        except Exception as error:
            self.error = f"the disk was changed as wanted, but then: {self._told(error)}"

    async def _release(self) -> None:
        async with self.request.volume.drained():
            try:
                await in_thread(self._operation.abort)
            finally:
                self.request.volume.adopt()

    async def _abort(self) -> None:
        self._become(Status.ABORTING)
        try:
            await self._release()
        except Exception as error:
            _log.warning("job %s could not clean up: %s", printable(self.id), self._told(error))

    def _told(self, error: Exception) -> str:
        """What is said of an error. A bug keeps no job from its end, which gives back its claim to the disk."""
        if isinstance(error, (NbdqError, OSError)):
            return in_words(error)
        _log.error("job %s failed for a bug", printable(self.id), exc_info=error)
        return "internal error; the server's log says more"

    async def _conclude(self) -> None:
        if not self._stopping:
            try:
                await in_thread(self._forget)
            except OSError as error:
                _log.warning("job %s may start again after a restart: %s", printable(self.id), in_words(error))
        if self._cancelled and not self._cancelled_softly and self.status is Status.ABORTING and self.error is None:
            self._emit("BLOCK_JOB_CANCELLED", self._progress())
        else:
            self._emit("BLOCK_JOB_COMPLETED", self._progress() | ({} if self.error is None else {"error": self.error}))
        if self.error is not None:
            _log.warning("job %s failed: %s", printable(self.id), self.error)
        else:
            how = (
                "goes on after the next start" if self._stopping else "was cancelled" if self._cancelled else "is done"
            )
            _log.info("job %s %s", printable(self.id), how)
        self._on_concluded(self)
        self._become(Status.CONCLUDED)
        if self.request.auto_dismiss:
            self.dismiss()

    def _forget(self) -> None:
        with self._state.transaction() as changes:
            changes.remove_job(self.request.volume.name, self.id)
            if self.request.obsolete is not None:
                changes.remove_obsolete(self.request.volume.name, self.request.obsolete)

    def _pause(self) -> None:
        self._unpaused.clear()
        self.control.pause()
        if self.status in (Status.RUNNING, Status.READY):
            self._become(Status.PAUSED if self.status is Status.RUNNING else Status.STANDBY)

    def _resume(self) -> None:
        self._unpaused.set()
        self.io_status = "ok"
        self.control.resume()
        if self.status in (Status.PAUSED, Status.STANDBY):
            self._become(Status.RUNNING if self.status is Status.PAUSED else Status.READY)

    def _on_ready(self) -> None:
        """From the operation's thread."""
        self._loop.call_soon_threadsafe(self._become_ready)

    def _become_ready(self) -> None:
        if self.status not in (Status.RUNNING, Status.PAUSED) or self._cancelled:
            return  # it ended while this call was on its way
        if self.status is Status.PAUSED:
            self._become(Status.RUNNING)
        self._become(Status.READY)
        self._emit("BLOCK_JOB_READY", self._progress())
        if not self._unpaused.is_set():
            self._become(Status.STANDBY)

    def _progress(self) -> dict[str, Any]:
        return {
            "type": self.request.type,
            "device": self.id,
            "len": self.control.total,
            "offset": self.control.done,
            "speed": self.control.speed,
        }

    def _check_verb(self, verb: str) -> None:
        if self.status not in _VERBS[verb]:
            raise OperationError(f"Job '{self.id}' in state '{self.status}' cannot accept command verb '{verb}'")

    def _become(self, status: Status) -> None:
        self.status = status
        self._emit("JOB_STATUS_CHANGE", {"id": self.id, "status": str(status)})


async def _in_own_thread(name: str, function: Callable[[Control], None], control: Control) -> None:
    """Work that takes hours must not occupy one of the few threads that others share."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def work() -> None:
        try:
            function(control)
        except BaseException as error:
            loop.call_soon_threadsafe(ended.set_exception, error)
        else:
            loop.call_soon_threadsafe(ended.set_result, None)

    threading.Thread(target=work, name=name, daemon=True).start()
    await ended

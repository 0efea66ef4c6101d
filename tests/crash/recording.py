"""Lets guests work on a disk while everything that happens to its files is recorded."""

import random
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.crash.engine import crowded
from tests.crash.guest import FULL, Disk, Guest, History, Verb
from tests.crash.recorder import NEVER, Act, Entry, Recorder
from tests.crash.schedule import Schedule
from tests.crash.stamps import read_stamps
from tests.crash.verdict import Fault, Finding, compare
from tests.crash.workloads import FIRST_NUMBER, Prepared, Workload

#: Opens the disk whose top image lies at the path, for writing, with whatever is below it.
Opener = Callable[[Path], Disk]

#: Requests of a guest whose disk was opened again after a crash.
_REQUESTS_AFTER_RECOVERY = 14


@dataclass(frozen=True)
class Recording:
    """Everything that happened to a disk, and what the guest was told."""

    entries: Sequence[Entry]
    history: History
    finding: Finding | None
    """What went wrong before any crash; the rest is worth nothing then."""

    @property
    def cuts(self) -> list[tuple[int, Entry | None]]:
        """Every moment at which more becomes possible on the medium, with what began then, or less is allowed."""
        begins: list[tuple[int, Entry | None]] = [
            (entry.begun, entry) for entry in self.entries if entry.act is not Act.SYNC
        ]
        promises: list[tuple[int, Entry | None]] = [
            (request.answered, None)
            for request in self.history.requests
            if request.verb is Verb.FLUSH and request.answered != NEVER and not request.failed
        ]
        return begins + promises


def record(
    workload: Workload, live: Prepared, opener: Opener, generator: random.Random, *, recovering: bool
) -> Recording:
    """Run the workload on the files in ``live``, from opening the disk to closing it.

    Args:
        recovering: a crash has left the files; a few requests are enough, and the medium has room again.
    """
    schedule = Schedule(generator.randrange(1 << 30)) if workload.threads > 1 else None
    paths = [live.directory / name for name in live.written]
    limit = None
    if workload.room is not None and not recovering:
        limit = max(path.stat().st_size for path in paths) + workload.room
    if schedule is not None:
        recorder = Recorder(paths, pause=schedule.pause, linger=schedule.linger, limit=limit)
    else:
        recorder = Recorder(paths, limit=limit)
    first_number = int(live.initial.max()) + FIRST_NUMBER
    history = History(recorder, live.initial, first_number=first_number)
    sessions = 1 if recovering else workload.sessions
    requests = _REQUESTS_AFTER_RECOVERY if recovering else workload.requests // sessions
    finding = None
    with ExitStack() as stack:
        stack.enter_context(recorder.installed())
        if schedule is not None:
            stack.enter_context(schedule.installed())
        if workload.crowded:
            stack.enter_context(crowded())
        try:
            for _ in range(sessions):
                disk = opener(live.top)
                guests = [Guest(disk, history, workload.habits, _fork(generator)) for _ in range(workload.threads)]
                _work(guests, schedule, requests // workload.threads)
                finding = finding or _look(disk, history)
                _close(disk, history)
        except Exception:
            finding = finding or Finding(Fault.BROKEN, traceback.format_exc())
    return Recording(recorder.entries, history, finding)


def _fork(generator: random.Random) -> random.Random:
    return random.Random(generator.randrange(1 << 30))


def _work(guests: Sequence[Guest], schedule: Schedule | None, share: int) -> None:
    """The first guest stands for the loop, which may try the way through the cache; the others for the pool."""
    jobs = [partial(guest.work, share, cached=number == 0) for number, guest in enumerate(guests)]
    if schedule is None:
        jobs[0]()
    else:
        schedule.run(jobs)


def _look(disk: Disk, history: History) -> Finding | None:
    """Whether the guest reads back what it wrote, without any crash."""
    content = bytearray(disk.size)
    disk.read_into(0, memoryview(content))
    finding = compare(read_stamps(content), history.allowed_now())
    return finding and Finding(finding.fault, f"before any crash: {finding.text}")


def _close(disk: Disk, history: History) -> None:
    """Closing is the last flush."""
    request = history.begin(Verb.FLUSH)
    try:
        disk.close()
    except OSError as error:
        if error.errno not in FULL:
            raise
        history.end(request, failed=True)
    else:
        history.end(request)

"""Runs a guest on a recorded disk, cuts the power at every moment, and judges what is left.

One run is a workload and a seed, and always gives the same states. A state is counted once for each promise under which
it may occur: the same bytes before and after an answered flush are two.
"""

import random
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from nbdq.block import WritableBlockDevice
from tests.crash.guest import Allowed, Guest, History, Verb
from tests.crash.recorder import NEVER, Act, Entry, Recorder
from tests.crash.schedule import Schedule
from tests.crash.stamps import Values, read_stamps
from tests.crash.states import Fate, Moment, Timeline, choices, everything, is_metadata, materialise
from tests.crash.verdict import Bench, Fault, Finding, Referee, compare, fingerprint, metadata_fingerprint
from tests.crash.workloads import FIRST_NUMBER, Prepared, Workload, prepare

#: Opens the disk whose top image lies at the path, for writing, with whatever is below it.
Opener = Callable[[Path], WritableBlockDevice]

_PER_MOMENT = 400
#: Requests after a recovery, and states of each.
_RECOVERY_REQUESTS, _RECOVERY_STATES = 14, 60
_FAILURES_TOLD = 3


class Judge(Protocol):
    """A further check of every state whose metadata was not seen before."""

    def __call__(self, bench: Bench, values: Values) -> Finding | None: ...


@dataclass(frozen=True)
class Failure:
    """A state that must not be, and how to get there again."""

    run: str
    cut: int
    finding: Finding
    story: str
    """What was lost, and what the guest had been told."""
    states_before: int

    def __str__(self) -> str:
        return f"{self.run}, power cut at {self.cut}: {self.finding}\n{self.story}"


@dataclass
class Figures:
    """What was explored."""

    states: int = 0
    second_order: int = 0
    """States among them that a crash during or after a recovery leaves."""
    checked: int = 0
    """Distinct states of metadata, each of which QEMU checked."""
    repaired: int = 0
    runs: int = 0
    faults: Counter[Fault] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)

    def add(self, failure: Failure) -> None:
        """Count a failure; the first ones are told in full."""
        self.faults[failure.finding.fault] += 1
        self.failures.append(failure)

    def __str__(self) -> str:
        faults = ", ".join(f"{fault.value} {self.faults[fault]}" for fault in Fault)
        return (
            f"{self.states} states in {self.runs} runs ({self.second_order} of the second order), "
            f"{self.checked} checked by QEMU, {self.repaired} repaired; {faults}"
        )


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory in memory, if there is one."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="nbdq-crash-", dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


class Explorer:
    """Explores runs of one engine. Not thread-safe."""

    def __init__(
        self,
        directory: Path,
        opener: Opener,
        *,
        judges: Sequence[Judge] = (),
        bitmap_judge: Judge | None = None,
        figures: Figures | None = None,
        stop_at_failure: bool = False,
    ) -> None:
        """Work beneath the existing ``directory``; ``judges`` are asked besides QEMU.

        Args:
            bitmap_judge: asked about every state of an image with bitmaps.
            stop_at_failure: look at nothing more after the first failure.
        """
        self.figures = figures or Figures()
        self._directory = directory
        self._opener = opener
        self._judges = judges
        self._bitmap_judge = bitmap_judge
        self._stop_at_failure = stop_at_failure
        self._prepared: dict[str, Prepared] = {}

    def run(self, workload: Workload, seed: int, *, states: int, recoveries: int = 2, repairs: int = 2) -> None:
        """Explore about ``states`` states of one run.

        Args:
            recoveries: states from which the disk is opened again, written to, and crashed again (C6).
            repairs: states that QEMU repairs (C8).
        """
        if workload.name not in self._prepared:
            directory = self._new_directory("prepared")
            self._prepared[workload.name] = prepare(workload, directory)
        self.figures.runs += 1
        run = _Run(self, workload, seed, self._prepared[workload.name], f"--workload '{workload}' --seed {seed}")
        run.explore(states=states, recoveries=recoveries, repairs=repairs)

    @property
    def is_over(self) -> bool:
        """Whether a failure ends the exploration."""
        return self._stop_at_failure and bool(self.figures.failures)

    def _new_directory(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=name, dir=self._directory))


class _Run:
    """One guest, one recording, and the states that follow from it."""

    def __init__(
        self, explorer: Explorer, workload: Workload, seed: int, prepared: Prepared, name: str, *, order: int = 1
    ) -> None:
        self._explorer = explorer
        self._figures = explorer.figures
        self._workload = workload
        self._name = name
        self._order = order
        self._generator = random.Random(f"{seed}:{workload.name}:{order}")
        self._prepared = prepared
        self._seen: set[tuple[bytes, int]] = set()
        self._values: dict[bytes, Values | Finding] = {}
        self._checked: set[bytes] = set()

    def explore(self, *, states: int, recoveries: int, repairs: int) -> None:
        """Let the guest work, then look at about ``states`` states."""
        explorer = self._explorer
        with ExitStack() as stack:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=explorer._directory)))
            initial = self._prepared.contents()
            recorder = self._record(self._prepared.copy_to(home / "live"))
            if recorder is None:
                return
            self._bench = Bench(self._prepared, home / "bench")
            self._referee = Referee(self._prepared, home)
            stack.callback(self._referee.finish)
            timeline = Timeline(initial, recorder.entries)
            cuts = self._cuts(recorder.entries)
            chosen = len(cuts) if states >= 6 * len(cuts) else max(1, states // 6)
            cuts = sorted(self._generator.sample(cuts, chosen), key=lambda cut: cut[0])
            goal = self._figures.states + states
            extra = self._generator.sample(range(states), min(states, recoveries + repairs))
            self._recover_at, self._repair_at = set(extra[:recoveries]), set(extra[recoveries:])
            for number, (cut, newest) in enumerate(cuts):
                left = goal - self._figures.states
                if left <= 0 or explorer.is_over:
                    break
                share = min(_PER_MOMENT, max(4, 2 * left // (len(cuts) - number)))
                self._look_at(timeline.at(cut), newest, share)

    def _record(self, live: Prepared) -> Recorder | None:
        """Let the guest work on the files in ``live``; None if the engine broke."""
        workload, generator = self._workload, self._generator
        schedule = Schedule(generator.randrange(1 << 30)) if workload.threads > 1 else None
        paths = [live.directory / name for name in live.written]
        longest = max(path.stat().st_size for path in paths)
        recorder = Recorder(
            paths,
            **({"pause": schedule.pause, "linger": schedule.linger} if schedule else {}),
            limit=longest + workload.room if workload.room is not None and self._order == 1 else None,
        )
        first_number = FIRST_NUMBER if self._order == 1 else int(live.initial.max()) + FIRST_NUMBER
        self._history = history = History(recorder, live.initial, first_number=first_number)
        requests = workload.requests if self._order == 1 else _RECOVERY_REQUESTS
        try:
            with recorder.installed(), schedule.installed() if schedule else ExitStack():
                disk = self._explorer._opener(live.top)
                guests = [
                    Guest(disk, history, workload.habits, random.Random(generator.randrange(1 << 30)))
                    for _ in range(workload.threads)
                ]
                share = requests // workload.threads
                if schedule:
                    # One thread stands for the loop, which may try the cache; the others for the pool.
                    jobs = [
                        lambda guest=guest, cached=number == 0: guest.work(share, cached=cached)
                        for number, guest in enumerate(guests)
                    ]
                    schedule.run(jobs)
                else:
                    guests[0].work(share)
                content = bytearray(disk.size)
                disk.read_into(0, memoryview(content))
                finding = compare(read_stamps(content), history.allowed_now())
                if finding is not None:
                    self._report(recorder.tick(), Finding(finding.fault, f"before any crash: {finding.text}"), "")
                    return None
                if self._order > 1:
                    guests[0].carry_out(history.begin(Verb.FLUSH), cached=True)
                disk.close()
        except Exception:
            self._report(recorder.tick(), Finding(Fault.BROKEN, traceback.format_exc()), "")
            return None
        return recorder

    def _cuts(self, entries: Sequence[Entry]) -> list[tuple[int, Entry | None]]:
        """Every moment at which more becomes possible on the medium, or less allowed."""
        cuts: list[tuple[int, Entry | None]] = [(entry.begun, entry) for entry in entries if entry.act is not Act.SYNC]
        cuts += [
            (request.answered, None)
            for request in self._history.requests
            if request.verb is Verb.FLUSH and request.answered != NEVER and not request.failed
        ]
        return cuts

    def _look_at(self, moment: Moment, newest: Entry | None, share: int) -> None:
        allowed = self._history.allowed(moment.cut)
        promise = self._history.promise(moment.cut)
        for fates in choices(moment, newest, self._generator, count=share):
            contents = materialise(moment, fates)
            key = fingerprint(contents)
            if (key, promise) in self._seen:
                continue
            self._seen.add((key, promise))
            self._figures.states += 1
            self._figures.second_order += self._order > 1
            finding = self._judge(moment, fates, contents, key, allowed)
            if finding is not None:
                self._report(moment.cut, finding, self._story(moment, fates))
                if self._explorer.is_over:
                    return

    def _judge(
        self, moment: Moment, fates: Sequence[Fate], contents: list[bytearray], key: bytes, allowed: Allowed
    ) -> Finding | None:
        if key not in self._values:
            self._bench.put(contents)
            self._values[key] = self._bench.look()
            metadata = metadata_fingerprint(contents)
            if metadata not in self._checked:
                self._checked.add(metadata)
                self._figures.checked += 1
                self._referee.submit(
                    contents, lambda finding: self._report(moment.cut, finding, self._story(moment, fates))
                )
                values = self._values[key]
                for judge in self._explorer._judges:
                    finding = None if isinstance(values, Finding) else judge(self._bench, values)
                    if finding is not None:
                        return finding
        values = self._values[key]
        if isinstance(values, Finding):
            return values
        finding = compare(values, allowed)
        if finding is None and self._workload.layers[-1].bitmap and self._explorer._bitmap_judge is not None:
            self._bench.put(contents)
            finding = self._explorer._bitmap_judge(self._bench, values)
        number = len(self._seen)
        if finding is None and number in self._repair_at:
            self._figures.repaired += 1
            self._bench.put(contents)
            finding = self._bench.repaired(values)
        if finding is None and number in self._recover_at and self._order == 1:
            self._recover(contents, values, moment.cut)
        return finding

    def _recover(self, contents: list[bytearray], values: Values, cut: int) -> None:
        """Open what the crash left, go on, and crash again (C6, second order)."""
        self._bench.put(contents)
        prepared = Prepared(self._bench.prepared.directory, self._prepared.written, values)
        name = f"{self._name}, power cut at {cut}, opened again"
        again = _Run(self._explorer, self._workload, cut, prepared, name, order=2)
        again.explore(states=_RECOVERY_STATES, recoveries=0, repairs=1)

    def _report(self, cut: int, finding: Finding, story: str) -> None:
        self._figures.add(Failure(self._name, cut, finding, story, self._figures.states))

    def _story(self, moment: Moment, fates: Sequence[Fate]) -> str:
        if len(self._figures.failures) >= _FAILURES_TOLD:
            return ""
        lines = []
        for entry, fate, forced in zip(moment.pending, fates, moment.forced, strict=True):
            if fate != everything(entry):
                what = "lost" if fate is None else f"only sectors {fate:b} (last first)"
            else:
                what = "durable" if forced else "there"
            lines.append(f"  {entry} {'metadata' if is_metadata(entry) else 'data'}: {what}")
        requests = [str(request) for request in self._history.requests if request.issued <= moment.cut]
        return "\n".join((*lines, "  the last requests:", *(f"    {request}" for request in requests[-12:])))

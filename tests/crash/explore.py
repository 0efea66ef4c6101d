"""Cuts the power at every moment of a recording, and judges what is left.

One run is a workload and a seed, and always gives the same states. A state is counted once for each promise under which
it may occur: the same bytes before and after an answered flush are two.
"""

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from tests.crash.guest import Allowed
from tests.crash.recorder import SECTOR, Entry
from tests.crash.recording import Opener, record
from tests.crash.stamps import Values, read_stamps
from tests.crash.states import Fate, Moment, Timeline, choices, everything, is_metadata, materialise
from tests.crash.verdict import Bench, Fault, Finding, Referee, compare, fingerprint, metadata_fingerprint
from tests.crash.workloads import Prepared, Workload, prepare

#: States of one moment at most, and of what follows a recovery.
_PER_MOMENT = 400
_AFTER_RECOVERY = 60
#: Failures that are told in full; the others are only counted.
_TOLD = 5


#: A further opinion about a state, which the bench holds and the guest reads as these values.
Judge = Callable[[Bench, Values], Finding | None]


@dataclass(frozen=True)
class Failure:
    """A state that must not be, and how to get there again."""

    run: str
    cut: int
    finding: Finding
    story: str
    """What was lost, and what the guest had been told."""

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
    """The first ones."""

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
        """Work beneath the existing ``directory``.

        Args:
            judges: asked besides QEMU about every state whose metadata was not seen before.
            bitmap_judge: asked about every state of an image with bitmaps.
            stop_at_failure: look at nothing more after the first failure.
        """
        self.directory = directory
        self.opener = opener
        self.judges = judges
        self.bitmap_judge = bitmap_judge
        self.figures = figures or Figures()
        self._stop_at_failure = stop_at_failure
        self._prepared: dict[str, Prepared] = {}

    def run(self, workload: Workload, seed: int, *, states: int, recoveries: int = 2, repairs: int = 2) -> None:
        """Explore about ``states`` states of one run.

        Args:
            recoveries: states from which the disk is opened again, written to, and crashed again (C6).
            repairs: states that QEMU repairs (C8).
        """
        if workload.name not in self._prepared:
            directory = Path(tempfile.mkdtemp(prefix="prepared", dir=self.directory))
            self._prepared[workload.name] = prepare(workload, directory)
        self.figures.runs += 1
        name = f"--workload '{workload}' --seed {seed}"
        run = _Run(self, workload, self._prepared[workload.name], name, recovering=False)
        run.explore(states=states, recoveries=recoveries, repairs=repairs)

    @property
    def is_over(self) -> bool:
        """Whether a failure ends the exploration."""
        return self._stop_at_failure and self.figures.faults.total() > 0


class _Run:
    """One recording, and the states that follow from it."""

    def __init__(
        self, explorer: Explorer, workload: Workload, prepared: Prepared, name: str, *, recovering: bool
    ) -> None:
        """Run the workload from what is ``prepared``; ``name`` says how to do that again, and is the seed."""
        self._explorer = explorer
        self._figures = explorer.figures
        self._workload = workload
        self._prepared = prepared
        self._name = name
        self._recovering = recovering
        self._generator = random.Random(name)
        self._seen: set[tuple[bytes, int]] = set()
        self._values: dict[bytes, Values | Finding] = {}
        self._checked: set[bytes] = set()

    def explore(self, *, states: int, recoveries: int, repairs: int) -> None:
        """Let the guest work, then look at about ``states`` states."""
        explorer, generator = self._explorer, self._generator
        home = Path(tempfile.mkdtemp(dir=explorer.directory))
        live = self._prepared.copy_to(home / "live")
        self._recording = record(self._workload, live, explorer.opener, generator, recovering=self._recovering)
        if self._recording.finding is not None:
            self._report(self._recording.finding)
            return
        timeline = Timeline(self._prepared.contents(), self._recording.entries)
        cuts = self._recording.cuts
        if states < 6 * len(cuts):
            cuts = generator.sample(cuts, max(1, states // 6))
        cuts.sort(key=lambda cut: cut[0])
        special = generator.sample(range(states), min(states, recoveries + repairs))
        self._recover_at, self._repair_at = set(special[:recoveries]), set(special[recoveries:])
        self._bench = Bench(self._prepared, home / "bench")
        self._referee = Referee(self._prepared, home)
        goal = self._figures.states + states
        for number, (cut, newest) in enumerate(cuts):
            left = goal - self._figures.states
            if left <= 0 or explorer.is_over:
                break
            share = min(_PER_MOMENT, max(4, 2 * left // (len(cuts) - number)))
            self._look_at(timeline.at(cut), newest, share)
        self._referee.finish()
        shutil.rmtree(home)

    def _look_at(self, moment: Moment, newest: Entry | None, share: int) -> None:
        allowed = self._recording.history.allowed(moment.cut)
        promise = self._recording.history.promise(moment.cut)
        for fates in choices(moment, newest, self._generator, count=share):
            contents = materialise(moment, fates)
            key = fingerprint(contents)
            if (key, promise) in self._seen:
                continue
            self._seen.add((key, promise))
            self._figures.states += 1
            self._figures.second_order += self._recovering
            finding = self._judge(moment, fates, contents, key, allowed)
            if finding is not None:
                self._report(finding, moment, fates)
            if self._explorer.is_over:
                return

    def _judge(
        self, moment: Moment, fates: list[Fate], contents: list[bytearray], key: bytes, allowed: Allowed
    ) -> Finding | None:
        bench = self._bench
        bench.put(contents)
        if key not in self._values:
            self._values[key] = bench.look()
        values = self._values[key]
        if isinstance(values, Finding):
            return values
        finding = compare(values, allowed) or bench.look_at_snapshot()
        if (
            self._workload.data_file_is_disk and not self._recovering
        ):  # after a crash the two may differ until rewritten
            finding = finding or compare(read_stamps(contents[1].ljust(len(values) * SECTOR, b"\0")), allowed)
        metadata = metadata_fingerprint(contents)
        if metadata not in self._checked:
            self._checked.add(metadata)
            self._figures.checked += 1
            finding = finding or self._check(moment, fates, contents, values)
        if self._workload.layers[-1].bitmap and self._explorer.bitmap_judge is not None:
            finding = finding or self._explorer.bitmap_judge(bench, values)
        number = len(self._seen)
        if finding is None and number in self._recover_at:
            self._recover(values, moment.cut)
        if finding is None and number in self._repair_at:
            self._figures.repaired += 1
            finding = bench.repaired(values)
        return finding

    def _check(self, moment: Moment, fates: list[Fate], contents: list[bytearray], values: Values) -> Finding | None:
        """Have metadata checked: by QEMU some time later, by the judges at once."""
        if self._bench.is_dirty(contents):  # refcounts are wrong, and known to be
            return self._bench.repaired(values, what="all")
        frozen = replace(moment, certain=[bytearray(content) for content in moment.certain])
        self._referee.submit(contents, partial(self._report, moment=frozen, fates=fates))
        findings = (judge(self._bench, values) for judge in self._explorer.judges)
        return next((finding for finding in findings if finding is not None), None)

    def _recover(self, values: Values, cut: int) -> None:
        """Open what the crash left, go on, and crash again (C6, second order)."""
        prepared = replace(self._bench.prepared, initial=values)
        name = f"{self._name}, power cut at {cut}, opened again"
        run = _Run(self._explorer, self._workload, prepared, name, recovering=True)
        run.explore(states=_AFTER_RECOVERY, recoveries=0, repairs=1)

    def _report(self, finding: Finding, moment: Moment | None = None, fates: list[Fate] | None = None) -> None:
        self._figures.faults[finding.fault] += 1
        if len(self._figures.failures) >= _TOLD:
            return
        if moment is None or fates is None:
            self._figures.failures.append(Failure(self._name, 0, finding, ""))
        else:
            fates = self._simplest(finding.fault, moment, fates)
            self._figures.failures.append(Failure(self._name, moment.cut, finding, self._story(moment, fates)))

    def _simplest(self, fault: Fault, moment: Moment, fates: list[Fate]) -> list[Fate]:
        """As many writes present as can be while the fault stays, so that what is lost tells why."""
        lost = [number for number, entry in enumerate(moment.pending) if fates[number] != everything(entry)]
        data = {number for number in lost if not is_metadata(moment.pending[number])}
        for numbers in (data, *({number} for number in lost)):
            simpler = [everything(e) if n in numbers else fates[n] for n, e in enumerate(moment.pending)]
            if self._shows(fault, moment, simpler):
                fates = simpler
        return fates

    def _shows(self, fault: Fault, moment: Moment, fates: list[Fate]) -> bool:
        self._bench.put(materialise(moment, fates))
        values = self._bench.look()
        if isinstance(values, Finding):
            return values.fault is fault
        if fault is Fault.CORRUPT:
            return self._bench.qemu_check() is not None
        finding = compare(values, self._recording.history.allowed(moment.cut))
        return finding is not None and finding.fault is fault

    def _story(self, moment: Moment, fates: Sequence[Fate]) -> str:
        lines = []
        for entry, fate, forced in zip(moment.pending, fates, moment.forced, strict=True):
            if fate != everything(entry):
                what = "lost" if fate is None else f"only sectors {fate:b} (last first)"
            else:
                what = "durable" if forced else "there"
            lines.append(f"  {entry} {'metadata' if is_metadata(entry) else 'data'}: {what}")
        requests = [str(request) for request in self._recording.history.requests if request.issued <= moment.cut]
        return "\n".join((*lines, "  the last requests:", *(f"    {request}" for request in requests[-12:])))

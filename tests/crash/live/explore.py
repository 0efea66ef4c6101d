"""Cuts the power at every moment of a recorded operation, restarts, and judges.

One run is a scenario and a seed, and always gives the same states.
"""

import random
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from tests.crash.explore import Failure
from tests.crash.live.scenario import Prepared, Scenario, prepare
from tests.crash.live.server import on_one_thread
from tests.crash.live.stage import Recording, record
from tests.crash.live.tree import Contents, TreeState, TreeTimeline
from tests.crash.live.verdict import Bench, Referee, Restarted, key_of
from tests.crash.verdict import Fault, Finding, compare

_PER_MOMENT = 200
_AFTER_RECOVERY = 40
_TOLD = 5


@dataclass
class Figures:
    """What was explored."""

    states: int = 0
    second_order: int = 0
    """States among them that a crash during or after a restart leaves."""
    resumed: int = 0
    """Jobs that went on after a crash."""
    checked: int = 0
    """Images that QEMU checked."""
    by_scenario: Counter[str] = field(default_factory=Counter)
    faults: Counter[Fault] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    """The first ones."""

    def __str__(self) -> str:
        faults = ", ".join(f"{fault.value} {self.faults[fault]}" for fault in Fault)
        return (
            f"{self.states} states of {len(self.by_scenario)} scenarios ({self.second_order} of the second order), "
            f"{self.resumed} jobs resumed, {self.checked} images checked by QEMU; {faults}"
        )


class Explorer:
    """Explores runs. Not thread-safe."""

    def __init__(self, directory: Path, *, ask_qemu: bool = True, stop_at_failure: bool = False) -> None:
        """Work beneath the existing ``directory``."""
        self.figures = Figures()
        self._directory = directory
        self._prepared: dict[str, Prepared] = {}
        self._stop_at_failure = stop_at_failure
        self.referee: Referee | None = None
        if ask_qemu:
            self.referee = Referee(Path(tempfile.mkdtemp(prefix="referee", dir=directory)))

    def run(self, scenario: Scenario, seed: int, *, states: int, recoveries: int = 2) -> None:
        """Explore about ``states`` states of one run; from ``recoveries`` of them, go on and crash again."""
        if scenario.name not in self._prepared:
            home = Path(tempfile.mkdtemp(prefix="prepared", dir=self._directory))
            self._prepared[scenario.name] = prepare(scenario, home)
        live = self._prepared[scenario.name].copy_to(Path(tempfile.mkdtemp(prefix="live", dir=self._directory)))
        with on_one_thread():
            _Run(self, live, f"--scenario '{scenario}' --seed {seed}", recovering=False).explore(
                states=states, recoveries=recoveries
            )
        if self.referee is not None:
            self.referee.finish()
            self.figures.checked = self.referee.count
        shutil.rmtree(live.directory)

    @property
    def is_over(self) -> bool:
        """Whether a failure ends the exploration."""
        return self._stop_at_failure and self.figures.faults.total() > 0


class _Run:
    """One recording, and the states that follow from it."""

    def __init__(self, explorer: Explorer, prepared: Prepared, name: str, *, recovering: bool) -> None:
        """``name`` says how to do that again, and is the seed; the files lie in the directory of ``prepared``."""
        self._explorer = explorer
        self._figures = explorer.figures
        self._prepared = prepared
        self._name = name
        self._recovering = recovering
        self._generator = random.Random(name)
        self._seen: set[tuple[bytes, tuple[int, ...]]] = set()

    def explore(self, *, states: int, recoveries: int) -> None:
        """Let everybody work, then look at about ``states`` states."""
        generator = self._generator
        self._recording = record(self._prepared, generator, recovering=self._recovering)
        self._figures.resumed += self._recording.resumed
        if self._recording.finding is not None:
            self._report(self._recording.finding)
            return
        self._bench = Bench(self._prepared, referee=self._explorer.referee)
        timeline = TreeTimeline(self._recording.recorder)
        cuts = [(cut, newest) for cut, newest in timeline.cuts() if cut > self._recording.begun]
        cuts += [(cut, None) for cut in self._recording.promises() if cut > self._recording.begun]  # type: ignore[misc]
        if states < 4 * len(cuts):
            cuts = generator.sample(cuts, max(1, states // 4))
        cuts.sort(key=lambda cut: cut[0])
        self._recover_at = set(generator.sample(range(states), min(states, recoveries)))
        goal = self._figures.states + states
        for number, (cut, newest) in enumerate(cuts):
            left = goal - self._figures.states
            if left <= 0 or self._explorer.is_over:
                break
            share = min(_PER_MOMENT, max(3, left // (len(cuts) - number)))
            for state in timeline.states(cut, newest, generator, count=share):
                self._look_at(cut, state)
                if self._explorer.is_over:
                    return

    def _look_at(self, cut: int, state: TreeState) -> None:
        key = key_of(state.contents), self._recording.promise(cut)
        if key in self._seen:
            return
        self._seen.add(key)
        self._figures.states += 1
        self._figures.by_scenario[self._prepared.scenario.name] += 1
        self._figures.second_order += self._recovering
        restarted = self._bench.restart(state.contents)
        finding = restarted if isinstance(restarted, Finding) else self._judge(cut, state, restarted)
        if finding is not None:
            self._report(finding, cut, state)
        elif len(self._seen) in self._recover_at and isinstance(restarted, Restarted):
            self._recover(state.contents, restarted, cut)

    def _judge(self, cut: int, state: TreeState, restarted: Restarted) -> Finding | None:
        recording = self._recording
        for name, values in restarted.values.items():
            findings = [compare(values, allowed) for allowed in recording.allowed(name, cut)]
            if None not in findings:
                texts = "; or else: ".join(finding.text for finding in findings if finding is not None)
                assert findings[0] is not None
                return Finding(findings[0].fault, f"disk {name}: {texts}")
            tops = recording.tops(name, cut)
            if tops and restarted.tops[name] not in tops:
                return Finding(Fault.LOST, f"disk {name}: the top is {restarted.tops[name]}, not {tops[0]}")
        scenario = self._prepared.scenario
        if scenario.together:
            changed = {disk.name for disk in scenario.disks if restarted.tops[disk.name] != disk.image}
            if changed not in (set(), set(restarted.tops)):
                return Finding(Fault.BROKEN, f"of a transaction only {', '.join(changed)} has happened")
        if self._prepared.bitmapped and not self._recovering:
            finding = self._bench.check_bitmaps(state.contents)
            if finding is not None:
                return finding
        return self._bench.check(state.contents, restarted, partial(self._report, cut=cut, state=state))

    def _recover(self, contents: Contents, restarted: Restarted, cut: int) -> None:
        """Restart from what the crash left, let jobs and guests go on, and crash again."""
        self._bench.put(contents)
        prepared = replace(self._prepared, initial=restarted.values)
        name = f"{self._name}, power cut at {cut}, started again"
        _Run(self._explorer, prepared, name, recovering=True).explore(states=_AFTER_RECOVERY, recoveries=0)

    def _report(self, finding: Finding, cut: int = 0, state: TreeState | None = None) -> None:
        self._figures.faults[finding.fault] += 1
        if len(self._figures.failures) < _TOLD:
            story = _told(self._recording, cut, state) if state is not None else ""
            self._figures.failures.append(Failure(self._name, cut, finding, story))


def _told(recording: Recording, cut: int, state: TreeState) -> str:
    lines = [state.story()]
    for name, epochs in recording.epochs.items():
        requests = [str(r) for epoch in epochs for r in epoch.history.requests if r.issued <= cut]
        lines += [f"  the last requests to {name}:", *(f"    {request}" for request in requests[-12:])]
    return "\n".join(lines)

"""From samples to verdicts: medians, ratios, spreads, and what to doubt about them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import mean, median

from cases import Case
from workloads import Sample

CLIENT_BOUND = 0.95
OTHER_LOAD_CORES = 0.15
COLD_MIB = 1


@dataclass(frozen=True)
class Conditions:
    """What went on around one measurement."""

    server_cores: float
    """Cores that the server kept busy."""
    other_cores: float
    """Cores kept busy by whatever was neither server, client nor the race."""
    disk_mib: float
    """What the server had to fetch from the disk."""


@dataclass(frozen=True)
class Measurement:
    sample: Sample
    conditions: Conditions

    @property
    def value(self) -> float:
        return self.sample.value

    @property
    def disturbed(self) -> bool:
        return self.conditions.other_cores >= OTHER_LOAD_CORES


@dataclass(frozen=True)
class Ratio:
    """How much better we are than the rival, and the lowest and highest of the same ratio taken round by round."""

    rival: str
    value: float
    low: float
    high: float


@dataclass
class CaseResult:
    """All measurements of one case, by contestant. Each is measured once per round, so the lists are in step."""

    case: Case
    ours: str
    rivals: tuple[str, ...]
    """The contestants whose best counts for the ratio. Others, if any, are only for orientation."""

    measurements: dict[str, list[Measurement]] = field(default_factory=dict)
    failure: str | None = None

    def median(self, label: str) -> float | None:
        measurements = self.measurements.get(label)
        return median(one.value for one in measurements) if measurements else None

    def ratio(self) -> Ratio | None:
        """Against the best rival's median. None if there are no rivals or the case could not run."""
        rivals = {label: value for label in self.rivals if (value := self.median(label))}
        ours = self.median(self.ours)
        if self.failure or not rivals or not ours:
            return None
        more_is_better = self.case.workload.unit.more_is_better
        best = (max if more_is_better else min)(rivals, key=lambda label: rivals[label])

        def better(mine: float, theirs: float) -> float:
            return mine / theirs if more_is_better else theirs / mine

        rounds = [
            better(mine.value, theirs.value)
            for mine, theirs in zip(self.measurements[self.ours], self.measurements[best], strict=True)
        ]
        return Ratio(best, better(ours, rivals[best]), min(rounds), max(rounds))

    def met(self) -> bool | None:
        """Whether the target was met; None if the case has no target, or could not run."""
        ours = self.median(self.ours)
        if self.failure or ours is None:
            return None
        if self.case.at_most is not None:
            return ours <= self.case.at_most
        ratio = self.ratio()
        if self.case.at_least is None or ratio is None:
            return None
        return ratio.value >= self.case.at_least

    def doubts(self) -> list[str]:
        """What a reader should know before believing the ratio."""
        notes = []
        for label, measurements in self.measurements.items():
            busy = [one.sample.busy for one in measurements if one.sample.busy is not None]
            if busy and median(busy) >= CLIENT_BOUND:
                notes.append(f"client-bound: {label}")
        everything = [one for measurements in self.measurements.values() for one in measurements]
        counts = {one.sample.detail["extents"] for one in everything if "extents" in one.sample.detail}
        if len(counts) > 1:
            notes.append(f"extents differ: {sorted(counts)}")
        if any(one.disturbed for one in everything):
            cores = mean(one.conditions.other_cores for one in everything)
            share = sum(one.disturbed for one in everything) / len(everything)
            notes.append(f"other load: {cores:.1f} cores, {share:.0%} of the measurements disturbed")
        if (cold := sum(one.conditions.disk_mib for one in everything)) >= COLD_MIB:
            notes.append(f"cold: {cold:.0f} MiB from disk")
        return notes

    def as_json(self) -> Mapping[str, object]:
        ratio = self.ratio()
        return {
            "id": self.case.id,
            "unit": self.case.workload.unit.value,
            "ours": self.ours,
            "at_least": self.case.at_least,
            "at_most": self.case.at_most,
            "met": self.met(),
            "failure": self.failure,
            "ratio": ratio and vars(ratio),
            "medians": {label: self.median(label) for label in self.measurements},
            "measurements": {
                label: [vars(one.sample) | vars(one.conditions) for one in measurements]
                for label, measurements in self.measurements.items()
            },
        }

"""The figures of a run over damaged images."""

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.hostile.verdict import Finding


@dataclass
class Figures:
    """Counts over many damaged images."""

    tried: int = 0
    opened: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    most_memory: int = 0
    most_cpu: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, finding: Finding, report: dict[str, Any] | None) -> None:
        """Count one image."""
        with self._lock:
            self.tried += 1
            self.opened += finding.opened
            self.failures.update(kind for kind, _ in finding.failures)
            self.reasons.update(finding.reasons)
            if report is not None:
                self.most_memory = max(self.most_memory, report["memory"])
                self.most_cpu = max(self.most_cpu, report["cpu"])

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {self.failures[kind]}" for kind in ("hang", "traceback", "memory", "difference"))
        lines = [
            f"tried {self.tried}, opened {self.opened} ({100 * self.opened // max(self.tried, 1)} %), {kinds}",
            f"most for one image: {self.most_memory >> 20} MiB, {self.most_cpu:.2f} s of CPU time",
            *(f"explained: {reason} {count}" for reason, count in self.reasons.most_common()),
        ]
        return "\n".join(lines)

"""Where damaged images are written to: the process in which nbdq does so, and what it reports."""

import json
import pickle
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from tests.hostile.seeds import Seed

_ROOT = Path(__file__).parents[2]
#: Seconds of wall time without a report until the process counts as hung; CPU time has a limit of its own.
_PATIENCE = 60
#: One malloc arena, because others reserve address space, which the limit would count.
_ENVIRONMENT = {"LC_ALL": "C.UTF-8", "MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1"}


class Worker:
    """The process in which damaged images are written to."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self.seen: Counter[str] = Counter()
        """Images tried; those that opened; those of them that were sound."""

    def try_all(self, seed: Seed, random_seed: str, numbers: range) -> list[str]:
        """Try these mutations; a text for each failure."""
        if self._process is None:
            command = [sys.executable, "-m", "tests.hostile.write_worker", str(self._directory)]
            self._process = subprocess.Popen(
                command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_ENVIRONMENT
            )
        assert self._process.stdin is not None
        pickle.dump((seed, random_seed, numbers), self._process.stdin)
        self._process.stdin.flush()
        failures = []
        for number in numbers:
            report = self._report()
            if report is None:
                self.close()
                return [*failures, f"hangs or dies: {seed.variant.name} #{number}"]
            self.seen.update(tried=1, opened=report["opened"], sound=report["opened"] and report["sound"])
            failures += [f"{report['what']}\n    {text}" for text in report["failures"]]
        return failures

    def _report(self) -> dict[str, Any] | None:
        assert self._process is not None
        assert self._process.stdout is not None
        # Not by watching the pipe: several reports may have come at once, and wait in our own buffer.
        deadline = threading.Timer(_PATIENCE, self._process.kill)
        deadline.start()
        try:
            line = self._process.stdout.readline()
        finally:
            deadline.cancel()
        report: dict[str, Any] | None = json.loads(line) if line else None
        return report

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

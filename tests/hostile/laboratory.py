"""Where damaged images are made, read by nbdq in a process with limits, and judged against QEMU."""

import json
import selectors
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.hostile.anatomy import Area
from tests.hostile.figures import Figures
from tests.hostile.mutations import Mutation
from tests.hostile.seeds import Seed
from tests.hostile.verdict import Judge

_ROOT = Path(__file__).parents[2]
#: Seconds of wall time until a reader counts as hung; its CPU time has limits of its own.
_PATIENCE = 60
#: One malloc arena, because others reserve address space, which the limit would count; and what is freed is given back
#: at once, so that the resident memory of the process is what it uses.
_ENVIRONMENT = {
    "LC_ALL": "C.UTF-8",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "OPENBLAS_NUM_THREADS": "1",
}


class Reader:
    """The child process in which nbdq works; started when needed, and again after it had to be killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def examine(
        self, image: Path, content: Path, *, allow: str | Path, snapshot: str | None = None
    ) -> dict[str, Any] | None:
        """The report about one disk, whose content goes to a file; None if there was none and the process is gone.

        Names in the image may lead into the directory ``allow``.
        """
        job = {"path": str(image), "content": str(content), "allow": str(allow), "snapshot": snapshot}
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.hostile.reader"],
                cwd=_ROOT,
                env=_ENVIRONMENT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(_PATIENCE) else ""
        if not line:
            self.close()
            return None
        report: dict[str, Any] = json.loads(line)
        return report

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


class Laboratory:
    """A directory with the files of one seed, a reader and a referee. For one thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._reader = Reader()

    def take(self, seed: Seed) -> None:
        """Work on ``seed`` from now on."""
        self._seed = seed
        self._place = self._directory / seed.variant.name
        for name, stored in seed.files.items():
            (self._place / name).parent.mkdir(parents=True, exist_ok=True)
            stored.store(self._place / name)
        self._judge = Judge(self._place, seed.images, seed.top)

    def try_mutation(self, mutation: Mutation, figures: Figures) -> list[str]:
        """Damage the image, judge what nbdq makes of it, and heal it; a text for each failure."""
        pristine, damaged = self._seed.files[mutation.file], self._place / mutation.file
        mutation.apply(pristine).store(damaged)
        snapshots = self._seed.variant.snapshots
        snapshot = None
        if snapshots and (Area.SNAPSHOTS in mutation.areas or mutation.number % 3 == 0):
            snapshot = snapshots[mutation.number % len(snapshots)]
        report = self._reader.examine(
            self._place / self._seed.top, self._judge.content, allow=self._seed.directory, snapshot=snapshot
        )
        finding = self._judge.judge(report, snapshot)
        pristine.store(damaged)
        figures.add(finding, report)
        showing = f" (snapshot {snapshot})" if snapshot else ""
        return [f"{kind}: {mutation}{showing}\n    {text}" for kind, text in finding.failures]

    def close(self) -> None:
        """End the reader."""
        self._reader.close()

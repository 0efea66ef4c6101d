"""``nbdq`` on the command line, as an operator runs it."""

import subprocess
import sys
from pathlib import Path

from tests.support.tools import execute


def run_nbdq(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a verb to its end, whatever its status; it must never show a traceback."""
    done = execute(sys.executable, "-m", "nbdq", *words, cwd=cwd)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def nbdq(*words: str | Path, cwd: Path | None = None) -> str:
    """Run a verb that must succeed; return its standard output."""
    done = run_nbdq(*words, cwd=cwd)
    assert done.returncode == 0, f"nbdq {' '.join(map(str, words))}: status {done.returncode}\n{done.stderr}"
    return done.stdout

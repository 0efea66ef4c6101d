"""External programs: which of them are here, and how to run one.

A test names the programs it needs with :func:`requires`. On a developer's machine a missing one skips the test and is
named in the summary; where the environment sets ``CI`` it fails the test, so that no referee silently stays away.
"""

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

#: Debian keeps nbd-client where only root's PATH looks.
SEARCH_PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"

#: Seconds until a tool counts as hung; generous, because it only bounds failures.
TIMEOUT = 100

requires = pytest.mark.requires
"""``@requires("qemu-img", "nbdinfo")``: the programs that a test, class or module (``pytestmark``) runs."""


def missing(tools: Iterable[str]) -> list[str]:
    """Those of ``tools`` that are not installed."""
    return [tool for tool in tools if shutil.which(tool, path=SEARCH_PATH) is None]


def enforce(tools: Iterable[str]) -> None:
    """Skip the running test if a tool is missing, or fail it under CI."""
    absent = missing(tools)
    if absent:
        verdict = pytest.fail if os.environ.get("CI") else pytest.skip
        verdict(f"needs {', '.join(absent)}, not installed")


def execute(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, whatever its exit status; both streams are captured."""
    environment = {**os.environ, "PATH": SEARCH_PATH, "LC_ALL": "C.UTF-8"}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a program that must succeed; return its standard output."""
    done = execute(*command, cwd=cwd)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stderr}{done.stdout}"
    return done.stdout

"""A signal at any moment of a server's life leaves everything in order."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.server.client import PATIENCE
from tests.support.tools import requires, run

pytestmark = [requires("qemu-img"), pytest.mark.timeout(3600)]

SEED = int(os.environ.get("NBDQ_SEED", "1"))
SIGNALS = int(os.environ.get("NBDQ_SIGNALS", "4"))


def test_signals_at_any_moment_end_a_server_in_order() -> None:
    """The ordinary run sends few; ``NBDQ_SIGNALS=200 NBDQ_SEED=$RANDOM ./run-tests tests/cli/test_signals.py`` many."""
    for number in range(SIGNALS):
        seed = f"{SEED}:{number}"
        print(f"seed {seed}")
        with tempfile.TemporaryDirectory(prefix="nbdq-") as path:
            _start_and_stop(Path(path), random.Random(seed))


def _start_and_stop(directory: Path, dice: random.Random) -> None:
    image, admin = directory / "disk.qcow2", directory / "admin"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
    words = ["-k", directory / "socket", "--admin", admin, "--pid-file", directory / "pid", image]
    command = [sys.executable, "-m", "nbdq", "serve", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + PATIENCE
        while not admin.exists():  # the first thing that has to be removed
            assert time.monotonic() < deadline, "no server"
            time.sleep(0.001)
        for _ in range(dice.choice([1, 1, 2, 3])):
            time.sleep(dice.uniform(0, 0.06))
            process.send_signal(dice.choice([signal.SIGTERM, signal.SIGINT]))
        _, said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, said) == (0, "")
    assert [left.name for left in directory.iterdir()] == ["disk.qcow2"]
    run("qemu-img", "check", image)

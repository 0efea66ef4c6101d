"""QEMU's own tests with nbdq in the place of qemu-nbd: a few that are quick; ``scripts/iotests`` runs all (nbd.md 5.3).

The tests come from QEMU's source, which is no part of nbdq: ``scripts/iotests --fetch`` gets it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tools import SEARCH_PATH, TIMEOUT, requires

SCRIPT = Path(__file__).parent.parent.parent / "scripts/iotests"
SOURCE = Path(os.environ.get("QEMU_SOURCE") or Path.home() / ".cache/nbdq/qemu")


@pytest.fixture(scope="module")
def tests_of_qemu() -> None:
    """They are there; where the environment sets ``CI`` they are got, if apt knows where from."""
    if (SOURCE / "tests/qemu-iotests/check").exists():
        return
    why = f"QEMU's tests are not in {SOURCE}: scripts/iotests --fetch gets them"
    if os.environ.get("CI"):
        done = subprocess.run([sys.executable, SCRIPT, "--fetch"], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        why = f"cannot get QEMU's tests: {done.stderr.strip().splitlines()[-1]}"
    pytest.skip(why)


@requires("qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon", "qemu-system-x86_64")
@pytest.mark.usefixtures("tests_of_qemu")
@pytest.mark.parametrize(
    "words",
    [
        ("-raw", "-nbd", "241"),
        ("-qcow2", "058", "209", "nbd-qemu-allocation", "qemu-img-bitmaps"),
    ],
    ids=lambda words: " ".join(words),
)
def test_qemus_own_tests_pass_with_the_drop_in(words: tuple[str, ...]) -> None:
    """Unaligned images, guessed formats, ``-L``; internal snapshots, block status, allocation depth, bitmaps. All
    use ``--fork``: others give a server one second to begin."""
    done = subprocess.run(
        [sys.executable, SCRIPT, *words],
        env={**os.environ, "PATH": SEARCH_PATH, "PYTHON_OF_NBDQ": sys.executable},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Passed all" in done.stdout, done.stdout

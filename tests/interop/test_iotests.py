"""QEMU's own tests with nbdq in the place of qemu-nbd: a few that are quick; ``scripts/iotests`` runs all (nbd.md 5.3).

The tests come from QEMU's source, which is no part of nbdq: ``scripts/iotests --fetch`` gets it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tools import SEARCH_PATH, TIMEOUT, requires

ROOT = Path(__file__).parent.parent.parent
SOURCE = Path(os.environ.get("QEMU_SOURCE") or Path.home() / ".cache/nbdq/qemu")


@requires("qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon", "qemu-system-x86_64")
@pytest.mark.parametrize(
    "words",
    [
        ("-raw", "-nbd", "001", "032", "241", "259"),
        ("-qcow2", "058", "nbd-qemu-allocation"),
    ],
    ids=lambda words: " ".join(words),
)
def test_qemus_own_tests_pass_with_the_drop_in(words: tuple[str, ...]) -> None:
    """Plain reads and writes, requests in flight when the server ends, unaligned images and guessed formats, images
    that are made over NBD; internal snapshots; allocation depth and ``-L``."""
    if not (SOURCE / "tests/qemu-iotests/check").exists():
        pytest.skip(f"QEMU's tests are not in {SOURCE}: scripts/iotests --fetch gets them")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/iotests", *words],
        env={**os.environ, "PATH": SEARCH_PATH, "PYTHON_OF_NBDQ": sys.executable},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Passed all" in done.stdout, done.stdout

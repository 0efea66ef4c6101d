"""The examples do what they say, with the programs that they are written for."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from tests.support.tools import SEARCH_PATH, TIMEOUT, requires

EXAMPLES = Path(__file__).parents[2] / "examples"


@requires("qemu-img", "qemu-io", "nbdinfo")
def test_an_incremental_backup_is_made_and_restored(tmp_path: Path) -> None:
    nbdq = tmp_path / "nbdq"
    nbdq.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m nbdq "$@"\n')
    nbdq.chmod(0o755)
    done = subprocess.run(
        [EXAMPLES / "backup" / "demo"],
        env={**os.environ, "PATH": SEARCH_PATH, "NBDQ": str(nbdq), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"bytes read: {80 << 20}\n" in done.stdout, "what is data, and not what was written after the checkpoint"
    assert f"bytes read: {(7 << 20) + (64 << 10)}\n" in done.stdout, "what has changed between the checkpoints"
    assert done.stdout.endswith("Equal.\n")

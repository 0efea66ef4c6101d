"""The examples do what they say, and QEMU agrees with what they made."""

import subprocess
import sys
from pathlib import Path

from tests.support.tools import requires, run

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str, *words: str | Path) -> str:
    """Run an example, as the README does, to its successful end; it needs no program but Python."""
    done = subprocess.run([sys.executable, EXAMPLES / name, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_small_chain_is_made_served_and_read_back() -> None:
    said = example("small_chain.py")
    assert said.count("reads as expected") == 5
    assert said.endswith("the server ended when it was told to\n")


@requires("qemu-img", "qemu-io")
def test_the_small_chain_is_a_chain_to_qemu(tmp_path: Path) -> None:
    example("small_chain.py", tmp_path)
    for image in ("base.qcow2", "top.qcow2"):
        assert "No errors" in run("qemu-img", "check", tmp_path / image)
    letter = f"{ord('t'):#x}"
    run("qemu-io", "-r", "-c", f"read -P {letter} 64k 1", "-c", "read -P 0 128k 64k", tmp_path / "top.qcow2")

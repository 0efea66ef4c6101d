"""The units for systemd in ``examples/systemd``, judged by systemd itself."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tools import execute, requires, run

UNITS = Path(__file__).parents[2] / "examples" / "systemd"
#: Of 10: what ``systemd-analyze security`` may find exposed.
EXPOSURE = 2.0

pytestmark = requires("systemd-analyze")


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units as they would be installed, with a program that is there."""
    for unit in UNITS.iterdir():
        (tmp_path / unit.name).write_text(unit.read_text().replace("/usr/bin/nbdq", "/bin/true"))
    return tmp_path


def test_systemd_finds_nothing_wrong(units: Path) -> None:
    names = ["nbdq.service", "nbdq.socket", "nbdq-admin.socket", "nbdq@disk.service"]
    assert {name.replace("@disk", "@") for name in names} == {unit.name for unit in UNITS.iterdir()}
    done = execute("systemd-analyze", "verify", "--man=no", *(units / name for name in names))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("unit", ["nbdq.service", "nbdq@.service"])
def test_little_is_exposed(units: Path, unit: str) -> None:
    words = ["systemd-analyze", "security", "--no-pager", "--offline=true", f"--threshold={EXPOSURE * 10:.0f}"]
    run(*words, units / unit)


@pytest.mark.parametrize("unit", ["nbdq.service", "nbdq@.service"])
def test_the_server_takes_the_options_of_its_unit(unit: str) -> None:
    (line,) = re.findall(r"^ExecStart=/usr/bin/nbdq serve (.*)$", (UNITS / unit).read_text(), re.MULTILINE)
    options = re.findall(r"--[a-z-]+", line)
    shown = subprocess.run([sys.executable, "-m", "nbdq", "serve", "--help"], capture_output=True, text=True).stdout
    assert options
    assert all(option in shown for option in options)

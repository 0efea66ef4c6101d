"""The load of :mod:`tests.hostile.load`, at a scale that takes seconds: nbdq has to keep its promises there, too."""

from pathlib import Path

import pytest

from tests.hostile.load import CASES
from tests.support.tools import requires

pytestmark = requires("qemu-img")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the disk is, made once."""
    return tmp_path_factory.mktemp("load")


@pytest.mark.parametrize("case", ["idle", "cuts", "come-and-go", "hang-up"])
def test_clients_who_ask_for_too_much_get_what_was_promised(case: str, directory: Path) -> None:
    CASES[case](directory, "nbdq", 0.03)

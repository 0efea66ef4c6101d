"""The figures of a run over damaged images, printed at its end."""

import pytest

from tests.hostile.figures import Figures

_FIGURES = Figures()


@pytest.fixture(scope="session")
def figures() -> Figures:
    """Counts over all damaged images of the run."""
    return _FIGURES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _FIGURES.tried:
        terminalreporter.section("damaged images")
        terminalreporter.write_line(str(_FIGURES))

"""Rules for the whole suite: a missing tool is named, and the report of a failure shows what the server said."""

import signal
from collections.abc import Generator

import pytest

from tests.support import tools
from tests.support.serving import Server


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "requires(*tools): programs that the test runs; see tests/support/tools.py")


def pytest_runtest_setup(item: pytest.Item) -> None:
    # What a test starts inherits which signals are ignored: from a shell that put us into the background, or from a
    # command that ran in this process, which at its end lets nothing interrupt it any more.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    tools.enforce(dict.fromkeys(tool for mark in item.iter_markers("requires") for tool in mark.args))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the log of every running server to the report of a failing test."""
    report = yield
    if report.failed:
        for server in Server.running:
            report.sections.append((f"stderr of {' '.join(server.command)}", server.stderr))
    return report

"""An admin socket without disks, in this process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.admin.laboratory import AdminServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[AdminServer]:
    """A monitor on a socket; what nobody expected fails the test."""
    with AdminServer(tmp_path) as server:
        yield server

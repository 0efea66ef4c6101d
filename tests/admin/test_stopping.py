"""The end of the administrators' side: nobody who hangs can hold up a server that is told to stop (R-76)."""

import asyncio
import json
import threading
from collections.abc import Iterator

import pytest

from nbdq.admin.context import Context
from nbdq.admin.registry import COMMANDS, Command, Reply
from tests.admin.laboratory import AdminServer, Burst

PATIENCE = 30


class Hanging:
    """A command that ends only when it is cancelled."""

    def __init__(self) -> None:
        self.begun, self.cancelled = threading.Event(), threading.Event()

    async def run(self, context: Context, arguments: Burst) -> Reply:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return None


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    """The command ``x-test-hang``."""
    command = Hanging()
    COMMANDS["x-test-hang"] = Command("x-test-hang", Burst, command.run, True)
    yield command
    del COMMANDS["x-test-hang"]


@pytest.mark.parametrize("in_a_hurry", [False, True], ids=["deadline", "hurry"])
def test_a_command_that_hangs_does_not_hang_the_stop(server: AdminServer, hanging: Hanging, in_a_hurry: bool) -> None:
    with server.raw() as sock:
        sock.sendall(b'{"execute": "qmp_capabilities"} {"execute": "x-test-hang"}\n')
        assert hanging.begun.wait(PATIENCE)

        async def stop() -> None:
            if in_a_hurry:
                asyncio.get_running_loop().call_later(0.1, server.administration.hurry)
            await server.administration.stop(within=3600 if in_a_hurry else 0.1)

        server.run(stop())
        assert hanging.cancelled.is_set()
        answers = sock.makefile("rb").read().splitlines()  # up to the end
    assert [list(json.loads(line)) for line in answers] == [["QMP"], ["return"]]


def test_nobody_is_cancelled_who_answers_in_time(server: AdminServer) -> None:
    with server.raw() as sock:
        sock.sendall(b'{"execute": "qmp_capabilities"} {"execute": "query-name", "id": 1}\n')
        file = sock.makefile("rb")
        for _ in range(3):
            file.readline()
        server.run(server.administration.stop(within=0))
        assert file.read() == b""

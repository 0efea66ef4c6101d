"""A server under test with a configuration file, which a test rewrites while the server runs."""

import contextlib
import json
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nbdq.admin.client import Client
from tests.support.administration import Administered
from tests.support.serving import PATIENCE, Server
from tests.support.tools import execute


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Poll until ``condition`` holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


class Configured(Administered):
    """A server with an admin socket, started from a file that names its exports."""

    def __init__(self, server: Server, client: Client, file: Path, head: str) -> None:
        super().__init__(server, client)
        self.file = file
        self._head = head

    def write(self, body: str) -> None:
        """Let the file say ``body``, besides where clients and administrators connect."""
        self.file.write_text(self._head + body)

    def reload(self, body: str) -> None:
        """:meth:`write`, and have it read; that must succeed."""
        self.write(body)
        self("x-nbdq-reload")

    def hang_up(self) -> None:
        """What an operator does when the file has changed."""
        self.server.process.send_signal(signal.SIGHUP)

    def names(self) -> list[str]:
        """What a client sees; nothing if an export has gone between its being listed and its being asked for."""
        done = execute("nbdinfo", "--list", "--json", self.server.uri())
        if done.returncode:
            return []
        listing = json.loads(done.stdout)
        return [export["export-name"] for export in listing["exports"]]


@contextlib.contextmanager
def configured(body: str) -> Iterator[Configured]:
    """Serve what ``body`` says until the block ends; then the server must end with status 0, without a traceback."""
    with tempfile.TemporaryDirectory(prefix="nbdq-") as name:
        directory = Path(name)
        head = f'[[listen]]\nsocket = "{directory}/socket"\n[admin]\nsocket = "{directory}/admin"\n'
        file = directory / "nbdq.toml"
        file.write_text(head + body)
        server = Server("--config", file, directory=directory)
        Server.running.append(server)
        try:
            server.wait_until_ready()
            with Client(str(directory / "admin"), timeout=PATIENCE) as client:
                yield Configured(server, client, file, head)
            status = server.terminate()
            assert status == 0, f"status {status} after SIGTERM:\n{server.stderr}"
            assert "Traceback" not in server.stderr, server.stderr
        finally:
            Server.running.remove(server)
            server.kill()

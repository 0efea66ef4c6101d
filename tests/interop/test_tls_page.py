"""The page on TLS is true: its commands are run, one after the other, with the servers that it starts."""

import os
import re
import shlex
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from tests.support.tools import SEARCH_PATH, TIMEOUT, requires, run

PAGE = Path(__file__).parents[2] / "docs" / "tls.md"
SERVERS = "nbdq serve --bind 0.0.0.0"


def blocks_before(heading: str) -> Iterator[str]:
    """The blocks of commands, for a server called localhost."""
    page = PAGE.read_text().partition(f"\n## {heading}\n")[0]
    for block in re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        yield block.replace("server.example.com", "localhost")


@contextmanager
def started(command: str, directory: Path) -> Iterator[int]:
    """A server on a free port."""
    command = command.replace(SERVERS, f"exec {shlex.quote(sys.executable)} -m nbdq serve --bind 127.0.0.1 --port 0")
    with subprocess.Popen(["sh", "-c", command], cwd=directory, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = urlsplit(server.stdout.readline()).port
            assert port, f"does not start: {command}"
            yield port
        finally:
            server.terminate()
            assert server.wait(TIMEOUT) == 0


def carry_out(commands: str, directory: Path, port: int) -> str:
    commands = commands.replace("10809", str(port))
    done = subprocess.run(
        ["sh", "-euc", commands],
        cwd=directory,
        env={**os.environ, "PATH": SEARCH_PATH},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout}{done.stderr}"
    return done.stdout


@requires("certtool", "psktool", "qemu-img", "qemu-io", "nbdinfo", "nbdcopy", "nbd-client", "nbdkit")
def test_the_commands_of_the_page_do_what_it_says(tmp_path: Path) -> None:
    run("qemu-img", "create", "-f", "qcow2", tmp_path / "disk.qcow2", "8M")
    with_keys = getattr(ssl, "HAS_PSK", False)
    blocks = list(blocks_before("What holds" if with_keys else "Pre-shared keys"))
    servers = [index for index, block in enumerate(blocks) if block.startswith(SERVERS)]
    assert len(servers) == 1 + with_keys
    for block in blocks[: servers[0]]:
        carry_out(block, tmp_path, 0)
    for index, end in zip(servers, [*servers[1:], len(blocks)], strict=True):
        with started(blocks[index], tmp_path) as port:
            said = "".join(carry_out(block, tmp_path, port) for block in blocks[index + 1 : end])
        assert "8388608" in said or "8 MiB" in said
    assert (tmp_path / "copy.raw").stat().st_size == 8 << 20

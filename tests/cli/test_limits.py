"""The limits of ``nbdq serve``: as options, in the file, in the documentation, and as the machine allows them."""

import contextlib
import dataclasses
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdq.cli.serve.limits import available_memory, fit
from nbdq.server.limits import Limits
from tests.qcow2.minimal import minimal_image
from tests.server.client import Client, Disconnected
from tests.support.cli import nbdq, run_nbdq
from tests.support.serving import serve

NAMES = [limit.name.replace("_", "-") for limit in dataclasses.fields(Limits)]
DOCUMENT = Path(__file__).parents[2] / "docs" / "limits.md"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(minimal_image())
    return path


def test_help_and_documentation_know_every_limit() -> None:
    told = nbdq("serve", "--limit", "help")
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| ([^|]+) \|", DOCUMENT.read_text(), re.MULTILINE))
    for name in NAMES:
        (default,) = re.findall(rf"^{name}  +(\S+(?: s)?)  ", told, re.MULTILINE)
        assert rows[name].strip() == default
    assert len(told.splitlines()) == len(NAMES)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--limit", "conections=3"], "there is no limit 'conections'; did you mean connections?"),
        (["--limit", "connections=many"], "limit connections: 'many' is not a number"),
        (["--limit", "process-bytes=much"], "limit process-bytes: 'much' is not a size"),
        (["--limit", "workers=0"], "limit workers: 0 is less than 1"),
        (["--limit", "keepalive-probes=1000"], "limit keepalive-probes: 1000 is more than 127"),
        (["--limit", "status-extents=1048577"], "limit status-extents: 1048577 is more than 1048576"),
        (["--limit", "drain-seconds=-1"], "limit drain-seconds: -1 is less than 0"),
        (["--limit", "drain-seconds=nan"], "limit drain-seconds: nan is not a number"),
        (["--limit", "connections"], "limit connections: '' is not a number"),
    ],
)
def test_what_cannot_be_a_limit_is_a_usage_error(words: list[str], complaint: str) -> None:
    result = run_nbdq("serve", *words, "x.qcow2")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"Error: {complaint}"


@pytest.mark.parametrize("option", ["--limit=handshake-seconds=0.2", "--handshake-limit=0.2"])
def test_a_limit_that_was_given_holds(image: Path, option: str) -> None:
    with serve(option, "--limit", "connections=1", image) as server, Client(str(server.socket)) as silent:
        silent.hello()
        assert silent.is_closed()
        told = pytest.raises(AssertionError, match="0x80000002: the server has its 1 clients")
        with Client(str(server.socket)).go(), Client(str(server.socket)) as second, told:
            second.go()


def test_the_file_has_them_as_a_section(image: Path, tmp_path: Path) -> None:
    config, path = tmp_path / "nbdq.toml", tmp_path / "s"
    config.write_text(
        f'[limits]\noptions = 2\nprocess-bytes = "64M"\n[[listen]]\nsocket = "{path}"\n'
        f'[[export]]\nimage = "{image}"\nname = ""\n'
    )
    with started("--config", str(config)), Client(str(path)) as client:
        client.socket.sendall(b"\0\0\0\3" + 3 * (b"IHAVEOPT" + bytes([0, 0, 0, 99, 0, 0, 0, 0])))
        client.hello()
        with pytest.raises(Disconnected):
            [client.option_reply() for _ in range(3)]
    config.write_text("[limits]\noptoins = 2\nworkers = 0\n")
    result = run_nbdq("serve", "--check-config", "--config", config)
    assert result.exit_code == 1
    assert "did you mean 'options'" in result.stderr


@contextlib.contextmanager
def started(*words: str, files: tuple[int, int] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A server that is ready, with its own limits of open files."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nbdq", "serve", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: files and resource.setrlimit(resource.RLIMIT_NOFILE, files),
    )
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.terminate()


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a/b", {"a/memory.max": "1000\n", "a/b/memory.max": "max\n"}, 1000),
        ("0::/a/b", {"a/memory.max": "1000\n", "a/b/memory.max": "500\n"}, 500),
        ("0::/", {}, None),
        ("0::/elsewhere", {"memory.max": "700\n"}, 700),
        ("5:cpu,cpuacct:/\n4:memory:/a", {"memory/a/memory.limit_in_bytes": "900\n"}, 900),
        ("4:memory:/a", {"memory/a/memory.limit_in_bytes": "9223372036854771712\n"}, None),
    ],
)
def test_the_memory_of_the_control_group_is_known(
    tmp_path: Path, groups: str, files: dict[str, str], expected: int | None
) -> None:
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "cgroup").write_text(groups + "\n")
    assert available_memory(tmp_path / "cgroup", tmp_path / "root") == expected
    assert available_memory(tmp_path / "absent", tmp_path / "root") is None


def test_a_small_machine_gets_a_small_budget_unless_it_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdq.cli.serve.limits.available_memory", lambda: 400 << 20)
    assert fit(Limits()).process_bytes == 100 << 20
    assert fit(Limits(process_bytes=300 << 20)).process_bytes == 300 << 20
    monkeypatch.setattr("nbdq.cli.serve.limits.available_memory", lambda: 1 << 40)
    assert fit(Limits()) == Limits()


@pytest.mark.parametrize(("soft", "hard", "warned"), [(64, 4096, False), (64, 200, True)])
def test_open_files_are_allowed_as_far_as_the_machine_does_and_too_few_are_told(
    image: Path, tmp_path: Path, soft: int, hard: int, warned: bool
) -> None:
    with started("-k", str(tmp_path / "s"), str(image), files=(soft, hard)) as process:
        limit = re.search(r"Max open files +(\d+) +(\d+)", Path(f"/proc/{process.pid}/limits").read_text())
        process.terminate()
        said = process.communicate()[1]
    assert limit is not None
    assert limit.groups() == (str(hard), str(hard))
    assert ("open files may be needed" in said) is warned

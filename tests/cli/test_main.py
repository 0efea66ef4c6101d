"""The command line as a whole: one line for every error, an exit status for every outcome, never a traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nbdq import __version__
from nbdq.storage import FileStorage
from tests.qcow2.minimal import minimal_image
from tests.support.cli import run_nbdq
from tests.support.serving import serve

COMMANDS = ("info", "map", "serve")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(minimal_image())
    return path


def execute(*words: str | Path, **options: object) -> subprocess.CompletedProcess[bytes]:
    """``nbdq`` as a user's shell runs it, whose output is buffered."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "NBDQ"))}
    environment |= {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8:strict"}  # as in any UTF-8 locale but C's
    command = [sys.executable, "-m", "nbdq", *map(str, words)]
    return subprocess.run(command, env=environment, stderr=subprocess.PIPE, timeout=60, check=False, **options)  # type: ignore[call-overload]


def error_of(*words: str | Path) -> str:
    """What the command says on stderr; it must say one line and exit with 1."""
    result = run_nbdq(*words)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("nbdq: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("\n")
    return result.stderr.removeprefix("nbdq: ").rstrip("\n")


# Help and usage.


def test_the_version_is_told() -> None:
    result = run_nbdq("--version")
    assert (result.exit_code, result.stdout) == (0, f"nbdq, version {__version__}\n")


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_every_command_with_what_it_does(option: str) -> None:
    result = run_nbdq(option)
    assert result.exit_code == 0
    listed = result.stdout.partition("Commands:\n")[2].splitlines()
    names = ["amend", "check", "commit", "create", "ctl", "info", "map", "probe", "serve", "wait"]
    assert [line.split()[0] for line in listed] == names
    assert all(len(line.split()) > 3 and not line.endswith("...") for line in listed), "cut off"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_command_explains_itself(command: str, option: str) -> None:
    result = run_nbdq(command, option)
    assert result.exit_code == 0
    operands = "[IMAGE]..." if command == "serve" else "IMAGE"
    assert result.stdout.startswith(f"Usage: nbdq {command} [OPTIONS] {operands}\n")
    undocumented = [
        line
        for line, following in zip(result.stdout.splitlines(), [*result.stdout.splitlines()[1:], ""], strict=True)
        if line.startswith("  -") and len(line.split("  ")) < 3 and not following.startswith("     ")
    ]
    assert not [line for line in undocumented if "--output" not in line]


@pytest.mark.parametrize(
    "words",
    [
        ("mapp", "disk"),
        ("--mapp",),
        *((command,) for command in COMMANDS),
        *((command, "--mapp", "disk") for command in COMMANDS),
        *((command, "-f", "vmdk", "disk") for command in COMMANDS),
        ("map", "disk", "other"),
        ("map", "--output", "xml", "disk"),
        ("map", "-s", "many", "disk"),
        ("map", "--backing", "vmdk:x", "disk"),
        ("map", "--backing", "none", "--backing", "raw:x", "disk"),
        ("map", "--allow-backing", "/nonexistent", "disk"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2_and_shows_where_help_is(words: tuple[str, ...], image: Path) -> None:
    result = run_nbdq(*(str(image) if word == "disk" else word for word in words))
    assert result.exit_code == 2
    assert result.stdout == ""
    usage, hint, empty, error = result.stderr.splitlines()
    assert usage.startswith("Usage: nbdq ")
    assert hint.startswith("Try 'nbdq")
    assert empty == ""
    assert error.startswith("Error: ")


# Errors.


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_image_is_named(command: str, tmp_path: Path) -> None:
    assert error_of(command, tmp_path / "none.qcow2").startswith(f"{tmp_path / 'none.qcow2'}: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_image_is_named_and_what_to_say_if_it_is_raw(command: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    message = error_of(command, path)
    assert message.startswith(f"{path}: not a QCOW2 image")
    assert message.endswith("-f raw")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_directory_is_no_image(command: str, tmp_path: Path) -> None:
    expected = "Is a directory" if command == "serve" else "not a regular file or block device"  # opened to write
    assert expected in error_of(command, tmp_path)


def test_a_hostile_name_stays_on_its_line(tmp_path: Path) -> None:
    assert r"a\x1b[2J\nnbdq: all is well\udcff" in error_of("map", f"{tmp_path}/a\x1b[2J\nnbdq: all is well\udcff")


def test_an_image_that_cannot_be_read_is_an_error_like_any_other(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(FileStorage, "read", fail)
    assert error_of("map", image) == f"{image}: cannot be read: Input/output error"


def test_a_corrupt_table_is_an_error_that_names_image_and_place(image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(3 * 65536)
        file.write((1 << 55).to_bytes(8, "big"))  # an L2 table where no file ends
    assert error_of("map", "--output=json", image) == f"{image}: corrupt table entry for guest offset 0"


# Output.


@pytest.mark.parametrize("words", [("--help",), ("map", "disk"), ("map", "--output=json", "disk"), ("info", "disk")])
def test_a_reader_that_goes_away_ends_the_command_quietly(words: tuple[str, ...], image: Path) -> None:
    """``nbdq map disk | head -1``: nothing is left to say, and nobody to say it to."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as output:
        done = execute(*(image if word == "disk" else word for word in words), stdout=output)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("words", [("--help",), ("map", "disk")])
def test_output_that_cannot_be_written_is_an_error(words: tuple[str, ...], image: Path) -> None:
    with open("/dev/full", "wb") as output:
        done = execute(*(image if word == "disk" else word for word in words), stdout=output)
    assert (done.returncode, done.stderr) == (1, b"nbdq: No space left on device\n")


def test_a_file_name_that_is_not_text_is_printed_as_it_is(tmp_path: Path) -> None:
    """Chapter 4.1: raw, as qemu-img does."""
    path = os.fsencode(tmp_path) + b"/caf\xe9.raw"
    with open(path, "wb") as file:
        file.write(b"data" * 1024)
    done = execute("map", "-f", "raw", os.fsdecode(path), stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.splitlines()[1].split(maxsplit=3) == [b"0", b"0x1000", b"0", path]


def test_an_interrupted_server_ends_cleanly(image: Path) -> None:
    with serve(image) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0

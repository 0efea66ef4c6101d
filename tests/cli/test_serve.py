"""``nbdq serve``: what it takes, what it refuses before anybody can connect, and what it leaves behind."""

import errno
import os
import socket
import stat
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from nbdq.storage import FileStorage
from tests.qcow2.minimal import minimal_image
from tests.server.client import EPERM, TRIM, WRITE, Client
from tests.support.cli import run_nbdq
from tests.support.serving import refusal, serve
from tests.support.tools import requires, run


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(minimal_image())
    return path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = tmp_path / "other.qcow2"
    path.write_bytes(minimal_image())
    return path


def usage_error(*words: str | Path) -> str:
    """What is said about wrong usage, which is found before anything is opened."""
    result = run_nbdq("serve", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    return result.stderr.splitlines()[-1]


def error(*words: str | Path) -> str:
    """The one line that is said when the server cannot start."""
    result = run_nbdq("serve", *words)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    return result.stderr


# What is refused.


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["-p", "65536"], "65536 is not in the range"),
        (["-p", "-1"], "-1 is not in the range"),
        (["-e", "-1"], "-1 is not in the range"),
        (["--socket-mode", "rw"], "'rw' is not an octal file mode such as 0660"),
        (["--socket-mode", "999"], "'999' is not an octal file mode"),
        (["--socket-mode", "1777"], "'1777' is not an octal file mode"),
        (["--socket-mode=-1"], "'-1' is not an octal file mode"),
        (["-x", "a", "-x", "b"], "--export-name is given 2 times for 1 images"),
        (["-D", "a", "-D", "b"], "--description is given 2 times for 1 images"),
        (["--socket-mode", "0660"], "--socket-mode means nothing without --socket; give that, too"),
        (["--admin-mode", "0660"], "--admin-mode means nothing without --admin; give that, too"),
        (["--metrics-mode", "0660"], "--metrics-mode means nothing without --metrics; give that, too"),
        (["--export-dir-raw", ".img"], "--export-dir-raw means nothing without --export-dir; give that, too"),
        (["--export-dir-writable"], "--export-dir-writable means nothing without --export-dir; give that, too"),
        (["--rescan", "1"], "--rescan means nothing without --export-dir; give that, too"),
    ],
)
def test_impossible_options_are_refused(options: list[str], complaint: str, image: Path) -> None:
    assert complaint in usage_error(*options, image)


def test_options_for_one_image_are_not_for_directories(tmp_path: Path) -> None:
    assert "--load-snapshot and --bitmap are for a single IMAGE" in usage_error("--export-dir", tmp_path, "-l", "old")


def test_each_of_several_images_needs_a_name_of_its_own(image: Path, other: Path, tmp_path: Path) -> None:
    assert "--export-name is given 1 times for 2 images" in usage_error("-x", "a", image, other)
    assert "--description is given 1 times for 2 images" in usage_error("-D", "a", image, other)
    assert "two exports are named 'a'" in error("-x", "a", "-x", "a", image, other)
    (tmp_path / "elsewhere").mkdir()
    twin = tmp_path / "elsewhere" / image.name
    twin.write_bytes(minimal_image())
    assert "two exports are named 'disk'" in error(image, twin)


def test_options_about_one_chain_are_for_one_image(image: Path, other: Path) -> None:
    for options in (["--backing", "none"], ["--backing", f"qcow2:{other}"], ["-l", "snapshot"]):
        assert "are for a single IMAGE" in usage_error(*options, image, other)


@pytest.mark.parametrize("option", ["-x", "-D"])
def test_names_must_fit_the_protocol(option: str, image: Path) -> None:
    """P2."""
    assert "4096" in error(option, "x" * 4097, image)
    error(option, "caf\udce9", image)


def test_a_missing_snapshot_is_refused_with_those_there_are(image: Path) -> None:
    assert "there is no internal snapshot 'monday'; the image has none" in error("-l", "monday", image)
    assert "a raw image has no internal snapshots" in error("-f", "raw", "-l", "monday", image)


def test_an_address_that_cannot_be_had_is_named(image: Path, tmp_path: Path) -> None:
    assert "cannot listen on 192.0.2.1 port 10809" in error("-b", "192.0.2.1", image)
    assert f"cannot listen on {tmp_path}/none/socket" in error("-k", tmp_path / "none" / "socket", image)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}" in error("-p", str(port), image)


def test_a_server_that_cannot_start_leaves_no_socket_behind(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    error("-k", path, "-b", "192.0.2.1", image)
    assert not path.exists()


def test_a_pid_file_that_cannot_be_written_is_the_only_complaint(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "none" / "pid"
    assert error("-k", tmp_path / "socket", "--pid-file", path, image).startswith(
        f"nbdq: cannot write the pid file {path}: "
    )
    assert not (tmp_path / "socket").exists()


def test_what_is_no_image_is_refused_before_anybody_can_connect(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "none.qcow2"
    assert f"nbdq: {path}: " in refusal(image, path)


# What is served.


def test_the_uri_is_printed_when_clients_can_connect(image: Path) -> None:
    with serve(image) as server:
        assert server.printed_uri == f"nbd+unix:///?socket={quote(str(server.socket))}"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(server.socket))
            assert client.recv(8) == b"NBDMAGIC"
    assert not server.socket.exists()


def test_the_unix_socket_is_the_owners_alone_unless_told_otherwise(image: Path) -> None:
    """R-41."""
    for options, mode in (([], 0o600), (["--socket-mode", "0660"], 0o660)):
        with serve(*options, image) as server:
            assert stat.S_IMODE(os.stat(server.socket).st_mode) == mode


@requires("nbdinfo")
def test_several_images_are_exports_under_their_file_names(image: Path, other: Path) -> None:
    with serve(image, other) as server:
        for name in ("disk", "other"):
            assert run("nbdinfo", "--size", server.uri(name)) == "1048576\n"
        assert run("nbdinfo", "--list", server.uri()).count("export=") == 2


@requires("nbdinfo")
def test_names_and_descriptions_are_given_in_the_order_of_the_images(image: Path, other: Path) -> None:
    with serve("-x", "first", "-x", "größe", "-D", "one", "-D", "two", image, other) as server:
        listing = run("nbdinfo", "--list", server.uri())
        assert listing.index("first") < listing.index("description: one") < listing.index("description: two")
        assert run("nbdinfo", "--size", server.uri("größe")) == "1048576\n"


@requires("nbdinfo")
def test_tcp_and_unix_are_served_together(image: Path) -> None:
    with serve("-p", "0", image) as server:
        assert server.process.stdout is not None
        uri = server.process.stdout.readline().decode().strip()
        assert uri.startswith("nbd://127.0.0.1:")
        assert run("nbdinfo", "--size", uri) == run("nbdinfo", "--size", server.uri())


def test_the_pid_file_is_there_while_clients_can_connect(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text("an old one\n")
    with serve("--pid-file", path, image) as server:
        assert path.read_text() == f"{server.process.pid}\n"
    assert not path.exists()


def test_a_pid_file_that_went_away_is_no_error(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with serve("--pid-file", path, image) as server:
        path.unlink()
        assert server.terminate() == 0
        assert server.stderr == ""
    with serve("--pid-file", path, image) as server:
        path.unlink()
        path.mkdir()  # somebody plays tricks
        assert server.terminate() == 0
        assert f"cannot remove the pid file {path}" in server.stderr


@requires("nbdinfo")
def test_serving_is_quiet_unless_asked_to_tell_of_clients(image: Path) -> None:
    for options, told in (([], []), (["-v"], ["INFO"]), (["-vv"], ["DEBUG", "INFO"])):
        with serve(*options, image) as server:
            run("nbdinfo", "--size", server.uri())
            assert server.terminate() == 0
            assert sorted({line.split(": ")[1] for line in server.stderr.splitlines()}) == told


def test_options_of_qemu_nbd_that_change_nothing_are_taken(image: Path) -> None:
    with serve("-r", "-t", "-e", "3", image):
        pass


# What can be written.


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "raw"
    path.write_bytes(b"old." * (1 << 18))
    return path


@requires("qemu-io", "qemu-img")
def test_an_image_can_be_written_unless_told_otherwise(tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, top)
    before = base.read_bytes()
    with serve(top) as server:
        run("qemu-io", "-f", "raw", "-c", "write -P 5 100k 300k", "-c", "write -z 150k 10k", server.uri())
    run("qemu-io", "-r", "-c", "read -P 5 100k 50k", "-c", "read -P 0 150k 10k", "-c", "read -P 5 160k 240k", top)
    assert "No errors" in run("qemu-img", "check", top)
    assert base.read_bytes() == before


@pytest.mark.parametrize("options", [["-r"], ["-l", "then"], ["-U"]], ids=["-r", "-l", "-U"])
@requires("qemu-img")
def test_what_is_read_only_or_a_snapshot_or_shared_with_a_writer_cannot_be_written(
    tmp_path: Path, options: list[str]
) -> None:
    """P87."""
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    run("qemu-img", "snapshot", "-c", "then", path)
    before = path.read_bytes()
    with serve(*options, path) as server, Client(str(server.socket)) as client:
        client.go()
        assert client.error(WRITE, 0, 512, payload=bytes(512)) == EPERM
    assert path.read_bytes() == before


def test_space_is_given_up_when_clients_discard_unless_that_is_to_be_ignored(raw: Path) -> None:
    for choice, kept in (("ignore", True), ("unmap", False)):
        with serve("-f", "raw", "--discard", choice, raw) as server, Client(str(server.socket)) as client:
            assert client.go().error(TRIM, 0, 1 << 20) == 0
        assert (os.stat(raw).st_blocks * 512 >= 1 << 20) == kept


@pytest.mark.parametrize(("choice", "kept"), [("off", True), ("on", True), ("unmap", False)])
def test_writes_of_zeros_give_up_space_if_that_is_wanted(raw: Path, choice: str, kept: bool) -> None:
    with serve("-f", "raw", "--detect-zeroes", choice, raw) as server, Client(str(server.socket)) as client:
        client.go()
        assert client.error(WRITE, 0, 1 << 20, payload=bytes(1 << 20)) == 0
        assert client.error(WRITE, 4096, 512, payload=b"x" * 512) == 0
        assert client.read(0, 1 << 20) == bytes(4096) + b"x" * 512 + bytes((1 << 20) - 4608)
    assert (os.stat(raw).st_blocks * 512 >= 1 << 20) == kept


def test_giving_up_space_for_zeros_and_ignoring_that_contradict_each_other(raw: Path) -> None:
    assert "--discard ignore forbids" in usage_error("--detect-zeroes", "unmap", "--discard", "ignore", raw)


def test_what_was_written_and_cannot_be_saved_at_the_end_is_an_error(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-76, R-63."""

    async def write_something(_settings: object, _start: object, _load: object, parts: Any, *_: object) -> None:
        for export in parts.exports.by_name.values():
            assert export.writing is not None
            export.writing.write(0, memoryview(b"new." * 128))

    def fail(_: FileStorage) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("nbdq.cli.serve.running._serve", write_something)
    monkeypatch.setattr(FileStorage, "_fdatasync", fail)
    other = tmp_path / "other-raw"
    other.write_bytes(bytes(4096))
    said = error("-f", "raw", "-k", tmp_path / "socket", raw, other)
    for path in (raw, other):
        assert f"{path}: what was written last may be lost: Input/output error" in said

"""Directories of exports: which files count, under which names, and what happens when they change (R-38)."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdq.errors import ExportError
from nbdq.server.exports import directory as export_directory
from nbdq.server.exports.directory import is_safe, list_images
from tests.qcow2.minimal import minimal_image
from tests.server.client import Client
from tests.support.configured import Configured, configured, eventually
from tests.support.serving import Server, serve
from tests.support.tools import execute, requires, run


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    return path


def image(directory: Path, name: str, size: int = 1 << 20) -> Path:
    path = directory / name
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(size))
    return path


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("disk.qcow2", True),
        ("größe 1.qcow2", True),
        ("..", False),
        (".hidden.qcow2", False),
        ("a/b.qcow2", False),
        ("a\nb.qcow2", False),
        ("a\x7f.qcow2", False),
        ("a\x9b.qcow2", False),
        ("caf\udce9.qcow2", False),
    ],
)
def test_names_that_could_be_mistaken_for_something_else_are_no_exports(name: str, safe: bool) -> None:
    assert is_safe(name) is safe


def test_only_regular_files_with_a_known_suffix_count(directory: Path, tmp_path: Path) -> None:
    for name in ("disk.qcow2", "other.QCOW2", "disk.raw.img", "notes.txt", ".qcow2", ".hidden.qcow2", "a\nb.qcow2"):
        (directory / name).write_bytes(minimal_image())
    (directory / os.fsdecode(b"caf\xe9.qcow2")).write_bytes(minimal_image())
    secret = tmp_path / "secret.img"
    secret.write_bytes(b"secret")
    (directory / "link.img").symlink_to(secret)
    (directory / "directory.img").mkdir()
    os.mkfifo(directory / "fifo.img")
    found = list_images(str(directory), {".qcow2": "qcow2", ".img": "raw"})
    assert [(each.name, each.format) for each in found] == [("disk.qcow2", "qcow2"), ("disk.raw.img", "raw")]


def test_the_longest_suffix_says_the_format(directory: Path) -> None:
    (directory / "a.raw.img").write_bytes(bytes(512))
    (directory / "b.img").write_bytes(minimal_image())
    found = list_images(str(directory), {".img": "qcow2", ".raw.img": "raw"})
    assert [each.format for each in found] == ["raw", "qcow2"]


def test_a_directory_of_something_else_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_directory, "FILES_MAX", 3)
    for number in range(4):
        (directory / str(number)).touch()
    with pytest.raises(ExportError, match="more than 3 files"):
        list_images(str(directory), {".qcow2": "qcow2"})


# A server.


@pytest.fixture
def server(directory: Path) -> Iterator[Configured]:
    image(directory, "one.qcow2")
    image(directory, "two.qcow2")
    with configured(section(directory)) as running:
        yield running


def section(directory: Path, **keys: str) -> str:
    lines = {"path": f'"{directory}"', "rescan-seconds": "0.1", **keys}
    return "[[export-directory]]\n" + "".join(f"{key.replace('_', '-')} = {value}\n" for key, value in lines.items())


def shows(server: Configured, *names: str) -> None:
    eventually(lambda: sorted(server.names()) == sorted(names), f"{server.names()} instead of {names}")


@requires("qemu-img", "nbdinfo")
def test_files_that_come_and_go_are_exports_that_come_and_go(server: Configured, directory: Path) -> None:
    shows(server, "one.qcow2", "two.qcow2")
    new = image(directory, "new.qcow2", 2 << 20)
    shows(server, "one.qcow2", "two.qcow2", "new.qcow2")
    assert run("nbdinfo", "--size", server.uri("new.qcow2")) == f"{2 << 20}\n"
    assert "is_read_only: true" in run("nbdinfo", server.uri("new.qcow2"))
    with Client(str(server.server.socket)).go("new.qcow2") as client:
        new.unlink()
        shows(server, "one.qcow2", "two.qcow2")
        assert client.read(0, 512) == bytes(512)
    eventually(lambda: len(server("query-block")) == 2, "the disk is not closed")


@requires("qemu-img", "nbdinfo")
def test_a_file_that_was_replaced_is_another_disk(server: Configured, directory: Path) -> None:
    with Client(str(server.server.socket)).go("one.qcow2") as old:
        os.replace(image(directory, "beside", 3 << 20), directory / "one.qcow2")
        eventually(lambda: run("nbdinfo", "--size", server.uri("one.qcow2")) == f"{3 << 20}\n", "the old one is shown")
        assert (old.size, old.read(0, 512)) == (1 << 20, bytes(512))


@requires("qemu-img", "nbdinfo")
def test_a_broken_image_costs_itself_and_one_line_in_the_log(server: Configured, directory: Path) -> None:
    (directory / "broken.qcow2").write_bytes(b"no image" * 100)
    eventually(lambda: "broken.qcow2" in server.server.stderr, "nothing is said")
    image(directory, "new.qcow2")
    shows(server, "one.qcow2", "two.qcow2", "new.qcow2")
    server("x-nbdq-reload")
    assert server.server.stderr.count("broken.qcow2") == 1
    (directory / "broken.qcow2").unlink()
    image(directory, "broken.qcow2")
    shows(server, "one.qcow2", "two.qcow2", "new.qcow2", "broken.qcow2")


@requires("qemu-img", "nbdinfo")
def test_a_directory_that_cannot_be_read_for_a_while_loses_no_export(
    server: Configured, directory: Path, tmp_path: Path
) -> None:
    shows(server, "one.qcow2", "two.qcow2")
    (directory / "broken.qcow2").write_bytes(b"no image" * 100)
    eventually(lambda: "broken.qcow2" in server.server.stderr, "nothing is said")
    directory.rename(tmp_path / "elsewhere")
    eventually(lambda: "export directory" in server.server.stderr, "nothing is said")
    shows(server, "one.qcow2", "two.qcow2")
    (tmp_path / "elsewhere").rename(directory)
    image(directory, "new.qcow2")
    shows(server, "one.qcow2", "two.qcow2", "new.qcow2")
    assert "is missing" not in server.server.stderr  # what could not be opened before is not asked for


@requires("qemu-img", "nbdinfo", "qemu-io")
def test_images_that_others_lie_over_are_not_written_to(directory: Path) -> None:
    base = image(directory, "base.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", directory / "top.qcow2")
    with configured(section(directory, read_only="false")) as server:
        assert "is_read_only: true" in run("nbdinfo", server.uri("base.qcow2"))
        run("qemu-io", "-f", "raw", "-c", "write -P 1 0 4k", server.uri("top.qcow2"))
        run("qemu-io", "-f", "raw", "-r", "-c", "read -P 0 0 4k", server.uri("base.qcow2"))


@requires("qemu-img", "nbdinfo", "qemu-io")
def test_a_disk_keeps_its_name_and_stays_writable_when_a_snapshot_is_put_over_it(directory: Path) -> None:
    image(directory, "one.qcow2")
    with configured(section(directory, read_only="false")) as server:
        server("blockdev-snapshot-sync", device="one.qcow2", snapshot_file=str(directory / "new.qcow2"))
        image(directory, "two.qcow2")
        shows(server, "one.qcow2", "two.qcow2")
        run("qemu-io", "-f", "raw", "-c", "write -P 1 0 4k", server.uri("one.qcow2"))
        warnings = [line for line in server.server.stderr.splitlines() if "WARNING" in line]
        assert not [line for line in warnings if "new.qcow2" in line]


@requires("qemu-img", "nbdinfo")
def test_an_export_of_the_file_wins_over_one_of_the_directory(directory: Path, tmp_path: Path) -> None:
    image(directory, "one.qcow2")
    other = image(tmp_path, "other.qcow2", 2 << 20)
    named = f'[[export]]\nimage = "{other}"\nname = "one.qcow2"\n'
    with configured(named + section(directory)) as server:
        assert run("nbdinfo", "--size", server.uri("one.qcow2")) == f"{2 << 20}\n"
        assert "two exports are named 'one.qcow2'" in server.server.stderr
        server.reload(named + section(directory, prefix='"d/"'))
        assert server.names() == ["one.qcow2", "d/one.qcow2"]


@requires("qemu-img", "nbdinfo")
def test_what_clients_ask_for_is_no_path(server: Configured, tmp_path: Path) -> None:
    """R-38."""
    image(tmp_path, "outside.qcow2")
    for name in ("../outside.qcow2", f"{tmp_path}/outside.qcow2", "./one.qcow2", "images/../one.qcow2", "one.qcow2\0"):
        with pytest.raises(AssertionError, match="refused"):
            Client(str(server.server.socket)).go(name)


@requires("qemu-img", "nbdinfo")
def test_many_images_are_opened_without_anybody_waiting_for_all_of_them(directory: Path) -> None:
    image(directory, "first.qcow2")
    with configured(section(directory)) as server:
        for number in range(150):
            shutil.copy(directory / "first.qcow2", directory / f"{number}.qcow2")
        eventually(lambda: len(server.names()) == 151, "not all are offered")


@requires("qemu-img", "nbdinfo")
def test_a_directory_can_be_named_on_the_command_line(directory: Path) -> None:
    image(directory, "one.qcow2")
    (directory / "raw.img").write_bytes(bytes(1 << 20))

    def listed(server: Server) -> str:
        return run("nbdinfo", "--list", server.uri())

    with serve("--export-dir", directory, "--export-dir-raw", ".img", "--rescan", "0") as server:
        assert listed(server).count("export=") == 2
        image(directory, "two.qcow2")
        server.process.send_signal(1)
        eventually(lambda: 'export="two.qcow2"' in listed(server), "SIGHUP changed nothing")
        assert execute("nbdinfo", server.uri("two")).returncode != 0


@requires("qemu-io")
def test_what_options_say_of_exports_holds_for_those_of_directories(directory: Path) -> None:
    disk = directory / "disk.img"
    disk.write_bytes(b"x" * (1 << 20))
    words = ("--export-dir", directory, "--export-dir-raw", ".img", "--export-dir-writable", "--discard", "ignore")
    with serve(*words) as server:
        run("qemu-io", "-f", "raw", "-c", "discard 0 1M", server.uri("disk.img"))
    assert disk.stat().st_blocks * 512 >= 1 << 20

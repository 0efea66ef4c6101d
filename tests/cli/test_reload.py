"""What changes while a server runs when its file has changed, what stays, and that a mistake changes nothing (R-77)."""

import re
from pathlib import Path

import pytest

from tests.server.client import EPERM, WRITE, Client
from tests.support.administration import qemu_io, verified_load
from tests.support.configured import Configured, configured, eventually
from tests.support.tools import execute, requires, run

pytestmark = requires("qemu-img", "qemu-io", "nbdinfo")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.qcow2" for name in ("one", "two", "three")]
    for number, path in enumerate(paths, 1):
        run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
        run("qemu-io", "-c", f"write -P {number} 0 1M", path)
    return paths


def export(image: Path, **keys: object) -> str:
    """A section of the file."""
    lines = [f"{key.replace('_', '-')} = {_toml(value)}\n" for key, value in {"image": str(image), **keys}.items()]
    return "[[export]]\n" + "".join(lines)


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, int) else f'"{value}"'


def connect(server: Configured, name: str) -> Client:
    return Client(str(server.server.socket)).go(name)


def layers(server: Configured) -> dict[str, str]:
    """The top of each disk that is open."""
    return {node["device"]: node["inserted"]["file"] for node in server("query-block")}


def test_exports_come_and_go_with_the_file(images: list[Path]) -> None:
    one, two, three = images
    with configured(export(one) + export(two)) as server:
        assert server.names() == ["one", "two"]
        server.reload(export(two) + export(three, name="drei", description="new"))
        assert server.names() == ["two", "drei"]
        qemu_io(server, "read -P 3 0 1M", export="drei")
        eventually(lambda: "one" not in layers(server), "the disk is not closed")
        run("qemu-io", "-c", "write 0 4k", one)  # its locks are gone


def test_sighup_reloads_and_says_why_not(images: list[Path]) -> None:
    with configured(export(images[0])) as server:
        server.write(export(images[0]) + export(images[1]))
        server.hang_up()
        eventually(lambda: server.names() == ["one", "two"], "nothing happened")
        server.write(export(images[0]) + "bogus = 1\n[limits]\nhandshake-secnds = 3\n")
        server.hang_up()
        eventually(lambda: "not reloaded" in server.server.stderr, "nothing was said")
        assert re.search(r"""export 1 \(".*"\): unknown key 'bogus'""", server.server.stderr)
        assert "did you mean 'handshake-seconds'?" in server.server.stderr
        assert server.names() == ["one", "two"]


def test_a_thousand_hangups_under_load_are_harmless(images: list[Path]) -> None:
    """R-10."""
    with configured(export(images[0])) as server, connect(server, "one") as client:
        for _ in range(1000):
            server.hang_up()
            assert client.read(0, 512) == b"\1" * 512
        server.reload(export(images[0]) + export(images[1]))
        assert client.read(0, 512) == b"\1" * 512


def test_nothing_changes_if_one_image_cannot_be_opened(images: list[Path], tmp_path: Path) -> None:
    one, two, _ = images
    bad = tmp_path / "bad.qcow2"
    bad.write_bytes(b"no image" * 100)
    with configured(export(one, description="old")) as server:
        server.write(export(two) + export(one, description="new") + export(bad))
        said = server.refusal("x-nbdq-reload")
        assert re.search(r'export 3 \(".*not a QCOW2 image', said)
        assert server.names() == ["one"]
        assert "description: old" in run("nbdinfo", "--list", server.uri())
        run("qemu-io", "-c", "write 0 4k", two)  # was closed again
        assert [block["device"] for block in server("query-block")] == ["one"]


def test_who_uses_an_export_that_is_removed_may_go_on(images: list[Path]) -> None:
    """R-77: removed exports drain."""
    one, two, _ = images
    with configured(export(one) + export(two)) as server, connect(server, "one") as client:
        server.reload(export(two))
        assert server.names() == ["two"]
        assert client.error(WRITE, 0, 512, payload=b"x" * 512) == 0
        assert client.read(0, 512) == b"x" * 512
        client.socket.close()
        eventually(lambda: "one" not in layers(server), "the disk is not closed")
    run("qemu-io", "-c", "read -P 0x78 0 512", one)


def test_that_a_disk_waits_for_its_last_client_is_logged_once(images: list[Path]) -> None:
    """Directories are looked at every few seconds, and a client may stay for days."""
    one, two, _ = images
    log = "[log]\nverbosity = 1\n"
    with configured(export(one) + export(two) + log) as server, connect(server, "one"):
        for _ in range(3):
            server.reload(export(two) + log)
        assert server.server.stderr.count("is closed when its last client has left") == 1


def test_a_name_may_come_back_with_another_image_while_the_old_one_is_in_use(images: list[Path]) -> None:
    one, two, _ = images
    with configured(export(one, name="disk")) as server, connect(server, "disk") as old:
        server.reload(export(two, name="disk"))
        with connect(server, "disk") as new:
            assert new.read(0, 512) == b"\2" * 512
            assert old.read(0, 512) == b"\1" * 512
        server.reload(export(one, name="disk"))  # the image is still open
        with connect(server, "disk") as again:
            assert again.error(WRITE, 0, 512, payload=b"x" * 512) == 0
            assert old.read(0, 512) == b"x" * 512


def test_policy_changes_apply_to_the_disk_that_is_open(images: list[Path]) -> None:
    one = images[0]
    with configured(export(one)) as server, connect(server, "one") as client:
        server.reload(export(one, description="text", max_connections=1, read_only=True))
        assert client.error(WRITE, 0, 512, payload=bytes(512)) == 0  # was told that it may
        assert execute("nbdinfo", server.uri("one")).returncode != 0  # full
        client.socket.close()
        eventually(lambda: execute("nbdinfo", server.uri("one")).returncode == 0, "the place is not free")
        with connect(server, "one") as reader:
            assert reader.error(WRITE, 0, 512, payload=bytes(512)) == EPERM
        server.reload(export(one) + 'access = { users = ["nobody"] }\n')
        assert server.names() == []
        server.reload(export(one))
        with connect(server, "one") as writer:
            assert writer.error(WRITE, 0, 512, payload=bytes(512)) == 0


def test_what_an_administrator_has_set_or_added_survives(images: list[Path]) -> None:
    one, two, _ = images
    with configured(export(one) + export(two)) as server:
        server("block-export-add", type="nbd", id="mine", node_name="one", name="mine", writable=True)
        server("x-nbdq-export-set", id="one", description="live")
        server.reload(export(one) + export(two, description="other"))
        assert server.names() == ["one", "two", "mine"]
        assert "description: live" in run("nbdinfo", "--list", server.uri())
        server.write(export(one) + export(two, name="mine"))
        assert "an administrator has added an export named 'mine'" in server.refusal("x-nbdq-reload")
        server.reload(export(two))  # the disk of his export stays open
        assert server.names() == ["two", "mine"]
        qemu_io(server, "read -P 1 0 1M", export="mine")
        server("block-export-del", id="mine")
        eventually(lambda: "one" not in layers(server), "the disk is not closed")


def test_snapshots_and_jobs_go_on_through_reloads(images: list[Path], tmp_path: Path) -> None:
    one, two, _ = images
    top = tmp_path / "top.qcow2"
    state = f'state = "{tmp_path}/state"\n'
    with configured(state + export(one)) as server:
        server("blockdev-snapshot-sync", device="one", snapshot_file=str(top))
        qemu_io(server, "write -P 9 0 1M", export="one")
        server("block-commit", device="one", job_id="job", speed=1)
        server.reload(state + export(one, description="new") + export(two))
        assert [job["device"] for job in server("query-block-jobs")] == ["job"]
        assert layers(server)["one"] == str(top)
        server.reload(state + export(two))  # the disk waits for its job
        assert "one" in layers(server)
        server("block-job-cancel", device="job", force=True)
        eventually(lambda: "one" not in layers(server), "the disk is not closed")
        server.reload(state + export(one) + export(two))  # and comes back with the top that it had
        assert layers(server)["one"] == str(top)
        qemu_io(server, "read -P 9 0 1M", export="one")


def test_the_file_may_follow_a_disk_to_its_new_top(images: list[Path], tmp_path: Path) -> None:
    one, top = images[0], tmp_path / "top.qcow2"
    with configured(export(one, name="disk")) as server, connect(server, "disk") as client:
        server("blockdev-snapshot-sync", device="disk", snapshot_file=str(top))
        server.reload(export(top, name="disk", description="same disk"))
        assert client.error(WRITE, 0, 512, payload=b"x" * 512) == 0
        with connect(server, "disk") as other:
            assert other.read(0, 512) == b"x" * 512
        assert len(server("query-block")) == 1


def test_what_needs_a_new_start_is_refused(images: list[Path], tmp_path: Path) -> None:
    one = images[0]
    with configured(export(one)) as server:
        for body, what in (
            (f'[[listen]]\nsocket = "{tmp_path}/more"\n' + export(one), "section listen has changed"),
            (export(one, allow_data_file=True), "allow-data-file is another than it was opened with"),
            (export(one) + '[server]\npid-file = "x"\n', "section server has changed"),
        ):
            server.write(body)
            assert what in server.refusal("x-nbdq-reload")
            assert server.names() == ["one"]


def test_limits_and_the_log_level_change(images: list[Path]) -> None:
    with configured(export(images[0])) as server:
        server.reload(export(images[0]) + "[log]\nverbosity = 1\n[limits]\nexport-connections = 1\n")
        with connect(server, "one"):
            assert execute("nbdinfo", server.uri("one")).returncode != 0
        eventually(lambda: "export 'one' for" in server.server.stderr, "the client is not in the log")


@requires("fio")
def test_clients_do_not_notice_reloads(images: list[Path]) -> None:
    one, two, three = images
    with configured(export(one, default=True)) as server, verified_load(server, one):
        for number in range(10):
            server.reload(
                export(one, default=True, description=str(number)) + export(two if number % 2 else three, name="other")
            )
    run("qemu-img", "check", one)

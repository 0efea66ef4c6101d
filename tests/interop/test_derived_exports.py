"""Internal snapshots and lower layers that come along with an export, held against what qemu-img says of them."""

from pathlib import Path

import pytest

from nbdq.admin.client import AdminError
from tests.server.client import READ, Client
from tests.support.administration import qemu_io, verified_load
from tests.support.configured import Configured, configured, eventually
from tests.support.tools import execute, requires, run

pytestmark = requires("qemu-img", "qemu-io", "nbdinfo")


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Top, middle and base, of different sizes, with two snapshots in the top."""
    top, middle, base = (tmp_path / f"{name}.qcow2" for name in ("top", "middle", "base"))
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "24M")
    run("qemu-io", "-c", "write -P 1 0 8M", base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", middle, "16M")
    run("qemu-io", "-c", "write -P 2 1M 1M", middle)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", middle.name, "-F", "qcow2", top, "32M")
    run("qemu-io", "-c", "write -P 3 2M 1M", top)
    run("qemu-img", "snapshot", "-c", "monday", top)
    run("qemu-io", "-c", "write -P 4 2M 1M", top)
    run("qemu-img", "snapshot", "-c", "tues,day=1", top)
    run("qemu-io", "-c", "write -P 5 0 4M", top)
    return [top, middle, base]


def body(top: Path, **more: str) -> str:
    keys = {"image": f'"{top}"', "name": '"vm"', "snapshots": "true", "layers": "true", **more}
    return "[[export]]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items())


ALL = ["vm", "vm@monday", "vm@tues,day=1", "vm#1", "vm#2"]


def connect(server: Configured, name: str) -> Client:
    return Client(str(server.server.socket)).go(name, contexts=("base:allocation",))


def test_they_are_what_qemu_img_says(paths: list[Path], tmp_path: Path) -> None:
    top, middle, base = paths
    snapshots = {"vm@monday": "monday", "vm@tues,day=1": "snapshot.name=tues,,day=1"}
    for name, selector in snapshots.items():
        run("qemu-img", "convert", "-l", selector, "-O", "raw", top, tmp_path / name)
    with configured(body(top)) as server:
        assert server.names() == ALL
        for name in snapshots:
            run("qemu-img", "compare", "-f", "raw", "-F", "raw", tmp_path / name, server.uri(name))
            assert run("nbdinfo", "--size", server.uri(name)) == f"{(tmp_path / name).stat().st_size}\n"
        for name, path in (("vm#1", middle), ("vm#2", base)):
            run("qemu-img", "compare", "-U", "-f", "qcow2", "-F", "raw", path, server.uri(name))
            assert "is_read_only: true" in run("nbdinfo", server.uri(name))


def test_nothing_comes_along_unless_asked_for(paths: list[Path]) -> None:
    with configured(body(paths[0], snapshots="false")) as server:
        assert server.names() == ["vm", "vm#1", "vm#2"]
        server.reload(body(paths[0], layers="false"))
        eventually(lambda: server.names() == ["vm", "vm@monday", "vm@tues,day=1"], "the reload changed nothing")
        server.reload(body(paths[0], snapshots="false", layers="false"))
        eventually(lambda: server.names() == ["vm"], "the reload changed nothing")
        assert execute("nbdinfo", server.uri("vm@monday")).returncode != 0


def test_snapshots_that_are_made_and_deleted_live_come_and_go(paths: list[Path]) -> None:
    with configured(body(paths[0], layers="false")) as server:
        server("blockdev-snapshot-internal-sync", device="vm", name="now")
        eventually(lambda: "vm@now" in server.names(), "the new one is not offered")
        qemu_io(server, "write -P 9 0 4M", export="vm")
        qemu_io(server, "read -P 5 0 4M", export="vm@now")
        with connect(server, "vm@now") as client:
            said = server.refusal("blockdev-snapshot-delete-internal-sync", device="vm", name="now")
            assert "is shown by export 'vm@now'" in said
            assert client.read(0, 512) == b"\5" * 512
        eventually(lambda: _delete(server, "now"), "the client has left")
        eventually(lambda: "vm@now" not in server.names(), "the deleted one is still offered")
        server("blockdev-snapshot-internal-sync", device="vm", name="now")  # the id and the name of the old one
        eventually(lambda: "vm@now" in server.names(), "the new one is not offered")
        qemu_io(server, "read -P 9 0 4M", export="vm@now")


def _delete(server: Configured, name: str) -> bool:
    """Delete a snapshot, unless the server has not noticed yet that its client has left."""
    try:
        server("blockdev-snapshot-delete-internal-sync", device="vm", name=name)
    except AdminError as error:
        if "is shown by export" not in str(error):
            raise
        return False
    return True


def test_layers_follow_external_snapshots_and_commits(paths: list[Path], tmp_path: Path) -> None:
    top, middle, base = paths
    with configured(body(top, snapshots="false")) as server:
        with connect(server, "vm#1") as client:
            assert client.read(1 << 20, 512) == b"\2" * 512
            server("blockdev-snapshot-sync", device="vm", snapshot_file=str(tmp_path / "new.qcow2"))
            eventually(lambda: server.names() == ["vm", "vm#1", "vm#2", "vm#3"], "the layers are others")
            assert client.read(1 << 20, 512) == b"\2" * 512  # its layer has another number by now
            qemu_io(server, "read -P 5 0 4M", export="vm#1")
            qemu_io(server, "read -P 2 1M 1M", export="vm#2")
            said = server.refusal("block-commit", device="vm", top=str(middle), base=str(base), job_id="j")
            assert "is shown by export" in said
        eventually(lambda: len(server("query-block-exports")) == 4, "the client has left")
        server("block-commit", device="vm", top=str(middle), base=str(base), job_id="j")
        server.wait_for_jobs()
        eventually(lambda: server.names() == ["vm", "vm#1", "vm#2"], "the layers are others")
        qemu_io(server, "read -P 2 1M 1M", export="vm#2")


def test_layers_that_a_job_writes_to_are_not_offered_meanwhile(paths: list[Path]) -> None:
    top, middle, base = paths
    with configured(body(top, snapshots="false")) as server:
        server("block-commit", device="vm", top=str(middle), base=str(base), job_id="j", speed=1)
        assert server.names() == ["vm"]
        server("block-job-cancel", device="j", force=True)
        eventually(lambda: server.names() == ["vm", "vm#1", "vm#2"], "they do not come back")


def test_the_policy_of_the_disk_applies(paths: list[Path]) -> None:
    with configured(body(paths[0]) + 'access = { users = ["nobody"] }\n') as server:
        assert server.names() == []
        assert execute("nbdinfo", server.uri("vm@monday")).returncode != 0
        server.reload(body(paths[0]) + "max-connections = 1\n")
        eventually(lambda: server.names() == ALL, "the policy has not changed")
        with connect(server, "vm#1"):
            assert execute("nbdinfo", server.uri("vm#1")).returncode != 0
            run("nbdinfo", "--size", server.uri("vm#2"))


def test_the_rates_of_the_disk_are_for_all_that_comes_along_with_it(paths: list[Path]) -> None:
    """Whoever uses up what the disk may do has used it up for its layers, too."""
    with configured(body(paths[0], rate="{ requests = 1, burst = 30 }")) as server:
        with connect(server, "vm#1") as client:
            for _ in range(30):
                client.read(0, 512)
            with connect(server, "vm") as other:
                other.send(READ, 0, 512)
                other.socket.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    other.socket.recv(1)
        server.reload(body(paths[0]))
        eventually(lambda: server.names() == ALL, "something is missing")
        with connect(server, "vm#2") as client:
            for _ in range(100):
                client.read(0, 512)


def test_administrators_may_ask_for_them_change_their_policy_and_take_them_back(paths: list[Path]) -> None:
    with configured(body(paths[0], snapshots="false", layers="false")) as server:
        words = {"type": "nbd", "id": "x", "node_name": "vm", "name": "x"}
        server("block-export-add", **words, x_nbdq_snapshots=True, x_nbdq_layers=True)
        eventually(lambda: len(server.names()) == 6, "they are not offered")
        assert server.names()[2:] == ["x@monday", "x@tues,day=1", "x#1", "x#2"]
        server("x-nbdq-export-set", id="x", access={"users": ["nobody"]})
        assert server.names() == ["vm"]
        server("x-nbdq-export-set", id="x", access={})
        with connect(server, "x#1") as client:
            server("block-export-del", id="x")
            assert server.names() == ["vm"]
            assert client.read(1 << 20, 512) == b"\2" * 512
        eventually(lambda: len(server("query-block-exports")) == 1, "an export is left")
        said = server.refusal("block-export-add", **words, x_nbdq_snapshot="monday", x_nbdq_layers=True)
        assert "come along with exports of disks only" in said


def test_an_exact_name_wins(paths: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", other, "1M")
    named = f'[[export]]\nimage = "{other}"\nname = "vm#1"\n'
    with configured(body(paths[0]) + named) as server:
        assert run("nbdinfo", "--size", server.uri("vm#1")) == f"{1 << 20}\n"
        server.reload(body(paths[0]))
        eventually(lambda: run("nbdinfo", "--size", server.uri("vm#1")) == f"{16 << 20}\n", "the layer is not offered")
        server("block-export-add", type="nbd", id="x", node_name="vm", name="vm#1")
        assert run("nbdinfo", "--size", server.uri("vm#1")) == f"{32 << 20}\n"


def test_looking_around_opens_nothing(paths: list[Path]) -> None:
    """R-07: only who reads costs something; a snapshot that cannot be opened is an error for its readers alone."""
    top = paths[0]
    with configured(body(top)) as server:
        descriptors = f"/proc/{server.server.process.pid}/fd"
        before = len(list(Path(descriptors).iterdir()))
        for name in ALL:
            with connect(server, name):
                assert len(list(Path(descriptors).iterdir())) <= before + 1
        eventually(lambda: len(list(Path(descriptors).iterdir())) == before, "something is left open")


@requires("fio")
def test_backups_of_snapshots_are_read_while_the_guest_writes(paths: list[Path], tmp_path: Path) -> None:
    top = paths[0]
    run("qemu-img", "convert", "-l", "monday", "-O", "raw", top, tmp_path / "monday")
    run("qemu-img", "resize", "-q", top, "64M")
    with configured(body(top, default="true")) as server, verified_load(server, top):
        for _ in range(3):
            server("blockdev-snapshot-internal-sync", device="vm", name="x")
            run("qemu-img", "compare", "-f", "raw", "-F", "raw", tmp_path / "monday", server.uri("vm@monday"))
            eventually(lambda: _delete(server, "x"), "somebody is there")
    run("qemu-img", "check", top)

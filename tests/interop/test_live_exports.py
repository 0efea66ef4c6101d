"""Exports that come and go, disks that change their size, and questions about disks in use, over the admin socket."""

import asyncio
import json
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbdq.admin.commands.queries import CheckRequest
from nbdq.admin.commands.queries import check as check_image
from nbdq.admin.jobs import Jobs
from nbdq.admin.state import State
from nbdq.chain.clusters import ClusterCache
from nbdq.chain.live import LiveChain
from nbdq.chain.policy import Policy
from nbdq.ops.commit import Commit
from nbdq.ops.control import Control
from nbdq.server.exports.export import Exports
from nbdq.server.exports.volume import Volume
from tests.server.client import EINVAL, ENOSPC, EPERM, FLUSH, READ, TRIM, WRITE, WRITE_ZEROES, Client, Disconnected
from tests.support.administration import Administered, administered, chain, check, qemu_io, verified_load
from tests.support.tools import requires, run

ESHUTDOWN = 108

pytestmark = requires("qemu-img", "qemu-io", "fio")

MIB = 1 << 20


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    run("qemu-io", "-c", "write -P 1 0 4M", path)
    return path


@pytest.fixture
def disk(base: Path, tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", path)
    run("qemu-io", "-c", "write -P 2 1M 1M", path)
    return path


def connect(server: Administered, name: str = "", **options: Any) -> Client:
    return Client(str(server.server.socket)).go(name, **options)


def names(server: Administered) -> list[str]:
    return [export["id"] for export in server("query-block-exports")]


def deletions(server: Administered) -> list[str]:
    """Ids of exports that were told to be gone."""
    server("query-version")
    return [event["data"]["id"] for event in server.client.taken_events() if event["event"] == "BLOCK_EXPORT_DELETED"]


def test_an_export_comes_and_goes_while_others_are_served(disk: Path) -> None:
    with administered(disk) as server, connect(server) as first:
        server("block-export-add", type="nbd", id="second", node_name="disk", name="b", writable=True)
        assert names(server) == ["disk", "second"]
        with connect(server, "b") as second:
            assert second.error(WRITE, 0, 512, payload=b"x" * 512) == 0
            assert first.read(0, 1024) == b"x" * 512 + b"\1" * 512
            assert "still in use by 1 clients" in server.refusal("block-export-del", id="second")
            assert second.read(0, 512) == b"x" * 512
            server("block-export-del", id="second", mode="hard")
            assert second.is_closed()
        assert deletions(server) == ["second"]
        assert names(server) == ["disk"]
        assert first.error(FLUSH) == 0
        with Client(str(server.server.socket)) as late, pytest.raises(AssertionError, match="no export is named 'b'"):
            late.go("b")


def test_hard_deletion_answers_what_was_asked(disk: Path) -> None:
    with administered(disk) as server, connect(server) as client:
        for number in range(100):
            client.send(WRITE, number * 65536, 65536, payload=b"z" * 65536)
        client.send(READ, 0, 512)
        server("block-export-del", id="disk", mode="hard")
        done = 0
        try:
            while client.outstanding:
                error = client.reply().error
                assert error in (0, ESHUTDOWN)
                done += error == 0
        except Disconnected:
            pass
        server("block-export-add", type="nbd", id="again", node_name="disk", name="")
        with connect(server) as again:
            assert all(again.read(n * 65536, 65536) == b"z" * 65536 for n in range(min(done, 100)))


def test_soft_deletion_waits_for_the_last_client(disk: Path) -> None:
    with administered(disk) as server:
        with connect(server) as client:
            server("block-export-del", id="disk", mode="soft")
            (export,) = server("query-block-exports")
            assert export["shutting-down"]
            assert client.read(0, 512) == b"\1" * 512
            with Client(str(server.server.socket)) as late, pytest.raises(AssertionError, match="no default export"):
                late.go()
            assert not deletions(server)
        while names(server):
            pass
        assert deletions(server) == ["disk"]


def test_a_layer_and_a_snapshot_are_shown_beside_the_disk_and_stay_as_they_are(disk: Path, base: Path) -> None:
    run("qemu-img", "snapshot", "-c", "monday", disk)
    run("qemu-io", "-c", "write -P 3 1M 1M", disk)
    with administered(disk) as server:
        qemu_io(server, "write -P 4 0 4M")
        server("block-export-add", type="nbd", id="l", node_name="disk", name="layer", x_nbdq_layer=str(base))
        server("block-export-add", type="nbd", id="s", node_name="disk", name="snap", x_nbdq_snapshot="monday")
        refusal = server.refusal("block-export-add", type="nbd", id="w", node_name="disk", name="w", writable=True,
                                 x_nbdq_snapshot="monday")  # fmt: skip
        assert "read-only" in refusal
        assert "no internal snapshot" in server.refusal(
            "block-export-add", type="nbd", id="x", node_name="disk", name="x", x_nbdq_snapshot="friday"
        )
        assert "is no layer" in server.refusal(
            "block-export-add", type="nbd", id="x", node_name="disk", name="x", x_nbdq_layer="/etc/passwd"
        )
        qemu_io(server, "read -P 1 0 4M", export="layer")
        qemu_io(server, "read -P 1 0 1M", "read -P 2 1M 1M", "read -P 1 2M 2M", export="snap")
        overlay = disk.with_name("overlay.qcow2")
        with connect(server, "snap") as client:
            server("blockdev-snapshot-sync", device="disk", snapshot_file=str(overlay))
            qemu_io(server, "write -P 5 0 4M")
            assert client.read(MIB, MIB) == b"\2" * MIB
            assert client.error(WRITE, 0, 512, payload=bytes(512)) == EPERM
        qemu_io(server, "read -P 1 0 4M", export="layer")
        qemu_io(server, "read -P 5 0 4M")
        shown = {export["id"]: export for export in server("query-block-exports")}
        assert (shown["l"]["x-nbdq-layer"], shown["s"]["x-nbdq-snapshot"]) == (str(base), "monday")
    check(disk, base, overlay)


def test_an_id_or_name_is_used_once(disk: Path) -> None:
    with administered(disk) as server:
        add = {"type": "nbd", "node_name": "disk"}
        assert "id 'disk' is already in use" in server.refusal("block-export-add", id="disk", name="other", **add)
        assert "two exports are named ''" in server.refusal("block-export-add", id="other", name="", **add)
        assert "Cannot find device" in server.refusal("block-export-add", type="nbd", id="x", node_name="nothing")
        assert "is not found" in server.refusal("block-export-del", id="nothing")
        assert names(server) == ["disk"]


def test_an_export_is_changed_for_those_who_come_later(disk: Path) -> None:
    with administered(disk) as server, connect(server) as early:
        server("x-nbdq-export-set", id="disk", read_only=True, description="later", max_connections=2)
        with connect(server) as late:
            assert late.error(WRITE, 0, 512, payload=bytes(512)) == EPERM
            assert early.error(WRITE, 0, 512, payload=b"e" * 512) == 0
            assert late.read(0, 512) == b"e" * 512
            assert late.error(FLUSH) == 0
            with Client(str(server.server.socket)) as third, pytest.raises(AssertionError):
                third.go()
        server("x-nbdq-export-set", id="disk", discard="ignore")
        assert early.error(TRIM, MIB, MIB) == 0
        assert early.read(MIB, MIB) == b"\2" * MIB
        assert "forbids" in server.refusal("x-nbdq-export-set", id="disk", detect_zeroes="unmap")
        (export,) = server("query-block-exports")
        assert (export["x-nbdq-description"], export["x-nbdq-writable"]) == ("later", False)


def test_a_pause_holds_what_is_sent_until_it_ends(disk: Path) -> None:
    with administered(disk) as server, connect(server) as client:
        assert client.error(WRITE, 0, 512, payload=b"a" * 512) == 0
        server("x-nbdq-pause", device="disk", flush=True)
        client.send(WRITE, 0, 512, payload=b"b" * 512)
        assert server("query-block-exports")[0]["x-nbdq-paused"]
        # What is in the file is what was acknowledged before the pause, and whole.
        run("qemu-io", "-r", "-U", "-c", "read -P 97 0 512", disk)
        server("x-nbdq-resume", device="disk")
        assert client.reply().error == 0
        server("x-nbdq-pause", id="disk", seconds=1)
        client.send(READ, 0, 512)
        assert client.reply().data == b"b" * 512
        server("query-version")
        assert any(event["event"] == "X_NBDQ_RESUMED" for event in server.client.taken_events())


@pytest.mark.parametrize("size", [64 * MIB + 512, 4096 * MIB])
def test_a_disk_grows_under_its_clients(disk: Path, size: int) -> None:
    with administered(disk) as server, connect(server) as early:
        with verified_load(server, disk):
            server("block_resize", device="disk", size=size)
        assert early.read(size - 512, 512) == bytes(512)
        assert early.error(WRITE, size - 512, 512, payload=b"g" * 512) == 0
        with connect(server) as late:
            assert late.size == size
            assert late.read(size - 512, 512) == b"g" * 512
    check(disk)
    assert chain(disk)[0]["virtual-size"] == size


def test_a_disk_shrinks_only_when_that_is_wanted(disk: Path) -> None:
    with administered(disk) as server, connect(server) as client:
        assert "x-nbdq-shrink" in server.refusal("block_resize", device="disk", size=32 * MIB)
        assert "multiple of 512" in server.refusal("block_resize", device="disk", size=100)
        assert ">0 size" in server.refusal("block_resize", device="disk", size=-512)
        assert client.error(WRITE, 40 * MIB, MIB, payload=b"s" * MIB) == 0
        with verified_load(server, disk, jobs=1):
            server("block_resize", device="disk", size=32 * MIB, x_nbdq_shrink=True)
        assert client.error(READ, 32 * MIB, 512) == EINVAL
        assert client.error(WRITE_ZEROES, 32 * MIB - 512, 1024) == ENOSPC
        assert client.read(MIB, MIB) == b"\2" * MIB
        server("block_resize", device="disk", size=64 * MIB)
        assert client.read(40 * MIB, MIB) == bytes(MIB)
    check(disk)


def test_a_raw_disk_changes_its_size_too(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"r" * MIB)
    with administered("-f", "raw", path) as server, connect(server) as client:
        server("block_resize", device="disk", size=2 * MIB)
        assert client.read(MIB - 512, 1024) == b"r" * 512 + bytes(512)
        server("block_resize", device="disk", size=4096, x_nbdq_shrink=True)
        assert client.error(READ, 4096, 512) == EINVAL
        assert client.read(0, 4096) == b"r" * 4096
    assert path.stat().st_size == 4096


def test_statistics_count_what_clients_did(disk: Path) -> None:
    with administered(disk) as server:
        with connect(server) as client:
            for number in range(10):
                client.read(number * 512, 512)
            client.read(0, MIB)
            client.error(WRITE, 0, 4096, payload=bytes(4096))
            client.error(WRITE, 8 * MIB, 4 * MIB, payload=bytes(4 * MIB))
            client.error(WRITE_ZEROES, 0, 4096)
            client.error(TRIM, MIB, 65536)
            client.error(FLUSH)
            client.error(READ, 1 << 40, 512)
        (disk_stats,) = server("query-blockstats")
        stats = disk_stats["stats"]
        assert (stats["rd_operations"], stats["rd_bytes"]) == (11, 10 * 512 + MIB)
        assert (stats["wr_operations"], stats["wr_bytes"]) == (3, 4 * MIB + 8192)
        assert (stats["unmap_operations"], stats["unmap_bytes"], stats["flush_operations"]) == (1, 65536, 1)
        assert (stats["invalid_rd_operations"], stats["failed_rd_operations"]) == (1, 0)
        assert stats["x-nbdq-in-flight"] == 0
        server("block-export-del", id="disk", mode="hard")
        while names(server):
            pass
        assert server("query-blockstats")[0]["stats"]["rd_operations"] == 11


def test_questions_about_a_disk_in_use_are_answered_as_qemu_img_answers_them(disk: Path) -> None:
    with administered(disk) as server:
        with verified_load(server, disk):
            (block,) = server("query-block")
            nodes = server("query-named-block-nodes")
            assert server("x-nbdq-check", device="disk")["corruptions"] == 0
        inserted = block["inserted"]
        assert (inserted["drv"], inserted["ro"], inserted["backing_file_depth"]) == ("qcow2", False, 1)
        assert inserted["image"]["backing-image"]["filename"] == nodes[1]["file"]
        shown = server("x-nbdq-map", device="disk", consistent=True)
        result = server("x-nbdq-check", device="disk")
        assert (result["corruptions"], result["leaks"], result["check-errors"]) == (0, 0, 0)
        info = server("x-nbdq-info", device="disk")
    assert _without_compressed(shown) == _without_compressed(json.loads(run("qemu-img", "map", "--output=json", disk)))
    assert [image["filename"] for image in info] == [image["filename"] for image in chain(disk)]
    assert info[0]["format-specific"]["data"]["compat"] == chain(disk)[0]["format-specific"]["data"]["compat"]


def _without_compressed(extents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What every QEMU says; only 8.2 and later say which extents are compressed."""
    return [{name: value for name, value in extent.items() if name != "compressed"} for extent in extents]


def test_leaks_are_mended_while_the_disk_is_in_use(disk: Path) -> None:
    _leak(disk)
    with administered(disk) as server:
        with verified_load(server, disk):
            found = server("x-nbdq-check", device="disk")
            assert found["leaks"] == 1
            assert server("x-nbdq-check", device="disk", fix="leaks")["leaks-fixed"] == 1
            assert server("x-nbdq-check", device="disk")["leaks"] == 0
        below = str(disk.with_name("base.qcow2"))
        assert "nothing is mended" in server.refusal("x-nbdq-check", device="disk", layer=below, fix="leaks")
    check(disk)


def _leak(path: Path) -> None:
    """Give a cluster behind the end of the image a refcount."""
    with path.open("r+b") as file:
        file.seek(48)
        table = int.from_bytes(file.read(8), "big")
        file.seek(table)
        block = int.from_bytes(file.read(8), "big")
        size = path.stat().st_size // 65536
        file.seek(block + 2 * (size + 5))
        file.write(b"\0\1")
        file.truncate((size + 6) * 65536)


def test_admin_commands_with_nonsense_change_nothing(disk: Path) -> None:
    with administered(disk) as server:
        for arguments in (
            {"type": "vhost-user-blk", "id": "x", "node_name": "disk"},
            {"type": "nbd", "id": "", "node_name": "disk"},
            {"type": "nbd", "id": "x", "node_name": "disk", "name": "n" * 5000},
            {"type": "nbd", "id": "x", "node_name": "disk", "name": "a", "bitmaps": ["nothing"]},
            {"type": "nbd", "id": "x", "node_name": "disk", "name": "a", "x_nbdq_max_connections": -1},
            {"type": "nbd", "id": "x", "node_name": "disk", "name": "a", "description": "d" * 5000},
        ):
            server.refusal("block-export-add", **arguments)
        assert server.refusal("x-nbdq-pause", id="disk", device="disk")
        assert server.refusal("x-nbdq-pause", id="disk", seconds=-1)
        assert server.refusal("x-nbdq-map", device="disk", limit=0)
        assert names(server) == ["disk"]
        with connect(server) as client:
            assert client.read(0, 512) == b"\1" * 512


def test_an_internal_snapshot_is_not_shown_while_a_job_changes_what_it_lies_over(disk: Path) -> None:
    run("qemu-img", "snapshot", "-c", "monday", disk)
    show = {"type": "nbd", "id": "s", "node_name": "disk", "name": "s", "x_nbdq_snapshot": "monday"}
    with administered(disk) as server:
        stream = {"command": "block-stream", "auto_finalize": False, "x_nbdq_force": True}
        for job in ({"command": "block-commit"}, stream):
            server(**job, device="disk", job_id="job")
            assert "in use by job 'job'" in server.refusal("block-export-add", **show)
            server("job-cancel", id="job")
            while server("query-jobs"):
                pass
        server("block-export-add", **show)
        for command, more in (
            ("block-commit", {}),
            ("block-stream", {}),
            ("x-nbdq-rebase", {"backing_file": ""}),
        ):
            assert "is shown by export" in server.refusal(command, device="disk", **more)
        assert "verification failed" not in qemu_io(server, "read -P 1 0 1M", export="s")


def test_a_check_that_had_to_wait_checks_the_layer_that_was_asked_for(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.qcow2" for number in range(4)]
    for path, below in zip(paths, [None, *paths], strict=False):
        backing = [] if below is None else ["-b", below.name, "-F", "qcow2"]
        run("qemu-img", "create", "-q", "-f", "qcow2", *backing, path, "1M")

    async def story(volume: Volume) -> Any:
        context: Any = SimpleNamespace(
            volumes=SimpleNamespace(volume=lambda name: volume), jobs=Jobs(State(None), lambda event, data: None)
        )
        async with volume.steady():
            task = asyncio.create_task(check_image(context, CheckRequest("disk", layer=str(paths[0]))))
            await asyncio.sleep(0)
            operation = Commit(volume.chain, top=1, base=2)
            operation.run(Control())
            operation.pivot()
            operation.finish()
        return await task

    with closing(ClusterCache(budget=1 << 20)) as clusters:
        live = LiveChain.open(str(paths[-1]), format="qcow2", policy=Policy(), clusters=clusters)
        with closing(live):
            assert str(paths[0]) in asyncio.run(story(Volume("disk", live, Exports())))["filename"]

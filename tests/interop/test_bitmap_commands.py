"""Dirty bitmaps of a disk that is served, over the admin socket (4.12, F2): as QEMU answers, and as backups need it."""

import json
import random
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nbdq.admin.client import AdminError
from nbdq.qcow2.bitmaps.directory import read_bitmaps
from nbdq.qcow2.format import read_header
from nbdq.storage import FileStorage
from tests.support.administration import Administered, administered, qemu_io, verified_load
from tests.support.oracles import Status, block_status
from tests.support.storage_daemon import StorageDaemon
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io", "qemu-storage-daemon", "nbdinfo", "fio")

M = 1 << 20
K64 = 65536


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return create(tmp_path / "disk.qcow2")


def create(path: Path, size: str = "64M") -> Path:
    run("qemu-img", "create", "-q", "-f", "qcow2", path, size)
    return path


def ask(server: Administered, command: str, arguments: dict[str, Any]) -> Any:
    """The reply, or the text of the error."""
    try:
        return server.client.call(command, arguments)
    except AdminError as error:
        return str(error)


def bitmaps(server: Administered, node: str = "disk") -> dict[str, dict[str, Any]]:
    """What is said of each bitmap of the top."""
    layers = server("x-nbdq-bitmap-list", node=node)
    return {each["name"]: each for layer in layers if layer["depth"] == 0 for each in layer["dirty-bitmaps"]}


def ranges(server: Administered, name: str) -> list[tuple[int, int]]:
    found = server("x-nbdq-bitmap-ranges", node="disk", name=name)["ranges"]
    return [(each["start"], each["length"]) for each in found]


#: Command and arguments but for the node; what comes later stands on what came before.
CONVERSATION: list[tuple[str, dict[str, Any]]] = [
    ("block-dirty-bitmap-add", {"name": "a", "persistent": True}),
    ("block-dirty-bitmap-add", {"name": "a"}),
    ("block-dirty-bitmap-add", {"name": ""}),
    ("block-dirty-bitmap-add", {"name": "b", "granularity": 1000}),
    ("block-dirty-bitmap-add", {"name": "b", "granularity": 256}),
    ("block-dirty-bitmap-add", {"name": "b", "granularity": 4096, "disabled": True}),
    ("block-dirty-bitmap-remove", {"name": "nothing"}),
    ("block-dirty-bitmap-clear", {"name": "nothing"}),
    ("block-dirty-bitmap-merge", {"target": "nothing", "bitmaps": ["a"]}),
    ("block-dirty-bitmap-merge", {"target": "b", "bitmaps": ["a", "nothing"]}),
    ("block-dirty-bitmap-merge", {"target": "b", "bitmaps": ["a", {"node": "disk", "name": "a"}]}),
    ("block-dirty-bitmap-enable", {"name": "b"}),
    ("block-dirty-bitmap-disable", {"name": "a"}),
    ("x-debug-block-dirty-bitmap-sha256", {"name": "a"}),
    ("x-debug-block-dirty-bitmap-sha256", {"name": "b"}),
    ("block-dirty-bitmap-clear", {"name": "a"}),
    ("x-debug-block-dirty-bitmap-sha256", {"name": "a"}),
    ("block-dirty-bitmap-remove", {"name": "b"}),
]


def test_commands_are_answered_as_qemu_answers_them(disk: Path, tmp_path: Path) -> None:
    theirs = create(tmp_path / "theirs.qcow2")
    export = tmp_path / "socket"
    with closing(StorageDaemon(theirs, node="disk")) as daemon, administered(disk) as server:
        daemon.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(export)}})
        daemon.execute("block-export-add", type="nbd", id="e", **{"node-name": "disk"}, name="e", writable=True)
        for number, (command, arguments) in enumerate(CONVERSATION):
            given = {"node": "disk", **arguments}
            assert ask(server, command, given) == daemon.execute(command, **given), (command, given)
            write = f"write {number * 3 * K64} 70k"
            qemu_io(server, write)
            run("qemu-io", "-f", "raw", "-c", write, f"nbd+unix:///e?socket={export}")
            ours = {
                name: tuple(each[key] for key in ("count", "granularity", "recording", "persistent"))
                for name, each in bitmaps(server).items()
            }
            assert ours == daemon.states()


def test_a_transaction_changes_all_bitmaps_or_none(disk: Path) -> None:
    with administered(disk) as server:
        server("block-dirty-bitmap-add", node="disk", name="old", persistent=True)
        qemu_io(server, "write 1M 64k")
        before = bitmaps(server)
        actions: list[dict[str, Any]] = [
            {"type": "block-dirty-bitmap-add", "data": {"node": "disk", "name": "new", "persistent": True}},
            {"type": "block-dirty-bitmap-merge", "data": {"node": "disk", "target": "new", "bitmaps": ["old"]}},
            {"type": "block-dirty-bitmap-disable", "data": {"node": "disk", "name": "old"}},
            {"type": "block-dirty-bitmap-clear", "data": {"node": "disk", "name": "new"}},
            {"type": "block-dirty-bitmap-remove", "data": {"node": "disk", "name": "old"}},
        ]
        failing = [*actions, {"type": "block-dirty-bitmap-enable", "data": {"node": "disk", "name": "nothing"}}]
        assert "Dirty bitmap 'nothing' not found" in server.refusal("transaction", actions=failing)
        assert bitmaps(server) == before
        server("transaction", actions=actions)
        assert list(bitmaps(server)) == ["new"]
        qemu_io(server, "write 2M 64k")
        assert ranges(server, "new") == [(2 * M, K64)]
    described = json.loads(run("qemu-img", "info", "--output=json", disk))["format-specific"]["data"]["bitmaps"]
    assert [each["name"] for each in described] == ["new"]
    run("qemu-img", "check", "-q", disk)


def test_a_removed_bitmap_is_gone_from_the_file_while_the_disk_is_still_served(disk: Path) -> None:
    for name in ("a", "b"):
        run("qemu-img", "bitmap", "--add", disk, name)
    with administered(disk) as server:
        server("block-dirty-bitmap-remove", node="disk", name="a")
        described = json.loads(run("qemu-img", "info", "-U", "--output=json", disk))["format-specific"]["data"]
        assert [(each["name"], "in-use" in each["flags"]) for each in described["bitmaps"]] == [("b", True)]


def test_a_bitmap_that_an_export_shows_can_be_changed_but_not_removed(disk: Path) -> None:
    run("qemu-img", "bitmap", "--add", disk, "a")
    with administered("-x", "main", "-B", "a", disk) as server:
        context = "qemu:dirty-bitmap:a"
        qemu_io(server, "write 1M 64k", export="main")
        assert Status(M, K64, 1) in block_status([server.uri("main")], context)
        node = "main"
        assert bitmaps(server, node)["a"]["busy"]
        said = server.refusal("block-dirty-bitmap-remove", node=node, name="a")
        assert "Bitmap 'a' is shown by export 'main'; delete that first" in said
        server("block-dirty-bitmap-clear", node=node, name="a")
        assert block_status([server.uri("main")], context) == [Status(0, 64 * M, 0)]
        qemu_io(server, "write 2M 64k", export="main")
        assert Status(2 * M, K64, 1) in block_status([server.uri("main")], context)


def test_ranges_are_told_in_pieces(disk: Path) -> None:
    with administered(disk) as server:
        server("block-dirty-bitmap-add", node="disk", name="a", granularity=K64)
        for number in range(5):
            qemu_io(server, f"write {number * 2 * M} 64k")
        found, offset = [], 0
        while offset is not None:
            reply = server("x-nbdq-bitmap-ranges", node="disk", name="a", offset=offset, limit=2)
            assert len(reply["ranges"]) <= 2
            found += [each["start"] for each in reply["ranges"]]
            offset = reply.get("next")
        assert found == [number * 2 * M for number in range(5)]
        within = server("x-nbdq-bitmap-ranges", node="disk", name="a", offset=2 * M + 512, length=1024)
        assert within["ranges"] == [{"start": 2 * M + 512, "length": 1024}]
        for bad in ({"offset": -1}, {"offset": 65 * M}, {"length": 65 * M}, {"limit": 0}):
            said = server.refusal("x-nbdq-bitmap-ranges", node="disk", name="a", **bad)
            assert "are no range of a disk of" in said or "limit 0 is not 1 to" in said


def test_bitmaps_of_another_disk_can_be_merged_if_it_is_as_large(disk: Path, tmp_path: Path) -> None:
    other, small = create(tmp_path / "other.qcow2"), create(tmp_path / "small.qcow2", "32M")
    with administered(disk, other, small) as server:
        for node in ("disk", "other", "small"):
            server("block-dirty-bitmap-add", node=node, name="a")
        qemu_io(server, "write 5M 64k", export="other")
        qemu_io(server, "write 7M 64k", export="disk")
        server("block-dirty-bitmap-merge", node="disk", target="a", bitmaps=[{"node": "other", "name": "a"}])
        assert ranges(server, "a") == [(5 * M, K64), (7 * M, K64)]
        wrong = [{"node": "small", "name": "a"}]
        said = server.refusal("block-dirty-bitmap-merge", node="disk", target="a", bitmaps=wrong)
        assert f"different sizes (destination size is {64 * M}, source size is {32 * M})" in said


def test_a_snapshot_and_the_bitmap_of_its_overlay_begin_at_one_moment(disk: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    with administered(disk) as server:
        server("block-dirty-bitmap-add", node="disk", name="before", persistent=True)
        qemu_io(server, "write 1M 64k")
        actions: list[dict[str, Any]] = [
            {"type": "blockdev-snapshot-sync", "data": {"device": "disk", "snapshot-file": str(overlay)}},
            {"type": "block-dirty-bitmap-add", "data": {"node": "disk", "name": "after", "persistent": True}},
        ]
        server("transaction", actions=actions)
        qemu_io(server, "write 2M 64k")
        layers = {layer["path"]: layer["dirty-bitmaps"] for layer in server("x-nbdq-bitmap-list", node="disk")}
        assert [(each["name"], each["count"], each["recording"]) for each in layers[str(overlay)]] == [
            ("after", K64, True)
        ]
        assert [(each["name"], each["count"], each["recording"]) for each in layers[str(disk)]] == [
            ("before", K64, False)
        ]
        assert "not the top" not in server.refusal("block-dirty-bitmap-clear", node="disk", name="before")
        server("block-dirty-bitmap-add", node="disk", name="both")
        server("block-dirty-bitmap-merge", node="disk", target="both", bitmaps=["before", "after"])
        assert ranges(server, "both") == [(M, K64), (2 * M, K64)]
    for path, name, start in ((disk, "before", M), (overlay, "after", 2 * M)):
        command = ["[", "qemu-nbd", "-r", "-f", "qcow2", "-B", name, str(path), "]"]
        dirty = [status for status in block_status(command, f"qemu:dirty-bitmap:{name}") if status.value]
        assert dirty == [Status(start, K64, 1)]
        run("qemu-img", "check", "-q", path)


def test_bitmaps_go_on_when_a_snapshot_is_taken_back(disk: Path, tmp_path: Path) -> None:
    """Also those that no file has, although the image was closed to writing in between."""
    overlay = tmp_path / "overlay.qcow2"
    run("qemu-img", "bitmap", "--add", disk, "shown")
    with administered("-x", "disk", "-B", "shown", disk) as server:
        server("block-dirty-bitmap-add", node="disk", name="transient")
        qemu_io(server, "write 1M 64k", export="disk")
        actions: list[dict[str, Any]] = [
            {"type": "block-dirty-bitmap-clear", "data": {"node": "disk", "name": "transient"}},
            {"type": "block-dirty-bitmap-add", "data": {"node": "disk", "name": "new", "persistent": True}},
            {"type": "blockdev-snapshot-sync", "data": {"device": "disk", "snapshot-file": str(overlay)}},
            {"type": "block-dirty-bitmap-add", "data": {"node": "disk", "name": "over", "persistent": True}},
            {"type": "block-dirty-bitmap-enable", "data": {"node": "disk", "name": "nothing"}},
        ]
        assert "Dirty bitmap 'nothing' not found" in server.refusal("transaction", actions=actions)
        qemu_io(server, "write 2M 64k", export="disk")
        assert list(bitmaps(server)) == ["shown", "transient"]
        for name in ("shown", "transient"):
            assert ranges(server, name) == [(M, K64), (2 * M, K64)]
        shown = block_status([server.uri("disk")], "qemu:dirty-bitmap:shown")
        assert [status for status in shown if status.value] == [Status(M, K64, 1), Status(2 * M, K64, 1)]
    assert not overlay.exists()
    run("qemu-img", "check", "-q", disk)


def test_bitmaps_of_a_disk_that_grows_and_shrinks_fit_it(disk: Path) -> None:
    run("qemu-img", "bitmap", "--add", disk, "kept")
    with administered(disk) as server:
        server("block-dirty-bitmap-add", node="disk", name="transient")
        qemu_io(server, "write 63M 1M")
        server("block_resize", device="disk", size=1024 * M)
        qemu_io(server, "write 1023M 1M")
        expected = [(63 * M, M), (1023 * M, M)]
        assert ranges(server, "kept") == ranges(server, "transient") == expected
        server("block_resize", device="disk", size=63 * M + 512, x_nbdq_shrink=True)
        assert ranges(server, "kept") == ranges(server, "transient") == [(63 * M, 512)]
    command = ["[", "qemu-nbd", "-r", "-f", "qcow2", "-B", "kept", str(disk), "]"]
    dirty = [status for status in block_status(command, "qemu:dirty-bitmap:kept") if status.value]
    assert dirty == [Status(63 * M, 512, 1)]
    run("qemu-img", "check", "-q", disk)


def test_a_read_only_disk_keeps_its_bitmaps_as_they_are(disk: Path) -> None:
    run("qemu-img", "bitmap", "--add", disk, "a")
    with administered("-r", disk) as server:
        said = server.refusal("block-dirty-bitmap-clear", node="disk", name="a")
        assert "Node 'disk' is read-only" in said
        assert bitmaps(server)["a"]["recording"] is False


def test_a_raw_disk_has_bitmaps_that_end_with_the_server(tmp_path: Path) -> None:
    raw = tmp_path / "raw.img"
    raw.write_bytes(bytes(8 * M))
    with administered("-f", "raw", raw) as server:
        said = server.refusal("block-dirty-bitmap-add", node="raw", name="a", persistent=True)
        assert "Can't store persistent bitmaps to" in said
        server("block-dirty-bitmap-add", node="raw", name="a")
        assert bitmaps(server, "raw")["a"]["granularity"] == K64
        qemu_io(server, "write 1M 512", "write 3000000 70000", "write -z 5M 64k", "discard 6M 64k")
        found = server("x-nbdq-bitmap-ranges", node="raw", name="a")["ranges"]
        expected = [(M, K64), (2949120, 2 * K64), (5 * M, K64), (6 * M, K64)]
        assert [(each["start"], each["length"]) for each in found] == expected
        server("block-export-add", type="nbd", id="e", node_name="raw", name="e", bitmaps=["a"])
        shown = block_status([server.uri("e")], "qemu:dirty-bitmap:a")
        assert [(status.offset, status.length) for status in shown if status.value] == expected
        assert "shown by export 'e'" in server.refusal("block-dirty-bitmap-remove", node="raw", name="a")
        server("block-dirty-bitmap-clear", node="raw", name="a")
        assert server("x-nbdq-bitmap-ranges", node="raw", name="a")["ranges"] == []


COPY = """
import json, nbd, sys
uri, target, ranges = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
h = nbd.NBD()
h.connect_uri(uri)
with open(target, "r+b") as file:
    for start, length in ranges:
        for offset in range(start, start + length, 1 << 20):
            file.seek(offset)
            file.write(h.pread(min(1 << 20, start + length - offset), offset))
"""


def test_incremental_backups_of_a_busy_disk_miss_nothing(disk: Path, tmp_path: Path) -> None:
    """Rotate the bitmap, copy what the old one says, again and again; the last time nobody writes any more."""
    backup = tmp_path / "backup.raw"
    backup.write_bytes(b"")
    with backup.open("r+b") as file:
        file.truncate(64 * M)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chosen = random.Random(seed)
    with administered(disk) as server:
        server("block-dirty-bitmap-add", node="disk", name="0", granularity=4096)

        def copy_what_changed(number: int) -> int:
            old, new = str(number), str(number + 1)
            add = {"node": "disk", "name": new, "granularity": chosen.choice([512, 4096, K64])}
            actions = [
                {"type": "block-dirty-bitmap-add", "data": add},
                {"type": "block-dirty-bitmap-disable", "data": {"node": "disk", "name": old}},
            ]
            server("transaction", actions=actions)
            changed, offset = [], 0
            while offset is not None:
                reply = server("x-nbdq-bitmap-ranges", node="disk", name=old, offset=offset)
                changed += [(each["start"], each["length"]) for each in reply["ranges"]]
                offset = reply.get("next")
            run("/usr/bin/python3", "-c", COPY, server.uri(), backup, json.dumps(changed))
            server("block-dirty-bitmap-remove", node="disk", name=old)
            return sum(length for _, length in changed)

        with verified_load(server, disk):
            copied = [copy_what_changed(number) for number in range(6)]
        assert all(copied)
        copy_what_changed(6)
        assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", server.uri(), backup)


def test_a_damaged_bitmap_below_does_not_hide_the_others(disk: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.qcow2"
    for name in ("bad", "good"):
        run("qemu-img", "bitmap", "--add", disk, name)
    run("qemu-io", "-f", "qcow2", "-c", "write 0 64k", disk)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "qcow2", top)
    storage = FileStorage.open(str(disk))
    bad, _ = read_bitmaps(storage, read_header(storage))
    storage.close()
    with disk.open("r+b") as file:
        file.seek(bad.table_offset)
        file.write(b"\xff" * 8)
    with administered(top) as server:
        (layer,) = server("x-nbdq-bitmap-list", node="top")
        found = {each["name"]: (each.get("inconsistent", False), each["count"]) for each in layer["dirty-bitmaps"]}
        assert found == {"bad": (True, 0), "good": (False, K64)}

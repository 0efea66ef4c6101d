"""The metadata contexts of nbdq's own, as docs/protocol.md describes them, with libnbd and QEMU as judges."""

import json
import random
import re
from pathlib import Path

import pytest

from nbdq.server.exports.private_contexts import PRIVATE, SINCE
from tests.server.client import BLOCK_STATUS, EINVAL, Client
from tests.support.administration import Administered, administered, qemu_io
from tests.support.images import Image, Layer, Variant, build
from tests.support.oracles import Status, block_status, map_extents, merged
from tests.support.serving import serve
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io", "nbdsh", "nbdinfo")

K, M = 1 << 10, 1 << 20
DATA, ZERO, COMPRESSED = 1 << 16, 1 << 17, 1 << 18

VARIANTS = [
    Variant(
        "mixed",
        (
            Layer("4M", ("write 0 1M", "compress 2M 256k", "write 3M 64k")),
            Layer("4M", ("write 64k 64k", "compress 2M 128k", "zero 512k 64k"), name="middle.qcow2"),
            Layer("4M", ("write 64k 512", "zero 3M 64k", "write 4M-512 512")),
        ),
    ),
    Variant(
        "sizes",
        (
            Layer("6M", ("write 0 6M",)),
            Layer("2M", ("write 1M 64k",)),
            Layer("8M", ("write 3M 64k", "discard 0 64k", "zero 64k 64k")),
        ),
    ),
    Variant(
        "subclusters",
        (
            Layer("4M", ("write 0 4M",), format="raw"),
            Layer("4M", ("write 64k 512", "zero 1M 4k"), options="extended_l2=on,cluster_size=128k"),
            Layer("4M", ("write 128k 2k", "discard 2M 128k"), options="cluster_size=512"),
        ),
    ),
]


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Image:
    return build(request.param, tmp_path_factory.mktemp("image"))


@pytest.mark.parametrize("option", ["-r", "--discard=unmap"], ids=["read-only", "writable"])
def test_layer_offset_and_kind_are_those_of_qemu_img_map(image: Image, option: str) -> None:
    """``start`` to ``offset`` of ``qemu-img map``; its depth is that of qemu:allocation-depth where there is one."""
    extents = [extent for extent in map_extents(image) if extent["length"]]
    with serve(option, "-A", image.top) as server:
        layers = block_status([server.uri()], "x-nbdq:layer")
        depths = block_status([server.uri()], "qemu:allocation-depth")
        sectors = block_status([server.uri()], "x-nbdq:host-sector")
        compressed = block_status([server.uri()], "x-nbdq:compressed")
        with Client(str(server.socket)) as client:
            client.go(extended=True, contexts=("x-nbdq:host-offset",))
            offsets = client.ask(BLOCK_STATUS, 0, client.size).status[client.contexts["x-nbdq:host-offset"]]
    assert merged([status._replace(value=status.value & 0xFFFF) for status in layers]) == depths
    assert merged([status._replace(value=bool(status.value & DATA)) for status in layers]) == merged(
        [Status(extent["start"], extent["length"], extent["data"]) for extent in extents]
    )
    assert merged([status._replace(value=bool(status.value & ZERO)) for status in layers]) == merged(
        [Status(extent["start"], extent["length"], extent["zero"]) for extent in extents]
    )
    assert merged([status._replace(value=bool(status.value & COMPRESSED)) for status in layers]) == compressed
    assert any(status.value for status in compressed) == (image.variant.name == "mixed")
    position = 0
    found = {}
    for length, flags in offsets:
        assert flags >> 63 == bool(flags), "an offset without the bit that says that there is one"
        found[position] = (length, flags & (1 << 63) - 1 if flags else None)
        position += length
    for start, length, sector in sectors:
        assert {sector} == {
            1 + at // 512 if at is not None else 0 for begin, (_, at) in found.items() if begin == start
        }
        assert length > 0
    for extent in extents:  # QEMU's may be in pieces with us
        within = {
            at - extent["start"]: each
            for at, each in found.items()
            if extent["start"] <= at < extent["start"] + extent["length"]
        }
        for into, (_, at) in within.items():
            assert at == (extent["offset"] + into if "offset" in extent else None), extent


DOCUMENT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
(BACKUP,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)


def back_up(uri: str, layer: str | int, target: Path) -> int:
    """Bring the copy of a layer up to date as the documentation says; return how many bytes that took."""
    return int(run("/usr/bin/python3", "-c", BACKUP, uri, str(layer), target).split()[0])


def copy_of(image: Image, number: int, target: Path) -> Path:
    """What a full backup made when the layer was the top; with room for what the disk has by now."""
    layer = image.paths[-1 - number]
    run("qemu-img", "convert", "-f", image.variant.layers[-1 - number].format, "-O", "raw", layer, target)
    size = int(json.loads(run("qemu-img", "info", "--output=json", image.top))["virtual-size"])
    with target.open("r+b") as file:
        file.truncate(size)
    return target


@pytest.mark.parametrize(("number", "option"), [(1, "--discard=unmap"), (2, "-r")], ids=["writable", "read-only"])
def test_what_changed_since_a_layer_makes_a_backup_of_it_a_backup_of_the_disk(
    image: Image, tmp_path: Path, number: int, option: str
) -> None:
    target = copy_of(image, number, tmp_path / "backup")
    with serve(option, image.top) as server:
        copied = back_up(server.uri(), number, target)
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", target, server.uri())
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", target, image.top)
    assert 0 < copied < target.stat().st_size


@pytest.mark.parametrize("seed", range(3))
def test_random_chains_are_backed_up_in_increments(tmp_path: Path, seed: int) -> None:
    chance = random.Random(f"increments {seed}")
    print("seed", seed)
    layers = []
    for depth in range(4):
        size = chance.choice((2, 3, 4)) if depth < 3 else 4
        steps = []
        for turn in range(chance.randrange(2, 7)):
            step = chance.choice(("write", "zero", "unmap", "discard")) if turn else "compress"
            start = 64 * chance.randrange(size * 16 - 4)
            steps.append(f"{step} {start}k {64 * chance.randrange(1, 4)}k")
        layers.append(Layer(f"{size}M", tuple(steps)))
    image = build(Variant("random", tuple(layers)), tmp_path / "image")
    number = chance.randrange(1, 4)
    target = copy_of(image, number, tmp_path / "backup")
    with serve("--discard=unmap", image.top) as server:
        back_up(server.uri(), number, target)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", target, image.top)


def test_every_context_is_documented() -> None:
    for name in (*PRIVATE, SINCE + "LAYER"):
        assert f"### `{name}`" in DOCUMENT


# Names, and what becomes of layers while a disk is served.


def selectable(server: Administered, *names: str, export: str = "") -> set[str]:
    """Which of the contexts a client can select."""
    with Client(str(server.server.socket)) as client:
        return set(client.go(export, contexts=tuple("x-nbdq:since:" + name for name in names)).contexts)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk over another."""
    base, path = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "8M")
    run("qemu-io", "-c", "write -P 1 0 4M", base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, path)
    return path


def test_layers_have_numbers_and_names_and_the_top_has_none(disk: Path, tmp_path: Path) -> None:
    with administered(disk) as server:
        assert selectable(
            server, "0", "1", "2", "01", "", "base.qcow2", "disk.qcow2", str(tmp_path / "base.qcow2")
        ) == {
            "x-nbdq:since:1",
            "x-nbdq:since:base.qcow2",
        }
        server("blockdev-snapshot-sync", device="disk", snapshot_file=str(tmp_path / "s1"), snapshot_node_name="monday")
        server("blockdev-snapshot-sync", device="disk", snapshot_file=str(tmp_path / "s2"))
        names = ("1", "2", "3", "monday", "s1", "s2", "disk.qcow2", "base.qcow2")
        assert selectable(server, *names) == {f"x-nbdq:since:{name}" for name in names if name != "s2"}
        server("block-export-add", type="nbd", id="below", node_name="monday", name="below")
        assert selectable(server, *names, export="below") == {
            f"x-nbdq:since:{name}" for name in ("1", "2", "disk.qcow2", "base.qcow2")
        }
        listed = json.loads(run("nbdinfo", "--json", server.uri()))["exports"][0]["contexts"]
        assert [name for name in listed if "since" in name] == [f"x-nbdq:since:{name}" for name in ("monday", "2", "3")]


def changed(client: Client, context: str) -> list[tuple[int, int]]:
    return client.ask(BLOCK_STATUS, 0, client.size).status[client.contexts[context]]


def test_a_selected_layer_stays_the_same_through_snapshots(disk: Path, tmp_path: Path) -> None:
    context = "x-nbdq:since:1"
    with administered(disk) as server, Client(str(server.server.socket)) as client:
        client.go(contexts=(context,))
        qemu_io(server, "write -P 2 1M 64k")
        before = changed(client, context)
        assert before == [(M, 0), (64 * K, 1), (7 * M - 64 * K, 0)]
        server("blockdev-snapshot-sync", device="disk", snapshot_file=str(tmp_path / "s1"))
        assert changed(client, context) == before
        qemu_io(server, "write -z 0 64k")
        assert changed(client, context) == [(64 * K, 1), *[(M - 64 * K, 0)], *before[1:]]
        with Client(str(server.server.socket)) as other:
            other.go(contexts=(context, "x-nbdq:since:base.qcow2"))
            assert changed(other, context) == [(64 * K, 1), (8 * M - 64 * K, 0)]
            assert changed(other, "x-nbdq:since:base.qcow2") == changed(client, context)


@pytest.mark.parametrize("way", ["commit", "stream"])
def test_a_layer_that_is_merged_tells_no_more_and_the_connection_lives(disk: Path, tmp_path: Path, way: str) -> None:
    """What was committed into it would be missing in an increment."""
    context = "x-nbdq:since:2"
    with administered(disk) as server, Client(str(server.server.socket)) as client:
        qemu_io(server, "write -P 2 1M 64k")
        server("blockdev-snapshot-sync", device="disk", snapshot_file=str(tmp_path / "s1"))
        client.go(contexts=(context, "base:allocation"))
        assert changed(client, context)[1] == (64 * K, 1)
        if way == "commit":
            base = str(tmp_path / "base.qcow2")
            server("block-commit", device="disk", job_id="job", top=str(disk), base=base)
        else:
            server("block-stream", device="disk", job_id="job")
        server.wait_for_jobs()
        reply = client.ask(BLOCK_STATUS, 0, client.size)
        assert reply.error == EINVAL
        assert "layer" in reply.message
        assert str(tmp_path) not in reply.message
        assert client.read(M, 1) == b"\2"
        assert bool(selectable(server, "1")) == (way == "commit")


def test_a_raw_disk_lies_where_it_is(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(M) + b"x" * M)
    with serve("-f", "raw", raw) as server, Client(str(server.socket)) as client:
        client.go(extended=True, contexts=("x-nbdq:layer", "x-nbdq:host-offset"))
        status = client.ask(BLOCK_STATUS, M, 64 * K).status
        assert status[client.contexts["x-nbdq:layer"]] == [(64 * K, DATA | 1)]
        assert status[client.contexts["x-nbdq:host-offset"]] == [(64 * K, 1 << 63 | M)]
        found = client.status_of(M, 4096, client.contexts["x-nbdq:host-offset"])
        assert list(found.values()) == [[(4096, 1 << 63 | M)]]

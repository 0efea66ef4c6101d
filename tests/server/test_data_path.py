"""Reads and block status through a live server: right bytes on every path that a reply can take.

The paths: copied into the arena on the loop thread, sent from the file by reference, made in the pool.
"""

import os
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from nbdq.chain.clusters import ClusterCache
from nbdq.chain.disk import ChainDisk
from nbdq.chain.open import open_disk
from nbdq.chain.policy import Policy
from nbdq.server.exports.export import Export
from nbdq.storage import FileStorage
from tests.server.client import BLOCK_STATUS, DF, EIO, READ, REQ_ONE, Client, HealthyClient
from tests.server.conftest import CONTENT
from tests.server.harness import FileDisk, FragmentedDisk, LoopServer, MemoryDisk, ZeroDisk
from tests.support.images import Layer, Variant, build
from tests.support.tools import requires, run

KINDS = pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
STATUS = ("base:allocation",)
MIXED = Variant(
    "mixed",
    (
        Layer("6M", ("write 0 1M", "write 3M 300k", "write 5M 1M"), format="raw"),
        Layer("6M", ("compress 1M 1M", "noise 2M 256k", "zero 3M+64k 64k", "write 5M+4k 4k")),
        Layer("6M+512", ("write 64k 200k", "zero 512k 128k", "write 2M+4k 8k", "compress 4M 512k", "write 6M 512")),
    ),
)


class Image(NamedTuple):
    path: Path
    content: bytes


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Three layers with every kind of cluster, and what QEMU reads of them."""
    directory = tmp_path_factory.mktemp("mixed")
    top = build(MIXED, directory).top
    run("qemu-img", "convert", "-O", "raw", top, directory / "content")
    return Image(top, (directory / "content").read_bytes())


@pytest.fixture
def clusters() -> Iterator[ClusterCache]:
    cache = ClusterCache(budget=64 << 20)
    yield cache
    cache.close()


@pytest.fixture(params=["cached", "uncached"])
def storage_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the page cache, or without anything that can be had without waiting."""
    if request.param == "uncached":
        monkeypatch.setattr(FileStorage, "read_cached", lambda self, offset, view: False)
        monkeypatch.setattr(FileStorage, "is_cached", lambda self, offset, length: False)


@pytest.fixture
def chain(image: Image, clusters: ClusterCache) -> Iterator[ChainDisk]:
    disk = open_disk(str(image.path), format="qcow2", policy=Policy(), clusters=clusters)
    yield disk
    disk.close()


def read_many(client: Client, content: bytes, ranges: list[tuple[int, int]], *, flags: int = 0) -> None:
    """Read all ranges, sixteen at a time, and compare."""
    for first in range(0, len(ranges), 16):
        expected = {}
        said = b""
        for offset, length in ranges[first : first + 16]:
            header = client.pack(READ, offset, length, flags=flags)
            said += header
            expected[int.from_bytes(header[8:16], "big")] = offset, length
        client.socket.sendall(said)
        for cookie, reply in client.replies().items():
            offset, length = expected[cookie]
            assert reply.error == 0
            assert reply.data == content[offset : offset + length], f"READ of {length} bytes at {offset}"


@requires("qemu-img", "qemu-io")
@pytest.mark.usefixtures("storage_path")
@KINDS
def test_reads_of_all_sizes_and_alignments_give_what_qemu_reads(
    loop: str, chain: ChainDisk, image: Image, structured: bool
) -> None:
    seed = 7
    chance = random.Random(seed)
    size = len(image.content)
    lengths = (1, 511, 512, 513, 4095, 4096, 4097, 32767, 32768, 32769, 65536, 65537, 200_000, 1 << 20, 3 << 20)
    ranges = [(0, size), (size - 1, 1), (size - 512, 512)]
    for length in lengths:
        ranges += [(chance.randrange(size - length), length) for _ in range(12)]
        ranges += [(offset, length) for offset in range(0, size - length, 512 << 10)]
    chance.shuffle(ranges)
    with LoopServer(Export.read_only("", chain), loop=loop) as server:
        client = server.connect().go(structured=structured)
        read_many(client, image.content, ranges)
        if structured:
            read_many(client, image.content, ranges[:32], flags=DF)


@requires("qemu-img", "qemu-io")
@pytest.mark.usefixtures("storage_path")
def test_replies_that_leave_in_pieces_are_whole(loop: str, chain: ChainDisk, image: Image) -> None:
    chance = random.Random(8)
    with LoopServer(Export.read_only("", chain), loop=loop, tcp=True) as server:
        client = server.connect().go()
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 200_000)
        lengths = (1, 4096, 5000, 40_000, 70_000, 300_000)
        ranges = [(chance.randrange(len(image.content) - 300_000), chance.choice(lengths)) for _ in range(200)]
        read_many(client, image.content, ranges)


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_many_connections_to_one_export_see_the_same_disk(loop: str, tcp: bool, chain: ChainDisk, image: Image) -> None:
    chain_export = Export.read_only("", chain)
    with LoopServer(chain_export, loop=loop, tcp=tcp) as server:
        clients = [HealthyClient(server.address, image.content, seed=seed) for seed in range(8)]
        with clients[0], clients[1], clients[2], clients[3], clients[4], clients[5], clients[6], clients[7]:
            for client in clients:
                client.wait_for_a_round()
        server.wait_until_idle()
        assert chain_export.connection_count == 0


@requires("qemu-img", "qemu-io")
@pytest.mark.usefixtures("storage_path")
@KINDS
def test_a_corrupt_table_entry_fails_the_requests_that_need_it_and_no_others(
    loop: str, tmp_path: Path, clusters: ClusterCache, structured: bool
) -> None:
    built = build(Variant("corrupt", (Layer("1M", ("write 0 1M",)),)), tmp_path)
    run("qemu-img", "convert", "-O", "raw", built.top, tmp_path / "content")
    content = (tmp_path / "content").read_bytes()
    with built.top.open("r+b") as file:
        file.seek(40)
        (l1_offset,) = struct.unpack(">Q", file.read(8))
        file.seek(l1_offset)
        (l1_entry,) = struct.unpack(">Q", file.read(8))
        file.seek((l1_entry & 0x00FFFFFFFFFFFE00) + 5 * 8)  # the entry of guest cluster 5
        file.write(struct.pack(">Q", 1 << 63 | 0x50200))  # not aligned to a cluster
    disk = open_disk(str(built.top), format="qcow2", policy=Policy(), clusters=clusters)
    with LoopServer(Export.read_only("", disk), loop=loop) as server:
        client = server.connect().go(structured=structured, contexts=STATUS if structured else ())
        bad = 5 << 16
        for offset, length in ((bad, 512), (bad, 65536), (bad - 1, 2), (0, 1 << 20), (bad + 65535, 2)):
            reply = client.ask(READ, offset, length)
            assert reply.error == EIO
            assert str(tmp_path) not in reply.message  # P121
        if structured:
            assert client.error(BLOCK_STATUS, bad + 512, 512) == EIO
            reply = client.ask(BLOCK_STATUS, 0, 1 << 20)
            assert reply.error == EIO or reply.status == {0: [(bad, 0)]}  # as far as it is known
        assert client.read(bad - 65536, 65536) == content[bad - 65536 : bad]
        assert client.read(bad + 65536, 300_000) == content[bad + 65536 :][:300_000]
    disk.close()


@KINDS
def test_a_file_that_becomes_shorter_under_a_reply_costs_that_connection_only(
    loop: str, tmp_path: Path, structured: bool
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(CONTENT)
    disk = FileDisk(path)
    exports = (Export.read_only("", MemoryDisk(CONTENT)), Export.read_only("file", disk))
    with LoopServer(*exports, loop=loop) as server, HealthyClient(server.address, CONTENT) as healthy:
        client = server.connect().go("file", structured=structured)
        assert client.read(100_000, 1 << 20) == CONTENT[100_000:][: 1 << 20]
        os.truncate(path, 1_500_000)
        client.socket.sendall(client.pack(READ, 0, 1 << 20) + client.pack(READ, 1 << 20, 1 << 20))
        assert client.reply().data == CONTENT[: 1 << 20]
        header = client.receive(28 if structured else 16)
        assert client.receive(1_500_000 - (1 << 20)) == CONTENT[1 << 20 : 1_500_000], header
        assert client.is_closed()
        healthy.wait_for_a_round()
    disk.close()


# Block status.


def kinds(offset: int, length: int) -> list[tuple[int, int]]:
    """What a FragmentedDisk is: zeros and data by turns, 512 bytes each."""
    found = []
    end = offset + length
    while offset < end:
        boundary = min((offset // 512 + 1) * 512, end)
        found.append((boundary - offset, 0 if offset // 512 % 2 else 3))
        offset = boundary
    return found


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_block_status_describes_the_requested_range_to_the_byte(loop: str, cached: bool) -> None:
    seed = 9
    chance = random.Random(seed)
    with LoopServer(Export.read_only("", FragmentedDisk(1 << 30, cached=cached)), loop=loop) as server:
        client = server.connect().go(contexts=STATUS)
        for _ in range(100):
            length = chance.choice((1, 511, 512, 513, 4096, 100_000))
            offset = chance.choice((0, (1 << 30) - length, chance.randrange((1 << 30) - length)))
            assert client.ask(BLOCK_STATUS, offset, length).status == {0: kinds(offset, length)}
            one = client.ask(BLOCK_STATUS, offset, length, flags=REQ_ONE).status
            assert one == {0: kinds(offset, length)[:1]}


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_block_status_ends_after_65536_extents(loop: str, cached: bool) -> None:
    with LoopServer(Export.read_only("", FragmentedDisk(1 << 30, cached=cached)), loop=loop) as server:
        client = server.connect().go(contexts=STATUS)
        for length in (65536 * 512 - 1, 65536 * 512, 65536 * 512 + 1, 1 << 28):
            [extents] = client.ask(BLOCK_STATUS, 0, length).status.values()
            assert extents == kinds(0, min(length, 65536 * 512))


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_every_selected_context_gets_a_chunk_of_its_own(loop: str, cached: bool) -> None:
    export = Export.read_only("", FragmentedDisk(1 << 30, cached=cached), allocation_depth=True)
    with LoopServer(export, loop=loop) as server:
        client = server.connect().go(contexts=("base:allocation", "qemu:allocation-depth"))
        allocation, depth = client.contexts["base:allocation"], client.contexts["qemu:allocation-depth"]
        assert allocation != depth
        for flags, count in ((0, 8), (REQ_ONE, 1)):
            status = client.ask(BLOCK_STATUS, 0, 4096, flags=flags).status
            assert status == {allocation: kinds(0, 4096)[:count], depth: [(4096, 1)]}
        only_depth = server.connect().go(contexts=("qemu:allocation-depth",))
        assert only_depth.ask(BLOCK_STATUS, 512, 4096).status == {depth: [(4096, 1)]}


def test_the_longest_possible_range_has_a_status(loop: str) -> None:
    with LoopServer(Export.read_only("", ZeroDisk(1 << 40)), loop=loop) as server:
        client = server.connect().go(contexts=STATUS)
        longest = (1 << 32) - 1
        for offset in (0, 1, (1 << 40) - longest):
            assert client.ask(BLOCK_STATUS, offset, longest).status == {0: [(longest, 0)]}

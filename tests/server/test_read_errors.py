"""A bad place of a disk costs what lies there, and neither what lies around it nor the connection (P113, P121)."""

import errno
import struct
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from nbdq.server.exports.export import Export
from tests.server.client import BLOCK_STATUS, DF, EIO, READ, Client
from tests.server.conftest import CONTENT
from tests.server.harness import LoopServer, MemoryDisk
from tests.support.libnbd import nbdsh
from tests.support.serving import serve
from tests.support.tools import execute, requires, run

K, M = 1 << 10, 1 << 20


class BadDisk(MemoryDisk):
    """A disk with bad places; who reads across one gets an error and perhaps some bytes."""

    def __init__(self, *bad: tuple[int, int]) -> None:
        super().__init__(CONTENT, cached=False)
        self.bad = bad
        self.reads = 0

    def read_into(self, offset: int, view: memoryview) -> None:
        self.reads += 1
        if any(start < offset + len(view) and offset < end for start, end in self.bad):
            view[: len(view) // 2] = b"\xee" * (len(view) // 2)
            raise OSError(errno.EIO, "bad sector", "/secret/path")
        super().read_into(offset, view)


@pytest.fixture(params=[False, True], ids=["structured", "extended"])
def extended(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def good_parts(offset: int, length: int, *bad: tuple[int, int]) -> list[tuple[int, bytes]]:
    """What lies between the bad places."""
    edges = [offset, *(edge for place in bad for edge in place), offset + length]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return [(start, CONTENT[start:end]) for start, end in pairs if start < end]


@pytest.mark.parametrize(
    ("offset", "length", "bad"),
    [
        (0, M, [(512 * K, 516 * K)]),
        (0, M, [(0, 4 * K)]),
        (0, M, [(M - 4 * K, M)]),
        (0, 4 * M, [(8 * K, 12 * K), (12 * K, 64 * K), (2 * M, 2 * M + 4 * K), (3 * M, 3 * M + 8 * K)]),
        (0, 8 * K, [(4 * K, 8 * K)]),
        (4 * K - 1, 2, [(4 * K, 8 * K)]),
        (100, 40_000, [(16 * K, 20 * K)]),
    ],
)
def test_a_read_delivers_what_is_around_bad_places_and_says_where_they_are(
    loop: str, extended: bool, offset: int, length: int, bad: list[tuple[int, int]]
) -> None:
    with LoopServer(Export.read_only("", BadDisk(*bad)), loop=loop) as server:
        client = server.connect().go(extended=extended)
        reply = client.ask(READ, offset, length)
        inside = [(max(start, offset), min(end, offset + length)) for start, end in bad]
        joined = [place for place in inside if place[0] not in {end for _, end in inside}]
        assert reply.error == EIO
        assert reply.parts == good_parts(offset, length, *inside)
        assert [place for place, _ in reply.errors] == [start for start, _ in joined]
        assert all("bad sector" in text and "secret" not in text for _, text in reply.errors)
        assert client.read(offset + length - 1 if bad[0][0] == 0 else offset, 1)


def test_a_place_smaller_than_a_page_costs_its_page(loop: str) -> None:
    with LoopServer(Export.read_only("", BadDisk((5000, 5001))), loop=loop) as server:
        reply = server.connect().go().ask(READ, 0, 64 * K)
        assert reply.parts == good_parts(0, 64 * K, (4096, 8192))
        assert "4096 bytes at 4096" in reply.message


def test_clients_who_want_one_piece_or_nothing_get_one_error(loop: str) -> None:
    """P115, K2."""
    with LoopServer(Export.read_only("", BadDisk((8 * K, 12 * K))), loop=loop) as server:
        for client in (server.connect().go(), server.connect().go(extended=True)):
            reply = client.ask(READ, 0, 64 * K, flags=DF)
            assert (reply.error, reply.parts) == (EIO, [])
            assert client.read(0, 8 * K) == CONTENT[: 8 * K]
        simple = server.connect().go(structured=False)
        assert simple.error(READ, 0, 64 * K) == EIO
        assert simple.read(12 * K, 8 * K) == CONTENT[12 * K : 20 * K]


def test_an_error_that_does_not_come_back_is_none(loop: str, extended: bool) -> None:
    class Moody(BadDisk):
        def read_into(self, offset: int, view: memoryview) -> None:
            super().read_into(offset, view) if not self.reads else MemoryDisk.read_into(self, offset, view)

    with LoopServer(Export.read_only("", Moody((0, 4 * M))), loop=loop) as server:
        assert server.connect().go(extended=extended).read(100, 300 * K) == CONTENT[100 : 100 + 300 * K]


def test_a_dead_disk_is_not_asked_for_every_page(loop: str) -> None:
    disk = BadDisk((0, len(CONTENT)))
    with LoopServer(Export.read_only("", disk), loop=loop) as server:
        reply = server.connect().go().ask(READ, 0, len(CONTENT))
        assert (reply.parts, [place for place, _ in reply.errors]) == ([], [0])
        assert disk.reads < 200


# A real image with an entry in a table that names no cluster.


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Socket of a server, and the data that the disk had before guest cluster 5 was lost."""
    directory = tmp_path_factory.mktemp("damaged")
    image, data = directory / "secret.qcow2", directory / "raw"
    run("qemu-img", "create", "-f", "qcow2", image, "1M")
    run("qemu-io", "-c", "write -P 7 0 1M", image)
    run("qemu-img", "convert", "-O", "raw", image, data)
    with image.open("r+b") as file:
        (l1,) = struct.unpack_from(">Q", file.read(48), 40)
        file.seek(l1)
        table = int.from_bytes(file.read(8), "big") & 0xFFFFFFFFFFFE00
        file.seek(table + 5 * 8)
        file.write(struct.pack(">Q", 1 << 63 | 512 << 10 | 512))
    with serve("-r", image) as server:
        yield server.socket, data


@requires("qemu-img", "qemu-io", "nbdsh")
def test_libnbd_gets_the_rest_of_a_damaged_image(damaged: tuple[Path, Path]) -> None:
    nbdsh(
        dedent("""
            h.connect_unix(socket)
            good, bad = [], []
            def chunk(data, offset, status, error):
                (bad if status == nbd.READ_ERROR else good).append((offset, len(data)))
            error, text = failure(lambda: h.pread_structured(len(data), 0, chunk))
            assert error == "EIO" and "secret" not in text, text
            assert good == [(0, 5 << 16), (6 << 16, 10 << 16)], good
            assert [offset for offset, _ in bad] == [5 << 16], bad
            assert h.pread(65536, 4 << 16) == data[4 << 16 : 5 << 16]
        """),
        socket=damaged[0],
        data=damaged[1],
    )


@requires("qemu-img", "qemu-io")
def test_qemu_reads_around_the_damage_over_one_connection(damaged: tuple[Path, Path]) -> None:
    node = f"driver=nbd,server.type=unix,server.path={damaged[0]}"
    said = execute(
        "qemu-io", "-r", "--image-opts", node, "-c", "read -P 7 0 320k", "-c", "read 0 1M", "-c", "read -P 7 384k 640k"
    ).stdout  # fmt: skip
    assert "read failed: Input/output error" in said
    assert said.count("bytes at offset") == 2
    assert "verification failed" not in said


def test_block_status_over_damage_tells_what_it_knows(damaged: tuple[Path, Path]) -> None:
    """P117: first the part before it, and for the damage itself an error."""
    with Client(str(damaged[0])) as client:
        client.go(contexts=("base:allocation",))
        assert client.ask(BLOCK_STATUS, 0, M).status == {0: [(5 * 64 * K, 0)]}
        reply = client.ask(BLOCK_STATUS, 5 * 64 * K, M - 5 * 64 * K)
        assert reply.error == EIO
        assert "secret" not in reply.message
        assert client.ask(BLOCK_STATUS, 6 * 64 * K, M - 6 * 64 * K).status == {0: [(10 * 64 * K, 0)]}

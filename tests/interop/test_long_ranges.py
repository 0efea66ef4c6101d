"""Whole disks of a petabyte in one request each (P124), over images that QEMU made and checks."""

from pathlib import Path

import pytest

from tests.server.client import BLOCK_STATUS, CACHE, FAST_ZERO, FLUSH, FUA, NO_HOLE, TRIM, WRITE, WRITE_ZEROES, Client
from tests.support.serving import serve
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io")

M, TIB = 1 << 20, 1 << 40
SIZE = 1024 * TIB
PLACES = (0, 500 * TIB, SIZE - 4 * M)


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """An empty layer of small clusters over a disk with three islands of data."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", base, str(SIZE))
    run("qemu-io", *(word for place in PLACES for word in ("-c", f"write -P 7 {place} 4M")), base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, top)
    return top


@pytest.mark.parametrize(
    ("command", "flags"),
    [(WRITE_ZEROES, 0), (WRITE_ZEROES, FAST_ZERO), (WRITE_ZEROES, NO_HOLE | FUA), (TRIM, FUA), (TRIM, 0)],
)
def test_one_request_hides_everything_below(top: Path, command: int, flags: int) -> None:
    with serve(top) as server, Client(str(server.socket)) as client:
        client.go(extended=True, contexts=("base:allocation", "x-nbdq:since:1"))
        assert client.size == SIZE
        assert client.error(WRITE, 900 * TIB, M, payload=b"9" * M) == 0
        assert client.error(command, 0, SIZE, flags=flags) == 0
        for place in (*PLACES, 900 * TIB):
            assert client.read(place, M) == bytes(M)
            assert client.ask(BLOCK_STATUS, place, 4 * M).status[0] in (
                [(4 * M, 3)],
                [(4 * M, 2)],
                [(M, 2), (3 * M, 3)],
            )
        assert client.error(CACHE, 0, SIZE) == 0
        assert client.error(FLUSH) == 0
    run("qemu-img", "check", top)
    run("qemu-io", "-r", *(word for place in PLACES for word in ("-c", f"read -P 0 {place} 4M")), top)


def test_everything_but_the_edges_is_hidden(top: Path) -> None:
    with serve(top) as server, Client(str(server.socket)) as client:
        client.go(extended=True)
        assert client.error(WRITE_ZEROES, 1000, SIZE - 2000) == 0
        assert client.read(0, 4096) == b"\7" * 1000 + bytes(3096)
        assert client.read(SIZE - 4096, 4096) == bytes(3096) + b"\7" * 1000
        assert client.read(500 * TIB, M) == bytes(M)
    run("qemu-img", "check", top)


def test_the_status_of_a_petabyte_is_found_in_few_answers(top: Path) -> None:
    """Each covers what can be looked at in a moment; base alone, which is empty but for islands, all of it."""
    with serve("-r", top) as server, Client(str(server.socket)) as client:
        client.go(extended=True, contexts=("base:allocation",))
        found: list[tuple[int, int]] = []
        answers = position = 0
        while position < SIZE:
            answers += 1
            for length, flags in client.ask(BLOCK_STATUS, position, SIZE - position).status[0]:
                if found and found[-1][1] == flags:
                    length += found.pop()[0]
                found.append((length, flags))
            position = sum(length for length, _ in found)
        assert [flags for _, flags in found] == [0, 3, 0, 3, 0]
        assert [length for length, flags in found if not flags] == [4 * M] * 3
        assert answers < 200

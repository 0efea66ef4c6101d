"""The tests' own client, written from the protocol, against QEMU's server and ours: what it demands is no whim of ours.

QEMU 7.2 speaks no extended headers; there the client is told so, and goes on without, as it would anywhere (P40).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.server.client import (
    BLOCK_STATUS,
    DF,
    DISC,
    EINVAL,
    ERR_INVALID,
    ERR_UNSUP,
    EXTENDED_HEADERS,
    FLUSH,
    FUA,
    GO,
    LIST_META_CONTEXT,
    META_CONTEXT,
    READ,
    REQ_ONE,
    SET_META_CONTEXT,
    STRUCTURED_REPLY,
    Client,
    meta_context,
    option,
    text,
)
from tests.support.images import Layer, Variant, build
from tests.support.serving import qemu_nbd, serve
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io", "qemu-nbd")

K, M = 1 << 10, 1 << 20
DISK = Variant(
    "disk",
    (
        Layer("4M", ("write 0 1M", "compress 2M 256k", "write 3M 64k")),
        Layer("4M", ("write 64k 64k", "zero 512k 64k", "write 4M-512 512")),
    ),
)
BITMAPS = ("fine", "coarse", "empty")
CONTEXTS = ("base:allocation", "qemu:allocation-depth", *(f"qemu:dirty-bitmap:{name}" for name in BITMAPS))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A top image with three dirty bitmaps, and what the disk holds."""
    directory = tmp_path_factory.mktemp("disk")
    top = build(DISK, directory).top
    run("qemu-img", "bitmap", "--add", "-g", "4096", top, "fine")
    run("qemu-img", "bitmap", "--add", "-g", "65536", top, "coarse")
    run("qemu-io", "-c", "write -P 9 1M 4k", "-c", "write -P 9 1200k 70k", top)
    run("qemu-img", "bitmap", "--add", top, "empty")
    run("qemu-img", "convert", "-O", "raw", top, directory / "raw")
    return top, (directory / "raw").read_bytes()


@contextmanager
def server_of(kind: str, top: Path) -> Iterator[str]:
    """The socket of that server; the export has no name."""
    bitmaps = [f"--bitmap={name}" for name in BITMAPS]
    if kind == "nbdq":
        with serve("-r", "-A", *bitmaps, top) as server:
            yield str(server.socket)
    else:
        with qemu_nbd("-A", *bitmaps, "-e", "4", "-f", "qcow2", top) as socket:
            yield str(socket)


@pytest.fixture(scope="module", params=["nbdq", "qemu"])
def server(request: pytest.FixtureRequest, image: tuple[Path, bytes]) -> Iterator[str]:
    with server_of(request.param, image[0]) as socket:
        yield socket


def begin(socket: str) -> Client:
    client = Client(socket)
    client.hello()
    client.socket.sendall(b"\0\0\0\3")
    return client


def ask(client: Client, said: bytes) -> list[tuple[int, bytes]]:
    """Type and data of all replies to one option."""
    client.socket.sendall(said)
    replies = []
    while True:
        _, kind, data = client.option_reply()
        replies.append((kind, data))
        if kind == 1 or kind >= 1 << 31:
            return replies


def names(replies: list[tuple[int, bytes]]) -> list[str]:
    return [data[4:].decode() for kind, data in replies if kind == META_CONTEXT and "x-" not in data[4:].decode()]


def test_extended_headers_are_agreed_or_not_and_the_disk_is_read(server: str, image: tuple[Path, bytes]) -> None:
    """P40: as QEMU from 8.2 on and libnbd from 1.18 on ask."""
    with begin(server) as client:
        ((kind, _),) = ask(client, option(EXTENDED_HEADERS))
        assert kind in (1, ERR_UNSUP)
        client.extended = kind == 1
        if not client.extended:
            assert ask(client, option(STRUCTURED_REPLY)) == [(1, b"")]
        client.structured = True
        assert names(ask(client, meta_context(SET_META_CONTEXT, "", *CONTEXTS[:1]))) == ["base:allocation"]
        replies = ask(client, option(GO, text("") + b"\0\0"))
        assert replies[-1] == (1, b"")
        data = image[1]
        for offset in range(0, len(data), 512 * K):
            assert client.read(offset, 512 * K) == data[offset : offset + 512 * K]
        client.send(DISC)
        assert client.is_closed()


def test_contexts_are_listed_and_selected_by_the_same_rules(server: str) -> None:
    """P41-P48."""
    with begin(server) as client:
        assert ask(client, meta_context(SET_META_CONTEXT, "", "base:allocation"))[-1][0] == ERR_INVALID  # P42
        ask(client, option(STRUCTURED_REPLY))
        for queries, listed, selected in [
            ((), CONTEXTS, ()),
            (("base:",), CONTEXTS[:1], ()),
            (("qemu:",), CONTEXTS[1:], ()),
            (("qemu:dirty-bitmap:",), CONTEXTS[2:], ()),
            (
                ("qemu:dirty-bitmap:coarse", "base:allocation"),
                CONTEXTS[0:1] + CONTEXTS[3:4],
                CONTEXTS[0:1] + CONTEXTS[3:4],
            ),
            (("base:allocation",) * 3, CONTEXTS[:1], CONTEXTS[:1]),
            (("base:nothing", "qemu:nothing", "qemu:dirty-bitmap:no", "x-unknown:"), (), ()),
            (CONTEXTS, CONTEXTS, CONTEXTS),
        ]:
            assert sorted(names(ask(client, meta_context(LIST_META_CONTEXT, "", *queries)))) == sorted(listed), queries
            replies = ask(client, meta_context(SET_META_CONTEXT, "", *queries))
            assert sorted(names(replies)) == sorted(selected), queries
            ids = [data[:4] for kind, data in replies if kind == META_CONTEXT]
            assert len(ids) == len(set(ids))
        assert ask(client, meta_context(SET_META_CONTEXT, "no such export", "base:allocation"))[-1][0] >= 1 << 31
        assert ask(client, option(GO, text("") + b"\0\0"))[-1] == (1, b"")
        client.size = 4 * M
        client.structured = True
        assert client.error(BLOCK_STATUS, 0, 4096) == EINVAL  # the last selection failed, and was one all the same


#: Requests and the error of their answers, where the protocol leaves no choice or QEMU and nbdq make the same.
REQUESTS = [
    (READ, 0, 0, 4 * M, 0),
    (READ, DF, 0, M, 0),
    (READ, FUA, 4 * M - 1, 1, 0),
    (READ, 0, 0, 0, 0),
    (READ, 0, 4 * M, 1, EINVAL),
    (READ, 0, 1 << 63, 512, EINVAL),
    (READ, REQ_ONE, 0, 512, EINVAL),
    (READ, 1 << 5, 0, 512, EINVAL),
    (READ, 1 << 14, 0, 512, EINVAL),
    (FLUSH, 0, 0, 0, 0),
    (BLOCK_STATUS, 0, 0, 0, EINVAL),
    (BLOCK_STATUS, 0, 4 * M, 512, EINVAL),
    (BLOCK_STATUS, DF, 0, 512, EINVAL),
    (8, 0, 0, 0, EINVAL),
    (77, 0, 0, 512, EINVAL),
]


def test_requests_are_answered_with_the_same_errors(server: str, image: tuple[Path, bytes]) -> None:
    """P82-P87, R-73."""
    with Client(server) as client:
        client.go(contexts=("base:allocation",))
        for command, flags, offset, length, error in REQUESTS:
            reply = client.ask(command, offset, length, flags=flags)
            assert reply.error == error, (command, flags, offset, length)
            assert bool(reply.message) == bool(error)
            assert command != READ or error or reply.data == image[1][offset : offset + length]


def test_clients_who_cannot_take_chunks_get_none(server: str, image: tuple[Path, bytes]) -> None:
    """P102, K1: this client fails of a chunk."""
    with Client(server) as client:
        client.go(structured=False)
        assert client.read(0, 4 * M) == image[1]
        assert client.error(BLOCK_STATUS, 0, 4096) == EINVAL
        assert client.error(READ, 0, 4096, flags=DF) == EINVAL


def test_both_servers_say_the_same_of_every_range_in_every_context(image: tuple[Path, bytes]) -> None:
    """P117, P118, P6, P7, P48: several bitmaps at once."""
    with server_of("nbdq", image[0]) as ours, server_of("qemu", image[0]) as theirs:
        found = []
        for socket in (ours, theirs):
            with Client(socket) as client:
                client.go(contexts=CONTEXTS)
                found.append({name: per_page(client, name) for name in CONTEXTS})
    assert found[0] == found[1]
    assert sum(found[0]["qemu:dirty-bitmap:fine"]) == 1 + 18
    assert sum(found[0]["qemu:dirty-bitmap:coarse"]) == 16 * 3
    assert not any(found[0]["qemu:dirty-bitmap:empty"])


def per_page(client: Client, name: str) -> list[int]:
    """The flags of every 512 bytes, which do not depend on how a server cuts its answers."""
    flags: list[int] = []
    while len(flags) * 512 < client.size:
        position = len(flags) * 512
        extents = client.ask(BLOCK_STATUS, position, client.size - position).status[client.contexts[name]]
        for length, value in extents:
            flags += [value] * (length // 512)
    return flags[::8] if name.startswith("qemu:dirty") else flags

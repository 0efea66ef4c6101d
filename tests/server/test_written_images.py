"""Images written through a live server by several clients at once, judged by QEMU and by a model in memory."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdq.chain.clusters import ClusterCache
from nbdq.chain.open import open_writable
from nbdq.chain.policy import Policy
from nbdq.server.exports.export import Export
from nbdq.server.exports.writing import DetectZeroes
from tests.server.client import FAST_ZERO, FLUSH, FUA, NO_HOLE, READ, TRIM, WRITE, WRITE_ZEROES, Client
from tests.server.harness import LoopServer
from tests.support.serving import serve
from tests.support.tools import requires, run

SIZE = 24 << 20
ENOTSUP = 95


@pytest.fixture
def clusters() -> Iterator[ClusterCache]:
    cache = ClusterCache(budget=8 << 20)
    yield cache
    cache.close()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Overlays over a base of noise and holes, and a raw file, with the base's content as ``content``."""
    base = tmp_path / "content"
    with base.open("wb") as file:
        file.truncate(SIZE)
        for start in range(0, SIZE, 5 << 20):
            file.seek(start)
            file.write(random.Random(start).randbytes(3 << 20))
    run("qemu-img", "convert", "-c", "-O", "qcow2", base, tmp_path / "base.qcow2")
    for name, options in (("plain", "cluster_size=64k"), ("extended", "extended_l2=on"), ("small", "cluster_size=512")):
        where = ("-F", "qcow2", "-b", tmp_path / "base.qcow2")
        run("qemu-img", "create", "-q", "-f", "qcow2", *where, "-o", options, tmp_path / name)
    (tmp_path / "raw").write_bytes(base.read_bytes())
    return tmp_path


class Writer:
    """One client and the part of the disk that it alone changes."""

    def __init__(self, client: Client, start: int, end: int, model: bytearray, seed: str) -> None:
        self.client, self.start, self.end, self.model = client, start, end, model
        self.chance = random.Random(seed)

    def send_a_round(self) -> None:
        """Sixteen requests, each in a sixteenth of its own of the range, for the order is the server's (P89)."""
        said, self.expected = b"", {}
        area = (self.end - self.start) // 16
        for base in range(self.start, self.end - area + 1, area):
            length = self.chance.choice((1, 512, 4096, 4096, 5000, 65_536, area // 2))
            offset = base + self.chance.randrange(area - length)
            if self.chance.random() < 0.5:
                offset = offset // 4096 * 4096 if offset // 4096 * 4096 >= base else offset
            command = self.chance.choice((WRITE, WRITE, WRITE, WRITE_ZEROES, TRIM, READ, FLUSH))
            flags = self.chance.choice((0, 0, 0, FUA))
            if command == WRITE_ZEROES:
                flags |= self.chance.choice((0, NO_HOLE, FAST_ZERO))
            payload = b""
            if command == WRITE:
                payload = self.chance.choice((bytes(length), self.chance.randbytes(length)))
            header = self.client.pack(command, offset, length, flags=flags)
            said += header + payload
            self.expected[int.from_bytes(header[8:16], "big")] = (command, offset, length, payload)
        self.client.send_beside(said)

    def judge_the_round(self) -> None:
        for cookie, reply in self.client.replies().items():
            command, offset, length, payload = self.expected[cookie]
            assert reply.error in ((0, ENOTSUP) if command == WRITE_ZEROES else (0,)), reply.message
            if command == READ:
                assert reply.data == self.model[offset : offset + length]
            elif command == TRIM:  # whole units of it, or nothing, may be gone
                self.model[offset : offset + length] = self.client.read(offset, length)
            elif command != FLUSH and not reply.error:
                self.model[offset : offset + length] = payload or bytes(length)


@requires("qemu-img")
@pytest.mark.parametrize("name", ["plain", "extended", "small", "raw"])
@pytest.mark.parametrize("detect", [DetectZeroes.OFF, DetectZeroes.UNMAP])
def test_what_several_clients_write_at_once_is_what_qemu_reads(
    images: Path, clusters: ClusterCache, name: str, detect: DetectZeroes
) -> None:
    seed = f"{name} {detect}"
    model = bytearray((images / "content").read_bytes())
    form = "raw" if name == "raw" else "qcow2"
    disk = open_writable(str(images / name), format=form, policy=Policy(), clusters=clusters)
    with LoopServer(Export.writable("", disk, detect_zeroes=detect)) as server:
        third = SIZE // 3
        writers = [
            Writer(server.connect().go(structured=bool(n)), n * third, (n + 1) * third, model, f"{seed} {n}")
            for n in range(3)
        ]
        for _ in range(25):
            for writer in writers:
                writer.send_a_round()
            for writer in writers:
                writer.judge_the_round()
        assert writers[0].client.error(FLUSH) == 0
    disk.close()
    (images / "expected").write_bytes(model)
    run("qemu-img", "compare", "-f", form, "-F", "raw", images / name, images / "expected")
    if form == "qcow2":
        assert "No errors" in run("qemu-img", "check", images / name)


@requires("nbdcopy", "qemu-img")
def test_a_disk_that_nbdcopy_and_qemu_img_write_is_the_one_they_were_given(images: Path) -> None:
    for name, words in (
        ("plain", ("nbdcopy", "--flush", images / "content")),
        ("extended", ("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", images / "content")),
    ):
        run("qemu-img", "create", "-q", "-f", "qcow2", images / name, str(SIZE))
        with serve(images / name) as server:
            run(*words, server.uri())
        run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", images / name, images / "content")
        assert "No errors" in run("qemu-img", "check", images / name)

"""A written image over a disk that does not change: every way to ask gives the same answer, at every moment."""

import contextlib
import json
import random
import threading
from pathlib import Path

import pytest

from nbdq.block import BlockDevice, FilePiece, Kind, Piece
from nbdq.chain.disk import ChainDisk
from nbdq.qcow2.format import read_header
from nbdq.qcow2.image import Qcow2Image
from nbdq.storage import FileStorage
from tests.support.engine import Engine, K, M, check, make_image, make_raw
from tests.support.images import content
from tests.support.tools import requires, run

ZERO = {
    Kind.UNALLOCATED,
    Kind.UNALLOCATED_OFFSET,
    Kind.ZERO,
    Kind.ZERO_OFFSET,
    Kind.HOLE,
    Kind.DATA_HOLE,
}


def joined(pieces: list[Piece]) -> bytes:
    """The bytes that a client would get."""
    return b"".join(
        piece.storage.read(piece.offset, piece.length).ljust(piece.length, b"\0")
        if isinstance(piece, FilePiece)
        else bytes(piece)
        for piece in pieces
    )


def sectors(disk: BlockDevice) -> list[tuple[Kind, int]]:
    """Kind and depth of the first byte of every sector; the file, and so a hole, may end anywhere.

    Nothing is nothing: a client does not learn of space that waits for it.
    """
    return [
        (Kind.UNALLOCATED if kind == Kind.UNALLOCATED_OFFSET else kind, depth)
        for start, end, kind, depth in status(disk, 0, disk.size)
        for _ in range(-(-start // 512) * 512, end, 512)
    ]


def sectors_of_the_file(engine: Engine) -> list[tuple[Kind, int]]:
    """The same as who only reads the chain tells it."""
    storage = FileStorage.open(str(engine.path))
    data = FileStorage.open(engine.data.path) if engine.data is not engine.storage else None
    with contextlib.closing(Qcow2Image(storage, read_header(storage), data=data)) as top:
        layers = [top, *(engine.below.layers if engine.below else [])]
        return sectors(ChainDisk(layers, clusters=engine.clusters))


def status(disk: BlockDevice, offset: int, length: int) -> list[tuple[int, int, Kind, int]]:
    """(start, end, kind, depth) of the range, which is covered exactly, in order."""
    found: list[tuple[int, int, Kind, int]] = []
    position = offset
    for chunk in disk.status(offset, length):
        starts = chunk.start.tolist()
        assert starts[0] == position
        ends = [*starts[1:], chunk.end]
        for start, end, kind, depth in zip(starts, ends, chunk.kind.tolist(), chunk.depth.tolist(), strict=True):
            assert start < end
            found.append((start, end, Kind(kind), depth))
        position = chunk.end
    assert position == offset + length
    return found


def cluster_size(kind: str) -> int:
    return 16 * K if kind == "extended" else 4 * K


def make(directory: Path, kind: str, *, seed: int = 0) -> Engine:
    """A disk of 40 clusters and a bit; below it, where there is anything, data, holes, and an earlier end."""
    cluster = cluster_size(kind)
    size = 40 * cluster + 1536
    below = data = None
    options: dict[str, object] = {"cluster_size": cluster, "extended_l2": kind == "extended"}
    if kind == "data file":
        options["data_file_name"] = "data.raw"
        data = make_raw(directory / "data.raw", size)
    elif kind == "over qcow2":
        below = make_image(directory / "base.qcow2", 50 * cluster, cluster_size=64 * K)
        with Engine(below) as base:
            base.write(3000, 70 * K, seed=70)
            base.disk.zero(100 * K, 20 * K, unmap=True)
        run("qemu-io", "-f", "qcow2", "-c", "write -q -c -P 7 128k 64k", below)
    elif kind != "alone":
        below = make_raw(directory / "base.raw", 31 * cluster + 512, (0, 8 * cluster), (20 * cluster, 11 * cluster))
    return Engine(make_image(directory / "top.qcow2", size, **options), below=below, data=data)


KINDS = ["alone", "over raw", "over qcow2", "extended", "data file"]


@requires("qemu-io")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_all_ways_to_read_agree_in_every_state(kind: str, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    with make(tmp_path, kind) as engine:
        disk, size = engine.disk, engine.disk.size
        cluster = engine.cluster_size
        cached = 0
        for turn in range(60):
            offset = chance.randrange(size)
            length = min(size - offset, chance.choice((512, cluster, chance.randrange(1, 6 * cluster))))
            match chance.randrange(5):
                case 0:
                    disk.zero(offset, length, unmap=turn % 2 == 0)
                case 1:
                    disk.discard(offset, length)
                case 2:
                    disk.flush()
                case _:
                    engine.write(offset, length, seed=turn)
            whole = engine.contents()
            for _ in range(6):
                offset = chance.randrange(size)
                length = min(size - offset, chance.choice((1, 512, chance.randrange(1, 8 * cluster))))
                expected = whole[offset : offset + length]
                what = f"seed {seed}, turn {turn}, {length} bytes at {offset}"
                assert engine.read(offset, length) == expected, what
                assert joined(disk.gather(offset, length)) == expected, what
                view = memoryview(bytearray(b"\xee") * length)
                if disk.read_cached(offset, view):
                    assert view == expected, what
                    cached += 1
                pieces = disk.gather_cached(offset, length)
                if pieces is not None:
                    assert joined(pieces) == expected, what
                    files = {piece.storage for piece in pieces if isinstance(piece, FilePiece)}
                    assert not files & {engine.storage, engine.data}, "the top's clusters may change while they leave"
                for start, end, state, depth in status(engine.disk, offset, length):
                    assert state != Kind.CORRUPT
                    assert not (state in ZERO and any(whole[start:end])), f"{what}: {state.name} at {start}"
                    assert depth <= disk.layer_count
            if turn % 10 == 0:
                disk.flush()
                assert sectors(disk) == sectors_of_the_file(engine), f"seed {seed}, turn {turn}"
        assert cached > 100, "hardly anything was read without waiting"
    if kind != "data file":
        check(engine.path)


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("kind", ["alone", "over raw", "over qcow2", "extended"])
def test_status_says_what_qemu_says(kind: str, tmp_path: Path) -> None:
    """P1-P6: zero and data of every sector, and the layer that data comes from."""
    with make(tmp_path, kind) as engine:
        cluster = engine.cluster_size
        for cluster_number in (1, 2, 9, 25, 26, 35, 40):
            engine.write(cluster_number * cluster + 512, 512)
        engine.disk.zero(4 * cluster, 2 * cluster, unmap=True)
        engine.disk.zero(25 * cluster, cluster, unmap=False)
        engine.disk.discard(21 * cluster, 2 * cluster)
        if kind == "extended":
            engine.disk.zero(9 * cluster + 2048, 4096, unmap=True)
        engine.disk.flush()
        own = status(engine.disk, 0, engine.disk.size)
        below = engine.below.layers[0].path if engine.below else None
    if below:
        run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", below, "-F", Path(below).suffix[1:], engine.path)
    extents = json.loads(run("qemu-img", "map", "-f", "qcow2", "--output=json", engine.path))

    def at(offset: int) -> tuple[bool, bool, int]:
        extent = next(extent for extent in extents if offset < extent["start"] + extent["length"])
        return extent["zero"], extent["data"], extent["depth"] + 1 if extent["data"] else 0

    for start, end, state, depth in own:
        data = state in (Kind.DATA, Kind.DATA_HOLE, Kind.COMPRESSED)
        for offset in range(start, end, 512):
            assert (state in ZERO, data, depth if data else 0) == at(offset), (
                f"{state.name} at {offset}, {start}..{end}: {at(offset)}"
            )


def test_what_is_behind_the_end_of_the_base_is_zero_and_not_the_bases(tmp_path: Path) -> None:
    """S1, S4."""
    below = make_raw(tmp_path / "base.raw", 6 * K + 512, (0, 6 * K + 512))
    with Engine(make_image(tmp_path / "top.qcow2", 1 * M, cluster_size=4096), below=below) as engine:
        expected = content(77 << 20, 0, 6 * K + 512).ljust(1 * M, b"\0")
        assert engine.contents() == expected
        view = memoryview(bytearray(b"\xee") * 8192)
        assert engine.disk.read_cached(0, view)
        assert view == expected[:8192]
        pieces = engine.disk.gather_cached(0, 64 * K)
        assert pieces is not None
        assert joined(pieces) == expected[: 64 * K]
        assert status(engine.disk, 0, 1 * M) == [(0, 6656, Kind.DATA, 2), (6656, 1 * M, Kind.UNALLOCATED, 2)]


def test_a_read_of_a_table_that_is_not_in_memory_is_left_to_who_may_wait(tmp_path: Path) -> None:
    path = make_image(tmp_path / "top.qcow2", 1 * M)
    with Engine(path) as engine:
        data = engine.write(0, 512)
    with Engine(path) as engine:
        view = memoryview(bytearray(512))
        assert not engine.disk.read_cached(0, view)
        assert engine.disk.gather_cached(0, 512) is None
        assert not engine.write_cached(0, 512)
        assert engine.read(0, 512) == data
        assert engine.disk.read_cached(0, view)
        assert view == data
        assert not engine.write_cached(0, 512), "nobody has checked yet whether the cluster is ours"
        engine.write(0, 512)
        assert engine.write_cached(0, 512)


def test_a_read_without_waiting_pins_what_it_finds(tmp_path: Path) -> None:
    """R-50: else its cluster could get somebody else's data before it is read."""
    with Engine(make_image(tmp_path / "top.qcow2", 1 * M, cluster_size=4096)) as engine:
        engine.write(0, 64 * K)
        engine.settle()
        host = engine.host(0)
        real = engine.data.read_cached
        counts: list[int] = []

        def slow(offset: int, view: memoryview) -> bool:
            other = threading.Thread(target=lambda: (engine.disk.discard(0, 4096), engine.disk.flush()))
            other.start()
            other.join()
            counts.append(engine.refcount(host))
            return real(offset, view)

        engine.data.read_cached = slow  # type: ignore[method-assign]
        assert engine.disk.read_cached(0, memoryview(bytearray(512)))
        engine.data.read_cached = real  # type: ignore[method-assign]
        assert counts == [1]
        engine.disk.flush()
        assert engine.refcount(host) == 0
    check(engine.path)


def test_readers_and_writers_of_many_threads_see_whole_sectors_old_or_new(tmp_path: Path) -> None:
    """Clusters move, are freed and used again under the readers, who must never see another one's data."""
    cluster = 4 * K
    below = make_raw(tmp_path / "base.raw", 64 * cluster, (0, 64 * cluster))
    with Engine(make_image(tmp_path / "top.qcow2", 64 * cluster, cluster_size=cluster), below=below) as engine:
        ended = threading.Event()
        wrong: list[str] = []

        def read(seed: int) -> None:
            chance = random.Random(seed)
            while not ended.is_set():
                sector = chance.randrange(64 * 8) * 512
                view = memoryview(bytearray(512))
                if seed or not engine.disk.read_cached(sector, view):  # one thread does not wait
                    engine.disk.read_into(sector, view)
                possible = [bytes(512)] + [content(number << 20, sector, 512) for number in (77, 1, 2, 3)]
                if view not in possible:
                    wrong.append(f"sector at {sector}: {bytes(view[:16]).hex()}")

        readers = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
        for reader in readers:
            reader.start()
        chance = random.Random(4)
        for turn in range(250):
            offset = chance.randrange(63) * cluster + chance.choice((0, 512))
            match turn % 5:
                case 0 | 1:
                    engine.write(offset, chance.randrange(1, 4) * 512, seed=1 + turn % 3)
                case 2:
                    engine.write(offset - offset % cluster, cluster, seed=1 + turn % 3)
                case 3:
                    engine.disk.discard(offset - offset % cluster, cluster)
                case _:
                    engine.disk.flush()
        ended.set()
        for reader in readers:
            reader.join()
        assert wrong == []
    check(engine.path)


def test_a_corrupt_entry_costs_its_cluster_and_no_other(tmp_path: Path) -> None:
    """1.14."""
    path = make_image(tmp_path / "top.qcow2", 1 * M, cluster_size=4096)
    with Engine(path) as engine:
        data = engine.write(0, 16 * K)
        table = engine.image.mapping.tables[0].offset
        host = engine.host(1)
    with path.open("r+b") as file:
        file.seek(table + 8)
        file.write((host + 512 | 1 << 63).to_bytes(8, "big"))
    with Engine(path) as engine:
        assert engine.read(0, 4096) == data[:4096]
        assert engine.read(8192, 4096) == data[8192:12288]
        with pytest.raises(OSError, match="corrupt table entry for guest offset 4096"):
            engine.read(4096, 512)
        assert not engine.disk.read_cached(4096, memoryview(bytearray(512)))
        assert engine.disk.gather_cached(4096, 512) is None
        with pytest.raises(OSError, match="corrupt"):
            status(engine.disk, 0, 16 * K)


def test_the_depth_counts_every_layer(tmp_path: Path) -> None:
    """P7: what nbdq serves as qemu:allocation-depth."""
    below = make_raw(tmp_path / "base.raw", 1 * M, (0, 64 * K))
    with Engine(make_image(tmp_path / "top.qcow2", 1 * M), below=below) as engine:
        engine.write(128 * K, 64 * K)
        assert engine.disk.layer_count == 2
        assert isinstance(engine.disk.below, ChainDisk)
        found = status(engine.disk, 0, 1 * M)
        assert [(start, depth) for start, _, _, depth in found][:4] == [(0, 2), (64 * K, 2), (128 * K, 1), (192 * K, 2)]


def test_closing_saves_everything_and_closes_every_file(tmp_path: Path) -> None:
    below = make_raw(tmp_path / "base.raw", 1 * M, (0, 1 * M))
    engine = Engine(make_image(tmp_path / "top.qcow2", 1 * M), below=below)
    engine.write(0, 64 * K)
    assert engine.below is not None
    lower = engine.below.layers[0]
    engine.disk.close()
    engine.clusters.close()
    assert engine.take()[-1].name == "sync"
    assert engine.storage.descriptor == -1
    assert getattr(lower, "data").descriptor == -1  # noqa: B009
    check(engine.path)

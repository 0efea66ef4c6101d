"""A window shows a part of a disk: the same bytes, the same status, and nothing of what lies around it."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdq.block import FilePiece, Piece
from nbdq.chain.raw_disk import RawDisk
from nbdq.chain.window import Window, WritableWindow
from nbdq.errors import ExportError
from nbdq.storage import FileStorage

SIZE, START, LENGTH = 1 << 20, 8192 + 512, 300 << 10


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[RawDisk]:
    """Data and holes of 64 KiB by turns."""
    path = tmp_path / "disk"
    with path.open("wb") as file:
        for number in range(0, SIZE, 128 << 10):
            file.seek(number)
            file.write(random.Random(number).randbytes(64 << 10))
        file.truncate(SIZE)
    device = RawDisk(FileStorage.open(str(path), writable=True))
    yield device
    device.close()


def bytes_of(disk: RawDisk) -> bytes:
    view = memoryview(bytearray(disk.size))
    disk.read_into(0, view)
    return bytes(view)


def joined(pieces: list[Piece]) -> bytes:
    return b"".join(
        piece.storage.read(piece.offset, piece.length) if isinstance(piece, FilePiece) else bytes(piece)
        for piece in pieces
    )


def test_every_way_to_read_shows_the_same_part(disk: RawDisk) -> None:
    window, expected = Window(disk, START, LENGTH), bytes_of(disk)[START : START + LENGTH]
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(100):
        offset = chance.randrange(LENGTH)
        view = memoryview(bytearray(chance.randint(1, LENGTH - offset)))
        wanted = expected[offset : offset + len(view)]
        window.read_into(offset, view)
        assert view == wanted
        assert joined(window.gather(offset, len(view))) == wanted
        cached = window.gather_cached(offset, len(view))
        assert cached is None or joined(cached) == wanted
        assert not window.read_cached(offset, view) or view == wanted


def test_the_status_is_that_of_the_part(disk: RawDisk) -> None:
    offset, length = 512, LENGTH - 1024
    position = offset
    for ours, theirs in zip(
        Window(disk, START, LENGTH).status(offset, length), disk.status(START + offset, length), strict=True
    ):
        assert ours.start[0] == position
        assert (ours.start + START).tolist() == theirs.start.tolist()
        assert (ours.kind == theirs.kind).all()
        position = ours.end
    assert position == offset + length


def test_changes_stay_within_the_part(disk: RawDisk) -> None:
    before = bytes_of(disk)
    window = WritableWindow(disk, START, LENGTH)
    window.write(0, memoryview(b"a" * 512))
    window.write(LENGTH - 512, memoryview(b"b" * 512))
    window.zero(1024, 512, unmap=True)
    window.discard(8192, 4096)
    window.flush()
    after = bytes_of(disk)
    part = bytearray(before[START : START + LENGTH])
    part[:512], part[-512:] = b"a" * 512, b"b" * 512
    part[1024:1536], part[8192:12288] = bytes(512), bytes(4096)
    assert after == before[:START] + part + before[START + LENGTH :]


@pytest.mark.parametrize(("offset", "size"), [(SIZE + 512, None), (512, SIZE), (1, None), (0, 1000)])
def test_a_part_that_does_not_fit_is_refused(disk: RawDisk, offset: int, size: int | None) -> None:
    with pytest.raises(ExportError):
        Window(disk, offset, size)

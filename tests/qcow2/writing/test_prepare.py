"""Before the first write: what is refused, mended or withdrawn, and that it is durable (Q15, Q32, V10, V25)."""

import struct
from pathlib import Path

import pytest

from nbdq.errors import CorruptImage
from nbdq.qcow2.features import Autoclear, Incompatible
from nbdq.qcow2.format import Header, read_header
from nbdq.qcow2.writing.prepare import prepare_for_writing
from tests.support.engine import Engine, K, M, WatchedStorage, check, make_image

CLUSTER = 4 * K
INCOMPATIBLE, AUTOCLEAR = 72, 88


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = make_image(tmp_path / "top.qcow2", 1 * M, cluster_size=CLUSTER)
    with Engine(path) as engine:
        engine.write(0, 16 * CLUSTER)
    return path


def poke(path: Path, offset: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack(">Q", value))


def prepare(path: Path) -> tuple[WatchedStorage, Header]:
    storage = WatchedStorage.open(str(path), writable=True)
    try:
        return storage, prepare_for_writing(storage, read_header(storage))
    finally:
        storage.close()


def test_a_sound_image_is_not_touched(path: Path) -> None:
    before = path.read_bytes()
    storage, header = prepare(path)
    assert storage.calls == []
    assert path.read_bytes() == before
    assert header.autoclear == Autoclear.NONE


def test_a_corrupt_image_is_refused_with_the_command_that_mends_it(path: Path) -> None:
    """V10."""
    poke(path, INCOMPATIBLE, Incompatible.CORRUPT)
    before = path.read_bytes()
    with pytest.raises(CorruptImage, match="nbdq check -r all"):
        prepare(path)
    assert path.read_bytes() == before


def test_tables_that_overlap_are_refused(path: Path) -> None:
    """HARD: the L1 table on the refcount table."""
    poke(path, 40, CLUSTER)
    before = path.read_bytes()
    with pytest.raises(CorruptImage, match="read-only"):
        prepare(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("unknown", [1 << 2, 1 << 63, 0xFFFF_FFFF_FFFF_FFFC])
def test_what_unknown_autoclear_bits_promise_is_withdrawn_durably_before_anything_is_written(
    unknown: int, path: Path
) -> None:
    """Q15, Q23."""
    poke(path, AUTOCLEAR, unknown)
    before = path.read_bytes()
    storage, header = prepare(path)
    assert [call.name for call in storage.calls] == ["write", "sync"]
    assert path.read_bytes() == before[:AUTOCLEAR] + bytes(8) + before[AUTOCLEAR + 8 :]
    assert header.autoclear == Autoclear.NONE
    assert prepare(path)[0].calls == []


def test_what_is_known_stays_promised(tmp_path: Path) -> None:
    """Q80: the data file is still the disk by itself, because writes keep it so."""
    path = make_image(tmp_path / "top.qcow2", 1 * M, data_file_name="data.raw", data_file_raw=True)
    poke(path, AUTOCLEAR, Autoclear.DATA_FILE_RAW | 1 << 40)
    _, header = prepare(path)
    assert header.autoclear == Autoclear.DATA_FILE_RAW
    assert header.data_file_raw


@pytest.mark.parametrize("lie", [0, 7])
def test_a_dirty_image_gets_its_refcounts_rebuilt_and_is_clean_only_then(lie: int, path: Path) -> None:
    """Q32, V25, W5: L1 and L2 are right, the counts may be anything."""
    poke(path, INCOMPATIBLE, Incompatible.DIRTY)
    with Engine(path) as engine:
        host = engine.host(3)
        expected = engine.contents()
    with path.open("r+b") as file:
        file.seek(2 * CLUSTER + 2 * (host // CLUSTER))
        file.write(lie.to_bytes(2, "big"))
    storage, header = prepare(path)
    assert header.incompatible == Incompatible.NONE
    writes = [call for call in storage.calls if call.name in ("write", "sync")]
    headers = [number for number, call in enumerate(writes) if call.name == "write" and call.offset < 512]
    assert headers
    assert "sync" in [call.name for call in writes[: headers[-1]]]
    assert writes[-1].name == "sync"
    check(path)
    with Engine(path) as engine:
        assert engine.contents() == expected
        engine.write(100 * CLUSTER, 20 * CLUSTER)
        assert engine.read(0, 16 * CLUSTER) == expected[: 16 * CLUSTER], "a cluster was handed out twice"

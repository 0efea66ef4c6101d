"""Damaged images that are written to: nothing is made worse, and nobody is led astray (O1-O4, R-27, R-28).

Images that are crafted around one fault come first; what is demanded of guest clusters on metadata is in
``tests/qcow2/test_protection.py``. Then more than a thousand mutations are opened, changed and closed in a process
with limits (``write_worker.py``, ``write_trial.py``). For a longer exploration, as in ``test_mutations.py``::

    NBDQ_SEED=$RANDOM NBDQ_MUTATIONS=50000 pytest tests/hostile/test_writes.py
"""

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdq.chain.overlay import OverlayDisk
from nbdq.errors import CorruptImage
from nbdq.qcow2.features import Autoclear, Incompatible
from nbdq.qcow2.format import build_header
from nbdq.storage import FileStorage
from tests.hostile.anatomy import COMPRESSED, COPIED, ZERO
from tests.hostile.seeds import VARIANTS_TO_MUTATE, make_seed
from tests.hostile.write_images import (
    END,
    FIRST_OWN,
    PER_TABLE,
    SECOND_OWN,
    SHARED,
    Place,
    complete_image,
    host_cluster,
    opened,
    set_l1,
    set_l2,
    set_refcount,
)
from tests.hostile.write_laboratory import Worker
from tests.qcow2.audit.small import CLUSTER, put
from tests.qcow2.minimal import minimal_header, poke
from tests.support.images import Variant
from tests.support.tools import requires

_DATA = memoryview(b"\xee" * CLUSTER)
#: A guest cluster that is not allocated.
_EMPTY = 3
_CORRUPT_BIT = (79, 2)


def save(path: Path, image: bytes | bytearray) -> Path:
    path.write_bytes(image)
    return path


def read(disk: OverlayDisk, cluster: int, count: int = 1) -> bytes:
    data = bytearray(CLUSTER * count)
    disk.read_into(cluster * CLUSTER, memoryview(data))
    return bytes(data)


def failure(change: Callable[[], None]) -> int | None:
    """The errno with which a change fails, if it does."""
    try:
        change()
    except OSError as error:
        return error.errno
    return None


def is_marked_corrupt(path: Path) -> bool:
    offset, bit = _CORRUPT_BIT
    return bool(path.read_bytes()[offset] & bit)


# Tables that cannot be.


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (COPIED | Place.ACTIVE_L2 * CLUSTER, "two L1 entries"),
        (COPIED | 20 * CLUSTER | 1, "reserved bits"),
        (COPIED | 20 * CLUSTER | 1 << 62, "reserved bits"),
        (COPIED | 1 << 56, "reserved bits"),
    ],
)
def test_an_impossible_l1_table_forbids_writing(entry: int, text: str, tmp_path: Path) -> None:
    image = complete_image()
    set_l1(image, 2, entry)
    path = save(tmp_path / "disk.qcow2", image)
    with pytest.raises(CorruptImage, match=text), opened(path):
        pass
    assert path.read_bytes() == image


@pytest.mark.parametrize("offset", [(END + 9) * CLUSTER, 1 << 30, (1 << 56) - CLUSTER])
def test_an_l2_table_past_the_end_of_the_file_costs_the_guest_its_range_only(offset: int, tmp_path: Path) -> None:
    image = complete_image()
    set_l1(image, 2, COPIED | offset)
    path = save(tmp_path / "disk.qcow2", image)
    start = 2 * PER_TABLE * CLUSTER
    with opened(path) as disk:
        assert failure(lambda: disk.write(start, _DATA)) == errno.EIO
        assert failure(lambda: disk.discard(start, CLUSTER)) == errno.EIO
        assert failure(lambda: disk.zero(start, CLUSTER, unmap=True)) == errno.EIO
        assert failure(lambda: disk.read_into(start, memoryview(bytearray(9)))) == errno.EIO
        disk.write(CLUSTER, _DATA)
        assert read(disk, 1) == bytes(_DATA)
    assert not is_marked_corrupt(path)


@pytest.mark.parametrize("offset", [Place.REFCOUNT_BLOCK * CLUSTER + 512 * 40, 1 << 40, (1 << 56) - CLUSTER])
def test_a_refcount_block_past_the_end_of_the_file_makes_the_image_corrupt(offset: int, tmp_path: Path) -> None:
    image = complete_image()
    put(image, Place.REFCOUNT_TABLE * CLUSTER, offset)
    path = save(tmp_path / "disk.qcow2", image)
    with opened(path) as disk:
        assert failure(lambda: disk.write(_EMPTY * CLUSTER, _DATA)) == errno.EIO
        assert failure(lambda: disk.write(_EMPTY * CLUSTER, _DATA)) == errno.EROFS
        assert read(disk, 1) == bytes([0xA0 + FIRST_OWN]) * CLUSTER
    assert is_marked_corrupt(path)


def test_a_refcount_block_between_clusters_makes_the_image_corrupt(tmp_path: Path) -> None:
    header = minimal_header(cluster_bits=16)
    image = bytearray(6 << 16)
    image[: len(build_header(header))] = build_header(header)
    put(image, 1 << 16, (2 << 16) + 512)
    path = save(tmp_path / "disk.qcow2", image)
    with opened(path) as disk:
        assert failure(lambda: disk.write(0, _DATA)) == errno.EIO
    assert is_marked_corrupt(path)


@pytest.mark.parametrize("index", [1, 7, 63])
def test_two_refcount_table_entries_for_one_block_forbid_writing(index: int, tmp_path: Path) -> None:
    image = complete_image()
    put(image, Place.REFCOUNT_TABLE * CLUSTER + 8 * index, Place.REFCOUNT_BLOCK * CLUSTER)
    path = save(tmp_path / "disk.qcow2", image)
    with pytest.raises(CorruptImage, match="a refcount block and a refcount block"), opened(path):
        pass


# Entries that cannot be.


@pytest.mark.parametrize("bits", [1 << 61, 1 << 56, 1 << 1, 1 << 8])
def test_reserved_bits_of_an_entry_do_not_matter(bits: int, tmp_path: Path) -> None:
    image = complete_image()
    set_l2(image, 1, COPIED | bits | FIRST_OWN * CLUSTER)
    path = save(tmp_path / "disk.qcow2", image)
    with opened(path) as disk:
        disk.write(CLUSTER + 100, _DATA[:50])
        assert read(disk, 1) == bytes([0xA0 + FIRST_OWN]) * 100 + b"\xee" * 50 + bytes([0xA0 + FIRST_OWN]) * 362


def wide_image(entry: int, bitmap: int | None = None, **fields: Any) -> bytearray:
    """One entry in clusters of 64 KiB, whose table is cluster 4, data cluster 5; with ``bitmap`` it is extended."""
    incompatible = Incompatible.EXTENDED_L2 if bitmap is not None else Incompatible.NONE
    header = minimal_header(cluster_bits=16, incompatible=incompatible, **fields)
    image = bytearray(6 << 16)
    image[: len(build_header(header))] = build_header(header)
    put(image, 1 << 16, 2 << 16)
    for cluster in range(6):
        put(image, (2 << 16) + 2 * cluster, 1, 2)
    put(image, 3 << 16, COPIED | 4 << 16)
    put(image, 4 << 16, entry)
    if bitmap is not None:
        put(image, (4 << 16) + 8, bitmap)
    image[5 << 16 :] = b"\x55" * (1 << 16)
    return image


@pytest.mark.parametrize("entry", [COPIED | (5 << 16) + 512, (5 << 16) + 1024, COPIED | (5 << 16) + 512 | ZERO])
def test_a_cluster_between_clusters_can_be_replaced_but_not_patched(entry: int, tmp_path: Path) -> None:
    path = save(tmp_path / "disk.qcow2", wide_image(entry))
    whole = memoryview(b"\x66" * (1 << 16))
    with opened(path) as disk:
        assert failure(lambda: disk.write(100, _DATA)) == errno.EIO
        disk.write(0, whole)
        again = bytearray(1 << 16)
        disk.read_into(0, memoryview(again))
        assert again == whole
        disk.flush()
    assert path.read_bytes()[5 << 16 : 6 << 16] == b"\x55" * (1 << 16)


@pytest.mark.parametrize("version", [2, 3])
def test_zero_flags_in_a_version_without_them_are_errors_for_whoever_reads(version: int, tmp_path: Path) -> None:
    path = save(tmp_path / "disk.qcow2", wide_image(ZERO, version=version))
    with opened(path) as disk:
        disk.write(1 << 16, _DATA)  # loads the table
        view = memoryview(bytearray(9))
        assert failure(lambda: disk.read_into(0, view)) == (errno.EIO if version == 2 else None)
        assert disk.read_cached(0, view) == (version == 3)
        assert disk.write_cached(0, _DATA) == (version == 3)


@pytest.mark.parametrize(
    ("entry", "bitmap"),
    [(COPIED | 5 << 16, 1 | 1 << 32), (COPIED, 1), (0, 1), (COPIED, (1 << 32) - 1)],
    ids=["allocated and zero", "COPIED and nowhere", "nowhere", "all nowhere"],
)
def test_a_contradictory_subcluster_is_an_error_until_the_cluster_is_replaced(
    entry: int, bitmap: int, tmp_path: Path
) -> None:
    """Q44, Q45; both ways to read and to write have to agree."""
    path = save(tmp_path / "disk.qcow2", wide_image(entry, bitmap))
    with opened(path) as disk:
        head = path.read_bytes()[: 1 << 16]
        view = memoryview(bytearray(100))
        disk.write(1 << 16, _DATA)  # loads the table
        assert not disk.read_cached(0, view)
        assert failure(lambda: disk.read_into(0, view)) == errno.EIO
        whole = memoryview(b"\x66" * (1 << 16))
        if not disk.write_cached(0, whole):
            disk.write(0, whole)
        assert path.read_bytes()[: 1 << 16] == head
        again = bytearray(1 << 16)
        disk.read_into(0, memoryview(again))
        assert entry == COPIED | 5 << 16 or again == whole


class _Interrupted:
    """The words of a table; something happens as soon as the first descriptor has been read."""

    def __init__(self, words: memoryview, happens: Callable[[], None]) -> None:
        self._words = words
        self._happens: Callable[[], None] | None = happens

    def __getitem__(self, index: int) -> int:
        word: int = self._words[index]
        if index == 0 and self._happens is not None:
            happens, self._happens = self._happens, None
            happens()
        return word


def test_a_reader_does_not_take_the_subclusters_of_a_new_cluster_for_those_of_the_old_one(tmp_path: Path) -> None:
    """The old cluster is a snapshot's; what it holds at the place of its unused subclusters nobody may see."""
    image = wide_image(5 << 16, 1)
    put(image, (2 << 16) + 2 * 5, 2, 2)
    granule = 1 << 11
    with opened(save(tmp_path / "disk.qcow2", image)) as disk:
        disk.write(1 << 16, _DATA)  # loads the table
        table = disk.top.mapping.tables[0]
        words = table.words

        def move() -> None:
            table.words = words
            disk.write(5 * granule, memoryview(b"\x66" * granule))

        table.words = _Interrupted(words, move)  # type: ignore[assignment]
        view = memoryview(bytearray(100))
        if disk.read_cached(5 * granule, view):
            assert bytes(view) in (bytes(100), b"\x66" * 100)
        assert table.words is words
        disk.read_into(5 * granule, view)
        assert bytes(view) == b"\x66" * 100


@pytest.mark.parametrize("entry", [COPIED | 2 << 16, COPIED | 5 << 16, COMPRESSED | 5 << 16])
def test_an_entry_leads_to_no_other_place_of_a_data_file(entry: int, tmp_path: Path) -> None:
    """Guest and host offsets are equal (Q77); QEMU marks the image corrupt."""
    image = wide_image(entry, data_file_name="data", autoclear=Autoclear.NONE)
    poke(image, incompatible_features=int(Incompatible.DATA_FILE))
    content = bytes(range(256)) * 4096
    save(tmp_path / "data", content)
    with opened(save(tmp_path / "disk.qcow2", image)) as disk:
        view = memoryview(bytearray(100))
        disk.write(15 << 16, _DATA)  # loads the table
        assert not disk.read_cached(0, view)
        assert failure(lambda: disk.read_into(0, view)) == errno.EIO
        assert not disk.write_cached(0, _DATA)
        assert failure(lambda: disk.write(0, _DATA)) == errno.EIO
        expected = content[: 15 << 16] + bytes(_DATA)
        assert (tmp_path / "data").read_bytes()[: len(expected)] == expected


# Promises and marks in the header.


@pytest.mark.parametrize("bits", [Incompatible.CORRUPT, Incompatible.CORRUPT | Incompatible.DIRTY])
def test_a_corrupt_image_is_not_touched(bits: Incompatible, tmp_path: Path) -> None:
    image = poke(complete_image(), incompatible_features=int(bits))
    path = save(tmp_path / "disk.qcow2", image)
    with pytest.raises(CorruptImage, match="marked as corrupt"), opened(path):
        pass
    assert path.read_bytes() == image


def test_unknown_promises_are_withdrawn_before_anything_is_written(tmp_path: Path) -> None:
    image = poke(complete_image(), autoclear_features=1 | 1 << 5 | 1 << 63)
    path = save(tmp_path / "disk.qcow2", image)
    with opened(path):
        assert path.read_bytes()[88:96] == (1).to_bytes(8, "big")


def test_a_promise_of_bitmaps_without_any_is_withdrawn(tmp_path: Path) -> None:
    """Q16: QEMU opens such an image and fails its first write."""
    image = wide_image(COPIED | 5 << 16, autoclear=Autoclear.BITMAPS)
    path = save(tmp_path / "disk.qcow2", image)
    events: list[str] = []
    with opened(path, events.append) as disk:
        assert path.read_bytes()[88:96] == bytes(8)
        disk.write(0, _DATA)
        disk.flush()
    assert [event for event in events if "bitmaps are lost" in event]


def test_a_dirty_image_with_wrong_refcounts_is_mended_before_it_is_written(tmp_path: Path) -> None:
    image = poke(complete_image(), incompatible_features=int(Incompatible.DIRTY))
    for cluster in (SHARED, SECOND_OWN, Place.SNAPSHOT_TABLE, Place.ACTIVE_L2):
        set_refcount(image, cluster, 0)
    path = save(tmp_path / "disk.qcow2", image)
    with opened(path) as disk:
        disk.write(0, _DATA)
        disk.write(_EMPTY * CLUSTER, _DATA)
        assert read(disk, 2) == bytes([0xA0 + SECOND_OWN]) * CLUSTER
    assert host_cluster(path, SHARED) == bytes([0xA0 + SHARED]) * CLUSTER, "the snapshot's"
    assert not is_marked_corrupt(path)


# The medium fails while clusters are freed.


def test_a_publication_that_cannot_free_what_it_replaces_is_not_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the new cluster would be named by an entry and free at once, and the next write would share it."""
    image = complete_image()
    set_l2(image, _EMPTY, 200 * 256 * CLUSTER)  # counted by another block
    put(image, Place.REFCOUNT_TABLE * CLUSTER + 8, END * CLUSTER)
    set_l2(image, _EMPTY, 256 * CLUSTER)
    set_refcount(image, END, 1)
    image += bytes(CLUSTER)
    path = save(tmp_path / "disk.qcow2", image)
    with opened(path) as disk:
        sound = FileStorage.read

        def read_all_but_one_block(storage: FileStorage, offset: int, length: int) -> bytes:
            if offset == END * CLUSTER:
                raise OSError(errno.EIO, "medium error")
            return sound(storage, offset, length)

        monkeypatch.setattr(FileStorage, "read", read_all_but_one_block)
        assert failure(lambda: disk.write(_EMPTY * CLUSTER, _DATA)) == errno.EIO
        disk.write(8 * CLUSTER, memoryview(b"\x11" * CLUSTER))
        disk.write(9 * CLUSTER, memoryview(b"\x22" * CLUSTER))
        assert read(disk, _EMPTY) in (bytes(_DATA), bytes(CLUSTER))
        disk.flush()
        assert read(disk, 8, 2) == b"\x11" * CLUSTER + b"\x22" * CLUSTER
    table = host_cluster(path, Place.ACTIVE_L2)
    hosts = Counter(table[start : start + 8] for start in range(0, CLUSTER, 8) if any(table[start : start + 8]))
    assert hosts.most_common(1)[0][1] == 1, "two guest clusters share a host cluster"


# Mutations.

RANDOM_SEED = os.environ.get("NBDQ_SEED", "nbdq")
_NAMES = (
    "clusters-1k",
    "extended-l2-16k",
    "refcount-bits-1",
    "refcount-bits-64",
    "zlib-mixed",
    "zlib-clusters-4k",
    "zstd-extended-l2",
    "zlib-v2",
    "zlib-clusters-512",
    "zeros-preallocated",
    "lazy-refcounts",
    "preallocation-metadata",
    "data-file-raw-off",
    "data-file-raw-on",
    "data-file-extended-l2",
    "odd-number-of-sectors",
    "snapshots",
    "snapshots-v2",
    "snapshots-compressed",
    "snapshots-extended-l2",
    "snapshots-over-backing",
    "raw-base",
    "backing-shorter",
    "small-v2",
    "small-clusters-512",
    "bitmaps",
    "bitmaps-over-backing",
)
_VARIANTS = [variant for variant in VARIANTS_TO_MUTATE if variant.name in _NAMES]
TOTAL = int(os.environ.get("NBDQ_MUTATIONS", "1512"))
_EACH = -(-TOTAL // len(_VARIANTS))


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    found = Worker(tmp_path_factory.mktemp("writes"))
    yield found
    found.close()


@requires("qemu-img", "qemu-io")
@pytest.mark.timeout(0)
@pytest.mark.parametrize("variant", _VARIANTS, ids=str)
def test_a_damaged_image_is_refused_or_written_without_making_anything_worse(
    variant: Variant, worker: Worker, tmp_path: Path
) -> None:
    failures = worker.try_all(make_seed(variant, tmp_path), RANDOM_SEED, range(_EACH))
    assert not failures, f"NBDQ_SEED={RANDOM_SEED}\n" + "\n".join(failures)


def test_more_than_half_of_the_damaged_images_are_written_and_some_of_them_judged_as_sound(worker: Worker) -> None:
    """Images that die at the header, or of which nothing is demanded, would test nothing."""
    if worker.seen["tried"] < TOTAL:
        pytest.skip("judges a whole run")
    assert worker.seen["opened"] * 2 > worker.seen["tried"], worker.seen
    assert worker.seen["sound"] * 7 > worker.seen["tried"], worker.seen

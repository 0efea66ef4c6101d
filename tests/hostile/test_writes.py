"""Damaged images that are written to: nothing is made worse, and nobody is led astray (O1-O4, R-27, R-28).

Images that are crafted around one fault come first; what is demanded of guest clusters on metadata is in
``tests/qcow2/test_protection.py``. Then more than a thousand mutations are opened, changed and closed in a process
with limits (``write_worker.py``, ``write_trial.py``). For a longer exploration, as in ``test_mutations.py``::

    NBDQ_SEED=$RANDOM NBDQ_MUTATIONS=50000 pytest tests/hostile/test_writes.py
"""

import errno
import json
import os
import pickle
import selectors
import subprocess
import sys
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
from tests.hostile.seeds import VARIANTS_TO_MUTATE, Seed, make_seed
from tests.hostile.write_images import (
    END,
    FIRST_OWN,
    PER_TABLE,
    SECOND_OWN,
    SHARED,
    Place,
    complete_image,
    opened,
    set_l1,
    set_l2,
    set_refcount,
)
from tests.qcow2.minimal import minimal_header, poke
from tests.qcow2.small import CLUSTER, put
from tests.support.images import Variant
from tests.support.tools import requires

_ROOT = Path(__file__).parents[2]
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


def host_cluster(path: Path, cluster: int) -> bytes:
    return path.read_bytes()[cluster * CLUSTER : (cluster + 1) * CLUSTER]


def refcount(path: Path, cluster: int) -> int:
    start = Place.REFCOUNT_BLOCK * CLUSTER + 2 * cluster
    return int.from_bytes(path.read_bytes()[start : start + 2], "big")


def is_marked_corrupt(path: Path) -> bool:
    offset, bit = _CORRUPT_BIT
    return bool(path.read_bytes()[offset] & bit)


# COPIED and refcounts that contradict each other.


@pytest.mark.parametrize(
    ("copied", "stored", "left"),
    [(True, 2, 1), (True, 0, None), (False, 1, 1)],
    ids=["COPIED, refcount 2", "COPIED, refcount 0", "refcount 1 without COPIED"],
)
@pytest.mark.parametrize("length", [CLUSTER, 7], ids=["whole cluster", "part"])
def test_a_cluster_is_overwritten_in_place_only_if_flag_and_refcount_agree(
    copied: bool, stored: int, left: int | None, length: int, tmp_path: Path
) -> None:
    image = complete_image()
    set_l2(image, 1, FIRST_OWN * CLUSTER | (COPIED if copied else 0))
    set_refcount(image, FIRST_OWN, stored)
    path = save(tmp_path / "disk.qcow2", image)
    old = bytes([0xA0 + FIRST_OWN]) * CLUSTER
    with opened(path) as disk:
        disk.write(_EMPTY * CLUSTER, _DATA)  # takes the cluster that is free by mistake, if there is one
        before = host_cluster(path, FIRST_OWN)
        if stored:
            assert before == old
        disk.write(CLUSTER, _DATA[:length])
        assert host_cluster(path, FIRST_OWN) == before, "somebody else's"
        assert read(disk, 1) == bytes(_DATA[:length]) + before[length:]
        assert read(disk, _EMPTY) == bytes(_DATA)
    assert not is_marked_corrupt(path)
    if left is not None:
        assert refcount(path, FIRST_OWN) == left, "a leak is the smaller damage"


def test_two_entries_of_a_table_that_claim_one_cluster_own_nothing(tmp_path: Path) -> None:
    image = complete_image()
    set_l2(image, _EMPTY, COPIED | FIRST_OWN * CLUSTER)
    path = save(tmp_path / "disk.qcow2", image)
    with opened(path) as disk:
        for first, second in ((1, _EMPTY), (_EMPTY, 1)):
            kept = read(disk, second)
            disk.write(first * CLUSTER, _DATA[:8])
            assert read(disk, second) == kept
        disk.discard(CLUSTER, CLUSTER)
        disk.flush()
        assert read(disk, _EMPTY)[:8] == bytes(_DATA[:8])


def test_giving_up_a_cluster_that_another_table_names_too_marks_nothing_corrupt_but_breaks_no_metadata(
    tmp_path: Path,
) -> None:
    image = complete_image()
    set_l2(image, PER_TABLE + 1, COPIED | FIRST_OWN * CLUSTER)
    path = save(tmp_path / "disk.qcow2", image)
    metadata = [place for place in Place if place not in (Place.REFCOUNT_BLOCK, Place.ACTIVE_L2, Place.SECOND_L2)]
    with opened(path) as disk:
        before = [host_cluster(path, place) for place in metadata]
        disk.discard(CLUSTER, CLUSTER)
        disk.flush()
        disk.write(5 * CLUSTER, _DATA)
        disk.discard((PER_TABLE + 1) * CLUSTER, CLUSTER)
        disk.flush()
        disk.flush()
        for cluster in range(20, 40):
            disk.write(cluster * CLUSTER, _DATA)
        disk.flush()
        assert [host_cluster(path, place) for place in metadata] == before
        assert read(disk, 20, 20) == bytes(_DATA) * 20


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
#: Seconds of wall time without a report until the process counts as hung; CPU time has a limit of its own.
_PATIENCE = 60


class Worker:
    """The process in which damaged images are written to."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self.seen: Counter[str] = Counter()

    def try_all(self, seed: Seed, numbers: range) -> list[str]:
        """Try these mutations; a text for each failure."""
        if self._process is None:
            command = [sys.executable, "-m", "tests.hostile.write_worker", str(self._directory)]
            self._process = subprocess.Popen(
                command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_ENVIRONMENT
            )
        assert self._process.stdin is not None
        pickle.dump((seed, RANDOM_SEED, numbers), self._process.stdin)
        self._process.stdin.flush()
        failures = []
        for number in numbers:
            report = self._report()
            if report is None:
                self.close()
                return [*failures, f"hangs or dies: {seed.variant.name} #{number}"]
            self.seen.update(tried=1, opened=report["opened"], sound=report["opened"] and report["sound"])
            failures += [f"{report['what']}\n    {text}" for text in report["failures"]]
        return failures

    def _report(self) -> dict[str, Any] | None:
        assert self._process is not None
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(_PATIENCE) else b""
        report: dict[str, Any] | None = json.loads(line) if line else None
        return report

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


#: One malloc arena, because others reserve address space, which the limit would count.
_ENVIRONMENT = {"LC_ALL": "C.UTF-8", "MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1"}


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
    failures = worker.try_all(make_seed(variant, tmp_path), range(_EACH))
    assert not failures, f"NBDQ_SEED={RANDOM_SEED}\n" + "\n".join(failures)


def test_more_than_half_of_the_damaged_images_are_written_and_some_of_them_judged_as_sound(worker: Worker) -> None:
    """Images that die at the header, or of which nothing is demanded, would test nothing."""
    if worker.seen["tried"] < TOTAL:
        pytest.skip("judges a whole run")
    assert worker.seen["opened"] * 2 > worker.seen["tried"], worker.seen
    assert worker.seen["sound"] * 7 > worker.seen["tried"], worker.seen

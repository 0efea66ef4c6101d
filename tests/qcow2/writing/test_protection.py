"""No guest can be led to write over metadata, whatever the tables and refcounts of its image say (O1-O4, R-27)."""

import errno
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nbdq.chain.overlay import OverlayDisk
from nbdq.errors import CorruptImage
from nbdq.qcow2.writing.protection import ProtectedClusters
from tests.hostile.anatomy import COMPRESSED, COPIED, ZERO
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
from tests.qcow2.audit.small import CLUSTER, put
from tests.support.tools import requires

#: The byte of the header with the corrupt bit, and that bit.
_FLAGS, _CORRUPT = 79, 2
_DATA = memoryview(b"\xee" * CLUSTER)
#: A guest cluster that is not allocated, one that is ours, one in a table that does not exist, and the first of it.
_EMPTY, _OWN = 3, 1
_TABLELESS = 2 * PER_TABLE


def save(path: Path, image: bytes | bytearray) -> Path:
    path.write_bytes(image)
    return path


def read(disk: OverlayDisk, cluster: int) -> bytes:
    """A guest cluster as the guest reads it; both ways to read have to agree."""
    data, again = bytearray(CLUSTER), bytearray(CLUSTER)
    disk.read_into(cluster * CLUSTER, memoryview(data))
    if disk.read_cached(cluster * CLUSTER, memoryview(again)):
        assert data == again, f"guest cluster {cluster} depends on the way it is read"
    return bytes(data)


def write(disk: OverlayDisk, cluster: int, data: memoryview = _DATA, *, inside: int = 0) -> None:
    """As the server does it."""
    offset = cluster * CLUSTER + inside
    if not disk.write_cached(offset, data):
        disk.write(offset, data)


def failure(change: Callable[[], None]) -> int | None:
    """The errno with which a change fails, if it does."""
    try:
        change()
    except OSError as error:
        return error.errno
    return None


def assert_read_only(disk: OverlayDisk) -> None:
    """Nothing can be changed any more, but everything that was sound can be read."""
    assert failure(lambda: write(disk, _OWN)) == errno.EROFS
    assert failure(lambda: disk.zero(_OWN * CLUSTER, CLUSTER, unmap=True)) == errno.EROFS
    assert failure(lambda: disk.zero(_OWN * CLUSTER, CLUSTER, unmap=False)) == errno.EROFS
    assert failure(lambda: disk.discard(_OWN * CLUSTER, CLUSTER)) == errno.EROFS
    assert failure(disk.flush) == errno.EIO
    assert read(disk, 0) == bytes([0xA0 + SHARED]) * CLUSTER
    assert read(disk, _OWN) == bytes([0xA0 + FIRST_OWN]) * CLUSTER


def assert_marked_corrupt_and_nothing_else(path: Path, before: bytes) -> None:
    expected = bytearray(before)
    expected[_FLAGS] |= _CORRUPT
    assert path.read_bytes()[: len(before)] == expected
    assert not any(path.read_bytes()[len(before) :])


@requires("qemu-img")
def test_the_image_that_is_damaged_here_is_sound(tmp_path: Path) -> None:
    path = save(tmp_path / "disk.qcow2", complete_image())
    subprocess.run(["qemu-img", "check", "-q", path], check=True)
    with opened(path) as disk:
        for cluster in (0, _OWN, _EMPTY, _TABLELESS):
            write(disk, cluster)
        disk.discard(2 * CLUSTER, CLUSTER)
        disk.flush()
    subprocess.run(["qemu-img", "check", "-q", path], check=True)
    assert path.read_bytes()[SHARED * CLUSTER :][:CLUSTER] == bytes([0xA0 + SHARED]) * CLUSTER, "the snapshot's"


@pytest.mark.parametrize("flags", [COPIED, COPIED | ZERO], ids=["data", "preallocated zeros"])
@pytest.mark.parametrize("length", [CLUSTER, 8], ids=["whole cluster", "part"])
@pytest.mark.parametrize("place", [place for place in Place if place is not Place.HEADER], ids=lambda place: place.name)
def test_a_guest_cluster_on_metadata_is_not_written_and_the_image_is_marked_corrupt(
    place: Place, length: int, flags: int, tmp_path: Path
) -> None:
    image = complete_image()
    set_l2(image, _EMPTY, flags | place * CLUSTER)
    path = save(tmp_path / "disk.qcow2", image)
    events: list[str] = []
    with opened(path, events.append) as disk:
        before = path.read_bytes()
        assert failure(lambda: write(disk, _EMPTY, _DATA[:length])) == errno.EIO
        assert_marked_corrupt_and_nothing_else(path, before)
        assert_read_only(disk)
    assert_marked_corrupt_and_nothing_else(path, before)
    assert [event for event in events if "corrupt" in event and "\n" not in event]
    with pytest.raises(CorruptImage, match="marked as corrupt"), opened(path):
        pass


@pytest.mark.parametrize("flags", [COPIED, COPIED | ZERO, 1 << 61, 2], ids=["data", "zeros", "reserved", "low"])
def test_an_entry_without_an_offset_is_not_the_header(flags: int, tmp_path: Path) -> None:
    """QEMU reads such an entry as not allocated (Q36); it must not become an own cluster at offset 0 (O4)."""
    image = complete_image()
    set_l2(image, _EMPTY, flags)
    path = save(tmp_path / "disk.qcow2", image)
    with opened(path) as disk:
        head = path.read_bytes()[:CLUSTER]
        assert read(disk, _EMPTY) == bytes(CLUSTER)
        write(disk, _EMPTY)
        assert read(disk, _EMPTY) == bytes(_DATA)
        disk.zero(_EMPTY * CLUSTER, CLUSTER, unmap=False)
        assert read(disk, _EMPTY) == bytes(CLUSTER)
        disk.flush()
        assert path.read_bytes()[:CLUSTER] == head


@pytest.mark.parametrize("place", list(Place), ids=lambda place: place.name)
def test_metadata_that_the_refcounts_call_free_is_not_handed_out(place: Place, tmp_path: Path) -> None:
    image = complete_image()
    set_refcount(image, place, 0)
    path = save(tmp_path / "disk.qcow2", image)
    with opened(path) as disk:
        before = path.read_bytes()
        cluster = PER_TABLE + 1 if place is Place.ACTIVE_L2 else _EMPTY
        assert failure(lambda: write(disk, cluster)) == errno.EIO
        assert_marked_corrupt_and_nothing_else(path, before)
        assert_read_only(disk)
    assert_marked_corrupt_and_nothing_else(path, before)


@pytest.mark.parametrize("place", list(Place), ids=lambda place: place.name)
def test_giving_up_a_compressed_cluster_that_lies_on_metadata_does_not_free_it(place: Place, tmp_path: Path) -> None:
    image = complete_image()
    set_l2(image, _EMPTY, COMPRESSED | place * CLUSTER)
    path = save(tmp_path / "disk.qcow2", image)
    with opened(path) as disk:
        before = path.read_bytes()
        disk.discard(_EMPTY * CLUSTER, CLUSTER)
        assert failure(disk.flush) == errno.EIO
        after = path.read_bytes()
        assert_read_only(disk)
    assert after[_FLAGS] & _CORRUPT
    start = place * CLUSTER
    changed = [i for i in range(len(before)) if before[i] != after[i]]
    entry = Place.ACTIVE_L2 * CLUSTER + 8 * _EMPTY
    assert set(changed) <= {_FLAGS, *range(entry, entry + 8)}
    assert after[start + 120 : start + CLUSTER] == before[start + 120 : start + CLUSTER]


def test_metadata_with_two_references_by_the_guest_is_not_freed(tmp_path: Path) -> None:
    image = complete_image()
    for cluster in (_EMPTY, _EMPTY + 1):
        set_l2(image, cluster, Place.INACTIVE_L1 * CLUSTER)
    set_refcount(image, Place.INACTIVE_L1, 2)
    path = save(tmp_path / "disk.qcow2", image)
    with opened(path) as disk:
        disk.discard(_EMPTY * CLUSTER, 2 * CLUSTER)
        assert failure(disk.flush) == errno.EIO
    after = path.read_bytes()
    assert after[_FLAGS] & _CORRUPT
    start = Place.INACTIVE_L1 * CLUSTER
    assert after[start : start + CLUSTER] == image[start : start + CLUSTER]


def test_a_cluster_that_became_a_table_is_no_longer_written_by_an_entry_that_names_it_too(tmp_path: Path) -> None:
    """Two tables name one cluster, whose refcount says 1 (R-28); one gives it up, and it becomes an L2 table."""
    image = complete_image()
    set_l2(image, PER_TABLE + 1, COPIED | SECOND_OWN * CLUSTER)
    path = save(tmp_path / "disk.qcow2", image)
    with opened(path) as disk:
        write(disk, PER_TABLE)  # now the second table is known to be ours
        disk.discard(2 * CLUSTER, CLUSTER)
        disk.flush()
        write(disk, _TABLELESS)  # the table takes a cluster, and the data one
        write(disk, 3 * PER_TABLE)
        disk.flush()
        assert SECOND_OWN in {table.offset // CLUSTER for table in disk.top.mapping.tables.values()}
        start = SECOND_OWN * CLUSTER
        table = path.read_bytes()[start : start + CLUSTER]
        assert failure(lambda: write(disk, PER_TABLE + 1)) == errno.EIO
        assert failure(lambda: write(disk, PER_TABLE + 1, _DATA[:9])) == errno.EROFS
        assert read(disk, _TABLELESS) == bytes(_DATA)
    assert path.read_bytes()[start : start + CLUSTER] == table
    assert path.read_bytes()[_FLAGS] & _CORRUPT


_NOT_SHARED = [place for place in Place if place is not Place.INACTIVE_L2]


@pytest.mark.parametrize("place", [place for place in _NOT_SHARED if place is not Place.HEADER], ids=lambda p: p.name)
def test_an_l2_table_that_is_other_metadata_forbids_writing(place: Place, tmp_path: Path) -> None:
    image = complete_image()
    set_l1(image, 2, COPIED | place * CLUSTER)
    assert_refused_unchanged(save(tmp_path / "disk.qcow2", image))


def test_an_l2_table_of_a_snapshot_is_not_changed_though_flag_and_refcount_say_that_it_is_ours(tmp_path: Path) -> None:
    image = complete_image()
    set_l1(image, 2, COPIED | Place.INACTIVE_L2 * CLUSTER)
    path = save(tmp_path / "disk.qcow2", image)
    start = Place.INACTIVE_L2 * CLUSTER
    with opened(path) as disk:
        assert read(disk, _TABLELESS) == bytes([0xA0 + SHARED]) * CLUSTER
        write(disk, _TABLELESS)
        disk.discard((_TABLELESS + 1) * CLUSTER, CLUSTER)
        disk.flush()
        assert read(disk, _TABLELESS) == bytes(_DATA)
    assert path.read_bytes()[start : start + CLUSTER] == image[start : start + CLUSTER]
    assert not path.read_bytes()[_FLAGS] & _CORRUPT


@pytest.mark.parametrize("place", _NOT_SHARED, ids=lambda place: place.name)
def test_a_refcount_block_that_is_other_metadata_forbids_writing(place: Place, tmp_path: Path) -> None:
    image = complete_image()
    put(image, Place.REFCOUNT_TABLE * CLUSTER + 8, place * CLUSTER)
    path = save(tmp_path / "disk.qcow2", image)
    if place is Place.HEADER:
        with opened(path):
            return  # offset 0 says that there is no block
    assert_refused_unchanged(path)


@pytest.mark.parametrize("place", [Place.REFCOUNT_BLOCK, Place.ACTIVE_L2, Place.INACTIVE_L1], ids=lambda p: p.name)
def test_bitmap_data_that_is_other_metadata_forbids_writing(place: Place, tmp_path: Path) -> None:
    """Storing the bitmap would give the cluster up."""
    image = complete_image()
    put(image, Place.BITMAP_TABLE * CLUSTER, place * CLUSTER)
    assert_refused_unchanged(save(tmp_path / "disk.qcow2", image))


@pytest.mark.parametrize("offset", [1 << 40, (1 << 63) - CLUSTER, 1 << 63, (1 << 64) - CLUSTER])
def test_a_bitmap_whose_table_lies_nowhere_forbids_writing(offset: int, tmp_path: Path) -> None:
    image = complete_image()
    put(image, Place.BITMAP_DIRECTORY * CLUSTER, offset)
    assert_refused_unchanged(save(tmp_path / "disk.qcow2", image))


def assert_refused_unchanged(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(CorruptImage) as caught, opened(path):
        pass
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("offset", [1 << 40, (1 << 56) - CLUSTER, (1 << 63) - 1, (1 << 64) - 8])
@pytest.mark.parametrize("size", [1, 1 << 16])
def test_a_snapshot_whose_table_lies_nowhere_does_not_hinder_writing(offset: int, size: int, tmp_path: Path) -> None:
    image = complete_image()
    put(image, Place.SNAPSHOT_TABLE * CLUSTER, offset)
    put(image, Place.SNAPSHOT_TABLE * CLUSTER + 8, size, 4)
    with opened(save(tmp_path / "disk.qcow2", image)) as disk:
        write(disk, _EMPTY)
        assert read(disk, _EMPTY) == bytes(_DATA)


def test_the_clusters_of_own_new_metadata_are_protected_and_given_up_ones_are_not() -> None:
    protected = ProtectedClusters(np.array([7, 3, 3], dtype=np.uint64))
    protected.add(END, 4)
    protected.remove(7, 1)
    protected.remove(END + 1, 1)
    expected = {3, END, END + 2, END + 3}
    everything = np.arange(40, dtype=np.uint64)
    assert set(everything[protected.among(everything)].tolist()) == expected
    for first in range(40):
        for count in (1, 2, 9, 30):
            assert protected.overlaps(first, count) == (not expected.isdisjoint(range(first, first + count)))
    protected.add(7, 1)
    assert protected.overlaps(7, 1)


# COPIED and refcounts that contradict each other.


def refcount(path: Path, cluster: int) -> int:
    start = Place.REFCOUNT_BLOCK * CLUSTER + 2 * cluster
    return int.from_bytes(path.read_bytes()[start : start + 2], "big")


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
    assert not path.read_bytes()[_FLAGS] & _CORRUPT
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
        assert all(read(disk, cluster) == bytes(_DATA) for cluster in range(20, 40))

"""Repairs in memory: what they change, what they leave alone, and every state that a crash in the middle can leave."""

import errno
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from nbdq.errors import CorruptImage
from nbdq.qcow2.audit.check import check_image
from nbdq.qcow2.audit.damaged_header import read_header_to_check
from nbdq.qcow2.audit.repair import Repair, Repaired, repair_dirty, repair_image
from nbdq.qcow2.features import Autoclear, Incompatible
from nbdq.storage import Data, FileStorage
from tests.qcow2.audit.small import BLOCK, CLUSTER, COPIED, L1, L2, TABLE, put, put_refcount, small_image
from tests.qcow2.minimal import poke, stored


class Recorder(FileStorage):
    """A storage that remembers its writes, and where it was synced."""

    def __init__(self, descriptor: int, path: str) -> None:
        super().__init__(descriptor, path)
        self.log: list[tuple[int, bytes] | None] = []
        """Offset and data of each write; None for a sync."""

    def _pwritev(self, buffers: Sequence[Data], offset: int) -> int:
        self.log.append((offset, b"".join(map(bytes, buffers))))
        return super()._pwritev(buffers, offset)

    def _fdatasync(self) -> None:
        self.log.append(None)
        super()._fdatasync()


def opened(image: bytes | bytearray) -> Recorder:
    return Recorder(os.dup(stored(image).descriptor), "disk.qcow2")


def repair(storage: FileStorage, what: Repair = Repair.ALL) -> Repaired:
    return repair_image(storage, read_header_to_check(storage), what)


def content(storage: FileStorage) -> list[bytes]:
    """What the guest reads from its clusters that are not 0, by the tables and nothing else."""
    header = read_header_to_check(storage)
    mask = 0x00FF_FFFF_FFFF_FE00
    l2 = int.from_bytes(storage.read(header.l1_table_offset, 8), "big") & mask
    entries = [int.from_bytes(storage.read(l2 + 8 * i, 8), "big") & mask for i in range(64)]
    return [storage.read(entry, CLUSTER) for entry in entries if entry]


def _damage(name: str) -> bytearray:
    image = small_image(clusters=9)
    match name:
        case "leak":
            put_refcount(image, 8, 3)
        case "too low":
            put_refcount(image, 6, 0x0001)
            put(image, L2 + 24, COPIED | 6 * CLUSTER)
        case "no block":
            put(image, TABLE, 0)
        case "no refcounts":
            image[BLOCK : BLOCK + 16] = bytes(16)
        case "no table":
            poke(image, refcount_table_offset=1 << 40)
        case "dirty":
            poke(image, incompatible_features=1)
            put_refcount(image, 7, 0)
            put(image, L1, L2)
        case "bitmaps promised":
            poke(image, autoclear_features=1)
            put_refcount(image, 8, 1)
    return image


_DAMAGES = ("leak", "too low", "no block", "no refcounts", "no table", "dirty", "bitmaps promised")


def _crashes(image: bytearray, log: list[tuple[int, bytes] | None]) -> Iterator[bytearray]:
    """The file after each write, and with one of those lost that no sync had saved."""
    for end in range(len(log) + 1):
        synced = max((i for i in range(end) if log[i] is None), default=-1)
        for lost in (None, *range(synced + 1, end)):
            state = bytearray(image)
            for number, event in enumerate(log[:end]):
                if event is None or number == lost:
                    continue
                offset, data = event
                state.extend(bytes(max(offset + len(data) - len(state), 0)))
                state[offset : offset + len(data)] = data
            yield state


@pytest.mark.parametrize("name", _DAMAGES)
def test_a_repair_that_is_interrupted_anywhere_can_be_done_again_and_the_guest_sees_no_difference(name: str) -> None:
    image = _damage(name)
    storage = opened(image)
    before = content(storage)
    assert repair(storage).result.is_clean
    assert content(storage) == before
    log = storage.log
    storage.close()
    states = 0
    for state in _crashes(image, log):
        storage = opened(state)
        assert content(storage) == before
        assert repair(storage).result.is_clean
        assert content(storage) == before
        storage.close()
        states += 1
    assert states > len(log)


def test_the_header_is_switched_by_one_write_within_a_sector_when_all_else_is_durable() -> None:
    storage = opened(_damage("no block"))
    repair(storage)
    switch = next(i for i, event in enumerate(storage.log) if event is not None and event[0] < CLUSTER)
    assert storage.log[switch - 1] is None
    assert storage.log[switch + 1] is None
    offset, data = storage.log[switch] or (0, b"")
    assert offset + len(data) <= 512
    assert all(event is None or event[0] >= 9 * CLUSTER for event in storage.log[:switch])
    storage.close()


def test_repairing_leaks_lowers_refcounts_and_gives_back_the_space() -> None:
    storage = opened(_damage("leak"))
    repaired = repair(storage, Repair.LEAKS)
    assert (repaired.leaks_fixed, repaired.corruptions_fixed) == (1, 0)
    assert repaired.result.is_clean
    assert storage.read(8 * CLUSTER, CLUSTER) == bytes(CLUSTER)
    storage.close()


def test_what_leaked_stays_in_the_file_while_anything_else_is_corrupt() -> None:
    image = _damage("leak")
    put(image, L1, COPIED)  # as if a stray write had hit the L1 table: all of the disk is leaked now
    storage = opened(image)
    assert repair(storage).result.is_clean
    assert storage.read(L2, 4 * CLUSTER) == image[L2 : L2 + 4 * CLUSTER]
    storage.close()


@pytest.mark.parametrize("name", ["no block", "no refcounts", "no table"])
def test_repairing_leaks_leaves_broken_refcounts_alone(name: str) -> None:
    storage = opened(image := _damage(name))
    assert repair(storage, Repair.LEAKS).result.check_errors
    assert storage.read(0, len(image)) == image
    storage.close()


def test_a_refcount_that_was_too_high_leaves_its_cluster_to_the_guest_alone() -> None:
    image = small_image()
    put_refcount(image, 5, 2)
    put(image, L2, 5 * CLUSTER)
    storage = opened(image)
    assert repair(storage, Repair.LEAKS).result.is_clean
    assert int.from_bytes(storage.read(L2, 8), "big") == COPIED | 5 * CLUSTER
    storage.close()


def test_an_l1_table_in_a_cluster_that_is_also_something_else_is_not_written_to() -> None:
    image = small_image()
    poke(image, l1_table_offset=6 * CLUSTER, l1_size=2, size=128 * CLUSTER)
    put(image, 6 * CLUSTER, COPIED)  # flags without a table, elsewhere to be cleared
    put(image, 6 * CLUSTER + 8, COPIED | L2)
    storage = opened(image)
    assert repair(storage).result.corruptions
    assert storage.read(6 * CLUSTER, CLUSTER) == image[6 * CLUSTER : 7 * CLUSTER]
    storage.close()


def test_nothing_is_written_to_a_sound_image() -> None:
    storage = opened(small_image())
    assert repair(storage) == Repaired(check_image(storage, read_header_to_check(storage)), 0, 0)
    assert not storage.log
    storage.close()


def test_bits_that_are_not_true_any_more_are_cleared() -> None:
    storage = opened(small_image(incompatible=Incompatible.DIRTY | Incompatible.CORRUPT, autoclear=Autoclear(1 << 40)))
    repair(storage)
    header = read_header_to_check(storage)
    assert (header.incompatible, header.autoclear) == (Incompatible.NONE, Autoclear.NONE)
    storage.close()


def test_an_image_that_stays_corrupt_keeps_saying_so() -> None:
    image = small_image(incompatible=Incompatible.CORRUPT)
    put(image, L2, COPIED | 5 * CLUSTER | 1 << 57)
    storage = opened(image)
    assert repair(storage).result.corruptions == 1
    assert read_header_to_check(storage).is_corrupt
    storage.close()


def test_a_block_device_gets_its_new_refcounts_behind_what_is_used_or_not_at_all() -> None:
    for clusters, fits in ((16, True), (9, False)):
        image = small_image(clusters=clusters)
        put(image, TABLE, 0)
        storage = opened(image)
        storage.is_block_device = True
        if fits:
            assert repair(storage).result.is_clean
            assert [offset for offset, _ in filter(None, storage.log)] == [9 * CLUSTER, 8 * CLUSTER, 48]
        else:
            with pytest.raises(OSError, match="at the end") as caught:
                repair(storage)
            assert caught.value.errno == errno.ENOSPC
            assert not storage.log
        assert storage.size() == clusters * CLUSTER
        storage.close()


def test_what_lies_past_the_end_keeps_its_refcount_for_it_may_come_back() -> None:
    image = small_image()[: 7 * CLUSTER]
    put_refcount(image, 6, 2)
    storage = opened(image)
    assert repair(storage).result.corruptions == 1
    assert storage.read(BLOCK + 14, 2) == b"\0\1"
    assert storage.read(BLOCK + 12, 2) == b"\0\1"
    storage.close()


def test_refcounts_are_not_rebuilt_where_lost_clusters_would_be() -> None:
    image = small_image()[: 7 * CLUSTER]
    put(image, TABLE, 0)
    storage = opened(image)
    with pytest.raises(CorruptImage, match="entries point past the end of the file"):
        repair(storage)
    assert not storage.log
    storage.close()


def test_a_dirty_image_is_made_writable() -> None:
    storage = opened(_damage("dirty"))
    header = repair_dirty(storage, read_header_to_check(storage))
    assert not header.is_dirty
    assert check_image(storage, header).is_clean
    storage.close()


def test_a_dirty_image_that_cannot_be_mended_stays_dirty() -> None:
    image = _damage("dirty")
    put(image, L2, COPIED | 5 * CLUSTER | 1 << 57)
    storage = opened(image)
    with pytest.raises(CorruptImage, match="1 errors that cannot be repaired"):
        repair_dirty(storage, read_header_to_check(storage))
    assert read_header_to_check(storage).is_dirty
    storage.close()


@pytest.mark.parametrize("order", range(7))
def test_refcounts_are_rebuilt_in_their_width(order: int) -> None:
    image: Any = small_image(refcount_order=order)
    put(image, TABLE, 0)
    storage = opened(image)
    before = content(storage)
    assert repair(storage).result.is_clean
    assert content(storage) == before
    storage.close()

"""Persistent bitmaps: loaded, taken over, stored; and whatever is damaged or interrupted, never believed wrongly."""

import errno
import itertools
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from nbdq.errors import CorruptImage, ExportError, ImageError, InvalidImage, UnsupportedImage
from nbdq.qcow2.bitmaps.directory import read_bitmaps
from nbdq.qcow2.bitmaps.takeover import take_over_bitmaps
from nbdq.qcow2.bitmaps.tracking import DirtyBitmaps
from nbdq.qcow2.features import Autoclear
from nbdq.qcow2.format import Header, build_header, read_header
from nbdq.storage import Data, FileStorage
from tests.qcow2.bitmaps.bitmap_images import AUTO, DISABLED, IN_USE, FakeImage, believed, bitmap, lay_out
from tests.qcow2.minimal import minimal_header, minimal_image, stored

CLUSTER = 1 << 16


def content_of(storage: FileStorage) -> bytes:
    return storage.read(0, storage.size())


def open_written(content: bytes, header: Header) -> tuple[FakeImage, DirtyBitmaps]:
    """The image taken over by a writer."""
    storage = stored(content)
    header, bitmaps, lost = take_over_bitmaps(storage, header)
    assert bitmaps is not None
    assert lost is None
    return FakeImage(storage, header), bitmaps


# Loading.


def test_bits_are_loaded_as_they_are_stored() -> None:
    content, header = lay_out([bitmap("b0", data=b"\x05\x80"), bitmap("b1", bits=9, data=bytes(255) + b"\x80")])
    bitmaps = DirtyBitmaps.load(stored(content), header)
    assert bitmaps.find("b0").packed.tolist() == [5, 0x80]
    assert bitmaps.find("b1").packed.tobytes() == bytes(255) + b"\x80"
    assert bitmaps.find("b2") is None


def test_bits_behind_the_end_of_the_disk_do_not_count() -> None:
    content, header = lay_out([bitmap("b0", data=b"\xff\xff\xff")], size=(9 << 16) + 512)
    assert DirtyBitmaps.load(stored(content), header).find("b0").packed.tolist() == [0xFF, 3]


def table_of(entry: bytes, *, size: int = 1 << 20, count: int = 1, bits: int = 16) -> tuple[bytes, Header]:
    """An image whose only bitmap, "b0", has this table."""
    content, header = lay_out([bitmap("b0", bits=bits)], size=size, cluster_bits=16)
    storage = stored(content)
    (found,) = read_bitmaps(storage, header)
    storage.close()
    damaged = bytearray(content)
    damaged[found.table_offset : found.table_offset + len(entry)] = entry
    assert found.table_size == count
    return bytes(damaged), header


def test_a_table_entry_can_say_that_all_bits_are_set() -> None:
    content, _ = table_of((1).to_bytes(8, "big"), size=(9 << 16) + 512)
    assert believed(content) == {"b0": set(range(10))}


def test_a_table_entry_can_say_that_no_bit_is_set() -> None:
    content, _ = table_of(bytes(8))
    assert believed(content) == {"b0": set()}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (0x2, "bitmap 'b0' has the invalid table entry 0x2 at 0"),
        (0x100, "invalid table entry 0x100 at 0"),
        (CLUSTER * 4 + 1, "invalid table entry 0x40001 at 0"),
        (CLUSTER * 4 + 512, "invalid table entry 0x40200 at 0"),
        (1 << 56, "invalid table entry 0x100000000000000 at 0"),
        (CLUSTER << 20, "bitmap 'b0' has data at 0x1000000000, past the end of the file"),
        ((1 << 56) - CLUSTER, "past the end of the file"),
    ],
)
def test_a_hostile_table_entry_is_refused_in_one_line_that_names_the_bitmap(entry: int, words: str) -> None:
    content, header = table_of(entry.to_bytes(8, "big"))
    with pytest.raises(ImageError) as caught:
        DirtyBitmaps.load(stored(content), header)
    assert words in str(caught.value)
    assert "'b0'" in str(caught.value)
    assert str(caught.value).isprintable()


def test_two_entries_for_one_cluster_are_refused() -> None:
    size = (CLUSTER * 8 << 9) + 512
    content, header = table_of(b"".join([(4 * CLUSTER).to_bytes(8, "big")] * 2), size=size, count=2, bits=9)
    with pytest.raises(CorruptImage, match="bitmap 'b0' has two table entries for one cluster"):
        DirtyBitmaps.load(stored(content), header)


@pytest.mark.parametrize("size", [1 << 20, 0])
def test_a_table_of_another_length_than_the_disk_needs_is_refused(size: int) -> None:
    """QEMU refuses it too ("Could not read bitmap"), and it is never right for an empty disk."""
    content, header = lay_out([bitmap("b0", bits=9)], size=(CLUSTER * 8 << 9) + 512)
    with pytest.raises(InvalidImage, match=r"bitmap 'b0' has a table of 2 entries, but the disk needs"):
        DirtyBitmaps.load(stored(content), replace(header, size=size))


def test_a_table_past_the_end_of_the_file_is_refused() -> None:
    content, header = lay_out([bitmap("b0")])
    storage = stored(content)
    (entry,) = read_bitmaps(storage, header)
    damaged = bytearray(content)
    position = header.bitmaps.directory_offset
    damaged[position : position + 8] = (1 << 40).to_bytes(8, "big")
    with pytest.raises(CorruptImage, match="bitmap 'b0' has a table that goes on past the end of the file"):
        DirtyBitmaps.load(stored(damaged), header)
    assert entry.table_offset


def test_bitmaps_that_need_too_much_memory_are_refused_before_it_is_taken() -> None:
    content, header = lay_out([bitmap("b0"), bitmap("b1")])
    assert DirtyBitmaps.load(stored(content), header, max_memory=4)
    with pytest.raises(UnsupportedImage, match="its bitmaps need more than 3 bytes of memory"):
        DirtyBitmaps.load(stored(content), header, max_memory=3)


# Taking over, marking and storing.


def test_an_inconsistent_bitmap_cannot_be_asked() -> None:
    content, header = lay_out([bitmap("b0", flags=AUTO | IN_USE), bitmap("b1")])
    bitmaps = DirtyBitmaps.load(stored(content), header)
    assert bitmaps.inconsistent == ["b0"]
    with pytest.raises(ExportError, match="Bitmap 'b0' is inconsistent and cannot be used"):
        bitmaps.find("b0")


def test_a_writer_that_dies_leaves_every_bitmap_inconsistent() -> None:
    content, header = lay_out([bitmap("b0"), bitmap("b1", flags=DISABLED), bitmap("b2", flags=IN_USE)])
    image, bitmaps = open_written(content, header)
    bitmaps.mark(0, 512)
    assert believed(content_of(image.storage)) == {"b0": None, "b1": None, "b2": None}


def test_writes_are_stored_in_enabled_bitmaps_only() -> None:
    content, header = lay_out(
        [bitmap("on", data=b"\x02"), bitmap("off", flags=DISABLED, data=b"\x04"), bitmap("bad", flags=AUTO | IN_USE)]
    )
    image, bitmaps = open_written(content, header)
    bitmaps.mark(4 << 16, 512)
    bitmaps.mark(6 << 16, 1 << 17)
    bitmaps.store(image)
    final = content_of(image.storage)
    assert believed(final) == {"on": {1, 4, 6, 7}, "off": {2}, "bad": None}
    entries = {entry.name: entry.flags for entry in read_bitmaps(image.storage, image.header)}
    assert entries == {"on": AUTO, "off": DISABLED, "bad": AUTO | IN_USE}
    assert read_header(image.storage) == image.header


def test_storing_frees_what_it_replaces_and_keeps_what_did_not_change() -> None:
    content, header = lay_out([bitmap("on", data=b"\x02"), bitmap("idle", flags=DISABLED, data=b"\x04")])
    image, bitmaps = open_written(content, header)
    before = {entry.name: entry.table_offset for entry in read_bitmaps(image.storage, header)}
    bitmaps.mark(0, 512)
    bitmaps.store(image)
    after = {entry.name: entry.table_offset for entry in read_bitmaps(image.storage, image.header)}
    assert after["idle"] == before["idle"]
    assert image.freed == {before["on"], before["on"] - CLUSTER}
    assert len(image.allocated) == 2


def test_a_stored_image_can_be_written_to_again() -> None:
    """As at a checkpoint: each time, what is freed is what the time before has allocated."""
    content, header = lay_out([bitmap("b0")])
    image, bitmaps = open_written(content, header)
    for number in range(3):
        bitmaps.mark(number << 16, 512)
        bitmaps.store(image)
        assert believed(content_of(image.storage)) == {"b0": set(range(number + 1))}
        image.header = bitmaps.begin_writing(image.storage, image.header)
        assert believed(content_of(image.storage)) == {"b0": None}
    bitmaps.store(image)
    in_file = {offset for offset in image.allocated if offset not in image.freed}
    assert len(in_file) == 2, "data and table"


def test_an_image_with_worthless_bitmaps_only_is_not_changed_by_storing() -> None:
    content, header = lay_out([bitmap("b0", flags=AUTO | IN_USE)])
    image, bitmaps = open_written(content, header)
    bitmaps.mark(0, 512)
    bitmaps.store(image)
    assert content_of(image.storage) == content


def test_bits_that_are_all_equal_take_no_space() -> None:
    size = (CLUSTER * 8 << 9) * 3
    content, header = lay_out([bitmap("b0", bits=9)], size=size)
    image, bitmaps = open_written(content, header)
    bitmaps.mark(CLUSTER * 8 << 9, CLUSTER * 8 << 9)
    bitmaps.store(image)
    assert len(image.allocated) == 1, "the table"
    assert believed(content_of(image.storage)) == {"b0": set(range(CLUSTER * 8, CLUSTER * 16))}


@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
def test_what_is_stored_is_what_is_loaded(cluster_bits: int) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chosen = random.Random(seed)
    size = chosen.randrange(1, 24 << 20) // 512 * 512 + 512
    fields = {"size": size, "cluster_bits": cluster_bits}
    granularities = [9, 12, 16, 31]
    content, header = lay_out([bitmap(f"b{bits}", bits=bits) for bits in granularities], **fields)
    image, bitmaps = open_written(content, header)
    model: dict[str, set[int]] = {f"b{bits}": set() for bits in granularities}
    for _ in range(3):
        for _ in range(chosen.randrange(30)):
            offset = chosen.randrange(size)
            length = chosen.randrange(1, min(size - offset, 1 << chosen.randrange(1, 22)) + 1)
            bitmaps.mark(offset, length)
            for bits in granularities:
                model[f"b{bits}"].update(range(offset >> bits, (offset + length - 1 >> bits) + 1))
        bitmaps.store(image)
        assert believed(content_of(image.storage)) == model
        bitmaps = DirtyBitmaps.load(image.storage, image.header)
        bitmaps.begin_writing(image.storage, image.header)


# What cannot be kept.


def test_an_image_without_bitmaps_is_left_alone() -> None:
    storage = stored(minimal_image())
    assert take_over_bitmaps(storage, minimal_header()) == (minimal_header(), None, None)
    assert content_of(storage) == bytes(minimal_image())


def test_an_image_of_version_2_has_no_bitmaps_whatever_it_says() -> None:
    """It has no autoclear bits either, so that nothing in the header may be touched (Q71)."""
    content, header = lay_out([bitmap("b0")], version=2)
    content = content[:72] + build_header(header)[72:].ljust(CLUSTER - 72, b"\0") + content[CLUSTER:]
    storage = stored(content)
    found = read_header(storage)
    assert take_over_bitmaps(storage, found) == (found, None, None)
    assert content_of(storage) == content


def test_a_promise_of_bitmaps_that_are_not_there_is_taken_back() -> None:
    """QEMU would corrupt the image with its first write (Q16)."""
    header = minimal_header(autoclear=Autoclear.BITMAPS | 1 << 40)
    storage = stored(minimal_image(header))
    left, bitmaps, lost = take_over_bitmaps(storage, header)
    assert bitmaps is None
    assert lost == "it promises bitmaps, but has no directory of them"
    assert left.autoclear == 1 << 40
    assert read_header(storage).autoclear == 1 << 40


def test_bitmaps_with_data_that_nobody_knows_are_given_up_with_a_reason() -> None:
    content, header = lay_out([bitmap("b0")])
    damaged = bytearray(content)
    directory = header.bitmaps.directory_offset
    damaged[directory : directory + 40] = (
        content[directory : directory + 20] + bytes.fromhex("00000008" + 8 * "00" + "6230") + bytes(6)
    )
    header = replace(header, bitmaps=replace(header.bitmaps, directory_size=40))
    damaged[: len(build_header(header))] = build_header(header)
    storage = stored(damaged)
    left, bitmaps, lost = take_over_bitmaps(storage, header)
    assert bitmaps is None
    assert lost == "a bitmap has 8 bytes of extra data"
    assert left.bitmaps is None
    assert believed(content_of(storage)) == {}, "nobody believes them after the first write"


def test_damaged_bitmaps_are_an_error_and_leave_the_image_alone() -> None:
    content, header = table_of((0x2).to_bytes(8, "big"))
    storage = stored(content)
    with pytest.raises(InvalidImage, match="'b0'"):
        take_over_bitmaps(storage, header)
    assert content_of(storage) == content


def test_a_writer_refuses_bitmaps_whose_clusters_are_something_else() -> None:
    """After the first store they would be free for new data."""
    content, header = lay_out([bitmap("b0", data=b"\x01"), bitmap("b1")])
    assert header.bitmaps is not None
    storage = stored(content)
    first, second = read_bitmaps(storage, header)
    storage.close()
    for place in (
        header.l1_table_offset,
        header.refcount_table_offset,
        header.bitmaps.directory_offset,
        first.table_offset,
        second.table_offset,
        second.table_offset - CLUSTER,
    ):
        damaged = bytearray(content)
        damaged[first.table_offset : first.table_offset + 8] = place.to_bytes(8, "big")
        storage = stored(damaged)
        with pytest.raises(CorruptImage, match=f"share the cluster at {place:#x} with something else"):
            take_over_bitmaps(storage, header)
        assert content_of(storage) == damaged
        storage.close()


# A medium that fails, and crashes.


class Journal(FileStorage):
    """Notes every write and sync since :meth:`begin`; refuses write number ``fail_at``."""

    fail_at = -1

    def begin(self) -> None:
        self.base = content_of(self)
        self.steps: list[tuple[int, bytes] | None] = []

    def _pwritev(self, buffers: Sequence[Data], offset: int) -> int:
        if sum(step is not None for step in self.steps) == self.fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data = b"".join(buffers)
        self.steps.append((offset, data))
        return os.pwrite(self.descriptor, data, offset)

    def _fdatasync(self) -> None:
        self.steps.append(None)


def journal_of(content: bytes) -> Journal:
    descriptor = os.memfd_create("image", os.MFD_CLOEXEC)
    os.pwrite(descriptor, content, 0)
    storage = Journal(descriptor, "disk.qcow2")
    storage.begin()
    return storage


def crashes(journal: Journal, chosen: random.Random) -> Iterator[bytes]:
    """What the medium can hold after a crash: all that was synced, and any sectors of what was written since."""
    durable = bytearray(journal.base)
    waiting: list[tuple[int, bytes]] = []
    for step in [*journal.steps, None]:
        sectors = [part for offset, data in waiting for part in _sectors(offset, data)]
        choices = [[True] * len(sectors), [False] * len(sectors)]
        if len(sectors) <= 6:
            choices = [list(choice) for choice in itertools.product([False, True], repeat=len(sectors))]
        choices += [[chosen.random() < 0.5 for _ in sectors] for _ in range(5)]
        for choice in choices:
            state = bytearray(durable)
            for taken, (offset, part) in zip(choice, sectors, strict=True):
                if taken:
                    _put(state, offset, part)
            yield bytes(state)
        if step is None:
            for offset, data in waiting:
                _put(durable, offset, data)
            waiting = []
        else:
            waiting.append(step)


def _sectors(offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        count = min(512 - (offset + at) % 512, len(data) - at)
        yield offset + at, data[at : at + count]
        at += count


def _put(state: bytearray, offset: int, data: bytes) -> None:
    state.extend(bytes(max(0, offset + len(data) - len(state))))
    state[offset : offset + len(data)] = data


@pytest.mark.parametrize("cluster_bits", [9, 12])
def test_no_crash_makes_anybody_believe_a_bitmap_that_misses_a_write(cluster_bits: int) -> None:
    """R-57: after every crash a bitmap is gone, inconsistent, or says at least what was written before the crash."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chosen = random.Random(seed)
    names = [f"bitmap number {number}" for number in range(10, 34)]  # a directory of two sectors or more …
    names[11] = "bitmap whose name moves the next entry"  # … with an entry whose flags lie in another than its table
    content, header = lay_out(
        [bitmap(name, flags=chosen.choice([AUTO, AUTO, DISABLED]), bits=9, data=b"\x01") for name in names],
        cluster_bits=cluster_bits,
    )
    enabled = {
        name for name, entry in zip(names, read_bitmaps(stored(content), header), strict=True) if entry.flags & AUTO
    }
    old, new = {0}, {0, 1, 2, 100, 101, 102, 2047}

    journal = journal_of(content)
    header, bitmaps, _ = take_over_bitmaps(journal, header)
    assert bitmaps is not None
    for state in crashes(journal, chosen):
        assert all(bits in (None, old) for bits in believed(state).values())
    assert all(bits is None for bits in believed(content_of(journal)).values())

    journal.begin()
    bitmaps.mark(700, 512)
    bitmaps.mark(100 * 512, 1536)
    bitmaps.mark((1 << 20) - 1, 1)
    bitmaps.store(FakeImage(journal, header))
    right = {name: new if name in enabled else old for name in names}
    for state in crashes(journal, chosen):
        for name, bits in believed(state).items():
            assert bits is None or bits == right[name], name
    assert believed(content_of(journal)) == right


def test_the_header_disowns_a_directory_that_is_being_written() -> None:
    """QEMU's order (Q69), and every change of the header lies in one sector (R-54)."""
    content, header = lay_out([bitmap("b0")])
    directory = header.bitmaps.directory_offset
    journal = journal_of(content)
    taken = take_over_bitmaps(journal, header)
    off, on, order = (88, bytes(8)), (88, bytes(7) + b"\x01"), [88, None, directory, None, 88, None]
    assert [step and step[0] for step in journal.steps] == order
    assert (journal.steps[0], journal.steps[4]) == (off, on)
    journal.begin()
    taken.bitmaps.store(FakeImage(journal, taken.header))
    assert [step and step[0] for step in journal.steps] == [None, *order]


def is_full_at(bitmaps: DirtyBitmaps, image: FakeImage) -> bool:
    """Store; whether the medium was full."""
    try:
        bitmaps.store(image)
    except OSError as error:
        return error.errno == errno.ENOSPC
    return False


def test_a_full_medium_leaves_the_bitmaps_in_use_and_nothing_allocated() -> None:
    content, header = lay_out([bitmap("b0"), bitmap("b1")])
    for fail_at in itertools.count():
        journal = journal_of(content)
        header, bitmaps, _ = take_over_bitmaps(journal, header)
        assert bitmaps is not None
        image = FakeImage(journal, header)
        bitmaps.mark(0, 512)
        journal.begin()
        journal.fail_at = fail_at
        if not is_full_at(bitmaps, image):
            break
        assert believed(content_of(journal)) in ({"b0": None, "b1": None}, {})
        unsure = fail_at >= 4  # the directory may have been written
        assert image.freed == (set() if unsure else image.allocated)
        journal.fail_at = -1
        bitmaps.begin_writing(journal, image.header)
        assert believed(content_of(journal)) == {"b0": None, "b1": None}
        bitmaps.mark(1 << 16, 512)
        bitmaps.store(image)
        assert believed(content_of(journal)) == {"b0": {0, 1}, "b1": {0, 1}}
    assert fail_at == 7

"""Bitmaps that come, go and change while the image is written to, and what the file says of them then."""

import errno
from collections.abc import Callable
from dataclasses import replace

import pytest

from nbdq.errors import NotFound, OperationError
from nbdq.qcow2.bitmaps.directory import read_bitmaps
from nbdq.qcow2.bitmaps.takeover import take_over_bitmaps
from nbdq.qcow2.bitmaps.tracking import DirtyBitmaps, Undo
from nbdq.qcow2.features import Autoclear
from nbdq.qcow2.format import Header, read_header
from nbdq.storage import FileStorage
from tests.qcow2.bitmaps.bitmap_images import AUTO, DISABLED, IN_USE, FakeImage, believed, bitmap, lay_out
from tests.qcow2.minimal import minimal_header, minimal_image, stored

CLUSTER = 1 << 16
SIZE = 1 << 20


def content_of(storage: FileStorage) -> bytes:
    return storage.read(0, storage.size())


def empty(header: Header | None = None) -> tuple[FakeImage, DirtyBitmaps]:
    """An image without bitmaps, being written to."""
    header = header or minimal_header(size=SIZE)
    storage = stored(minimal_image(header))
    bitmaps = DirtyBitmaps(storage.path, header, size=header.guest_size)
    bitmaps.begin_writing(storage, header)
    return FakeImage(storage, header), bitmaps


def opened(content: bytes, header: Header) -> tuple[FakeImage, DirtyBitmaps]:
    storage = stored(content)
    taken = take_over_bitmaps(storage, header)
    assert taken.bitmaps is not None
    return FakeImage(storage, taken.header), taken.bitmaps


def dirty(bitmaps: DirtyBitmaps, name: str) -> list[tuple[int, int]]:
    """Ranges that a bitmap marks, in units of 64 KiB; the bitmap stays as it is."""
    bits = bitmaps.usable(name)
    ranges = bits.take(0, max(bits.size, 1))
    for start, length in ranges:
        bits.mark(start, length)
    return [(start >> 16, length >> 16) for start, length in ranges]


# Adding and removing.


def test_a_new_bitmap_marks_from_its_beginning_on() -> None:
    _, bitmaps = empty()
    bitmaps.mark(0, 512)
    bitmaps.add("b0")
    bitmaps.mark(5 << 16, 512)
    bitmaps.add("off", disabled=True)
    bitmaps.mark(7 << 16, 512)
    assert dirty(bitmaps, "b0") == [(5, 1), (7, 1)]
    assert dirty(bitmaps, "off") == []


@pytest.mark.parametrize(("cluster_bits", "granularity"), [(9, 4096), (12, 4096), (16, 65536), (21, 65536)])
def test_the_granularity_follows_the_clusters_as_in_qemu(cluster_bits: int, granularity: int) -> None:
    _, bitmaps = empty(minimal_header(size=SIZE, cluster_bits=cluster_bits))
    bitmaps.add("b0")
    assert [state.granularity for state in bitmaps] == [granularity]


def test_a_persistent_bitmap_is_in_the_file_when_it_is_stored_and_not_before() -> None:
    image, bitmaps = empty()
    bitmaps.add("b0", persistent=True)
    bitmaps.add("transient")
    bitmaps.add("off", persistent=True, disabled=True)
    bitmaps.mark(3 << 16, 512)
    assert believed(content_of(image.storage)) == {}
    bitmaps.store(image)
    assert believed(content_of(image.storage)) == {"b0": {3}, "off": set()}
    header = read_header(image.storage)
    assert header == image.header
    assert Autoclear.BITMAPS in header.autoclear
    assert {each.name: each.flags for each in read_bitmaps(image.storage, header)} == {"b0": AUTO, "off": DISABLED}


def test_a_directory_that_grows_moves_and_frees_its_old_place() -> None:
    content, header = lay_out([bitmap("b0", data=b"\x01")])
    assert header.bitmaps is not None
    image, bitmaps = opened(content, header)
    bitmaps.add("b1", persistent=True)
    bitmaps.mark(1 << 16, 512)
    bitmaps.store(image)
    assert believed(content_of(image.storage)) == {"b0": {0, 1}, "b1": {1}}
    assert header.bitmaps.directory_offset in image.freed
    assert image.header.bitmaps is not None
    assert image.header.bitmaps.directory_offset in image.allocated - image.freed


def test_the_last_bitmap_takes_the_directory_along() -> None:
    content, header = lay_out([bitmap("b0", data=b"\x01")])
    assert header.bitmaps is not None
    image, bitmaps = opened(content, header)
    (entry,) = read_bitmaps(image.storage, header)
    bitmaps.remove("b0")
    bitmaps.store(image)
    found = read_header(image.storage)
    assert (found.bitmaps, found.autoclear) == (None, Autoclear.NONE)
    directory = header.bitmaps.directory_offset
    assert image.freed == {entry.table_offset, entry.table_offset - CLUSTER, directory}


def test_a_removed_bitmap_is_gone_from_the_file_before_anything_is_stored() -> None:
    content, header = lay_out([bitmap("b0"), bitmap("b1"), bitmap("bad", flags=AUTO | IN_USE)])
    image, bitmaps = opened(content, header)
    bitmaps.remove("b0")
    assert believed(content_of(image.storage)) == {"b0": None, "b1": None, "bad": None}, "it can still be undone"
    bitmaps.forget_removed(image)
    assert believed(content_of(image.storage)) == {"b1": None, "bad": None}
    bitmaps.mark(0, 512)
    bitmaps.store(image)
    assert believed(content_of(image.storage)) == {"b1": {0}, "bad": None}


def test_forgetting_without_anything_removed_does_not_touch_the_file() -> None:
    content, header = lay_out([bitmap("b0")])
    image, bitmaps = opened(content, header)
    before = content_of(image.storage)
    bitmaps.add("b1", persistent=True)
    bitmaps.forget_removed(image)
    assert content_of(image.storage) == before


def test_a_bitmap_of_the_same_name_as_a_removed_one_begins_clean() -> None:
    content, header = lay_out([bitmap("b0", data=b"\xff")])
    image, bitmaps = opened(content, header)
    bitmaps.remove("b0")
    bitmaps.add("b0", persistent=True)
    bitmaps.mark(9 << 16, 512)
    bitmaps.store(image)
    assert believed(content_of(image.storage)) == {"b0": {9}}


def test_an_inconsistent_bitmap_can_be_removed_with_its_clusters_and_nothing_else() -> None:
    content, header = lay_out([bitmap("bad", flags=AUTO | IN_USE, data=b"\x01"), bitmap("b1", data=b"\x02")])
    image, bitmaps = opened(content, header)
    bad, _ = read_bitmaps(image.storage, header)
    actions: list[Callable[[str], Undo]] = [bitmaps.clear, bitmaps.enable, bitmaps.disable]
    for action in actions:
        with pytest.raises(OperationError, match="Bitmap 'bad' is inconsistent and cannot be used; remove it with"):
            action("bad")
    with pytest.raises(OperationError, match="inconsistent"):
        bitmaps.merge("bad", [])
    bitmaps.remove("bad")
    bitmaps.forget_removed(image)
    assert {bad.table_offset, bad.table_offset - CLUSTER} < image.freed
    bitmaps.store(image)
    assert believed(content_of(image.storage)) == {"b1": {1}}


def test_an_inconsistent_bitmap_whose_table_makes_no_sense_leaks() -> None:
    content, header = lay_out([bitmap("bad", flags=AUTO | IN_USE), bitmap("b1", data=b"\x02")])
    storage = stored(content)
    bad, good = read_bitmaps(storage, header)
    damaged = bytearray(content)
    damaged[bad.table_offset : bad.table_offset + 8] = (good.table_offset).to_bytes(8, "big")
    image, bitmaps = opened(bytes(damaged), header)
    bitmaps.remove("bad")
    bitmaps.forget_removed(image)
    assert good.table_offset not in image.freed
    bitmaps.store(image)
    assert believed(content_of(image.storage)) == {"b1": {1}}


def test_a_full_medium_keeps_a_removed_bitmap_in_the_file_until_the_image_is_closed() -> None:
    content, header = lay_out([bitmap("b0"), bitmap("b1", data=b"\x02")])
    image, bitmaps = opened(content, header)
    bitmaps.remove("b0")
    full = FakeImage(image.storage, image.header)
    full.allocate_metadata = refuse  # type: ignore[method-assign]
    with pytest.raises(OSError, match="full"):
        bitmaps.forget_removed(full)
    assert believed(content_of(image.storage)) == {"b0": None, "b1": None}
    assert [state.name for state in bitmaps] == ["b1"]
    bitmaps.store(image)
    assert believed(content_of(image.storage)) == {"b1": {1}}


# Refusals.


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("", {}, "Bitmap name cannot be empty"),
        ("b0", {}, "Bitmap already exists: b0"),
        ("x" * 1024, {}, "Bitmap name too long: x+…"),
        ("ü" * 512, {}, "Bitmap name too long: "),
        ("b1", {"granularity_bits": 8}, "Granularity is under minimum"),
        ("b1", {"granularity_bits": 32}, "Granularity exceeds maximum"),
    ],
)
def test_what_qemu_refuses_is_refused_in_its_words(name: str, options: dict[str, int], words: str) -> None:
    _, bitmaps = empty()
    bitmaps.add("b0")
    with pytest.raises(OperationError, match=words):
        bitmaps.add(name, **options)
    assert [state.name for state in bitmaps] == ["b0"]


def test_version_2_cannot_keep_bitmaps_but_have_them() -> None:
    _, bitmaps = empty(minimal_header(size=SIZE, version=2, header_length=72))
    with pytest.raises(OperationError, match=r"Can't make bitmap 'b0' persistent in '.*': Cannot store dirty bitmaps"):
        bitmaps.add("b0", persistent=True)
    bitmaps.add("b0")
    bitmaps.mark(0, 512)
    assert dirty(bitmaps, "b0") == [(0, 1)]


@pytest.mark.parametrize(
    "header",
    [
        {"data_file_name": "x" * 380},
        {"cluster_bits": 9, "backing_name": "x" * 350, "backing_format": "qcow2"},
    ],
)
def test_a_header_without_room_for_a_directory_is_found_out_before_the_end(header: dict[str, object]) -> None:
    """Else the bitmap would be lost when the image is closed."""
    _, bitmaps = empty(minimal_header(size=SIZE, **header))
    with pytest.raises(
        OperationError, match=r"Can't make bitmap 'b0' persistent in '.*': Not enough space in the header"
    ):
        bitmaps.add("b0", persistent=True)


def test_bits_that_would_need_too_much_memory_are_refused() -> None:
    _, bitmaps = empty(minimal_header(size=2 << 40))
    bitmaps.add("b0", granularity_bits=9)  # all of the memory
    with pytest.raises(OperationError, match="Too much space will be occupied by the bitmap"):
        bitmaps.add("b1")


def test_a_bitmap_that_is_not_there_is_said_not_to_be() -> None:
    _, bitmaps = empty()
    changes: list[Callable[[str], Undo]] = [bitmaps.remove, bitmaps.clear, bitmaps.enable, bitmaps.disable]
    for change in [*changes, lambda name: bitmaps.merge(name, [])]:
        with pytest.raises(NotFound, match="Dirty bitmap 'b0' not found"):
            change("b0")


def test_a_merge_of_disks_of_different_sizes_changes_nothing() -> None:
    _, bitmaps = empty()
    _, others = empty(minimal_header(size=2 * SIZE))
    bitmaps.add("b0")
    bitmaps.add("b1")
    others.add("b0")
    bitmaps.mark(0, 512)
    bitmaps.clear("b0")
    with pytest.raises(OperationError, match="Bitmaps are of different sizes"):
        bitmaps.merge("b0", [bitmaps.usable("b1"), others.usable("b0")])
    assert dirty(bitmaps, "b0") == []


# Undoing.


@pytest.mark.parametrize(
    "change",
    [
        lambda bitmaps: bitmaps.add("new", persistent=True),
        lambda bitmaps: bitmaps.remove("on"),
        lambda bitmaps: bitmaps.remove("bad"),
        lambda bitmaps: bitmaps.clear("on"),
        lambda bitmaps: bitmaps.enable("off"),
        lambda bitmaps: bitmaps.disable("on"),
        lambda bitmaps: bitmaps.merge("on", [bitmaps.usable("off")]),
    ],
    ids=["add", "remove", "remove inconsistent", "clear", "enable", "disable", "merge"],
)
def test_a_change_that_is_undone_leaves_no_trace(change: Callable[[DirtyBitmaps], Undo]) -> None:
    content, header = lay_out(
        [bitmap("on", data=b"\x02"), bitmap("bad", flags=AUTO | IN_USE), bitmap("off", flags=DISABLED, data=b"\x04")]
    )
    image, bitmaps = opened(content, header)
    before = list(bitmaps)
    change(bitmaps)(bitmaps)
    assert list(bitmaps) == before
    bitmaps.mark(5 << 16, 512)
    bitmaps.store(image)
    assert believed(content_of(image.storage)) == {"on": {1, 5}, "bad": None, "off": {2}}
    assert [each.name for each in read_bitmaps(image.storage, image.header)] == ["on", "bad", "off"]


def test_a_change_can_be_undone_after_the_image_was_opened_anew() -> None:
    content, header = lay_out([bitmap("a", data=b"\x02"), bitmap("b", data=b"\x04"), bitmap("c", data=b"\x08")])
    image, before = opened(content, header)
    undo = [
        before.add("new", persistent=True),
        before.add("transient"),
        before.remove("a"),
        before.disable("b"),
        before.clear("b"),
        before.merge("c", [before.usable("b")]),
    ]
    before.store(image)
    taken = take_over_bitmaps(image.storage, image.header)
    assert taken.bitmaps is not None
    after = taken.bitmaps
    after.adopt(before)
    for each in reversed(undo):
        each(after)
    after.mark(5 << 16, 512)
    after.store(image)
    assert believed(content_of(image.storage)) == {"a": {1, 5}, "b": {2, 5}, "c": {3, 5}}


# Sizes, jobs, and images that are opened anew.


@pytest.mark.parametrize("size", [SIZE // 2 + 512, 3 * SIZE])
def test_bitmaps_of_a_disk_of_another_size_can_be_stored_and_loaded(size: int) -> None:
    content, header = lay_out([bitmap("b0", bits=9, data=b"\x01"), bitmap("off", flags=DISABLED, data=b"\xff\xff")])
    image, bitmaps = opened(content, header)
    bitmaps.add("new", persistent=True)
    tracker = bitmaps.track(16)
    bitmaps.resize(size)
    image.header = minimal_header_of(image.header, size)
    bitmaps.mark(size - 512, 512)
    last = size - 1 >> 16
    assert tracker.take(0, size) == [(last << 16, size - (last << 16))]
    bitmaps.store(image)
    left = {granule for granule in range(16) if granule << 16 < size}
    found = believed(content_of(image.storage))
    assert found == {"b0": {0, size - 1 >> 9}, "off": left, "new": {last}}


def minimal_header_of(header: Header, size: int) -> Header:
    """The header with another size, in the file's memory only; the L1 table of these images is long enough."""
    return replace(header, size=size)


def test_an_inconsistent_bitmap_keeps_the_disk_at_its_size() -> None:
    content, header = lay_out([bitmap("bad", flags=AUTO | IN_USE)])
    _, bitmaps = opened(content, header)
    with pytest.raises(OSError, match="'bad' is inconsistent and cannot be resized") as caught:
        bitmaps.resize(2 * SIZE)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_jobs_track_beside_the_bitmaps() -> None:
    image, bitmaps = empty()
    tracker = bitmaps.track(12)
    bitmaps.mark(8192, 1)
    assert tracker.take(0, SIZE) == [(8192, 4096)]
    bitmaps.mark(0, 1)
    bitmaps.untrack(tracker)
    bitmaps.untrack(tracker)
    bitmaps.mark(4096, 1)
    assert tracker.take(0, SIZE) == [(0, 4096)]
    assert list(bitmaps) == []
    bitmaps.store(image)
    assert believed(content_of(image.storage)) == {}


def test_an_image_that_is_opened_anew_goes_on_with_its_bits() -> None:
    content, header = lay_out([bitmap("b0", data=b"\x01"), bitmap("bad", flags=AUTO | IN_USE)])
    image, before = opened(content, header)
    before.add("transient")
    before.add("new", persistent=True)
    tracker = before.track(16)
    before.mark(2 << 16, 512)
    shown = [before.usable(name) for name in ("b0", "transient", "new")]
    before.store(image)

    taken = take_over_bitmaps(image.storage, image.header)
    assert taken.bitmaps is not None
    after = taken.bitmaps
    after.adopt(before)
    assert [after.usable(name) for name in ("b0", "transient", "new")] == shown, "the same objects, for exports"
    after.mark(4 << 16, 512)
    assert dirty(after, "transient") == [(2, 1), (4, 1)]
    assert tracker.take(0, SIZE) == [(2 << 16, 1 << 16), (4 << 16, 1 << 16)]
    after.store(image)
    assert believed(content_of(image.storage)) == {"b0": {0, 2, 4}, "bad": None, "new": {2, 4}}


def test_bits_that_could_not_be_stored_survive_in_memory() -> None:
    content, header = lay_out([bitmap("b0", data=b"\x01")])
    image, before = opened(content, header)
    before.mark(2 << 16, 512)
    full = FakeImage(image.storage, image.header)
    full.allocate_metadata = refuse  # type: ignore[method-assign]
    with pytest.raises(OSError, match="full"):
        before.store(full)
    taken = take_over_bitmaps(image.storage, image.header)
    assert taken.bitmaps is not None
    assert taken.bitmaps.inconsistent == ["b0"]
    taken.bitmaps.adopt(before)
    taken.bitmaps.store(image)
    assert believed(content_of(image.storage)) == {"b0": {0, 2}}


def refuse(cluster_count: int) -> int:
    raise OSError(errno.ENOSPC, "full")

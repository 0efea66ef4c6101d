"""What has gone wrong when others wrote QCOW2 images, each as a test of the same situation here.

The list is that of ``qcow2.md`` 5.2 and ``models.md`` 1.4; "CH" are issues and pull requests of cloud-hypervisor.
"""

import errno
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from nbdq.block import WritableBlockDevice
from nbdq.errors import ImageError
from nbdq.qcow2.features import Compatible
from nbdq.qcow2.format import read_header
from nbdq.storage import FileStorage
from tests.random.faults import Fault, FaultyFiles
from tests.support import oracles
from tests.support.images import Image, Layer, Variant, build, content
from tests.support.observing import observed
from tests.support.tools import execute, requires, run
from tests.support.writing import contents, writable_disk

pytestmark = requires("qemu-img", "qemu-io")

K = 1 << 10
CLUSTER = 64 * K


def make(directory: Path, *layers: Layer) -> Image:
    return build(Variant("regression", layers), directory)


def small(*steps: str, size: str = "64c", options: str = "cluster_size=4k") -> Layer:
    return Layer(size, steps, options)


def write(disk: WritableBlockDevice, offset: int, length: int, *, seed: int = 9) -> bytes:
    """Write contents of our own; return them."""
    data = content(seed << 20, offset, length)
    disk.write(offset, memoryview(data))
    return data


def read(disk: WritableBlockDevice, offset: int, length: int) -> bytes:
    view = memoryview(bytearray(length))
    disk.read_into(offset, view)
    return bytes(view)


def failure(call: Callable[[], object]) -> int:
    """The errno that ``call`` fails with; 0 if it does not."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


def check(image: Image) -> None:
    """QEMU finds neither damage nor leaks."""
    done = execute("qemu-img", "check", "-f", "qcow2", image.top)
    assert done.returncode == 0, done.stdout + done.stderr


def shown(image: Image, *options: str) -> bytes:
    """What QEMU reads."""
    raw = image.directory / "shown.raw"
    run("qemu-img", "convert", *options, "-O", "raw", image.top, raw)
    return raw.read_bytes()


def host_offset(image: Image, guest_offset: int) -> int:
    """Where QEMU finds a guest cluster in the file."""
    for extent in oracles.map_extents(image):
        if extent["start"] <= guest_offset < extent["start"] + extent["length"]:
            return int(extent["offset"] + guest_offset - extent["start"])
    raise AssertionError("nowhere")


# The allocator.


def test_live_tables_are_never_handed_out_however_often_they_are_copied(tmp_path: Path) -> None:
    """CH #8606: guest data was written over L2 tables that were still in use."""
    steps = [step for name in "abc" for step in ("write 0 40c", f"snapshot {name}")]
    image = make(tmp_path, small(*steps, size="2000c", options="cluster_size=512,refcount_bits=16"))
    before = {name: shown(image, "-l", name) for name in "abc"}
    with writable_disk(image) as disk:
        for cluster in range(0, 2000, 7):
            write(disk, cluster * 512, 512)
            if cluster % 5 == 0:
                disk.discard(cluster * 512, 512 * 3)
                disk.flush()
        expected = contents(disk)
    check(image)
    assert shown(image) == expected
    for name in "abc":
        assert shown(image, "-l", name) == before[name]


def test_rewriting_and_flushing_for_ever_does_not_make_a_file_grow(tmp_path: Path) -> None:
    """CH #8597: each flush lost a cluster of metadata until the disk was reopened."""
    image = make(tmp_path, small("write 0 16c"))
    sizes = []
    with writable_disk(image) as disk:
        for turn in range(60):
            disk.discard(0, 32 * K)
            disk.flush()
            write(disk, 0, 32 * K, seed=turn)
            write(disk, 40 * K, 512, seed=turn)
            disk.flush()
            sizes.append(image.top.stat().st_size)
    assert max(sizes) == max(sizes[:3]), "the file grows"
    check(image)


def test_a_cluster_is_not_punched_after_it_was_given_to_somebody_else(tmp_path: Path) -> None:
    """CH #8624: a delayed punch erased a cluster that had become an L2 table."""
    image = make(tmp_path, small("write 0 32c"))
    with writable_disk(image) as disk:
        writers: list[threading.Thread] = []

        def write_meanwhile(offset: int, length: int) -> None:
            if len(writers) < 4:
                place = (40 + 4 * len(writers)) * 4 * K
                writers.append(threading.Thread(target=write, args=(disk, place, 16 * K)))
                writers[-1].start()
                writers[-1].join(0.1)  # it may have to wait for the punch, or go elsewhere

        with observed(on_punch=write_meanwhile):
            for start in range(0, 32, 8):
                disk.discard(start * 4 * K, 32 * K)
                disk.flush()
        for writer in writers:
            writer.join()
        assert writers, "nothing was punched"
        for number in range(len(writers)):
            place = (40 + 4 * number) * 4 * K
            assert read(disk, place, 16 * K) == content(9 << 20, place, 16 * K)
    check(image)


def test_nothing_is_punched_or_used_again_before_the_entry_that_named_it_is_durably_gone(tmp_path: Path) -> None:
    """QEMU and qcow2-rs: after a crash a discarded cluster shows data of another one (R-50, W2)."""
    image = make(tmp_path, small("write 0 8c"))
    freed = range(host_offset(image, 0), host_offset(image, 0) + 32 * K)
    l2_offset = int.from_bytes(image.top.read_bytes()[3 * 4 * K :][:8], "big") & ~(1 << 63)
    story: list[str] = []

    def on_write(offset: int, length: int) -> None:
        assert offset not in freed or story[-2:] == ["entries", "sync"], "used before the entries are durable"
        if offset // 4096 == l2_offset // 4096:
            story.append("entries")

    with (
        writable_disk(image) as disk,
        observed(
            on_write=on_write,
            on_punch=lambda offset, length: story.append("punch"),
            on_sync=lambda: story.append("sync"),
        ),
    ):
        disk.discard(0, 32 * K)
        write(disk, 128 * K, 32 * K)
        assert "punch" not in story
        disk.flush()
        assert "punch" not in story[: story.index("entries") + 1]
    check(image)


@pytest.mark.parametrize("steps", [(), ("write 0 20c", "snapshot one")], ids=("new", "snapshot"))
def test_a_write_that_finds_the_medium_full_leaves_no_table_that_can_be_allocated_twice(
    steps: tuple[str, ...], tmp_path: Path
) -> None:
    """CH #8748, #8637: after ENOSPC a live L2 table had the refcount zero, or stood on the free list."""
    for at in range(1, 12):
        (tmp_path / str(at)).mkdir()
        image = make(tmp_path / str(at), small(*steps, size="600c", options="cluster_size=512"))
        with writable_disk(image) as disk:
            files = FaultyFiles(Fault.FULL, at)
            with files.installed():
                for place in range(0, 600, 60):
                    assert failure(lambda place=place: write(disk, place * 512, 2048)) in (0, errno.ENOSPC)
                    assert failure(disk.flush) in (0, errno.ENOSPC)
            for place in range(0, 600, 30):  # there is room again
                write(disk, place * 512, 1024, seed=10)
            expected = contents(disk)
        check(image)
        assert shown(image) == expected


@pytest.mark.parametrize("cluster", range(4))
def test_the_first_clusters_are_not_overwritten_although_the_refcounts_call_them_free(
    cluster: int, tmp_path: Path
) -> None:
    """CH #8358: guest data was found in the header of the image (O4)."""
    image = make(tmp_path, small(f"poke {2 * 4 * K + 2 * cluster} 2 0"))
    head = image.top.read_bytes()[: 16 * K]
    with suppress(OSError, ImageError), writable_disk(image) as disk:  # a refusal is as good
        write(disk, 0, 40 * K)
    now = image.top.read_bytes()[: 16 * K]
    assert now[:72] == head[:72], "the header is lost"
    data = content(9 << 20, 0, 40 * K)
    assert not any(data[at : at + 512] in now for at in range(0, 40 * K, 512)), "guest data among the metadata"


@pytest.mark.parametrize("target", [1, 2, 3, 4], ids=("refcount-table", "block", "l1", "l2"))
def test_an_entry_that_names_metadata_does_not_make_the_guest_overwrite_it(target: int, tmp_path: Path) -> None:
    """qcow2-lib has no overlap checks (O1-O4): such an image is marked corrupt, and not written to."""
    image = make(tmp_path, small("write 0 1c", "write 2c 1c"))
    l2_offset = int.from_bytes(image.top.read_bytes()[3 * 4 * K :][:8], "big") & ~(1 << 63)
    host = l2_offset if target == 4 else target * 4 * K
    with image.top.open("r+b") as file:
        file.seek(l2_offset)
        file.write((1 << 63 | host).to_bytes(8, "big"))
    before = image.top.read_bytes()
    with pytest.raises((OSError, ImageError)), writable_disk(image) as disk:
        write(disk, 0, 4 * K)
    after = image.top.read_bytes()
    assert after[104:] == before[104:], "something but the header's flags has changed"


# Copy on write.


def test_threads_that_write_to_the_same_clusters_of_an_overlay_lose_nothing(tmp_path: Path) -> None:
    """CH #8621, #7660: several queues over a backing file damaged each other's writes."""
    image = make(tmp_path, small("write 0 64c"), small("write 3c 2c"))
    expected = bytearray(shown(image))
    with writable_disk(image) as disk:

        def sectors(number: int) -> Iterator[int]:
            return iter(range(number * 512, 256 * K, 2 * K))

        def work(number: int) -> None:
            for offset in sectors(number):
                write(disk, offset, 512, seed=number)
                if offset % (32 * K) == number * 512:
                    disk.flush()

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        for number in range(4):
            for offset in sectors(number):
                expected[offset : offset + 512] = content(number << 20, offset, 512)
        assert contents(disk) == expected
    check(image)
    assert shown(image) == expected


@pytest.mark.parametrize("unmap", [True, False])
def test_zeros_hide_the_base_and_stay_when_a_part_is_written(unmap: bool, tmp_path: Path) -> None:
    """CH #8245: write zeroes uncovered the backing file's data, and so did a small write afterwards."""
    image = make(tmp_path, small("write 0 64c"), small("write 0 2c"))
    with writable_disk(image) as disk:
        disk.zero(0, 16 * K, unmap=unmap)
        assert read(disk, 0, 16 * K) == bytes(16 * K)
        for cluster in range(4):
            data = write(disk, cluster * 4 * K + 512, 512)
            assert read(disk, cluster * 4 * K, 4 * K) == bytes(512) + data + bytes(3 * K)
    check(image)
    assert shown(image)[: 4 * K] == bytes(512) + content(9 << 20, 512, 512) + bytes(3 * K)


def test_zeros_keep_their_space_unless_the_client_wants_it_back(tmp_path: Path) -> None:
    """CH #7859: the unmap flag of write zeroes was not looked at."""
    image = make(tmp_path, small("write 0 8c"))
    with writable_disk(image) as disk:
        disk.zero(0, 16 * K, unmap=False)
        disk.zero(16 * K, 16 * K, unmap=True)
    kept, given_back = oracles.map_extents(image)[:2]
    assert (kept["length"], kept["zero"], "offset" in kept) == (16 * K, True, True)
    assert (given_back["zero"], "offset" in given_back) == (True, False)
    check(image)


def test_a_cluster_in_which_a_short_base_ends_is_filled_up_with_zeros(tmp_path: Path) -> None:
    """CH #7678, dissect: behind a shorter backing file there are zeros, and no error."""
    image = make(tmp_path, small("write 0 3c+512", size="3c+512"), small(size="8c"))
    base = shown(image)
    with writable_disk(image) as disk:
        data = write(disk, 12 * K + 2 * K, 512)
        assert read(disk, 12 * K, 4 * K) == base[12 * K : 14 * K] + data + bytes(4 * K - 2 * K - 512)
    check(image)


def test_readers_see_the_old_contents_until_the_new_ones_are_written(tmp_path: Path) -> None:
    """CH and its COW path: the entry was published before the data was there (``models.md`` 1.4)."""
    image = make(tmp_path, small("write 0 64c"), small())
    seen: list[bytes] = []
    with writable_disk(image) as disk:
        old = read(disk, 0, 4 * K)
        with observed(on_write=lambda offset, length: seen.append(read(disk, 0, 4 * K))):
            new = write(disk, 0, 4 * K)
        assert seen
        assert set(seen) <= {old, new}
        assert seen[0] == old
        assert read(disk, 0, 4 * K) == new


def test_neighbours_of_a_compressed_cluster_survive_when_it_is_overwritten(tmp_path: Path) -> None:
    """QEMU 7.2 may give the host cluster of packed neighbours to somebody else (Q54, K4)."""
    image = make(tmp_path, small("compress 0 32c"))
    expected = bytearray(shown(image))
    with writable_disk(image) as disk:
        for cluster in range(0, 32, 2):
            start = cluster * 4 * K
            expected[start : start + 512] = write(disk, start, 512)
            disk.flush()
        disk.discard(4 * K, 4 * K)
        expected[4 * K : 8 * K] = bytes(4 * K)
        disk.flush()
        expected[160 * K : 224 * K] = write(disk, 160 * K, 64 * K)
        disk.flush()
        assert contents(disk) == expected
    check(image)
    assert shown(image) == expected


def test_a_preallocated_zero_cluster_does_not_show_what_was_in_it(tmp_path: Path) -> None:
    """K5: the rest of the cluster is filled up with zeros when a part is written."""
    image = make(tmp_path, small("write 0 4c", "zero 0 4c"))
    with writable_disk(image) as disk:
        data = write(disk, 4 * K + 512, 512)
        assert read(disk, 0, 16 * K) == bytes(4 * K + 512) + data + bytes(16 * K - 5 * K)
    check(image)


# Order and durability.


def test_a_sync_lies_between_refcounts_and_the_entries_that_need_them(tmp_path: Path) -> None:
    """imago orders its caches without a barrier between them (W1, R-51)."""
    image = make(tmp_path, small())
    story: list[str] = []
    names = {0: "header", 1: "refcount table", 2: "refcounts", 3: "entries"}
    with (
        writable_disk(image) as disk,
        observed(
            on_write=lambda offset, length: story.append(names.get(offset // 4096, "new")),
            on_sync=lambda: story.append("sync"),
        ),
    ):
        write(disk, 0, 8 * K)
        assert "entries" not in story
        disk.flush()
        assert story.index("refcounts") < story.index("sync") < story.index("entries")
        assert story[-1] == "sync"
        assert "sync" in story[story.index("entries") :]


def test_after_a_failed_sync_nothing_is_ever_said_to_be_durable(tmp_path: Path) -> None:
    """nbd-server ignores it, and a second fsync succeeds without having saved anything (R-63)."""
    image = make(tmp_path, small())
    with suppress(OSError), writable_disk(image) as disk:
        data = write(disk, 0, 4 * K)
        with FaultyFiles(Fault.BROKEN, 1).installed():
            assert failure(disk.flush) == errno.EIO
        assert failure(disk.flush) == errno.EIO
        assert failure(disk.flush) == errno.EIO
        assert failure(lambda: write(disk, 0, 4 * K)) == errno.EIO
        assert read(disk, 0, 4 * K) == data


# What else is in the file.


def test_entries_of_clusters_that_have_one_owner_say_so(tmp_path: Path) -> None:
    """CH #7526: L1 entries were written without the COPIED flag (Q37)."""
    image = make(tmp_path, small("write 0 8c", "snapshot one"))
    with writable_disk(image) as disk:
        write(disk, 0, 4 * K)
        write(disk, 200 * K, 4 * K)
    check(image)  # which reports every flag that is not exact
    data = image.top.read_bytes()
    l1_offset = int.from_bytes(data[40:48], "big")
    assert int.from_bytes(data[l1_offset : l1_offset + 8], "big") >> 63 == 1


def test_writing_keeps_the_promises_of_the_header_that_it_can_keep(tmp_path: Path) -> None:
    """CH #6354 switched lazy refcounts off; qcow2-rs and others drop extensions that they do not know (Q15)."""
    image = make(tmp_path, small("write 0 1c", "poke 88 8 0x8000", options="cluster_size=4k,lazy_refcounts=on"))
    with writable_disk(image) as disk:
        write(disk, 0, 512)
    storage = FileStorage.open(str(image.top))
    header = read_header(storage)
    storage.close()
    assert Compatible.LAZY_REFCOUNTS in header.compatible
    assert int(header.autoclear) == 0, "a feature that we do not know cannot be true any more"
    check(image)


@requires("qemu-nbd", "nbdinfo")
def test_a_dirty_bitmap_that_is_believed_afterwards_knows_of_every_write(tmp_path: Path) -> None:
    """qcow2-rs leaves bitmaps marked valid that miss its own writes: silently wrong incremental backups (R-57)."""
    image = make(tmp_path, Layer("64c", ("write 0 64c",)))
    run("qemu-img", "bitmap", "--add", "-f", "qcow2", image.top, "backup")
    with writable_disk(image) as disk:
        write(disk, 3 * CLUSTER, 512)
        disk.zero(10 * CLUSTER, CLUSTER, unmap=True)
        disk.discard(20 * CLUSTER, CLUSTER)
        write(disk, 60 * CLUSTER + 512, CLUSTER)
    served = oracles.qemu_nbd(image, "-B", "backup")
    dirty = oracles.block_status(served, "qemu:dirty-bitmap:backup")
    clusters = {
        cluster
        for status in dirty
        if status.value
        for cluster in range(status.offset // CLUSTER, -(-(status.offset + status.length) // CLUSTER))
    }
    assert clusters == {3, 10, 20, 60, 61}
    check(image)


def test_a_backing_name_outside_the_first_cluster_is_refused(tmp_path: Path) -> None:
    """CH #8261: guest data could have become the name of a file (V23)."""
    image = make(tmp_path, small("poke 8 8 4096", "poke 16 4 8"))
    with pytest.raises(ImageError), writable_disk(image):
        pass


# The far ends of things.


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ("8T", "cluster_size=64k"),  # an L1 table of two clusters
        ("64G", "cluster_size=512"),  # of 32768 clusters
        ("32k", "cluster_size=512"),  # exactly one L2 table
        ("32k+512", "cluster_size=512"),  # and one entry more
    ],
)
def test_the_last_sector_of_a_disk_can_be_written_wherever_its_tables_end(
    size: str, options: str, tmp_path: Path
) -> None:
    """qcow2-lib wrote an L1 table over the refcount table beyond 4 TiB; dissect's L1 is one entry short."""
    image = make(tmp_path, Layer(size, ("write 0 512",), options))
    with writable_disk(image) as disk:
        data = write(disk, disk.size - 512, 512)
        disk.flush()
        assert read(disk, disk.size - 512, 512) == data
        assert read(disk, 0, 512) == content(0, 0, 512)
    check(image)

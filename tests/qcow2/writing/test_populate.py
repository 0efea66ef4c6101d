"""Copying what shows through into the image, beside the guest: nothing changes but where it comes from (4.8)."""

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdq.qcow2.entries import COMPRESSED, OFFSET_MASK, READS_ZERO
from tests.support.engine import Call, Engine, K, M, check, make_image, make_raw, shown
from tests.support.images import content
from tests.support.tools import execute, requires, run

pytestmark = requires("qemu-img", "qemu-io")

CLUSTER = 4 * K
SIZE = 1 * M + 2560
#: The base ends before the disk does, inside a cluster; half of it is holes.
BASE = 900 * K + 512
RANGES = ((0, 100 * K), (300 * K, 5000), (600 * K, 300 * K + 512))

VARIANTS: dict[str, dict[str, Any]] = {
    "v3": {"cluster_size": CLUSTER},
    "v2": {"cluster_size": CLUSTER, "version": 2},
    "512": {"cluster_size": 512, "refcount_bits": 64},
    "one bit": {"cluster_size": CLUSTER, "refcount_bits": 1},
    "extended": {"cluster_size": 16 * K, "extended_l2": True},
    "2M": {"cluster_size": 2 * M},
    "extended 64k": {"cluster_size": 64 * K, "extended_l2": True, "refcount_bits": 8},
}
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def image(directory: Path, size: int = SIZE, **options: Any) -> Path:
    return make_image(directory / "top.qcow2", size, **{"cluster_size": CLUSTER, **options})


def base(directory: Path) -> Path:
    return make_raw(directory / "base.raw", BASE, *RANGES)


def scribble(engine: Engine) -> None:
    """Every state of a cluster and a subcluster that a top can have over its base."""
    engine.write(10_000, 20_000)
    engine.write(3 * K, 2 * K)
    engine.write(699 * K, 512)
    engine.disk.zero(80 * K, 40 * K, unmap=True)
    engine.disk.zero(705 * K, 3 * K, unmap=False)
    engine.disk.discard(620 * K, 30 * K)


def alone(path: Path, expected: bytes) -> None:
    """QEMU finds the image sound, and it reads as ``expected`` whatever was below."""
    check(path)
    assert shown(path) == expected


@every_variant
def test_a_populated_disk_reads_the_same_with_nothing_and_with_anything_below(
    options: dict[str, Any], tmp_path: Path
) -> None:
    with Engine(image(tmp_path, **options), below=base(tmp_path)) as engine:
        scribble(engine)
        old = engine.contents()
        for position in range(0, SIZE, 100 * K + 512):
            engine.disk.populate(position, min(100 * K + 512, SIZE - position))
            assert engine.contents() == old
        assert engine.disk.populate(0, SIZE) == 0, "everything is there already"
        engine.disk.replace_below(None)
        assert engine.contents() == old
    alone(engine.path, old)
    other = make_raw(tmp_path / "other.raw", 2 * M, (0, 2 * M), seed=5)
    with Engine(engine.path, below=other) as engine:
        assert engine.contents() == old, "nothing of another base shows, not even behind the end of the old one"


def test_data_of_neighbours_goes_out_in_one_write_and_nothing_below_is_read_twice(tmp_path: Path) -> None:
    with Engine(image(tmp_path), below=base(tmp_path)) as engine:
        engine.disk.populate(0, 1)  # the L2 table
        engine.take()
        assert engine.below is not None
        engine.below.reads.clear()
        assert engine.disk.populate(CLUSTER, 24 * CLUSTER) == 24 * CLUSTER
        assert [call.length for call in engine.take() if call.name == "write"] == [24 * CLUSTER]
        assert engine.below.reads == [(CLUSTER, 24 * CLUSTER)]
    check(engine.path)


def test_zeros_take_a_table_entry_and_no_data(tmp_path: Path) -> None:
    """Holes, zeros that are written out, and what lies behind the end of the base."""
    below = base(tmp_path)
    with below.open("r+b") as file:
        file.seek(8 * CLUSTER)
        file.write(bytes(2 * CLUSTER))
    with Engine(image(tmp_path), below=below) as engine:
        engine.write(50 * CLUSTER, 512)
        engine.take()
        assert engine.disk.populate(200 * K, 80 * K) == 0
        assert engine.disk.populate(8 * CLUSTER, 2 * CLUSTER) == 0
        assert engine.disk.populate(BASE + CLUSTER, SIZE - BASE - CLUSTER) == 0
        assert not [call for call in engine.take() if call.name == "write"]
        for cluster in (50 + 3, 8, 9, BASE // CLUSTER + 1, SIZE // CLUSTER):
            assert engine.entry(cluster) == READS_ZERO
    check(engine.path)


def test_a_cluster_of_which_the_base_has_a_part_is_filled_up_with_zeros(tmp_path: Path) -> None:
    with Engine(image(tmp_path), below=base(tmp_path)) as engine:
        old = engine.contents()
        assert engine.disk.populate(BASE - 1, 1) == CLUSTER
        host = engine.host(BASE // CLUSTER)
        assert engine.storage.read(host, CLUSTER) == old[BASE // CLUSTER * CLUSTER :][:CLUSTER]
    check(engine.path)


def test_what_the_top_decides_itself_stays_where_it_is(tmp_path: Path) -> None:
    path = image(tmp_path)
    run("qemu-io", "-f", "qcow2", "-c", "write -c -P 9 0 4k", "-c", "write -P 8 4k 4k", "-c", "write -z 8k 4k", path)
    with Engine(path, below=base(tmp_path)) as engine:
        before = [engine.entry(number) for number in range(3)]
        assert before[0] & COMPRESSED
        assert engine.disk.populate(0, 4 * CLUSTER) == CLUSTER
        assert [engine.entry(number) for number in range(3)] == before
        assert engine.entry(3) & OFFSET_MASK
    check(path)


def test_a_subcluster_is_copied_into_the_cluster_that_the_others_have(tmp_path: Path) -> None:
    granule = 2 * K
    path = image(tmp_path, cluster_size=64 * K, extended_l2=True)
    with Engine(path, below=base(tmp_path)) as engine:
        engine.write(4 * granule, granule)
        engine.disk.zero(6 * granule, granule, unmap=True)
        host = engine.host(0)
        old = engine.contents()
        assert engine.disk.populate(3 * granule, 5 * granule) == 3 * granule
        assert engine.entries(0, 1) == [host | 1 << 63, 0b1011_1000 | 1 << 32 + 6]
        assert engine.contents() == old
    check(path)


@pytest.mark.parametrize("extended", [False, True])
def test_a_table_that_a_snapshot_shares_is_copied_and_the_snapshot_stays(extended: bool, tmp_path: Path) -> None:
    """A6, K6."""
    below = base(tmp_path)
    path = image(tmp_path, cluster_size=16 * K, extended_l2=extended, backing_name=str(below), backing_format="raw")
    with Engine(path, below=below) as engine:
        scribble(engine)
        before = engine.contents()
    run("qemu-img", "snapshot", "-c", "kept", path)
    with Engine(path, below=below) as engine:
        engine.disk.populate(0, SIZE)
        assert engine.contents() == before
    check(path)
    assert shown(path, "-l", "kept") == before
    run("qemu-img", "rebase", "-u", "-b", "", path)
    alone(path, before)


@pytest.mark.parametrize("extended", [False, True])
def test_an_image_with_a_data_file_is_populated_at_the_places_of_its_clusters(extended: bool, tmp_path: Path) -> None:
    """Q77."""
    data = tmp_path / "data.raw"
    data.touch()
    path = image(tmp_path, cluster_size=16 * K, extended_l2=extended, data_file_name="data.raw")
    with Engine(path, below=base(tmp_path), data=data) as engine:
        scribble(engine)
        old = engine.contents()
        engine.disk.populate(0, SIZE)
        assert engine.contents() == old
        engine.disk.replace_below(None)
        assert engine.contents() == old
    done = execute("qemu-img", "convert", "-O", "raw", "top.qcow2", "flat", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "flat").read_bytes() == old


def test_a_full_medium_stops_it_and_what_was_copied_stays_right(tmp_path: Path) -> None:
    with Engine(image(tmp_path), below=base(tmp_path)) as engine:
        old = engine.contents()
        end = engine.storage.size() + 40 * CLUSTER

        def full(call: Call) -> None:
            if call.name in ("write", "reserve") and call.end > end:
                raise OSError(28, "No space left on device")

        engine.storage.before = full
        with pytest.raises(OSError, match="No space"):
            engine.disk.populate(0, SIZE)
        engine.storage.before = lambda call: None
        assert engine.contents() == old
        assert not engine.image.in_flight
        engine.disk.populate(0, SIZE)
        assert engine.contents() == old
    alone(engine.path, old)


# Beside the guest.


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("where", ["before the claim", "after the claim"])
def test_what_the_guest_writes_meanwhile_stays(where: str, extended: bool, tmp_path: Path) -> None:
    """A7: a write to a cluster that is being copied waits; one that was faster is not copied over."""
    path = image(tmp_path, cluster_size=16 * K, extended_l2=extended)
    with Engine(path, below=base(tmp_path)) as engine:
        engine.disk.populate(0, 1)
        old = bytearray(engine.contents())
        threads: list[threading.Thread] = []

        def guest() -> None:
            thread = threading.Thread(target=engine.write, args=(40 * K + 512, 5000), kwargs={"seed": 9})
            thread.start()
            threads.append(thread)

        if where == "before the claim":
            assert engine.below is not None
            read = engine.below.read_into

            def slow(offset: int, view: memoryview) -> None:
                read(offset, view)
                if len(view) > 32 * K and not threads:
                    guest()
                    threads[0].join()

            engine.below.read_into = slow  # type: ignore[method-assign]
        else:

            def before(call: Call) -> None:
                if call.name == "write" and call.length > 32 * K and not threads:
                    guest()
                    threads[0].join(0.05)
                    assert threads[0].is_alive(), "the guest waits for the copy"

            engine.storage.before = before
        engine.disk.populate(0, 96 * K)
        threads[0].join()
        old[40 * K + 512 : 40 * K + 5512] = content(9 << 20, 40 * K + 512, 5000)
        assert engine.contents() == old
        engine.disk.populate(0, SIZE)
    alone(path, bytes(old))


@every_variant
@pytest.mark.parametrize("seed", range(3))
def test_many_guests_and_several_copies_end_in_what_the_guests_wrote(
    options: dict[str, Any], seed: int, tmp_path: Path
) -> None:
    """Each guest has sectors of its own, so that the outcome is certain; clusters they share."""
    size = 256 * K + 512
    below = make_raw(tmp_path / "base.raw", size - 5 * K, (0, 60 * K), (100 * K, 90 * K))
    path = image(tmp_path, size, **options)
    guests, rounds = 4, 40
    with Engine(path, below=below) as engine:
        model = bytearray(engine.contents())
        written = [bytearray(size // 512) for _ in range(guests)]

        def guest(number: int) -> None:
            chance = random.Random(f"{seed} {number}")
            for _ in range(rounds):
                first = chance.randrange(size // 512)
                mine = [sector for sector in range(first, min(first + 24, size // 512)) if sector % guests == number]
                for sector in mine:
                    data = content(number + 1 << 20, sector * 512, 512)
                    if chance.random() < 0.2:
                        data = bytes(512)
                        engine.disk.zero(sector * 512, 512, unmap=chance.random() < 0.5)
                    elif number or not engine.disk.write_cached(sector * 512, memoryview(data)):
                        engine.disk.write(sector * 512, memoryview(data))
                    model[sector * 512 : (sector + 1) * 512] = data
                    written[number][sector] = 1
                if chance.random() < 0.2:
                    engine.disk.flush()

        def copier(number: int) -> None:
            chance = random.Random(f"{seed} copier {number}")
            for _ in range(rounds):
                start = chance.randrange(size)
                engine.disk.populate(start, chance.randrange(1, min(40 * K, size - start) + 1))

        run_together([*(lambda n=n: guest(n) for n in range(guests)), *(lambda n=n: copier(n) for n in range(2))])
        assert engine.contents() == model, f"seed {seed}"
        engine.disk.populate(0, size)
        assert engine.contents() == model, f"seed {seed}"
    alone(path, bytes(model))


def run_together(functions: list[Callable[[], None]]) -> None:
    """Each in a thread; what one raises is raised."""
    failures: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]

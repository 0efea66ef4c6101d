"""What live operations need of the engine: holds, the barrier, finishing without closing, another disk below."""

import threading
import time
from pathlib import Path

import pytest

from nbdq.qcow2.format import Header, read_header
from nbdq.qcow2.header_area import set_backing
from nbdq.qcow2.writing.epochs import NEVER, Epochs
from nbdq.storage import FileStorage
from tests.support.engine import Engine, K, M, check, make_image, make_raw, shown
from tests.support.tools import requires, run

pytestmark = requires("qemu-img")

CLUSTER = 4 * K


def image(directory: Path, size: int = 1 * M, **options: object) -> Path:
    return make_image(directory / "top.qcow2", size, **{"cluster_size": CLUSTER, **options})


# Holds.


def test_what_is_freed_under_a_hold_is_neither_used_again_nor_punched_before_it_ends(tmp_path: Path) -> None:
    """R-50: somebody reads at the host offsets that it had."""
    with Engine(image(tmp_path)) as engine:
        data = engine.write(0, 4 * CLUSTER)
        engine.settle()
        hosts = [engine.host(number) for number in range(4)]
        with engine.image.hold():
            engine.disk.discard(0, 4 * CLUSTER)
            for _ in range(3):
                engine.disk.flush()
            engine.write(100 * CLUSTER, 20 * CLUSTER)
            engine.disk.flush()
            assert engine.storage.read(hosts[0], 4 * CLUSTER) == data
            assert [engine.refcount(host) for host in hosts] == [1] * 4
        engine.disk.flush()
        assert [engine.refcount(host) for host in hosts] == [0] * 4
    check(engine.path)


def test_a_hold_outlives_the_thread_that_took_it_and_the_barrier_does_not_wait_for_it(tmp_path: Path) -> None:
    with Engine(image(tmp_path)) as engine:
        holds = [engine.image.hold(), engine.image.hold()]
        thread = threading.Thread(target=holds[0].__enter__)
        thread.start()
        thread.join()
        with holds[1]:
            engine.image.barrier()
        engine.write(0, CLUSTER)
        engine.settle()
        host = engine.host(0)
        engine.disk.discard(0, CLUSTER)
        engine.settle()
        assert engine.refcount(host) == 1
        holds[0].__exit__(None, None, None)
        engine.disk.flush()
        assert engine.refcount(host) == 0
    check(engine.path)


# The barrier.


def test_the_barrier_waits_for_requests_that_had_begun_and_for_no_others() -> None:
    epochs = Epochs()
    begun, end_first, later, end_later, passed = (threading.Event() for _ in range(5))

    def first() -> None:
        with epochs.pinned():
            begun.set()
            end_first.wait(60)

    def barrier() -> None:
        epochs.wait_for(epochs.advance())
        passed.set()

    def second() -> None:
        with epochs.pinned():
            later.set()
            end_later.wait(60)

    threads = [threading.Thread(target=first)]
    threads[0].start()
    begun.wait(60)
    threads.append(threading.Thread(target=barrier))
    threads[1].start()
    while epochs.current == 0:
        time.sleep(0)
    threads.append(threading.Thread(target=second))
    threads[2].start()
    later.wait(60)
    assert not passed.is_set()
    end_first.set()
    assert passed.wait(60)
    end_later.set()
    for thread in threads:
        thread.join()


def test_the_barrier_waits_for_the_thread_that_does_not_wait() -> None:
    epochs = Epochs()
    epochs.inline = epochs.current
    thread = threading.Thread(target=lambda: epochs.wait_for(epochs.advance()))
    thread.start()
    thread.join(0.02)
    assert thread.is_alive()
    epochs.inline = NEVER
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("verb", ["write", "zero", "discard", "write_cached"])
def test_a_request_knows_all_who_keep_book_before_a_barrier_lets_them_go_on(verb: str, tmp_path: Path) -> None:
    """Whoever begins to keep book copies what is there after the barrier: a change in between must be in the book."""

    class Book:
        def __init__(self) -> None:
            self.marked: list[tuple[int, int]] = []

        def mark(self, offset: int, length: int) -> None:
            self.marked.append((offset, length))
            thread.start()
            thread.join(0.02)
            assert thread.is_alive(), "the change has not been made yet"

        def resize(self, size: int) -> None:
            pass

        def store(self, _image: object) -> None:
            pass

    with Engine(image(tmp_path)) as engine:
        engine.write(0, 4 * CLUSTER)
        book = Book()
        thread = threading.Thread(target=engine.image.barrier)
        engine.image.bitmaps = book
        if verb == "write":
            engine.write(0, CLUSTER)
        elif verb == "zero":
            engine.disk.zero(0, CLUSTER, unmap=True)
        elif verb == "discard":
            engine.disk.discard(0, CLUSTER)
        else:
            assert engine.write_cached(0, CLUSTER)
        thread.join(60)
        assert book.marked == [(0, CLUSTER)]


# Finishing, and going on.


def test_a_finished_image_is_complete_in_the_file_while_it_is_still_open(tmp_path: Path) -> None:
    with Engine(image(tmp_path)) as engine:
        data = engine.write(0, 64 * CLUSTER)
        engine.disk.discard(0, 32 * CLUSTER)
        engine.disk.finish()
        check(engine.path)  # not even a leak
        assert shown(engine.path)[: 64 * CLUSTER] == bytes(32 * CLUSTER) + data[32 * CLUSTER :]
        assert engine.contents()[: 64 * CLUSTER] == bytes(32 * CLUSTER) + data[32 * CLUSTER :]


def test_another_disk_shows_through_when_it_takes_the_place_of_the_one_below(tmp_path: Path) -> None:
    below = make_raw(tmp_path / "base.raw", 1 * M, (0, 1 * M))
    other = make_raw(tmp_path / "other.raw", 512 * K, (0, 512 * K), seed=9)
    with Engine(image(tmp_path), below=below) as engine:
        own = engine.write(100 * K, 8 * K)
        view = memoryview(bytearray(512))
        assert engine.disk.layer_count == 2
        for path in (other, None, below):
            chain = engine._open_below(path) if path else None
            engine.disk.replace_below(chain)
            expected = bytearray(path.read_bytes() if path else b"").ljust(1 * M, b"\0")
            expected[100 * K : 108 * K] = own
            assert engine.contents() == expected
            engine.read(1 * M - 512, 512)
            assert engine.disk.read_cached(1 * M - 512, view)
            assert view == expected[-512:]
            depths = {int(depth) for part in engine.disk.status(0, 1 * M) for depth in part.depth}
            assert max(depths) == engine.disk.layer_count == (2 if path else 1)
            # A discard hides what is below, if there is anything.
            engine.disk.discard(200 * K, 4 * K)
            assert engine.read(200 * K, 4 * K) == bytes(4 * K)
            engine.write(200 * K, 4 * K, seed=8)
            own2 = engine.read(200 * K, 4 * K)
            engine.disk.replace_below(None)
            assert engine.read(200 * K, 4 * K) == own2
            engine.disk.make_empty()
            own = engine.write(100 * K, 8 * K)
    check(engine.path)


def test_a_version_2_image_hides_a_base_that_it_gets_later(tmp_path: Path) -> None:
    """M2: it has no zero clusters, so that a discard must not uncover anything."""
    below = make_raw(tmp_path / "base.raw", 1 * M, (0, 1 * M))
    with Engine(image(tmp_path, version=2)) as engine:
        data = engine.write(0, 8 * CLUSTER)
        engine.disk.replace_below(engine._open_below(below))
        engine.disk.discard(0, CLUSTER)
        assert engine.read(0, 8 * CLUSTER) == data
        engine.disk.zero(0, CLUSTER, unmap=True)
        assert engine.read(0, CLUSTER) == bytes(CLUSTER)
    check(engine.path)


def test_a_header_is_rewritten_while_the_disk_is_written_to(tmp_path: Path) -> None:
    below = make_raw(tmp_path / "base.raw", 1 * M, (0, 1 * M))
    with Engine(image(tmp_path), below=below) as engine:
        engine.write(0, CLUSTER)

        def change(storage: FileStorage, header: Header) -> Header:
            return set_backing(storage, header, name=str(below), format="raw")

        engine.image.rewrite_header(change)
        assert engine.image.header.backing_name == str(below)
        assert read_header(engine.storage).backing_name == str(below)
        engine.write(64 * CLUSTER, CLUSTER)
        expected = engine.contents()
    check(engine.path)
    assert shown(engine.path) == expected
    assert str(below) in run("qemu-img", "info", engine.path)

"""Compressed clusters that are taken over as they are: packed, counted, and read by QEMU (Q49-Q57)."""

import errno
import random
import threading
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nbdq.qcow2.entries import DESCRIPTOR_MASK
from nbdq.qcow2.features import CompressionType
from nbdq.qcow2.image import Qcow2Image
from tests.support.engine import Call, Engine, K, M, check, make_image, make_raw, shown
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io")

CLUSTER = 4 * K

VARIANTS: dict[str, dict[str, Any]] = {
    "v3": {"cluster_size": CLUSTER},
    "v2": {"cluster_size": CLUSTER, "version": 2},
    "512": {"cluster_size": 512},
    "one bit": {"cluster_size": CLUSTER, "refcount_bits": 1},
    "two bits": {"cluster_size": CLUSTER, "refcount_bits": 2},
    "64 bits": {"cluster_size": CLUSTER, "refcount_bits": 64},
    "extended": {"cluster_size": 16 * K, "extended_l2": True},
    "64k": {"cluster_size": 64 * K},
    "2M": {"cluster_size": 2 * M},
}
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def image(directory: Path, size: int = 2 * M, **options: Any) -> Path:
    return make_image(directory / "top.qcow2", size, **{"cluster_size": CLUSTER, **options})


def cluster_of(seed: int, length: int = CLUSTER, *, noise: int | None = None) -> bytes:
    """A cluster that deflates to about ``noise`` bytes and a few."""
    noise = length // 3 if noise is None else noise
    return random.Random(seed).randbytes(noise) + bytes([seed % 251]) * (length - noise)


def deflated(data: bytes) -> bytes:
    stream = zlib.compressobj(6, wbits=-12)
    return stream.compress(data) + stream.flush()


def store(engine: Engine, number: int, seed: int, *, noise: int | None = None, if_open: bool = False) -> bytes:
    data = cluster_of(seed, engine.cluster_size, noise=noise)
    assert engine.disk.write_compressed(number * engine.cluster_size, deflated(data), if_open=if_open)
    return data


@every_variant
def test_qemu_reads_what_was_taken_over_and_finds_every_reference_counted(
    options: dict[str, Any], tmp_path: Path
) -> None:
    size = max(1 * M, 6 * options["cluster_size"])
    with Engine(image(tmp_path, size, **options)) as engine:
        model = bytearray(size)
        chance = random.Random(5)
        count = size // engine.cluster_size
        for seed in range(60):
            number = chance.randrange(count)
            data = store(engine, number, seed, noise=chance.randrange(engine.cluster_size * 7 // 8))
            start = number * engine.cluster_size
            model[start : start + len(data)] = data
            if chance.random() < 0.3:
                offset = chance.randrange(size - 700)
                model[offset : offset + 700] = engine.write(offset, 700, seed=seed)
            if chance.random() < 0.2:
                gone = chance.randrange(count) * engine.cluster_size
                engine.disk.discard(gone, engine.cluster_size)
                model[gone : gone + engine.cluster_size] = bytes(engine.cluster_size)
            if chance.random() < 0.2:
                engine.disk.flush()
            if seed % 10 == 0:
                assert engine.contents() == model, f"after step {seed}"
    check(engine.path)
    assert shown(engine.path) == model


def test_clusters_are_packed_one_behind_the_other_and_may_cross_into_the_next(tmp_path: Path) -> None:
    """Q54."""
    with Engine(image(tmp_path)) as engine:
        places = []
        for number in range(8):
            store(engine, number, number, noise=1500)
            offset, _ = engine.image.geometry.compressed_range(engine.entry(number) & DESCRIPTOR_MASK)
            places.append(offset)
        lengths = [end - start for start, end in pairwise(places)]
        assert all(1500 < length < 1600 for length in lengths), "no gaps"
        touched = Counter(
            cluster
            for number in range(8)
            for cluster in range(places[number] // CLUSTER, (places[number] + 1520) // CLUSTER + 1)
        )
        assert max(touched.values()) >= 3
        assert {cluster: engine.refcount(cluster * CLUSTER) for cluster in touched} == touched
        engine.disk.discard(0, 8 * CLUSTER)
        engine.disk.flush()
        assert not any(engine.refcount(cluster * CLUSTER) for cluster in touched)
    check(engine.path)


def test_the_file_says_how_often_a_cluster_is_named_before_a_table_names_it_so_often(tmp_path: Path) -> None:
    """W1: refcounts, and the data, go out before the entries."""
    with Engine(image(tmp_path)) as engine:
        store(engine, 0, 0, noise=500)
        engine.settle()
        store(engine, 1, 1, noise=500)
        engine.disk.flush()
        assert engine.story() == ["data", "refcounts", "sync", "L2", "sync"]
    check(engine.path)


def test_a_cluster_that_became_free_is_not_appended_to(tmp_path: Path) -> None:
    """R-50: somebody else may have it by then."""
    with Engine(image(tmp_path)) as engine:
        store(engine, 0, 0, noise=500)
        host = engine.image.geometry.compressed_range(engine.entry(0) & DESCRIPTOR_MASK)[0]
        engine.disk.discard(0, CLUSTER)
        engine.disk.flush()
        assert engine.refcount(host) == 0
        data = engine.write(10 * CLUSTER, CLUSTER)
        assert engine.host(10) == host - host % CLUSTER
        store(engine, 1, 1, noise=500)
        assert engine.read(10 * CLUSTER, CLUSTER) == data
    check(engine.path)


def test_nobody_reads_what_a_place_held_before(tmp_path: Path) -> None:
    """The cache of inflated clusters knows them by their place, which is used again."""
    with Engine(image(tmp_path, refcount_bits=1)) as engine:
        first = store(engine, 0, 1, noise=500)
        assert engine.read(0, CLUSTER) == first
        descriptor = engine.entry(0)
        engine.disk.discard(0, CLUSTER)
        engine.disk.flush()
        second = store(engine, 0, 2, noise=500)
        assert engine.entry(0) == descriptor
        assert engine.read(0, CLUSTER) == second
    check(engine.path)


def test_only_what_shows_the_base_is_replaced_if_that_is_wanted(tmp_path: Path) -> None:
    below = make_raw(tmp_path / "base.raw", 2 * M, (0, 2 * M))
    with Engine(image(tmp_path), below=below) as engine:
        own = engine.write(0, 512)
        engine.disk.zero(CLUSTER, CLUSTER, unmap=True)
        store(engine, 2, 2)
        data = deflated(cluster_of(9))
        for number in range(3):
            assert not engine.disk.write_compressed(number * CLUSTER, data, if_open=True)
        assert engine.read(0, 512) == own
        assert engine.disk.write_compressed(3 * CLUSTER, data, if_open=True)
        assert engine.read(3 * CLUSTER, CLUSTER) == cluster_of(9)
    check(engine.path)


@every_variant
def test_guests_that_write_meanwhile_keep_what_they_wrote(options: dict[str, Any], tmp_path: Path) -> None:
    """Every cluster of the base is deflated and taken over, while a guest writes single sectors."""
    cluster = options["cluster_size"]
    size = max(512 * K, 8 * cluster)
    below = tmp_path / "base.raw"
    below.write_bytes(b"".join(cluster_of(number, cluster) for number in range(size // cluster)))
    with Engine(image(tmp_path, size, **options), below=below) as engine:
        old = engine.contents()
        model = bytearray(old)

        def guest() -> None:
            chance = random.Random(3)
            for _ in range(200):
                offset = chance.randrange(size // 512) * 512
                model[offset : offset + 512] = engine.write(offset, 512, seed=7)

        thread = threading.Thread(target=guest)
        thread.start()
        for number in range(size // cluster):
            data = deflated(old[number * cluster : (number + 1) * cluster])
            engine.disk.write_compressed(number * cluster, data, if_open=True)
        thread.join()
        assert engine.contents() == model
        engine.disk.populate(0, size)
        engine.disk.replace_below(None)
        assert engine.contents() == model
    check(engine.path)
    assert shown(engine.path) == model


def test_the_last_cluster_of_a_disk_may_be_partial(tmp_path: Path) -> None:
    """Q56."""
    with Engine(image(tmp_path, 1 * M + 512)) as engine:
        data = store(engine, 256, 3)
        assert engine.read(1 * M, 512) == data[:512]
    check(engine.path)
    assert shown(engine.path) == bytes(1 * M) + data[:512]


def test_zstd_is_taken_over_from_an_image_that_qemu_made(tmp_path: Path) -> None:
    source = tmp_path / "source.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compression_type=zstd,cluster_size=64k", source, "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write -c -P 5 0 512k", "-c", "write -c -P 6 512k 512k", source)
    path = image(tmp_path, 1 * M, cluster_size=64 * K, compression_type=CompressionType.ZSTD)
    with Engine(source) as old, Engine(path) as new:
        for number in range(16):
            reader: Qcow2Image = old.image.reader
            offset, length = old.image.geometry.compressed_range(old.entry(number) & DESCRIPTOR_MASK)
            assert new.disk.write_compressed(number * 64 * K, reader.storage.read(offset, length))
        assert new.contents() == b"\x05" * (512 * K) + b"\x06" * (512 * K)
    check(path)
    assert shown(path) == shown(source)


def test_what_is_no_cluster_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "data.raw"
    data.touch()
    with Engine(image(tmp_path)) as engine:
        for offset, length in ((1, 10), (2 * M, 10), (0, 0), (0, CLUSTER + 1)):
            with pytest.raises(OSError, match="no cluster") as caught:
                engine.disk.write_compressed(offset, bytes(length))
            assert caught.value.errno == errno.EINVAL
    with (
        Engine(make_image(tmp_path / "other.qcow2", 1 * M, data_file_name="data.raw"), data=data) as engine,
        pytest.raises(OSError, match="data file") as caught,
    ):
        engine.disk.write_compressed(0, b"data")
    assert caught.value.errno == errno.EOPNOTSUPP


def test_a_failed_write_leaves_nothing_but_free_clusters(tmp_path: Path) -> None:
    """A8."""
    with Engine(image(tmp_path)) as engine:
        data = store(engine, 0, 0, noise=500)

        def full(call: Call) -> None:
            if call.name == "write":
                raise OSError(errno.ENOSPC, "No space left on device")

        engine.storage.before = full
        with pytest.raises(OSError, match="No space"):
            engine.disk.write_compressed(CLUSTER, deflated(cluster_of(1)))
        engine.storage.before = lambda call: None
        assert not engine.image.in_flight
        assert engine.read(CLUSTER, CLUSTER) == bytes(CLUSTER)
        assert engine.read(0, CLUSTER) == data
        store(engine, 1, 2)
    check(engine.path)


def test_a_place_that_a_descriptor_cannot_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Q50, with fewer bits than there are: a file so long cannot be made here."""
    with Engine(image(tmp_path)) as engine:
        monkeypatch.setattr(engine.disk._compressed, "_offset_bits", 12)
        with pytest.raises(OSError, match="so far behind") as caught:
            engine.disk.write_compressed(0, b"data")
        assert caught.value.errno == errno.EFBIG
        assert not engine.image.in_flight
    check(engine.path)

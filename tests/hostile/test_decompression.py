"""Compressed clusters made to exhaust, to mislead or to leak: bounded memory and time, and never filled up (F6, R-29).

Which streams are good is QEMU's to say (Q50-Q53): images with one stream in each cluster are read by nbdq in a process
with limits, and by qemu-img, and both must accept the same ones with the same content. ``NBDQ_SEED`` chooses other
damage than the usual.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbdq.qcow2.format import CompressionType
from tests.hostile.crafted import compressed_image
from tests.hostile.laboratory import Reader
from tests.hostile.reader import CPU_LIMIT
from tests.hostile.referee import Referee
from tests.hostile.streams import (
    Deflate,
    Stream,
    block,
    damaged,
    deflate,
    deflate_streams,
    frame,
    raw_blocks,
    skippable,
    zstd,
    zstd_streams,
)
from tests.hostile.verdict import reason_to_fail, reason_to_read
from tests.support.images import content
from tests.support.tools import requires

pytestmark = requires("qemu-img")

DEFLATE, ZSTD = CompressionType.DEFLATE, CompressionType.ZSTD
RANDOM_SEED = os.environ.get("NBDQ_SEED", "nbdq")
LARGEST = 1 << 21
#: Bytes that the descriptor of the largest cluster can give to its data, less what alignment may cost.
MOST = (8192 - 1) * 512


class Bench:
    """A directory in which images are made, to be read by nbdq in a process with limits, and by QEMU."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._reader = Reader()

    def examine(self, image: bytes) -> dict[str, Any]:
        """The reader's report about an image, which opens."""
        (self._directory / "image").write_bytes(image)
        report = self._reader.examine(self._directory / "image", self._directory / "ours", allow=self._directory)
        assert report is not None, "no answer within the limits"
        assert report["outcome"] == "opened", report
        assert report["cpu"] < CPU_LIMIT
        assert not report["differing"]
        return report

    def sectors_that_qemu_reads(self, report: dict[str, Any]) -> list[bool]:
        """For each sector of the disk of the last report; those that nbdq reads, too, must be the same."""
        refusal, theirs, bad = Referee(self._directory, "image").read(report["size"], None)
        assert refusal is None
        ours = np.fromfile(self._directory / "ours", dtype=np.uint8).reshape(-1, 512)
        both = ~bad
        for offset, length, _ in report["bad"]:
            both[offset // 512 : (offset + length) // 512] = False
        assert (ours == theirs)[both].all()
        return (~bad).tolist()  # type: ignore[no-any-return]

    def differences(self, streams: list[Stream], kind: CompressionType, cluster_bits: int) -> dict[str, str | None]:
        """The streams that one accepts and the other does not, with the reason for it."""
        image, places = compressed_image(streams, kind, cluster_bits=cluster_bits)
        report = self.examine(image)
        size = 1 << cluster_bits
        errors = {offset // size: message for offset, _, message in report["bad"]}
        readable = self.sectors_that_qemu_reads(report)
        found: dict[str, str | None] = {}
        for number, (stream, (offset, _)) in enumerate(zip(streams, places, strict=True)):
            theirs = readable[number * size // 512 : (number + 1) * size // 512]
            assert len(set(theirs)) == 1, "QEMU reads a part of a cluster"
            if theirs[0] and number in errors:
                found[stream.name] = reason_to_fail(errors[number])
            elif not theirs[0] and number not in errors:
                found[stream.name] = reason_to_read(image[offset : offset + size], size) if kind is DEFLATE else None
        return found

    def close(self) -> None:
        """End the process."""
        self._reader.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    found = Bench(tmp_path)
    yield found
    found.close()


@pytest.mark.parametrize("cluster_bits", [12, 16])
def test_deflate_streams_are_accepted_as_qemu_accepts_them(cluster_bits: int, bench: Bench) -> None:
    unseen = ("length code 286", "287 literal codes", "31 distance codes")
    found = bench.differences(deflate_streams(1 << cluster_bits), DEFLATE, cluster_bits)
    assert found == dict.fromkeys(unseen, "damage that libdeflate does not see")


@pytest.mark.parametrize("cluster_bits", [12, 16])
def test_zstd_streams_are_accepted_as_qemu_accepts_them(cluster_bits: int, bench: Bench) -> None:
    large = ("a window of 2^24", "a window of 2^27")
    found = bench.differences(zstd_streams(1 << cluster_bits), ZSTD, cluster_bits)
    assert found == dict.fromkeys(large, "zstd window above 2^23")


@pytest.mark.parametrize(("kind", "make"), [(DEFLATE, deflate), (ZSTD, zstd)])
@pytest.mark.parametrize(("cluster_bits", "count"), [(9, 600), (12, 600), (16, 100)])
def test_damaged_streams_are_accepted_as_qemu_accepts_them(
    kind: CompressionType, make: Callable[[bytes], bytes], cluster_bits: int, count: int, bench: Bench
) -> None:
    streams = damaged(make, 1 << cluster_bits, count, f"{RANDOM_SEED}:{kind}:{cluster_bits}")
    found = bench.differences(streams, kind, cluster_bits)
    assert not [name for name, reason in found.items() if reason is None], f"NBDQ_SEED={RANDOM_SEED}"


def fill(pattern: bytes) -> bytes:
    """As much as the descriptor of the largest cluster can describe."""
    return pattern * (MOST // len(pattern))


def exhausting_streams() -> Iterator[tuple[CompressionType, Stream]]:
    """Streams for one cluster of 2 MiB that cost most: what they make, what they hold, and what they pretend."""
    plain = content(1, 0, LARGEST)
    matches, nothing = Deflate(), Deflate()
    for _ in range(8):
        matches.match(285, 0)  # 258 bytes
        nothing.block(1, last=False).end()
    megabytes = [block(b"A", kind=1, length=1 << 17)] * 8192
    for name, data in {
        "a good one before 4 MiB of other data": deflate(plain) + b"\xff" * (MOST - LARGEST),
        "600 MiB": Deflate().block(1).letters(1).put_bytes(fill(matches.data)[:-2]).data,
        "empty stored blocks": fill(Deflate().stored(b"").data),
        "empty blocks of ten bits": fill(nothing.data),
    }.items():
        yield DEFLATE, Stream(f"deflate, {name}", data)
    for name, data in {
        "a good one before 4 MiB of other data": zstd(plain) + b"\xff" * (MOST - LARGEST),
        "1 GiB": frame(*megabytes, block(b"", last=True)),
        "1 GiB, and stated": frame(*megabytes, block(b"", last=True), content_size=1 << 30),
        "1 GiB stated": frame(raw_blocks(plain), content_size=1 << 30),
        "empty frames": fill(zstd(b"")),
        "frames of one byte": fill(zstd(b"x")),
        "skippable frames": fill(skippable(0)),
        "empty blocks": frame(fill(block(b""))[:-6]),
        "frames with a window of 2^23": fill(zstd(b"x", window_log=23)),
        "a window of 2^23": zstd(plain, window_log=23),
        "a window of 2^27": zstd(plain, window_log=27),
        "a window of 2^41": frame(raw_blocks(plain), window=0xF8),
    }.items():
        yield ZSTD, Stream(f"zstd, {name}", data)


@pytest.mark.parametrize(("kind", "stream"), list(exhausting_streams()), ids=lambda value: getattr(value, "name", ""))
def test_no_stream_costs_more_than_two_clusters_and_8_mib(kind: CompressionType, stream: Stream, bench: Bench) -> None:
    """R-29, R-30. A MiB is the reader's own; it asks for the cluster sixteen times within its time limit."""
    good = deflate(bytes(LARGEST)) if kind is DEFLATE else zstd(bytes(LARGEST))
    bench.examine(compressed_image([Stream("to get going", good)], kind, cluster_bits=21)[0])
    report = bench.examine(compressed_image([stream], kind, cluster_bits=21)[0])
    assert report["memory"] <= 2 * LARGEST + (9 << 20)


def ends(kind: CompressionType) -> tuple[bytes, int]:
    """An image whose file ends right behind the data of its only cluster, and that data's offset in the file.

    The data ends with zeros that belong to it.
    """
    plain = content(1, 0, 4096 - 64) + bytes(64)
    data = Deflate().stored(plain, last=True).data if kind is DEFLATE else frame(raw_blocks(plain))
    image, places = compressed_image([Stream("ends with zeros", data)], kind, cluster_bits=12, skip=100)
    return image, places[0][0]


both_kinds = pytest.mark.parametrize("kind", [DEFLATE, ZSTD])


@both_kinds
def test_data_that_ends_with_the_file_inside_a_sector_is_read(kind: CompressionType, bench: Bench) -> None:
    """Q51: the packer of QEMU does not fill up the last sector."""
    image, _ = ends(kind)
    assert len(image) % 512
    report = bench.examine(image)
    assert report["bad"] == []
    assert all(bench.sectors_that_qemu_reads(report))


@both_kinds
@pytest.mark.parametrize("cut", [1, 63, 64, 1000])
def test_data_that_the_file_cuts_short_goes_on_with_zeros(kind: CompressionType, cut: int, bench: Bench) -> None:
    """As in QEMU; here zeros make it whole again, if not what it was."""
    report = bench.examine(ends(kind)[0][:-cut])
    assert report["bad"] == []
    assert all(bench.sectors_that_qemu_reads(report))


@both_kinds
def test_a_descriptor_may_reach_past_the_end_of_the_file(kind: CompressionType, bench: Bench) -> None:
    stream = Stream(
        "described too long", deflate(content(1, 0, 4096)) if kind is DEFLATE else zstd(content(1, 0, 4096))
    )
    report = bench.examine(compressed_image([stream._replace(sectors=16)], kind, cluster_bits=12)[0])
    assert report["bad"] == []
    assert all(bench.sectors_that_qemu_reads(report))


@both_kinds
def test_data_past_the_end_of_the_file_is_an_error(kind: CompressionType, bench: Bench) -> None:
    image, offset = ends(kind)
    report = bench.examine(image[:offset])
    assert len(report["bad"]) == 1
    assert "past the end of the file" in report["bad"][0][2]
    assert not any(bench.sectors_that_qemu_reads(report))

"""Compressed clusters: every stream that QEMU reads is read, every other is EIO, and none costs more than a cluster."""

import errno
import random
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress

import pytest

from nbdq.qcow2.compression import inflate_cluster
from nbdq.qcow2.format import CompressionType

if sys.version_info >= (3, 14):
    from compression.zstd import CompressionParameter, ZstdCompressor
else:
    from backports.zstd import CompressionParameter, ZstdCompressor

CLUSTER = 64 << 10
DEFLATE, ZSTD = CompressionType.DEFLATE, CompressionType.ZSTD
Pack = Callable[[bytes], bytes]
SKIPPABLE = bytes.fromhex("502a4d18 03000000") + b"abc"


def text(length: int = CLUSTER) -> bytes:
    """Bytes that compress, but not to nothing."""
    chance = random.Random(5)
    words = [chance.randbytes(8) for _ in range(64)]
    return b"".join(chance.choices(words, k=-(-length // 8)))[:length]


def deflated(data: bytes, *, level: int = 9) -> bytes:
    stream = zlib.compressobj(level, zlib.DEFLATED, -12)
    return stream.compress(data) + stream.flush()


def frame(data: bytes, **options: int) -> bytes:
    parameters = {CompressionParameter[name]: value for name, value in options.items()}
    return ZstdCompressor(options=parameters).compress(data, ZstdCompressor.FLUSH_FRAME)


both_kinds = pytest.mark.parametrize(("kind", "pack"), [(DEFLATE, deflated), (ZSTD, frame)], ids=["deflate", "zstd"])


def assert_eio(kind: CompressionType, data: bytes, cluster_size: int = CLUSTER) -> None:
    """The guest gets EIO."""
    with pytest.raises(OSError, match=rf"^\[Errno {errno.EIO}\] [^\n]+$"):
        inflate_cluster(kind, data, cluster_size)


@pytest.mark.parametrize("cluster_bits", range(9, 22))
@both_kinds
def test_a_cluster_of_any_size_comes_back(kind: CompressionType, pack: Pack, cluster_bits: int) -> None:
    cluster = text(1 << cluster_bits)
    assert inflate_cluster(kind, pack(cluster), 1 << cluster_bits) == cluster


@both_kinds
def test_what_follows_the_stream_belongs_to_other_clusters(kind: CompressionType, pack: Pack) -> None:
    """Q50: the length is known in sectors only."""
    cluster = text()
    for foreign in (b"\0" * 400, b"\xff" * 400, pack(text())[:300], pack(text(512))):
        assert inflate_cluster(kind, pack(cluster) + foreign, CLUSTER) == cluster


@both_kinds
def test_a_stream_that_is_damaged_or_too_short_is_an_error_and_never_zeros(kind: CompressionType, pack: Pack) -> None:
    """Q52, Q53."""
    good = pack(text())
    assert_eio(kind, b"")
    assert_eio(kind, bytes(512))
    assert_eio(kind, b"\xff" * 512)
    assert_eio(kind, good[: len(good) // 2])
    assert_eio(kind, good[:-4])
    assert_eio(kind, pack(text(CLUSTER - 1)))
    assert_eio(kind, pack(b""))


def test_damage_inside_a_stream_never_passes_for_another_length() -> None:
    """Neither format has a checksum here: the guest gets EIO or a whole cluster."""
    seed = 3
    print(f"seed {seed}")
    chance = random.Random(seed)
    for kind, good in ((DEFLATE, deflated(text(4096))), (ZSTD, frame(text(4096)))):
        for _ in range(300):
            damaged = bytearray(good)
            damaged[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
            with suppress(OSError):
                assert len(inflate_cluster(kind, bytes(damaged), 4096)) == 4096


def test_a_deflate_stream_that_would_go_on_is_cut_at_the_cluster() -> None:
    """Q52: QEMU takes any stream that fills the cluster; more output is never made, be it a byte or a gigabyte."""
    longer = text(CLUSTER + 1)
    assert inflate_cluster(DEFLATE, deflated(longer), CLUSTER) == longer[:CLUSTER]
    bomb = zlib.compressobj(9, zlib.DEFLATED, -12)
    data = b"".join(bomb.compress(bytes(1 << 20)) for _ in range(64)) + bomb.flush()
    assert inflate_cluster(DEFLATE, data, CLUSTER) == bytes(CLUSTER)


def test_deflate_needs_no_end_mark_behind_a_full_cluster() -> None:
    stream = zlib.compressobj(9, zlib.DEFLATED, -12)
    data = stream.compress(text()) + stream.flush(zlib.Z_SYNC_FLUSH)
    assert inflate_cluster(DEFLATE, data, CLUSTER) == text()


def test_a_stored_deflate_block_is_read() -> None:
    assert inflate_cluster(DEFLATE, deflated(text(), level=0), CLUSTER) == text()


def test_several_zstd_frames_make_one_cluster() -> None:
    """Q53: frames may be concatenated, be empty, or be skippable."""
    cluster = text()
    halves = frame(cluster[:1000]) + frame(cluster[1000:])
    assert inflate_cluster(ZSTD, halves, CLUSTER) == cluster
    assert inflate_cluster(ZSTD, frame(b"") + SKIPPABLE + halves + b"next", CLUSTER) == cluster


def test_a_checksummed_zstd_frame_is_read_and_its_checksum_believed() -> None:
    good = frame(text(), checksum_flag=1)
    assert inflate_cluster(ZSTD, good, CLUSTER) == text()
    assert_eio(ZSTD, good[:-1] + bytes([good[-1] ^ 1]))


def test_a_zstd_frame_must_end_with_the_cluster() -> None:
    """Q53: one that goes on is damage, as for QEMU, and is not inflated any further."""
    assert_eio(ZSTD, frame(text(CLUSTER + 1)))
    assert_eio(ZSTD, frame(bytes(64 << 20)))
    assert_eio(ZSTD, frame(text(1000)) + frame(text(CLUSTER)))


def test_a_zstd_frame_may_not_ask_for_a_huge_window() -> None:
    """R-29: the window is memory, and a cluster is at most 2 MiB."""
    stream = ZstdCompressor(options={CompressionParameter.window_log: 24})
    # Without the content size in its header, the frame asks for the whole window.
    data = stream.compress(text(CLUSTER // 2)) + stream.compress(text(CLUSTER // 2), ZstdCompressor.FLUSH_FRAME)
    assert_eio(ZSTD, data)


def test_thousands_of_tiny_zstd_frames_are_refused_instead_of_copied_over_and_over() -> None:
    """A cluster of 4 MiB of compressed data has room for half a million empty frames: minutes of work for nothing."""
    assert_eio(ZSTD, frame(b"") * 400_000, 2 << 20)
    assert_eio(ZSTD, SKIPPABLE * 300_000, 2 << 20)

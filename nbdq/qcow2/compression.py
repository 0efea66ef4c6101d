"""Inflating one compressed cluster, never producing a byte more than a cluster (Q49-Q56, R-29).

Pure functions over bytes. Every failure is ``OSError(EIO)``: the guest sees a read error of that cluster only.
"""

import errno
import sys
import zlib

import deflate

if sys.version_info >= (3, 14):
    from compression.zstd import DecompressionParameter, ZstdDecompressor, ZstdError, get_frame_size
else:
    from backports.zstd import DecompressionParameter, ZstdDecompressor, ZstdError, get_frame_size

from nbdq.qcow2.format import CompressionType

#: log2 of the largest window a zstd frame may ask for (R-29); a cluster is at most 2^21 bytes.
_WINDOW_LOG_MAX = 23
#: Frames in one cluster: writers make one. Each costs a new decompressor, so their number must be bounded.
_FRAMES_MAX = 256


def inflate_cluster(kind: CompressionType, data: bytes, cluster_size: int) -> bytes:
    """The ``cluster_size`` bytes compressed in ``data``, which may be followed by foreign bytes (Q50).

    Releases the GIL while it works. Holds at most two clusters of memory.

    Raises:
        OSError: EIO when the stream is damaged or too short (never filled up with zeros).
    """
    if kind is CompressionType.ZSTD:
        return _inflate_zstd(data, cluster_size)
    return _inflate_deflate(data, cluster_size)


def _inflate_deflate(data: bytes, cluster_size: int) -> bytes:
    try:
        cluster: bytes = bytes(deflate.deflate_decompress(data, cluster_size))
    except deflate.DeflateError:
        # libdeflate wants the stream to end exactly at the cluster's end; QEMU accepts any stream that fills the
        # cluster (Q52), so zlib has the last word. Not with the 12-bit window that writers use: QEMU inflates in one
        # call, where zlib sees all of its output, and a match may reach back as far as deflate can say.
        try:
            cluster = zlib.decompressobj(-15).decompress(data, cluster_size)
        except zlib.error as error:
            raise OSError(errno.EIO, f"damaged deflate data: {error}") from None
    return _complete(cluster, cluster_size)


def _inflate_zstd(data: bytes, cluster_size: int) -> bytes:
    view = memoryview(data)
    parts: list[bytes] = []
    missing = cluster_size
    for _ in range(_FRAMES_MAX):
        if not missing or not view:
            break
        frame = ZstdDecompressor(options={DecompressionParameter.window_log_max: _WINDOW_LOG_MAX})
        try:
            # Fed with more than its frame, a decompressor would keep two copies of all that follows.
            length = get_frame_size(view)
            part = frame.decompress(view[:length], max_length=missing)
        except ZstdError as error:
            raise OSError(errno.EIO, f"damaged zstd data: {error}") from None
        if not frame.eof:
            raise OSError(errno.EIO, "damaged zstd data: the frame does not end with the cluster")
        parts.append(part)
        missing -= len(part)
        view = view[length:]
    return _complete(b"".join(parts), cluster_size)


def _complete(cluster: bytes, cluster_size: int) -> bytes:
    if len(cluster) != cluster_size:
        raise OSError(errno.EIO, f"compressed cluster holds {len(cluster)} of {cluster_size} bytes")
    return cluster

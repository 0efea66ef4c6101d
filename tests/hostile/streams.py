"""Compressed streams that no writer makes: deflate bit by bit, zstd frame by frame, and lists of them by what is odd.

Every list holds streams for one cluster of a given size; names say what is odd about each.
"""

import random
import struct
import sys
import zlib
from collections.abc import Callable
from typing import NamedTuple

from tests.support.images import content

if sys.version_info >= (3, 14):
    from compression.zstd import CompressionParameter, ZstdCompressor
else:
    from backports.zstd import CompressionParameter, ZstdCompressor

_ZSTD_MAGIC = bytes.fromhex("28b52ffd")
_LITERALS = {65: 1, 256: 1}


class Stream(NamedTuple):
    """What stands in the place of a compressed cluster."""

    name: str
    data: bytes
    sectors: int | None = None
    """As the descriptor says; by default what the data needs."""


class Deflate:
    """Deflate data bit by bit, for blocks that zlib would not write (RFC 1951). Every method returns the object."""

    def __init__(self) -> None:
        self._bits = 0
        self._count = 0

    @property
    def data(self) -> bytes:
        """All that was put, filled up to a byte."""
        return self._bits.to_bytes(-(-self._count // 8), "little")

    def put(self, value: int, count: int) -> "Deflate":
        """``count`` bits of a number, the lowest first."""
        self._bits |= (value & (1 << count) - 1) << self._count
        self._count += count
        return self

    def put_bytes(self, data: bytes) -> "Deflate":
        """Bits that are whole bytes, wherever they begin."""
        return self.put(int.from_bytes(data, "little"), 8 * len(data))

    def code(self, code: int, length: int) -> "Deflate":
        """A Huffman code, whose highest bit comes first."""
        return self.put(int(f"{code:0{length}b}"[::-1], 2), length)

    def block(self, kind: int, *, last: bool = True) -> "Deflate":
        """The head of a block: 0 stored, 1 fixed codes, 2 dynamic codes, 3 reserved."""
        return self.put(int(last), 1).put(kind, 2)

    def stored(self, data: bytes, *, last: bool = False, check: int | None = None) -> "Deflate":
        """Stored blocks; ``check`` is the complement of the length, right by default."""
        while True:
            piece, data = data[:0xFFFF], data[0xFFFF:]
            self.block(0, last=last and not data).put(0, -self._count % 8).put(len(piece), 16)
            self.put(~len(piece) if check is None else check, 16).put_bytes(piece)
            if not data:
                return self

    def letters(self, count: int) -> "Deflate":
        """In a block of fixed codes: ``A``, so many times."""
        return self.put_bytes(bytes([0b1000_1110]) * count)

    def end(self) -> "Deflate":
        """In a block of fixed codes: its end."""
        return self.put(0, 7)

    def match(self, length_code: int, distance_code: int) -> "Deflate":
        """In a block of fixed codes: a match whose length and distance need no extra bits."""
        code = (length_code - 256, 7) if length_code < 280 else (0xC0 + length_code - 280, 8)
        return self.code(*code).code(distance_code, 5)

    def dynamic(self, literals: dict[int, int], distances: dict[int, int], **counts: int) -> "Deflate":
        """The head of a block with codes of these lengths by symbol; ``counts`` may state more of them."""
        literal_count, distance_count = counts.get("literal_count", 257), counts.get("distance_count", 1)
        self.block(2).put(literal_count - 257, 5).put(distance_count - 1, 5).put(15, 4)
        for _ in range(3):  # no codes that repeat
            self.put(0, 3)
        for _ in range(16):  # each length as a code of four bits
            self.put(4, 3)
        for lengths, count in ((literals, literal_count), (distances, distance_count)):
            for symbol in range(count):
                self.code(lengths.get(symbol, 0), 4)
        return self


def deflate(plain: bytes, *, window_bits: int = 12, end: int = zlib.Z_FINISH) -> bytes:
    """A raw deflate stream by zlib."""
    compressor = zlib.compressobj(wbits=-window_bits)
    return compressor.compress(plain) + compressor.flush(end)


def zstd(plain: bytes, *, checksum: bool = False, window_log: int | None = None) -> bytes:
    """A frame by zstd; with ``window_log`` it states that window instead of the size of its content."""
    options: dict[int, int] = {CompressionParameter.checksum_flag: int(checksum)}
    if window_log is None:
        return ZstdCompressor(options=options).compress(plain, ZstdCompressor.FLUSH_FRAME)
    compressor = ZstdCompressor(options={**options, CompressionParameter.window_log: window_log})
    return compressor.compress(plain) + compressor.flush()


def frame(*blocks: bytes, content_size: int | None = None, window: int = 0x58, tail: bytes = b"") -> bytes:
    """A frame put together by hand; ``window`` is the descriptor byte (2 MiB), used where no content size is stated."""
    checksum = 4 if tail else 0
    head = bytes([checksum, window])
    if content_size is not None:
        head = bytes([0xE0 | checksum]) + content_size.to_bytes(8, "little")
    return _ZSTD_MAGIC + head + b"".join(blocks) + tail


def block(data: bytes, *, kind: int = 0, length: int | None = None, last: bool = False) -> bytes:
    """A zstd block: kind 0 raw, 1 one byte repeated ``length`` times, 2 compressed, 3 reserved."""
    size = len(data) if length is None else length
    return (size << 3 | kind << 1 | last).to_bytes(3, "little") + data


def raw_blocks(plain: bytes, *, last: bool = True) -> bytes:
    """Content as raw blocks of 64 KiB."""
    pieces = [plain[start : start + 65536] for start in range(0, len(plain), 65536)]
    return b"".join(block(piece, last=last and piece is pieces[-1]) for piece in pieces)


def skippable(length: int, *, stated: int | None = None) -> bytes:
    """A frame that decoders pass over."""
    return struct.pack("<II", 0x184D2A50, length if stated is None else stated) + bytes(length)


def deflate_streams(size: int) -> list[Stream]:
    """Streams around the rules of deflate, for a cluster of ``size`` bytes."""
    plain = content(1, 0, size)
    good = deflate(plain)
    # Every match but the first few reaches back nearly as far as the format allows.
    far = (content(1, 0, 31 << 10) * (size // (31 << 10) + 1))[:size]

    def full() -> Deflate:
        return Deflate().stored(plain)

    def literals(head: Deflate) -> bytes:
        return head.put(0, size).put(1, 1).data

    found = {
        "what a writer makes": good,
        "not ended": deflate(plain, end=zlib.Z_SYNC_FLUSH),
        "stored blocks": Deflate().stored(plain, last=True).data,
        "one byte short": deflate(plain[:-1]),
        "one byte long": deflate(plain + b"x"),
        "a bomb": deflate(bytes(100 * size)),
        "empty": deflate(b""),
        "nothing but zeros": bytes(512),
        "nothing but ones": b"\xff" * 512,
        "garbage behind the end": good + b"\xff" * 600,
        "followed by another": good + good,
        "full, then a reserved block": full().block(3).data,
        "full, then a bad stored block": full().stored(b"abc", check=0).data,
        "full, then one byte": full().stored(b"x", last=True).data,
        "full, then an empty block": full().stored(b"", last=True).data,
        "full, then many empty blocks": full().data + Deflate().stored(b"").data * 40,
        "many empty blocks first": Deflate().stored(b"").data * 40 + good,
        "only empty blocks": Deflate().stored(b"").data * 100,
        "a reserved block": Deflate().block(3).data,
        "window of 32 KiB": deflate(far, window_bits=15),
        "window of 32 KiB, not ended": deflate(far, window_bits=15, end=zlib.Z_SYNC_FLUSH),
        "window of 32 KiB, one byte long": deflate(far + b"x", window_bits=15),
        "a match before the start": Deflate().block(1).letters(1).match(257, 1).letters(size - 4).end().data,
        "length code 286": Deflate().block(1).letters(1).match(286, 0).letters(size - 259).end().data,
        "distance code 30": Deflate().block(1).letters(1).match(257, 30).letters(size - 4).end().data,
        "codes of one bit": literals(Deflate().dynamic(_LITERALS, {})),
        "one distance code of one bit": literals(Deflate().dynamic(_LITERALS, {0: 1})),
        "incomplete distance codes": literals(Deflate().dynamic(_LITERALS, {0: 2, 1: 2}, distance_count=2)),
        "too many distance codes": literals(Deflate().dynamic(_LITERALS, {0: 1, 1: 1, 2: 1}, distance_count=3)),
        "incomplete literal codes": literals(Deflate().dynamic({65: 2, 256: 2}, {})),
        "too many literal codes": literals(Deflate().dynamic({65: 1, 66: 1, 256: 1}, {})),
        "no code for the end": Deflate().dynamic({65: 1, 66: 1}, {}).put(0, size).data,
        "287 literal codes": literals(Deflate().dynamic(_LITERALS, {}, literal_count=287)),
        "31 distance codes": literals(Deflate().dynamic(_LITERALS, {}, distance_count=31)),
        "with a zlib header": zlib.compress(plain),
    }
    return [*(Stream(*item) for item in found.items()), Stream("described too short", good, sectors=1)]


def zstd_streams(size: int) -> list[Stream]:
    """Streams around the rules of zstd, for a cluster of ``size`` bytes."""
    plain = content(1, 0, size)
    good = zstd(plain)
    empty = zstd(b"")
    thirds = [zstd(plain[start : start + size // 3 + 1]) for start in range(0, size, size // 3 + 1)]
    checked = zstd(plain, checksum=True)
    repeated = [block(b"A", kind=1, length=min(size, 65536))] * max(1, size // 65536)
    found = {
        "what a writer makes": good,
        "one byte short": zstd(plain[:-1]),
        "one byte long": zstd(plain + b"x"),
        "a bomb": zstd(bytes(100 * size)),
        "a bomb of repeated bytes": frame(*[block(b"A", kind=1, length=65536)] * 200, block(b"", last=True)),
        "a size of 1 GiB, and zeros": frame(*[block(b"\0", kind=1, length=65536)] * 300, content_size=1 << 30),
        "a size of 1 GiB, and a cluster": frame(raw_blocks(plain), content_size=1 << 30),
        "a size of 2^64 - 1": frame(raw_blocks(plain), content_size=(1 << 64) - 1),
        "a size of 0": frame(raw_blocks(plain), content_size=0),
        "a size one too small": frame(raw_blocks(plain), content_size=size - 1),
        "a size one too large": frame(raw_blocks(plain), content_size=size + 1),
        "empty": empty,
        "nothing but zeros": bytes(512),
        "nothing but ones": b"\xff" * 512,
        "garbage behind the end": good + b"\xff" * 600,
        "followed by another": good + good,
        "three frames": b"".join(thirds),
        "three frames with others between": (skippable(20) + empty).join(thirds),
        "two thirds of it, then garbage": b"".join(thirds[:2]) + b"\xff" * 100,
        "empty frames first": empty * 30 + good,
        "only empty frames": empty * 50,
        "a skippable frame first": skippable(500) + good,
        "only skippable frames": skippable(0) * 60,
        "a skippable frame without an end": skippable(0, stated=0xFFFF_FFFF) + good,
        "checksum": checked,
        "wrong checksum": checked[:-1] + bytes([checked[-1] ^ 1]),
        "checksum cut off": checked[:-4],
        "an empty block at the end": frame(raw_blocks(plain, last=False), block(b"", last=True)),
        "empty blocks between": frame(block(b"") * 30 + raw_blocks(plain, last=False), block(b"", last=True)),
        "only empty blocks": frame(block(b"") * 100),
        "full, then a reserved block": frame(raw_blocks(plain, last=False), block(b"abc", kind=3)),
        "full, then one byte": frame(raw_blocks(plain, last=False), block(b"x", last=True)),
        "full, but not ended": frame(raw_blocks(plain, last=False)),
        "full, and ended by zeros": frame(raw_blocks(plain, last=False), bytes(40)),
        "repeated bytes": frame(*repeated, block(b"", last=True)),
        "a reserved block": frame(block(b"abc", kind=3, last=True)),
        "a block of 2 MiB": frame(block(b"A", kind=1, length=(1 << 21) - 1, last=True)),
        "a dictionary": good[:4] + bytes([good[4] | 3]) + b"\1\0\0\0" + good[5:],
        "a reserved bit": good[:4] + bytes([good[4] | 8]) + good[5:],
        "without its magic": good[4:],
        "the magic of version 0.7": b"\x27" + good[1:],
        **{f"a window of 2^{bits}": zstd(plain, window_log=bits) for bits in (17, 21, 23, 24, 27)},
        **{f"a window of 2^{10 + byte // 8}": frame(raw_blocks(plain), window=byte) for byte in (0, 0x90, 0xF8)},
    }
    return [*(Stream(*item) for item in found.items()), Stream("described too short", good, sectors=1)]


def damaged(make: Callable[[bytes], bytes], size: int, count: int, seed: str) -> list[Stream]:
    """``count`` streams of a writer, each with a few bytes changed, most of them near its start."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        plain = bytearray(content(number, 0, size))
        plain[: size // 3] = rng.choice((bytes(size // 3), plain[-(size // 3) :], plain[: size // 3]))
        data = bytearray(make(bytes(plain)))
        for _ in range(rng.randrange(1, 4)):
            position = rng.choice((rng.randrange(min(len(data), 24)), rng.randrange(len(data))))
            data[position] = rng.choice((data[position] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 0xFF))
        found.append(Stream(f"damaged #{number}", bytes(data)))
    return found

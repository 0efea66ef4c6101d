"""Images that are put together by hand: what no tool writes, around one thing that matters."""

import struct
from collections.abc import Sequence

from nbdq.qcow2.extensions import EncryptionPointer
from nbdq.qcow2.format import CompressionType, CryptMethod, Incompatible
from tests.hostile.anatomy import COMPRESSED
from tests.hostile.streams import Stream
from tests.qcow2.minimal import minimal_header, minimal_image


def compressed_image(
    streams: Sequence[Stream], kind: CompressionType, *, cluster_bits: int, skip: int = 0
) -> tuple[bytes, list[tuple[int, int]]]:
    """An image in which guest cluster ``n`` is compressed as ``streams[n]``, and the places of their data in the file.

    The data of each begins at a sector, or ``skip`` bytes behind one; the file ends with the last one's.
    """
    size = 1 << cluster_bits
    tables = -(-len(streams) // (size // 8))
    header = minimal_header(
        cluster_bits=cluster_bits,
        size=len(streams) << cluster_bits,
        l1_size=tables,
        compression_type=kind,
        incompatible=Incompatible.COMPRESSION_TYPE if kind else Incompatible.NONE,
    )
    image = minimal_image(header)
    l2_offset, data_offset = len(image), len(image) + tables * size
    entries, places, data = [], [], bytearray()
    for stream in streams:
        data += bytes(-len(data) % 512 + skip)
        place = data_offset + len(data)
        places.append((place, len(stream.data)))
        entries.append(
            descriptor(place, stream.sectors or sectors_of(place, len(stream.data)), cluster_bits=cluster_bits)
        )
        data += stream.data
    for number in range(tables):
        struct.pack_into(">Q", image, header.l1_table_offset + 8 * number, l2_offset + number * size)
    return bytes(image + struct.pack(f">{len(entries)}Q", *entries).ljust(tables * size, b"\0") + data), places


def sectors_of(offset: int, length: int) -> int:
    """How many sectors of the file hold a part of the range."""
    return max(1, -(-(offset % 512 + length) // 512))


def descriptor(offset: int, sectors: int, *, cluster_bits: int) -> int:
    """The L2 entry of a compressed cluster (Q49)."""
    return COMPRESSED | (sectors - 1) << 62 - (cluster_bits - 8) | offset


def luks_image() -> tuple[bytes, int]:
    """An encrypted image as far as it describes itself (Q73), and where its LUKS header is in the file."""
    offset = 4 << 16
    length = 592
    header = minimal_header(crypt_method=CryptMethod.LUKS, encryption=EncryptionPointer(offset, length))
    luks = struct.pack(">6sH32s32s32s", b"LUKS\xba\xbe", 1, b"aes", b"xts-plain64", b"sha256")
    luks += struct.pack(">II20s32sI40s", 4096, 64, bytes(20), bytes(32), 1000, b"0d5f1e5c-7b0c-4f0e-9d3c-2f6a3b1c9e77")
    luks += struct.pack(">II32sII", 0x00AC71F3, 1000, bytes(32), 8, 4000)
    luks += struct.pack(">II32sII", 0x0000DEAD, 0, bytes(32), 512, 4000) * 7
    return bytes(minimal_image(header)) + luks, offset

"""The feature bits and enumerated header fields of QCOW2, and the names under which users know them (section 1.3).

Constants only; unknown bits survive in every flag set, because compatible and autoclear ones must be preserved.
"""

from enum import IntEnum, IntFlag


class Incompatible(IntFlag):
    """Who does not know one of these bits cannot use the image at all."""

    NONE = 0
    DIRTY = 1 << 0
    """Refcounts may be wrong; reading is safe (Q32)."""
    CORRUPT = 1 << 1
    """Metadata is known to be damaged; only repair may write."""
    DATA_FILE = 1 << 2
    COMPRESSION_TYPE = 1 << 3
    EXTENDED_L2 = 1 << 4


class Compatible(IntFlag):
    """Bits that a program may ignore, and must preserve (Q14)."""

    NONE = 0
    LAZY_REFCOUNTS = 1 << 0


class Autoclear(IntFlag):
    """Bits that a writer clears unless it maintains what they promise (Q15)."""

    NONE = 0
    BITMAPS = 1 << 0
    DATA_FILE_RAW = 1 << 1


class CompressionType(IntEnum):
    """How compressed clusters are compressed; option names call DEFLATE ``zlib``."""

    DEFLATE = 0
    ZSTD = 1


class CryptMethod(IntEnum):
    """How guest data is encrypted (section 1.11)."""

    NONE = 0
    AES = 1
    LUKS = 2


KNOWN_INCOMPATIBLE = Incompatible(sum(Incompatible))

#: Names for the feature name table, by set (0 incompatible, 1 compatible, 2 autoclear) and bit (Q22).
FEATURE_NAMES: dict[tuple[int, int], str] = {
    (0, 0): "dirty bit",
    (0, 1): "corrupt bit",
    (0, 2): "external data file",
    (0, 3): "compression type",
    (0, 4): "extended L2 entries",
    (1, 0): "lazy refcounts",
    (2, 0): "bitmaps",
    (2, 1): "raw external data",
}

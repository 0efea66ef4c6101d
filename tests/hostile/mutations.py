"""Damage that is aimed: one to three edits of known places of a valid image, with values at the edges of the rules.

Random bytes die at the magic; of these images most still open (:mod:`tests.hostile.anatomy` says where to hit). Every
mutation is a function of (random seed, name of the image, number), and says in words what it did.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from tests.hostile.anatomy import COMPRESSED, COPIED, OFFSET_MASK, ZERO, Anatomy, Area, Field
from tests.hostile.seeds import Seed, StoredFile

#: How often each area is hit, where the image has it. Hits of the first two are the ones that prevent opening.
_WEIGHTS = {
    Area.HEADER: 16,
    Area.EXTENSIONS: 7,
    Area.L1: 12,
    Area.L2: 25,
    Area.SUBCLUSTERS: 12,
    Area.PAYLOAD: 14,
    Area.SNAPSHOTS: 6,
    Area.BITMAPS: 8,
    Area.REFCOUNTS: 5,
    Area.LENGTH: 6,
}
#: Hardly any other value of these leaves an image; one hit in a while is enough.
_FATAL = {"magic", "version", "cluster_bits", "header_length", "crypt_method"}
_CHARACTERS = (0x00, 0x09, 0x0A, 0x1B, 0x25, 0x2F, 0x3A, 0x7F, 0x80, 0xC3, 0xFF)
_EXTENSION_TYPES = (0, 0xE2792ACA, 0x6803F857, 0x23852875, 0x0537BE77, 0x44415441, 0x12345678)
#: Longer files are sparse: what lies behind the old end is a hole.
_EXTENSIONS = (1, 511, 512, 65536, 1 << 30, 1 << 34)

#: Magics and frame headers that lead a decoder astray: skippable and empty frames, a content size of 1 GiB, a window of
#: 2^27 and of 2^41; deflate blocks that are stored, of a reserved type, and with an oversubscribed code.
_HEADS = tuple(
    map(
        bytes.fromhex,
        (
            "502a4d18ffffffff",
            "28b52ffd2000010000",
            "28b52ffda000000040",
            "28b52ffd0088",
            "28b52ffd00f8",
            "00000000",
            "010000ffff",
            "07",
            "fdffffff",
        ),
    )
)


class Edit(NamedTuple):
    """One change of one file: bytes put at an offset, or another length if there are none."""

    offset: int
    data: bytes | None
    what: str

    def __str__(self) -> str:
        if self.data is None:
            return f"length := {self.offset}"
        return f"{self.what} @{self.offset:#x} := {self.data.hex()}"


@dataclass(frozen=True)
class Mutation:
    """What to do to one image file of a seed."""

    seed: str
    number: int
    file: str
    areas: tuple[Area, ...]
    edits: tuple[Edit, ...]

    def __str__(self) -> str:
        """The recipe: enough to do the same by hand."""
        return f"{self.seed} #{self.number}: {self.file}: " + "; ".join(map(str, self.edits))

    def apply(self, stored: StoredFile) -> StoredFile:
        """The file with the edits done, in order."""
        segments, length = list(stored.segments), stored.length
        for edit in self.edits:
            if edit.data is None:
                length = edit.offset
                segments = [(start, data[: max(length - start, 0)]) for start, data in segments if start < length]
            else:
                segments.append((edit.offset, edit.data))
                length = max(length, edit.offset + len(edit.data))
        return StoredFile(length, tuple(segments))


def mutate(seed: Seed, number: int, *, random_seed: str) -> Mutation:
    """The mutation with this number of an image."""
    name = seed.variant.name
    rng = random.Random(f"{random_seed}:{name}:{number}")
    file = rng.choice(seed.images)
    anatomy = seed.anatomies[file]
    weights = {area: weight for area, weight in _WEIGHTS.items() if area in anatomy.fields or area is Area.LENGTH}
    count = rng.choices((1, 2, 3), (6, 3, 1))[0]
    areas = rng.choices(list(weights), list(weights.values()), k=count)
    # A length comes last, so that no edit undoes it.
    areas.sort(key=lambda area: area is Area.LENGTH)
    return Mutation(name, number, file, tuple(areas), tuple(_edit(anatomy, area, rng) for area in areas))


def _edit(anatomy: Anatomy, area: Area, rng: random.Random) -> Edit:
    if area is Area.LENGTH:
        return Edit(rng.choice(_lengths(anatomy)), None, "length")
    if area is Area.PAYLOAD:
        return _damage_payload(anatomy, rng)
    fields = anatomy.fields[area]
    field = rng.choices(fields, [1 if field.name in _FATAL else 4 for field in fields])[0]
    value = rng.choice(_VALUES.get(area, _numbers)(anatomy, field))
    return Edit(field.offset, (value % (1 << 8 * field.width)).to_bytes(field.width, "big"), field.name)


def _lengths(anatomy: Anatomy) -> list[int]:
    """Ends of the file: just before, at and just after everything; longer, too."""
    end = anatomy.length
    cuts = {0, 4, 71, 72, 103, 104, 111, 112, 511, 512}
    for place in anatomy.places:
        cuts |= {place - 512, place - 1, place, place + 1, place + 8, place + 512, place + anatomy.cluster_size // 2}
    return [cut for cut in sorted(cuts) if 0 <= cut < end] + [end + more for more in _EXTENSIONS]


def _damage_payload(anatomy: Anatomy, rng: random.Random) -> Edit:
    """A few bytes of one compressed cluster, mostly near its start, where the decoder takes its decisions."""
    offset, length = rng.choice(anatomy.payloads)
    position = offset + rng.choice((0, 0, 4, 5, 6, rng.randrange(24), rng.randrange(length)))
    old = anatomy.number(position, 1)
    makers: tuple[Callable[[], bytes], ...] = (
        lambda: bytes([old ^ 1 << rng.randrange(8)]),
        lambda: bytes([rng.randrange(256)]),
        lambda: rng.choice(_HEADS),
        lambda: rng.choice((b"\0", b"\xff")) * rng.choice((4, 64, 600)),
        lambda: rng.randbytes(8),
    )
    return Edit(position, rng.choice(makers)(), "compressed data")


def _numbers(anatomy: Anatomy, field: Field) -> list[int]:
    """Edges of a number without a meaning, and its neighbours."""
    old = anatomy.number(field.offset, field.width)
    bits = 8 * field.width
    edges = {0, 1, 2, (1 << bits) - 1, (1 << bits - 1) - 1, 1 << bits - 1, old - 1, old + 1, old * 2, old ^ 1 << 3}
    if field.width == 8:
        edges |= _offsets(anatomy)
    if field.width >= 4:
        edges |= {old + 8, old + 512, old - 512, 512, 1024, 65535, 65536, 1 << 22, (1 << 22) + 1, 1 << 27}
    return sorted(edge for edge in edges if edge >= 0)


def _offsets(anatomy: Anatomy) -> set[int]:
    """Places in the file, and places that are none."""
    size, end = anatomy.cluster_size, anatomy.length
    following = -(-end // size) * size
    edges = {
        following - size,
        following,
        following + size,
        1 << 40,
        (1 << 56) - size,
        1 << 62,
        (1 << 63) - size,
        1 << 63,
    }
    return anatomy.places | edges | {min(anatomy.places - {0}) + 512, size // 2}


def _header(anatomy: Anatomy, field: Field) -> list[int]:
    """The edges of each field's rules (1.13), most of them legal."""
    old = anatomy.number(field.offset, field.width)
    size = anatomy.cluster_size
    reach = size // anatomy.entry_size * size
    bits = [old ^ 1 << bit for bit in (0, 1, 2, 3, 4, 5, 8, 31, 63)]
    sizes = {
        old - 512,
        old - 1,
        old + 1,
        old + 512,
        old + size,
        old * 2,
        0,
        1,
        511,
        512,
        1 << 62,
        1 << 63,
        (1 << 64) - 1,
    }
    sizes |= {reach, reach + 1, reach * anatomy.header["l1_size"], reach * anatomy.header["l1_size"] + 1}
    return {
        "backing_file_size": [0, 1, old - 1, old + 1, 1023, 1024],
        "cluster_bits": [8, 9, 12, 16, 21, 22, old - 1, old + 1, 0xFFFF_FFFF],
        "size": sorted(sizes),
        "crypt_method": [1, 2, 3],
        "l1_size": [0, 1, old - 1, old + 1, old + 8, size // 8, 1 << 16, 1 << 22, (1 << 22) + 1, 0xFFFF_FFFF],
        "refcount_table_clusters": [0, 1, old + 1, old + 2, (8 << 20) // size, (8 << 20) // size + 1, 0xFFFF_FFFF],
        "nb_snapshots": [0, 1, old + 1, old + 2, 65536, 65537],
        "incompatible_features": bits,
        "compatible_features": bits,
        "autoclear_features": bits,
        "refcount_order": [0, 1, 2, 3, 4, 5, 6, 7, 255],
        "header_length": [0, 72, 103, 104, 105, 108, 112, 120, 512, size, size + 8],
        "compression_type": [0, 1, 2, 255],
    }.get(field.name) or _numbers(anatomy, field)


def _extension(anatomy: Anatomy, field: Field) -> list[int]:
    if field.width == 1:
        return [*_CHARACTERS, anatomy.number(field.offset, 1) ^ 1]
    if field.name.startswith("type"):
        return list(_EXTENSION_TYPES)
    return _numbers(anatomy, field)


def _l1_entries(anatomy: Anatomy, field: Field) -> list[int]:
    old = anatomy.number(field.offset, 8)
    tables = [anatomy.number(other.offset, 8) for other in anatomy.fields[Area.L1]]
    reserved = [old ^ 1, old ^ 1 << 8, old ^ 1 << 56, old ^ 1 << 62]
    return [old ^ COPIED, *reserved, *tables, *(COPIED | offset for offset in _offsets(anatomy)), 0, 1, (1 << 64) - 1]


def _l2_entries(anatomy: Anatomy, field: Field) -> list[int]:
    """Every kind of entry at every kind of place."""
    old = anatomy.number(field.offset, 8)
    plain: Iterable[int] = sorted(_offsets(anatomy))
    found = [COPIED | offset for offset in plain] + [ZERO | offset for offset in plain]
    found += [old ^ bit for bit in (ZERO, 1 << 1, 1 << 8, 1 << 9, 1 << 56, 1 << 61, COMPRESSED, COPIED)] * 3
    found += [0, ZERO, COPIED, COPIED | ZERO, COMPRESSED, COMPRESSED | COPIED, (1 << 64) - 1, OFFSET_MASK] * 2
    bits = 62 - (anatomy.cluster_bits - 8)
    end = anatomy.length
    for offset, length in anatomy.payloads[:6]:
        sectors = (length + offset % 512) // 512 - 1
        most = (1 << 62 - bits) - 1
        for place in (offset, offset - 1, offset + 1, end - 1, end, end - 512):
            found += [COMPRESSED | count << bits | place for count in (sectors, 0, sectors + 1, most)]
    return found


def _subclusters(anatomy: Anatomy, field: Field) -> list[int]:
    old = anatomy.number(field.offset, 8)
    allocated, zero = (1 << 32) - 1, ((1 << 32) - 1) << 32
    edges = [
        0,
        1,
        1 << 31,
        1 << 32,
        1 << 63,
        allocated,
        zero,
        0x5555_5555,
        0xAAAA_AAAA_5555_5555,
        0x8000_0000_0000_0001,
    ]
    invalid = [allocated | zero, 1 | 1 << 32, old | old << 32]
    return edges + invalid + [old ^ 1 << bit for bit in (0, 7, 31, 32, 40, 63)] * 2


_VALUES: dict[Area, Callable[[Anatomy, Field], list[int]]] = {
    Area.HEADER: _header,
    Area.EXTENSIONS: _extension,
    Area.L1: _l1_entries,
    Area.L2: _l2_entries,
    Area.SUBCLUSTERS: _subclusters,
}

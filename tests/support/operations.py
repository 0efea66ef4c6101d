"""What a guest does to a disk: random operations, all a function of one seed, and the contents that they must leave.

Every byte that is written names the operation and the place it was written for, so that a sector which shows up in
the wrong place, or after it was overwritten, is known for what it is. Nothing but the standard library is used here,
because the system's interpreter, which has libnbd, carries the same operations out over the wire (``player.py``).
"""

import struct
from collections.abc import Iterable, Iterator
from enum import StrEnum
from random import Random
from typing import NamedTuple

SECTOR = 512
#: The most that one write carries.
LARGEST_WRITE = 4 << 20
#: Lengths on the wire have 32 bits, of which servers do not take all.
LARGEST_REQUEST = 1 << 30
#: The most that is zeroed where the host must find space for it.
LARGEST_RESERVATION = 4 << 20

_STAMP = struct.Struct(">QQ")


class Verb(StrEnum):
    """One kind of request."""

    WRITE = "write"
    BLANK = "blank"
    """A write whose payload is zeros."""
    ZERO = "zero"
    """Write zeroes, and keep space for later (NO_HOLE)."""
    UNMAP = "unmap"
    """Write zeroes, and give the space back."""
    DISCARD = "discard"
    FLUSH = "flush"
    READ = "read"


class Operation(NamedTuple):
    """One request: ``number`` tells its contents from those of all others."""

    verb: Verb
    offset: int = 0
    length: int = 0
    number: int = 0
    fua: bool = False
    fast: bool = False
    """FAST_ZERO: repeated without it when the server says that it would take long."""

    def payload(self) -> bytes:
        """What a WRITE or BLANK carries."""
        if self.verb is Verb.BLANK:
            return bytes(self.length)
        return stamped(self.number, self.offset, self.length)

    def __str__(self) -> str:
        flags = f"{' fua' * self.fua}{' fast' * self.fast}"
        return f"{self.number}: {self.verb} {self.offset} {self.length}{flags}"


def stamped(number: int, offset: int, length: int) -> bytes:
    """Contents that say "operation ``number``, sector so-and-so" every 16 bytes."""
    first, last = offset // SECTOR, -(-(offset + length) // SECTOR)
    sectors = b"".join(_STAMP.pack(number + 1, sector) * (SECTOR // _STAMP.size) for sector in range(first, last))
    return sectors[offset - first * SECTOR :][:length]


class Guest:
    """What a disk must read as: the bytes, and the rules by which operations change them."""

    def __init__(self, content: bytes | bytearray, *, cluster_size: int, discards: bool = True) -> None:
        """``discards`` is False for a disk that ignores them (M2)."""
        self.content = bytearray(content)
        self.cluster_size = cluster_size
        self.discards = discards

    def apply(self, operation: Operation) -> None:
        """Carry ``operation`` out. A discard makes whole clusters zero, also a cut one at the disk's end (T1)."""
        verb, start, end = operation.verb, operation.offset, operation.offset + operation.length
        if verb is Verb.DISCARD:
            if not self.discards:
                return
            start = -(-start // self.cluster_size) * self.cluster_size
            if end < len(self.content):
                end -= end % self.cluster_size
        if verb in (Verb.WRITE, Verb.BLANK):
            self.content[start:end] = operation.payload()
        elif verb in (Verb.ZERO, Verb.UNMAP, Verb.DISCARD) and start < end:
            self.content[start:end] = bytes(end - start)


def independent(operations: Iterable[Operation], *, most: int, flushes: bool = True) -> Iterator[list[Operation]]:
    """Neighbours that touch different bytes, so that their order does not matter; ``most`` in one list.

    Without ``flushes`` among them a flush stands alone.
    """
    batch: list[Operation] = []
    for operation in operations:
        alone = operation.verb is Verb.FLUSH and not flushes
        if batch and (alone or len(batch) == most or any(_meet(operation, other) for other in batch)):
            yield batch
            batch = []
        batch.append(operation)
        if alone:
            yield batch
            batch = []
    if batch:
        yield batch


def _meet(one: Operation, other: Operation) -> bool:
    return one.offset < other.offset + other.length and other.offset < one.offset + one.length


_WEIGHTS = {
    Verb.WRITE: 50,
    Verb.BLANK: 3,
    Verb.ZERO: 7,
    Verb.UNMAP: 8,
    Verb.DISCARD: 10,
    Verb.FLUSH: 8,
    Verb.READ: 14,
}


def random_operations(
    seed: int, count: int, *, size: int, cluster_size: int, number: int = 0, whole_sectors: bool = False
) -> list[Operation]:
    """``count`` operations on a disk of ``size`` bytes, numbered from ``number``: the same today and tomorrow.

    Half of them meet in a few places, so that clusters are written, given back and written again.
    """
    random = Random(seed)
    favourites = [random.randrange(max(size, 1)) for _ in range(6)]
    found = []
    for position in range(number, number + count):
        verb = random.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        if verb is Verb.FLUSH or size == 0:
            found.append(Operation(Verb.FLUSH, number=position))
            continue
        offset, length = _random_range(random, verb, size=size, cluster_size=cluster_size, near=favourites)
        if whole_sectors:
            end = min(-(-(offset + length) // SECTOR) * SECTOR, size)
            offset -= offset % SECTOR
            length = end - offset
        fua = verb is not Verb.READ and random.random() < 0.07
        fast = verb in (Verb.ZERO, Verb.UNMAP) and random.random() < 0.2
        found.append(Operation(verb, offset, length, position, fua, fast))
    return found


def _random_range(random: Random, verb: Verb, *, size: int, cluster_size: int, near: list[int]) -> tuple[int, int]:
    """Sectors, odd bytes, whole clusters, subclusters or what one table maps; now and then up to the disk's end."""
    place = random.choice(near) if random.random() < 0.5 else random.randrange(size)
    cluster = place - place % cluster_size
    longest = LARGEST_RESERVATION if verb is Verb.ZERO else size
    if verb in (Verb.WRITE, Verb.BLANK, Verb.READ):
        longest = LARGEST_WRITE
    several = min(4 * cluster_size, 512 << 10)
    match random.randrange(12):
        case 0 | 1 | 2:
            offset, length = place - place % SECTOR, SECTOR * random.randrange(1, 9)
        case 3 | 4:
            offset, length = place, random.randrange(1, several)
        case 5 | 6 | 7:
            offset, length = cluster, cluster_size * random.randrange(1, 5)
        case 8:
            unit = max(cluster_size // 32, SECTOR)
            offset, length = place - place % unit, unit * random.randrange(1, 40)
        case 9:
            offset, length = cluster + random.randrange(cluster_size), cluster_size * random.randrange(1, 4)
        case 10:
            length = random.choice((1, SECTOR, cluster_size, random.randrange(1, several)))
            offset = size - min(length, size)
        case _:
            coverage = cluster_size // 8 * cluster_size
            offset, length = place - place % coverage, coverage
    offset = min(offset, size - 1)
    return offset, min(length, longest, LARGEST_REQUEST, size - offset)

"""The guest: its requests, when they were made and answered, and what it may find on its disk after a crash.

A request is durable if it was answered before a flush was asked for that was answered before the crash. A sector then
holds what a durable request left there, unless another durable one was made after that was answered; or what any
request did that is not durable; nothing else.
"""

import errno
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tests.crash.recorder import NEVER, SECTOR, Recorder
from tests.crash.stamps import ZEROS, Values, stamped

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Image(Protocol):
    """The image that a disk writes to."""

    @property
    def cluster_size(self) -> int: ...


class Disk(Protocol):
    """As much of a :class:`nbdq.block.WritableBlockDevice` as a guest uses that only writes, and reads at the end."""

    @property
    def size(self) -> int: ...
    @property
    def top(self) -> Image: ...
    def read_into(self, offset: int, view: memoryview) -> None: ...
    def write_cached(self, offset: int, view: memoryview) -> bool: ...
    def write(self, offset: int, view: memoryview) -> None: ...
    def zero(self, offset: int, length: int, *, unmap: bool) -> None: ...
    def discard(self, offset: int, length: int) -> None: ...
    def populate(self, offset: int, length: int) -> int: ...
    def write_compressed(self, offset: int, data: bytes) -> bool: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Verb(Enum):
    """What a guest asks for."""

    WRITE = "write"
    ZERO = "zero"
    """With permission to unmap."""
    ZERO_MAPPED = "zero, keeping space"
    DISCARD = "discard"
    FLUSH = "flush"
    # Not a guest's, but of operations that go on meanwhile.
    POPULATE = "populate"
    COMPRESS = "store a compressed cluster"


_CHANGING_NOTHING = (Verb.FLUSH, Verb.POPULATE)
_WRITING = (Verb.WRITE, Verb.COMPRESS)


@dataclass(slots=True, eq=False)
class Request:
    """One request; sectors of the guest's disk, moments of the recorder's clock."""

    number: int
    """What its stamps say; small numbers are left to what was there before."""
    verb: Verb
    first_sector: int
    sector_count: int
    issued: int
    answered: int = NEVER
    failed: bool = False

    @property
    def sectors(self) -> slice:
        return slice(self.first_sector, self.first_sector + self.sector_count)

    def __str__(self) -> str:
        end = "never" if self.answered == NEVER else str(self.answered)
        where = f" sectors {self.first_sector}+{self.sector_count}" if self.sector_count else ""
        return f"#{self.number} {self.verb.value}{where} ({self.issued}..{end}{', failed' if self.failed else ''})"


class History:
    """All requests of a guest to one disk, and the disk as it was before."""

    def __init__(self, recorder: Recorder, initial: Values, *, first_number: int) -> None:
        self.requests: list[Request] = []
        self._recorder = recorder
        self._initial = initial
        self._next = first_number
        self._cache: dict[tuple[int, int], Allowed] = {}

    def begin(self, verb: Verb, first_sector: int = 0, sector_count: int = 0) -> Request:
        """Note that the guest asks for something."""
        request = Request(self._next, verb, first_sector, sector_count, self._recorder.tick())
        self._next += 1
        self.requests.append(request)
        return request

    def end(self, request: Request, *, failed: bool = False) -> None:
        """Note the answer."""
        request.failed = failed
        request.answered = self._recorder.tick()

    def is_busy(self, first_sector: int, sector_count: int) -> bool:
        """Whether a request on any of the sectors is not answered yet."""
        return any(
            request.answered == NEVER
            and request.first_sector < first_sector + sector_count
            and first_sector < request.first_sector + request.sector_count
            for request in self.requests
        )

    def promise(self, cut: int) -> int:
        """The moment before which an answered request is durable, if the crash is at ``cut``."""
        return max(
            (
                request.issued
                for request in self.requests
                if request.verb is Verb.FLUSH and request.answered <= cut and not request.failed
            ),
            default=0,
        )

    def allowed(self, cut: int) -> "Allowed":
        """What every sector may hold after a crash at ``cut``."""
        promise = self.promise(cut)
        issued = [
            request for request in self.requests if request.issued <= cut and request.verb not in _CHANGING_NOTHING
        ]
        key = (promise, len(issued))
        if key not in self._cache:
            self._cache.clear()  # cuts come in order
            self._cache[key] = Allowed(self._initial, issued, promise)
        return self._cache[key]

    def allowed_now(self) -> "Allowed":
        """What every sector may hold while nothing crashes and nothing is under way."""
        return Allowed(self._initial, [each for each in self.requests if each.verb not in _CHANGING_NOTHING], NEVER)


class Allowed:
    """For each sector a set of values, as one table: a row for each value, a column for each sector."""

    def __init__(self, initial: Values, requests: Sequence[Request], promise: int) -> None:
        """What ``requests`` may leave of ``initial``; those that were answered before ``promise`` are durable."""
        numbers = {ZEROS, *initial.tolist(), *(request.number for request in requests)}
        self._numbers = np.array(sorted(numbers), dtype=np.int64)
        self._table = np.zeros((len(numbers), len(initial)), dtype=bool)
        settled = np.zeros(len(initial), dtype=np.int64)
        """When the last durable request was made: whatever was answered before that is gone."""
        for request in requests:
            # A discard may leave everything as it is, and a request that failed may have been carried out in part.
            if request.answered < promise and request.verb is not Verb.DISCARD and not request.failed:
                settled[request.sectors] = np.maximum(settled[request.sectors], request.issued)
        untouched = np.flatnonzero(settled == 0)
        self._table[self._row(initial[untouched]), untouched] = True
        for request in requests:
            value = request.number if request.verb in _WRITING else ZEROS
            self._table[self._row(np.int64(value)), request.sectors] |= settled[request.sectors] <= request.answered

    def _row(self, values: Values | np.int64) -> NDArray[np.intp]:
        return np.asarray(np.searchsorted(self._numbers, values))

    def wrong(self, values: Values) -> NDArray[np.int64]:
        """The sectors that do not hold anything they may hold."""
        rows = np.minimum(self._row(values), len(self._numbers) - 1)
        right = (self._numbers[rows] == values) & self._table[rows, np.arange(len(values))]
        return np.flatnonzero(~right)

    def of(self, sector: int) -> list[int]:
        """What the sector may hold."""
        return [int(number) for number in self._numbers[self._table[:, sector]]]


@dataclass(frozen=True)
class Habits:
    """What a guest likes to do."""

    write: int = 60
    zero: int = 8
    zero_mapped: int = 4
    discard: int = 8
    flush: int = 15
    populate: int = 0
    compress: int = 0
    largest: int = 128
    """Sectors of the longest request."""
    aligned_to: int = 1
    """Sectors; of half of the requests that change anything."""
    sequential: bool = False
    """Each write begins where the last one ended."""
    hot: float = 1.0
    """The share of the disk in which most requests lie."""
    rude: float = 0.0
    """How often a guest with several requests under way does not care whether they overlap."""


class Guest:
    """A guest with habits. Several on one disk share their history."""

    def __init__(self, disk: Disk, history: History, habits: Habits, generator: random.Random) -> None:
        self._disk = disk
        self._history = history
        self._habits = habits
        self._generator = generator
        self._sectors = disk.size // SECTOR
        self._head = 0

    def work(self, count: int, *, cached: bool = True) -> None:
        """Make ``count`` requests; only one thread may try the way through the cache."""
        for _ in range(count):
            self.step(cached=cached)

    def step(self, *, cached: bool) -> None:
        """Make one request."""
        habits, generator = self._habits, self._generator
        weights = (
            *(habits.write, habits.zero, habits.zero_mapped, habits.discard, habits.flush),
            *(habits.populate, habits.compress),
        )
        verb = generator.choices(tuple(Verb), weights)[0]
        if verb is Verb.FLUSH:
            self.carry_out(self._history.begin(verb), cached=cached)
            return
        for _ in range(20):
            first, count = self._place(verb)
            if generator.random() < habits.rude or not self._history.is_busy(first, count):
                self.carry_out(self._history.begin(verb, first, count), cached=cached)
                return

    def _place(self, verb: Verb) -> tuple[int, int]:
        habits, generator = self._habits, self._generator
        if verb is Verb.COMPRESS:
            count = self._disk.top.cluster_size // SECTOR
            return generator.randrange(self._sectors // count) * count, count
        if habits.sequential and verb is Verb.WRITE:
            count = min(generator.choice((8, 16, habits.largest)), self._sectors - self._head)
            first, self._head = self._head, (self._head + count) % self._sectors
            return first, count
        count = min(int(2 ** generator.uniform(0, habits.largest.bit_length() - 0.01)), habits.largest, self._sectors)
        reach = self._sectors
        if generator.random() < 0.8:
            reach = max(count, int(reach * habits.hot))
        first = generator.randrange(reach - count + 1)
        unit = habits.aligned_to
        if generator.random() < 0.5:
            first -= first % unit
            count = min(-(-count // unit) * unit, self._sectors - first)
        return first, count

    def carry_out(self, request: Request, *, cached: bool) -> None:
        """Have the disk do it, and note the answer; a full medium is an answer, too."""
        offset, length = request.first_sector * SECTOR, request.sector_count * SECTOR
        failed = False
        try:
            match request.verb:
                case Verb.WRITE:
                    data = memoryview(stamped(request.number, request.first_sector, request.sector_count))
                    if not (cached and self._disk.write_cached(offset, data)):
                        self._disk.write(offset, data)
                case Verb.ZERO:
                    self._disk.zero(offset, length, unmap=True)
                case Verb.ZERO_MAPPED:
                    self._disk.zero(offset, length, unmap=False)
                case Verb.DISCARD:
                    self._disk.discard(offset, length)
                case Verb.FLUSH:
                    self._disk.flush()
                case Verb.POPULATE:
                    self._disk.populate(offset, length)
                case Verb.COMPRESS:
                    data = stamped(request.number, request.first_sector, request.sector_count)
                    stream = zlib.compressobj(1, wbits=-12)
                    self._disk.write_compressed(offset, stream.compress(data) + stream.flush())
        except OSError as error:
            if error.errno not in FULL:
                raise
            failed = True
        self._history.end(request, failed=failed)

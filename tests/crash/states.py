"""What may be on the medium after the power was cut: the model, and the choice of states that are looked at.

A write that ended before the begin of a sync of its file, which itself ended before the cut, is durable. Of every other
write that had begun each sector is there or not, whatever happened to the rest; so are lengths and punched ranges.
Overlapping writes reach the medium in the order in which they were made. Files are independent of each other.

So what is assumed of a medium is this: a sector of 512 bytes is written whole or not at all, a sync that returned has
made durable what it was asked for, and nobody touches bytes that were not written.
"""

import random
from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

from tests.crash.recorder import SECTOR, Act, Entry
from tests.crash.stamps import MAGIC

#: The sectors of an entry that are on the medium, as bits; None if not even the file became longer.
Fate = int | None


@dataclass(frozen=True)
class Moment:
    """What is certain and what is not when the power is cut at ``cut``."""

    cut: int
    certain: Sequence[bytearray]
    """The contents of each file; not to be changed."""
    pending: tuple[Entry, ...]
    """To be applied in this order, as far as they survived."""
    forced: tuple[bool, ...]
    """Which of ``pending`` are durable, behind others that are not."""

    def whole(self) -> list[Fate]:
        """The state that a killed process leaves: everything is there."""
        return [everything(entry) for entry in self.pending]

    def nothing(self) -> list[Fate]:
        """As little as possible."""
        return [everything(entry) if forced else None for entry, forced in zip(self.pending, self.forced, strict=True)]


def everything(entry: Entry) -> int:
    """The fate of an entry that survives whole."""
    return (1 << entry.sector_count) - 1


def is_metadata(entry: Entry) -> bool:
    """Whether an entry may change metadata; a guess, good enough to choose states by."""
    # Data is recognised by what is in it, because nobody but the guest writes stamps.
    return entry.act is not Act.WRITE or entry.data[:8] != MAGIC


class Timeline:
    """Goes through a log once, from the first cut to the last."""

    def __init__(self, initial: Sequence[bytes], entries: Sequence[Entry]) -> None:
        """Start before the first of ``entries``, which stand in the order in which they were carried out."""
        self._certain = [bytearray(content) for content in initial]
        changes = [(order, entry) for order, entry in enumerate(entries) if entry.act is not Act.SYNC]
        self._coming = deque(sorted(changes, key=lambda change: change[1].begun))
        syncs = [entry for entry in entries if entry.act is Act.SYNC]
        self._syncs = deque(sorted(syncs, key=lambda entry: entry.ended))
        self._pending: list[tuple[int, Entry]] = []
        self._durable = [0] * len(initial)  # by file: what ended before this moment is durable

    def at(self, cut: int) -> Moment:
        """The moment ``cut``, which may not lie before the last one; valid until the next call."""
        while self._coming and self._coming[0][1].begun <= cut:
            insort(self._pending, self._coming.popleft(), key=itemgetter(0))
        while self._syncs and self._syncs[0].ended <= cut:
            sync = self._syncs.popleft()
            self._durable[sync.file] = max(self._durable[sync.file], sync.begun)
        # What is certain is folded in, up to the first entry of the file that is not.
        uncertain_files: set[int] = set()
        kept = []
        for order, entry in self._pending:
            if entry.file not in uncertain_files and self._is_durable(entry):
                survive(self._certain[entry.file], entry, everything(entry))
            else:
                uncertain_files.add(entry.file)
                kept.append((order, entry))
        self._pending = kept
        pending = tuple(entry for _, entry in kept)
        return Moment(cut, self._certain, pending, tuple(map(self._is_durable, pending)))

    def _is_durable(self, entry: Entry) -> bool:
        return entry.ended < self._durable[entry.file]


def survive(content: bytearray, entry: Entry, fate: Fate) -> None:
    """Do to a file what survived of an entry."""
    if fate is None:
        return
    if entry.act is Act.LENGTH:
        del content[entry.offset :]
    end = entry.offset + entry.length
    if end > len(content) and not entry.keeps_size:
        content.extend(bytes(end - len(content)))
    end = min(end, len(content))
    if entry.act not in (Act.WRITE, Act.ZERO) or end <= entry.offset:
        return
    data = entry.data if entry.act is Act.WRITE else bytes(entry.length)
    if fate == everything(entry):
        content[entry.offset : end] = data[: end - entry.offset]
        return
    for number in range(entry.sector_count):
        if fate >> number & 1:
            low = max(entry.offset, (entry.first_sector + number) * SECTOR)
            high = min(end, (entry.first_sector + number + 1) * SECTOR)
            if low < high:
                content[low:high] = data[low - entry.offset : high - entry.offset]


def materialise(moment: Moment, fates: Sequence[Fate]) -> list[bytearray]:
    """The contents of all files in one state."""
    contents = [bytearray(content) for content in moment.certain]
    for entry, fate in zip(moment.pending, fates, strict=True):
        survive(contents[entry.file], entry, fate)
    return contents


def choices(moment: Moment, newest: Entry | None, generator: random.Random, *, count: int) -> Iterator[list[Fate]]:
    """About ``count`` states of one moment, the ones that most probably show a fault first.

    With ``newest``, the entry whose begin is this moment, it survives in all of them at least in part: the states
    without it belong to the moments before.
    """
    free = [number for number, forced in enumerate(moment.forced) if not forced]
    anchor = next((number for number in free if moment.pending[number] is newest), None)
    others = [number for number in free if number != anchor]
    if 1 << len(others) <= count:
        for subset in range(1 << len(others)):
            yield _with(moment, {number for bit, number in enumerate(others) if subset >> bit & 1}, anchor)
    else:
        yield moment.whole()
        yield _with(moment, set(), anchor)
        count -= 2
        singles = [(number, keep) for number in others for keep in (True, False)]
        for number, keep in generator.sample(singles, min(len(singles), count // 3)):
            yield _with(moment, {number} if keep else set(others) - {number}, anchor)
        prefixes = generator.sample(range(len(others)), min(len(others), count // 6))
        for length in prefixes:
            yield _with(moment, set(others[:length]), anchor)
        for _ in range(count // 3):
            yield _with(moment, _subset(moment, others, generator), anchor)
    yield from _torn(moment, newest, others, anchor, generator, count=max(2, count // 3))


def _with(moment: Moment, present: set[int], anchor: int | None) -> list[Fate]:
    fates = moment.nothing()
    for number in present | ({anchor} if anchor is not None else set()):
        fates[number] = everything(moment.pending[number])
    return fates


def _subset(moment: Moment, others: Sequence[int], generator: random.Random) -> set[int]:
    """Metadata by the toss of a coin; data all there, all lost, or by a coin, too."""
    data = generator.choice((0.0, 0.5, 1.0, 1.0))
    metadata = generator.choice((0.2, 0.5, 0.8))
    return {
        number for number in others if generator.random() < (metadata if is_metadata(moment.pending[number]) else data)
    }


def _torn(
    moment: Moment,
    newest: Entry | None,
    others: Sequence[int],
    anchor: int | None,
    generator: random.Random,
    *,
    count: int,
) -> Iterator[list[Fate]]:
    """States in which one entry is torn: cut off at a sector, its end without its begin, or any mixture."""
    candidates = [anchor] if anchor is not None else [n for n in others if is_metadata(moment.pending[n])]
    torn: list[tuple[int, int]] = []
    for number in candidates:
        size = moment.pending[number].sector_count
        torn += [(number, 0)]  # longer, but without the data
        torn += [(number, (1 << cut) - 1) for cut in range(1, size)]
        torn += [(number, everything(moment.pending[number]) & ~((1 << cut) - 1)) for cut in range(1, size)]
        torn += [(number, generator.getrandbits(size)) for _ in range(2 if size > 2 else 0)]
    for number, fate in generator.sample(torn, min(len(torn), count)):
        present = generator.choice((set(others), set(), _subset(moment, others, generator)))
        fates = _with(moment, present, anchor)
        fates[number] = fate
        yield fates

"""What a disk that several clients change at once may hold: for each unit the values that are possible.

A unit is filled with one value by each change. While changes of it are in progress it may hold what it held before or
any of theirs. Afterwards it holds the last one if they all came from one client, whose changes happen in order, and
else any of them. What a client is told later may be from any moment in between, so a :class:`Watch` gathers what comes.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

UNIT = 4096


@dataclass
class _Unit:
    """One unit of the disk."""

    values: frozenset[int] = frozenset((0,))
    """What it may hold, without the changes in progress."""
    changes: list[tuple[Hashable, int]] = field(default_factory=list)
    """Client and value of each change since there was none in progress."""
    in_progress: int = 0
    is_certain: bool = True
    """Whether every change has happened as it was asked for."""
    has_happened: bool = False
    """Whether one has."""

    @property
    def possible(self) -> set[int]:
        return {*self.values, *(value for _, value in self.changes)}


@dataclass(eq=False)
class Watch:
    """What a range may have held at any moment since it was begun."""

    start: int
    possible: list[set[int]]

    @property
    def end(self) -> int:
        return self.start + len(self.possible)


class Model:
    """A disk of units. Ranges are in units."""

    def __init__(self, size: int) -> None:
        self._units = [_Unit() for _ in range(size)]
        self._watches: set[Watch] = set()

    @property
    def size(self) -> int:
        return len(self._units)

    def resize(self, size: int) -> None:
        """Cut off the end, or add zeros; nothing is in progress."""
        del self._units[size:]
        self._units += [_Unit() for _ in range(size - len(self._units))]

    def watch(self, start: int, end: int, *, without_present: bool = False) -> Watch:
        """Gather what the range may hold from now on; ``without_present`` only what is being changed and will be."""
        units = self._units[start:end]
        present = [{value for _, value in unit.changes} if without_present else unit.possible for unit in units]
        watch = Watch(start, present)
        self._watches.add(watch)
        return watch

    def stop(self, watch: Watch) -> None:
        """It has gathered enough."""
        self._watches.discard(watch)

    def begin(self, client: Hashable, start: int, end: int, value: int) -> None:
        """``client`` has asked for the range to be filled with ``value``."""
        for unit in self._units[start:end]:
            unit.changes.append((client, value))
            unit.in_progress += 1
        for watch in self._watches:
            for number in range(max(start, watch.start), min(end, watch.end)):
                watch.possible[number - watch.start].add(value)

    def end(self, start: int, end: int, *, happened: bool | None) -> None:
        """One such change of the range is over; None if nobody knows whether it happened."""
        for unit in self._units[start:end]:
            unit.in_progress -= 1
            unit.is_certain &= happened is True
            unit.has_happened |= happened is True
            if unit.in_progress:
                continue
            clients = {client for client, _ in unit.changes}
            if unit.is_certain and len(clients) == 1:
                unit.values = frozenset((unit.changes[-1][1],))
            else:
                before = () if unit.has_happened else unit.values
                unit.values = frozenset((*before, *(value for _, value in unit.changes)))
            unit.changes, unit.is_certain, unit.has_happened = [], True, False

"""How long things took, by classes of length: cheap to count, to add up and to show as a histogram.

No other statistics are kept, because percentiles cannot be added up over exports, connections or time.
"""

from bisect import bisect_left

#: Upper ends of all classes but the last, which has none, in seconds: from a reply out of memory to a disk that hangs.
BOUNDS = (
    *(50e-6, 100e-6, 250e-6, 500e-6),
    *(1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 100e-3, 250e-3, 500e-3),
    *(1.0, 2.5, 5.0, 10.0),
)


class Durations:
    """Numbers of durations by class, and their sum. Not locked: one thread, or the owner's lock."""

    __slots__ = ("classes", "seconds")

    def __init__(self) -> None:
        self.classes = [0] * (len(BOUNDS) + 1)
        """How many were no longer than the bound of the same index, and longer than the one before."""
        self.seconds = 0.0
        """All of them together."""

    def add(self, seconds: float, count: int = 1) -> None:
        """``count`` things took ``seconds`` each."""
        self.classes[bisect_left(BOUNDS, seconds)] += count
        self.seconds += seconds * count

    def merge(self, other: "Durations") -> None:
        """Add everything that ``other`` has."""
        self.classes[:] = map(sum, zip(self.classes, other.classes, strict=True))
        self.seconds += other.seconds

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.classes)

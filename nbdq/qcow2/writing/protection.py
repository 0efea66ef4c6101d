"""Which host clusters hold metadata, and so must never be the target of a guest's write (O1-O4, R-27).

QEMU has eight classes of such checks and leaves the expensive one off by default, because it reads the disk for every
write. Here every class is one look-up: the clusters that the tables name at open are a sorted array, those that come
and go later are sets.
"""

from array import array
from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

from nbdq.qcow2.distinct import distinct


class ProtectedClusters:
    """A set of host cluster numbers. Changed under the lock of the image; a question may be asked at any time."""

    def __init__(self, clusters: NDArray[np.uint64]) -> None:
        """As :meth:`begin_with`."""
        self.begin_with(clusters)
        self._removed: set[int] = set()
        self.added: set[int] = set()
        """Those that were not protected in the beginning; to look at."""

    def begin_with(self, clusters: NDArray[np.uint64]) -> None:
        """Protect ``clusters``, in any order, instead of what was protected in the beginning."""
        self._initial = distinct(clusters)
        self._sorted = array("Q", self._initial.astype(np.uint64).tobytes())  # the same, for scalar questions

    def add(self, first: int, count: int) -> None:
        """Protect ``count`` clusters from ``first``."""
        self.added.update(range(first, first + count))
        self._removed.difference_update(range(first, first + count))

    def remove(self, first: int, count: int) -> None:
        """Protect them no more: their contents are no metadata any longer."""
        self._removed.update(range(first, first + count))
        self.added.difference_update(range(first, first + count))

    def clusters(self) -> NDArray[np.uint64]:
        """All of them, ascending."""
        removed, added = (np.fromiter(some, np.uint64) for some in (self._removed, self.added))
        return np.union1d(np.setdiff1d(self._initial, removed), added)

    def overlaps(self, first: int, count: int) -> bool:
        """Whether any of ``count`` clusters from ``first`` is protected."""
        low, high = bisect_left(self._sorted, first), bisect_left(self._sorted, first + count)
        if low != high and not self._removed.issuperset(self._sorted[low:high]):
            return True
        if count > len(self.added):
            return any(first <= cluster < first + count for cluster in self.added)
        return not self.added.isdisjoint(range(first, first + count))

    def among(self, clusters: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of ``clusters`` are protected."""
        found = np.isin(clusters, self._initial)
        if self._removed:
            found &= ~np.isin(clusters, np.fromiter(self._removed, np.uint64))
        if self.added:
            found |= np.isin(clusters, np.fromiter(self.added, np.uint64))
        return np.asarray(found, dtype=np.bool_)

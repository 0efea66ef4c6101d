"""How often each host cluster is referenced: a sparse array of counters, sized by what is referenced, not by the file.

Pure numpy. A file may claim petabytes; only pages of counters that something points into exist, one byte for each
cluster until a counter needs more, and all of them together keep to a budget.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

#: Clusters of a page. Refcount blocks are compared in pieces of the same size.
PAGE_BITS = 15
PAGE = 1 << PAGE_BITS

#: Counters are laid out densely for a batch if that takes at most so many of them for each reference.
_DENSE = 8


class TooManyPages(Exception):
    """The references are scattered over more pages than the budget has."""


class ReferenceCounts:
    """References by cluster number. Not thread-safe."""

    def __init__(self, budget: int) -> None:
        """Keep to ``budget`` bytes of counters."""
        self._left = budget
        self._pages: dict[int, NDArray[np.unsignedinteger]] = {}
        #: What no counter of a page exceeds.
        self._bounds: dict[int, int] = {}

    def add(self, clusters: NDArray[np.int64], weights: NDArray[np.int64] | None = None) -> None:
        """Count a reference to each of ``clusters``, or as many as its weight says.

        Raises:
            TooManyPages: the budget is used up.
        """
        if not clusters.size:
            return
        low = int(clusters.min()) // PAGE * PAGE
        if int(clusters.max()) - low < _DENSE * clusters.size + 4 * PAGE:
            self._add_near(low, clusters, weights)
            return
        order = np.argsort(clusters)
        clusters = clusters[order]
        weights = None if weights is None else weights[order]
        edges = np.flatnonzero(np.diff(clusters >> PAGE_BITS)) + 1
        for begin, end in zip([0, *edges.tolist()], [*edges.tolist(), len(clusters)], strict=True):
            near = clusters[begin:end]
            self._add_near(int(near[0]) // PAGE * PAGE, near, None if weights is None else weights[begin:end])

    def add_run(self, first: int, last: int) -> None:
        """Count one reference to every cluster from ``first`` to ``last``.

        Raises:
            TooManyPages: the budget is used up.
        """
        for begin in range(first, last + 1, 16 * PAGE):
            self.add(np.arange(begin, min(begin + 16 * PAGE, last + 1)))

    def of(self, clusters: NDArray[np.int64]) -> NDArray[np.int64]:
        """The count of each of ``clusters``."""
        found = np.zeros(len(clusters), dtype=np.int64)
        numbers = clusters >> PAGE_BITS
        for number in np.unique(numbers).tolist():
            if number in self._pages:
                here = numbers == number
                found[here] = self._pages[number][clusters[here] - number * PAGE]
        return found

    def page(self, number: int) -> NDArray[np.uint64]:
        """The counts of clusters ``number * PAGE`` and on; the caller's."""
        page = self._pages.get(number)
        return np.zeros(PAGE, dtype=np.uint64) if page is None else page.astype(np.uint64)

    def pages(self) -> Iterator[int]:
        """The numbers of all pages with a count, ascending."""
        yield from sorted(self._pages)

    def highest(self) -> int:
        """The last cluster with a reference; -1 if there is none."""
        for number in sorted(self._pages, reverse=True):
            used = np.flatnonzero(self._pages[number])
            if used.size:
                return number * PAGE + int(used[-1])
        return -1

    def _add_near(self, low: int, clusters: NDArray[np.int64], weights: NDArray[np.int64] | None) -> None:
        # With weights numpy counts in floating point, exact up to 2^53.
        counts = np.bincount(clusters - low, weights).astype(np.int64, copy=False)
        for begin in range(0, len(counts), PAGE):
            part = counts[begin : begin + PAGE]
            if highest := int(part.max()):
                self._add_part((low + begin) // PAGE, part, highest)

    def _add_part(self, number: int, part: NDArray[np.int64], highest: int) -> None:
        page = self._pages.get(number)
        if page is None:
            page = self._keep(number, np.zeros(PAGE, dtype=np.uint8), 0)
        bound = self._bounds.get(number, 0) + highest
        if bound > np.iinfo(page.dtype).max:
            bound = int(page.max()) + highest
            if bound > np.iinfo(page.dtype).max:
                page = self._keep(number, page.astype(np.min_scalar_type(bound)), page.nbytes)
        self._bounds[number] = bound
        np.add(page[: len(part)], part, out=page[: len(part)], casting="unsafe")

    def _keep(self, number: int, page: NDArray[np.unsignedinteger], before: int) -> NDArray[np.unsignedinteger]:
        self._left -= page.nbytes - before
        if self._left < 0:
            raise TooManyPages
        self._pages[number] = page
        return page

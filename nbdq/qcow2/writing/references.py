"""Which host clusters the tables of one state of an image name, and how often: vectors of whole tables, no loops.

A *state* is what one L1 table leads to: the active one, or that of an internal snapshot. Each state has a reference of
its own to everything that its tables name, also to what tables shared with another state name (Q28). Reads the file
only. Must not know refcounts, nor what is to become of them.
"""

import errno
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from nbdq.qcow2.entries import COMPRESSED, COPIED, DESCRIPTOR_MASK, OFFSET_MASK, Geometry
from nbdq.qcow2.writing.mapping import l1_problem
from nbdq.storage import FileStorage

Words = NDArray[np.uint64]

#: Bytes of L2 tables that are looked at together.
_BATCH = 4 << 20
#: References that are counted together, and of one cluster at most: a counter of 16 bits cannot wrap in between.
_PIECE = 1 << 15
_ONE = np.uint16(1)
_COPIED = np.uint64(COPIED)


class Tally:
    """How often host clusters are named. 2 bytes for each cluster of the file, where any is named near it."""

    def __init__(self, cluster_count: int) -> None:
        self.counts = np.zeros(cluster_count, dtype=np.uint16)
        """By cluster number."""

    def add(self, clusters: Words) -> None:
        """Count a reference to each of ``clusters``, in any order; they lie in the file.

        Raises:
            OSError: EIO if one is named more often than any writer does.
        """
        for start in range(0, len(clusters), _PIECE):
            piece = clusters[start : start + _PIECE].astype(np.intp)
            np.add.at(self.counts, piece, _ONE)
            if self.counts[piece].max() >= _PIECE:
                raise OSError(errno.EIO, "tables name a cluster ten thousands of times; see nbdq check")

    def extend(self, cluster_count: int) -> None:
        """Let there be counters for so many clusters, at least as many as now."""
        self.counts = np.pad(self.counts, (0, cluster_count - len(self.counts)))


class State:
    """The tables of one state of an image, as they are in its file."""

    def __init__(self, storage: FileStorage, geometry: Geometry, l1: Words, *, file_clusters: int) -> None:
        """``l1`` has the entries of its L1 table; the state lies within the first ``file_clusters`` of the file.

        Raises:
            OSError: EIO if they break a rule of the format, or lead out of the file.
        """
        self._storage = storage
        self._geometry = geometry
        self._file_clusters = file_clusters
        offsets = l1 & np.uint64(OFFSET_MASK)
        self.indexes = np.flatnonzero(offsets)
        """L1 indexes of the L2 tables, ascending."""
        self.offsets = offsets[self.indexes]
        """Their host offsets."""
        if problem := l1_problem(l1, geometry):
            raise self.corrupt(problem)
        if (self.clusters >= self._file_clusters).any():
            raise self.corrupt("an L2 table lies behind the end of the file")

    @property
    def clusters(self) -> Words:
        """The host clusters that the L2 tables are."""
        return self.offsets >> np.uint64(self._geometry.cluster_bits)

    def tables(self, chosen: NDArray[np.intp] | None = None) -> Iterator[tuple[slice, Words]]:
        """(which, their words) for some tables at a time, in order: all, or those at ``chosen`` of :attr:`indexes`.

        ``which`` counts the tables that are asked for; the words are the caller's, a row for each table.

        Raises:
            OSError: the file cannot be read.
        """
        size = self._geometry.cluster_size
        offsets = (self.offsets if chosen is None else self.offsets[chosen]).tolist()
        at_once = max(1, _BATCH // size)
        for start in range(0, len(offsets), at_once):
            part = offsets[start : start + at_once]
            data = b"".join(self._storage.read(offset, size).ljust(size, b"\0") for offset in part)
            yield slice(start, start + len(part)), np.frombuffer(data, ">u8").astype(np.uint64).reshape(len(part), -1)

    def _descriptors(self, words: Words) -> Words:
        """The descriptors among the words of tables: a view, a row for each table."""
        return words[:, ::2] if self._geometry.extended_l2 else words

    def named(self, words: Words) -> Words:
        """The host clusters that tables name, once for each time that they do.

        Raises:
            OSError: EIO if an entry is corrupt.
        """
        descriptors = self._descriptors(words)
        compressed = (descriptors & np.uint64(COMPRESSED)) != 0
        offsets = descriptors[~compressed] & np.uint64(OFFSET_MASK)
        if (offsets & np.uint64(self._geometry.cluster_size - 1)).any():
            raise self.corrupt("an L2 entry points between clusters")
        found: Words = offsets[offsets != 0] >> np.uint64(self._geometry.cluster_bits)
        if compressed.any():
            found = np.concatenate((found, self._compressed(descriptors[compressed] & np.uint64(DESCRIPTOR_MASK))))
        if len(found) and found.max() >= self._file_clusters:
            raise self.corrupt("an L2 entry leads behind the end of the file")
        return found

    def _compressed(self, descriptors: Words) -> Words:
        """Every host cluster that compressed data touches (Q49, Q50)."""
        offset_bits, bits = np.uint64(70 - self._geometry.cluster_bits), np.uint64(self._geometry.cluster_bits)
        starts = descriptors & (np.uint64(1) << offset_bits) - np.uint64(1)
        lengths = ((descriptors >> offset_bits) + np.uint64(1)) * np.uint64(512) - starts % np.uint64(512)
        first = starts >> bits
        counts = ((starts + lengths - np.uint64(1) >> bits) - first + np.uint64(1)).astype(np.intp)
        ordinal = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        touched: Words = np.repeat(first, counts) + ordinal.astype(np.uint64)
        return touched

    def clear_flags(self, words: Words) -> NDArray[np.bool_]:
        """Take COPIED from all descriptors of ``words``; which tables had any."""
        descriptors = self._descriptors(words)
        flagged = (descriptors & _COPIED) != 0
        descriptors[flagged] ^= _COPIED
        return np.asarray(flagged.any(axis=1), dtype=np.bool_)

    def set_flags(self, words: Words, own: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Give COPIED to descriptors of ``words`` that name clusters which are ``own``, by number (Q37); which tables
        got any.
        """
        descriptors = self._descriptors(words)
        offsets = descriptors & np.uint64(OFFSET_MASK)
        gets = ((descriptors & np.uint64(COMPRESSED | COPIED)) == 0) & (offsets != 0)
        gets[gets] = own[(offsets[gets] >> np.uint64(self._geometry.cluster_bits)).astype(np.intp)]
        descriptors[gets] |= _COPIED
        return np.asarray(gets.any(axis=1), dtype=np.bool_)

    def corrupt(self, what: str) -> OSError:
        """What is said of tables that break a rule of the format."""
        return OSError(errno.EIO, f"{what}; see nbdq check", self._storage.path)

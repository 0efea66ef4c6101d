"""One QCOW2 image, open for reading: which granules of a guest range it holds, and its compressed clusters.

Knows L1 and L2 tables in the file. Must not know other layers of a chain, caches, or clients. Tables are read where
and when they are asked for, in slices: an image of any virtual size opens in constant time and memory (R-26).
"""

import errno

import numpy as np
from numpy.typing import NDArray

from nbdq.block import Granules, Kind
from nbdq.qcow2.compression import inflate_cluster
from nbdq.qcow2.entries import OFFSET_MASK, Geometry, decode_l2
from nbdq.qcow2.format import Header
from nbdq.qcow2.preallocation import is_metadata_preallocated
from nbdq.qcow2.snapshots import Snapshot
from nbdq.storage import FileStorage


class Qcow2Image:
    """The active state of an image, or one internal snapshot of it. Owns its storages until :meth:`close`."""

    def __init__(
        self,
        storage: FileStorage,
        header: Header,
        *,
        data: FileStorage | None = None,
        snapshot: Snapshot | None = None,
    ) -> None:
        """Take ownership of ``storage`` and of ``data``, the external data file if the image has one."""
        self.storage = storage
        self.data = data or storage
        self.header = header
        self.path = storage.path
        self.geometry = Geometry(header.cluster_bits, header.extended_l2, header.version, header.has_data_file)
        self.granule = self.geometry.granule
        self.cluster_size = header.cluster_size
        self.size = header.guest_size
        self._l1_offset, self._l1_size = header.l1_table_offset, header.l1_size
        if snapshot is not None:
            self._l1_offset, self._l1_size = snapshot.l1_offset, snapshot.l1_size
            if snapshot.disk_size is not None:
                self.size = snapshot.disk_size // 512 * 512
        self._file_size = storage.size()

    def map(self, start: int, end: int) -> Granules | None:
        """The allocated granules of ``[start, end)``, both multiples of the cluster size; None if there are none.

        Raises:
            OSError: a table cannot be read.
        """
        coverage = self.geometry.l2_coverage
        found = []
        first = start // coverage
        for number, entry in enumerate(self._read_l1(first, -(-end // coverage)).tolist(), first):
            if entry:
                low, high = max(start, number * coverage), min(end, (number + 1) * coverage)
                part = self._map_l2(entry & OFFSET_MASK, low, high)
                if len(part.position):
                    found.append(part._replace(position=part.position + (low - start) // self.granule))
        if not found:
            return None
        if len(found) == 1:
            return found[0]
        return Granules(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))

    def _map_l2(self, l2_offset: int, start: int, end: int) -> Granules:
        """Decode the part of one L2 table that maps ``[start, end)``."""
        geometry = self.geometry
        skip = (start % geometry.l2_coverage) >> geometry.cluster_bits
        count = (end - start) >> geometry.cluster_bits
        if l2_offset == 0:  # only flags and reserved bits were set
            return decode_l2(b"", start, geometry)
        if l2_offset % geometry.cluster_size or self._is_behind_end(l2_offset):
            # QEMU reads a table past the end of the file as an empty one; that would show the guest a blank disk.
            granules = (end - start) // self.granule
            return Granules(
                np.arange(granules),
                np.full(granules, Kind.CORRUPT, dtype=np.uint8),
                np.full(granules, l2_offset, dtype=np.uint64),
            )
        length = count * geometry.entry_size
        table = self.storage.read(l2_offset + skip * geometry.entry_size, length)
        return decode_l2(table.ljust(length, b"\0"), start, geometry)

    def _is_behind_end(self, offset: int) -> bool:
        if offset >= self._file_size:
            self._file_size = self.storage.size()  # it may have grown: a layer can be committed into while it is read
        return offset >= self._file_size

    def _read_l1(self, first: int, last: int) -> NDArray[np.uint64]:
        """L1 entries ``[first, last)``; what lies past the table's end is unallocated (Q39, Q40)."""
        count = max(0, min(last, self._l1_size) - first)
        table = self.storage.read(self._l1_offset + first * 8, count * 8).ljust(count * 8, b"\0")
        return np.frombuffer(table, dtype=">u8").astype(np.uint64)

    def occupancy(self, start: int, end: int, step: int) -> NDArray[np.bool_]:
        """For each ``step`` bytes of ``[start, end)``, all multiples of the cluster size: may anything be allocated?"""
        coverage = self.geometry.l2_coverage
        if coverage > step:  # a table says too little of windows as small as those of a layer of small clusters
            return self._occupancy_by_cluster(start, end, step)
        entries = self._read_l1(start // coverage, -(-end // coverage))
        tables = np.zeros((end - start) // coverage, dtype=bool)
        tables[: len(entries)] = entries != 0
        return np.asarray(tables.reshape(-1, step // coverage).any(axis=1), dtype=np.bool_)

    def _occupancy_by_cluster(self, start: int, end: int, step: int) -> NDArray[np.bool_]:
        geometry = self.geometry
        occupied = np.zeros((end - start) // step, dtype=bool)
        first = start // geometry.l2_coverage
        for number, entry in enumerate(self._read_l1(first, -(-end // geometry.l2_coverage)).tolist(), first):
            l2_offset = entry & OFFSET_MASK
            if not l2_offset:
                continue
            low = max(start, number * geometry.l2_coverage)
            high = min(end, (number + 1) * geometry.l2_coverage)
            found = slice((low - start) // step, (high - start) // step)
            if l2_offset % geometry.cluster_size or self._is_behind_end(l2_offset):
                occupied[found] = True  # by corrupt entries
                continue
            skip = (low % geometry.l2_coverage) >> geometry.cluster_bits
            length = ((high - low) >> geometry.cluster_bits) * geometry.entry_size
            table = self.storage.read(l2_offset + skip * geometry.entry_size, length).ljust(length, b"\0")
            words = np.frombuffer(table, dtype=np.uint64).reshape(found.stop - found.start, -1)
            occupied[found] = words.any(axis=1)
        return occupied

    def read_compressed(self, descriptor: int) -> bytes:
        """Inflate the compressed cluster that ``descriptor`` names; ``cluster_size`` bytes.

        Raises:
            OSError: EIO if it does not inflate to exactly one cluster, or the file cannot be read.
        """
        offset, length = self.geometry.compressed_range(descriptor)
        if self._is_behind_end(offset):
            raise OSError(errno.EIO, f"compressed cluster at {offset} lies past the end of the file", self.path)
        data = self.storage.read(offset, length).ljust(length, b"\0")  # the last sector may be cut short (Q51)
        return inflate_cluster(self.header.compression_type, data, self.cluster_size)

    def is_metadata_preallocated(self) -> bool:
        """Whether allocated clusters may be holes of the file (P5). May read refcounts: to be asked once.

        Raises:
            OSError: the file cannot be read.
        """
        return is_metadata_preallocated(self.storage, self.header)

    def close(self) -> None:
        """Close the storages. Idempotent."""
        self.storage.close()
        self.data.close()

"""L1 and L2 entries: integer arithmetic from table bytes to kinds and host offsets, whole slices at a time.

Pure: knows the bit layout of the tables (Q33-Q57) and nothing of files. A corrupt entry is a *kind*, not an exception,
so that one bad cluster costs the guest that cluster and nothing else (1.14).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nbdq.block import Granules, Kind

#: The parts of an L1 entry, and of the descriptor in an L2 entry, as plain integers.
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
COPIED = 1 << 63
"""The cluster has one reference, this one, and may be changed in place (Q37)."""
COMPRESSED = 1 << 62
READS_ZERO = 1
"""Standard descriptors of version 3 only."""
DESCRIPTOR_MASK = COMPRESSED - 1
SUBCLUSTERS = 32
ALL_SUBCLUSTERS = (1 << SUBCLUSTERS) - 1

_OFFSET = np.uint64(OFFSET_MASK)
_COPIED = np.uint64(COPIED)
_COMPRESSED = np.uint64(COMPRESSED)
_DESCRIPTOR = np.uint64(DESCRIPTOR_MASK)
_ZERO = np.uint64(READS_ZERO)


@dataclass(frozen=True)
class Geometry:
    """How guest offsets of one image split into table indices (Q3, Q42)."""

    cluster_bits: int
    extended_l2: bool
    version: int
    has_data_file: bool

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def entry_size(self) -> int:
        """Bytes of an L2 entry."""
        return 16 if self.extended_l2 else 8

    @property
    def l2_count(self) -> int:
        """Entries of an L2 table."""
        return self.cluster_size // self.entry_size

    @property
    def l2_coverage(self) -> int:
        """Guest bytes that one L2 table maps."""
        return self.l2_count << self.cluster_bits

    @property
    def granule(self) -> int:
        """Bytes of the smallest unit of allocation: the cluster, or the subcluster."""
        return self.cluster_size // SUBCLUSTERS if self.extended_l2 else self.cluster_size

    def compressed_range(self, descriptor: int) -> tuple[int, int]:
        """Host offset and byte length of a compressed cluster's data (Q49, Q50); the length is an upper bound."""
        offset_bits = 62 - (self.cluster_bits - 8)
        offset = descriptor & ((1 << offset_bits) - 1)
        sectors = (descriptor >> offset_bits) + 1
        return offset, sectors * 512 - offset % 512


def decode_l2(table: bytes, guest_offset: int, geometry: Geometry) -> Granules:
    """Decode a slice of an L2 table whose first entry maps ``guest_offset``; granules count from there."""
    if geometry.extended_l2:
        return _decode_extended(table, guest_offset, geometry)
    entries = np.frombuffer(table, dtype=">u8")
    index = np.flatnonzero(entries)
    entry = entries[index].astype(np.uint64)
    kind, host = _classify(entry, index, guest_offset, geometry)
    zero = ((entry & _ZERO) != 0) & (kind != Kind.COMPRESSED)
    if zero.any():
        kind[zero & (kind != Kind.CORRUPT)] = Kind.ZERO_OFFSET
        kind[zero & (host == 0)] = Kind.ZERO  # whatever bit 63 says, even with a data file
        if geometry.version < 3:  # Q38
            kind[zero] = Kind.CORRUPT
    present = kind != Kind.UNALLOCATED
    if not present.all():  # only reserved bits were set
        index, kind, host = index[present], kind[present], host[present]
    return Granules(index, kind, host)


def _classify(
    entry: NDArray[np.uint64], cluster_index: NDArray[np.int64], guest_offset: int, geometry: Geometry
) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    """Kind and host value of each standard descriptor, zero flags aside (Q34-Q36, Q77)."""
    host = entry & _OFFSET
    kind = np.full(len(entry), Kind.DATA, dtype=np.uint8)
    kind[host == 0] = Kind.UNALLOCATED
    if geometry.has_data_file:
        kind[(entry & _COPIED) != 0] = Kind.DATA  # Q36: offset 0 is a place in a data file
        expected = (cluster_index.astype(np.uint64) << np.uint64(geometry.cluster_bits)) + np.uint64(guest_offset)
        kind[(kind == Kind.DATA) & (host != expected)] = Kind.CORRUPT
    kind[(host & np.uint64(geometry.cluster_size - 1)) != 0] = Kind.CORRUPT
    compressed = (entry & _COMPRESSED) != 0
    if compressed.any():
        kind[compressed] = Kind.CORRUPT if geometry.has_data_file else Kind.COMPRESSED
        host[compressed] = entry[compressed] & _DESCRIPTOR
    return kind, host


def _decode_extended(table: bytes, guest_offset: int, geometry: Geometry) -> Granules:
    """Extended L2 (Q43-Q47): each entry becomes up to 32 granules."""
    pairs = np.frombuffer(table, dtype=">u8").reshape(-1, 2)
    cluster_index = np.flatnonzero(pairs.any(axis=1))
    entry, bitmap = pairs[cluster_index].astype(np.uint64).T
    cluster_kind, cluster_host = _classify(entry, cluster_index, guest_offset, geometry)

    # One byte lane per subcluster: bits[i, x] is bit x of the entry's bitmap, little end first.
    bits = np.unpackbits(bitmap.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
    allocated, zero = bits[:, :SUBCLUSTERS].astype(bool), bits[:, SUBCLUSTERS:].astype(bool)
    has_host = (cluster_kind == Kind.DATA)[:, np.newaxis]
    both = (allocated & zero).any(axis=1)
    without_host = ~has_host[:, 0] & allocated.any(axis=1)

    shape = allocated.shape
    kind = np.zeros(shape, dtype=np.uint8)
    kind[has_host & ~allocated & ~zero] = Kind.UNALLOCATED_OFFSET
    kind[has_host & allocated] = Kind.DATA
    kind[has_host & zero] = Kind.ZERO_OFFSET
    kind[~has_host & zero] = Kind.ZERO
    kind[both | without_host] = Kind.CORRUPT  # Q44, Q45
    for whole in (Kind.CORRUPT, Kind.COMPRESSED):
        kind[cluster_kind == whole] = whole

    step = np.arange(SUBCLUSTERS, dtype=np.uint64) * np.uint64(geometry.granule)
    host = np.where(
        np.isin(kind, (Kind.DATA, Kind.ZERO_OFFSET, Kind.UNALLOCATED_OFFSET)),
        cluster_host[:, np.newaxis] + step,
        np.uint64(0),
    )
    whole_cluster = np.isin(cluster_kind, (Kind.CORRUPT, Kind.COMPRESSED))
    host[whole_cluster] = cluster_host[whole_cluster, np.newaxis]
    index = cluster_index[:, np.newaxis] * SUBCLUSTERS + np.arange(SUBCLUSTERS)
    keep = kind.reshape(-1) != Kind.UNALLOCATED
    return Granules(index.reshape(-1)[keep], kind.reshape(-1)[keep], host.reshape(-1)[keep])

"""A sound image with metadata of every kind, one cluster each, to be broken before it is written to.

Clusters of 512 bytes: an L2 table maps 64 of them, and everything fits into one refcount block.
"""

import contextlib
import struct
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path

from nbdq.chain.clusters import ClusterCache
from nbdq.chain.open import open_writable
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.policy import Policy
from nbdq.qcow2.extensions import BitmapsExtension
from nbdq.qcow2.features import Autoclear
from nbdq.qcow2.format import build_header
from tests.hostile.anatomy import COPIED
from tests.qcow2.audit.small import CLUSTER, put
from tests.qcow2.minimal import minimal_header

#: Guest clusters that one L2 table maps.
PER_TABLE = CLUSTER // 8


class Place(IntEnum):
    """The host clusters that hold metadata."""

    HEADER = 0
    REFCOUNT_TABLE = 1
    REFCOUNT_BLOCK = 2
    ACTIVE_L1 = 3
    ACTIVE_L2 = 4
    SNAPSHOT_TABLE = 8
    INACTIVE_L1 = 9
    INACTIVE_L2 = 10
    BITMAP_DIRECTORY = 11
    BITMAP_TABLE = 12
    BITMAP_DATA = 13
    SECOND_L2 = 14
    """Of guest clusters from :data:`PER_TABLE`."""


#: Host clusters of the guest clusters 0, which a snapshot shares, 1, 2, and ``PER_TABLE``.
SHARED, FIRST_OWN, SECOND_OWN, FAR = 5, 6, 7, 15
#: The first cluster that is free.
END = 16


def complete_image() -> bytearray:
    """A disk of four L2 tables of which two exist, with a snapshot and a bitmap; clean, says ``qemu-img check``."""
    header = minimal_header(
        cluster_bits=9,
        size=4 * PER_TABLE * CLUSTER,
        l1_size=4,
        snapshot_count=1,
        snapshots_offset=Place.SNAPSHOT_TABLE * CLUSTER,
        autoclear=Autoclear.BITMAPS,
        bitmaps=BitmapsExtension(count=1, directory_size=32, directory_offset=Place.BITMAP_DIRECTORY * CLUSTER),
    )
    image = bytearray(END * CLUSTER)
    head = build_header(header)
    image[: len(head)] = head
    put(image, Place.REFCOUNT_TABLE * CLUSTER, Place.REFCOUNT_BLOCK * CLUSTER)
    set_l1(image, 0, COPIED | Place.ACTIVE_L2 * CLUSTER)
    set_l1(image, 1, COPIED | Place.SECOND_L2 * CLUSTER)
    set_l2(image, 0, SHARED * CLUSTER)
    set_l2(image, 1, COPIED | FIRST_OWN * CLUSTER)
    set_l2(image, 2, COPIED | SECOND_OWN * CLUSTER)
    set_l2(image, PER_TABLE, COPIED | FAR * CLUSTER)
    for cluster in range(END):
        set_refcount(image, cluster, 2 if cluster == SHARED else 1)
    for cluster in (SHARED, FIRST_OWN, SECOND_OWN, FAR):
        image[cluster * CLUSTER : (cluster + 1) * CLUSTER] = bytes([0xA0 + cluster]) * CLUSTER
    snapshot = struct.pack(">QIHHIIQII", Place.INACTIVE_L1 * CLUSTER, 4, 1, 1, 0, 0, 0, 0, 16)
    snapshot += struct.pack(">QQ", 0, header.size) + b"1s"
    _place(image, Place.SNAPSHOT_TABLE, snapshot)
    put(image, Place.INACTIVE_L1 * CLUSTER, Place.INACTIVE_L2 * CLUSTER | COPIED)
    put(image, Place.INACTIVE_L2 * CLUSTER, SHARED * CLUSTER)
    bitmap = struct.pack(">QIIBBHI", Place.BITMAP_TABLE * CLUSTER, 1, 2, 1, 9, 1, 0) + b"b"
    _place(image, Place.BITMAP_DIRECTORY, bitmap)
    put(image, Place.BITMAP_TABLE * CLUSTER, Place.BITMAP_DATA * CLUSTER)
    image[Place.BITMAP_DATA * CLUSTER] = 1
    return image


def _place(image: bytearray, place: Place, data: bytes) -> None:
    image[place * CLUSTER : place * CLUSTER + len(data)] = data


def set_l1(image: bytearray, index: int, entry: int) -> None:
    """Overwrite an entry of the active L1 table."""
    put(image, Place.ACTIVE_L1 * CLUSTER + 8 * index, entry)


def set_l2(image: bytearray, guest_cluster: int, entry: int) -> None:
    """Overwrite the active L2 entry of a guest cluster of the first two tables."""
    table = (Place.ACTIVE_L2, Place.SECOND_L2)[guest_cluster // PER_TABLE]
    put(image, table * CLUSTER + 8 * (guest_cluster % PER_TABLE), entry)


def set_refcount(image: bytearray, cluster: int, refcount: int) -> None:
    """Overwrite the refcount of a host cluster."""
    put(image, Place.REFCOUNT_BLOCK * CLUSTER + 2 * cluster, refcount, 2)


@contextlib.contextmanager
def opened(
    path: Path, on_event: Callable[[str], None] = lambda text: None, *, punch: bool = True
) -> Iterator[OverlayDisk]:
    """The image, open for writing as the server opens it; closed afterwards, whatever that brings."""
    with contextlib.closing(ClusterCache(budget=1 << 20)) as clusters:
        policy = Policy(allow_data_file=True)
        disk = open_writable(
            str(path), format="qcow2", policy=policy, clusters=clusters, punch=punch, on_event=on_event
        )
        assert isinstance(disk, OverlayDisk)
        try:
            yield disk
        finally:
            with contextlib.suppress(OSError):
                disk.close()


def host_cluster(path: Path, cluster: int) -> bytes:
    """The contents of a cluster of the file."""
    return path.read_bytes()[cluster * CLUSTER : (cluster + 1) * CLUSTER]

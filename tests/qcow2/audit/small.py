"""A sound image of eight clusters of 512 bytes, small enough to break and crash in every way.

Cluster 0 holds the header, 1 the refcount table, 2 its block, 3 the L1 table, 4 the L2 table, 5 to 7 guest data.
"""

from typing import Any

from nbdq.qcow2.format import build_header
from tests.qcow2.minimal import minimal_header, minimal_image

CLUSTER = 512
L1, L2, BLOCK, TABLE = 3 * CLUSTER, 4 * CLUSTER, 2 * CLUSTER, CLUSTER
COPIED = 1 << 63


def small_image(clusters: int = 8, **fields: Any) -> bytearray:
    """The image, in a file of so many clusters; the first three guest clusters are written."""
    header = minimal_header(cluster_bits=9, size=64 * CLUSTER, **fields)
    image = minimal_image(header)
    image += bytes(clusters * CLUSTER - len(image))
    image[: len(build_header(header))] = build_header(header)
    put(image, L1, COPIED | L2)
    for number in range(3):
        put(image, L2 + 8 * number, COPIED | (5 + number) * CLUSTER)
        start = (5 + number) * CLUSTER
        image[start : start + CLUSTER] = bytes([0xA0 + number]) * CLUSTER
    for cluster in range(8):
        put_refcount(image, cluster, 1)
    return image


def put(image: bytearray, offset: int, value: int, width: int = 8) -> None:
    """Overwrite a big-endian integer."""
    image[offset : offset + width] = value.to_bytes(width, "big")


def put_refcount(image: bytearray, cluster: int, refcount: int) -> None:
    """Overwrite a refcount of 16 bits."""
    put(image, BLOCK + 2 * cluster, refcount, 2)

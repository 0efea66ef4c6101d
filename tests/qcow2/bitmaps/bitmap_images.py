"""Images with persistent bitmaps, made without any tool, and the smallest image that can be written to."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from nbdq.qcow2.bitmaps.directory import Bitmap, BitmapFlags, build_directory, read_bitmaps
from nbdq.qcow2.bitmaps.tables import load_bits
from nbdq.qcow2.extensions import BitmapsExtension
from nbdq.qcow2.features import Autoclear
from nbdq.qcow2.fields import l1_entries
from nbdq.qcow2.format import Header, read_header
from nbdq.storage import FileStorage
from tests.qcow2.minimal import minimal_header, minimal_image, stored

IN_USE, AUTO, DISABLED = BitmapFlags.IN_USE, BitmapFlags.AUTO, BitmapFlags(0)


class FakeImage:
    """Allocates at the end of its file and keeps no refcounts; remembers what it was told to free."""

    def __init__(self, storage: FileStorage, header: Header) -> None:
        self.storage, self.header = storage, header
        self.allocated: set[int] = set()
        self.freed: set[int] = set()

    def _clusters(self, offset: int, cluster_count: int) -> set[int]:
        return {offset + number * self.header.cluster_size for number in range(cluster_count)}

    def allocate_metadata(self, cluster_count: int) -> int:
        cluster_size = self.header.cluster_size
        offset = -(-self.storage.size() // cluster_size) * cluster_size
        self.storage.truncate(offset + cluster_count * cluster_size)
        self.allocated |= self._clusters(offset, cluster_count)
        return offset

    def free_metadata(self, host_offset: int, cluster_count: int) -> None:
        clusters = self._clusters(host_offset, cluster_count)
        assert not clusters & self.freed, "freed twice"
        self.freed |= clusters

    def rewrite_header(self, change: Callable[[FileStorage, Header], Header]) -> None:
        self.header = change(self.storage, self.header)

    def flush(self) -> None:
        self.storage.sync()


def bitmap(name: str, *, flags: BitmapFlags = AUTO, bits: int = 16, data: bytes = b"") -> tuple[Bitmap, bytes]:
    """A bitmap to be laid out, with its packed bits; what they do not reach is clean."""
    return Bitmap(name, bits, flags, 0, 0), data


def lay_out(bitmaps: Iterable[tuple[Bitmap, bytes]], **fields: object) -> tuple[bytes, Header]:
    """An image file with these bitmaps, each with one table and as many data clusters as its bits need."""
    header = minimal_header(autoclear=Autoclear.BITMAPS, **fields)
    header = replace(header, l1_size=l1_entries(header.size, cluster_bits=header.cluster_bits, extended_l2=False))
    cluster_size = header.cluster_size
    body = bytearray()
    end = (3 + -(-header.l1_size * 8 // cluster_size)) * cluster_size
    entries = []
    for entry, data in bitmaps:
        granules = -(-header.guest_size >> entry.granularity_bits)
        clusters = -(-granules // (8 * cluster_size))
        table = (np.arange(clusters) * cluster_size + end + len(body)).astype(">u8")
        body += data.ljust(clusters * cluster_size, b"\0")
        entries.append(replace(entry, table_offset=end + len(body), table_size=clusters))
        body += table.tobytes().ljust(-(-clusters * 8 // cluster_size) * cluster_size, b"\0")
    directory = build_directory(entries)
    header = replace(header, bitmaps=BitmapsExtension(len(entries), len(directory), end + len(body)))
    return bytes(minimal_image(header)[:end]).ljust(end, b"\0") + bytes(body) + directory.ljust(
        cluster_size, b"\0"
    ), header


def believed(content: bytes) -> dict[str, set[int] | None]:
    """What a program believes that opens the file ``content``: each bitmap's dirty granules, None if inconsistent."""
    storage = stored(content)
    try:
        header = read_header(storage)
        found: dict[str, set[int] | None] = {}
        for entry in read_bitmaps(storage, header):
            bits = None if entry.is_inconsistent else load_bits(storage, header, entry.name)
            found[entry.name] = (
                None if bits is None else set(np.flatnonzero(np.unpackbits(bits.packed, bitorder="little")).tolist())
            )
        return found
    finally:
        storage.close()

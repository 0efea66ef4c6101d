"""Empty qcow2 images that refer to other files: valid but for the name, which can be any bytes at all.

For names that qemu-img refuses to write, and for chains of hundreds of layers, which it makes slowly.
"""

import os

from nbdq.qcow2.format import Incompatible
from tests.qcow2.minimal import minimal_header, minimal_image


def refer(backing: bytes = b"", *, format: str | None = "qcow2", data_file: bytes | None = None) -> bytes:
    """The file of an empty disk of 1 MiB that names a backing or a data file."""
    header = minimal_header(
        cluster_bits=12,
        backing_name=os.fsdecode(backing) or None,
        backing_format=format if backing else None,
        data_file_name=None if data_file is None else os.fsdecode(data_file),
        incompatible=Incompatible.NONE if data_file is None else Incompatible.DATA_FILE,
    )
    return bytes(minimal_image(header))

"""Directories in memory: what syncs after every few requests would mostly wait for the disk under the tests."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_MEMORY = Path("/dev/shm")
#: Containers often have 64 MiB there, in which images do not fit.
_ENOUGH = 2 << 30


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """An empty directory, in memory where there is enough of it; gone afterwards."""
    in_memory = _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free >= _ENOUGH
    with tempfile.TemporaryDirectory(prefix="nbdq-", dir=_MEMORY if in_memory else None) as name:
        yield Path(name)

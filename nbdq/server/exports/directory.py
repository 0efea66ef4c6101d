"""Directories whose images are exports: which files of a directory count, and under which names (R-38).

Names come from a listing, and what clients ask for is only compared with them: no path is made of what a client says.
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nbdq.errors import ExportError, printable
from nbdq.ops.preflight import backing_paths
from nbdq.storage import Identity, identity_of

Format = Literal["qcow2", "raw"]

#: Files of a directory that are looked at; with more, something else than a directory of images was named.
FILES_MAX = 10_000


@dataclass(frozen=True)
class Found:
    """An image in a directory."""

    name: str
    """Of the file."""
    path: str
    format: Format
    identity: Identity
    """Which file had the path: whoever can write to the directory may put a link there before it is opened."""
    has_overlay: bool
    """Whether another image of the directory lies over it."""


def list_images(directory: str, formats: Mapping[str, Format]) -> list[Found]:
    """The images of ``directory``, in the order of their names; waits for disks.

    Only regular files count, not even links to some, whose names are UTF-8, without control characters and without a
    dot in front, and end in a suffix that ``formats`` maps to a format. Of QCOW2 images the backing name is read.

    Raises:
        ExportError: the directory holds more than FILES_MAX files.
        OSError: it cannot be read.
    """
    files: list[tuple[str, str, Format, Identity]] = []
    lower: set[Identity] = set()
    with os.scandir(directory) as entries:
        for number, entry in enumerate(entries):
            if number >= FILES_MAX:
                raise ExportError(f"{printable(directory, 1024)}: more than {FILES_MAX} files; is this the directory?")
            format = _format_of(entry.name, formats)
            try:
                if format is None or not is_safe(entry.name):
                    continue
                status = entry.stat(follow_symlinks=False)
                if not stat.S_ISREG(status.st_mode):
                    continue
                files.append((entry.name, entry.path, format, (status.st_dev, status.st_ino)))
            except OSError:  # it has just gone
                continue
            for path in backing_paths(entry.path) if format == "qcow2" else ():
                try:
                    lower.add(identity_of(path))
                except (OSError, ValueError):  # whoever opens the overlay is told
                    continue
    return [Found(*file, has_overlay=file[3] in lower) for file in sorted(files)]


def is_safe(name: str) -> bool:
    """Whether a file of that name may become an export."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return not name.startswith(".") and "/" not in name and name.isprintable()


def _format_of(name: str, formats: Mapping[str, Format]) -> Format | None:
    """By the longest suffix that fits."""
    fitting = [suffix for suffix in formats if name.endswith(suffix) and name != suffix]
    return formats[max(fitting, key=len)] if fitting else None

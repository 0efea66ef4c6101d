"""What overlays that are made in a directory look like, and which images there are templates: a TOML file.

::

    [[directory]]
    path = "/srv/domain-1"
    compat = "1.1"           # or "0.10"
    cluster_size = "64k"
    refcount_bits = 16
    lazy_refcounts = false
    templates = ["*.template.qcow2", "golden/*"]

The storage's rule counts, not what the layer below looks like. The longest directory that contains an image decides;
where none does, images are made as ``nbdq create`` makes them, and none is a template.
"""

import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from nbdq.admin.arguments import parse
from nbdq.errors import NbdqError, printable
from nbdq.qcow2.create import CreateOptions
from nbdq.storage import FileStorage

_SIZE_MAX = 1 << 20
_SUFFIXES = {"k": 1 << 10, "m": 1 << 20}


class PolicyError(NbdqError):
    """The policy file cannot be used."""


@dataclass(frozen=True)
class _Directory:
    path: str
    compat: Literal["0.10", "1.1"] = "1.1"
    cluster_size: int | str = 64 << 10
    refcount_bits: int = 16
    lazy_refcounts: bool = False
    templates: list[str] = field(default_factory=list)

    def contains(self, path: str) -> bool:
        return path == self.path or path.startswith(self.path.rstrip("/") + "/")

    @property
    def options(self) -> dict[str, Any]:
        return {
            "version": 2 if self.compat == "0.10" else 3,
            "cluster_size": _size(self.cluster_size),
            "refcount_bits": self.refcount_bits,
            "lazy_refcounts": self.lazy_refcounts,
        }


class Policies:
    """The rules of all directories."""

    def __init__(self, directories: Sequence[_Directory] = ()) -> None:
        self._directories = sorted(directories, key=lambda directory: len(directory.path), reverse=True)

    @classmethod
    def load(cls, path: str) -> "Policies":
        """Read the file.

        Raises:
            PolicyError: it says something that cannot be; the text names the directory and the key.
            OSError: it cannot be read.
        """
        storage = FileStorage.open(path)
        try:
            text = storage.read(0, _SIZE_MAX + 1)
        finally:
            storage.close()
        try:
            if len(text) > _SIZE_MAX:
                raise PolicyError("the file is too large")
            return cls(_directories(tomllib.loads(text.decode())))
        except (ValueError, RecursionError, NbdqError) as error:
            raise PolicyError(f"{printable(path)}: {printable(str(error))}") from None

    def overlay_options(self, path: str) -> dict[str, Any]:
        """What an overlay at ``path`` is made of: arguments of :class:`CreateOptions`, without its size and names."""
        directory = self._directory(path)
        return {} if directory is None else directory.options

    def is_template(self, path: str) -> bool:
        """Whether the image at ``path`` is one that others are made from, and so never changes."""
        directory = self._directory(path)
        if directory is None:
            return False
        name = os.path.relpath(os.path.realpath(path), directory.path)
        return any(fnmatchcase(name, pattern) for pattern in directory.templates)

    def _directory(self, path: str) -> _Directory | None:
        real = os.path.realpath(path)
        return next((directory for directory in self._directories if directory.contains(real)), None)


def _directories(document: dict[str, Any]) -> list[_Directory]:
    entries = document.pop("directory", [])
    if document:
        raise PolicyError(f"unknown key {next(iter(document))!r}; rules stand in [[directory]]")
    if not isinstance(entries, list):
        raise PolicyError("directory is not a list; write [[directory]]")
    found: dict[str, _Directory] = {}
    for number, entry in enumerate(entries, 1):
        try:
            directory = parse(_Directory, entry, spell=str)
            if not os.path.isabs(directory.path):
                raise PolicyError("path must be absolute")
            real = os.path.realpath(directory.path)
            directory = _Directory(**{**vars(directory), "path": real})
            if real in found:
                raise PolicyError("there are two rules for this directory")
            CreateOptions(size=0, **directory.options)  # refuses what cannot be
            found[real] = directory
        except NbdqError as error:
            raise PolicyError(f"[[directory]] number {number}: {error}") from None
    return list(found.values())


def _size(value: int | str) -> int:
    if isinstance(value, int):
        return value
    digits, factor = (value[:-1], _SUFFIXES[value[-1].lower()]) if value[-1:].lower() in _SUFFIXES else (value, 1)
    if not digits.isdigit():
        raise PolicyError(f"cluster_size is {printable(value)!r}; write bytes, or a number with k or M")
    return int(digits) * factor

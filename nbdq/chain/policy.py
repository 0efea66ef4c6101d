"""What the header of an image may make nbdq open, and the only way in which that is opened (R-35..R-37).

Whoever writes an image chooses the names in it, so a name is untrusted: it is a path and never a protocol, it leads to
a file beneath a directory that the operator allowed, and that is what gets opened even if somebody moves links about
at the same moment. Paths that the operator gives do not pass here. Knows names and directories; must not know chains.
"""

import errno
import os
import stat
from dataclasses import dataclass
from enum import Enum

from nbdq.errors import ChainError, printable
from nbdq.locks import Locking
from nbdq.storage import FileStorage

#: The longest name that a header can hold, in bytes (V23).
_MAX_NAME = 1023
#: Symbolic links followed until they count as a loop; the kernel's number.
_MAX_LINKS = 40

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

_KINDS = {
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFSOCK: "a socket",
}


@dataclass(frozen=True)
class Policy:
    """What the operator allows while a chain is resolved."""

    roots: tuple[str, ...] = ()
    """Directories that names in headers may lead into, besides the directory of the top image. Block devices are
    allowed beneath these only: the directory of a top in ``/dev`` holds the disks of the host, too."""
    allow_data_file: bool = False
    """Open external data files (Q76, R-37)."""
    max_depth: int = 256
    """Backing files below the top."""
    locking: Locking = Locking.AUTO
    force_share: bool = False
    """Read images that other processes write to."""


class Role(Enum):
    """What an image uses the file for that it names."""

    BACKING = "backing file"
    DATA = "data file"
    OVERLAY = "overlay"


@dataclass(frozen=True)
class Reference:
    """``image`` names a file ``name``, which means ``path``: as stored, or relative to the image (N2)."""

    image: str
    role: Role
    name: str
    path: str

    def __str__(self) -> str:
        if self.path == self.name:
            return f'{self.role.value} "{printable(self.name, 1024)}"'
        return f'{self.role.value} "{printable(self.name)}" ({printable(self.path, 1024)})'

    def error(self, what: str, mend: str = "") -> ChainError:
        """The reason why this reference cannot be followed, in the name of the image that makes it."""
        return ChainError(self.image, f"{self} {what}", mend)


def has_protocol(name: str) -> bool:
    """Whether QEMU would read ``name`` as ``protocol:rest``: a colon before any slash (N1)."""
    return ":" in name.partition("/")[0]


class Gate:
    """The way from references in headers to open files, for the chain of one top image."""

    def __init__(self, top: str, policy: Policy) -> None:
        self._named_roots = tuple(map(os.path.realpath, policy.roots))
        self._roots = (*self._named_roots, os.path.realpath(os.path.dirname(top)))

    def admits(self, path: str) -> bool:
        """Whether a file may be made or taken at ``path``: all links followed, it lies beneath an allowed directory."""
        place = os.path.realpath(path)
        return any(_is_beneath(place, root) for root in self._roots)

    def open(self, reference: Reference, *, writable: bool = False) -> FileStorage:
        """Open what ``reference`` leads to; the caller owns it. Never waits.

        Raises:
            ChainError: the name, the place or the kind of file is not allowed; nothing outside the roots was opened.
            OSError: the file is missing or cannot be opened.
        """
        _check_name(reference)
        target = _follow_links(reference)
        root = next((root for root in self._roots if _is_beneath(target, root)), None)
        if root is None:
            leads = f" (it leads to {printable(target, 1024)})" if target != reference.path else ""
            mend = "allow its directory with --allow-backing DIR"
            raise reference.error(f"lies outside the allowed directories{leads}", mend)
        devices_allowed = any(_is_beneath(target, root) for root in self._named_roots)
        access = os.O_RDWR if writable else os.O_RDONLY
        return _open_beneath(root, target, reference, access=access, devices_allowed=devices_allowed)


def check_writable(storage: FileStorage) -> None:
    """Make sure that what is open for writing can be written to: Linux opens a protected block device all the same.

    Raises:
        OSError: EPERM, as every write would, and after that no flush could be believed.
    """
    os.pwrite(storage.descriptor, b"", 0)  # changes nothing, not even a time stamp


def _check_name(reference: Reference) -> None:
    name = reference.name
    if len(name.encode("utf-8", "surrogateescape")) > _MAX_NAME:
        raise reference.error(f"is refused: its name is longer than {_MAX_NAME} bytes")
    if any(c < " " or "\x7f" <= c <= "\x9f" for c in name):
        raise reference.error("is refused: its name contains control characters")
    if any("\ud800" <= c <= "\udfff" for c in name):
        raise reference.error("is refused: its name is not valid UTF-8")
    if has_protocol(name):
        protocol = printable(name.partition(":")[0], 32)
        mend = 'if it is a file, rebase onto "./NAME"'
        raise reference.error(f'is refused: names in images are paths, not protocols such as "{protocol}:"', mend)


def _follow_links(reference: Reference) -> str:
    """The absolute path, free of links, that the reference leads to at this moment. Opens nothing.

    Unlike ``realpath`` it does not pass through /proc: the magic links there reach files that have no path.
    """
    resolved: list[str] = []
    pending = os.path.join(os.getcwd(), reference.path).split("/")[::-1]
    links = 0
    while pending:
        component = pending.pop()
        if component in ("", "."):
            continue
        if component == "..":
            del resolved[-1:]
            continue
        resolved.append(component)
        if resolved[0] == "proc":
            raise reference.error("is refused: it leads through /proc")
        try:
            target = os.readlink("/" + "/".join(resolved))
        except OSError:
            continue  # not a link, or not there at all: opening it will tell
        links += 1
        if links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), reference.path)
        del resolved[0 if target.startswith("/") else -1 :]
        pending.extend(target.split("/")[::-1])
    return "/" + "/".join(resolved)


def _is_beneath(path: str, root: str) -> bool:
    return path.startswith(root.rstrip("/") + "/")


def _open_beneath(root: str, target: str, reference: Reference, *, access: int, devices_allowed: bool) -> FileStorage:
    """Open ``target``, a path without links beneath ``root``, one component at a time and following no link.

    A component that became a link after ``target`` was computed therefore ends in an error, not elsewhere (R-36).
    """
    *directories, name = target[len(root.rstrip("/")) + 1 :].split("/")
    here = os.open(root, _DIRECTORY)
    try:
        for directory in directories:
            outer, here = here, os.open(directory, _DIRECTORY, dir_fd=here)
            os.close(outer)
        # Asked before opening, because opening some devices has effects; and after it, because names can be exchanged.
        _check_kind(os.stat(name, dir_fd=here, follow_symlinks=False), reference, devices_allowed=devices_allowed)
        file = os.open(name, access | _FILE, dir_fd=here)
    finally:
        os.close(here)
    try:
        _check_kind(os.fstat(file), reference, devices_allowed=devices_allowed)
        return FileStorage(file, reference.path)
    except BaseException:
        os.close(file)
        raise


def _check_kind(status: os.stat_result, reference: Reference, *, devices_allowed: bool) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG and not (kind == stat.S_IFBLK and devices_allowed):
        mend = "allow its directory with --allow-backing DIR" if kind == stat.S_IFBLK else ""
        raise reference.error(f"is refused: it is {_KINDS.get(kind, 'no file')}", mend)

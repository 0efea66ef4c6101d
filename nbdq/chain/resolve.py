"""From the path of a top image to its whole chain: every layer found, opened and locked, or an error that says why not.

Walks the chain in a loop, never by recursion (R-31), and never guesses a format (R-34): what a layer is says the
operator for the top, and the image above for every other. What a name in an image may reach is decided in
:mod:`nbdq.chain.policy`. Knows headers; must not know tables or guest data.
"""

import errno
import os
import resource
import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Protocol

from nbdq.chain.policy import Gate, Policy, Reference, Role, check_writable, has_protocol
from nbdq.errors import ChainError, ImageError, UnsupportedImage, printable
from nbdq.locks import DATA_FILE_WRITER, RAW_WRITER, READER, TOLERANT_READER, WRITER, Claim, lock_image
from nbdq.qcow2.fields import MAGIC
from nbdq.qcow2.format import Header, read_header
from nbdq.storage import FileStorage


class Format(StrEnum):
    """The formats that a layer can have."""

    QCOW2 = "qcow2"
    RAW = "raw"


#: Older QEMU records the protocol driver of a backing file that it uses without a format; that reads like raw (N7).
_RECORDED_FOR_RAW = ("file", "host_device")

#: What the kernel says to writers where readers may be welcome: no permission, a read-only file system or device, an
#: immutable file, a running program.
_MAY_NOT_WRITE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ETXTBSY)


class _Opener(Protocol):
    """Opens one certain file; the caller owns it."""

    def __call__(self, *, writable: bool) -> FileStorage: ...


@dataclass(frozen=True)
class ResolvedLayer:
    """One image of a chain, open and locked. Whoever holds it owns the storages; closing them drops the locks."""

    path: str
    """As the operator gave it, or as :func:`backing_path` made it: relative names of the next layer start here."""
    format: Format
    storage: FileStorage
    header: Header | None
    """None for raw."""
    data_storage: FileStorage | None
    """The external data file, if there is one."""

    def as_in_file(self) -> "ResolvedLayer":
        """The same with the header that the file has now.

        Raises:
            ImageError, OSError: it cannot be read.
        """
        return self if self.header is None else replace(self, header=read_header(self.storage))


def backing_path(image_path: str, name: str) -> str:
    """What ``name``, stored in the image that was opened as ``image_path``, means to QEMU (N2).

    An absolute path or a protocol name means itself, another name is relative to the directory part of ``image_path``.
    Nothing is normalised and no link is followed: this is ``full-backing-filename`` of ``qemu-img info``.
    """
    if name.startswith("/") or has_protocol(name):
        return name
    return image_path[: image_path.rfind("/") + 1] + name


def resolve_chain(
    path: str,
    *,
    format: str = "qcow2",
    policy: Policy | None = None,
    backing: Sequence[tuple[str, str]] | None = None,
    describe: bool = False,
    writable: bool = False,
) -> list[ResolvedLayer]:
    """Open and lock the image at ``path`` and all layers below it; top first. The caller owns what is returned.

    ``backing`` overrules the headers: the layers below the top are exactly these (format, path) pairs of the operator,
    and none at all if it is empty (F4). With ``describe`` the layers are only to be talked about: encrypted images are
    welcome, and data files stay closed (R-37). With ``writable`` the top and its data file are open for writing and
    claimed by us alone; every layer below is only read, as always (D4). On failure everything that was opened is closed
    again, and nothing was changed.

    Raises:
        ChainError: a layer or data file is missing, refused, undeclared or a repetition, or the chain is too deep; or
            the top may not be written to.
        ImageLocked: another process writes to a layer, or uses a top that is to be ``writable``; an open top of ours
            counts as another process's.
        UnsupportedImage: a format or feature that nbdq does not have.
        InvalidImage, CorruptImage: a header that cannot be believed.
        ImageError: a header cannot be read, or a file cannot be locked where that is demanded.
    """
    policy = policy or Policy()
    if writable and policy.force_share:
        mend = "leave out -U/--force-share, or serve the image with -r/--read-only"
        raise ChainError(path, "cannot be written to while others may change it", mend)
    with ExitStack() as opened:
        walk = _Walk(path, policy, opened, describe=describe, writable=writable)
        walk.add_named(path, _supported(format, path, "format"))
        if backing is None:
            while walk.follow():
                pass
        else:
            for layer_format, layer_path in backing:
                walk.add_named(layer_path, _supported(layer_format, layer_path, "format"))
        opened.pop_all()
        return walk.layers


class _Walk:
    """A chain while it is being resolved. What it opens is registered with ``opened``."""

    def __init__(self, top: str, policy: Policy, opened: ExitStack, *, describe: bool, writable: bool) -> None:
        self.layers: list[ResolvedLayer] = []
        self._describe = describe
        self._writable = writable
        self._policy = policy
        self._gate = Gate(top, policy)
        self._opened = opened
        #: The path by which a file came in, by its identity and by its name without links (D1, R-31).
        self._known: dict[tuple[int, int] | str, str] = {}

    def add_named(self, path: str, format: Format) -> None:
        """Add the operator's own path below the last layer; whatever is in its header is not asked."""
        if self.layers and self.layers[-1].format is Format.RAW:
            raise ChainError(self.layers[-1].path, "is raw and hides every layer below it", "make it the last layer")
        fail = partial(ChainError, path)
        self._check_depth(fail)
        claim = None
        if self._is_next_writable():
            claim = RAW_WRITER if format is Format.RAW else WRITER
        self._add(self._open(partial(FileStorage.open, path), fail, claim), format)

    def follow(self) -> bool:
        """Add the backing file that the last layer names; False if it names none."""
        above = self.layers[-1]
        if above.header is None or not above.header.backing_name:
            return False
        name, recorded = above.header.backing_name, above.header.backing_format
        reference = Reference(above.path, Role.BACKING, name, backing_path(above.path, name))
        self._check_depth(reference.error)
        if recorded in _RECORDED_FOR_RAW:
            recorded = Format.RAW
        format = _supported(recorded, above.path, f"format of {reference}") if recorded else None
        storage = self._open(partial(self._gate.open, reference), reference.error)
        if format is None:
            raise _undeclared(reference, storage)
        self._add(storage, format)
        return True

    def _add(self, storage: FileStorage, format: Format) -> None:
        header = data_storage = None
        if format is Format.QCOW2:
            try:
                header = read_header(storage, describe=self._describe)
            except OSError as error:
                raise ImageError(storage.path, f"cannot be read: {error.strerror}") from error
            if header.has_data_file and not self._describe:
                data_storage = self._open_data_file(storage.path, header.data_file_name)
        self.layers.append(ResolvedLayer(storage.path, format, storage, header, data_storage))

    def _open_data_file(self, image: str, name: str | None) -> FileStorage:
        """Open an external data file, found relative to its image, not to our directory as QEMU does (Q76)."""
        assert name is not None, "read_header refuses an image that does not name its data file"
        reference = Reference(image, Role.DATA, name, backing_path(image, name))
        if not self._policy.allow_data_file:
            raise reference.error("is refused: external data files are off", "allow them with --allow-data-file")
        claim = DATA_FILE_WRITER if self._is_next_writable() else None
        return self._open(partial(self._gate.open, reference), reference.error, claim)

    def _is_next_writable(self) -> bool:
        """Whether the layer that is being added will be written to: never one below the top (D4)."""
        return self._writable and not self.layers

    def _open(
        self, opener: _Opener, fail: Callable[[str, str], ChainError], writer: Claim | None = None
    ) -> FileStorage:
        """Open and lock one more file of the chain, which must not be part of it yet; for writing as ``writer``."""
        try:
            storage = opener(writable=writer is not None)
            self._opened.callback(storage.close)
            keys = (storage.identity, os.path.realpath(storage.path))
            for key in keys:
                if key in self._known:
                    known = printable(self._known[key], 1024)
                    raise fail(f"closes a loop: it is in the chain already, as {known}", "rebase the image")
            self._known.update(dict.fromkeys(keys, storage.path))
            if writer is not None:
                check_writable(storage)
            # Raw files, too, whose writers QEMU tolerates: the chain index remembers where their holes are.
            claim = writer or (TOLERANT_READER if self._policy.force_share else READER)
            lock_image(storage.descriptor, storage.path, claim, self._policy.locking)
        except OSError as error:
            raise fail(*explain(error, writable=writer is not None)) from error
        return storage

    def _check_depth(self, fail: Callable[[str, str], ChainError]) -> None:
        if len(self.layers) > self._policy.max_depth:
            raise fail(f"makes the chain deeper than {self._policy.max_depth} backing files", "commit some layers")


def _supported(name: str, path: str, what: str) -> Format:
    try:
        return Format(name)
    except ValueError:
        raise UnsupportedImage(path, f'{what} is "{printable(name)}"', "nbdq has qcow2 and raw") from None


def _undeclared(reference: Reference, storage: FileStorage) -> ChainError:
    """Refuse a backing file whose format is not recorded, with the command that records it (F2, F3, R-34).

    A look at the file chooses what the command suggests and nothing else: a guest may have put the magic there.
    """
    likely = Format.RAW
    with suppress(OSError):  # only the advice would be better
        if storage.read(0, len(MAGIC)) == MAGIC:
            likely = Format.QCOW2
    words = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", likely, "-b", reference.name, reference.image]
    command = " ".join(shlex.quote(printable(word, 1024)) for word in words)
    return reference.error("has no recorded format", f"if it is {likely}, record that with: {command}")


def explain(error: OSError, *, writable: bool) -> tuple[str, str]:
    """Why a file could not be opened, and what to do about it."""
    if error.errno == errno.ENOENT:
        return "is missing", "bring it back, or correct the name"
    if error.errno == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"cannot be opened: all {limit} file descriptors are in use", "raise RLIMIT_NOFILE (ulimit -n)"
    if writable and error.errno in _MAY_NOT_WRITE:
        return f"cannot be opened for writing: {error.strerror}", "serve the image with -r/--read-only"
    return f"cannot be opened: {error.strerror}", ""

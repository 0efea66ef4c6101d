"""New image files: where they lie, what they replace, and that nobody else uses what they replace.

A new file is made under its own name and is no image before it is complete. What exists is replaced only if it can be
locked as by a writer, and as a whole: the new file is made beside it, with its owner and mode, and renamed over it when
it is durable. So a failure leaves what was there, which truncating it would not; the price is that hard links and
extended attributes stay with the old file. Devices are written in place. Knows files and locks; the format is the
business of :mod:`nbdq.qcow2.create`.
"""

import os
import stat
from collections.abc import Collection
from contextlib import ExitStack, suppress
from typing import Self

from nbdq.chain.policy import Policy, has_protocol
from nbdq.chain.resolve import backing_path, resolve_chain
from nbdq.errors import ChainError, ImageError, ImageLocked, printable
from nbdq.locks import WRITER, Locking, lock_image
from nbdq.qcow2.create import CreateOptions, Preallocation, plan_image, write_disk, write_header, write_tables
from nbdq.storage import FileStorage, Identity, identity_of, sync_directory_of


def create_qcow2(
    path: str,
    options: CreateOptions,
    *,
    keep: Collection[Identity] = (),
    replace: bool = True,
    locking: Locking = Locking.AUTO,
) -> None:
    """Make a QCOW2 image at ``path``, and its data file if it has one; both durable on return.

    The data file is looked for where the readers of the chain look for it, beside the image. Files that exist are
    replaced; those in ``keep``, and the backing file, are not, and without ``replace`` no image is. On failure nothing
    that is new is left behind, and what existed is unchanged unless the failure came at the very end (then it may be
    gone) or it is a device.

    Raises:
        NbdqError: impossible options, before any file is touched; ImageLocked, if something to be replaced is in use.
        OSError: a file cannot be made or written; ENOSPC if there is no room.
    """
    layout = plan_image(options)
    keep = set(keep)
    if options.backing_name is not None:
        with suppress(OSError):  # what is not there cannot be overwritten
            keep.add(identity_of(backing_path(path, options.backing_name)))
    with ExitStack() as undo:
        image = undo.enter_context(_NewFile(path, keep if replace else None, locking))
        data = None
        if options.data_file_name is not None:
            data = _new_data_file(path, options.data_file_name, keep | image.identities, locking)
            undo.enter_context(data)
            write_disk(data.storage, options.guest_size, options.preallocation)
        write_tables(image.storage, layout)
        if data is not None:
            if data.replaces:
                image.remove_old()  # it may be the image whose data goes now
            data.publish()
        write_header(image.storage, layout)
        image.publish()
        image.keep()
        if data is not None:
            data.keep()


def create_raw(
    path: str,
    size: int,
    *,
    preallocation: Preallocation = Preallocation.OFF,
    keep: Collection[Identity] = (),
    locking: Locking = Locking.AUTO,
) -> None:
    """Make a raw disk of ``size`` bytes of zeros at ``path``; the rest as :func:`create_qcow2`."""
    with _NewFile(path, keep, locking) as disk:
        write_disk(disk.storage, size, preallocation)
        disk.publish()
        disk.keep()


def inspect_backing(image: str, name: str, *, format: str, policy: Policy) -> tuple[int, frozenset[Identity]]:
    """Open what will be the backing file of ``image``: the bytes of its disk, and the files that its chain consists of.

    The operator named it, so it may lie anywhere; what it refers to is subject to ``policy``. Everything is closed.

    Raises:
        ImageError: it cannot be a backing file: missing, damaged, of another format, or refused by ``policy``.
    """
    if has_protocol(name):
        mend = "if it is a file, write ./NAME; to record the name unseen, use -u"
        raise ChainError(image, f'backing file "{printable(name)}" is a protocol name, not a path', mend)
    layers = resolve_chain(backing_path(image, name), format=format, policy=policy, describe=True)
    try:
        top = layers[0]
        size = top.header.guest_size if top.header else -(-top.storage.size() // 512) * 512
        return size, frozenset(layer.storage.identity for layer in layers)
    finally:
        for layer in layers:
            layer.storage.close()


def _new_data_file(image: str, name: str, keep: Collection[Identity], locking: Locking) -> "_NewFile":
    if has_protocol(name):
        raise ImageError(image, f'data file "{printable(name)}" is a protocol name, not a path', "write ./NAME")
    return _NewFile(backing_path(image, name), keep, locking)


class _NewFile:
    """A file that is being made, locked as by a writer. Leaving its context before :meth:`keep` removes it again."""

    def __init__(self, path: str, keep: Collection[Identity] | None, locking: Locking) -> None:
        """Claim ``path``; without ``keep`` nothing may be there.

        Raises:
            ImageError: what is there is in ``keep``, or in use, or cannot be replaced.
            OSError: nothing can be made there, or what is there is neither file nor device.
        """
        if not os.path.basename(path):
            raise ImageError(path, "is no name for a file", "name the file, not its directory")
        self._path = path
        self._target = os.path.realpath(path)  # a symbolic link stays, and leads to the new file
        self._old: FileStorage | None = None
        self._name: str | None = self._target
        try:
            self.storage = FileStorage.create(self._target)
        except FileExistsError:
            if keep is None:
                raise ImageError(path, "exists already", "choose another name") from None
            self._replace(keep, locking)
        else:
            try:
                lock_image(self.storage.descriptor, path, WRITER, locking)
            except BaseException:
                self.storage.close()  # but it is no longer ours to remove
                raise
        self.storage.path = path  # for messages

    @property
    def replaces(self) -> bool:
        return self._old is not None

    @property
    def identities(self) -> set[Identity]:
        """Of the new file, and of what it replaces."""
        return {storage.identity for storage in (self.storage, self._old) if storage is not None}

    def _replace(self, keep: Collection[Identity], locking: Locking) -> None:
        old = FileStorage.open(self._target, writable=True)
        try:
            if old.identity in keep:
                raise ImageError(self._path, "is part of the disk that the new image is made for", "use another name")
            lock_image(old.descriptor, self._path, WRITER, locking)
            if identity_of(self._target) != old.identity:
                raise ImageLocked(self._path, "another process has just replaced it", "look at it before trying again")
            if old.is_block_device:
                self.storage, self._name = old, None
            else:
                self._old = old
                self._make_beside(old)
        except BaseException:
            old.close()
            raise

    def _make_beside(self, old: FileStorage) -> None:
        status = os.fstat(old.descriptor)
        self._name = os.path.join(os.path.dirname(self._target), f".nbdq-create-{os.urandom(8).hex()}")
        try:
            self.storage = FileStorage.create(self._name, mode=0o600)
            try:
                os.fchown(self.storage.descriptor, status.st_uid, status.st_gid)
                os.fchmod(self.storage.descriptor, stat.S_IMODE(status.st_mode))
            except BaseException:
                self._discard()
                raise
        except OSError as error:
            what = f"exists, and cannot be replaced by a file of the same owner beside it: {error.strerror}"
            raise ImageError(self._path, what, "remove it first") from error

    def remove_old(self) -> None:
        """Give up what is to be replaced, durably, before the new file can take its place."""
        if self._old is not None:
            os.unlink(self._target)
            sync_directory_of(self._target)

    def publish(self) -> None:
        """Give the file its name, durably. It must be complete and synced."""
        if self._name is None:
            return
        if self._name != self._target:
            os.rename(self._name, self._target)
            self._name = self._target
        sync_directory_of(self._target)

    def keep(self) -> None:
        """Success: the file stays."""
        self._name = None

    def _discard(self) -> None:
        self.storage.close()
        if self._name is not None:
            with suppress(OSError):  # the first failure is the news
                os.unlink(self._name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._discard()
        if self._old is not None:
            self._old.close()

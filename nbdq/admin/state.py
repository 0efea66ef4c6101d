"""What a server must know after a restart: one small file, always whole, always durable before anybody is answered.

For every disk, by the path of the image that the command line names: the image that is its top now, the overlays that
were made but are not part of it yet, and the jobs that go on. So a restart with the same command line serves what was
served before (R-59). The file is replaced as a whole: written beside its place, synced, renamed, directory synced.
"""

import json
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nbdq.admin.arguments import InvalidArguments, parse
from nbdq.errors import ImageLocked, NbdqError, printable
from nbdq.locks import WRITER, lock_image
from nbdq.storage import FileStorage, sync_directory_of

_VERSION = 1
#: A larger file is none of ours.
_SIZE_MAX = 64 << 20


class StateError(NbdqError):
    """The state file cannot be used; nothing that it says is believed."""


@dataclass(frozen=True)
class TopRecord:
    """The image that is the top of a disk now."""

    path: str
    format: str


@dataclass(frozen=True)
class JobRecord:
    """A job to be started again after a restart."""

    id: str
    command: str
    """The command that started it."""
    arguments: dict[str, Any]
    """The fields of the command's argument class."""
    paths: dict[str, str] = field(default_factory=dict)
    """The layers that the arguments meant when it began."""
    offset: int = 0
    """The part of the disk before this guest offset is done, durably."""


@dataclass(frozen=True)
class DiskRecord:
    """Everything that outlives the server about one disk."""

    top: TopRecord | None = None
    """None: the image that the command line names."""
    directories: list[str] = field(default_factory=list)
    """Where tops of the disk have been: layers of the chain may lie there."""
    pending: list[str] = field(default_factory=list)
    """Overlays that were made but do not belong to the disk yet; removed at the next start if nothing uses them."""
    obsolete: list[str] = field(default_factory=list)
    """Overlays of ours whose contents are in the disk, and which are no part of it; about to be removed."""
    jobs: list[JobRecord] = field(default_factory=list)


@dataclass(frozen=True)
class _File:
    version: int
    disks: dict[str, DiskRecord]


def _place(path: str) -> str:
    """The name of an image that holds for ever: links followed, but not to a device, which has another number after the
    next boot, and its number another device."""
    real = os.path.realpath(path)
    with suppress(OSError):
        if stat.S_ISBLK(os.stat(real).st_mode):
            return os.path.abspath(path)
    return real


class Changes:
    """A transaction's own copy of the records; see :meth:`State.transaction`. Disks go by their volumes' names."""

    def __init__(self, disks: Mapping[str, DiskRecord], keys: Mapping[str, str]) -> None:
        self.disks = dict(disks)
        self._keys = keys

    def set_top(self, name: str, path: str, format: str) -> None:
        """The image at ``path`` is the disk's top from now on, and no longer a pending overlay."""
        path = _place(path)
        pending = [other for other in self._disk(name).pending if other != path]
        if path == self._keys[name]:
            self._update(name, top=None, directories=[], pending=pending)
        else:
            directories = list(dict.fromkeys([*self._disk(name).directories, os.path.dirname(path)]))
            self._update(name, top=TopRecord(path, format), directories=directories, pending=pending)

    def add_pending(self, name: str, path: str) -> None:
        """An overlay is about to be made at ``path``."""
        self._update(name, pending=[*self._disk(name).pending, _place(path)])

    def remove_pending(self, name: str, path: str) -> None:
        """The overlay at ``path`` has been removed again, or belongs to somebody else."""
        path = _place(path)
        self._update(name, pending=[other for other in self._disk(name).pending if other != path])

    def add_obsolete(self, name: str, path: str) -> None:
        """The overlay at ``path`` has been merged into the disk, and is about to be removed."""
        self._update(name, obsolete=[*self._disk(name).obsolete, _place(path)])

    def remove_obsolete(self, name: str, path: str) -> None:
        """The overlay at ``path`` is gone."""
        path = _place(path)
        self._update(name, obsolete=[other for other in self._disk(name).obsolete if other != path])

    def put_job(self, name: str, job: JobRecord) -> None:
        """Remember ``job``, in the place of the one with its id."""
        self._update(name, jobs=[*(other for other in self._disk(name).jobs if other.id != job.id), job])

    def advance_job(self, name: str, job_id: str, offset: int) -> None:
        """The job has got as far as the guest offset ``offset``, durably; nothing happens if it has ended."""
        jobs = [replace(job, offset=offset) if job.id == job_id else job for job in self._disk(name).jobs]
        self._update(name, jobs=jobs)

    def remove_job(self, name: str, job_id: str) -> None:
        """The job has ended."""
        self._update(name, jobs=[other for other in self._disk(name).jobs if other.id != job_id])

    def _disk(self, name: str) -> DiskRecord:
        return self.disks.get(self._keys[name], DiskRecord())

    def _update(self, name: str, **changes: Any) -> None:
        self.disks[self._keys[name]] = replace(self._disk(name), **changes)


class State:
    """The records of all disks, in memory and in a file. Thread-safe; what waits for the disk is said."""

    def __init__(self, path: str | None) -> None:
        """Read the file at ``path``, which need not exist yet; without one, nothing outlives the process. Waits.

        Raises:
            StateError: the file is damaged, or of another version of the program.
            OSError: it cannot be read.
        """
        self.path = None if path is None else os.path.realpath(path)  # a link stays one
        self._lock = threading.Lock()
        self._disks: dict[str, DiskRecord] = {}
        self._keys: dict[str, str] = {}
        if self.path is not None and os.path.lexists(self.path):
            self._disks = _read(self.path)

    def name_disk(self, name: str, image: str) -> DiskRecord:
        """Let ``name`` be the disk for which the command line names ``image``; return what is known about it."""
        self._keys[name] = _place(image)
        return self.disk(name)

    def disk(self, name: str) -> DiskRecord:
        """What is known about the disk."""
        return self._disks.get(self._keys[name], DiskRecord())

    def is_passing(self, path: str) -> bool:
        """Whether the image at ``path`` is an overlay that is about to become part of a disk, or to be removed."""
        place = _place(path)
        return any(place in (*disk.pending, *disk.obsolete) for disk in list(self._disks.values()))

    @contextmanager
    def transaction(self) -> Iterator[Changes]:
        """Change the records of any number of disks: all are durable when the block ends, or none. Waits.

        A block that raises changes nothing.

        Raises:
            OSError: the file cannot be replaced; the records are as before.
        """
        with self._lock:
            changes = Changes(self._disks, self._keys)
            yield changes
            disks = {key: disk for key, disk in changes.disks.items() if disk != DiskRecord()}
            if disks != self._disks:
                if self.path is not None:
                    self._save(self.path, disks)
                self._disks = disks

    def _save(self, path: str, disks: Mapping[str, DiskRecord]) -> None:
        try:
            _write(path, disks)
        except BaseException:
            # The new file may be in place, only not durably. Who asked goes back to what was; so does the file.
            with suppress(OSError):
                _write(path, self._disks)
            raise


def hold(path: str) -> FileStorage:
    """Keep other servers from the state file at ``path`` for as long as what is returned is open.

    The lock is on a file beside it, for the state file itself is replaced with every change.

    Raises:
        StateError: another server uses it, or the file beside it cannot be made.
        OSError: the kernel refuses to lock.
    """
    beside = f"{os.path.realpath(path)}.lock"
    try:
        with suppress(FileExistsError):
            FileStorage.create(beside, mode=0o600).close()
        storage = FileStorage.open(beside)
    except OSError as error:
        what = f"{printable(path)}: cannot be locked, for which {printable(beside)} is needed"
        raise StateError(f"{what}: {error.strerror or error}") from None
    try:
        lock_image(storage.descriptor, beside, WRITER)
    except ImageLocked:
        storage.close()
        raise StateError(f"{printable(path)}: another server uses this state file; give each its own") from None
    except BaseException:
        storage.close()
        raise
    return storage


def _read(path: str) -> dict[str, DiskRecord]:
    storage = FileStorage.open(path)
    try:
        text = storage.read(0, _SIZE_MAX + 1)
    finally:
        storage.close()
    try:
        if len(text) > _SIZE_MAX:
            raise InvalidArguments("it is too large")
        members = json.loads(text)
        version = members.get("version") if isinstance(members, dict) else None
        if version != _VERSION:
            raise InvalidArguments(f"its version is {printable(str(version))}, not {_VERSION}")
        return parse(_File, members).disks
    except (ValueError, RecursionError, InvalidArguments) as error:
        raise StateError(
            f"{printable(path)}: not a usable state file: {printable(str(error))};"
            " it says which images are the tops of disks, so restore it, or remove it and name the tops"
        ) from None


def _write(path: str, disks: Mapping[str, DiskRecord]) -> None:
    """Replace the file; durable on return, and what was there stays whole until then."""
    text = json.dumps(asdict(_File(_VERSION, dict(disks))), indent=1, sort_keys=True).encode()
    new = f"{path}.new"
    with suppress(FileNotFoundError):
        os.unlink(new)  # left behind by a crash
    storage = FileStorage.create(new, mode=0o600)
    try:
        try:
            storage.write(0, text)
            storage.sync()
        finally:
            storage.close()
        os.rename(new, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(new)
        raise
    sync_directory_of(path)

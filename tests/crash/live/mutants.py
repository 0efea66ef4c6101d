"""Operations with one barrier removed, once for each: the exploration must find every one of them out.

Most barriers are one sync or flush, named by the function that asks for it; the mutant is deaf when that asks.
"""

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from nbdq.admin import state, transaction
from nbdq.admin.job import Job
from nbdq.chain import create
from nbdq.chain.overlay import OverlayDisk
from nbdq.ops.commit import Commit
from nbdq.ops.transfer import Transfer
from nbdq.qcow2.amending import amend
from nbdq.qcow2.format import Header
from nbdq.qcow2.header_area import write_fields
from nbdq.qcow2.writing.writable import WritableImage
from nbdq.qcow2.writing.zeroing import Zeroing
from nbdq.server.exports.volume import Volume
from nbdq.storage import FileStorage


@dataclass(frozen=True)
class Mutant:
    """One barrier less."""

    barrier: str
    """What is not kept, with the rule that demands it."""
    installed: Callable[[], AbstractContextManager[Any]]
    scenario: str
    """Whose states show it."""


def _deaf(
    owner: type, method: str, *callers: tuple[str, Collection[str]]
) -> Callable[[], AbstractContextManager[None]]:
    """Let ``method`` do nothing when a function of one of these modules asks: (module, names of functions)."""

    @contextmanager
    def installed() -> Iterator[None]:
        original = getattr(owner, method)

        def deaf(self: Any, *arguments: Any, **options: Any) -> Any:
            caller = sys._getframe(1)
            for module, functions in callers:
                if caller.f_globals["__name__"] == module and caller.f_code.co_name in functions:
                    return None
            return original(self, *arguments, **options)

        with patch.object(owner, method, deaf):
            yield

    return installed


@contextmanager
def _not_flushed() -> Iterator[None]:
    """Nor does the job flush the disk on its way to the pivot, which is only to make that short."""

    async def flush(volume: Volume) -> None:
        pass

    with _deaf(*_FLUSH, ("nbdq.ops.fill", ["run", "pivot"]))(), patch.object(Volume, "flush", flush):
        yield


def _no_directory_sync(module: Any) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: patch.object(module, "sync_directory_of", lambda path: None)


def _marked_before_recorded() -> AbstractContextManager[Any]:
    original = transaction._record

    def record(actions: Any, records: Any) -> None:
        for action in actions:
            action._operation.mark()
        original(actions, records)

    return patch.object(transaction, "_record", record)


def _recorded_one_by_one() -> AbstractContextManager[Any]:
    original = transaction._record

    def record(actions: Any, records: Any) -> None:
        for action in actions:
            original([action], records)

    return patch.object(transaction, "_record", record)


def _recorded_before_copy() -> AbstractContextManager[Any]:
    """What a job will make of the disk is written down when it begins."""
    original = Job._run

    async def run(job: Job) -> None:
        base = job.request.volume.chain.layers[-1]
        with job._state.transaction() as changes:
            changes.set_top(job.request.volume.name, base.path, base.format)
        await original(job)

    return patch.object(Job, "_run", run)


@contextmanager
def _offset_before_flush() -> Iterator[None]:
    original_run, original_copy = Commit.run, Transfer.copy

    def run(commit: Commit, control: Any) -> None:
        def copy(transfer: Transfer, *arguments: Any) -> Iterator[int]:
            for position in original_copy(transfer, *arguments):
                commit._on_durable(position)
                yield position

        with patch.object(Transfer, "copy", copy):
            original_run(commit, control)

    with patch.object(Commit, "run", run):
        yield


@contextmanager
def _repointed_first() -> Iterator[None]:
    """The header is changed at the begin of a copy, and not at its end."""
    original = Commit._begin

    def begin(commit: Commit, control: Any) -> Any:
        result = original(commit, control)
        repoint = commit._repoint
        commit._chain.set_backing(repoint._index, repoint._name, repoint._format)
        return result

    with patch.object(Commit, "_begin", begin):
        yield


@contextmanager
def _gone_before_size() -> Iterator[None]:
    original = OverlayDisk.shrink

    def shrink(disk: OverlayDisk, size: int) -> None:
        zeroing: Zeroing = disk._zeroing
        zeroing.abandon(-(-size // disk.top.cluster_size) * disk.top.cluster_size)
        disk.flush()
        original(disk, size)

    with patch.object(OverlayDisk, "shrink", shrink):
        yield


def _version_first() -> AbstractContextManager[Any]:
    original = amend.downgrade

    def downgrade(storage: FileStorage, header: Header, progress: Any) -> Header:
        write_fields(storage, replace(header, version=2))
        return original(storage, header, progress)

    return patch.object(amend, "downgrade", downgrade)


def _not_held() -> AbstractContextManager[Any]:
    return patch.object(WritableImage, "hold", lambda image: nullcontext())


def _not_sealed() -> AbstractContextManager[Any]:
    return _deaf(OverlayDisk, "finish", ("nbdq.chain.sealing", ["seal"]))()


_SYNC = FileStorage, "sync"
_FLUSH = OverlayDisk, "flush"

MUTANTS: dict[str, Mutant] = {
    "overlay not synced": Mutant(
        "an overlay is durable before it is the top (R-59)",
        _deaf(*_SYNC, ("nbdq.qcow2.create", ["write_tables", "write_header"])),
        "a snapshot",
    ),
    "overlay's name not synced": Mutant(
        "the overlay's directory is synced before the disk is answered (R-59)",
        _no_directory_sync(create),
        "a snapshot without a state file",
    ),
    "old top not sealed": Mutant(
        "the old top is durable, with all it was told, before the overlay takes over (R-59)",
        _not_sealed,
        "a snapshot",
    ),
    "state not synced": Mutant(
        "the state file is durable before it gets its name (R-59)",
        _deaf(*_SYNC, ("nbdq.admin.state", ["_write"])),
        "a snapshot",
    ),
    "state's name not synced": Mutant(
        "the directory of the state file is synced before the administrator is answered (R-59)",
        _no_directory_sync(state),
        "a snapshot of a raw disk",
    ),
    "marked before recorded": Mutant(
        "the old top is usable until the state file says otherwise (R-59)", _marked_before_recorded, "a snapshot"
    ),
    "recorded one by one": Mutant(
        "all disks of a transaction change in one write (R-59)", _recorded_one_by_one, "a transaction of two disks"
    ),
    "base not flushed": Mutant(
        "everything committed is durable in the base before the header above names it (R-60)",
        _deaf(*_FLUSH, ("nbdq.ops.commit", ["run"])),
        "a commit",
    ),
    "header before copy": Mutant(
        "the header above the committed layers is changed when all is copied (R-60)", _repointed_first, "a commit"
    ),
    "bitmaps of the base not in use": Mutant(
        "the bitmaps of a base are durably in use before anything is committed into it (R-57)",
        _deaf(*_SYNC, ("nbdq.qcow2.bitmaps.storing", ["declare_in_use", "_rewrite_directory", "write_autoclear"])),
        "a commit into a base with a bitmap",
    ),
    "name not synced": Mutant(
        "a backing name is durable before the header points to it (R-55)",
        _deaf(*_SYNC, ("nbdq.qcow2.header_area", ["_place_name"])),
        "a commit that records a long name",
    ),
    "offset before flush": Mutant(
        "what a restarted commit leaves out is durable in the base (R-60)", _offset_before_flush, "a commit"
    ),
    "freed places not held": Mutant(
        "what a commit frees in the base is not used again while the running disk knows it (R-50)",
        _not_held,
        "a commit into larger compressed clusters",
    ),
    "new top not flushed": Mutant(
        "the base is durable before it is recorded as the top (R-60)",
        _deaf(*_FLUSH, ("nbdq.ops.active_commit", ["run", "pivot"]), ("nbdq.chain.live", ["flush"])),
        "an active commit",
    ),
    "recorded before the copy": Mutant(
        "the base is recorded as the top when it has everything (R-60)", _recorded_before_copy, "an active commit"
    ),
    "stream not flushed": Mutant(
        "what a layer took over is durable before it lies over something else",
        _not_flushed,
        "a stream to a base",
    ),
    "rebase not flushed": Mutant(
        "what a layer took over is durable before it lies over something else",
        _not_flushed,
        "a rebase",
    ),
    "L1 not synced": Mutant(
        "a longer L1 table is durable before the header names it (R-62)",
        _deaf(*_SYNC, ("nbdq.qcow2.writing.growth", ["_lengthen_l1"])),
        "growing",
    ),
    "gone before the size": Mutant(
        "a disk is smaller before what is behind its end goes (R-62)", _gone_before_size, "growing and shrinking"
    ),
    "version before zero clusters": Mutant(
        "zero clusters have become something else before the header says version 2 (R-61)",
        _version_first,
        "amending down and up",
    ),
    "refcounts not synced": Mutant(
        "refcounts of another width are durable before the header names them (R-61)",
        _deaf(*_SYNC, ("nbdq.qcow2.amending.refcount_width", ["_write"])),
        "amending refcounts",
    ),
    "switch not synced": Mutant(
        "new tables and refcounts are durable before the header names them (R-56)",
        _deaf(*_SYNC, ("nbdq.qcow2.writing.switch", ["make"])),
        "internal snapshots",
    ),
    "snapshot applied in part": Mutant(
        "a disk becomes what a snapshot holds as a whole (R-56)",
        _deaf(*_SYNC, ("nbdq.qcow2.writing.switch", ["make"])),
        "an internal snapshot applied",
    ),
}

"""What a server finds that another one left behind when it ended in the middle of something."""

import logging
import os
from collections.abc import Collection
from contextlib import closing

import numpy as np

from nbdq.admin.state import State
from nbdq.errors import ImageError, printable
from nbdq.qcow2.fields import MAGIC, MAX_L1_TABLE
from nbdq.qcow2.format import read_header
from nbdq.storage import FileStorage, sync_directory_of

_log = logging.getLogger(__name__)

#: What makes an image of an overlay is written last; behind it there may be a long name, and tables.
_SECTOR = 512
#: An overlay that is being made has tables, and no more; a raw disk rarely is as short as these can be.
_UNFINISHED_MAX = MAX_L1_TABLE + (8 << 20)


def remove_pending_overlays(state: State, name: str, used: Collection[str]) -> None:
    """Remove overlays that were made for the disk ``name`` but never became its top, if nothing was written to them.

    ``used`` are the real paths of the images that disks consist of; they and whatever holds data stay, with a warning.
    The records are dropped in any case. Waits.

    Raises:
        OSError: the state file cannot be written.
    """
    for path in state.disk(name).pending:
        try:
            if path in used or not _is_empty(path):
                _log.warning("%s was made for a snapshot that did not happen, but is in use; it stays", printable(path))
            else:
                os.unlink(path)
                sync_directory_of(path)
                _log.warning("removed %s, made for a snapshot that did not happen", printable(path))
        except FileNotFoundError:
            pass
        except (ImageError, OSError) as error:
            _log.warning("%s was made for a snapshot that did not happen; it stays: %s", printable(path), error)
        with state.transaction() as changes:
            changes.remove_pending(name, path)


def remove_obsolete_overlays(state: State, name: str, used: Collection[str]) -> None:
    """Remove overlays that were merged into the disk ``name``, as the server that ended was about to. Waits.

    Raises:
        OSError: the state file cannot be written.
    """
    for path in state.disk(name).obsolete:
        try:
            if path not in used:
                os.unlink(path)
                sync_directory_of(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            _log.warning("%s is in the disk, and not needed any more; it stays: %s", printable(path), error)
        with state.transaction() as changes:
            changes.remove_obsolete(name, path)


def _is_empty(path: str) -> bool:
    """Whether the image holds nothing of its own, or is not even an image yet: its header is written last."""
    with closing(FileStorage.open(path)) as storage:
        if storage.is_block_device:
            return False
        begin = storage.read(0, _SECTOR)
        if not begin.startswith(MAGIC):
            return not any(begin) and storage.size() <= _UNFINISHED_MAX
        header = read_header(storage)
        if header.snapshot_count or header.bitmaps is not None:
            return False
        l1 = storage.read(header.l1_table_offset, header.l1_size * 8)
        return not np.frombuffer(l1, dtype=np.uint8).any()

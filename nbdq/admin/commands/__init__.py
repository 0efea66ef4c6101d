"""All commands of the admin socket; importing this offers them."""

from nbdq.admin.commands import (
    amend,
    bitmaps,
    block_jobs,
    checkpoints,
    exports,
    internal_snapshots,
    jobs,
    misc,
    queries,
    snapshots,
    thresholds,
)

__all__ = [
    "amend",
    "bitmaps",
    "block_jobs",
    "checkpoints",
    "exports",
    "internal_snapshots",
    "jobs",
    "misc",
    "queries",
    "snapshots",
    "thresholds",
]

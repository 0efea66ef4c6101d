"""All commands of the admin socket; importing this offers them."""

from nbdq.admin.commands import bitmaps, checkpoints, jobs, misc, snapshots

__all__ = ["bitmaps", "checkpoints", "jobs", "misc", "snapshots"]

"""All commands of the admin socket; importing this offers them."""

from nbdq.admin.commands import bitmaps, jobs, misc

__all__ = ["bitmaps", "jobs", "misc"]

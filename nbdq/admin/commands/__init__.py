"""All commands of the admin socket; importing this offers them."""

from nbdq.admin.commands import jobs, misc

__all__ = ["jobs", "misc"]

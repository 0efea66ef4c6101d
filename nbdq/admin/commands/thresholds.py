"""The write threshold of a disk: an event in time to extend the thin volume below it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial

from nbdq.admin.context import Context
from nbdq.admin.registry import Reply, command
from nbdq.chain.overlay import OverlayDisk
from nbdq.errors import OperationError, printable
from nbdq.server.threads import in_thread


@dataclass(frozen=True)
class WriteThreshold:
    """Arguments of block-set-write-threshold."""

    node_name: str
    write_threshold: int
    """Host offset in the file of the top; 0 for none."""


@command("block-set-write-threshold", WriteThreshold)
async def set_write_threshold(context: Context, arguments: WriteThreshold) -> Reply:
    """Send BLOCK_WRITE_THRESHOLD, once, when the file of the disk's top grows past an offset."""
    volume = context.volumes.volume(arguments.node_name)
    if arguments.write_threshold < 0:
        raise OperationError("Parameter 'write-threshold' expects an offset, or 0 for no threshold")
    if not isinstance(volume.chain.device, OverlayDisk):
        raise OperationError(
            f"{printable(volume.name)} is no qcow2 disk that can be written to; its file does not grow"
        )
    loop = asyncio.get_running_loop()

    def passed(threshold: int, excess: int) -> None:
        data = {"node-name": volume.name, "amount-exceeded": excess, "write-threshold": threshold}
        loop.call_soon_threadsafe(partial(context.emit, "BLOCK_WRITE_THRESHOLD", data))

    async with volume.steady():
        volume.chain.on_threshold = passed
        await in_thread(volume.chain.set_write_threshold, arguments.write_threshold or None)
    return None

"""Taking replies out of the files in which they wait, so that a drained disk can change or close these."""

import asyncio

from nbdq.nbd.ending import Cause, Ending
from nbdq.server.transmission.output import Output
from nbdq.server.transmission.pending import Pending

#: How long a drained disk waits for a client to take replies for whose copy there is no memory, and how often it looks.
_WAIT_SECONDS, _INTERVAL = 2.0, 0.01


async def reserve_copy(output: Output, pending: Pending) -> Ending | None:
    """Reserve memory for what of ``output`` waits in files; if there is none, let the client take some of it first.

    Returns:
        Why the client has to go, which takes nothing while there is no memory: lest many of them hold up or burst the
        server. It may connect again.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _WAIT_SECONDS
    while (length := output.file_bytes) and not pending.reserve_reply(length):
        if loop.time() > deadline:
            return Ending(Cause.STALLED, "client does not read its replies, and its disk has to change")
        await asyncio.sleep(_INTERVAL)
    return None

"""Captive mode (``--run``), as nbdkit has it: a server that lives for one command."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager

from nbdq.server.listener import Listener

#: How long a command that is told to end may take.
_TERMINATION_SECONDS = 2.0


@contextmanager
def private_path() -> Iterator[str]:
    """A path for a socket in a directory that is ours alone, and removed in the end."""
    from tempfile import TemporaryDirectory  # which imports much, for which others need not wait

    with TemporaryDirectory(prefix="nbdq-", ignore_cleanup_errors=True) as directory:  # mode 0700
        yield os.path.join(directory, "socket")


def variables(listener: Listener, export_name: str) -> dict[str, str]:
    """What the command finds in its environment; nothing in there is ever read as shell code."""
    path = listener.path
    if path is not None:
        nbd, port = f"nbd:unix:{path}", ""
    else:
        host, number = listener.socket.getsockname()[:2]
        nbd, port = f"nbd:{f'[{host}]' if ':' in host else host}:{number}", str(number)
    return {
        "uri": listener.uri(export_name),
        "nbd": nbd + (f":exportname={export_name}" if export_name else ""),
        "unixsocket": path or "",
        "port": port,
        "exportname": export_name,
    }


async def run_command(command: str, environment: dict[str, str], stop: asyncio.Event) -> int:
    """The exit status of a shell command, as shells tell it: 128 and the signal that ended it.

    If ``stop`` is set before it has ended it is told to end, and killed if it does not; so it is when we are cancelled.
    """
    process = await asyncio.create_subprocess_shell(command, env={**os.environ, **environment})
    ended, stopped = asyncio.ensure_future(process.wait()), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((ended, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            process.terminate()
            await asyncio.wait((ended,), timeout=_TERMINATION_SECONDS)
    finally:
        stopped.cancel()
        if not ended.done():
            process.kill()
            await asyncio.wait((ended,))
    status = ended.result()
    return 128 - status if status < 0 else status

"""Waiting for a thread, come what may."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

_Result = TypeVar("_Result")


async def in_thread(function: Callable[..., _Result], *arguments: Any) -> _Result:
    """What ``function`` returns on another thread.

    Returns when the thread is done and never earlier: a thread cannot be stopped, so whoever cancels us waits for it,
    and only then is told. Otherwise a disk that is drained for the thread would be served while it is still at work.
    """
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    cancelled = None
    while not work.done():
        try:
            await asyncio.wait((work,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        work.exception()  # seen, if there is one
        raise cancelled
    return work.result()

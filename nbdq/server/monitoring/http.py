"""A web server for machines that watch: a handful of fixed pages, asked for with GET, one for each connection.

Whoever can connect may be hostile, and costs no more than its connection: requests are bounded, so are their number at
once and the time for each, and nothing of a request but its method and path is looked at.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from nbdq.server.listener import Listener

_log = logging.getLogger(__name__)

#: Clients at once. For one more, whoever has been waited for longest has to go: a health check must not fail because
#: somebody holds connections open and says nothing.
_CLIENTS_MAX = 16
#: Bytes of a request with all its headers.
_REQUEST_MAX = 8 << 10
#: From accept until the last byte of the answer is taken.
_SECONDS = 10.0

_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}
_REASONS |= {431: "Request Header Fields Too Large", 500: "Internal Server Error"}


@dataclass(frozen=True)
class Page:
    """An answer."""

    body: bytes
    status: int = 200
    content_type: str = "text/plain; charset=utf-8"


class HttpServer:
    """Serves ``pages`` by path on ``listeners``, which it owns until :meth:`stop`. Loop thread only."""

    def __init__(self, listeners: Sequence[Listener], pages: Mapping[str, Callable[[], Awaitable[Page]]]) -> None:
        self._listeners = listeners
        self._pages = pages
        self._tasks: set[asyncio.Task[None]] = set()
        self._awaited: dict[asyncio.Task[None], None] = {}  # those that wait for their clients, longest first

    def start(self) -> None:
        """Answer from now on."""
        self._loop = asyncio.get_running_loop()
        for listener in self._listeners:
            listener.start(self._loop, self._accept)

    async def stop(self) -> None:
        """Hang up on everybody, and listen no more."""
        for listener in self._listeners:
            listener.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _accept(self, sock: socket.socket, address: object) -> bool:
        if len(self._tasks) >= _CLIENTS_MAX:
            if not self._awaited:
                _log.debug("http: a client was turned away: there are %d", _CLIENTS_MAX)
                sock.close()
                return True
            longest = next(iter(self._awaited))
            longest.cancel()
            self._forget(longest)
        task = self._loop.create_task(self._serve(sock))
        self._tasks.add(task)
        self._awaited[task] = None
        task.add_done_callback(self._forget)
        return True

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._awaited.pop(task, None)

    async def _serve(self, sock: socket.socket) -> None:
        try:
            async with asyncio.timeout(_SECONDS):
                request = await self._receive(sock)
                if request:
                    answer = await self._undisturbed(self._answer(request))
                    await self._loop.sock_sendall(sock, answer)
        except TimeoutError:
            _log.debug("http: a client was given up after %.0f s", _SECONDS)
        except OSError:
            pass  # it has gone
        finally:
            sock.close()

    async def _undisturbed(self, answer: Awaitable[bytes]) -> bytes:
        """What threads may be busy with is not given up: there would be no bound to how much of that there is."""
        task = asyncio.current_task()
        assert task is not None
        self._awaited.pop(task, None)
        result = await answer
        self._awaited[task] = None
        return result

    async def _receive(self, sock: socket.socket) -> bytes:
        """A request with its headers; without their end if it is too long, or nothing if the client left."""
        received = b""
        while b"\r\n\r\n" not in received and b"\n\n" not in received and len(received) <= _REQUEST_MAX:
            more = await self._loop.sock_recv(sock, _REQUEST_MAX)
            if not more:
                return b""
            received += more
        return received

    async def _answer(self, request: bytes) -> bytes:
        method, page = b"GET", Page(b"the request is too long\n", 431)
        if len(request) <= _REQUEST_MAX:
            method, page = await self._page(request)
        head = (
            f"HTTP/1.1 {page.status} {_REASONS[page.status]}\r\n"
            f"Content-Type: {page.content_type}\r\n"
            f"Content-Length: {len(page.body)}\r\n"
            "Cache-Control: no-store\r\n"
            "Connection: close\r\n\r\n"
        )
        return head.encode() + (b"" if method == b"HEAD" else page.body)

    async def _page(self, request: bytes) -> tuple[bytes, Page]:
        words = request.partition(b"\n")[0].split()
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return b"", Page(b"this is HTTP/1\n", 400)
        method, target, _ = words
        if method not in (b"GET", b"HEAD"):
            return method, Page(b"GET, please\n", 405)
        make = self._pages.get(target.partition(b"?")[0].decode("ascii", "replace"))
        if make is None:
            return method, Page("".join(f"{path}\n" for path in self._pages).encode(), 404)
        try:
            return method, await make()
        except Exception:
            _log.exception("http: a page could not be made")
            return method, Page(b"internal error; the log says more\n", 500)

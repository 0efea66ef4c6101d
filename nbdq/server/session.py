"""The transmission phase of one connection: the data path.

One recv brings many requests; all that memory can answer are answered in one send, on the loop thread, with no object
per request (design section 4). Everything that could wait for a disk, a table or a decompressor goes to the worker
pool, several requests to a hop. Requests wait in the backlog while replies wait in the output: a client that does not
read is no longer read.
"""

import asyncio
import errno
import logging
import socket
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field

from nbdq.block import BlockDevice
from nbdq.errors import ProtocolError
from nbdq.nbd.constants import Command, CommandFlag, Errno
from nbdq.nbd.transmission import (
    DATA_CHUNK,
    SIMPLE_REPLY,
    RawRequest,
    Transmission,
    block_status_chunk,
    pack_data_chunk,
    pack_simple_reply,
    wire_errno,
)
from nbdq.server.budget import Budget
from nbdq.server.contexts import encode_extents
from nbdq.server.limits import ARENA_SIZE, SENDFILE_LENGTH, STATUS_EXTENTS, Limits
from nbdq.server.output import Output

_log = logging.getLogger(__name__)

_READ = int(Command.READ)
_COMMAND_MASK = 0xFFFF


@dataclass
class Resources:
    """What all sessions of a server share. Loop thread only, but for the pool's own threads."""

    loop: asyncio.AbstractEventLoop
    pool: Executor
    limits: Limits
    budget: Budget
    arenas: list[bytearray] = field(default_factory=list)
    """Arenas that no session holds."""


class Session:
    """Serves one client from a device until either side ends it. Loop thread only, but for :meth:`_perform`."""

    def __init__(
        self,
        sock: socket.socket,
        transmission: Transmission,
        device: BlockDevice,
        resources: Resources,
        on_end: Callable[[str], None],
    ) -> None:
        """Start serving. ``sock`` is non-blocking and stays the caller's; ``on_end`` is called once with the reason."""
        self._socket = sock
        self._transmission = transmission
        self._device = device
        self._resources = resources
        self._on_end = on_end
        structured = transmission.negotiated.structured
        self._pack_header = pack_data_chunk if structured else pack_simple_reply
        self._header_size = DATA_CHUNK.size if structured else SIMPLE_REPLY.size
        self._output = Output(sock)
        self._arena: bytearray | None = None  # held while the output points into it
        self._backlog: deque[RawRequest] = deque()
        self._bytes = 0  # reserved by requests in progress
        self._in_progress = 0
        self._reading = False
        self._writing = False
        self._stopping = ""  # the reason, once no further request will be read
        self._ended = False
        self._stall: asyncio.TimerHandle | None = None
        self._resume_reading()

    def start(self, leftover: bytes) -> None:
        """Serve requests that arrived together with the last option."""
        while leftover:
            buffer = self._transmission.buffer()
            count = min(len(buffer), len(leftover))
            buffer[:count] = leftover[:count]
            leftover = leftover[count:]
            self._accept(count)

    # The loop's side of the socket.

    def _resume_reading(self) -> None:
        if not self._reading and not self._stopping:
            self._reading = True
            self._resources.loop.add_reader(self._socket.fileno(), self._on_readable)

    def _pause_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._resources.loop.remove_reader(self._socket.fileno())

    def _on_readable(self) -> None:
        try:
            count = self._socket.recv_into(self._transmission.buffer())
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(str(error))
            return
        if count:
            self._accept(count)
        else:
            self._stop("client closed the connection without NBD_CMD_DISC")

    def _accept(self, count: int) -> None:
        try:
            self._backlog.extend(self._transmission.received(count))
        except ProtocolError as error:
            self._stop(str(error))
        if self._transmission.disconnected:
            self._stop("client disconnected")
        self._serve()

    def _on_writable(self) -> None:
        self._flush()
        self._serve()

    def _flush(self) -> None:
        """Send what the socket takes, and watch it for the rest."""
        if self._ended:
            return
        try:
            drained = self._output.flush()
        except OSError as error:
            self._end(str(error))
            return
        if drained:
            if self._arena is not None:
                self._resources.arenas.append(self._arena)
                self._arena = None
            if self._writing:
                self._writing = False
                self._resources.loop.remove_writer(self._socket.fileno())
        elif not self._writing:
            self._writing = True
            self._resources.loop.add_writer(self._socket.fileno(), self._on_writable)
        self._watch_stall(waiting=not drained)

    def _watch_stall(self, *, waiting: bool) -> None:
        """(Re)start the deadline within which a client must take something of what waits for it."""
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        if waiting and self._resources.limits.reply_stall_seconds:
            self._stall = self._resources.loop.call_later(
                self._resources.limits.reply_stall_seconds, self._end, "client does not read its replies"
            )

    # Serving.

    def _serve(self) -> None:
        """Answer the backlog as far as the socket and the budgets allow."""
        while self._backlog and not self._output and not self._ended:
            if not self._serve_batch():
                break
        if self._ended:
            return
        if self._backlog or self._output:
            self._pause_reading()
        elif self._stopping:
            if not self._in_progress:
                self._end(self._stopping)
        else:
            self._resume_reading()

    def _serve_batch(self) -> bool:
        """Fill one arena with replies and send it; False when the backlog must wait for a request in progress."""
        arenas = self._resources.arenas
        arena = arenas.pop() if arenas else bytearray(ARENA_SIZE)
        view = memoryview(arena)
        queued = position = 0  # arena bytes before `queued` are in the output already
        output, backlog = self._output, self._backlog
        device, size = self._device, self._device.size
        read_cached, locate_cached = device.read_cached, device.locate_cached
        pack_header, header_size = self._pack_header, self._header_size
        maximum_payload = self._transmission.negotiated.export.maximum_block
        slow: list[RawRequest] = []
        proceed = True
        while backlog:
            request = backlog[0]
            _, operation, cookie, offset, length = request
            if operation == _READ and length and offset + length <= size:
                data = position + header_size
                end = data + length
                if length < SENDFILE_LENGTH:
                    if end > ARENA_SIZE:
                        break
                    if read_cached(offset, view[data:end]):
                        pack_header(arena, position, cookie, offset, length)
                        position = end
                        backlog.popleft()
                        continue
                else:
                    if data > ARENA_SIZE:
                        break
                    pieces = locate_cached(offset, length)
                    if pieces is not None and length <= maximum_payload:
                        pack_header(arena, position, cookie, offset, length)
                        output.append(view[queued:data])
                        for piece in pieces:
                            output.append(piece)
                        queued = position = data
                        backlog.popleft()
                        continue
                    if end <= ARENA_SIZE and read_cached(offset, view[data:end]):
                        pack_header(arena, position, cookie, offset, length)
                        position = end
                        backlog.popleft()
                        continue
            reply = self._answer(request)
            if reply is not None:
                if position > queued:
                    output.append(view[queued:position])
                    queued = position
                if reply:
                    output.append(memoryview(reply))
            elif self._admit(length if operation & _COMMAND_MASK == Command.READ else 0):
                slow.append(request)
            else:
                proceed = False
                break
            backlog.popleft()
        if slow:
            self._submit(slow)
        self._arena = arena
        if position > queued:
            output.append(view[queued:position])
        self._flush()
        return proceed

    def _answer(self, request: RawRequest) -> bytes | None:
        """The reply to a request that needs no disk; None for one that goes to the pool."""
        _, operation, cookie, offset, length = request
        transmission = self._transmission
        refusal = transmission.refusal(operation, offset, length)
        if refusal is not None:
            return transmission.error_reply(cookie, refusal.errno, refusal.text)
        command = operation & _COMMAND_MASK
        if command == Command.FLUSH or not length:
            return transmission.success_reply(cookie)
        if command == Command.BLOCK_STATUS and self._device.status_cached(offset, length):
            return self._perform(request)
        return None

    # Requests that can wait.

    def _admit(self, count: int) -> bool:
        """Reserve reply memory for one more request, or arrange that the backlog is tried again later."""
        limits = self._resources.limits
        if self._in_progress and self._bytes + count > limits.connection_bytes:
            return False  # this connection's own requests will end and serve the backlog
        if not self._resources.budget.take(count, self._serve_again):
            return False
        self._bytes += count
        self._in_progress += 1
        return True

    def _serve_again(self) -> None:
        self._resources.loop.call_soon(self._serve)

    def _submit(self, requests: list[RawRequest]) -> None:
        """Hand requests to the pool, spread over its threads, a list to each."""
        workers = self._resources.limits.workers
        for number in range(min(workers, len(requests))):
            self._resources.pool.submit(self._work, requests[number::workers])

    def _work(self, requests: list[RawRequest]) -> None:
        """Pool thread: answer each request, and post the replies to the loop together."""
        replies = [(self._perform(request), request) for request in requests]
        try:
            self._resources.loop.call_soon_threadsafe(self._finish, replies)
        except RuntimeError:  # the loop is closed: nobody is left to answer
            _log.debug("reply dropped at shutdown")

    def _perform(self, request: RawRequest) -> bytes:
        """Any thread: carry out a valid request; its whole reply as one buffer."""
        _, operation, cookie, offset, length = request
        transmission = self._transmission
        command = operation & _COMMAND_MASK
        try:
            if command == Command.READ:
                header_size = self._header_size
                reply = bytearray(header_size + length)
                self._device.read_into(offset, memoryview(reply)[header_size:])
                self._pack_header(reply, 0, cookie, offset, length)
                return reply
            if command == Command.BLOCK_STATUS:
                limit = 1 if operation >> 16 & CommandFlag.REQ_ONE else STATUS_EXTENTS
                return self._status_reply(cookie, offset, length, limit)
            self._device.prefetch(offset, length)
            return transmission.success_reply(cookie)
        except OSError as error:
            _log.warning("%s at %d+%d: %s", Command(command).name, offset, length, error)
            return transmission.error_reply(cookie, wire_errno(error), error.strerror or "I/O error")
        except Exception:
            _log.exception("%s at %d+%d", Command(command).name, offset, length)
            return transmission.error_reply(cookie, Errno.EIO, "internal error")

    def _status_reply(self, cookie: int, offset: int, length: int, limit: int) -> bytes:
        """One chunk for each selected context (P117)."""
        reply = bytearray()
        contexts = self._transmission.negotiated.contexts
        for number, name in contexts:
            pairs = encode_extents(name, self._device.status(offset, length), limit=limit)
            done = number == contexts[-1][0]
            reply += block_status_chunk(cookie, context_id=number, payload_length=len(pairs), done=done)
            reply += pairs
        return reply

    def _finish(self, replies: list[tuple[bytes, RawRequest]]) -> None:
        """Loop thread: queue replies that the pool made."""
        count = sum(request[4] for _, request in replies if request[1] & _COMMAND_MASK == Command.READ)
        self._bytes -= count
        self._in_progress -= len(replies)
        self._resources.budget.give(count)
        if self._ended:
            return
        for reply, _ in replies:
            self._output.append(memoryview(reply))
        self._flush()
        self._serve()

    # Ending.

    def _stop(self, reason: str) -> None:
        """Read no more; end when everything accepted so far is answered."""
        if not self._stopping:
            self._stopping = reason
            self._pause_reading()
            self._serve()

    def shut_down(self) -> None:
        """Finish what is accepted, then end (P99)."""
        self._stop("server shuts down")

    def abandon(self) -> None:
        """Let go of the socket at once; replies that still come in from the pool are dropped."""
        if self._ended:
            return
        self._ended = True
        self._pause_reading()
        if self._writing:
            self._writing = False
            self._resources.loop.remove_writer(self._socket.fileno())
        self._watch_stall(waiting=False)
        self._backlog.clear()

    def _end(self, reason: str) -> None:
        """Tell the owner, once, who then closes the socket."""
        if not self._ended:
            self.abandon()
            self._on_end(reason)

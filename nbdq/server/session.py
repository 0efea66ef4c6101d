"""The transmission phase of one connection: the data path.

One recv brings many requests; all that memory can answer are answered in one send, on the loop thread, with no object
per request (design section 5). Everything that could wait for a disk, a table or a decompressor goes to the worker
pool. Requests wait in the backlog while replies wait in the output: a client that does not read is no longer read.
"""

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from nbdq.block import BlockDevice, Piece
from nbdq.errors import ProtocolError
from nbdq.nbd.constants import Command, CommandFlag, Errno
from nbdq.nbd.transmission import (
    BUFFER_SIZE,
    DATA_CHUNK,
    SIMPLE_REPLY,
    RawRequest,
    Transmission,
    block_status_chunk,
    pack_data_chunk,
    pack_simple_reply,
    wire_errno,
)
from nbdq.pool import WorkerPool
from nbdq.server.budget import Budget
from nbdq.server.contexts import encode_extents
from nbdq.server.limits import ARENA_SIZE, GUARANTEED_BYTES, SENDFILE_LENGTH, STATUS_EXTENTS, Limits
from nbdq.server.output import Output

_log = logging.getLogger(__name__)

_READ = int(Command.READ)
_COMMAND_MASK = 0xFFFF
#: Requests that fall into one stretch of this size go to one worker: they probably wait for the same cluster.
_STRETCH_BITS = 16
#: A batch ends when it has gathered so many bytes outside of its arena; the send buffer takes no more at once.
_BATCH_LENGTH = 2 << 20
#: Batches that one client gets before others have their turn, however fast it reads.
_BATCHES_PER_TURN = 8
#: Requests of one client that the pool holds, lest others wait behind them; as many as Linux has on its way at once.
_IN_PROGRESS_MAX = 128


@dataclass
class Resources:
    """What all sessions of a server share. Loop thread only."""

    loop: asyncio.AbstractEventLoop
    pool: WorkerPool
    limits: Limits
    budget: Budget
    receive_buffer: bytearray = field(default_factory=lambda: bytearray(BUFFER_SIZE))
    """Every session parses what it received before the next one receives."""
    arenas: list[bytearray] = field(default_factory=list)
    """Reply buffers that no session holds."""


class Session:
    """Serves one client from a device until either side ends it. Loop thread only, but for :meth:`_work`."""

    def __init__(
        self,
        sock: socket.socket,
        transmission: Transmission,
        device: BlockDevice,
        resources: Resources,
        on_end: Callable[[str], None],
    ) -> None:
        """``sock`` is non-blocking and stays the caller's; ``on_end`` is called once, with the reason, unless
        :meth:`abandon` came first."""
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
        self._slow: list[RawRequest] = []  # admitted by a batch that is being served, and about to go to the pool
        self._in_progress = 0  # requests that the pool has, or has answered into …
        self._replies: deque[tuple[RawRequest, list[Piece]]] = deque()
        self._woken = False  # the loop has been told of replies
        self._reserved = 0  # reply bytes taken from the budget …
        self._answered = 0  # … of which these are in the output, and are given back when it is empty
        self._reading = False
        self._writing = False
        self._stopping = ""  # the reason, once no further request will be read
        self._ended = False
        self._stall: asyncio.TimerHandle | None = None
        self._due = False  # the loop will call _take_turn

    def start(self, leftover: bytes) -> None:
        """Begin to serve, first the requests that arrived together with the last option."""
        self._resume_reading()
        while leftover and not self._stopping:
            buffer = self._transmission.buffer()
            count = min(len(buffer), len(leftover))
            buffer[:count] = leftover[:count]
            leftover = leftover[count:]
            self._parse(count)
        self._guard(self._serve)

    def shut_down(self) -> None:
        """Answer what is accepted, then end (P99)."""
        self._stop("server shuts down")
        self._guard(self._serve)

    def abandon(self) -> None:
        """Let go of the socket at once; replies that still come from the pool are dropped."""
        if self._ended:
            return
        self._ended = True
        self._pause_reading()
        if self._writing:
            self._writing = False
            self._resources.loop.remove_writer(self._socket.fileno())
        self._watch_stall(waiting=False)
        self._backlog.clear()
        self._output.clear()
        self._arena = None  # what the output pointed into goes with us
        self._resources.budget.forget(self._serve_again)
        self._answered += sum(map(self._charge, self._slow))  # of a batch that failed
        self._give_back_answered()

    def _guard(self, callback: Callable[[], None]) -> None:
        """Run a callback of the loop; a bug in it ends this connection, and leaves nothing hanging (R-10)."""
        try:
            callback()
        except Exception:
            _log.exception("a connection ends for a bug")
            self._end("internal error")

    # The loop's side of the socket.

    def _resume_reading(self) -> None:
        if not self._reading and not self._stopping:
            self._reading = True
            self._resources.loop.add_reader(self._socket.fileno(), self._guard, self._on_readable)

    def _pause_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._resources.loop.remove_reader(self._socket.fileno())

    def _on_readable(self) -> None:
        # libuv reports a reset once, perhaps together with the last bytes, and then watches no more. A reply would run
        # into the reset; where no request became complete there is none, so look again.
        while not self._backlog and not self._stopping:
            try:
                count = self._socket.recv_into(self._transmission.buffer())
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._end(str(error))
                return
            if count:
                self._parse(count)
            else:
                self._stop("client closed the connection without NBD_CMD_DISC")
        self._serve()

    def _parse(self, count: int) -> None:
        try:
            self._backlog.extend(self._transmission.received(count))
        except ProtocolError as error:
            self._stop(str(error))
        if self._transmission.failure is not None:
            self._stop(str(self._transmission.failure))
        elif self._transmission.disconnected:
            self._stop("client disconnected")

    def _on_writable(self) -> None:
        self._flush()
        self._serve()

    def _flush(self) -> None:
        """Send what the socket takes, and watch it for the rest."""
        try:
            drained = self._output.flush()
        except OSError as error:
            self._end(str(error))
            return
        if drained:
            if self._arena is not None:
                self._resources.arenas.append(self._arena)
                self._arena = None
            if self._answered:
                self._give_back_answered()
            if self._writing:
                self._writing = False
                self._resources.loop.remove_writer(self._socket.fileno())
                self._watch_stall(waiting=False)
        else:
            if not self._writing:
                self._writing = True
                self._resources.loop.add_writer(self._socket.fileno(), self._guard, self._on_writable)
            self._watch_stall(waiting=True)

    def _watch_stall(self, *, waiting: bool) -> None:
        """(Re)start the deadline within which a client must take something of what waits for it, or lift it."""
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        seconds = self._resources.limits.reply_stall_seconds
        if waiting and seconds:
            self._stall = self._resources.loop.call_later(seconds, self._end, "client does not read its replies")

    # Serving.

    def _serve(self) -> None:
        """Answer the backlog as far as the socket and the budgets allow, and decide what to wait for next."""
        for _ in range(_BATCHES_PER_TURN):
            if not self._backlog or self._output or self._ended or not self._serve_batch():
                break
        else:
            self._serve_again()
        if self._ended:
            return
        if self._backlog or self._output:
            self._pause_reading()
        elif not self._stopping:
            self._resume_reading()
        elif not self._in_progress:
            self._end(self._stopping)

    def _serve_batch(self) -> bool:
        """Fill one arena with replies and send it; False when the backlog must wait for the pool or the budgets."""
        arenas, output, backlog = self._resources.arenas, self._output, self._backlog
        self._arena = arena = arenas.pop() if arenas else bytearray(ARENA_SIZE)
        view = memoryview(arena)
        queued = position = 0  # arena bytes before `queued` are in the output already
        size = self._device.size
        read_cached, gather_cached = self._device.read_cached, self._device.gather_cached
        pack_header, header_size = self._pack_header, self._header_size
        maximum_length = self._transmission.negotiated.export.maximum_block
        gathered = 0  # bytes in the output that are not in the arena
        admitted = True
        while backlog and gathered < _BATCH_LENGTH:
            request = backlog[0]
            _, operation, cookie, offset, length = request
            data = position + header_size
            if operation == _READ and offset + length <= size and 0 < length <= maximum_length:
                if length < SENDFILE_LENGTH:
                    end = data + length
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
                    pieces = gather_cached(offset, length)
                    if pieces is not None:
                        pack_header(arena, position, cookie, offset, length)
                        output.append(view[queued:data])
                        output.extend(pieces)
                        queued = position = data
                        gathered += length
                        backlog.popleft()
                        continue
            reply = self._answer(request)
            if reply is not None:
                if position > queued:
                    output.append(view[queued:position])
                    queued = position
                output.append(memoryview(reply))
                gathered += len(reply)
            elif self._admit(request):
                self._slow.append(request)
            else:
                admitted = False
                break
            backlog.popleft()
        if position > queued:
            output.append(view[queued:position])
        if self._slow:
            self._submit(self._slow)
            self._slow = []
        self._flush()
        return admitted

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
            return self._status_or_error(request)
        return None

    # Requests that can wait.

    def _admit(self, request: RawRequest) -> bool:
        """Reserve memory for the reply to one more request, or arrange that the backlog is tried again later."""
        count = self._charge(request)
        if self._in_progress == _IN_PROGRESS_MAX:
            return False  # our own requests will end, and that serves the backlog again
        if self._reserved and self._reserved + count > self._resources.limits.connection_bytes:
            return False  # our own replies will leave, likewise
        overdraw = self._reserved + count <= GUARANTEED_BYTES
        if not self._resources.budget.take(count, self._serve_again, overdraw=overdraw):
            return False
        self._reserved += count
        self._in_progress += 1
        return True

    def _charge(self, request: RawRequest) -> int:
        """Bytes that the reply to a request can have at most, and something for its objects."""
        _, operation, _, _, length = request
        command = operation & _COMMAND_MASK
        if command == _READ:
            return length + 512
        if command == Command.BLOCK_STATUS:
            extents = 1 if operation >> 16 & CommandFlag.REQ_ONE else min(length // 512 + 2, STATUS_EXTENTS)
            return extents * 8 * len(self._transmission.negotiated.contexts) + 512
        return 512

    def _serve_again(self) -> None:
        """Serve when the other clients have had their turn."""
        if not self._due:
            self._due = True
            self._resources.loop.call_soon(self._guard, self._take_turn)

    def _take_turn(self) -> None:
        self._due = False
        self._serve()

    def _give_back_answered(self) -> None:
        count, self._answered = self._answered, 0
        self._reserved -= count
        self._resources.budget.give(count)

    def _submit(self, requests: list[RawRequest]) -> None:
        """Hand requests to the pool, neighbours to the same worker."""
        stretches: dict[int, list[RawRequest]] = {}
        for request in requests:
            stretches.setdefault(request[3] >> _STRETCH_BITS, []).append(request)
        for stretch in stretches.values():
            self._resources.pool.submit(partial(self._work, stretch))

    def _work(self, requests: list[RawRequest]) -> None:
        """Pool thread: answer each request; the loop is woken once for all replies that it has not seen yet."""
        for request in requests:
            self._replies.append((request, [] if self._ended else self._perform(request)))
        if not self._woken:
            self._woken = True
            try:
                self._resources.loop.call_soon_threadsafe(self._guard, self._finish)
            except RuntimeError:  # the loop is closed: nobody is left to answer
                _log.debug("a reply came after the end of the loop")

    def _perform(self, request: RawRequest) -> list[Piece]:
        """Pool thread: carry out a valid request; its whole reply."""
        _, operation, cookie, offset, length = request
        command = operation & _COMMAND_MASK
        if command == Command.BLOCK_STATUS:
            return [memoryview(self._status_or_error(request))]
        try:
            if command == _READ:
                return self._read(cookie, offset, length)
            self._device.prefetch(offset, length)
            return [memoryview(self._transmission.success_reply(cookie))]
        except Exception as error:
            return [memoryview(self._error_reply(request, error))]

    def _read(self, cookie: int, offset: int, length: int) -> list[Piece]:
        if length >= SENDFILE_LENGTH:
            header = bytearray(self._header_size)
            self._pack_header(header, 0, cookie, offset, length)
            return [memoryview(header), *self._device.gather(offset, length)]
        reply = bytearray(self._header_size + length)
        self._device.read_into(offset, memoryview(reply)[self._header_size :])
        self._pack_header(reply, 0, cookie, offset, length)
        return [memoryview(reply)]

    def _status_or_error(self, request: RawRequest) -> bytes:
        """Any thread: the reply to a valid BLOCK_STATUS, one chunk for each selected context (P117)."""
        _, operation, cookie, offset, length = request
        limit = 1 if operation >> 16 & CommandFlag.REQ_ONE else STATUS_EXTENTS
        contexts = self._transmission.negotiated.contexts
        reply = bytearray()
        try:
            for number, name in contexts:
                pairs = encode_extents(name, self._device.status(offset, length), limit=limit)
                done = number == contexts[-1][0]
                reply += block_status_chunk(cookie, context_id=number, payload_length=len(pairs), done=done)
                reply += pairs
        except Exception as error:
            return self._error_reply(request, error)
        return bytes(reply)

    def _error_reply(self, request: RawRequest, error: Exception) -> bytes:
        """Any thread: what a client is told of a failure; the log gets what it must not see, such as paths (P121)."""
        _, operation, cookie, offset, length = request
        name = Command(operation & _COMMAND_MASK).name
        if isinstance(error, OSError):
            _log.warning("%s of %d bytes at %d: %s", name, length, offset, error)
            return self._transmission.error_reply(cookie, wire_errno(error), error.strerror or "I/O error")
        _log.error("%s of %d bytes at %d", name, length, offset, exc_info=error)
        return self._transmission.error_reply(cookie, Errno.EIO, "internal error")

    def _finish(self) -> None:
        """Loop thread: queue replies that the pool made."""
        self._woken = False  # before looking: what is appended from now on wakes the loop anew
        while self._replies:
            request, pieces = self._replies.popleft()
            self._in_progress -= 1
            self._answered += self._charge(request)
            if not self._ended:
                self._output.extend(pieces)
        if self._ended:
            self._give_back_answered()
            return
        self._flush()
        self._serve()

    # Ending.

    def _stop(self, reason: str) -> None:
        """Read no more; the session ends when everything accepted so far is answered."""
        if not self._stopping:
            self._stopping = reason
            self._pause_reading()

    def _end(self, reason: str) -> None:
        """Tell the owner, once, who then closes the socket."""
        if not self._ended:
            self.abandon()
            self._on_end(reason)

"""The transmission phase of one connection: the data path.

One recv brings many requests; all that memory can answer are answered in one send, on the loop thread, with no object
per request (design section 5). Everything that could wait for a disk, a table or a decompressor goes to the worker
pool. Requests wait in the backlog while replies wait in the output: a client that does not read is no longer read.

Small writes are carried out from the receive buffer, which all sessions share: so before a session returns to the loop
it has served what it received, or copied it.
"""

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic

import numpy as np

from nbdq.errors import ProtocolError
from nbdq.nbd.constants import Command
from nbdq.nbd.transmission import RawRequest, Transmission
from nbdq.server.export import Export
from nbdq.server.limits import ARENA_SIZE, INLINE_WRITE_LENGTH, SENDFILE_LENGTH
from nbdq.server.output import Output
from nbdq.server.pace import BATCH_SECONDS
from nbdq.server.pending import Pending
from nbdq.server.perform import COMMAND_MASK, Performer
from nbdq.server.resources import Resources

_log = logging.getLogger(__name__)

_READ, _WRITE, _FLUSH = int(Command.READ), int(Command.WRITE), int(Command.FLUSH)
#: A batch ends when it has gathered so many bytes outside of its arena; the send buffer takes no more at once.
_BATCH_LENGTH = 2 << 20
#: Batches that one client gets before others have their turn, however fast it reads …
_BATCHES_PER_TURN = 8
#: … and bytes of a payload, however fast it sends.
_PAYLOAD_PER_TURN = 4 << 20


class Session:
    """Serves one client from an export until either side ends it. Loop thread only."""

    def __init__(
        self,
        sock: socket.socket,
        transmission: Transmission,
        export: Export,
        resources: Resources,
        on_end: Callable[[str], None],
    ) -> None:
        """``sock`` is non-blocking and stays the caller's; ``on_end`` is called once, with the reason, unless
        :meth:`abandon` came first."""
        self._socket = sock
        self._transmission = transmission
        self._device = export.device
        self._writing_side = export.writing
        self._resources = resources
        self._on_end = on_end
        self._performer = Performer(export, transmission)
        self._pending = Pending(
            export,
            self._performer,
            resources,
            on_replies=partial(self._guard, self._finish),
            on_memory=self._serve_again,
        )
        self._output = Output(sock)
        self._arena: bytearray | None = None  # held while the output points into it
        self._memory: bytearray | None = None  # the arena that a payload was received into, if it was one
        self._backlog: deque[RawRequest] = deque()
        self._reading = False
        self._sending = False  # the socket is watched for room
        self._stopping = ""  # the reason, once no further request will be read
        self._ended = False
        self._stall: asyncio.TimerHandle | None = None
        self._payload_stall: asyncio.TimerHandle | None = None
        self._payload_count = 0
        self._due = False  # the loop will call _take_turn

    @property
    def in_progress(self) -> int:
        """Requests that wait for the pool or for a flush."""
        return self._pending.in_progress

    def start(self, leftover: bytes) -> None:
        """Begin to serve, first the requests that arrived together with the last option."""
        self._resume_reading()
        if leftover:
            self._transmission.buffer()[: len(leftover)] = leftover  # less than one receive of the handshake
            self._parse(len(leftover))
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
        if self._sending:
            self._sending = False
            self._resources.loop.remove_writer(self._socket.fileno())
        self._watch_stall(waiting=False)
        if self._payload_stall is not None:
            self._payload_stall.cancel()
        self._backlog.clear()
        self._output.clear()
        self._arena = None  # what the output pointed into goes with us
        self._pending.abandon()

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
        received = 0
        while not self._backlog and not self._stopping and self._provide_memory():
            if received > _PAYLOAD_PER_TURN:
                self._resources.loop.call_soon(self._guard, self._read_on)
                return
            try:
                count = self._socket.recv_into(self._transmission.buffer())
            except (BlockingIOError, InterruptedError):
                self._watch_payload()
                break
            except OSError as error:
                self._end(str(error))
                return
            received += count
            if count:
                self._parse(count)
            else:
                self._stop("client closed the connection without NBD_CMD_DISC")
        self._serve()

    def _read_on(self) -> None:
        if self._reading:
            self._on_readable()

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
                self._resources.return_arena(self._arena)
                self._arena = None
            self._pending.output_is_empty()
            if self._sending:
                self._sending = False
                self._resources.loop.remove_writer(self._socket.fileno())
                self._watch_stall(waiting=False)
        else:
            if not self._sending:
                self._sending = True
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

    # Payloads that come into memory of their own.

    def _provide_memory(self) -> bool:
        """Give a payload the memory that it waits for; False when there is none for now (R-70)."""
        length = self._transmission.wanted
        if not length:
            return True
        if not self._pending.reserve_payload(length):
            return False
        if ARENA_SIZE // 2 <= length <= ARENA_SIZE:
            self._memory = self._resources.borrow_arena()
            self._transmission.provide(memoryview(self._memory)[:length])
        else:
            self._memory = None
            self._transmission.provide(np.empty(length, dtype=np.uint8).data)  # clearing it would take a third more
        self._payload_count += 1
        return True

    def _watch_payload(self) -> None:
        """Nothing more has come for now: let a payload that stays unfinished not hold its memory for ever."""
        seconds = self._resources.limits.reply_stall_seconds
        missing = self._transmission.missing
        if missing and self._payload_stall is None and seconds:
            self._payload_stall = self._resources.loop.call_later(
                seconds, self._guard, partial(self._judge_payload, self._payload_count, missing)
            )

    def _judge_payload(self, count: int, missing: int) -> None:
        self._payload_stall = None
        if self._reading and (self._payload_count, self._transmission.missing) == (count, missing):
            self._end("client does not send the rest of a WRITE")
        else:
            self._watch_payload()

    def _payload_done(self) -> None:
        """The WRITE whose payload has memory of its own was answered at once."""
        self._pending.payload_done()
        if self._memory is not None:
            self._resources.return_arena(self._memory)
            self._memory = None

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
        if not self._backlog and not self._output:
            if self._stopping:
                if not self._pending.in_progress:
                    self._end(self._stopping)
                return
            if self._provide_memory():
                self._resume_reading()
                return
        self._pause_reading()
        self._transmission.settle()

    def _serve_batch(self) -> bool:
        """Fill one arena with replies and send it; False when the backlog must wait for the pool or the budgets."""
        output, backlog = self._output, self._backlog
        self._arena = arena = self._resources.borrow_arena()
        view = memoryview(arena)
        queued = position = 0  # arena bytes before `queued` are in the output already
        size = self._device.size
        read_cached, gather_cached = self._device.read_cached, self._device.gather_cached
        performer, pending, payloads = self._performer, self._pending, self._transmission.payloads
        pack_header, header_size = performer.pack_header, performer.header_size
        pack_success, success_size = performer.pack_success, performer.success_size
        maximum_length = self._transmission.negotiated.export.maximum_block
        begun = monotonic()
        inline = 0  # bytes that a write may have to be carried out here
        fixed = self._writing_side is None
        if self._writing_side is not None:
            write_cached, changing, pace = self._writing_side.write_cached, pending.changing, self._writing_side.pace
            inline = INLINE_WRITE_LENGTH if pace.inline_from <= begun else 0
        gathered = 0  # bytes in the output that are not in the arena
        admitted = True
        while backlog and gathered < _BATCH_LENGTH:
            request = backlog[0]
            _, operation, cookie, offset, length = request
            data = position + header_size
            reply = None
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
                    # What may change is copied into memory, of which the reply is the only owner.
                    pieces = gather_cached(offset, length) if fixed or pending.reserve_reply(length) else None
                    if pieces is not None:
                        pack_header(arena, position, cookie, offset, length)
                        output.append(view[queued:data])
                        output.extend(pieces)
                        queued = position = data
                        gathered += length
                        backlog.popleft()
                        continue
            elif operation == _WRITE and 0 < length <= inline and offset + length <= size:
                if data > ARENA_SIZE:
                    break
                try:
                    written = not (changing and pending.overlaps(offset, length)) and write_cached(offset, payloads[0])
                except OSError as error:
                    reply = performer.error_reply(request, error)
                else:
                    if written:
                        pack_success(arena, position, cookie, offset, length)
                        position += success_size
                        backlog.popleft()
                        payloads.popleft()
                        if pending.payload:
                            self._payload_done()
                        if monotonic() - begun > BATCH_SECONDS:
                            inline = pace.inline_was_slow(monotonic())
                        continue
            if reply is None:
                reply = self._answer(request)
            is_write = operation & COMMAND_MASK == _WRITE
            if reply is not None:
                if position > queued:
                    output.append(view[queued:position])
                    queued = position
                output.append(memoryview(reply))
                gathered += len(reply)
                if is_write and pending.payload:
                    self._payload_done()
            elif not pending.admit(request, payloads[0] if is_write else None, inline=0 < length <= inline):
                admitted = False
                break
            backlog.popleft()
            if is_write:
                payloads.popleft()
                if inline and monotonic() - begun > BATCH_SECONDS:  # with FUA, it may have been carried out here too
                    inline = pace.inline_was_slow(monotonic())
        if position > queued:
            output.append(view[queued:position])
        pending.submit()
        self._flush()
        return admitted

    def _answer(self, request: RawRequest) -> bytes | None:
        """The reply to a request that needs no disk; None for one that has to wait."""
        _, operation, cookie, offset, length = request
        transmission = self._transmission
        refusal = transmission.refusal(operation, offset, length)
        if refusal is not None:
            return transmission.error_reply(cookie, refusal.errno, refusal.text)
        command = operation & COMMAND_MASK
        if command == _FLUSH:
            return None if self._writing_side is not None else transmission.success_reply(cookie)
        if not length:
            return transmission.success_reply(cookie)
        if command == Command.BLOCK_STATUS and self._device.status_cached(offset, length):
            return self._performer.status_or_error(request)
        return None

    def _serve_again(self) -> None:
        """Serve when the other clients have had their turn."""
        if not self._due:
            self._due = True
            self._resources.loop.call_soon(self._guard, self._take_turn)

    def _take_turn(self) -> None:
        self._due = False
        self._serve()

    def _finish(self) -> None:
        """Queue replies that the pool made."""
        for pieces in self._pending.replies():
            self._output.extend(pieces)
        if self._ended:
            self._pending.output_is_empty()
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

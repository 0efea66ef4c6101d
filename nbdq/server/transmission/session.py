"""The transmission phase of one connection: the data path.

One recv brings many requests; all that memory can answer are answered in one send, on the loop thread, with no object
per request (design section 5). Everything that could wait for a disk, a table or a decompressor goes to the worker
pool. Requests wait in the backlog while replies wait in the output: a client that does not read is no longer read.

Small writes are carried out from the receive buffer, which all sessions share: so before a session returns to the loop
it has served what it received, or copied it.

While the gate of the disk is closed, or the export paused, a session is *held*: it begins nothing and reads nothing,
and only sends what it has. The device is asked for anew in each batch, because it may be another one afterwards.
"""

import logging
import socket
from collections import deque
from collections.abc import Callable, Hashable
from errno import EIO
from functools import partial
from time import monotonic

from nbdq.errors import ProtocolError
from nbdq.nbd.constants import Command, Errno, TransmissionFlag
from nbdq.nbd.ending import Cause, Ending
from nbdq.nbd.transmission import RawRequest, Refusal, Transmission
from nbdq.server.exports.export import Export
from nbdq.server.limits import ARENA_SIZE, INLINE_WRITE_LENGTH, SENDFILE_LENGTH
from nbdq.server.monitoring.peer_log import PeerLog
from nbdq.server.resources import Resources
from nbdq.server.threads import in_thread
from nbdq.server.tls.stream import SecureStream, broken
from nbdq.server.transmission.detach import reserve_copy
from nbdq.server.transmission.output import Output
from nbdq.server.transmission.pace import BATCH_SECONDS
from nbdq.server.transmission.payload import PayloadMemory
from nbdq.server.transmission.pending import Pending
from nbdq.server.transmission.perform import COMMAND_MASK, Performer
from nbdq.server.transmission.watch import Watch

_log = logging.getLogger(__name__)

_READ, _WRITE = int(Command.READ), int(Command.WRITE)
#: A batch ends when it has gathered so many bytes outside of its arena; the send buffer takes no more at once.
_BATCH_LENGTH = 2 << 20
#: Batches that one client gets before others have their turn, however fast it reads …
_BATCHES_PER_TURN = 8
#: … and bytes of a payload, however fast it sends.
_PAYLOAD_PER_TURN = 4 << 20
#: What a send fails with because of the file, not of the socket; None if that became shorter (P101).
_FILE_ERRORS = (None, EIO)


class Session:
    """Serves one client from an export until either side ends it. Loop thread only."""

    def __init__(
        self,
        sock: socket.socket | SecureStream,
        transmission: Transmission,
        export: Export,
        resources: Resources,
        source: Hashable,
        on_end: Callable[[Ending], None],
        log: PeerLog,
    ) -> None:
        """``sock`` is non-blocking and stays the caller's; ``source`` is where the client comes from; ``on_end`` is
        called once, unless :meth:`abandon` came first."""
        self._socket = sock
        self._transmission = transmission
        self.export = export
        self._may_write = TransmissionFlag.READ_ONLY not in transmission.negotiated.flags
        self._resources = resources
        self._on_end = on_end
        self._log = log.of(_log)
        self.counters = export.account.open()
        """What the client has done."""
        self._performer = Performer(export, transmission, self.counters, log, resources.limits)
        self._pending = Pending(
            export,
            self._performer,
            resources,
            source=source,
            on_replies=partial(self._guard, self._finish),
            on_memory=self._serve_again,
        )
        self._watch = Watch(
            resources.loop,
            sock,
            on_readable=partial(self._guard, self._on_readable),
            on_room=partial(self._guard, self._on_writable),
            on_stall=partial(self._end, Ending(Cause.STALLED, "client does not read its replies")),
            stall_seconds=resources.limits.reply_stall_seconds,
        )
        self._resume = partial(self._guard, self._serve)  # one object, by which a throttle knows us
        self._memory = PayloadMemory(
            transmission, self._pending, resources, export, self._watch, resume=self._resume, end=self._end
        )
        self._output = Output(sock)
        self._arena: bytearray | None = None  # held while the output points into it
        self._backlog: deque[RawRequest] = deque()
        self._stopping: Ending | None = None  # why, once no further request will be read
        self._ended = False
        self._due = False  # the loop will call _take_turn
        self._held = False  # nothing is begun
        self._hurried = False  # rates do not count any more
        self._frozen = False  # the output is being copied, and must not change

    @property
    def in_progress(self) -> int:
        """Requests that wait for the pool or for a flush."""
        return self._pending.in_progress

    def start(self, leftover: bytes) -> None:
        """Begin to serve, first the requests that arrived together with the last option."""
        self.export.gate.enter(self)
        self._held = self.export.is_held
        self._resume_reading()
        if leftover:
            self._transmission.buffer()[: len(leftover)] = leftover  # less than one receive of the handshake
            self._parse(len(leftover))
        self._guard(self._serve)

    def shut_down(self, ending: Ending) -> None:
        """Answer what is accepted, then end (P99)."""
        self._hurried = True
        self._stop(ending)
        self._resume()

    def refuse(self, ending: Ending) -> None:
        """Answer what is accepted, and what comes after with ESHUTDOWN, until the client leaves (P99)."""
        self._hurried = True
        self._transmission.refuse(Refusal(Errno.ESHUTDOWN, ending.text))
        self._resume()

    def abandon(self) -> None:
        """Let go of the socket at once; replies that still come from the pool are dropped."""
        if self._ended:
            return
        self._ended = True
        self._watch.stop()
        self._memory.abandon()
        self._backlog.clear()
        self._output.clear()
        self._arena = None  # what the output pointed into goes with us
        self._pending.abandon()
        self._leave_if_quiet()

    def _leave_if_quiet(self) -> None:
        if self.is_quiet:
            self.export.gate.leave(self)
            self.export.account.close(self.counters)

    def _guard(self, callback: Callable[[], None]) -> None:
        """Run a callback of the loop; a bug in it ends this connection, and leaves nothing hanging (R-10)."""
        try:
            callback()
        except Exception:
            self._log.exception("the connection ends for a bug")
            self._end(Ending(Cause.BUG, "internal error"))

    # The gate's side.

    @property
    def is_quiet(self) -> bool:
        """Whether nothing that was begun touches the device."""
        return self._pending.is_quiet

    def reconsider(self) -> None:
        """Hold requests back, or go on where we were."""
        held = self.export.is_held
        if held != self._held:
            self._held = held
            if not self._ended:
                if not held:
                    self._pending.submit()  # long changes that were interrupted
                self._guard(self._serve)

    def resize(self, size: int) -> None:
        """The export has another size from now on; requests are held to it that have not begun."""
        self._transmission.resize(size)

    @property
    def is_detached(self) -> bool:
        """Whether nothing that waits to be sent lies in a file."""
        return not self._output.file_bytes

    async def detach(self) -> None:
        """Copy what waits to be sent from files into memory: the files may change, or be closed, when this returns."""
        stalled = await reserve_copy(self._output, self._pending)
        if stalled is not None:
            self._end(stalled)
        if self.is_detached:
            return
        self._frozen = True
        self._watch.ignore_room()
        try:
            self._output.replace(await in_thread(self._output.copy))
        except OSError as error:
            self._end(Ending(Cause.READ_FAILED, str(error)))
        finally:
            self._frozen = False
            if not self._ended:
                self._guard(self._flush)

    # The loop's side of the socket.

    def _resume_reading(self) -> None:
        if not self._stopping and not self._held:
            self._watch.read()

    def _on_readable(self) -> None:
        # libuv reports a reset once, perhaps together with the last bytes, and then watches no more. A reply would run
        # into the reset; where no request became complete there is none, so look again.
        received = 0
        while not self._backlog and not self._stopping and self._memory.provide():
            if received > _PAYLOAD_PER_TURN:
                self._resources.loop.call_soon(self._guard, self._read_on)
                return
            try:
                count = self._socket.recv_into(self._transmission.buffer())
            except (BlockingIOError, InterruptedError):
                self._memory.watch()
                break
            except OSError as error:
                self._end(broken(error))
                return
            received += count
            if count:
                self._parse(count)
            else:
                self._stop(Ending(Cause.CLOSED, "client closed the connection without NBD_CMD_DISC"))
        self._serve()

    def _read_on(self) -> None:
        if self._watch.is_reading:
            self._on_readable()

    def _parse(self, count: int) -> None:
        try:
            self._backlog.extend(self._transmission.received(count))
        except ProtocolError as error:
            self._stop(Ending(Cause.PROTOCOL, str(error)))
        if self._transmission.failure is not None:
            self._stop(Ending(Cause.PROTOCOL, str(self._transmission.failure)))
        elif self._transmission.disconnected:
            self._stop(Ending(Cause.DISCONNECT, "client disconnected"))

    def _on_writable(self) -> None:
        self._flush()
        self._serve()

    def _flush(self) -> None:
        """Send what the socket takes, and watch it for the rest."""
        if self._frozen:
            return
        try:
            drained = self._output.flush()
        except OSError as error:
            self._end(Ending(Cause.READ_FAILED, str(error)) if error.errno in _FILE_ERRORS else broken(error))
            return
        if drained:
            if self._arena is not None:
                self._resources.return_arena(self._arena)
                self._arena = None
            self._pending.output_is_empty()
            self._watch.all_sent()
        else:
            self._watch.wait_for_room()

    # Serving.

    def _serve(self) -> None:
        """Answer the backlog as far as the socket and the budgets allow, and decide what to wait for next."""
        for _ in range(_BATCHES_PER_TURN):
            if not self._backlog or self._output or self._held or self._ended or not self._serve_some():
                break
        else:
            self._serve_again()
        if self._ended:
            return
        if not self._backlog and not self._output:
            if self._stopping:
                # Who left without a word may come back and write, and must not have that zeroed by a long change.
                is_gone = self._stopping.cause is Cause.CLOSED
                if not self._pending.in_progress or (is_gone and self._pending.is_only_long):
                    self._end(self._stopping)
                return
            if not self._held and self._memory.provide():
                self._resume_reading()
                return
        self._watch.pause()
        self._transmission.settle()

    def _serve_some(self) -> bool:
        """Serve a batch of the backlog, or what of it the export's rates allow; False when it must wait."""
        throttle = self.export.throttle
        if throttle is None or self._hurried:
            return self._serve_batch(self._backlog)
        return throttle.serve(self._backlog, self._serve_batch, self._resume, paid=bool(self._pending.payload))

    def _serve_batch(self, backlog: deque[RawRequest]) -> bool:
        """Fill one arena with replies and send it; False when the backlog must wait for the pool or the budgets."""
        output = self._output
        self._arena = arena = self._resources.borrow_arena()
        view = memoryview(arena)
        queued = position = 0  # arena bytes before `queued` are in the output already
        device, writing = self.export.device, self.export.writing
        read_cached, gather_cached = device.read_cached, device.gather_cached
        negotiated = self._transmission.negotiated.export
        maximum_length = negotiated.maximum_block
        size = negotiated.size  # a disk that grows is larger before it is ready
        performer, pending, payloads = self._performer, self._pending, self._transmission.payloads
        pack_header, header_size = performer.replies.pack_header, performer.replies.header_size
        pack_success, success_size = performer.replies.pack_success, performer.replies.success_size
        plain_write = self._transmission.plain_write
        begun = monotonic()
        inline = 0  # bytes that a write may have to be carried out here
        fixed = writing is None
        if writing is not None:
            write_cached, changing, pace = writing.write_cached, pending.changing, writing.pace
            inline = INLINE_WRITE_LENGTH if self._may_write and pace.inline_from <= begun else 0
        gathered = 0  # bytes in the output that are not in the arena
        admitted = True
        count, payload_count = len(backlog), len(payloads)
        slow = slow_writes = slow_replies = written = 0  # to know in the end what was done here
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
                    pieces = gather_cached(offset, length) if fixed else pending.gather(gather_cached, offset, length)
                    if pieces is not None:
                        pack_header(arena, position, cookie, offset, length)
                        output.append(view[queued:data])
                        output.extend(pieces)
                        queued = position = data
                        gathered += length
                        backlog.popleft()
                        continue
            elif operation == plain_write and 0 < length <= inline and offset + length <= size:
                if data > ARENA_SIZE:
                    break
                try:
                    is_written = not (changing and pending.overlaps(offset, length)) and write_cached(
                        offset, payloads[0]
                    )
                except OSError as error:
                    reply = performer.error_reply(request, error)
                    self.counters.done(_WRITE, 1, length, monotonic() - begun)
                else:
                    if is_written:
                        written += length
                        pack_success(arena, position, cookie, offset, length)
                        position += success_size
                        backlog.popleft()
                        payloads.popleft()
                        if pending.payload:
                            self._memory.done()
                        if monotonic() - begun > BATCH_SECONDS:
                            inline = pace.inline_was_slow(monotonic())
                        continue
            if reply is None:
                reply = performer.answer(request)
            is_write = operation & COMMAND_MASK == _WRITE
            if reply is not None:
                if position > queued:
                    output.append(view[queued:position])
                    queued = position
                output.append(memoryview(reply))
                slow_replies += len(reply)
                gathered += len(reply)
                if is_write and pending.payload:
                    self._memory.done()
            elif not pending.admit(request, payloads[0] if is_write else None, inline=0 < length <= inline):
                admitted = False
                break
            backlog.popleft()
            slow += 1
            if is_write:
                slow_writes += 1
                payloads.popleft()
                if inline and monotonic() - begun > BATCH_SECONDS:  # with FUA, it may have been carried out here too
                    inline = pace.inline_was_slow(monotonic())
            if slow_replies > ARENA_SIZE:  # for which nothing is reserved
                break
        if position > queued:
            output.append(view[queued:position])
        pending.submit()
        writes = payload_count - len(payloads) - slow_writes
        reads = count - len(backlog) - slow - writes
        length = position - reads * header_size - writes * success_size + gathered - slow_replies
        self._flush()
        seconds = monotonic() - begun
        if reads:
            self.counters.done(_READ, reads, length, seconds)
        if writes:
            self.counters.done(_WRITE, writes, written, seconds)
        return admitted

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
            self._leave_if_quiet()
            return
        if self._held and self.is_quiet:
            self.export.gate.became_quiet()
        self._flush()
        self._serve()

    # Ending.

    def _stop(self, ending: Ending) -> None:
        """Read no more; the session ends when everything accepted so far is answered."""
        if not self._stopping:
            self._stopping = ending
            self._watch.pause()

    def _end(self, ending: Ending) -> None:
        """Tell the owner, once, who then closes the socket."""
        if not self._ended:
            self.abandon()
            self._on_end(ending)

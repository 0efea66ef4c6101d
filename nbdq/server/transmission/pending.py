"""The requests of one client that wait, for the pool or for a flush, and the memory that they and their replies hold.

Memory is reserved before it is allocated (R-70): for each request what it and its reply can hold at most, for a large
payload as soon as its length is known. Not counted is what had been received already when a client had to wait: that is
never more than one receive buffer, and if it were counted, those who wait could be what all wait for.
"""

import logging
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from time import monotonic

from nbdq.block import Piece
from nbdq.nbd.constants import Command, CommandFlag
from nbdq.nbd.transmission import RawRequest
from nbdq.server.exports.export import Export
from nbdq.server.limits import GUARANTEED_BYTES
from nbdq.server.resources import Resources
from nbdq.server.transmission.long_change import LONG, LongChange
from nbdq.server.transmission.perform import CHANGES, COMMAND_MASK, Performer

_log = logging.getLogger(__name__)

_FUA = CommandFlag.FUA << 16
#: Requests that fall into one stretch of this size go to one worker: they probably wait for the same cluster.
_STRETCH_BITS = 16

#: A request, its payload, and the moment when it was admitted.
_Job = tuple[RawRequest, memoryview | None, float]


#: :meth:`~nbdq.block.BlockDevice.gather_cached`.
_Gather = Callable[[int, int], list[Piece] | None]


class Pending:
    """What one session has waiting. Loop thread only, but for :meth:`_work`."""

    def __init__(
        self,
        export: Export,
        performer: Performer,
        resources: Resources,
        *,
        source: Hashable,
        on_replies: Callable[[], None],
        on_memory: Callable[[], None],
    ) -> None:
        """On the loop thread, ``on_replies`` is called when there are :meth:`replies`, and ``on_memory`` when it is
        time to ask again for what was refused for want of memory. ``source`` is where the client comes from."""
        self._export = export
        self._writing = export.writing
        self._counters = performer.counters
        self._performer = performer
        self._resources = resources
        self._source = source
        self._on_replies = on_replies
        self._on_memory = on_memory
        self.in_progress = 0
        """Requests that were admitted and whose replies nobody has taken."""
        self.changing: dict[int, int] = {}
        """Start and end of the ranges that are being changed; they do not overlap."""
        self.payload = 0
        """Bytes reserved for a payload that is being received, or whose request waits to be served."""
        self._admitted: list[_Job] = []  # about to go to the pool
        self._long: deque[LongChange] = deque()  # … and long changes, of whose pieces one is in the pool at a time
        self._piece_done: deque[LongChange] = deque()  # at most one: the pool has carried out a piece of it
        self._in_piece = False
        self._replies: deque[tuple[RawRequest, float, list[Piece] | None]] = deque()
        self._woken = False  # the loop has been told of replies
        self._abandoned = False
        self._reserved = 0  # bytes taken from the budget for requests and replies …
        self._answered = 0  # … of which these are in the output, and are given back when it is empty

    @property
    def is_quiet(self) -> bool:
        """Whether nothing touches the device: a long change between two pieces does not, while the export is held."""
        return self.in_progress == len(self._long)

    @property
    def is_only_long(self) -> bool:
        """Whether there is nothing but long changes, which may take minutes yet."""
        return self.in_progress == len(self._long) + self._in_piece

    # Memory.

    def reserve_payload(self, length: int) -> bool:
        """Reserve memory for a payload that is to be received; there may be one at a time. False: wait."""
        assert not self.payload
        if not self._reserve(length):
            return False
        self.payload = length
        return True

    def payload_done(self) -> None:
        """The request with that payload was answered at once."""
        self._answered += self.payload
        self.payload = 0

    def reserve_reply(self, length: int) -> bool:
        """Reserve memory for the data of a reply that goes into the output at once, or not at all. False: wait."""
        if not self._reserve(length):
            return False
        self._answered += length
        return True

    def gather(self, gather_cached: _Gather, offset: int, length: int) -> list[Piece] | None:
        """What ``gather_cached`` gives without waiting, in memory that is reserved for as long as it is in the output.

        None: nothing is reserved. The pool will reserve for its own reply, and with both that might never be possible.
        """
        if not self._reserve(length):
            return None
        pieces = gather_cached(offset, length)
        if pieces is not None:
            self._answered += length
        else:
            self._reserved -= length
            self._resources.budget.give(length, source=self._source)
        return pieces

    def output_is_empty(self) -> None:
        """All replies that were taken have left."""
        if self._answered:
            count, self._answered = self._answered, 0
            self._reserved -= count
            self._resources.budget.give(count, source=self._source)

    def _reserve(self, count: int) -> bool:
        if self._reserved and self._reserved + count > self._resources.limits.connection_bytes:
            return False  # our own replies will leave, and that serves the backlog again
        overdraw = self._reserved + count <= GUARANTEED_BYTES
        if not self._resources.budget.take(count, self._on_memory, source=self._source, overdraw=overdraw):
            return False
        self._reserved += count
        return True

    # Requests.

    def overlaps(self, offset: int, length: int) -> bool:
        """Whether the range is being changed by a request that came earlier. Changes of one client to one range happen
        in the order in which they came, although the protocol does not ask for that (P89)."""
        end = offset + length
        return any(start < end and offset < stop for start, stop in self.changing.items())

    def admit(self, request: RawRequest, payload: memoryview | None, *, inline: bool) -> bool:
        """Take one more valid request; False, and one of the callbacks will come, if it must wait.

        It goes to the pool with the next :meth:`submit`, but for what needs only a flush: a FLUSH, and if ``inline`` a
        WRITE with FUA that can be carried out at once. A ``payload`` in the receive buffer is copied when it has to be.
        """
        _, operation, _, offset, length = request
        command = operation & COMMAND_MASK
        changes = command in CHANGES
        if self.in_progress >= self._resources.limits.requests or (changes and self.overlaps(offset, length)):
            return False  # our own requests will end, and that serves the backlog again
        if not self._reserve_for(request):
            return False
        self.in_progress += 1
        if changes:
            self.changing[offset] = offset + length
        begun = monotonic()
        if length >= LONG and changes and payload is None:
            self._long.append(LongChange(request, begun))
        elif command == Command.FLUSH or (inline and payload is not None and self._write_at_once(request, payload)):
            self._commit(request, begun)
        else:
            if payload is not None and payload.obj is self._resources.receive_buffer:
                payload = memoryview(bytes(payload))
            self._admitted.append((request, payload, begun))
        return True

    def _reserve_for(self, request: RawRequest) -> bool:
        charge = self._performer.charge(request)
        if not self.payload:
            return self._reserve(charge)
        # It is the WRITE whose payload came into memory of its own, for while that is received no other request comes.
        # Most of what it needs is reserved; if it had to wait for the rest, that could be for ever.
        charge -= self.payload
        self.payload = 0
        self._resources.budget.take(charge, self._on_memory, source=self._source, overdraw=True)
        self._reserved += charge
        return True

    def _write_at_once(self, request: RawRequest, payload: memoryview) -> bool:
        assert self._writing is not None
        try:
            return request[1] & _FUA != 0 and self._writing.write_cached(request[3], payload)
        except OSError:
            return False  # the pool meets the same error, and answers it

    def _commit(self, request: RawRequest, begun: float) -> None:
        assert self._writing is not None
        self._writing.commits.join(partial(self._committed, request, begun), self._resources)

    def _committed(self, request: RawRequest, begun: float, failure: Exception | None) -> None:
        performer = self._performer
        pieces = performer.success(request) if failure is None else performer.failure(request, failure)
        self._replies.append((request, begun, pieces))
        if not self._woken:
            self._woken = True
            self._resources.loop.call_soon(self._on_replies)

    def submit(self) -> None:
        """Hand what was admitted to the pool, neighbours to the same worker."""
        stretches: dict[int, list[_Job]] = {}
        for job in self._admitted:
            stretches.setdefault(job[0][3] >> _STRETCH_BITS, []).append(job)
        self._admitted = []
        for stretch in stretches.values():
            self._resources.pool.submit(partial(self._work, stretch))
        if self._long and not self._in_piece:
            self._in_piece = True
            self._resources.pool.submit(partial(self._work_piece, self._long.popleft()))

    def _work_piece(self, change: LongChange) -> None:
        """Pool thread: one piece of a long change."""
        if not self._abandoned:
            change.perform(self._performer)
        self._piece_done.append(change)
        self._wake()

    def _work(self, jobs: list[_Job]) -> None:
        """Pool thread: answer each request; the loop is woken once for all replies that it has not seen yet."""
        for request, payload, admitted in jobs:
            if self._abandoned:
                self._replies.append((request, admitted, []))
            elif payload is None or self._writing is None:
                self._replies.append((request, admitted, self._performer.perform(request, None)))
            else:
                begun = monotonic()
                self._replies.append((request, admitted, self._performer.perform(request, payload)))
                self._writing.pace.pooled(begun, monotonic())
        self._wake()

    def _wake(self) -> None:
        """Pool thread: let the loop look at what is done, if it has not been told already."""
        if not self._woken:
            self._woken = True
            try:
                self._resources.loop.call_soon_threadsafe(self._on_replies)
            except RuntimeError:  # the loop is closed: nobody is left to answer
                _log.debug("a reply came after the end of the loop")

    def replies(self) -> Iterator[list[Piece]]:
        """Take the replies that are there; their memory stays reserved until :meth:`output_is_empty`."""
        self._woken = False  # before looking: what is appended from now on wakes the loop anew
        now = monotonic()
        while self._piece_done:
            self._in_piece = False
            change = self._piece_done.popleft()
            if change.is_done:
                self._replies.append((change.request, change.begun, change.failure))
            else:
                self._long.append(change)
        if self._abandoned:
            self._drop_long()
        elif not self._export.is_held:
            self.submit()
        while self._replies:
            request, begun, pieces = self._replies.popleft()
            operation = request[1]
            if pieces is None:
                if operation & _FUA and not self._abandoned:
                    self._commit(request, begun)
                    continue
                pieces = self._performer.success(request)
            command = operation & COMMAND_MASK
            if command in CHANGES:
                del self.changing[request[3]]
            self._counters.done(command, 1, request[4] if command != Command.FLUSH else 0, now - begun)
            self.in_progress -= 1
            self._answered += self._performer.charge(request)
            if not self._abandoned:
                yield pieces

    def abandon(self) -> None:
        """Nobody wants replies any more. What the pool has begun goes on; its memory is given back when it ends."""
        self._abandoned = True
        self._resources.budget.forget(self._on_memory)
        self.payload_done()
        self._answered += sum(self._performer.charge(request) for request, _, _ in self._admitted)
        self.in_progress -= len(self._admitted)
        self._admitted = []
        self._drop_long()
        self.output_is_empty()

    def _drop_long(self) -> None:
        self._answered += sum(self._performer.charge(change.request) for change in self._long)
        self.in_progress -= len(self._long)
        self._long.clear()

"""Carrying out one request: from a request to its whole reply. Any thread, unless a method says otherwise."""

import logging
from math import inf
from time import monotonic

from nbdq.block import Piece
from nbdq.nbd.constants import Command, CommandFlag, Errno
from nbdq.nbd.replies import StructuredReplies, replies_for, wire_errno
from nbdq.nbd.transmission import RawRequest, Transmission
from nbdq.server.exports.contexts import encode
from nbdq.server.exports.export import Export
from nbdq.server.limits import SENDFILE_LENGTH, Limits
from nbdq.server.monitoring.counters import Counters
from nbdq.server.monitoring.peer_log import PeerLog
from nbdq.server.transmission.salvage import Salvage

_log = logging.getLogger(__name__)

COMMAND_MASK = 0xFFFF
#: So much of a CACHE is taken as a hint; more would only push out what was cached first.
_PREFETCH_MAX = 4 << 30
#: Longer ranges may be too much to look at on the loop thread, and larger replies have to be reserved for (R-70).
_INLINE_STATUS, _INLINE_REPLY = 4 << 30, 64 << 10
#: Commands that change the disk.
CHANGES = frozenset(map(int, (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)))


class Performer:
    """What one client asks of one export, in the form of replies that were negotiated."""

    def __init__(
        self, export: Export, transmission: Transmission, counters: Counters, log: PeerLog, limits: Limits
    ) -> None:
        self._export = export  # whose device is looked up each time, for it may be exchanged
        self._transmission = transmission
        self.counters = counters
        """What the client has done."""
        self._log = log.of(_log)
        self._limits = limits
        self._contexts = [(number, export.context(name)) for number, name in transmission.negotiated.contexts]
        self.replies = replies_for(transmission.negotiated)
        """How they are answered."""

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._export.device.size

    def charge(self, request: RawRequest) -> int:
        """Bytes that a request and its reply can have at most, and something for their objects."""
        _, operation, _, _, length = request
        command = operation & COMMAND_MASK
        if command in (Command.READ, Command.WRITE):
            return length + 512
        if command == Command.BLOCK_STATUS:
            extents = (
                1 if operation >> 16 & CommandFlag.REQ_ONE else min(length // 512 + 2, self._limits.status_extents)
            )
            pair = 16 if self._transmission.negotiated.extended else 8
            return extents * pair * len(self._contexts) + 512
        return 512

    def answer(self, request: RawRequest) -> bytes | None:
        """The reply to a request that needs no disk; None for one that has to wait. Loop thread only."""
        _, operation, cookie, offset, length = request
        command = operation & COMMAND_MASK
        export, transmission = self._export, self._transmission
        begun = monotonic()
        refusal = transmission.refusal(request)
        if refusal is not None:
            self.counters.refused(command)
            return self.replies.error(cookie, offset, refusal.errno, refusal.text)
        reply = None
        if command == Command.FLUSH:
            length = 0  # means nothing (P91)
            reply = None if export.writing is not None else self.replies.success(cookie, offset)
        elif not length:
            reply = self.replies.success(cookie, offset)
        elif (
            command == Command.BLOCK_STATUS
            and length <= _INLINE_STATUS
            and self.charge(request) <= _INLINE_REPLY
            and export.device.status_cached(offset, length)
        ):
            reply = self.status_or_error(request)
        if reply is not None:
            self.counters.done(command, 1, length, monotonic() - begun)
        return reply

    def perform(self, request: RawRequest, payload: memoryview | None) -> list[Piece] | None:
        """The whole reply; None for a change that succeeded, which may have to be made durable first (P92)."""
        _, operation, _, offset, length = request
        command = operation & COMMAND_MASK
        if command == Command.BLOCK_STATUS:
            return [memoryview(self.status_or_error(request))]
        try:
            if command == Command.READ:
                return self._read(request)
            if command in CHANGES:
                self.change(operation, offset, length, payload)
                return None
            self._export.device.prefetch(offset, min(length, _PREFETCH_MAX))
            return self.success(request)
        except Exception as error:
            return self.failure(request, error)

    def failure(self, request: RawRequest, error: Exception) -> list[Piece]:
        """The reply to a request that failed of ``error``."""
        return [memoryview(self.error_reply(request, error))]

    def success(self, request: RawRequest) -> list[Piece]:
        """The reply to a request that succeeded and returns no data."""
        return [memoryview(self.replies.success(request[2], request[3]))]

    def _read(self, request: RawRequest) -> list[Piece]:
        _, operation, cookie, offset, length = request
        replies, device = self.replies, self._export.device
        try:
            if length >= SENDFILE_LENGTH:
                data = device.gather(offset, length)
            else:
                reply = bytearray(replies.header_size + length)
                device.read_into(offset, memoryview(reply)[replies.header_size :])
                replies.pack_header(reply, 0, cookie, offset, length)
                return [memoryview(reply)]
        except OSError as error:
            if not isinstance(replies, StructuredReplies) or operation >> 16 & CommandFlag.DF:
                raise
            return self._salvage(request, replies, error)
        return [self._data_header(cookie, offset, length), *data]

    def _data_header(self, cookie: int, offset: int, length: int) -> memoryview:
        header = bytearray(self.replies.header_size)
        self.replies.pack_header(header, 0, cookie, offset, length)
        return memoryview(header)

    def _salvage(self, request: RawRequest, replies: StructuredReplies, error: OSError) -> list[Piece]:
        """The reply to a READ of which a part cannot be read: the rest of it, and where and why it fails (P113)."""
        _, _, cookie, offset, length = request
        found = Salvage(self._export.device, offset, length, error)
        if not found.bad:  # this time it went well
            return [self._data_header(cookie, offset, length), *(data for _, data in found.good)]
        pieces: list[Piece] = []
        for start, data in found.good:
            pieces += [memoryview(replies.data_header(cookie, offset, at=start, length=len(data))), data]
        for number, bad in enumerate(found.bad, 1):
            self._log.warning("READ of %d bytes at %d: %s", bad.length, bad.offset, bad.error)
            text = f"{bad.error.strerror or 'I/O error'} ({bad.length} bytes at {bad.offset})"
            done = number == len(found.bad)
            pieces.append(
                memoryview(replies.error(cookie, offset, wire_errno(bad.error), text, at=bad.offset, done=done))
            )
        self.counters.failed(Command.READ, length)
        return pieces

    def change(self, operation: int, offset: int, length: int, payload: memoryview | None = None) -> None:
        """Carry out a WRITE of ``payload``, a TRIM or a WRITE_ZEROES.

        Raises:
            OSError: as the calls of :class:`~nbdq.block.WritableBlockDevice`.
        """
        writing = self._export.writing
        assert writing is not None
        command, flags = operation & COMMAND_MASK, operation >> 16
        if command == Command.WRITE:
            assert payload is not None
            writing.write(offset, payload)
        elif command == Command.WRITE_ZEROES:
            unmap = not flags & CommandFlag.NO_HOLE
            writing.zero(offset, length, unmap=unmap, fast=bool(flags & CommandFlag.FAST_ZERO))
        else:
            writing.discard(offset, length)

    def status_or_error(self, request: RawRequest) -> bytes:
        """The reply to a valid BLOCK_STATUS, one chunk for each selected context (P117)."""
        selected, operation, cookie, offset, length = request
        limit = 1 if operation >> 16 & CommandFlag.REQ_ONE else self._limits.status_extents
        begun, seconds = monotonic(), self._limits.status_seconds or inf
        contexts = self._contexts
        if operation >> 16 & CommandFlag.PAYLOAD_LEN:  # P120
            contexts = [context for context in contexts if selected >> context[0] & 1]
        replies, device = self.replies, self._export.device
        assert isinstance(replies, StructuredReplies)
        reply = bytearray()
        try:
            for place, (number, context) in enumerate(contexts, 1):
                until = begun + seconds * place / len(contexts)  # a share for each: the client goes on where one ended
                extents = encode(
                    context, device, offset, length, limit=limit, number=replies.status_number, until=until
                )
                done = number == contexts[-1][0]
                reply += replies.status(cookie, offset, extents, context_id=number, done=done)
        except Exception as error:
            return self.error_reply(request, error)
        return bytes(reply)

    def error_reply(self, request: RawRequest, error: Exception) -> bytes:
        """What a client is told of a failure; the log gets what it must not see, such as paths (P121)."""
        _, operation, cookie, offset, length = request
        command = operation & COMMAND_MASK
        self.counters.failed(command, length if command != Command.FLUSH else 0)
        name = Command(command).name
        if isinstance(error, OSError):
            number = wire_errno(error, fast_zero=bool(operation >> 16 & CommandFlag.FAST_ZERO))
            if number is not Errno.ENOTSUP:  # which is what a FAST_ZERO wants to know
                self._log.warning("%s of %d bytes at %d: %s", name, length, offset, error)
            return self.replies.error(cookie, offset, number, error.strerror or "I/O error")
        self._log.error("%s of %d bytes at %d", name, length, offset, exc_info=error)
        return self.replies.error(cookie, offset, Errno.EIO, "internal error")

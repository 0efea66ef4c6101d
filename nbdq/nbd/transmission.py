"""The transmission phase: receive buffer → raw requests, the one list of reasons to refuse them, and reply headers.

The hot path of the server: no object per request but the tuple that ``struct`` makes, and a view of the payload of a
WRITE. Knows byte layouts and the rules of the protocol. Must not know sockets, files, or how a request is carried out;
payloads of replies pass by untouched.

The only violations that end a connection here are a wrong request magic (P80) and a WRITE too long to consume (P85);
every other fault of a request is a :class:`Refusal`, which is a reply (P141).
"""

import errno as system_errno
import struct
from collections import deque
from dataclasses import replace
from typing import NamedTuple

from nbdq.errors import ProtocolError
from nbdq.nbd.constants import (
    CHUNK_MAGIC,
    MAXIMUM_PAYLOAD,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    ChunkFlag,
    ChunkType,
    Command,
    CommandFlag,
    Errno,
    TransmissionFlag,
)
from nbdq.nbd.exports import Negotiated
from nbdq.nbd.messages import bounded_text

#: One request as it is on the wire: magic, operation, cookie, offset, length, where operation is
#: ``flags << 16 | command`` (P80). A READ without flags therefore is operation 0.
RawRequest = tuple[int, int, int, int, int]

#: Bytes of the receive buffer: 9000 headers, or the payloads of sixty small writes.
BUFFER_SIZE = 256 << 10
#: Behind a payload of at least this length another such is likely. Then only a little is received at first, lest most
#: of it comes into the receive buffer, to be copied from there into its own memory.
_LARGE_PAYLOAD = 128 << 10
_LITTLE = 4 << 10

REQUEST = struct.Struct(">IIQQI")
SIMPLE_REPLY = struct.Struct(">IIQ")
"""``SIMPLE_REPLY_MAGIC``, errno, cookie (P100)."""
CHUNK = struct.Struct(">IHHQI")
"""``CHUNK_MAGIC``, flags, type, cookie, length of what follows (P110)."""
DATA_CHUNK = struct.Struct(">IHHQIQ")
"""CHUNK with an offset behind it; the length counts 8 for the offset, and the payload (P111)."""
_HOLE_CHUNK = struct.Struct(">IHHQIQI")
_BLOCK_STATUS_CHUNK = struct.Struct(">IHHQII")
_ERROR = struct.Struct(">IH")
_OFFSET = struct.Struct(">Q")

# Plain integers: an enum member costs the hot path an attribute look-up each time.
_HEADER_SIZE = REQUEST.size
_READ = int(Command.READ)
_WRITE = int(Command.WRITE)
_DISC = int(Command.DISC)
_FLUSH = int(Command.FLUSH)
_WRITE_ZEROES = int(Command.WRITE_ZEROES)
_BLOCK_STATUS = int(Command.BLOCK_STATUS)
_DONE = int(ChunkFlag.DONE)
_OFFSET_DATA = int(ChunkType.OFFSET_DATA)
_NONE = int(ChunkType.NONE)


class Refusal(NamedTuple):
    """Why a request is answered with an error."""

    errno: Errno
    text: str
    """For humans at the client; without host paths (P121)."""


class _Rule(NamedTuple):
    """What an export has to advertise for a command, the flags that apply to it (P83), and whether it changes data."""

    advertised: TransmissionFlag
    flags: CommandFlag
    modifies: bool = False


_RULES = {
    Command.READ: _Rule(TransmissionFlag(0), CommandFlag.FUA | CommandFlag.DF),
    Command.WRITE: _Rule(TransmissionFlag(0), CommandFlag.FUA, modifies=True),
    Command.FLUSH: _Rule(TransmissionFlag.SEND_FLUSH, CommandFlag.FUA),
    Command.TRIM: _Rule(TransmissionFlag.SEND_TRIM, CommandFlag.FUA, modifies=True),
    Command.CACHE: _Rule(TransmissionFlag.SEND_CACHE, CommandFlag.FUA),
    Command.WRITE_ZEROES: _Rule(
        TransmissionFlag.SEND_WRITE_ZEROES,
        CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
        modifies=True,
    ),
    Command.BLOCK_STATUS: _Rule(TransmissionFlag(0), CommandFlag.FUA | CommandFlag.REQ_ONE),
}

#: Command flags that a client may use only if the export advertised them.
_ADVERTISED_BY = {
    CommandFlag.FUA: TransmissionFlag.SEND_FUA,
    CommandFlag.DF: TransmissionFlag.SEND_DF,
    CommandFlag.FAST_ZERO: TransmissionFlag.SEND_FAST_ZERO,
}


_NO_PAYLOAD = memoryview(b"")


class Transmission:
    """One client's transmission phase: the receive buffer and what was agreed.

    The owner receives into :meth:`buffer`, tells :meth:`received` how much came, and answers what that returns. Bytes
    that the handshake left over are copied into :meth:`buffer` first, as if they had just come.

    The payload of a WRITE that has come as a whole is a view of the receive buffer. If only its beginning has come,
    ``wanted`` says how much memory the owner has to :meth:`provide` before it receives again; the rest is then received
    there. Nobody sees any of it before its last byte has come (R-71).
    """

    def __init__(self, negotiated: Negotiated, buffer: bytearray | None = None) -> None:
        """``buffer`` may be shared by all whose :meth:`buffer` and :meth:`received` are called in turn, in one thread;
        between the two calls it is ours, and while nobody receives into it, so are the views that :meth:`settle` would
        copy. Without it there is one of our own."""
        self.negotiated = negotiated
        self.payloads: deque[memoryview] = deque()
        """One for each WRITE that was returned, in order; the owner takes them out. That of a WRITE which is refused
        may be empty. Those in the receive buffer are valid until something is received into it."""
        self.wanted = 0
        """Bytes of memory that a payload has to be given before more can be received; 0 for none."""
        self.disconnected = False
        """The client sent DISC: answer what is outstanding, then close (P93)."""
        self.failure: ProtocolError | None = None
        """Sync is lost: answer the requests before it, then close. The next :meth:`received` raises it."""

        self._buffer = bytearray(BUFFER_SIZE) if buffer is None else buffer
        self._view = memoryview(self._buffer)
        self._open = self._view  # what of it is received into
        self._kept = b""  # an incomplete header
        self._unread_payload = 0  # bytes still to come of a WRITE payload that nobody wants; only while _kept is empty
        self._draining: RawRequest | None = None  # the WRITE that it belongs to
        self._writing: RawRequest | None = None  # the WRITE whose payload comes into memory of its own …
        self._head = _NO_PAYLOAD  # … what has come of that before there was memory
        self._memory = _NO_PAYLOAD  # … the memory
        self._rest = _NO_PAYLOAD  # … and the part of it that is still to be filled

        self._refusal: Refusal | None = None  # of everything, once it is in force
        self._coming_refusal: Refusal | None = None
        self._refused_commands = _refused_commands(negotiated)
        self._refused_flags = _refused_flags(negotiated.flags)

    def buffer(self) -> memoryview:
        """Where to receive into; never empty, valid until the next :meth:`received`."""
        if self._rest:
            return self._rest
        assert not self.wanted, "memory is provided before anything is received"
        if not self._kept:
            return self._open
        self._view[: len(self._kept)] = self._kept
        return self._open[len(self._kept) :]

    def received(self, count: int) -> list[RawRequest]:
        """Take ``count`` bytes that are now at the front of :meth:`buffer`.

        Returns:
            Every request that is complete, in order, unchecked but for its magic. A WRITE is among them once the last
            byte of its payload is there, for a client does not expect an answer to what it is still sending (P84); the
            payload is then in ``payloads``, or nowhere if the WRITE will be refused. DISC is not among them, nor is
            what follows it (P93).

        Raises:
            ProtocolError: sync with the client is lost, and no request before that is left to be returned.
        """
        if self.failure is not None:
            raise self.failure
        if self._rest:
            return self._received_payload(count)
        requests: list[RawRequest] = []
        if self.disconnected:
            return requests
        if self._coming_refusal is not None:
            self.resize(0)  # so that nothing counts as within the export, and everything is asked for its refusal
            self._refusal = self._coming_refusal
        buffer = self._buffer
        unpack = REQUEST.unpack_from
        end = len(self._kept) + count
        last = end - _HEADER_SIZE
        position = self._unread_payload
        self._open = self._view
        if self._draining is not None and position <= end:
            requests.append(self._draining)
            self.payloads.append(_NO_PAYLOAD)
            self._draining = None
        while position <= last:
            request: RawRequest = unpack(buffer, position)
            position += _HEADER_SIZE
            operation = request[1]
            if request[0] != REQUEST_MAGIC:
                self.failure = ProtocolError(f"a request begins with {request[0]:#010x} instead of {REQUEST_MAGIC:#x}")
                position = end  # what follows is not parsed
                break
            if operation:
                command = operation & 0xFFFF
                if command == _WRITE:
                    behind = position + request[4]
                    if behind > end:
                        position = self._begin_payload(request, position, end)
                        break
                    self.payloads.append(self._view[position:behind])
                    position = behind
                elif command == _DISC:
                    self.disconnected = True
                    position = end
                    break
            requests.append(request)
        if position < end:
            self._kept = bytes(self._view[position:end])
            self._unread_payload = 0
        else:
            self._kept = b""
            self._unread_payload = position - end
        if self.failure is not None and not requests:
            raise self.failure
        return requests

    def _begin_payload(self, request: RawRequest, position: int, end: int) -> int:
        """Part of a payload lies at ``position`` to ``end``; where what follows it will be, seen from there."""
        _, operation, _, offset, length = request
        if length > MAXIMUM_PAYLOAD:
            self.failure = ProtocolError(f"a WRITE of {length} bytes; the limit is {MAXIMUM_PAYLOAD}")
            return end
        if self.refusal(operation, offset, length) is not None:
            self._draining = request
            return position + length
        self._writing = request
        self._head = self._view[position:end]
        self.wanted = length
        return end

    def provide(self, memory: memoryview) -> None:
        """Give the payload that waits for it ``memory`` of ``wanted`` bytes; it will be the one in ``payloads``."""
        assert len(memory) == self.wanted
        begun = len(self._head)
        memory[:begun] = self._head
        self._memory, self._rest = memory, memory[begun:]
        self._head = _NO_PAYLOAD
        self.wanted = 0

    def settle(self) -> None:
        """Copy out what lies in the receive buffer, for others may use that now; at most its size, and only once."""
        for _ in range(len(self.payloads)):
            payload = self.payloads.popleft()
            self.payloads.append(memoryview(bytes(payload)) if payload.obj is self._buffer else payload)
        if self._head.obj is self._buffer:
            self._head = memoryview(bytes(self._head))

    @property
    def missing(self) -> int:
        """Bytes still to come into the memory that was provided last."""
        return len(self._rest)

    def _received_payload(self, count: int) -> list[RawRequest]:
        self._rest = self._rest[count:]
        if self._rest:
            return []
        assert self._writing is not None
        request = self._writing
        self.payloads.append(self._memory)
        self._writing = None
        self._memory = _NO_PAYLOAD
        if request[4] >= _LARGE_PAYLOAD:
            self._open = self._view[:_LITTLE]
        return [request]

    def refusal(self, operation: int, offset: int, length: int) -> Refusal | None:
        """Why this request has to be answered with an error; None if it is to be carried out.

        The one list of such reasons, in the order of P87: who may, how, where. A length of 0 is carried out by doing
        nothing, except for BLOCK_STATUS, which cannot say less than one extent (P86, W4).
        """
        if self._refusal is not None:
            return self._refusal
        command = operation & 0xFFFF
        refused_flags = self._refused_flags.get(command)
        if refused_flags is None:  # P82; DISC is none that is answered
            return Refusal(Errno.EINVAL, f"command {command} is unknown")
        if command in self._refused_commands:
            return self._refused_commands[command]
        if operation >> 16 & refused_flags:
            return Refusal(Errno.EINVAL, _flags_text(command, operation >> 16 & refused_flags))
        if command == _FLUSH:  # offset and length mean nothing (P91)
            return None
        export = self.negotiated.export
        if offset + length > export.size:
            number = Errno.ENOSPC if command in (_WRITE, _WRITE_ZEROES) else Errno.EINVAL
            return Refusal(number, f"{length} bytes at {offset} reach past the end of the export at {export.size}")
        if (offset | length) & (export.minimum_block - 1):  # P88
            text = f"{length} bytes at {offset} are not aligned to the minimum block of {export.minimum_block}"
            return Refusal(Errno.EINVAL, text)
        if length > export.maximum_block and command in (_READ, _WRITE):  # P85, P128
            return Refusal(Errno.EINVAL, f"{length} bytes in one request; the limit is {export.maximum_block}")
        if length == 0 and command == _BLOCK_STATUS:
            return Refusal(Errno.EINVAL, "a range of 0 bytes has no status")
        return None

    def resize(self, size: int) -> None:
        """Hold the requests that follow to another size of the export, of which the protocol tells nobody."""
        if self._refusal is None:
            self.negotiated = replace(self.negotiated, export=replace(self.negotiated.export, size=size))

    def refuse(self, refusal: Refusal) -> None:
        """Have everything that is received from now on answered with ``refusal``; DISC is obeyed (P99)."""
        self._coming_refusal = refusal

    def error_reply(self, cookie: int, errno: Errno, text: str) -> bytes:
        """The whole answer to a request that failed; the text goes along if the client can take it (P102)."""
        return error_chunk(cookie, errno, text) if self.negotiated.structured else simple_reply(cookie, errno)

    def success_reply(self, cookie: int) -> bytes:
        """The whole answer to a request that succeeded and returns no data: also to a READ of 0 bytes (P86, P102)."""
        return none_chunk(cookie) if self.negotiated.structured else simple_reply(cookie)


def _refused_commands(negotiated: Negotiated) -> dict[int, Refusal]:
    """The commands that this client may not use at all."""
    refused: dict[int, Refusal] = {}
    for command, rule in _RULES.items():
        if rule.modifies and TransmissionFlag.READ_ONLY in negotiated.flags:
            refused[command] = Refusal(Errno.EPERM, "the export is read-only")
        elif rule.advertised not in negotiated.flags:
            refused[command] = Refusal(Errno.EINVAL, f"the export does not offer {command.name}")
    if not negotiated.contexts:  # P43
        refused[Command.BLOCK_STATUS] = Refusal(Errno.EINVAL, "no metadata context was selected for this export")
    return refused


def _refused_flags(advertised: TransmissionFlag) -> dict[int, int]:
    """For every command, the 16 flag bits that are unknown, do not apply or were not advertised (P83)."""
    withheld = CommandFlag(0)
    for command_flag, transmission_flag in _ADVERTISED_BY.items():
        if transmission_flag not in advertised:
            withheld |= command_flag
    return {command: 0xFFFF ^ int(rule.flags & ~withheld) for command, rule in _RULES.items()}


def _flags_text(command: int, flags: int) -> str:
    shown = CommandFlag(flags).name or hex(flags)
    return f"{Command(command).name} with flag {shown}: unknown, not offered, or not for this command"


def simple_reply(cookie: int, errno: Errno | None = None) -> bytes:
    """A simple reply; behind one to a READ that succeeded follows the data (P100)."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, errno or 0, cookie)


def pack_simple_reply(buffer: bytearray, position: int, cookie: int, offset: int, length: int) -> None:
    """Write the reply to a success into ``buffer``, for a client without structured replies; behind it to a READ
    follows the data."""
    SIMPLE_REPLY.pack_into(buffer, position, SIMPLE_REPLY_MAGIC, 0, cookie)


def pack_none_chunk(buffer: bytearray, position: int, cookie: int, offset: int, length: int) -> None:
    """Write the whole reply to a WRITE that succeeded into ``buffer``, for a client with structured replies.

    Without them it is what :func:`pack_simple_reply` writes; hence the same arguments.
    """
    CHUNK.pack_into(buffer, position, CHUNK_MAGIC, _DONE, _NONE, cookie, 0)


def pack_data_chunk(buffer: bytearray, position: int, cookie: int, offset: int, length: int) -> None:
    """Write the header of a READ that succeeded into ``buffer``, for a client with structured replies.

    The chunk is the whole reply: ``length`` ≥ 1 bytes that can no longer fail (P114). Takes the same arguments as
    :func:`pack_simple_reply`, so that the data path chooses once for each connection.
    """
    DATA_CHUNK.pack_into(buffer, position, CHUNK_MAGIC, _DONE, _OFFSET_DATA, cookie, _OFFSET.size + length, offset)


def none_chunk(cookie: int) -> bytes:
    """The chunk that ends a reply and says nothing else (P111)."""
    return CHUNK.pack(CHUNK_MAGIC, ChunkFlag.DONE, ChunkType.NONE, cookie, 0)


def data_chunk(cookie: int, offset: int, length: int, *, done: bool) -> bytes:
    """The header of an OFFSET_DATA chunk; ``length`` ≥ 1 bytes of payload, from ``offset`` of the export, follow.

    ``done`` only if no later error is possible (P114).
    """
    return DATA_CHUNK.pack(CHUNK_MAGIC, done, ChunkType.OFFSET_DATA, cookie, _OFFSET.size + length, offset)


def hole_chunk(cookie: int, offset: int, length: int, *, done: bool) -> bytes:
    """A whole OFFSET_HOLE chunk: ``length`` ≥ 1 bytes from ``offset`` read as zeros (P111, P116)."""
    return _HOLE_CHUNK.pack(CHUNK_MAGIC, done, ChunkType.OFFSET_HOLE, cookie, 12, offset, length)


def block_status_chunk(cookie: int, *, context_id: int, payload_length: int, done: bool) -> bytes:
    """The header of a BLOCK_STATUS chunk, to be followed by the payload: one or more big-endian u32 pairs of length and
    status (P111, P117). ``done`` with the last selected context."""
    length = 4 + payload_length
    return _BLOCK_STATUS_CHUNK.pack(CHUNK_MAGIC, done, ChunkType.BLOCK_STATUS, cookie, length, context_id)


def error_chunk(cookie: int, errno: Errno, text: str, *, offset: int | None = None) -> bytes:
    """A whole ERROR chunk, or ERROR_OFFSET if the failure has an ``offset`` in the export; it ends the reply (P111).

    ``text`` is cut to what the protocol permits (P121).
    """
    message = bounded_text(text)
    body = _ERROR.pack(errno, len(message)) + message
    if offset is not None:
        body += _OFFSET.pack(offset)
    kind = ChunkType.ERROR if offset is None else ChunkType.ERROR_OFFSET
    return CHUNK.pack(CHUNK_MAGIC, ChunkFlag.DONE, kind, cookie, len(body)) + body


_WIRE_ERRNO = {
    system_errno.EPERM: Errno.EPERM,
    system_errno.EACCES: Errno.EPERM,
    system_errno.EROFS: Errno.EPERM,
    system_errno.EINVAL: Errno.EINVAL,
    system_errno.EOPNOTSUPP: Errno.EINVAL,
    system_errno.ENOSPC: Errno.ENOSPC,
    system_errno.EDQUOT: Errno.ENOSPC,
    system_errno.EFBIG: Errno.ENOSPC,
    system_errno.ESHUTDOWN: Errno.ESHUTDOWN,
}


def wire_errno(error: OSError, *, fast_zero: bool = False) -> Errno:
    """The error number that tells a client of ``error``: the one translation (P98).

    ``fast_zero``: the request was a WRITE_ZEROES with FAST_ZERO, the only one that may be told ENOTSUP. Whatever else
    is missing from the table is EIO; ENOMEM and EOVERFLOW too, although the protocol has numbers for them, because a
    server should avoid the one, and the other tells the client that its request is too long.
    """
    if fast_zero and error.errno == system_errno.EOPNOTSUPP:
        return Errno.ENOTSUP
    return _WIRE_ERRNO.get(error.errno or system_errno.EIO, Errno.EIO)

"""The transmission phase, as far as it comes in: receive buffer → raw requests, and the one list of reasons to refuse.

The hot path of the server: no object per request but the tuple that ``struct`` makes, and a view of the payload of a
WRITE. Knows byte layouts and the rules of the protocol. Must not know sockets, files, or how a request is carried out;
how it is answered is in ``replies``.

The only violations that end a connection here are a wrong request magic (P80) and a payload too long to consume (P85,
P123); every other fault of a request is a :class:`Refusal`, which is a reply (P141).

With extended headers a WRITE has a payload whether its flag PAYLOAD_LEN says so or not, as in QEMU: every client sends
one, and to guess otherwise would lose sync (P123). Any other command has one if the flag is set; unless it is a
BLOCK_STATUS, that is read to be forgotten.
"""

import struct
from collections import deque
from dataclasses import replace
from typing import NamedTuple

from nbdq.errors import ProtocolError
from nbdq.nbd.constants import (
    EXTENDED_REQUEST_MAGIC,
    MAXIMUM_PAYLOAD,
    REQUEST_MAGIC,
    Command,
    CommandFlag,
    Errno,
    TransmissionFlag,
)
from nbdq.nbd.exports import Negotiated

#: One request as it is on the wire: magic, operation, cookie, offset, length, where operation is
#: ``flags << 16 | command`` (P80). A READ without flags therefore is operation 0. For a BLOCK_STATUS with a payload the
#: length is that of the range, and in the place of the magic is the set of ids that it asks for, as bits (P120).
RawRequest = tuple[int, int, int, int, int]

#: Bytes of the receive buffer: 9000 headers, or the payloads of sixty small writes.
BUFFER_SIZE = 256 << 10
#: Behind a payload of at least this length another such is likely. Then only a little is received at first, lest most
#: of it comes into the receive buffer, to be copied from there into its own memory.
_LARGE_PAYLOAD = 128 << 10
_LITTLE = 4 << 10

_REQUEST = struct.Struct(">IIQQI")
_EXTENDED_REQUEST = struct.Struct(">IIQQQ")
# The payload of a BLOCK_STATUS (P120): the length of the range, and ids of contexts.
_RANGE_LENGTH = struct.Struct(">Q")
_ID = struct.Struct(">I")

# Plain integers: an enum member costs the hot path an attribute look-up each time.
_READ = int(Command.READ)
_WRITE = int(Command.WRITE)
_DISC = int(Command.DISC)
_FLUSH = int(Command.FLUSH)
_WRITE_ZEROES = int(Command.WRITE_ZEROES)
_BLOCK_STATUS = int(Command.BLOCK_STATUS)
_PAYLOAD_LEN = CommandFlag.PAYLOAD_LEN << 16


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
        self._is_settled = True  # nothing of what is to be kept lies in the buffer
        self._kept = b""  # an incomplete header
        self._unread_payload = 0  # bytes still to come of a payload that nobody wants; only while _kept is empty
        self._draining: RawRequest | None = None  # the request that it belongs to
        self._writing: RawRequest | None = None  # the WRITE whose payload comes into memory of its own …
        self._head = _NO_PAYLOAD  # … what has come of that before there was memory
        self._memory = _NO_PAYLOAD  # … the memory
        self._rest = _NO_PAYLOAD  # … and the part of it that is still to be filled

        self._refusal: Refusal | None = None  # of everything, once it is in force
        self._coming_refusal: Refusal | None = None
        self._refused_commands = _refused_commands(negotiated)
        self._refused_flags = _refused_flags(negotiated)
        self._ids = frozenset(number for number, _ in negotiated.contexts)
        self._magic = EXTENDED_REQUEST_MAGIC if negotiated.extended else REQUEST_MAGIC
        self._request = _EXTENDED_REQUEST if negotiated.extended else _REQUEST
        self._payload_flag = _PAYLOAD_LEN if negotiated.extended else 0
        self.plain_write = _WRITE | self._payload_flag
        """The operation of a WRITE without further flags."""

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
            payload is then in ``payloads``, or nowhere if the WRITE will be refused. So are the payloads of other
            commands, but for BLOCK_STATUS (P120), which is returned as what it asks for. DISC is not among them, nor
            is what follows it (P93).

        Raises:
            ProtocolError: sync with the client is lost, and no request before that is left to be returned.
        """
        if self.failure is not None:
            raise self.failure
        if self._rest:
            return self._received_payload(count)
        self._is_settled = False
        requests: list[RawRequest] = []
        if self.disconnected:
            return requests
        if self._coming_refusal is not None:
            self.resize(0)  # so that nothing counts as within the export, and everything is asked for its refusal
            self._refusal = self._coming_refusal
        buffer = self._buffer
        unpack, header_size = self._request.unpack_from, self._request.size
        magic, payload_flag = self._magic, self._payload_flag
        end = len(self._kept) + count
        last = end - header_size
        position = self._unread_payload
        self._open = self._view
        if self._draining is not None and position <= end:
            requests.append(self._draining)
            if self._draining[1] & 0xFFFF == _WRITE:
                self.payloads.append(_NO_PAYLOAD)
            self._draining = None
        while position <= last:
            request: RawRequest = unpack(buffer, position)
            position += header_size
            operation = request[1]
            if request[0] != magic:
                self.failure = ProtocolError(f"a request begins with {request[0]:#010x} instead of {magic:#x}")
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
                elif operation & payload_flag:
                    behind = self._take_payload(request, position, end, requests)
                    if not behind:
                        position -= header_size
                        break
                    position = behind
                    continue
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
        length = request[4]
        if length > MAXIMUM_PAYLOAD:
            self.failure = ProtocolError(f"a WRITE of {length} bytes; the limit is {MAXIMUM_PAYLOAD}")
            return end
        refusal = self.refusal(request)
        # A disk that is too small may have grown when the last byte comes; the payload must not be missing then.
        if refusal is not None and (refusal.errno != Errno.ENOSPC or length > self.negotiated.export.maximum_block):
            self._draining = request
            return position + length
        self._writing = request
        self._head = self._view[position:end]
        self.wanted = length
        return end

    def _take_payload(self, request: RawRequest, position: int, end: int, requests: list[RawRequest]) -> int:
        """Add to ``requests`` one of another command than WRITE, whose payload begins at ``position``, when that has
        come; where what follows it will be. 0 if the request has to be looked at again when more of it is there."""
        _, operation, cookie, offset, length = request
        behind = position + length
        if length > MAXIMUM_PAYLOAD:
            self.failure = ProtocolError(f"a payload of {length} bytes; the limit is {MAXIMUM_PAYLOAD}")
            return end
        if operation & 0xFFFF == _BLOCK_STATUS:
            if length > _RANGE_LENGTH.size + 4 * len(self._ids):
                request = (0, operation, cookie, offset, 0)
            elif behind > end:
                return 0
            else:
                request = self._status_request(request, self._view[position:behind])
        if behind <= end:
            requests.append(request)
        else:
            self._draining = request
        return behind

    def _status_request(self, request: RawRequest, payload: memoryview) -> RawRequest:
        """A BLOCK_STATUS that says in its payload which range and contexts it asks for; nothing for a wrong one."""
        _, operation, cookie, offset, length = request
        selected = 0
        if length > _RANGE_LENGTH.size and length % 4 == 0:
            numbers = [number for (number,) in _ID.iter_unpack(payload[_RANGE_LENGTH.size :])]
            if len(set(numbers)) == len(numbers) and self._ids.issuperset(numbers):
                selected = sum(1 << number for number in numbers)
                (length,) = _RANGE_LENGTH.unpack_from(payload)
        return selected, operation, cookie, offset, length

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
        if self._is_settled:
            return
        self._is_settled = True
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
        self._memory = self._rest = _NO_PAYLOAD  # an empty rest would hold the memory, too
        if request[4] >= _LARGE_PAYLOAD:
            self._open = self._view[:_LITTLE]
        return [request]

    def refusal(self, request: RawRequest) -> Refusal | None:
        """Why this request has to be answered with an error; None if it is to be carried out.

        The one list of such reasons, in the order of P87: who may, how, where. A length of 0 is carried out by doing
        nothing, except for BLOCK_STATUS, which cannot say less than one extent (P86, W4).
        """
        if self._refusal is not None:
            return self._refusal
        selected, operation, _, offset, length = request
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
        if command == _BLOCK_STATUS and operation & _PAYLOAD_LEN and not selected:
            text = "the payload is not the length of a range and ids of selected contexts, each of them once"
            return Refusal(Errno.EINVAL, text)
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


def _refused_flags(negotiated: Negotiated) -> dict[int, int]:
    """For every command, the 16 flag bits that are unknown, do not apply or were not advertised (P83)."""
    withheld = CommandFlag(0)
    for command_flag, transmission_flag in _ADVERTISED_BY.items():
        if transmission_flag not in negotiated.flags:
            withheld |= command_flag
    refused = {int(command): 0xFFFF ^ int(rule.flags & ~withheld) for command, rule in _RULES.items()}
    if negotiated.extended:
        refused[_WRITE] &= ~int(CommandFlag.PAYLOAD_LEN)  # the inverse of an IntFlag lacks bits
    if TransmissionFlag.BLOCK_STATUS_PAYLOAD in negotiated.flags:
        refused[_BLOCK_STATUS] &= ~int(CommandFlag.PAYLOAD_LEN)  # the inverse of an IntFlag lacks bits
    return refused


def _flags_text(command: int, flags: int) -> str:
    shown = CommandFlag(flags).name or hex(flags)
    return f"{Command(command).name} with flag {shown}: unknown, not offered, or not for this command"

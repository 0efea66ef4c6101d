"""The transmission phase of the server of :mod:`tests.probe.faulty`, as right and as wrong as that."""

import struct
import time
from typing import TYPE_CHECKING

from tests.probe.faulty import (
    BLOCK_STATUS,
    DF,
    DISC,
    EINVAL,
    ENOSPC,
    EPERM,
    FAST_ZERO,
    FLAGS,
    FLUSH,
    FUA,
    MAXIMUM,
    NO_HOLE,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    SIZE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Gone,
)

if TYPE_CHECKING:
    from tests.probe.faulty import _Client

EIO, ENOTSUP = 5, 95
_BLOCK = 64 << 10


class Refused(Exception):
    """A request to be answered with an error."""


class Transmission:
    """One connection after the handshake."""

    def __init__(self, client: "_Client", contexts: tuple[int, ...]) -> None:
        self.client = client
        self.server = client.server
        self.bad = client.bad
        self.contexts = contexts
        self.structured, self.extended = client.state.structured, client.state.extended
        self.disk = bytearray(self.server.disk) if self.bad("flush-covers-other-connections") else self.server.disk
        self.answered = 0
        self.held: list[bytes] = []
        self.command = self.flags = self.cookie = self.offset = self.length = 0

    def serve(self) -> None:
        while True:
            if not self.client.buffer:
                self._send(b"".join(self.held))
                self.held.clear()
            self._request()

    def _request(self) -> None:
        header = self.client.take(32 if self.extended else 28, whole="requests-byte-by-byte")
        layout, magic = (">IHHQQQ", 0x21E41C71) if self.extended else (">IHHQQI", 0x25609513)
        found, self.flags, self.command, self.cookie, self.offset, self.length = struct.unpack(layout, header)
        if found != magic and not self.bad("wrong-request-magic"):
            raise Gone
        if self.extended and self.bad("huge-lengths"):
            self.length &= 0xFFFFFFFF
        if self.command == DISC:
            if self.bad("disconnecting"):
                time.sleep(2)
            if not self.bad("requests-before-disconnecting"):
                self._send(b"".join(self.held))
            raise Gone
        payload = self._payload()
        try:
            self._refuse(payload)
            self._carry_out(payload)
        except Refused as refused:
            if payload and self.bad("data-of-a-refused-write", "payload-of-a-command-without"):
                self.client.buffer[:0] = payload
            self._error(refused.args[0])

    def _payload(self) -> bytes:
        has_payload = bool(self.flags & PAYLOAD_LEN) if self.extended else self.command == WRITE
        if not has_payload:
            return b""
        if self.length > 2 * MAXIMUM or (self.bad("large-write") and self.length >= MAXIMUM):
            if self.bad("endless-payload"):
                time.sleep(2)
            raise Gone
        return self.client.take(self.length, whole="write-in-pieces" if self.command == WRITE else "")

    # Reasons to refuse.

    def _refuse(self, payload: bytes) -> None:
        if self.command not in FLAGS:
            if self.bad("unknown-commands"):
                raise Gone
            raise Refused(EINVAL)
        modifies = self.command in (WRITE, TRIM, WRITE_ZEROES)
        if modifies and self.server.read_only:
            if self.bad("read-only-is-read-only"):
                self.length = 0
                return
            raise Refused(EINVAL if self.bad("read-only-says-eperm") else EPERM)
        self._refuse_flags()
        if self.command == BLOCK_STATUS and self.flags & PAYLOAD_LEN:
            return
        self._refuse_range()

    def _refuse_flags(self) -> None:
        allowed = FLAGS[self.command] | FUA
        if self.command == WRITE and self.extended:
            allowed |= PAYLOAD_LEN
        if self.command == BLOCK_STATUS and self.extended and self.contexts:
            allowed |= PAYLOAD_LEN
        if not self.structured and not self.bad("flags-that-were-not-advertised"):
            allowed &= ~DF
        if (self.command == READ and self.bad("flags-that-do-not-belong")) or (
            (self.command == BLOCK_STATUS and self.bad("status-with-wrong-flags"))
            or (self.command in (WRITE, TRIM, WRITE_ZEROES) and self.bad("flags-of-writes-that-do-not-belong"))
        ):
            allowed |= 0xFFFF & ~PAYLOAD_LEN
        if (self.command == READ and self.bad("fua-everywhere")) or (
            (self.command == BLOCK_STATUS and self.bad("status-with-fua"))
            or (self.command == TRIM and self.bad("fua-on-writes"))
        ):
            allowed &= ~FUA
        if self.flags & ~allowed:
            raise Refused(EINVAL)

    def _refuse_range(self) -> None:
        command, length = self.command, self.length
        if command == FLUSH:
            return
        if command == BLOCK_STATUS and not self.contexts:
            if self.bad("status-without-contexts"):
                self.length = 0
                return
            raise Refused(EINVAL)
        if not length and (
            (command == READ and self.bad("requests-for-nothing"))
            or (command == WRITE and self.bad("writes-of-nothing"))
            or (command == BLOCK_STATUS and self.bad("status-of-nothing"))
        ):
            raise Gone
        if length >> 31 and command == READ and self.bad("huge-read"):
            raise Gone
        if self.offset + length > SIZE:
            if command == BLOCK_STATUS and self.bad("status-beyond-the-end"):
                raise Refused(EIO)
            if command == READ and self.bad("reads-beyond-the-end"):
                raise Refused(EIO)
            writing = command in (WRITE, WRITE_ZEROES) and not self.bad("writes-beyond-the-end")
            raise Refused(ENOSPC if writing else EINVAL)
        lenient = (command == READ and self.bad("misaligned-read")) or (
            command == WRITE and self.bad("misaligned-write")
        )
        if (self.offset | length) & (self.server.minimum - 1) and not lenient:
            raise Refused(EINVAL)
        if command == BLOCK_STATUS and not length:
            raise Refused(EINVAL)

    # What is asked.

    def _carry_out(self, payload: bytes) -> None:
        start, end = self.offset, self.offset + self.length
        self.answered += 1
        if self.bad("thousands-of-requests") and self.answered > 1000:
            raise Gone
        match self.command:
            case 0:
                if self.bad("largest-read") and self.length == SIZE:
                    raise Refused(EINVAL)
                return self._read(bytes(self.disk[start:end]))
            case 1:
                if self.bad("write") and len(payload) == 3:
                    payload = payload[:2] + b"\0"
                self.disk[start : start + len(payload)] = payload[: self.length]
            case 3:
                if self.bad("flush"):
                    raise Refused(EIO)
            case 4:
                if self.bad("long-trim-and-zero") and self.length == SIZE:
                    raise Gone
            case 6:
                if not (self.flags & NO_HOLE and self.bad("write-zeroes")):
                    self.disk[start:end] = bytes(end - start)
                if self.flags & FAST_ZERO and self.bad("fast-zero"):
                    raise Refused(ENOTSUP)
            case 7:
                return self._status(payload)
        return self._reply([(0, b"")])

    def _read(self, data: bytes) -> None:
        if not self.structured:
            if self.bad("cookies"):
                self.cookie &= 0xFFFFFFFF
            return self._hold(struct.pack(">IIQ", 0x67446698, 0, self.cookie) + data)
        if self.bad("read") and data:
            data = b"\xee" + data[1:]
        whole = (self.flags & DF and not self.bad("unfragmented-read")) or len(data) < 2
        cut = len(data) if whole else len(data) // 2
        pieces = [(self.offset, data[:cut]), (self.offset + cut, data[cut:])]
        chunks = [(1, struct.pack(">Q", offset) + piece) for offset, piece in pieces if piece]
        return self._reply([*chunks, (0, b"")])

    def _status(self, payload: bytes) -> None:
        contexts, length = self.contexts, self.length
        if self.flags & PAYLOAD_LEN:
            if len(payload) < 12 or len(payload) % 4:
                raise Refused(EINVAL)
            (length,) = struct.unpack_from(">Q", payload)
            asked = struct.unpack(f">{len(payload) // 4 - 2}I", payload[8:])
            if len(set(asked)) != len(asked) or not set(asked) <= set(contexts):
                if not self.bad("wrong-lists-of-contexts"):
                    raise Refused(EINVAL)
                return self._reply([(0, b"")])
            if not self.bad("status-of-some-contexts"):
                contexts = asked
        chunks = []
        for context in contexts if length else ():
            extents = self._extents(context, length)
            if self.flags & REQ_ONE and not self.bad("one-extent"):
                extents = [(min(extents[0][0], length), extents[0][1])]
            head = struct.pack(">II" if self.extended else ">I", context, *([len(extents)] if self.extended else []))
            body = b"".join(struct.pack(">QQ" if self.extended else ">II", *extent) for extent in extents)
            chunks.append((6 if self.extended else 5, head + body))
        return self._reply([*chunks, (0, b"")])

    def _extents(self, context: int, length: int) -> list[tuple[int, int]]:
        if context:
            return [(SIZE - self.offset, 7)]
        extents: list[tuple[int, int]] = []
        position = self.offset
        while position < self.offset + length:
            end = min(position // _BLOCK * _BLOCK + _BLOCK, SIZE)
            status = 2 if self.bad("zeros-are-zeros") or not any(self.disk[position:end]) else 0
            status |= 8 if self.bad("allocation-has-two-bits") else 0
            if extents and extents[-1][1] == status:
                extents[-1] = (extents[-1][0] + end - position, status)
            else:
                extents.append((end - position, status))
            position = end
        if self.bad("one-extent"):
            extents = [(extents[0][0] - 1, extents[0][1]), (1, 0), *extents[1:]]
        return [(0, 0), *extents] if self.bad("block-status") else extents

    # Replies.

    def _error(self, error: int) -> None:
        error = 9999 if self.bad("error-numbers") else error
        if self.structured and not self.bad("errors-in-chunks"):
            return self._reply([(0x8001, struct.pack(">IH", error, 2) + b"no")])
        return self._hold(struct.pack(">IIQ", 0x67446698, error, self.cookie))

    def _reply(self, chunks: list[tuple[int, bytes]]) -> None:
        """Chunks with their types, or a simple reply that is a success."""
        if not self.structured:
            return self._hold(struct.pack(">IIQ", 0x67446698, 0, self.cookie))
        for number, (kind, body) in enumerate(chunks, 1):
            head = (number == len(chunks), kind, self.cookie)
            if self.extended:
                header = struct.pack(">IHHQQQ", 0x6E8A278C, *head, self.offset, len(body))
            else:
                header = struct.pack(">IHHQI", 0x668E33EF, *head, len(body))
            self._hold(header + body)
        return None

    def _hold(self, reply: bytes) -> None:
        if self.bad("requests-before-disconnecting"):
            self.held.append(reply)
        else:
            self._send(reply)

    def _send(self, data: bytes) -> None:
        try:
            self.client.send(data)
        except OSError:
            if len(data) > 4096 and self.bad("client-that-does-not-listen"):  # not for the ACK of an ABORT
                self.server.stop()
            raise

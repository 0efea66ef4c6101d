"""The transmission phase as a client sees it: requests out, whole answers in, each judged by the letter."""

import itertools
import os
import struct
from collections.abc import Mapping
from typing import Final

from nbdq.client.channel import Channel
from nbdq.client.transaction import Extent, Transaction
from nbdq.client.wire import ExportDetails
from nbdq.errors import ProtocolError, printable
from nbdq.nbd.constants import (
    CHUNK_MAGIC,
    EXTENDED_CHUNK_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    Command,
    CommandFlag,
)

_REQUEST: Final = struct.Struct(">IHHQQI")
_EXTENDED_REQUEST: Final = struct.Struct(">IHHQQQ")
_MAGIC: Final = struct.Struct(">I")
# What follows the magic of a reply.
_SIMPLE: Final = struct.Struct(">IQ")
_CHUNK: Final = struct.Struct(">HHQI")
_EXTENDED_CHUNK: Final = struct.Struct(">HHQQQ")


class Session:
    """One connection after the handshake. Requests may be pipelined: :meth:`submit` many, :meth:`receive` each."""

    def __init__(
        self,
        channel: Channel,
        export: ExportDetails,
        *,
        structured: bool,
        extended: bool,
        contexts: Mapping[str, int],
    ) -> None:
        """``contexts``: the metadata contexts that were selected for this export, name → id."""
        self.channel = channel
        self.export = export
        self.structured = structured
        self.extended = extended
        self.contexts = dict(contexts)
        self._cookies = itertools.count(0x6E62_6471_0000_0001)
        self._outstanding: dict[int, Transaction] = {}

    @property
    def outstanding(self) -> int:
        """Requests without a whole answer."""
        return len(self._outstanding)

    def pack(
        self,
        command: int,
        cookie: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes = b"",
    ) -> bytes:
        """One request as it goes out (P80, P122); a WRITE gets PAYLOAD_LEN where its header needs it (P123)."""
        if not self.extended:
            return _REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length) + payload
        if command == Command.WRITE:
            flags |= CommandFlag.PAYLOAD_LEN
        return _EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length) + payload

    def expect(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        cookie: int | None = None,
        contexts: frozenset[int] | None = None,
    ) -> int:
        """Note a request whose bytes the caller sends; returns its cookie, a fresh one unless given. A BLOCK_STATUS is
        about the metadata contexts with the ids ``contexts``, every one that was selected unless given."""
        cookie = next(self._cookies) if cookie is None else cookie
        assert cookie not in self._outstanding
        contexts = frozenset(self.contexts.values()) if contexts is None else contexts
        self._outstanding[cookie] = Transaction(command, offset, length, flags, contexts, self.export.size)
        return cookie

    def submit(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"") -> int:
        """Send one request and return its cookie.

        Raises:
            OSError: as :meth:`Channel.send`.
        """
        cookie = self.expect(command, offset, length, flags=flags)
        self.channel.send(self.pack(command, cookie, offset, length, flags=flags, payload=payload))
        return cookie

    def receive(self) -> tuple[int, Transaction]:
        """The next request whose answer is complete, with its cookie.

        Raises:
            ProtocolError: the answer breaks a rule, or is none to anything that was asked.
            OSError: as :meth:`Channel.receive`.
        """
        while True:
            cookie, transaction = self._receive_message()
            if transaction.done:
                del self._outstanding[cookie]
                return cookie, transaction

    def call(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b""
    ) -> Transaction:
        """One request and its answer; no others may be outstanding. An error of the server's is in ``error``.

        Raises:
            ProtocolError, OSError: as :meth:`receive`.
        """
        assert not self._outstanding
        self.submit(command, offset, length, flags=flags, payload=payload)
        return self.receive()[1]

    # The same, for those who want a result or an exception.

    def read(self, offset: int, length: int) -> bytes:
        """The contents of a range.

        Raises:
            OSError: the server's error, or as :meth:`receive`.
        """
        return self._succeed(self.call(Command.READ, offset, length)).data

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        """Change a range; durable on return with ``fua``, else after :meth:`flush`."""
        flags = int(CommandFlag.FUA) if fua else 0
        self._succeed(self.call(Command.WRITE, offset, len(data), flags=flags, payload=data))

    def flush(self) -> None:
        """Make durable what was written."""
        self._succeed(self.call(Command.FLUSH))

    def block_status(self, offset: int, length: int) -> dict[str, list[Extent]]:
        """The extents of every selected metadata context from ``offset`` on, of a part of the range at least."""
        extents = self._succeed(self.call(Command.BLOCK_STATUS, offset, length)).extents
        return {name: extents[number] for name, number in self.contexts.items()}

    def disconnect(self) -> None:
        """Take leave and close (P93)."""
        try:
            self.channel.send(self.pack(Command.DISC, next(self._cookies)))
        finally:
            self.channel.close()

    def _succeed(self, transaction: Transaction) -> Transaction:
        if transaction.error:  # the numbers of the wire are those of Linux
            raise OSError(transaction.error, printable(transaction.message) or os.strerror(transaction.error))
        return transaction

    def _receive_message(self) -> tuple[int, Transaction]:
        """One simple reply or one chunk, and the request that it is about."""
        (magic,) = _MAGIC.unpack(self.channel.receive(_MAGIC.size))
        if magic == SIMPLE_REPLY_MAGIC:
            error, cookie = _SIMPLE.unpack(self.channel.receive(_SIMPLE.size))
            transaction = self._find(cookie)
            transaction.check_simple(error, structured=self.structured, extended=self.extended)
            if transaction.is_read and not error:
                transaction.take_data(self.channel.receive(transaction.length))
            return cookie, transaction
        if magic not in (CHUNK_MAGIC, EXTENDED_CHUNK_MAGIC):
            raise ProtocolError(f"a reply begins with {magic:#010x} (P100, P110)")
        if not self.structured or self.extended != (magic == EXTENDED_CHUNK_MAGIC):
            raise ProtocolError(f"a chunk with the magic {magic:#010x}, which was not agreed (P102, P122)")
        if self.extended:
            flags, kind, cookie, offset, length = _EXTENDED_CHUNK.unpack(self.channel.receive(_EXTENDED_CHUNK.size))
        else:
            flags, kind, cookie, length = _CHUNK.unpack(self.channel.receive(_CHUNK.size))
            offset = None
        transaction = self._find(cookie)
        if offset not in (None, transaction.offset):
            raise ProtocolError(f"a chunk with offset {offset} for a request at {transaction.offset} (P110)")
        if length > transaction.limit(kind):
            raise ProtocolError(f"a chunk of type {kind:#x} with {length} bytes, beyond what was asked (P111, P113)")
        transaction.take_chunk(kind, flags, self.channel.receive(length), extended=self.extended)
        return cookie, transaction

    def _find(self, cookie: int) -> Transaction:
        if cookie not in self._outstanding:
            raise ProtocolError(f"a reply with the cookie {cookie:#x}, which nothing outstanding has (P81)")
        return self._outstanding[cookie]

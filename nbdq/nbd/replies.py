"""Replies of the transmission phase, in the three formats of the protocol, and the errors that they carry.

Builders of bytes: payloads of replies pass by untouched. Those named ``pack_…`` are for the hot path, write into its
buffer, and take the same arguments in every format, so that the data path chooses once for each connection.
"""

import errno as system_errno
import struct

from nbdq.nbd.constants import CHUNK_MAGIC, EXTENDED_CHUNK_MAGIC, SIMPLE_REPLY_MAGIC, ChunkFlag, ChunkType, Errno
from nbdq.nbd.exports import Negotiated
from nbdq.nbd.messages import bounded_text

_SIMPLE = struct.Struct(">IIQ")
# Chunk headers, alone and with the offset of data behind them.
_CHUNK = struct.Struct(">IHHQI")
_DATA_CHUNK = struct.Struct(">IHHQIQ")
_EXTENDED_CHUNK = struct.Struct(">IHHQQQ")
_EXTENDED_DATA_CHUNK = struct.Struct(">IHHQQQQ")
_STATUS = struct.Struct(">I")
_EXTENDED_STATUS = struct.Struct(">II")
_ERROR = struct.Struct(">IH")
_OFFSET = struct.Struct(">Q")

# Plain integers: an enum member costs the hot path an attribute look-up each time.
_DONE = int(ChunkFlag.DONE)
_OFFSET_DATA = int(ChunkType.OFFSET_DATA)
_NONE = int(ChunkType.NONE)


class SimpleReplies:
    """For clients that have agreed on nothing else, such as the kernel's (P100, K1)."""

    header_size = _SIMPLE.size
    """Bytes in front of the data of a READ."""
    success_size = _SIMPLE.size
    """Bytes of the reply to what succeeded and returns no data."""

    @staticmethod
    def pack_header(buffer: bytearray, position: int, cookie: int, offset: int, length: int) -> None:
        """Write what goes in front of the ``length`` ≥ 1 bytes of a READ that can no longer fail."""
        _SIMPLE.pack_into(buffer, position, SIMPLE_REPLY_MAGIC, 0, cookie)

    pack_success = pack_header
    """Write the whole reply to a request that succeeded and returns no data."""

    def success(self, cookie: int, offset: int) -> bytes:
        """The whole answer to a request that succeeded and returns no data: also to a READ of 0 bytes (P86)."""
        return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, 0, cookie)

    def error(self, cookie: int, offset: int, errno: Errno, text: str) -> bytes:
        """The whole answer to a request that failed; there is no room for a text."""
        return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, errno, cookie)


class StructuredReplies:
    """Chunks with compact headers (P110); every reply is in chunks, although some could be simple (P102)."""

    header_size = _DATA_CHUNK.size
    success_size = _CHUNK.size
    status_number = ">u4"
    """How numpy calls one of the two numbers of an extent in a block status."""

    @staticmethod
    def pack_header(buffer: bytearray, position: int, cookie: int, offset: int, length: int) -> None:
        """As :meth:`SimpleReplies.pack_header`; the chunk is the whole reply (P114)."""
        _DATA_CHUNK.pack_into(buffer, position, CHUNK_MAGIC, _DONE, _OFFSET_DATA, cookie, _OFFSET.size + length, offset)

    @staticmethod
    def pack_success(buffer: bytearray, position: int, cookie: int, offset: int, length: int) -> None:
        """As :meth:`SimpleReplies.pack_success`: a chunk that ends the reply and says nothing else (P111)."""
        _CHUNK.pack_into(buffer, position, CHUNK_MAGIC, _DONE, _NONE, cookie, 0)

    # The cookie and the offset of the request begin the arguments of every builder: extended headers echo both.

    def success(self, cookie: int, offset: int) -> bytes:
        """As :meth:`SimpleReplies.success`."""
        return self._chunk(cookie, offset, ChunkType.NONE, b"", done=True)

    def error(
        self, cookie: int, offset: int, errno: Errno, text: str, *, at: int | None = None, done: bool = True
    ) -> bytes:
        """A chunk with an error, and with the place ``at`` in the export where it happened, if there is one (P111).

        It is the whole answer, or the end of one, unless more is to come and it is not ``done``. ``text`` is cut to
        what the protocol permits (P121).
        """
        message = bounded_text(text)
        body = _ERROR.pack(errno, len(message)) + message
        if at is None:
            return self._chunk(cookie, offset, ChunkType.ERROR, body, done=done)
        return self._chunk(cookie, offset, ChunkType.ERROR_OFFSET, body + _OFFSET.pack(at), done=done)

    def data_header(self, cookie: int, offset: int, *, at: int, length: int) -> bytes:
        """What goes in front of ``length`` ≥ 1 bytes from ``at`` of the export, one part of a READ; more chunks follow
        (P113)."""
        return self._header(cookie, offset, ChunkType.OFFSET_DATA, _OFFSET.size + length, done=False) + _OFFSET.pack(at)

    def status(self, cookie: int, offset: int, extents: bytes, *, context_id: int, done: bool) -> bytes:
        """A chunk with the status of a range in one context: one or more extents, as pairs of ``status_number`` with
        length and flags (P111, P117). ``done`` with the last selected context."""
        return self._chunk(cookie, offset, ChunkType.BLOCK_STATUS, _STATUS.pack(context_id) + extents, done=done)

    def _chunk(self, cookie: int, offset: int, kind: ChunkType, body: bytes, *, done: bool) -> bytes:
        return self._header(cookie, offset, kind, len(body), done=done) + body

    def _header(self, cookie: int, offset: int, kind: ChunkType, length: int, *, done: bool) -> bytes:
        return _CHUNK.pack(CHUNK_MAGIC, done, kind, cookie, length)


class ExtendedReplies(StructuredReplies):
    """Chunks with extended headers, which echo the offset of the request (P110, P122)."""

    header_size = _EXTENDED_DATA_CHUNK.size
    success_size = _EXTENDED_CHUNK.size
    status_number = ">u8"

    @staticmethod
    def pack_header(buffer: bytearray, position: int, cookie: int, offset: int, length: int) -> None:
        """As :meth:`StructuredReplies.pack_header`."""
        _EXTENDED_DATA_CHUNK.pack_into(
            buffer,
            position,
            EXTENDED_CHUNK_MAGIC,
            _DONE,
            _OFFSET_DATA,
            cookie,
            offset,
            _OFFSET.size + length,
            offset,
        )

    @staticmethod
    def pack_success(buffer: bytearray, position: int, cookie: int, offset: int, length: int) -> None:
        """As :meth:`StructuredReplies.pack_success`."""
        _EXTENDED_CHUNK.pack_into(buffer, position, EXTENDED_CHUNK_MAGIC, _DONE, _NONE, cookie, offset, 0)

    def status(self, cookie: int, offset: int, extents: bytes, *, context_id: int, done: bool) -> bytes:
        """As :meth:`StructuredReplies.status`, with the number of extents in front of them."""
        body = _EXTENDED_STATUS.pack(context_id, len(extents) // 16) + extents
        return self._chunk(cookie, offset, ChunkType.BLOCK_STATUS_EXT, body, done=done)

    def _header(self, cookie: int, offset: int, kind: ChunkType, length: int, *, done: bool) -> bytes:
        return _EXTENDED_CHUNK.pack(EXTENDED_CHUNK_MAGIC, done, kind, cookie, offset, length)


def replies_for(negotiated: Negotiated) -> SimpleReplies | StructuredReplies:
    """The format that was agreed on."""
    if negotiated.extended:
        return ExtendedReplies()
    return StructuredReplies() if negotiated.structured else SimpleReplies()


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

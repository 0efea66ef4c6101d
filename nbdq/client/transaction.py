"""One request and its answer, judged by the letter while it comes in. Pure: bytes and numbers only."""

import struct
from bisect import bisect
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from nbdq.client.wire import parse_text
from nbdq.errors import ProtocolError
from nbdq.nbd.constants import MAXIMUM_STRING, ChunkFlag, ChunkType, Command, CommandFlag, Errno

#: Extents of one chunk that we take; servers should not send more (P117).
MAXIMUM_EXTENTS: Final = 1 << 20

_ERROR = struct.Struct(">IH")
_OFFSET = struct.Struct(">Q")
_HOLE = struct.Struct(">QI")
_ERROR_BIT: Final = 1 << 15
_CONTENT: Final = (ChunkType.OFFSET_DATA, ChunkType.OFFSET_HOLE)


class Extent(NamedTuple):
    """A stretch of one status; where it begins follows from those before it."""

    length: int
    status: int


class _Piece(NamedTuple):
    """A part of what a READ has read; ``start`` is relative to the request. Without data it is all zeros."""

    start: int
    length: int
    data: bytes

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass
class Transaction:
    """A request, and what its answer has told so far. All offsets and lengths in bytes of the export."""

    command: int
    offset: int
    length: int
    flags: int
    contexts: frozenset[int] = frozenset()
    """Ids of the metadata contexts that a BLOCK_STATUS is about."""
    size: int = 0
    """Of the export; no extent reaches beyond it."""

    error: int = 0
    """The first error of the answer, a number of the wire; 0 while there is none."""
    message: str = ""
    extents: dict[int, list[Extent]] = field(default_factory=dict)
    """Metadata context id → its extents."""
    kinds: list[int] = field(default_factory=list)
    """The chunks of the answer, in order; empty for a simple reply."""
    simple: bool = False
    done: bool = False

    _pieces: list["_Piece"] = field(default_factory=list)  # what a READ has read, in ascending order

    @property
    def data(self) -> bytes:
        """What a READ that succeeded has read."""
        return b"".join(piece.data or bytes(piece.length) for piece in self._pieces)

    @property
    def is_read(self) -> bool:
        return self.command == Command.READ

    def check_simple(self, error: int, *, structured: bool, extended: bool) -> None:
        """The header of a simple reply. ``data`` follows a READ without error: :meth:`take_data`.

        Raises:
            ProtocolError: none may come here.
        """
        if extended:
            raise ProtocolError("a simple reply although extended headers were agreed (P122)")
        if structured and self.is_read:
            raise ProtocolError("a simple reply to READ although structured replies were agreed (P102)")
        if self.kinds:
            raise ProtocolError("a simple reply to a request that is being answered in chunks (P102)")
        self.simple = self.done = True
        self.error = error

    def take_data(self, data: bytes) -> None:
        """The data behind a simple reply."""
        self._pieces.append(_Piece(0, len(data), data))

    def limit(self, kind: int) -> int:
        """Bytes that the payload of a chunk of this type can have; more is hostile."""
        if kind & _ERROR_BIT:
            return _ERROR.size + MAXIMUM_STRING + _OFFSET.size + 256
        return {
            ChunkType.OFFSET_DATA: _OFFSET.size + self.length,
            ChunkType.OFFSET_HOLE: _HOLE.size,
            ChunkType.BLOCK_STATUS: 4 + 8 * MAXIMUM_EXTENTS,
            ChunkType.BLOCK_STATUS_EXT: 8 + 16 * MAXIMUM_EXTENTS,
        }.get(ChunkType(kind) if kind in set(ChunkType) else ChunkType.NONE, 0)

    def take_chunk(self, kind: int, flags: int, payload: bytes, *, extended: bool) -> None:
        """One chunk of a structured reply (P110).

        Raises:
            ProtocolError: it breaks a rule, or the answer that it completes does (P111-P117).
        """
        self.kinds.append(kind)
        self.done = bool(flags & ChunkFlag.DONE)
        if kind & _ERROR_BIT:
            self._take_error(kind, payload)
        elif kind == ChunkType.NONE:
            if payload or not self.done:
                raise ProtocolError(f"a NONE chunk with {len(payload)} bytes and flags {flags:#x} (P111)")
        elif kind in _CONTENT and self.is_read:
            self._take_content(kind, payload)
        elif self.command == Command.BLOCK_STATUS and kind in (ChunkType.BLOCK_STATUS, ChunkType.BLOCK_STATUS_EXT):
            if extended != (kind == ChunkType.BLOCK_STATUS_EXT):
                raise ProtocolError(f"a chunk of type {ChunkType(kind).name}: not for these headers (P111, P122)")
            self._take_status(payload, extended=extended)
        else:
            raise ProtocolError(f"a chunk of type {kind:#x} in the answer to {command_name(self.command)} (P111)")
        if self.done and not self.error:
            self._check_complete()

    def _take_error(self, kind: int, payload: bytes) -> None:
        if len(payload) < _ERROR.size:
            raise ProtocolError(f"an error chunk of {len(payload)} bytes (P111)")
        error, length = _ERROR.unpack_from(payload)
        behind = _OFFSET.size if kind == ChunkType.ERROR_OFFSET else 0
        if not error or _ERROR.size + length + behind > len(payload):
            raise ProtocolError(
                f"an error chunk with error {error} and a text of {length} bytes in {len(payload)} (P111)"
            )
        text = parse_text(payload[_ERROR.size : _ERROR.size + length], "the text of an error")
        if behind:
            (offset,) = _OFFSET.unpack_from(payload, _ERROR.size + length)
            if not self.offset <= offset <= self.offset + max(self.length - 1, 0):
                raise ProtocolError(f"an error at {offset}, outside of the request (P111)")
        if not self.error:
            self.error, self.message = error, text

    def _take_content(self, kind: int, payload: bytes) -> None:
        if kind == ChunkType.OFFSET_HOLE:
            if len(payload) != _HOLE.size:
                raise ProtocolError(f"a hole in {len(payload)} bytes instead of {_HOLE.size} (P111)")
            offset, length = _HOLE.unpack(payload)
        else:
            if len(payload) <= _OFFSET.size:
                raise ProtocolError(f"a data chunk of {len(payload)} bytes (P111)")
            (offset,), length = _OFFSET.unpack_from(payload), len(payload) - _OFFSET.size
        if not length:
            raise ProtocolError("a hole of 0 bytes (P111)")
        start = offset - self.offset
        if start < 0 or start + length > self.length:
            raise ProtocolError(f"{length} bytes at {offset}: outside of the request (P113)")
        if self.flags & CommandFlag.DF and self._pieces:
            raise ProtocolError("a second content chunk although the request said DF (P115)")
        piece = _Piece(start, length, payload[_OFFSET.size :] if kind == ChunkType.OFFSET_DATA else b"")
        place = bisect(self._pieces, piece)
        if (place and self._pieces[place - 1].end > start) or (
            place < len(self._pieces) and self._pieces[place].start < piece.end
        ):
            raise ProtocolError(f"{length} bytes at {offset}: they overlap an earlier chunk (P113)")
        self._pieces.insert(place, piece)

    def _take_status(self, payload: bytes, *, extended: bool) -> None:
        head, pair = (8, ">QQ") if extended else (4, ">II")
        size = struct.calcsize(pair)
        if len(payload) < head + size or (len(payload) - head) % size:
            raise ProtocolError(f"a block status of {len(payload)} bytes (P111)")
        context, *count = struct.unpack_from(">II" if extended else ">I", payload)
        extents = [Extent(*both) for both in struct.iter_unpack(pair, payload[head:])]
        if count and count[0] != len(extents):
            raise ProtocolError(f"a block status with {len(extents)} extents that claims {count[0]} (P111)")
        if context not in self.contexts or context in self.extents:
            raise ProtocolError(f"a block status of context {context}: not asked for, or repeated (P117)")
        if not all(extent.length for extent in extents):
            raise ProtocolError("an extent of 0 bytes (P117)")
        total = sum(extent.length for extent in extents)
        if sum(extent.length for extent in extents[:-1]) >= self.length:
            raise ProtocolError("an extent that begins behind the request (P117)")
        if self.flags & CommandFlag.REQ_ONE and (len(extents) != 1 or total > self.length):
            raise ProtocolError(f"{len(extents)} extents of {total} bytes for REQ_ONE and {self.length} bytes (P117)")
        if self.offset + total > self.size:
            raise ProtocolError(f"extents to {self.offset + total}, behind the end of the export at {self.size} (P117)")
        self.extents[context] = extents

    def _check_complete(self) -> None:
        if self.is_read and sum(piece.length for piece in self._pieces) != self.length:
            raise ProtocolError("a READ that succeeded without all of its data (P113)")
        if self.command == Command.BLOCK_STATUS and self.extents.keys() != self.contexts:
            raise ProtocolError(f"block status of {len(self.extents)} contexts instead of {len(self.contexts)} (P117)")


def command_name(command: int) -> str:
    """A command as people call it."""
    return Command(command).name if command in set(Command) else f"command {command}"


def error_name(error: int) -> str:
    """An error number of the wire as people call it."""
    if not error:
        return "success"
    return Errno(error).name if error in set(Errno) else f"error {error}"

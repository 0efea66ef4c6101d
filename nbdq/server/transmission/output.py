"""What waits to be sent on one socket: buffers and pieces of files, in order, not copied unless the files must go.

Knows the socket. Must not know NBD or disks.
"""

import socket
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice

from nbdq.block import FilePiece, Piece
from nbdq.server.tls.stream import SecureStream

#: The kernel takes no more buffers in one sendmsg (IOV_MAX is 1024).
_BUFFERS_MAX = 512


class Output:
    """The unsent tail of one non-blocking socket. Buffers given to it must not change until they have left."""

    def __init__(self, sock: socket.socket | SecureStream) -> None:
        self._socket = sock
        self._stream = sock if isinstance(sock, SecureStream) else None
        self._pieces: deque[Piece] = deque()

    def __bool__(self) -> bool:
        """Whether anything waits."""
        return bool(self._pieces)

    def append(self, piece: Piece) -> None:
        """Queue a buffer or a piece of a file; nothing is sent yet."""
        self._pieces.append(piece)

    def extend(self, pieces: Iterable[Piece]) -> None:
        """Queue several pieces that belong together."""
        self._pieces.extend(pieces)

    def clear(self) -> None:
        """Forget what waits."""
        self._pieces.clear()

    @property
    def file_bytes(self) -> int:
        """Bytes that wait in files."""
        return sum(piece.length for piece in self._pieces if isinstance(piece, FilePiece))

    def copy(self) -> list[memoryview]:
        """All that waits, with pieces of files read into memory; for any thread while nothing is sent.

        Raises:
            OSError: a file cannot be read, or became shorter (P101).
        """
        return [_in_memory(piece) if isinstance(piece, FilePiece) else piece for piece in list(self._pieces)]

    def replace(self, copies: Sequence[memoryview]) -> None:
        """Let ``copies`` take the place of what they are copies of, unless it was given up meanwhile."""
        for index in range(min(len(copies), len(self._pieces))):
            self._pieces[index] = copies[index]

    def flush(self) -> bool:
        """Send what the socket takes now; True when nothing waits any more.

        Raises:
            OSError: the connection is broken. EPIPE also when a file became shorter than a reply that has begun (P101).
        """
        pieces, stream = self._pieces, self._stream
        if stream is not None:
            stream.begin_turn()
        while pieces:
            try:
                if isinstance(pieces[0], FilePiece):
                    self._send_file(pieces[0])
                else:
                    self._send_buffers()
            except BlockingIOError:
                return False
        return stream is None or stream.flush()

    def _send_file(self, piece: FilePiece) -> None:
        storage, offset, length = piece
        if self._stream is not None:
            count = self._stream.send_file(storage, offset, length)
        else:
            count = storage.send(self._socket.fileno(), offset, length)
        if count == 0:
            raise BrokenPipeError(f"{storage.path}: file became shorter while it was being sent")
        if count == length:
            self._pieces.popleft()
        else:
            self._pieces[0] = FilePiece(storage, offset + count, length - count)

    def _send_buffers(self) -> None:
        buffers = []
        flags = 0
        for piece in islice(self._pieces, _BUFFERS_MAX):
            if isinstance(piece, FilePiece):
                flags = socket.MSG_MORE  # the header leaves together with the data behind it
                break
            buffers.append(piece)
        count = self._socket.sendmsg(buffers, (), flags) if len(buffers) > 1 else self._socket.send(buffers[0], flags)
        for buffer in buffers:
            if count < len(buffer):
                self._pieces[0] = buffer[count:]
                return
            count -= len(buffer)
            self._pieces.popleft()


def _in_memory(piece: FilePiece) -> memoryview:
    view = memoryview(bytearray(piece.length))
    if piece.storage.read_into(piece.offset, view) < piece.length:
        raise BrokenPipeError(f"{piece.storage.path}: file became shorter than a reply that has begun")
    return view

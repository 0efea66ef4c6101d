"""Reading a table of records of varying length forwards, in bounded pieces (R-26)."""

from nbdq.errors import CorruptImage
from nbdq.storage import FileStorage

_PIECE = 64 << 10


class TableCursor:
    """A position in a table of an image file; holds one piece of it, whatever the table's size. Not thread-safe."""

    def __init__(self, storage: FileStorage, offset: int, *, name: str) -> None:
        """Begin at ``offset`` of the file; ``name`` is the table's in messages."""
        self._storage = storage
        self._start = offset
        self._name = name
        self._piece = b""
        self._piece_offset = offset
        self._offset = offset

    @property
    def consumed(self) -> int:
        """Bytes from the start of the table to the position."""
        return self._offset - self._start

    def take(self, length: int) -> bytes:
        """The next ``length`` bytes, which the caller has bounded.

        Raises:
            CorruptImage: the file ends before, where QEMU would go on with zeros.
            OSError: the file cannot be read.
        """
        begin = self._offset - self._piece_offset
        if begin + length > len(self._piece):
            self._piece = self._storage.read(self._offset, max(length, _PIECE))
            self._piece_offset, begin = self._offset, 0
            if length > len(self._piece):
                raise CorruptImage(
                    self._storage.path,
                    f"the {self._name} at {self._start:#x} goes on past the end of the file",
                    "the file was cut off: restore the image from a copy",
                )
        self._offset += length
        return self._piece[begin : begin + length]

    def align(self) -> None:
        """Go on at the next multiple of 8 bytes; padding may be missing at the end of the file."""
        self._offset += -self.consumed % 8

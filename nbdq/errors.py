"""Every error that nbdq raises on purpose, in one place.

::

    NbdqError
    ├── ProtocolError          the peer broke the NBD protocol: log it, end that connection
    ├── ImageError             this image cannot be served; carries ``path``
    │   ├── InvalidImage       not an image of the named format, or a header field out of range
    │   ├── UnsupportedImage   a feature that nbdq does not have, by name
    │   ├── CorruptImage       metadata violates an invariant of the format
    │   ├── ImageLocked        another process holds the image
    │   └── ChainError         a backing or data file is missing, looping, too deep, undeclared or refused
    ├── ExportError            an export that cannot be made or found
    └── OperationError         an administrator's request that cannot be done; nothing was changed
        └── NotFound           it names a disk, layer, job, … that does not exist

Block-level failures are plain :class:`OSError` with an errno, the language of the field. ``str(error)`` is always one
line: what, where, and how to mend it. Text that comes from an image or a peer passes through :func:`printable` first.
"""


def printable(text: str | bytes, limit: int = 200) -> str:
    """Foreign text made safe for one line of a terminal or a log: control characters escaped, length bounded."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[:limit])
    return shown + ("…" if len(text) > limit else "")


def in_words(error: Exception) -> str:
    """What a user is told of an error: of a system call the file, if it is known, and the reason."""
    if isinstance(error, OSError):
        where = f"{printable(str(error.filename))}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    return str(error)


class NbdqError(Exception):
    """Root of everything that nbdq raises on purpose."""


class ProtocolError(NbdqError):
    """The peer broke the protocol so that the byte stream can no longer be followed; only its connection ends."""


class ImageError(NbdqError):
    """``path`` cannot be served, because of ``what``; ``mend`` says what the operator can do about it."""

    def __init__(self, path: str, what: str, mend: str = "") -> None:
        self.path = path
        self.what = what
        self.mend = mend
        super().__init__(path, what, mend)

    def __str__(self) -> str:
        return f"{printable(self.path, 1024)}: {self.what}" + (f"; {self.mend}" if self.mend else "")


class InvalidImage(ImageError):
    """Not an image of the expected format, or a field of it holds an impossible value."""


class UnsupportedImage(ImageError):
    """A valid image that uses a feature which nbdq does not have."""


class CorruptImage(ImageError):
    """Metadata violates an invariant of the format."""


class ImageLocked(ImageError):
    """Another process uses the image in a way that excludes us."""


class ChainError(ImageError):
    """The layers of a chain do not make a disk."""


class ExportError(NbdqError):
    """An export that cannot be made or found."""


class OperationError(NbdqError):
    """An operation on a disk that cannot be done; unless the text says otherwise, nothing was changed."""


class NotFound(OperationError):
    """The operation names a disk, layer, export, bitmap or job that does not exist."""

"""Pre-shared keys: the file in which they are, and who may know which of them exist (P65)."""

import hmac
import os
import re
import secrets
import stat

from nbdq.errors import ExportError, printable
from nbdq.storage import FileStorage

#: Bytes of the file; 10,000 keys, and nobody waits for the loop while one of them is looked for.
_FILE_MAX = 1 << 20
_LINE = re.compile(r"([^:\s][^:]*):((?:[0-9a-fA-F]{2})+)")
#: Of a key, as long as those that psktool makes.
_KEY_SIZE = 32


class PresharedKeys:
    """The keys of one file. For one thread, in which all handshakes are done."""

    def __init__(self, keys: dict[str, bytes]) -> None:
        self._keys = [(name.encode(), key) for name, key in keys.items()]
        self.asked: str | None = None
        """The last name that :meth:`key_of` was asked for. TLS asks in the middle of a handshake and does not say in
        which; so whoever goes on with one clears this before and looks at it afterwards."""

    @classmethod
    def load(cls, path: str) -> "PresharedKeys":
        """Read a file of lines ``name:hex``, such as psktool writes.

        Raises:
            ExportError: it cannot be read, is open to everybody, or holds something else.
        """
        try:
            if os.stat(path).st_mode & stat.S_IRWXO:
                raise ExportError(f"the keys in {printable(path)} are open to every user; try 'chmod o= {path}'")
            file = FileStorage.open(path)
            try:
                raw = file.read(0, _FILE_MAX + 1)
            finally:
                file.close()
        except OSError as error:
            raise ExportError(f"cannot read the keys in {printable(path)}: {error.strerror}") from None
        if len(raw) > _FILE_MAX:
            raise ExportError(f"the file of keys {printable(path)} has more than {_FILE_MAX >> 20} MiB")
        return cls(_parse(path, raw))

    def key_of(self, name: str | None) -> bytes:
        """The key of that name. For one that is unknown, a key that nobody has: the handshake then goes on and fails as
        for a wrong key. All names are compared, each in constant time."""
        self.asked = name
        wanted = (name or "").encode()
        found = secrets.token_bytes(_KEY_SIZE)
        for known, key in self._keys:
            if hmac.compare_digest(known, wanted):
                found = key
        return found


def _parse(path: str, raw: bytes) -> dict[str, bytes]:
    keys: dict[str, bytes] = {}
    try:
        lines = raw.decode().splitlines()
    except UnicodeDecodeError:
        raise ExportError(f"the file of keys {printable(path)} is not text") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:  # what the line holds stays secret
            raise ExportError(f"{printable(path)}, line {number}: not a name, a colon and a key in hexadecimal digits")
        name, key = match[1], bytes.fromhex(match[2])
        if name in keys:
            raise ExportError(f"{printable(path)}, line {number}: a second key of {printable(name)!r}")
        keys[name] = key
    if not keys:
        raise ExportError(f"there is no key in {printable(path)}; try 'psktool -u NAME -p {path}'")
    return keys

"""A small NBD server that is right in everything but what it is told to be wrong in.

Written for the probe's tests, from the specification and neither from ``nbdq.nbd`` nor from ``nbdq.client``. A fault
has the name of the check that is to find it. Without a fault this server has to pass every check, so it is a second
opinion about them, too.
"""

import contextlib
import socket
import ssl
import struct
import tempfile
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

ACK, SERVER, INFO, META = 1, 2, 3, 4
UNSUP, POLICY, INVALID, TLS_REQD, UNKNOWN, TOO_BIG, EXT_REQD = (1 << 31 | code for code in (1, 2, 3, 5, 6, 9, 10))
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
EPERM, EINVAL, ENOSPC = 1, 22, 28

#: What every command may carry besides FUA.
FLAGS = {READ: DF, WRITE: 0, FLUSH: 0, TRIM: 0, CACHE: 0, WRITE_ZEROES: NO_HOLE | FAST_ZERO, BLOCK_STATUS: REQ_ONE}
CONTEXTS = ("base:allocation", "x-test:second")
EXPORTS = ("disk", "other")
SIZE = 1 << 20
MAXIMUM = 32 << 20


class Gone(Exception):
    """The client, or this server, ends the connection."""


@dataclass
class State:
    """What a client has agreed on."""

    structured: bool = False
    extended: bool = False
    selected_for: str = ""
    selected: tuple[int, ...] = ()
    listed: int = 0


@dataclass
class FaultyServer:
    """The server, in threads of the test process. A context manager; leaving it ends every connection."""

    fault: str = ""
    tls: ssl.SSLContext | None = None
    """How to encrypt; everything but STARTTLS and ABORT then demands it."""
    selective: bool = False
    """Demand TLS of nothing."""
    read_only: bool = False
    minimum: int = 1
    disk: bytearray = field(default_factory=lambda: bytearray(b"\x5a" * (SIZE // 2) + bytes(SIZE // 2)))

    def __enter__(self) -> Self:
        self._directory = tempfile.TemporaryDirectory(prefix="nbdq-")
        self.path = f"{self._directory.name}/s"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(16)
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._directory.cleanup()

    def stop(self) -> None:
        """Accept nobody any more, and send everybody away; as if the server had crashed."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connected in tuple(self._open):
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                connected, _ = self._listener.accept()
            except OSError:
                return
            self._open.add(connected)
            threading.Thread(target=self._serve, args=[connected], daemon=True).start()

    def _serve(self, connected: socket.socket) -> None:
        client = _Client(self, connected)
        try:
            client.serve()
        except (Gone, OSError):
            pass
        finally:
            with contextlib.suppress(OSError):
                client.socket.shutdown(socket.SHUT_RDWR)
            client.socket.close()
            self._open.discard(connected)


class _Client:
    """One connection."""

    def __init__(self, server: FaultyServer, connected: socket.socket) -> None:
        self.server = server
        self.socket = connected
        self.buffer = bytearray()
        self.state = State()
        self.encrypted = False
        self.zeroes = True

    def bad(self, *faults: str) -> bool:
        return self.server.fault in faults

    # Bytes.

    def take(self, count: int, *, whole: str = "") -> bytes:
        """The next bytes of the client; those of the faults ``whole`` have to come in one piece."""
        begun = bool(self.buffer)
        while len(self.buffer) < count:
            data = self.socket.recv(1 << 18)
            if not data or (begun and whole and self.bad(whole)):
                raise Gone
            begun = True
            self.buffer += data
        taken = bytes(self.buffer[:count])
        del self.buffer[:count]
        return taken

    def skip(self, count: int) -> None:
        while count:
            count -= len(self.take(min(count, 1 << 16)))

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    # The handshake.

    def serve(self) -> None:
        self.send(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 7 if self.bad("hello") else 3))
        (answered,) = struct.unpack(">I", self.take(4))
        if answered & ~3 and not self.bad("unknown-client-flags"):
            raise Gone
        self.zeroes = not answered & 2
        while True:
            self._option()

    def _option(self) -> None:
        header = self.take(16, whole="options-byte-by-byte")
        if header[:8] != b"IHAVEOPT" and not self.bad("wrong-option-magic"):
            raise Gone
        option, length = struct.unpack(">II", header[8:])
        if length > 65536:
            self.skip(length)
            if not self.bad("oversized-option"):
                self.reply(option, TOO_BIG)
            return
        try:
            data = self.take(length)
        except Gone:
            if self.bad("clients-that-leave"):
                self.server.stop()
            raise
        if self.bad("options-in-one-segment") and self.buffer:
            raise Gone
        if option == 10 and not self.bad("a-failed-selection-selects-nothing"):
            self.state.selected_for, self.state.selected = "", ()
        demanded = self.server.tls and not self.encrypted and not self.server.selective
        if demanded and option not in (2, 5) and not self._demand_fault(option):
            if option == 1:
                raise Gone
            self.reply(option, TLS_REQD)
            return
        if self.bad("clients-that-leave") and option > 11:
            time.sleep(0.3)  # until the threads of those who left have noticed
        handlers = {
            1: self._export_name,
            2: self._abort,
            3: self._list,
            5: self._start_tls,
            6: self._info,
            7: self._info,
        }
        handlers |= {8: self._structured, 9: self._contexts, 10: self._contexts, 11: self._extended}
        if handler := handlers.get(option):
            handler(option, data)
        else:
            self.reply(option, ACK if self.bad("unknown-option") else UNSUP, b"no such option")

    def _demand_fault(self, option: int) -> bool:
        return (self.bad("tls-is-demanded-of-all-or-of-exports") and option == 8) or (
            self.bad("export-name-does-not-avoid-tls") and option == 1
        )

    def reply(self, option: int, kind: int, data: bytes = b"") -> None:
        if kind >> 31 and self.bad("texts-of-errors"):
            data = b"\xff"
        self.send(struct.pack(">QIII", 0x0003E889045565A9, option, kind, len(data)) + data)

    def _abort(self, option: int, data: bytes) -> None:
        if not self.bad("abort-is-acknowledged") and not (data and self.bad("data-of-abort-is-ignored")):
            self.reply(option, ACK)
        raise Gone

    def _list(self, option: int, data: bytes) -> None:
        self.state.listed += 1
        if data and not self.bad("data-where-none-belongs"):
            return self.reply(option, INVALID)
        if self.bad("list-exports") or (self.state.listed > 1 and self.bad("list-twice")):
            return self.reply(option, UNSUP)
        if self.bad("tls-refused-or-not"):
            return self.reply(option, TLS_REQD)
        for name in EXPORTS:
            self.reply(option, SERVER, struct.pack(">I", len(name)) + name.encode() + b"for tests")
        return self.reply(option, ACK)

    def _structured(self, option: int, data: bytes) -> None:
        if data:
            return self.reply(option, INVALID)
        if self.state.extended and not self.bad("extended-headers-come-first"):
            return self.reply(option, EXT_REQD)
        self.state.structured = True
        self.state.extended = False
        return self.reply(option, ACK)

    def _extended(self, option: int, data: bytes) -> None:
        if self.bad("extended-headers-or-none"):
            return self.reply(option, POLICY)
        if data:
            return self.reply(option, INVALID)
        if self.bad("extended-headers-come-alone") and not self.state.structured:
            self.state.structured = True
            self.reply(option, ACK)
            raise Gone
        self.state.structured = self.state.extended = True
        return self.reply(option, ACK)

    def _start_tls(self, option: int, data: bytes) -> None:
        if data and not self.bad("data-of-starttls"):
            return self.reply(option, INVALID)
        if self.encrypted:
            return self.reply(option, POLICY if self.bad("tls-within-tls") else INVALID)
        if self.server.tls is None:
            return self.reply(option, ACK if data else POLICY)
        self.reply(option, ACK)
        injected, self.buffer = self.buffer, bytearray()
        if injected and not self.bad("what-is-injected-before-tls"):
            raise Gone
        while self.bad("failed-tls") and self.socket.recv(1, socket.MSG_PEEK) != b"\x16":
            self.take(16)
            self.reply(3, ACK)
        self.socket = self.server.tls.wrap_socket(self.socket, server_side=True)
        self.encrypted = True
        if not self.bad("tls-forgets-what-was-agreed"):
            self.state = State()
        self.buffer = injected
        return None

    def _flags(self, name: str) -> int:
        flags = 0x0D6D  # everything that needs no agreement
        if self.server.read_only:
            flags = flags & ~0x860 | 2
        if (self.state.structured and not self.bad("flags-of-structured-replies")) or self.bad("flags-agree"):
            flags |= 1 << 7
        selected = self.state.selected and self.state.selected_for == name
        if self.state.extended and (selected or self.bad("lists-of-contexts-need-contexts")):
            flags |= 1 << 12
        return flags & ~1 if self.bad("flags-are-there") else flags

    def _info(self, option: int, data: bytes) -> None:
        if self.bad("info") and option == 6:
            return self.reply(option, ACK)
        consistent = len(data) >= 6
        if consistent:
            (length,) = struct.unpack_from(">I", data)
            consistent = length <= len(data) - 6
        if consistent:
            raw = data[4 : 4 + length]
            (count,) = struct.unpack_from(">H", data, 4 + length)
            consistent = len(data) == 6 + length + 2 * count
        if not consistent:
            if self.bad("inconsistent-lengths"):
                return self.reply(option, ACK)
            return self.reply(option, INVALID)
        types = struct.unpack_from(f">{count}H", data, 6 + length)
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            if not self.bad("names-that-are-no-strings"):
                return self.reply(option, INVALID)
            name = "disk"
        if self.bad("unknown-information") and 0x7FFF in types:
            return self.reply(option, INVALID)
        if (self.bad("empty-name") and not name) or (self.bad("longest-name") and len(name) == 4096):
            raise Gone
        if name not in EXPORTS:
            if self.bad("another-try-after-go-failed") and option == 7:
                raise Gone
            if self.bad("unknown-export"):
                self.reply(option, INFO, struct.pack(">HQH", 0, 1, 1))
            return self.reply(option, UNKNOWN, f"no export {name[:100]}".encode())
        size = SIZE + 512 if self.bad("info-says-what-go-says") and option == 6 else self._size()
        self.reply(option, INFO, struct.pack(">HQH", 0, size, self._flags(name)))
        called = "another" if self.bad("name-of-the-export") else name
        self.reply(option, INFO, struct.pack(">H", 1) + called.encode())
        preferred = 1000 if self.bad("block-sizes") else 4096
        self.reply(option, INFO, struct.pack(">HIII", 3, self.server.minimum, preferred, MAXIMUM))
        self.reply(option, ACK)
        if option == 7:
            if self.bad("no-zeroes-behind-go"):
                self.send(bytes(124))
            self._transmit(name)
        return None

    def _size(self) -> int:
        return SIZE - 1 if self.bad("sizes-fit") and self.server.minimum > 1 else SIZE

    def _export_name(self, option: int, data: bytes) -> None:
        name = data.decode()
        if name not in EXPORTS and not self.bad("export-name-of-an-unknown-export"):
            raise Gone
        if self.state.extended and not self.bad("no-export-name-after-extended-headers"):
            raise Gone
        size = SIZE + 512 if self.bad("export-name-says-what-go-says") else SIZE
        self.send(struct.pack(">QH", size, self._flags(name)))
        if self.zeroes != (self.bad("export-name") or self.bad("plain-newstyle")):
            self.send(bytes(124))
        self._transmit(name)

    def _contexts(self, option: int, data: bytes) -> None:
        if option == 10 and not self.state.structured and not self.bad("contexts-need-structured-replies"):
            return self.reply(option, INVALID)
        try:
            strings, position = [], 4
            (length,) = struct.unpack_from(">I", data)
            name = data[position : position + length].decode()
            (count,) = struct.unpack_from(">I", data, position + length)
            position += length + 4
            for _ in range(count):
                (length,) = struct.unpack_from(">I", data, position)
                strings.append(data[position + 4 : position + 4 + length].decode())
                position += 4 + length
            if position != len(data):
                raise ValueError
        except (struct.error, ValueError):
            if self.bad("inconsistent-lengths-of-queries"):
                return self.reply(option, ACK)
            return self.reply(option, INVALID)
        if count > 500:
            if self.bad("many-queries"):
                raise Gone
            return self.reply(option, TOO_BIG)
        if name not in EXPORTS:
            return self.reply(option, UNKNOWN)
        return self._reply_contexts(option, name, strings)

    def _reply_contexts(self, option: int, name: str, queries: list[str]) -> None:
        selecting = option == 10
        if self.bad("unknown-contexts-are-ignored") and "base:nothing" in queries:
            return self.reply(option, INVALID)
        found = [query for query in queries if query in CONTEXTS]
        if not queries and (not selecting or self.bad("nothing-is-selected-by-nothing")):
            found = list(CONTEXTS)
        if "base:" in queries and not selecting and not self.bad("wildcard-of-base"):
            found = [CONTEXTS[0]]
        if not self.bad("ids-are-unique"):
            found = list(dict.fromkeys(found))
        for context in found:
            number = CONTEXTS.index(context) if selecting else 0
            self.reply(option, META, struct.pack(">I", number) + context.encode())
        if selecting:
            self.state.selected_for = name
            self.state.selected = tuple(CONTEXTS.index(context) for context in found)
        return self.reply(option, ACK)

    def _transmit(self, name: str) -> None:
        from tests.probe.faulty_transmission import Transmission  # which imports the names above

        if name not in EXPORTS:
            time.sleep(0.2)
            raise Gone
        chosen = self.state.selected_for == name or self.bad("a-selection-for-another-export")
        Transmission(self, self.state.selected if chosen else ()).serve()
        raise Gone

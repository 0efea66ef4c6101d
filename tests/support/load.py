"""A client that keeps a server busy, believes nothing, and knows at any moment what every sector may read as."""

import contextlib
import threading
from collections.abc import Iterable

from tests.server import client as nbd
from tests.server.client import Client
from tests.support.operations import SECTOR, Operation, Verb, independent

_COMMANDS = {
    Verb.WRITE: (nbd.WRITE, 0),
    Verb.BLANK: (nbd.WRITE, 0),
    Verb.ZERO: (nbd.WRITE_ZEROES, nbd.NO_HOLE),
    Verb.UNMAP: (nbd.WRITE_ZEROES, 0),
    Verb.DISCARD: (nbd.TRIM, 0),
    Verb.FLUSH: (nbd.FLUSH, 0),
    Verb.READ: (nbd.READ, 0),
}
#: Requests under way at once.
_DEPTH = 16


class Ledger:
    """What a disk must read as, sector by sector, if its server could be killed at any moment.

    A sector has the value that the last flush made durable, or any that was written since; more than one only until the
    next flush.
    """

    def __init__(self, content: bytes | bytearray, *, cluster_size: int) -> None:
        self.durable = bytearray(content)
        self.cluster_size = cluster_size
        self._since: dict[int, list[bytes]] = {}

    def issued(self, operation: Operation) -> None:
        """``operation`` is on its way: from now on its sectors may have their new values."""
        start, end = self._changed_by(operation)
        data = operation.payload() if operation.verb is Verb.WRITE else bytes(max(end - start, 0))
        for position in range(0, end - start, SECTOR):
            self._since.setdefault((start + position) // SECTOR, []).append(data[position : position + SECTOR])

    def answered(self, operation: Operation) -> None:
        """Nothing else is under way to the sectors of ``operation``; for a flush, nothing at all."""
        if operation.verb is Verb.FLUSH:
            settled: Iterable[int] = list(self._since)
        elif operation.fua:
            start, end = self._changed_by(operation)
            settled = range(start // SECTOR, end // SECTOR)
        else:
            return
        for sector in settled:
            if sector in self._since:
                self.durable[sector * SECTOR : (sector + 1) * SECTOR] = self._since.pop(sector)[-1]

    def _changed_by(self, operation: Operation) -> tuple[int, int]:
        start, end = operation.offset, operation.offset + operation.length
        if operation.verb in (Verb.FLUSH, Verb.READ):
            return 0, 0
        if operation.verb is Verb.DISCARD:  # whole clusters, also a cut one at the end (T1)
            start = -(-start // self.cluster_size) * self.cluster_size
            end = end if end == len(self.durable) else end // self.cluster_size * self.cluster_size
        return start, max(start, end)

    def current(self, offset: int, length: int) -> bytes:
        """What must be read while the server lives and nothing is under way there."""
        found = bytearray(self.durable[offset : offset + length])
        for sector in range(offset // SECTOR, (offset + length) // SECTOR):
            if sector in self._since:
                found[sector * SECTOR - offset : (sector + 1) * SECTOR - offset] = self._since[sector][-1]
        return bytes(found)

    def judge(self, content: bytes) -> None:
        """Look at the disk after a kill; what it shows is what it is from now on.

        Raises:
            AssertionError: a sector has a value that it may not have.
        """
        assert len(content) == len(self.durable)
        expected = memoryview(self.durable)
        found = memoryview(content)
        if found != expected:
            for sector in range(len(content) // SECTOR):
                here = slice(sector * SECTOR, (sector + 1) * SECTOR)
                lost = found[here] != expected[here] and bytes(found[here]) not in self._since.get(sector, ())
                assert not lost, f"sector {sector} reads as {bytes(found[here][:16]).hex()}, which it may not"
            self.durable[:] = content
        self._since.clear()


class LoadClient:
    """Sends the operations of one part of the disk over one connection, many at a time, and judges every answer."""

    def __init__(self, client: Client, ledger: Ledger, *, origin: int = 0) -> None:
        """The offsets of operations count from ``origin``, and so does ``ledger``."""
        self._client = client
        self._ledger = ledger
        self._origin = origin
        self.answered = 0
        """Requests."""

    def play(self, operations: Iterable[Operation]) -> None:
        """Carry all of them out; those that are under way together have nothing to do with each other.

        Raises:
            OSError, nbd.Disconnected: the server is gone. What was under way may have been carried out.
        """
        for batch in independent(operations, most=_DEPTH, flushes=False):
            self._play_batch(batch)

    def _play_batch(self, batch: list[Operation]) -> None:
        said = []
        waiting: dict[int, Operation] = {}
        for operation in batch:
            command, flags = _COMMANDS[operation.verb]
            flags |= nbd.FUA if operation.fua else 0
            offset = operation.offset + self._origin if operation.verb is not Verb.FLUSH else 0
            header = self._client.pack(command, offset, operation.length, flags=flags)
            waiting[int.from_bytes(header[8:16], "big")] = operation
            said.append(header + operation.payload() if command == nbd.WRITE else header)
            self._ledger.issued(operation)
        # A server may want its replies read before it takes the rest.
        sender = threading.Thread(target=self._send, args=(b"".join(said),))
        sender.start()
        try:
            while waiting:
                self._take_reply(waiting)
        finally:
            sender.join()

    def _send(self, said: bytes) -> None:
        with contextlib.suppress(OSError):  # whoever waits for the replies finds out
            self._client.socket.sendall(said)

    def _take_reply(self, waiting: dict[int, Operation]) -> None:
        reply = self._client.reply()
        operation = waiting.pop(reply.cookie)
        assert reply.error == 0, f"{operation}: errno {reply.error} {reply.message}"
        if operation.verb is Verb.READ:
            expected = self._ledger.current(operation.offset, operation.length)
            assert reply.data == expected, f"{operation} shows something else"
        self._ledger.answered(operation)
        self.answered += 1

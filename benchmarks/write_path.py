"""What a write costs the server, and what a slow medium costs other clients: the server alone, over a disk in memory.

    python benchmarks/write_path.py [--seconds S]

Processor time, not speed: it stays the same on a busy machine. The disk in memory stands for the page cache; what the
kernel would need for the copy is therefore missing. The last table is about the lag of the event loop (R-80): a client
writes to a medium whose every write sleeps, another one reads from a quick one.
"""

import asyncio
import multiprocessing
import os
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import click
import uvloop

from nbdq.server.exports.export import Export, Exports
from nbdq.server.limits import Limits
from nbdq.server.listener import listen_unix
from nbdq.server.server import Server

SIZE = 64 << 20
_REQUEST = struct.Struct(">IHHQQI")


class MemoryDisk:
    """A disk in memory; each write takes ``seconds`` more than it would."""

    size = SIZE

    def __init__(self, seconds: float = 0.0) -> None:
        self._content = memoryview(bytearray(SIZE))
        self._seconds = seconds

    def read_cached(self, offset: int, view: memoryview) -> bool:
        view[:] = self._content[offset : offset + len(view)]
        return True

    def write_cached(self, offset: int, view: memoryview) -> bool:
        self.write(offset, view)
        return True

    def write(self, offset: int, view: memoryview) -> None:
        if self._seconds:
            time.sleep(self._seconds)
        self._content[offset : offset + len(view)] = view

    def gather_cached(self, offset: int, length: int) -> list[memoryview]:
        return [self._content[offset : offset + length]]

    def flush(self) -> None: ...


async def _serve(path: str, medium: float, control: Connection) -> None:
    exports = Exports([Export.writable("quick", MemoryDisk()), Export.writable("slow", MemoryDisk(medium))])
    server = Server(exports, [listen_unix(path)], Limits())
    server.start()
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def answer() -> None:
        if control.recv():
            server.lag.worst, seen = 0.0, server.lag.worst
            control.send((time.process_time(), seen))
        else:
            stop.set()

    loop.add_reader(control.fileno(), answer)
    control.send(None)
    await stop.wait()
    await server.stop()


def _run_server(path: str, medium: float, control: Connection) -> None:
    uvloop.run(_serve(path, medium, control))


class Client:
    """Simple replies only, and a fixed number of requests on their way at once."""

    def __init__(self, path: str, name: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        said = name.encode()
        body = struct.pack(">I", len(said)) + said + b"\0\0"
        self.socket.sendall(b"\0\0\0\3IHAVEOPT" + struct.pack(">II", 7, len(body)) + body)
        self._receive(18)
        while self._option_reply() != 1:
            pass

    def _option_reply(self) -> int:
        _, _, kind, length = struct.unpack(">QIII", self._receive(20))
        self._receive(length)
        return int(kind)

    def _receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            data += self.socket.recv(length - len(data))
        return data

    def rounds(self, command: int, length: int, depth: int, seconds: float) -> tuple[int, float]:
        """Keep ``depth`` requests on their way, one round after the other; how many, and the longest round."""
        payload = bytes(length) if command else b""
        said = b"".join(
            _REQUEST.pack(0x25609513, 0, command, n, (n * 2654435761 * 4096) % (SIZE - length), length) + payload
            for n in range(depth)
        )
        answer = depth * (16 + (0 if command else length))
        count, longest, end = 0, 0.0, time.monotonic() + seconds
        while (begun := time.monotonic()) < end:
            sender = threading.Thread(target=self.socket.sendall, args=(said,)) if len(said) > 200_000 else None
            if sender is not None:
                sender.start()
            else:
                self.socket.sendall(said)
            left = answer
            while left:
                left -= len(self.socket.recv(min(left, 1 << 20)))
            if sender is not None:
                sender.join()
            count += depth
            longest = max(longest, time.monotonic() - begun)
        return count, longest


@click.command()
@click.option("--seconds", type=click.FloatRange(0.1), default=2.0, help="Length of each run (default 2).")
@click.option("--medium", type=float, default=0.05, help="What a write to the slow medium takes (default 0.05 s).")
def main(seconds: float, medium: float) -> None:
    """Measure the server's side of writing."""
    ours, theirs = multiprocessing.Pipe()
    with tempfile.TemporaryDirectory(prefix="nbdq-") as directory:
        path = os.path.join(directory, "socket")
        server = multiprocessing.Process(target=_run_server, args=(path, medium, theirs))
        server.start()
        ours.recv()

        def ask() -> tuple[float, float]:
            ours.send(True)
            answer: tuple[float, float] = ours.recv()
            return answer

        try:
            _costs(path, ask, seconds)
            _lag(path, ask, seconds)
        finally:
            ours.send(False)
            server.join()


def _costs(path: str, ask: Callable[[], tuple[float, float]], seconds: float) -> None:
    click.echo(f"{'request':24} {'depth':>5} {'requests/s':>10} {'processor µs/request':>21}")
    for command, length, depth in (
        (1, 4096, 1),
        (1, 4096, 16),
        (1, 4096, 64),
        (0, 4096, 16),
        (1, 65536, 16),
        (1, 262144, 16),
        (1, 1 << 20, 4),
    ):
        client = Client(path, "quick")
        client.rounds(command, length, depth, seconds / 10)
        before, _ = ask()
        count, _ = client.rounds(command, length, depth, seconds)
        used = ask()[0] - before
        name = f"{'write' if command else 'read'} of {length >> 10} KiB"
        click.echo(f"{name:24} {depth:5} {count / seconds:10.0f} {used / count * 1e6:21.2f}")
        client.socket.close()


def _lag(path: str, ask: Callable[[], tuple[float, float]], seconds: float) -> None:
    click.echo(f"\n{'other client':24} {'reads/s':>10} {'longest wait ms':>16} {'worst lag ms':>13}")
    for name, busy in (("idle", False), ("writes to a slow medium", True)):
        ask()
        reader, writer = Client(path, "quick"), Client(path, "slow")
        thread = threading.Thread(target=writer.rounds, args=(1, 4096, 16, seconds))
        if busy:
            thread.start()
        count, longest = reader.rounds(0, 4096, 1, seconds)
        if busy:
            thread.join()
        _, lag = ask()
        click.echo(f"{name:24} {count / seconds:10.0f} {longest * 1000:16.1f} {lag * 1000:13.1f}")
        reader.socket.close()
        writer.socket.close()


if __name__ == "__main__":
    main()

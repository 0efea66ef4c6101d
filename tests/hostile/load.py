"""Clients that ask for too much, at full scale, and what they cost nbdq and its peers; docs/limits.md has the figures.

    .venv/bin/python -m tests.hostile.load
    .venv/bin/python -m tests.hostile.load --case idle never-read --server nbdq qemu-nbd --scale 0.1

Prints a table of what was measured, and fails if nbdq does not keep what it promises.
"""

import argparse
import contextlib
import resource
import select
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.hostile.subjects import SUBJECTS, Subject, running
from tests.server.client import FLUSH, READ, WRITE, Client, Disconnected, handshake, request, reset

MIB = 1 << 20
#: Options with which nbdq takes as many clients from one place as a case has.
MANY = ("--limit=connections=10000", "--limit=peer-connections=0", "--limit=export-connections=0")


class Failure(Exception):
    """nbdq did not keep a promise."""


def judge(subject: Subject, kept: bool, promise: str) -> None:
    """Peers may do as they like."""
    if subject.name == "nbdq" and not kept:
        raise Failure(promise)


def latency(client: Client, seconds: float = 1.0) -> tuple[float, float]:
    """Median and 99th percentile of the microseconds that a small read takes, one at a time."""
    took, end = [], time.monotonic() + seconds
    while time.monotonic() < end or len(took) < 200:
        begun = time.perf_counter()
        client.read(len(took) * 4096 % (64 * MIB), 4096)
        took.append((time.perf_counter() - begun) * 1e6)
    return statistics.median(took), statistics.quantiles(took, n=100)[98]


@contextlib.contextmanager
def crowd() -> Iterator[list[socket.socket]]:
    """Sockets that are closed in the end."""
    sockets: list[socket.socket] = []
    try:
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


def idle(directory: Path, name: str, scale: float) -> str:
    """5 000 negotiated connections that do nothing."""
    count = int({"nbdkit": 2000, "nbd-server": 300}.get(name, 5000) * scale)  # threads and processes end before memory
    with running(name, directory, *MANY) as subject, subject.go() as active, crowd() as sockets:
        alone, before = latency(active), subject.memory
        begun = time.monotonic()
        more = ""
        for _ in range(count):
            try:
                sockets.append(subject.go(structured=False).socket)
            except (OSError, Disconnected) as error:
                judge(subject, False, f"only {len(sockets)} clients")
                more = f" (then: {error})"
                break
        took = time.monotonic() - begun
        each = (subject.memory - before) / len(sockets) / 1024
        beside = latency(active)
        judge(subject, each < 20, f"{each:.1f} KiB for each idle connection")
    return (
        f"{len(sockets)}{more} in {took:.1f} s, {each:.1f} KiB each; 4 KiB read p50 {alone[0]:.0f} → {beside[0]:.0f} µs"
    )


def silent(directory: Path, name: str, scale: float) -> str:
    """2 000 that connect and say nothing, beside one at work and one that comes later."""
    count = int({"nbdkit": 1000, "nbd-server": 300}.get(name, 2000) * scale)
    with running(name, directory, *MANY) as subject, subject.go() as active, crowd() as sockets:
        alone = latency(active)
        for _ in range(count):
            sockets.append(socket.socket())
            sockets[-1].setblocking(False)
            sockets[-1].connect_ex(subject.address)
        time.sleep(0.5)
        beside = latency(active)
        begun = time.monotonic()
        try:
            with subject.connect() as late:
                late.go(subject.export, structured=False).read(0, 512)
            waited = f"{time.monotonic() - begun:.1f} s"
        except (TimeoutError, Disconnected) as error:
            waited = f"{type(error).__name__} after {time.monotonic() - begun:.1f} s"
            judge(subject, False, f"a late client: {waited}")
        judge(subject, beside[0] < alone[0] * 1.5 + 50, f"p50 {alone[0]:.0f} → {beside[0]:.0f} µs")
    return (
        f"{count}; p50 {alone[0]:.0f} → {beside[0]:.0f}, p99 {alone[1]:.0f} → {beside[1]:.0f} µs; new client {waited}"
    )


def never_read(directory: Path, name: str, scale: float) -> str:
    """200 clients with sixteen reads of 16 MiB each, who take nothing."""
    peers = {"qemu-nbd": 8, "nbdkit": 8, "nbd-server": 8}  # they would take what the machine has
    count = peers.get(name) or max(2, int(200 * scale))
    with running(name, directory, *MANY) as subject, crowd() as sockets:
        before = subject.memory
        said = b"".join(request(READ, number, number * 16 * MIB, 16 * MIB) for number in range(16))
        for _ in range(count):
            client = subject.go(structured=False)
            client.socket.sendall(said)
            sockets.append(client.socket)
        most = 0
        for _ in range(20):
            time.sleep(0.25)
            most = max(most, subject.memory - before)
        judge(subject, most <= 1.2 * 256 * MIB, f"{most >> 20} MiB for {count} clients")
        alive = subject.is_alive
        for sock in sockets:
            sock.close()
        time.sleep(1)
        judge(subject, subject.is_alive, "ended when they hung up")
        end = "" if subject.is_alive or not alive else "; ended when they hung up"
    return f"{count} clients: +{most >> 20} MiB{end}"


def _until_closed(sockets: list[socket.socket], said: bytes, limit: float, healthy: Client) -> tuple[int, float, float]:
    """Send a byte of what is ``said`` to all each second until all are closed: how many are left, the seconds it took,
    and the healthy client's p99."""
    spoken = 0
    poll = select.poll()
    left = {sock.fileno(): sock for sock in sockets}
    for descriptor in left:
        poll.register(descriptor, select.POLLIN)
    begun, worst = time.monotonic(), 0.0
    while left and time.monotonic() - begun < limit:
        for sock in list(left.values()):
            with contextlib.suppress(OSError):
                sock.send(said[spoken : spoken + 1])
        spoken += 1
        worst = max(worst, latency(healthy, 0.9)[1])
        for descriptor, _ in poll.poll(0):
            with contextlib.suppress(BlockingIOError):
                try:
                    if left[descriptor].recv(1000):
                        continue
                except ConnectionError:
                    pass
                poll.unregister(descriptor)
                del left[descriptor]
    return len(left), time.monotonic() - begun, worst


def loris(directory: Path, name: str, scale: float) -> str:
    """500 that send a byte of their handshake each second."""
    count = int({"nbd-server": 200}.get(name, 500) * scale)
    with (
        running(name, directory, *MANY, "--limit=pending-handshakes=600") as subject,
        subject.go() as healthy,
        crowd() as sockets,
    ):
        alone = latency(healthy)
        for _ in range(count):
            sockets.append(subject.connect().socket)
            sockets[-1].setblocking(False)
        left, took, worst = _until_closed(sockets, handshake(subject.export), 25, healthy)
        judge(subject, not left and took < 12, f"{left} left after {took:.1f} s")
    return f"{count}: {left} left after {took:.0f} s; healthy p99 {alone[1]:.0f} → {worst:.0f} µs"


def payloads(directory: Path, name: str, scale: float) -> str:
    """500 that begin a WRITE of 1 MiB and do not go on."""
    count = int({"nbd-server": 200}.get(name, 500) * scale)
    with (
        running(name, directory, *MANY, "--limit=payload-stall-seconds=5") as subject,
        subject.go() as healthy,
        crowd() as sockets,
    ):
        before = subject.memory
        for _ in range(count):
            client = subject.go(structured=False)
            client.socket.sendall(request(WRITE, 1, 0, MIB) + bytes(10_000))
            client.socket.setblocking(False)
            sockets.append(client.socket)
        left, took, worst = _until_closed(sockets, b"", 25, healthy)
        used = subject.memory - before
        judge(subject, not left, f"{left} left after {took:.1f} s")
        judge(subject, used < 300 * MIB, f"{used >> 20} MiB")
    return f"{count}: {left} left after {took:.0f} s; healthy p99 {worst:.0f} µs"


def cuts(directory: Path, name: str, scale: float) -> str:
    """A handshake and a session, cut behind every byte, with a FIN and with a RST."""
    with running(name, directory, *MANY) as subject:
        said = handshake(subject.export, structured=name != "nbd-server") + request(WRITE, 1, 0, 512) + bytes(512)
        said += request(READ, 2, 0, 4096) + request(FLUSH, 3) + request(WRITE, 4, 512, 100) + bytes(100)
        subject.go().socket.close()
        time.sleep(0.5)
        files, rounds = subject.descriptors, 0
        for end in range(0, len(said) + 1, max(1, int(1 / scale))):
            for close in (socket.socket.close, reset):
                with contextlib.suppress(ConnectionError):
                    client = subject.connect()
                    client.socket.sendall(said[:end])
                    close(client.socket)
                rounds += 1
                if not subject.is_alive:
                    judge(subject, False, f"ended at byte {end}")
                    return f"ended at byte {end}"
        time.sleep(1)
        more = subject.descriptors - files
        judge(subject, more <= 0, f"{more} open files more")
        subject.go().read(0, 512)
    return f"{rounds} survived, {more:+} open files"


def files(directory: Path, name: str, scale: float) -> str:
    """No more than 64 open files, and 200 clients who want one each."""
    with running(name, directory, files=64) as subject, subject.go() as active, crowd() as sockets:
        for _ in range(200):
            sockets.append(socket.socket())
            sockets[-1].setblocking(False)
            sockets[-1].connect_ex(subject.address)
        time.sleep(1)
        begun = subject.processor_seconds
        time.sleep(5)
        busy = subject.processor_seconds - begun
        works = True
        try:
            active.read(0, 512)
        except (Disconnected, TimeoutError):
            works = False
        for sock in sockets:
            sock.close()
        time.sleep(2)
        try:
            with subject.connect() as late:
                late.go(subject.export, structured=False).read(0, 512)
            after = "goes on"
        except (Disconnected, TimeoutError, OSError):
            after = "does not go on"
        judge(subject, busy < 0.5 and works and after == "goes on", f"{busy} s of processor time; {after}")
    return f"{busy / 5:.0%} processor while full; {after}{'' if works else '; the client that was there is lost'}"


def come_and_go(directory: Path, name: str, scale: float) -> str:
    """10 000 connections that are closed at once."""
    count = int({"nbd-server": 1000}.get(name, 10_000) * scale)
    with running(name, directory) as subject:
        for _ in range(200):
            subject.connect().socket.close()
        time.sleep(0.5)
        files, memory = subject.descriptors, subject.memory
        begun = time.monotonic()
        for _ in range(count):
            subject.connect().socket.close()
        took = time.monotonic() - begun
        time.sleep(1)
        more, grown = subject.descriptors - files, subject.memory - memory
        judge(subject, more <= 0 and grown < MIB, f"{more} open files, {grown >> 10} KiB more")
    return f"{count} in {took:.1f} s: {more:+} open files, {grown >> 10:+} KiB"


def hang_up(directory: Path, name: str, scale: float) -> str:
    """A client that asks for 16 × 16 MiB and hangs up without reading, again and again (R-13)."""
    count = int(200 * scale)
    said = b"".join(request(READ, number, 0, 16 * MIB) for number in range(16))
    with running(name, directory) as subject, subject.go() as healthy:
        before = subject.memory
        for number in range(count):
            try:
                client = subject.go(structured=False)
                client.socket.sendall(said)
                client.socket.close()
                healthy.read(0, 4096)
            except (OSError, Disconnected):
                judge(subject, False, f"lost in round {number}")
                return f"lost in round {number}{'' if subject.is_alive else ': the server has ended'}"
        time.sleep(1)
        grown = subject.memory - before
        judge(subject, grown < 300 * MIB, f"{grown >> 20} MiB more")
    return f"{count} rounds, {grown >> 20:+} MiB"


CASES: dict[str, Callable[[Path, str, float], str]] = {
    "idle": idle,
    "silent": silent,
    "never-read": never_read,
    "slow-handshake": loris,
    "slow-payload": payloads,
    "cuts": cuts,
    "open-files": files,
    "come-and-go": come_and_go,
    "hang-up": hang_up,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--server", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--scale", type=float, default=1.0)
    wanted = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    failures = 0
    with tempfile.TemporaryDirectory(prefix="nbdq-") as directory:
        for case in wanted.case:
            print(f"\n{case}: {CASES[case].__doc__}", flush=True)
            for server in wanted.server:
                try:
                    said = CASES[case](Path(directory), server, wanted.scale)
                except Failure as failure:
                    failures += 1
                    said = f"FAILED: {failure}"
                except (OSError, AssertionError) as error:
                    failures += server == "nbdq"
                    said = f"broke down: {type(error).__name__}: {error}"
                print(f"  {server:<10}  {said}", flush=True)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())

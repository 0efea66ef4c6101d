"""What is asked of a server, by which client, and the one number that comes out of it.

A workload runs a public client as a process of its own. Besides the number it notes how busy the client was: where one
client thread is on its CPU all the time, the number is the client's and not the server's.
"""

import enum
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Protocol

from servers import Server

RAMP = 0.25  # of the measurement's length, before it
CLIENT_GRACE_S = 120.0
STATUS_LOOP = Path(__file__).with_name("status_loop.py")
ZERO_LOOP = Path(__file__).with_name("zero_loop.py")


class ClientError(Exception):
    """A client failed; the message holds the end of its stderr."""


class Unit(enum.Enum):
    IOPS = "IOPS"
    MIB_PER_S = "MiB/s"
    MS = "ms"
    MIB = "MiB"

    @property
    def more_is_better(self) -> bool:
        return self in (Unit.IOPS, Unit.MIB_PER_S)


@dataclass(frozen=True)
class Sample:
    """One measurement. `busy` is the CPU share of a client with one thread, None where that says nothing."""

    value: float
    busy: float | None = None
    detail: Mapping[str, float] = field(default_factory=dict)


class Workload(Protocol):
    @property
    def unit(self) -> Unit: ...

    def run(self, server: Server, seconds: float) -> Sample: ...


def _client(*argv: str, seconds: float) -> str:
    """Run a client to its end and return its stdout."""
    try:
        done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=seconds + CLIENT_GRACE_S)
    except subprocess.CalledProcessError as error:
        said = " / ".join(error.stderr.strip().splitlines()[-3:])
        raise ClientError(f"{argv[0]} exited with status {error.returncode}: {said}") from error
    except subprocess.TimeoutExpired as error:
        raise ClientError(f"{argv[0]} did not end within {error.timeout:.0f} s") from error
    return done.stdout


def _repeat(*argv: str, seconds: float) -> tuple[list[float], float]:
    """Run a short client until `seconds` have passed, at least once: the wall time of each run, and its CPU share."""
    walls: list[float] = []
    cpu = _children_cpu()
    while sum(walls) < seconds:
        started = time.perf_counter()
        _client(*argv, seconds=seconds)
        walls.append(time.perf_counter() - started)
    return walls, (_children_cpu() - cpu) / sum(walls)


@functools.cache
def libnbd_python() -> str:
    """An interpreter that has libnbd's binding: this one, or the distribution's. Raises ClientError if neither has."""
    for python in (sys.executable, "/usr/bin/python3"):
        if not subprocess.run([python, "-c", "import nbd"], capture_output=True).returncode:
            return python
    raise ClientError("no Python can import nbd; install libnbd's Python binding (python3-libnbd)")


def _children_cpu() -> float:
    times = os.times()
    return times.children_user + times.children_system


@dataclass(frozen=True)
class Fio:
    """fio's nbd engine: one connection, one thread, `depth` requests in flight. Small blocks count in IOPS."""

    rw: str
    block_size: int
    depth: int
    requests: int | None = None
    """So many and no more, instead of as many as fit into the time: for writes that change what the next ones meet."""
    align: int | None = None
    """Offsets of random requests are multiples of this."""
    flush_every: int | None = None
    """Requests between two flushes, for which fio waits."""

    @property
    def unit(self) -> Unit:
        return Unit.IOPS if self.block_size <= 4096 else Unit.MIB_PER_S

    def run(self, server: Server, seconds: float) -> Sample:
        with tempfile.NamedTemporaryFile(suffix=".json") as output:
            _client(
                *("fio", "--name=race", "--ioengine=nbd", f"--uri={server.uri}", f"--rw={self.rw}"),
                *(f"--bs={self.block_size}", f"--iodepth={self.depth}", f"--size={server.image.size}"),
                *self._length(seconds),
                *((f"--blockalign={self.align}",) if self.align else ()),
                *((f"--fsync={self.flush_every}",) if self.flush_every else ()),
                *("--output-format=json", f"--output={output.name}"),
                seconds=seconds,
            )
            text = output.read()
            job = json.loads(text[text.index(b"{") :])["jobs"][0]  # behind what fio has to remark
        side = job["write" if "write" in self.rw else "read"]
        if job["error"] or not side["total_ios"]:
            raise ClientError(f"fio made {side['total_ios']} requests and ended with error {job['error']}")
        return Sample(
            value=side["iops"] if self.unit is Unit.IOPS else side["bw"] / 1024,
            busy=(job["usr_cpu"] + job["sys_cpu"]) / 100,
            detail={"p99_us": side["clat_ns"]["percentile"]["99.000000"] / 1000},
        )

    def _length(self, seconds: float) -> tuple[str, ...]:
        if self.requests is not None:
            return (f"--number_ios={self.requests}",)
        return (
            "--norandommap=1",
            "--time_based",
            f"--runtime={round(seconds * 1000)}ms",
            f"--ramp_time={round(seconds * RAMP * 1000)}ms",
        )


@dataclass(frozen=True)
class OneCore:
    """Another workload with client and server on one core.

    A request that waits for nobody else is then a matter of CPU time. With a core each, most of it is the time that an
    idle core takes to wake up, in a virtual machine more than anything else: a busy neighbour makes the figure better.
    """

    workload: Workload

    @property
    def unit(self) -> Unit:
        return self.workload.unit

    def run(self, server: Server, seconds: float) -> Sample:
        cores = os.sched_getaffinity(0)
        one = {max(cores)}
        try:
            os.sched_setaffinity(0, one)
            server.set_affinity(one)
            return self.workload.run(server, seconds)
        finally:
            server.set_affinity(cores)
            os.sched_setaffinity(0, cores)


@dataclass(frozen=True)
class NbdCopy:
    """nbdcopy to nowhere: asks for the extents, then 256 KiB requests, 64 in flight on each of up to 4 connections."""

    unit: Unit = Unit.MIB_PER_S

    def run(self, server: Server, seconds: float) -> Sample:
        walls, _ = _repeat("nbdcopy", server.uri, "null:", seconds=seconds)
        return Sample(len(walls) * server.image.size / (1 << 20) / sum(walls))


@dataclass(frozen=True)
class NbdCopyIn:
    """nbdcopy from the raw file of an image, over up to 4 connections, ending with a flush."""

    source: Path
    """Below the work directory."""
    unit: Unit = Unit.MIB_PER_S

    def run(self, server: Server, seconds: float) -> Sample:
        source = server.work_dir / self.source
        started = time.perf_counter()
        _client("nbdcopy", str(source), server.uri, seconds=seconds)
        return Sample(source.stat().st_size / (1 << 20) / (time.perf_counter() - started))


@dataclass(frozen=True)
class ZeroLoop:
    """The whole disk made zero, 1 GiB at a time, and flushed."""

    unit: Unit = Unit.MS

    def run(self, server: Server, seconds: float) -> Sample:
        answer = json.loads(_client(libnbd_python(), str(ZERO_LOOP), server.uri, seconds=seconds))
        return Sample(answer["seconds"] * 1000)


@dataclass(frozen=True)
class NbdinfoMap:
    """nbdinfo --map, from the tool's start to its end, its printing included."""

    unit: Unit = Unit.MS

    def run(self, server: Server, seconds: float) -> Sample:
        walls, busy = _repeat("nbdinfo", "--map", server.uri, seconds=seconds)
        return Sample(median(walls) * 1000, busy)


@dataclass(frozen=True)
class StatusLoop:
    """The whole map over one connection that is open already: what the server and the wire take.

    With `first_only`, one pass: on a fresh server this includes building whatever later passes find built.
    """

    first_only: bool = False
    unit: Unit = Unit.MS

    def run(self, server: Server, seconds: float) -> Sample:
        budget = 0 if self.first_only else seconds
        answer = json.loads(_client(libnbd_python(), str(STATUS_LOOP), server.uri, str(budget), seconds=seconds))
        return Sample(median(answer["seconds"]) * 1000, answer["busy"], {"extents": answer["extents"]})


@dataclass(frozen=True)
class Startup:
    """From before the fork to the greeting. Needs a fresh server."""

    unit: Unit = Unit.MS

    def run(self, server: Server, seconds: float) -> Sample:
        return Sample(server.startup_s * 1000)


@dataclass(frozen=True)
class PeakRss:
    """The most memory that the server ever held, after random reads, a whole copy and a map. Needs a fresh server."""

    unit: Unit = Unit.MIB

    def run(self, server: Server, seconds: float) -> Sample:
        for workload in (Fio("randread", 4096, 64), NbdCopy(), StatusLoop()):
            workload.run(server, seconds / 2)
        return Sample(server.peak_rss_mib())

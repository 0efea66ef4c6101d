"""Taking turns: every case in several rounds, in each of which every contestant is measured once, in random order."""

import os
import random
import resource
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Self

from cases import Case
from images import MIB, PLAIN, Image
from results import CaseResult, Conditions, Measurement
from servers import Server, ServerError, ServerKind, Servers
from workloads import ClientError

VERIFY_DEADLINE_S = 120.0
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def content_error(server: Server) -> str | None:
    """What qemu-img finds if it compares what the server serves with the image. A fast wrong answer wins nothing."""
    argv = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", server.uri, str(server.image_path)]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=VERIFY_DEADLINE_S)
    except subprocess.TimeoutExpired:
        return f"qemu-img compare got no end of it within {VERIFY_DEADLINE_S:.0f} s"
    return None if done.returncode == 0 else f"{done.stdout} {done.stderr} (the server: {server.last_words()})"


class Race:
    """Runs cases on servers that neighbouring cases of one image share, so that metadata is warm after the first."""

    def __init__(
        self,
        work_dir: Path,
        ours: ServerKind,
        rivals: Sequence[ServerKind],
        *,
        rounds: int,
        seconds: float,
        retries: int,
    ) -> None:
        self._servers = Servers(work_dir)
        self._work_dir = work_dir
        self._ours = ours
        self._rivals = rivals
        self._rounds = rounds
        self._seconds = seconds
        self._retries = retries

    def run(self, cases: Sequence[Case]) -> Iterator[CaseResult]:
        """One result per case, as soon as it is there. A case that cannot run says so in its result."""
        for image, group in groupby(cases, key=lambda case: case.image):
            try:
                failure = self._verify(image)
                for case in group:
                    yield self._run_case(case, failure)
            finally:
                self._servers.stop_all()

    def _verify(self, image: Image) -> str | None:
        try:
            return content_error(self._servers.get(self._ours, image))
        except ServerError as error:
            return str(error)

    def _contestants(self, case: Case) -> list[tuple[str, ServerKind, Image]]:
        ours = (self._ours.label, self._ours, case.image)
        if case.own_rival is not None:
            return [ours, (f"{self._ours.label} on {case.own_rival.name}", self._ours, case.own_rival)]
        return [ours, *((kind.label, kind, case.image) for kind in self._rivals if not kind.raw or case.image is PLAIN)]

    def _run_case(self, case: Case, failure: str | None) -> CaseResult:
        contestants = self._contestants(case)
        rivals = tuple(label for label, kind, _ in contestants[1:] if not kind.raw)
        result = CaseResult(case, self._ours.label, rivals, failure=failure)
        if failure is not None:
            return result
        for image in {image.name: image for _, _, image in contestants}.values():
            image.warm(self._work_dir)
        try:
            for _ in range(self._rounds):
                for label, kind, image in random.sample(contestants, len(contestants)):
                    result.measurements.setdefault(label, []).append(self._measure_in_peace(case, kind, image))
        except (ServerError, ClientError) as error:
            result.failure = str(error)
        return result

    def _measure_in_peace(self, case: Case, kind: ServerKind, image: Image) -> Measurement:
        """The first undisturbed measurement, or else the least disturbed: chosen by the load, never by the value."""
        attempts: list[Measurement] = []
        while not attempts or (attempts[-1].disturbed and len(attempts) <= self._retries):
            attempts.append(self._measure(case, kind, image))
        return min(attempts, key=lambda attempt: attempt.conditions.other_cores)

    def _measure(self, case: Case, kind: ServerKind, image: Image) -> Measurement:
        if case.writes:
            with self._servers.writing(kind, image) as server:
                return self._run_workload(case, server, _Clocks.read(server))
        if not case.fresh:
            server = self._servers.get(kind, image)
            return self._run_workload(case, server, _Clocks.read(server))
        before = _Clocks.read(None)
        with self._servers.fresh(kind, image) as server:
            return self._run_workload(case, server, before)

    def _run_workload(self, case: Case, server: Server, before: "_Clocks") -> Measurement:
        sample = case.workload.run(server, self._seconds)
        server.check_alive()
        return Measurement(sample, before.until(_Clocks.read(server)))


@dataclass(frozen=True)
class _Clocks:
    """What can be told only from the difference of two readings."""

    wall_s: float
    server_s: float
    """CPU time of the server."""
    race_s: float
    """CPU time of this process and of the clients. A server becomes part of it when it is reaped, not before."""
    machine_s: float
    """CPU time in which a core was neither idle nor waiting, or was taken away by the hypervisor."""
    disk_bytes: int

    @classmethod
    def read(cls, server: Server | None) -> Self:
        """Of a server that is about to start, where None is given."""
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        return cls(
            wall_s=time.monotonic(),
            server_s=server.cpu_seconds() if server else 0.0,
            race_s=sum(one.ru_utime + one.ru_stime for one in usage),
            machine_s=(user + nice + system + irq + softirq + steal) / _TICKS_PER_SECOND,
            disk_bytes=server.disk_bytes() if server else 0,
        )

    def until(self, later: Self) -> Conditions:
        elapsed_s = later.wall_s - self.wall_s
        server_s = later.server_s - self.server_s
        other_s = later.machine_s - self.machine_s - server_s - (later.race_s - self.race_s)
        return Conditions(
            server_cores=server_s / elapsed_s,
            other_cores=max(0.0, other_s) / elapsed_s,
            disk_mib=(later.disk_bytes - self.disk_bytes) / MIB,
        )

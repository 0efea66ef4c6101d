"""The numbers of a server for Prometheus (docs/metrics.md says what each means). Imported only where they are wanted.

Nothing is counted here: what the parts of the server count anyway is read when somebody asks, on the loop thread; what
may wait for a file system, and the making of the text, is left to a thread. No number is kept for a client, because
there may be any number of those in the life of a server.
"""

import asyncio
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from nbdq.chain.bitmaps import list_bitmaps, written_image
from nbdq.chain.clusters import ClusterCache
from nbdq.chain.disk import ChainDisk
from nbdq.chain.live import LiveChain
from nbdq.chain.overlay import OverlayDisk
from nbdq.durations import BOUNDS, Durations
from nbdq.nbd.constants import Command
from nbdq.nbd.ending import Cause
from nbdq.server.exports.export import Export
from nbdq.server.exports.volume import Volume
from nbdq.server.monitoring.counters import Counters
from nbdq.server.server import Server
from nbdq.server.threads import in_thread
from nbdq.storage import SYNC_TIMES

#: The format that every Prometheus reads.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: A page that took longer to make is good for so many times as long.
_LONG_SECONDS, _REST = 0.1, 4

_OPERATIONS = {command: command.name.lower() for command in Command if command is not Command.DISC}
#: Ends of handshakes that are no failures: clients that listed the exports, or looked whether somebody listens.
_PEACEFUL = (Cause.ABORT, Cause.CLOSED, Cause.SHUTDOWN)


class Metrics:
    """All numbers of one server. Loop thread only."""

    def __init__(
        self,
        server: Server,
        volumes: Iterable[Volume],
        clusters: ClusterCache,
        jobs: Callable[[], Iterable[dict[str, Any]]],
        *,
        version: str,
    ) -> None:
        """``volumes`` is looked at anew each time; ``jobs`` tells of each job as QEMU's JobInfo does."""
        self._server = server
        self._volumes = volumes
        self._clusters = clusters
        self._jobs = jobs
        self._version = version
        self._making: asyncio.Task[bytes] | None = None
        self._process = ProcessCollector(registry=CollectorRegistry())

    async def page(self) -> bytes:
        """All of them as text. Who asks while it is being made gets the same; and so, if that took long, does who asks
        soon after: thousands of exports make it a second's work, and whoever can connect may ask all the time."""
        if self._making is None:
            self._making = asyncio.create_task(self._make())
        return await asyncio.shield(self._making)

    async def _make(self) -> bytes:
        begun = monotonic()
        page = b""
        try:
            page = await self._collect()
        finally:
            seconds = monotonic() - begun
            if page and seconds > _LONG_SECONDS:
                asyncio.get_running_loop().call_later(_REST * seconds, self._forget)
            else:
                self._forget()
        return page

    def _forget(self) -> None:
        self._making = None

    async def _collect(self) -> bytes:
        volumes = list(self._volumes)
        exports = [export for volume in volumes for export in volume.exports]
        families = [
            *_of_exports(exports),
            *_of_requests(volumes),
            *self._of_connections(),
            *self._of_memory(volumes),
            *_of_jobs(list(self._jobs())),
            *self._of_process(),
        ]
        chains = [(volume.name, volume.chain) for volume in volumes]
        return await in_thread(self._rendered, families, chains)

    def _rendered(self, families: list[Metric], chains: Sequence[tuple[str, LiveChain]]) -> bytes:
        return generate_latest(_Collected([*families, *_of_disks(chains), *self._process.collect()]))

    def _of_connections(self) -> Iterator[Metric]:
        census, visits = self._server.census, self._server.resources.visits
        connections = GaugeMetricFamily("nbdq_connections", "Clients that are connected.", labels=["state"])
        connections.add_metric(["handshake"], census.negotiating)
        connections.add_metric(["transmission"], len(census) - census.negotiating)
        yield connections
        ends = CounterMetricFamily("nbdq_disconnects", "Connections that ended, by cause.", labels=["reason"])
        failures = CounterMetricFamily(
            "nbdq_handshake_failures", "Handshakes that failed, by cause.", labels=["reason"]
        )
        for cause in Cause:
            ends.add_metric([cause], visits.served[cause] + visits.in_handshake[cause])
            if cause not in _PEACEFUL:
                failures.add_metric([cause], visits.in_handshake[cause])
        yield from (ends, failures)

    def _of_memory(self, volumes: Iterable[Volume]) -> Iterator[Metric]:
        budget, clusters = self._server.resources.budget, self._clusters
        yield _gauge("nbdq_inflight_bytes", "Memory of requests and unsent replies.", budget.taken)
        yield _gauge("nbdq_budget_bytes", "What nbdq_inflight_bytes may become.", budget.total)
        for name, text, value in (
            ("nbdq_cache_hits", "Compressed clusters that were in the cache when wanted.", clusters.hits),
            ("nbdq_cache_misses", "Compressed clusters that had to be inflated when wanted.", clusters.misses),
        ):
            family = CounterMetricFamily(name, text, labels=["cache"])
            family.add_metric(["clusters"], value)
            yield family
        built = CounterMetricFamily("nbdq_index_windows_built", "Windows of the chain index.", labels=["disk"])
        cached = GaugeMetricFamily("nbdq_cache_bytes", "Memory of caches.", labels=["cache", "disk"])
        cached.add_metric(["clusters", ""], clusters.cached_bytes)
        for volume in volumes:
            device = volume.chain.device
            below = device.below if isinstance(device, OverlayDisk) else device
            if isinstance(below, ChainDisk):
                built.add_metric([volume.name], below.index.windows_built)
                cached.add_metric(["index", volume.name], below.index.cached_bytes)
        yield from (built, cached)

    def _of_process(self) -> Iterator[Metric]:
        lag = self._server.lag
        yield _gauge("nbdq_loop_lag_worst_seconds", "Longest lag since this was asked last.", lag.worst)
        lag.worst = 0.0
        lags = HistogramMetricFamily("nbdq_loop_lag_seconds", "How late the event loop did what was due.", labels=[])
        _add_durations(lags, [], lag.durations)
        yield lags
        syncs = HistogramMetricFamily("nbdq_sync_seconds", "Time of each fdatasync of an image file.", labels=[])
        _add_durations(syncs, [], SYNC_TIMES.durations)
        yield syncs
        failures = CounterMetricFamily("nbdq_sync_failures", "Syncs that failed: what was written may be lost.")
        failures.add_metric([], SYNC_TIMES.failures)
        yield failures
        certificate = GaugeMetricFamily(
            "nbdq_certificate_expiry_timestamp_seconds", "When the server's certificate expires.", labels=[]
        )
        if self._server.tls is not None and self._server.tls.expires is not None:
            certificate.add_metric([], self._server.tls.expires)
        yield certificate
        build = GaugeMetricFamily("nbdq_build_info", "Always 1.", labels=["version", "python"])
        build.add_metric([self._version, platform.python_version()], 1)
        yield build


class _Collected:
    """What the library asks for the metrics to print."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _gauge(name: str, text: str, value: float) -> Metric:
    family = GaugeMetricFamily(name, text)
    family.add_metric([], value)
    return family


def _add_durations(family: HistogramMetricFamily, labels: Sequence[str], durations: Durations) -> None:
    buckets, count = [], 0
    for bound, there in zip((*map(str, BOUNDS), "+Inf"), list(durations.classes), strict=True):
        count += there
        buckets.append((bound, count))
    family.add_metric(labels, buckets, durations.seconds)


_EXPORT_GAUGES: Sequence[tuple[str, str, Callable[[Export], float]]] = (
    ("nbdq_export_connections", "Clients of the export.", lambda export: export.connection_count),
    (
        "nbdq_inflight_requests",
        "Requests that wait for a disk or a flush.",
        lambda export: export.gate.in_progress(export),
    ),
    ("nbdq_export_held", "1 while requests of its clients are held back.", lambda export: export.is_held),
    (
        "nbdq_export_throttled",
        "Clients that wait because of the export's rate.",
        lambda export: 0 if export.throttle is None else export.throttle.waiting,
    ),
    ("nbdq_export_size_bytes", "Size of the export.", lambda export: export.info.size),
)


def _of_exports(exports: Iterable[Export]) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "nbdq_export_requests", "Requests that were answered.", labels=["export", "op", "status"]
    )
    transferred = CounterMetricFamily(
        "nbdq_export_bytes", "Bytes that requests with success were about.", labels=["export", "op"]
    )
    seconds = CounterMetricFamily(
        "nbdq_export_request_seconds", "Time that requests took, all together.", labels=["export", "op"]
    )
    gauges = [GaugeMetricFamily(name, text, labels=["export"]) for name, text, _ in _EXPORT_GAUGES]
    for export in exports:
        total = export.account.total
        for command, operation in _OPERATIONS.items():
            for status, count in total.results(command).items():
                requests.add_metric([export.id, operation, status], count)
            transferred.add_metric([export.id, operation], total.bytes_done(command))
            seconds.add_metric([export.id, operation], total.durations[command].seconds)
        for gauge, (_, _, value) in zip(gauges, _EXPORT_GAUGES, strict=True):
            gauge.add_metric([export.id], value(export))
    yield from (requests, transferred, seconds, *gauges)


def _of_requests(volumes: Iterable[Volume]) -> Iterator[Metric]:
    total = Counters()
    for volume in volumes:
        total.add(volume.counters())
    times = HistogramMetricFamily(
        "nbdq_request_duration_seconds", "Time from taking a request to handing on its reply.", labels=["op"]
    )
    for command, operation in _OPERATIONS.items():
        _add_durations(times, [operation], total.durations[command])
    yield times


def _of_jobs(jobs: Sequence[dict[str, Any]]) -> Iterator[Metric]:
    states = GaugeMetricFamily("nbdq_jobs", "Jobs of administrators, by state.", labels=["state"])
    for state, count in Counter(job["status"] for job in jobs).items():
        states.add_metric([state], count)
    progress = GaugeMetricFamily("nbdq_job_progress_ratio", "How much of a job is done.", labels=["job", "type"])
    for job in jobs:
        if job["total-progress"]:
            progress.add_metric([job["id"], job["type"]], job["current-progress"] / job["total-progress"])
    yield from (states, progress)


def _of_disks(chains: Sequence[tuple[str, LiveChain]]) -> Iterator[Metric]:
    """What may have to ask a file system, and counts bits. Not on the loop; a chain may change meanwhile, and then a
    number is missing that the next time is there."""
    depth = GaugeMetricFamily("nbdq_chain_depth", "Layers of the disk, its top included.", labels=["disk"])
    allocated = GaugeMetricFamily(
        "nbdq_layer_allocated_bytes", "Space that a layer's file takes; the top has depth 0.", labels=["disk", "depth"]
    )
    latched = GaugeMetricFamily(
        "nbdq_write_latched", "1 after a failed write or sync, when nothing is written any more.", labels=["disk"]
    )
    dirty = GaugeMetricFamily("nbdq_dirty_bytes", "Metadata in memory that waits for a flush.", labels=["disk"])
    bitmaps = GaugeMetricFamily(
        "nbdq_bitmap_dirty_bytes", "Bytes of the disk that a dirty bitmap marks.", labels=["disk", "bitmap"]
    )
    for name, chain in chains:
        layers, device = chain.layers, chain.device
        depth.add_metric([name], len(layers))
        for number, layer in enumerate(layers):
            with suppress(OSError):
                allocated.add_metric([name, str(number)], layer.storage.allocated_size())
        latched.add_metric([name], any(layer.storage.failure is not None for layer in layers))
        if isinstance(device, OverlayDisk):
            dirty.add_metric([name], device.top.mapping.dirty_bytes)
        written = written_image(device)
        if written is not None:
            for bitmap in list_bitmaps(written):
                bitmaps.add_metric([name, bitmap.name], bitmap.dirty_length)
    yield from (depth, allocated, latched, dirty, bitmaps)

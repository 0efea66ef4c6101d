"""The options of ``nbdq serve`` that let monitoring in, and the pages it finds there."""

from collections.abc import Awaitable, Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any

import click

import nbdq
from nbdq.chain.clusters import ClusterCache
from nbdq.cli.options import Mode, together
from nbdq.errors import ExportError, printable
from nbdq.server.exports.volume import Volume
from nbdq.server.listener import Listener, listen_tcp, listen_unix
from nbdq.server.monitoring.http import HttpServer, Page
from nbdq.server.server import Server


@dataclass(frozen=True)
class MetricsSettings:
    """Where monitoring finds the pages /metrics, /healthz and /readyz."""

    listen: str | None = None
    """``ADDRESS:PORT``, ``:PORT`` for the loopback, or the path of a unix socket. Nowhere if it is not given."""
    mode: Annotated[int, Mode()] = 0o600
    """File mode of the unix socket."""

    def __post_init__(self) -> None:
        """
        Raises:
            ExportError: that is no place to listen at.
        """
        if self.listen is not None and self.socket is None:
            _host_and_port(self.listen)

    @property
    def socket(self) -> str | None:
        """Path of the unix socket, if it is one."""
        return self.listen if self.listen is not None and "/" in self.listen else None


#: The options that ``metrics_settings`` takes.
metrics_options = together(
    click.option(
        "--metrics",
        metavar="ADDRESS:PORT|PATH",
        help="Serve /metrics (Prometheus), /healthz and /readyz here by HTTP; an empty address is 127.0.0.1.",
    ),
    click.option(
        "--metrics-mode",
        type=Mode(),
        default="0600",
        show_default=True,
        help="File mode of the unix socket of --metrics.",
    ),
)


def metrics_settings(metrics: str | None, metrics_mode: int) -> MetricsSettings:
    """What the options of :func:`metrics_options` say.

    Raises:
        click.UsageError: ``metrics`` is no place to listen at.
    """
    try:
        return MetricsSettings(metrics, metrics_mode)
    except ExportError as error:
        raise click.UsageError(f"--metrics: {error}") from None


def listen_for_monitoring(settings: MetricsSettings, given: Listener | None, undo: ExitStack) -> list[Listener]:
    """The sockets that are wanted, or the one that was ``given`` to us; none if there is to be no monitoring. ``undo``
    closes them.

    Raises:
        click.UsageError: one is wanted, and another one was given.
        ExportError: they cannot be had.
    """
    if given is not None:
        undo.callback(given.close)
        if settings.listen is not None:
            raise click.UsageError("metrics are asked for on the socket of socket activation; leave out --metrics")
        return [given]
    if settings.listen is None:
        return []
    if settings.socket is not None:
        listeners = [listen_unix(settings.socket, mode=settings.mode)]
    else:
        listeners = listen_tcp(*_host_and_port(settings.listen))
    for listener in listeners:
        undo.callback(listener.close)
    return listeners


def _host_and_port(text: str) -> tuple[str, int]:
    address, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 0xFFFF:
        raise ExportError(f"{printable(text)!r} is neither ADDRESS:PORT, such as 127.0.0.1:9809, nor a path with a /")
    return address.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


class Monitoring:
    """The pages of one server. Loop thread only."""

    def __init__(
        self,
        listeners: list[Listener],
        server: Server,
        volumes: Iterable[Volume],
        clusters: ClusterCache,
        jobs: Callable[[], Iterable[dict[str, Any]]],
    ) -> None:
        """Answer from now on at ``listeners``, which are ours; without any, do nothing. ``jobs`` tells of each job as
        QEMU's JobInfo does."""
        self.is_ready = False
        """Whether clients can connect, to all that is to be there: what /readyz says."""
        pages: dict[str, Callable[[], Awaitable[Page]]] = {"/healthz": self._health, "/readyz": self._readiness}
        if listeners:
            from nbdq.server.monitoring.metrics import (  # takes 50 ms, for which nobody else has to wait
                CONTENT_TYPE,
                Metrics,
            )

            metrics = Metrics(server, volumes, clusters, jobs, version=nbdq.__version__)

            async def numbers() -> Page:
                return Page(await metrics.page(), content_type=CONTENT_TYPE)

            pages["/metrics"] = numbers
        self._http = HttpServer(listeners, pages)
        self._http.start()

    async def _health(self) -> Page:
        return Page(b"ok\n")

    async def _readiness(self) -> Page:
        return Page(b"ready\n") if self.is_ready else Page(b"not ready\n", 503)

    async def stop(self) -> None:
        """Answer no more."""
        self.is_ready = False
        await self._http.stop()

"""Metrics over HTTP: what is counted, what is documented, and what hostile HTTP clients cost."""

import asyncio
import json
import os
import re
import signal
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nbdq.cli.serve.metrics import MetricsSettings, listen_for_monitoring
from nbdq.errors import ExportError
from nbdq.nbd.ending import Cause
from nbdq.server.listener import listen_unix
from nbdq.server.monitoring import http
from nbdq.server.monitoring import metrics as metrics_module
from nbdq.server.monitoring.http import HttpServer, Page
from nbdq.server.monitoring.metrics import Metrics
from nbdq.storage import SYNC_TIMES, FileStorage
from tests.qcow2.minimal import minimal_image
from tests.server.client import FLUSH, READ, TRIM, Client, handshake, option
from tests.support.serving import Server, refusal, serve
from tests.support.tools import requires, run

ROOT = Path(__file__).parents[2]
PATIENCE = 30


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(minimal_image())
    return path


@pytest.fixture
def server(image: Path, tmp_path: Path) -> Iterator[Server]:
    """One with a page of metrics on a unix socket, and an export "disk"."""
    with serve("--metrics", tmp_path / "web", "--admin", tmp_path / "admin", "-x", "disk", image) as running:
        yield running


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """A server as above, and its page, for tests that leave it as it was."""
    directory = tmp_path_factory.mktemp("lasting")
    (directory / "disk.qcow2").write_bytes(minimal_image())
    with serve("--metrics", directory / "web", "-x", "disk", directory / "disk.qcow2") as running:
        yield running, str(directory / "web")


@pytest.fixture
def web(tmp_path: Path) -> str:
    return str(tmp_path / "web")


def ask(address: str | tuple[str, int], request: bytes) -> bytes:
    """All that comes back."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(address)
        answer = b""
        try:
            sock.sendall(request)
            while more := sock.recv(1 << 16):
                answer += more
        except ConnectionError:  # hung up before it had read everything
            pass
        return answer


def get(address: str | tuple[str, int], path: str) -> tuple[int, str]:
    """Status and body."""
    answer = ask(address, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}\r\n".encode() in head + b"\r\n"
    return int(head.split()[1]), body.decode()


Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(address: str | tuple[str, int]) -> Samples:
    """Every sample of the page, as Prometheus reads it."""
    status, page = get(address, "/metrics")
    assert status == 200
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


def wait_until(server: Server, web: str, name: str, wanted: float, **labels: str) -> Samples:
    """The page as soon as it has that number; a client hears of its end before the server has counted it."""
    deadline = time.monotonic() + PATIENCE
    while value(samples := scrape(web), name, **labels) != wanted:
        assert time.monotonic() < deadline, (name, value(samples, name, **labels))
        time.sleep(0.01)
    return samples


# What is counted.


@requires("qemu-io")
def test_what_clients_did_is_counted_by_export_operation_and_result(server: Server, web: str) -> None:
    run("qemu-io", "-f", "raw", "-c", "write 0 96k", "-c", "write -z 128k 4k", "-c", "flush", server.uri("disk"))
    with Client(str(server.socket)).go("disk") as client:
        for _ in range(5):
            client.read(0, 4096)
        assert client.error(READ, 1 << 40, 512)
        assert client.error(FLUSH) == 0
    samples = wait_until(server, web, "nbdq_export_connections", 0, export="disk")

    def count(op: str, status: str = "ok") -> float:
        return value(samples, "nbdq_export_requests_total", export="disk", op=op, status=status)

    assert (count("write"), count("write_zeroes"), count("trim")) == (1, 1, 0)
    assert (count("read", "invalid"), count("read", "error")) == (1, 0)
    assert count("read") >= 5
    assert count("flush") >= 2
    assert value(samples, "nbdq_export_bytes_total", export="disk", op="write") == 96 << 10
    assert value(samples, "nbdq_export_bytes_total", export="disk", op="write_zeroes") == 4096
    assert value(samples, "nbdq_sync_seconds_count") > 0
    assert value(samples, "nbdq_chain_depth", disk="disk") == 1
    assert value(samples, "nbdq_layer_allocated_bytes", disk="disk", depth="0") >= 96 << 10
    for op in ("read", "write", "flush", "trim"):
        times = value(samples, "nbdq_request_duration_seconds_count", op=op)
        assert times == count(op) + count(op, "error"), f"{op}: every request has a time"
        assert (value(samples, "nbdq_request_duration_seconds_sum", op=op) > 0) == bool(times)
        assert value(samples, "nbdq_request_duration_seconds_bucket", op=op, le="+Inf") == times


def test_counters_outlive_the_connections_that_counted(server: Server, web: str) -> None:
    for number in range(1, 4):
        with Client(str(server.socket)).go("disk") as client:
            client.read(0, 512)
            during = scrape(web)
            assert value(during, "nbdq_export_requests_total", export="disk", op="read", status="ok") == number
            assert value(during, "nbdq_connections", state="transmission") == 1
        after = wait_until(server, web, "nbdq_connections", 0, state="transmission")
        assert value(after, "nbdq_export_requests_total", export="disk", op="read", status="ok") == number


def test_query_blockstats_shows_the_same_counters_under_qemu_names(server: Server, web: str, tmp_path: Path) -> None:
    with Client(str(server.socket)).go("disk") as client:
        client.read(0, 4096)
        client.read(8192, 512)
        assert client.error(TRIM, 0, 65536) == 0
        samples = scrape(web)
        said = run("python3", "-c", _BLOCKSTATS, str(tmp_path / "admin"))
    stats = json.loads(said)["stats"]
    assert stats["rd_operations"] == 2
    assert stats["rd_bytes"] == value(samples, "nbdq_export_bytes_total", export="disk", op="read")
    assert stats["unmap_operations"] == 1
    seconds = value(samples, "nbdq_export_request_seconds_total", export="disk", op="read")
    assert stats["rd_total_time_ns"] == pytest.approx(seconds * 1e9, abs=2)
    histogram = stats["rd_latency_histogram"]
    assert len(histogram["bins"]) == len(histogram["boundaries"]) + 1
    assert sum(histogram["bins"]) == 2
    assert histogram["boundaries"] == sorted(histogram["boundaries"])


_BLOCKSTATS = """
import json, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
file = sock.makefile("rw")
file.readline()
for command in ("qmp_capabilities", "query-blockstats"):
    print(json.dumps({"execute": command}), file=file, flush=True)
    answer = json.loads(file.readline())
print(json.dumps(answer["return"][0]))
"""


@pytest.mark.parametrize(
    ("said", "reason", "failed"),
    [
        (b"", Cause.CLOSED, False),
        (handshake("disk")[:20], Cause.CLOSED, False),
        (b"GET / HTTP/1.1\r\n\r\n", Cause.PROTOCOL, True),
        ((3).to_bytes(4, "big") + option(2), Cause.ABORT, False),
        ((3).to_bytes(4, "big") + option(1, b"nowhere"), Cause.REFUSED, True),
    ],
)
def test_every_end_of_a_handshake_has_a_reason(
    server: Server, web: str, said: bytes, reason: Cause, failed: bool
) -> None:
    """P141, W7."""
    with Client(str(server.socket)) as client:
        client.socket.sendall(said)
        client.hello()
        client.socket.shutdown(socket.SHUT_WR)
        while client.socket.recv(4096):
            pass
    samples = wait_until(server, web, "nbdq_disconnects_total", 1, reason=reason)
    failures = {key: count for key, count in samples.items() if key[0] == "nbdq_handshake_failures_total" and count}
    assert bool(failures) == failed
    if failed:
        assert value(samples, "nbdq_handshake_failures_total", reason=reason) == 1


def test_the_end_of_an_exports_client_has_a_reason(server: Server, web: str) -> None:
    with Client(str(server.socket)).go("disk") as client:
        client.socket.sendall(bytes(28))
        assert client.is_closed()
    samples = wait_until(server, web, "nbdq_disconnects_total", 1, reason="protocol")
    assert value(samples, "nbdq_handshake_failures_total", reason="protocol") == 0


@requires("qemu-img")
def test_compressed_clusters_are_hits_and_misses_of_the_cache(tmp_path: Path) -> None:
    source, image = tmp_path / "source", tmp_path / "compressed.qcow2"
    source.write_bytes(b"squeeze" * 40_000)
    run("qemu-img", "convert", "-c", "-O", "qcow2", "-f", "raw", source, image)
    with serve("-r", "--metrics", tmp_path / "web", "-x", "disk", image) as server:
        with Client(str(server.socket)).go("disk") as client:
            for _ in range(3):
                assert client.read(0, 7) == b"squeeze"
        samples = scrape(str(tmp_path / "web"))
    assert value(samples, "nbdq_cache_misses_total", cache="clusters") == 1
    assert value(samples, "nbdq_cache_hits_total", cache="clusters") >= 2
    assert value(samples, "nbdq_cache_bytes", cache="clusters", disk="") >= 65536
    assert value(samples, "nbdq_cache_bytes", cache="index", disk="disk") > 0
    assert value(samples, "nbdq_index_windows_built_total", disk="disk") == 1


def test_a_failed_sync_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.touch()
    storage = FileStorage(os.open(path, os.O_RDWR), str(path))

    def fail(descriptor: int) -> None:
        raise OSError(5, "bad sector")

    before = SYNC_TIMES.failures, SYNC_TIMES.durations.count
    storage.sync()
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match=r"bad sector|Input/output"):
        storage.sync()
    storage.close()
    assert (SYNC_TIMES.failures - before[0], SYNC_TIMES.durations.count - before[1]) == (1, 2)


def test_names_of_exports_can_be_anything(image: Path, tmp_path: Path) -> None:
    name = 'a"b\\c\nd{e="f"} ü'
    with serve("--metrics", tmp_path / "web", "-x", name, image):
        assert value(scrape(str(tmp_path / "web")), "nbdq_export_connections", export=name) == 0


# Where it is, and what it says of the server.


def test_monitoring_listens_on_the_loopback_unless_told_otherwise(image: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with serve("--metrics", f":{port}", image) as server:
        assert get(("127.0.0.1", port), "/healthz") == (200, "ok\n")
        shown = run("ss", "-ltnH", f"sport = :{port}") if _has_ss() else f"127.0.0.1:{port}"
        assert f"127.0.0.1:{port}" in shown
        assert server.process.poll() is None


def _has_ss() -> bool:
    return any(os.access(Path(folder, "ss"), os.X_OK) for folder in os.get_exec_path())


def test_the_socket_for_monitoring_is_ours_alone_and_goes_with_the_server(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "web"
    with serve("--metrics", path, image):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


@pytest.mark.parametrize("place", ["9809", "host", "1.2.3.4:x", "127.0.0.1:65536", ":", "::1:"])
def test_a_place_that_is_none_is_refused(place: str) -> None:
    with ExitStack() as undo, pytest.raises(ExportError, match="is neither ADDRESS:PORT"):
        listen_for_monitoring(MetricsSettings(place), None, undo)


def test_a_place_that_is_taken_is_refused_in_one_line(image: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        (line,) = refusal("--metrics", f":{taken.getsockname()[1]}", image).splitlines()
    assert "Address already in use" in line


def test_a_server_that_stops_is_alive_but_not_ready(server: Server, web: str) -> None:
    assert get(web, "/readyz") == (200, "ready\n")
    with Client(str(server.socket)).go("disk") as client:
        for _ in range(64):
            client.send(READ, 0, 1 << 20)  # whose replies nobody takes for now
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while (ready := get(web, "/readyz")) != (503, "not ready\n"):
            assert time.monotonic() < deadline, ready
            time.sleep(0.01)
        assert get(web, "/healthz") == (200, "ok\n")


def test_a_page_that_is_none_tells_which_there_are(lasting: tuple[Server, str]) -> None:
    _, web = lasting
    status, body = get(web, "/../etc/passwd")
    assert status == 404
    assert {"/metrics", "/healthz", "/readyz"} == set(body.split())
    assert get(web, "/healthz?verbose=1") == (200, "ok\n")


@requires("curl")
def test_a_real_client_reads_the_page(lasting: tuple[Server, str]) -> None:
    _, web = lasting
    assert "nbdq_build_info" in run("curl", "-sf", "--unix-socket", web, "http://nbdq/metrics")
    assert "200 OK" in run("curl", "-sfI", "--unix-socket", web, "http://nbdq/healthz")


# Hostile clients.


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\r\n\r\n", b"400"),
        (b"NBDMAGICIHAVEOPT\r\n\r\n", b"400"),
        (b"GET /metrics\r\n\r\n", b"400"),
        (b"GET /metrics SPDY/1\r\n\r\n", b"400"),
        (b"\xff\xfe \x00 HTTP/1.1\r\n\r\n", b"405"),
        (b"GET /\xff\xfe HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n", b"405"),
        (b"GET " + b"/" * 100_000, b"431"),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 2000 + b"\r\n", b"431"),
        (b"GET /metrics HTTP/1.1\r\n", None),
    ],
)
def test_what_is_no_request_costs_its_connection(
    lasting: tuple[Server, str], request_bytes: bytes, status: bytes | None
) -> None:
    server, web = lasting
    if status is None:  # says no more
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(web)
            sock.sendall(request_bytes)
    else:
        answer = ask(web, request_bytes)
        assert not answer or answer.split()[1] == status  # a reset may take the answer along
    assert get(web, "/healthz") == (200, "ok\n")
    with Client(str(server.socket)).go("disk") as client:
        client.read(0, 512)
    assert "Traceback" not in server.stderr


@pytest.mark.parametrize("said", [b"", b"GET /metrics HTTP/1.1\r\nX-Slow: "])
def test_those_who_do_not_go_on_keep_nobody_from_the_disk_or_from_monitoring(
    lasting: tuple[Server, str], said: bytes
) -> None:
    server, web = lasting
    with ExitStack() as held:
        for _ in range(40):
            sock = held.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(web)
            sock.sendall(said)
        with Client(str(server.socket)).go("disk") as client:
            client.read(0, 512)
        for _ in range(20):
            assert get(web, "/healthz") == (200, "ok\n")


@pytest.mark.parametrize("reads", [False, True])
def test_who_is_slow_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: bool) -> None:
    """One that sends no request, and one that does not take its answer."""
    monkeypatch.setattr(http, "_SECONDS", 0.1)
    path = str(tmp_path / "web")

    async def large() -> Page:
        return Page(bytes(64 << 20))

    async def serve_one() -> float:
        server = HttpServer([listen_unix(path)], {"/": large})
        server.start()
        begun = time.monotonic()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            if reads:
                sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            while not server._tasks:
                await asyncio.sleep(0.01)
            await asyncio.wait(server._tasks)
        await server.stop()
        return time.monotonic() - begun

    assert asyncio.run(serve_one()) < PATIENCE


def test_a_page_that_fails_says_so_and_the_log_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> Page:
        raise ValueError("secret")

    async def serve_one() -> bytes:
        path = str(tmp_path / "web")
        server = HttpServer([listen_unix(path)], {"/": broken})
        server.start()
        try:
            return await asyncio.to_thread(ask, path, b"GET / HTTP/1.1\r\n\r\n")
        finally:
            await server.stop()

    answer = asyncio.run(serve_one())
    assert b" 500 " in answer
    assert b"secret" not in answer
    assert "ValueError: secret" in caplog.text


# What is documented, and what is made of it.


def documented() -> set[str]:
    """The names of all metrics in docs/metrics.md."""
    rows = [line for line in (ROOT / "docs/metrics.md").read_text().splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def test_every_metric_is_documented_and_every_documented_metric_exists(lasting: tuple[Server, str]) -> None:
    _, web = lasting
    _, page = get(web, "/metrics")
    shown = set(re.findall(r"^# HELP (\w+)", page, re.MULTILINE))
    assert shown == documented()


@pytest.mark.parametrize("name", ["dashboard.json", "alerts.yml"])
def test_examples_ask_only_for_metrics_that_exist(name: str) -> None:
    text = (ROOT / "examples/monitoring" / name).read_text()
    used = set(re.findall(r"\b((?:nbdq|process)_\w+)\b", text))
    assert used
    known = documented()
    assert {re.sub(r"_(bucket|count|sum)$", "", name) if name not in known else name for name in used} <= known


def test_the_dashboard_asks_each_panel_something(lasting: tuple[Server, str]) -> None:
    _, web = lasting
    dashboard = json.loads((ROOT / "examples/monitoring/dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) >= len(dashboard["panels"]) > 10
    labels = {key for _, pairs in scrape(web) for key, _ in pairs} | {"instance"}
    for expression in expressions:
        assert expression.count("(") == expression.count(")")
        assert expression.count("{") == expression.count("}")
        assert set(re.findall(r"(\w+)(?:=~|!=|=)", expression)) <= labels


def test_every_reason_of_a_disconnection_is_documented() -> None:
    (row,) = [
        line for line in (ROOT / "docs/metrics.md").read_text().splitlines() if "`nbdq_disconnects_total`" in line
    ]
    assert {f"`{cause}`" for cause in Cause} <= set(re.findall(r"`[a-z-]+`", row))


def test_the_page_is_made_once_for_all_who_ask_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With thousands of exports it is a second's work, and whoever can connect may ask all the time."""
    made = 0

    async def collect(metrics: Metrics) -> bytes:
        nonlocal made
        made += 1
        await asyncio.sleep(0.01)
        return b"%d" % made

    async def ask_often() -> list[bytes]:
        metrics = Metrics(cast(Any, None), (), cast(Any, None), list, version="")
        together = await asyncio.gather(*(metrics.page() for _ in range(10)))
        return [*together, await metrics.page()]

    monkeypatch.setattr(Metrics, "_collect", collect)
    assert asyncio.run(ask_often()) == [b"1"] * 10 + [b"2"]
    monkeypatch.setattr(metrics_module, "_LONG_SECONDS", 0)
    assert asyncio.run(ask_often()) == [b"3"] * 11

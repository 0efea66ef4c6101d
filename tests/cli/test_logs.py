"""The log of a server, as people and machines read it."""

import io
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdq.cli.logs import LimitedHandler, configure_logging
from nbdq.server.admission.peer import Peer
from tests.qcow2.minimal import minimal_image
from tests.server.client import EIO, READ, Client
from tests.support.serving import Server, serve
from tests.support.tools import requires, run

PATIENCE = 30


@pytest.fixture(autouse=True)
def keep_root_logger() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(minimal_image())
    return path


def test_a_json_log_is_one_object_a_line_whatever_the_message_holds(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(verbosity=1, log_format="json")
    logging.getLogger("nbdq.test").info("client %r left", 'a"\nb')
    (line,) = capsys.readouterr().err.splitlines()
    record = json.loads(line)
    assert record["msg"] == "client 'a\"\\nb' left"
    assert (record["level"], record["logger"]) == ("info", "nbdq.test")
    assert record["ts"].endswith("Z")


def test_a_json_log_keeps_a_traceback_inside_its_object(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(verbosity=0, log_format="json")
    try:
        raise ValueError("reason")
    except ValueError:
        logging.getLogger("nbdq.test").exception("failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert "ValueError: reason" in json.loads(line)["exc"]


def test_a_line_that_names_a_client_has_it_as_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(verbosity=0, log_format="json")
    logging.getLogger("nbdq.test").warning("%s: refused: %s", Peer(7, "192.0.2.1:999"), "no")
    record = json.loads(capsys.readouterr().err)
    assert (record["conn"], record["client"]) == (7, "192.0.2.1:999")
    assert record["msg"] == "#7 192.0.2.1:999: refused: no"


@pytest.mark.parametrize(("verbosity", "shown"), [(0, "W"), (1, "IW"), (2, "DIW"), (9, "DIW")])
def test_each_v_shows_more_of_the_log(capsys: pytest.CaptureFixture[str], verbosity: int, shown: str) -> None:
    configure_logging(verbosity=verbosity, log_format="text")
    logger = logging.getLogger("nbdq.test")
    logger.debug("D")
    logger.info("I")
    logger.warning("W")
    assert "".join(line[-1] for line in capsys.readouterr().err.splitlines()) == shown


def test_a_text_log_is_one_line_a_record_whatever_the_message_holds(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(verbosity=0, log_format="text")
    logging.getLogger("nbdq.test").warning("client %s left", "a\nnbdq: ERROR: forged\x1b[2J")
    assert capsys.readouterr().err == "nbdq: WARNING: client a\\nnbdq: ERROR: forged\\x1b[2J left\n"


class Log:
    """What one handler writes in memory."""

    def __init__(self, **options: Any) -> None:
        self.stream = io.StringIO()
        self.handler = LimitedHandler(stream=self.stream, **options)
        self.handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        self.logger = logging.getLogger("nbdq.test.limits")
        self.logger.handlers[:] = [self.handler]
        self.logger.propagate = False
        self.logger.setLevel(logging.DEBUG)

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()


def test_a_warning_that_comes_too_often_is_counted_instead_of_written() -> None:
    log = Log()
    for number in range(1000):
        log.logger.warning("client %d is bad", number)
    assert log.lines == [f"WARNING: client {number} is bad" for number in range(20)]
    log.logger.warning("another matter")
    assert log.lines[20:] == ["WARNING: another matter"]
    log.handler.close()
    assert log.lines[21:] == ["WARNING: … and 980 more like: client 999 is bad"]


def test_what_was_left_out_is_told_when_the_minute_is_over() -> None:
    log = Log(seconds=0.05)

    def complain() -> None:
        log.logger.error("bad")

    for _ in range(30):
        complain()
    written = len(log.lines)
    deadline = time.monotonic() + PATIENCE
    while not any("more like" in line for line in log.lines):
        assert time.monotonic() < deadline, log.lines
        time.sleep(0.01)
    complain()
    assert log.lines[-1] == "ERROR: bad", "a new minute begins with nothing said"
    assert written < 30


def test_lines_about_clients_have_a_limit_and_debugging_and_the_audit_have_none() -> None:
    log = Log()
    for _ in range(2000):
        log.logger.info("closed")
        log.logger.debug("thought")
    assert (log.lines.count("INFO: closed"), log.lines.count("DEBUG: thought")) == (1000, 2000)
    audit = logging.getLogger("nbdq.audit")
    audit.addHandler(log.handler)
    try:
        for _ in range(100):
            audit.warning("root: quit")
    finally:
        audit.removeHandler(log.handler)
    assert log.lines.count("WARNING: root: quit") == 100


def test_every_line_for_the_journal_begins_with_its_priority() -> None:
    log = Log(journal=True)
    log.logger.warning("one")
    log.logger.info("two")
    try:
        raise ValueError("reason")
    except ValueError:
        log.logger.exception("three")
    assert log.lines[:3] == ["<4>WARNING: one", "<6>INFO: two", "<3>ERROR: three"]
    assert all(line.startswith("<3>") for line in log.lines[2:])


@pytest.mark.parametrize("leads_there", [True, False])
def test_the_journal_is_known_by_what_systemd_says_of_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leads_there: bool
) -> None:
    with (tmp_path / "log").open("w+") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + (not leads_there)}")
        monkeypatch.setattr("sys.stderr", stream)
        configure_logging(verbosity=0, log_format="text")
        logging.getLogger("nbdq.test").warning("hello")
        assert (tmp_path / "log").read_text() == ("<4>hello\n" if leads_there else "nbdq: WARNING: hello\n")


# A server's own lines.


def wait_for(server: Server, count: int) -> list[str]:
    """The lines of the log, as soon as there are so many."""
    deadline = time.monotonic() + PATIENCE
    while server.stderr.count("\n") < count:
        assert time.monotonic() < deadline, server.stderr
        time.sleep(0.01)
    return server.stderr.splitlines()


def records(lines: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines]


@requires("qemu-io")
def test_a_connection_is_one_line_at_its_end_that_says_what_it_did(image: Path) -> None:
    with serve("-v", "--log-format=json", "-x", "disk", image) as server:
        run("qemu-io", "-f", "raw", "-c", "write 0 8k", "-c", "read 0 4k", server.uri("disk"))
        (record,) = records(wait_for(server, 1))
    assert (record["event"], record["cause"], record["conn"], record["export"]) == ("closed", "disconnect", 1, "disk")
    assert record["client"] == f"unix:{os.getuid()}"
    assert record["written"] == 8192
    assert record["read"] >= 4096
    assert record["requests"] >= 3
    assert 0 <= record["duration"] < PATIENCE
    assert record["msg"].startswith(f"#1 unix:{os.getuid()}: export 'disk' for ")


def test_who_only_looks_whether_somebody_listens_is_not_worth_a_line(image: Path) -> None:
    """P15."""
    with serve("-v", image) as server:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(server.socket))
            assert sock.recv(18)
        with Client(str(server.socket)) as client:
            client.socket.sendall(b"GET / HTTP/1.0\r\n\r\n")
            client.hello()
            assert client.is_closed()
        (line,) = wait_for(server, 1)
    assert "#2 unix:" in line
    assert "client flags" in line


def test_a_failed_request_names_its_connection(image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(3 << 16)
        file.write((1 << 63 | 1 << 40).to_bytes(8, "big"))  # an L2 table far behind the end of the file
    with serve("--log-format=json", "-r", "-x", "disk", image) as server:
        with Client(str(server.socket)).go("disk") as client:
            assert client.error(READ, 0, 4096) == EIO
        (record,) = [record for record in records(wait_for(server, 1)) if "READ of" in record["msg"]]
    assert (record["level"], record["conn"], record["export"]) == ("warning", 1, "disk")
    assert record["msg"].startswith(f"#1 unix:{os.getuid()}: READ of 4096 bytes at 0: ")

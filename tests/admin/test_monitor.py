"""The admin socket as its clients see it: QEMU's own library, hostile ones, and many at once."""

import asyncio
import contextlib
import json
import os
import socket
import stat
import tempfile
import threading
from pathlib import Path

import pytest
from qemu.qmp import QMPClient
from qemu.qmp.error import QMPError

from nbdq.admin import monitor
from nbdq.admin.client import AdminError, Client
from nbdq.admin.monitor import Access
from nbdq.errors import ExportError
from nbdq.server.listener import listen_unix
from tests.admin.laboratory import AdminServer


def _lines(sock: socket.socket, count: int) -> list[dict[str, object]]:
    file = sock.makefile("rb")
    return [json.loads(file.readline()) for _ in range(count)]


def _negotiated(server: AdminServer) -> socket.socket:
    sock = server.raw()
    sock.sendall(b'{"execute": "qmp_capabilities"}\n')
    return sock


def test_the_qemu_qmp_library_works_unchanged(server: AdminServer) -> None:
    async def talk() -> None:
        client = QMPClient("test")
        await client.connect(server.path)
        names = {entry["name"] for entry in await client.execute("query-commands")}
        assert {"query-version", "query-jobs", "job-cancel", "x-nbdq-help"} <= names
        assert (await client.execute("query-version"))["qemu"]["major"] == 7
        assert await client.execute("query-status") == {"status": "running", "singlestep": False, "running": True}
        with pytest.raises(QMPError, match="not found"):
            await client.execute("job-cancel", {"id": "nobody"})
        with client.listener("X_TEST") as listener:
            await client.execute("x-test-events", {"count": 3})
            assert [(await listener.get())["data"]["number"] for _ in range(3)] == [0, 1, 2]
        await client.disconnect()

    asyncio.run(asyncio.wait_for(talk(), 20))


def test_nothing_is_executed_before_the_negotiation_and_it_happens_once(server: AdminServer) -> None:
    with server.raw() as sock:
        sock.sendall(b'{"execute": "query-status", "id": 1} {"execute": "qmp_capabilities", "id": 2}\n')
        sock.sendall(b'{"execute": "qmp_capabilities", "id": 3}{"execute": "query-name", "id": 4}')
        greeting, early, agreed, again, name = _lines(sock, 5)
    assert greeting["QMP"]["capabilities"] == []  # type: ignore[index]
    assert early["error"]["class"] == again["error"]["class"] == "CommandNotFound"  # type: ignore[index]
    assert "qmp_capabilities" in early["error"]["desc"]  # type: ignore[index]
    assert agreed == {"return": {}, "id": 2}
    assert name == {"return": {}, "id": 4}


def test_unknown_capabilities_are_refused_and_the_negotiation_goes_on(server: AdminServer) -> None:
    with server.raw() as sock:
        sock.sendall(b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}\n{"execute": "query-name"}\n')
        _, refused, early = _lines(sock, 3)
    assert "oob" in refused["error"]["desc"]  # type: ignore[index]
    assert early["error"]["class"] == "CommandNotFound"  # type: ignore[index]


@pytest.mark.parametrize(
    ("command", "arguments", "kind", "text"),
    [
        ("frobnicate", {}, "CommandNotFound", "The command frobnicate has not been found"),
        ("job-cancel", {}, "GenericError", "Parameter 'id' is missing"),
        ("job-cancel", {"id": 1}, "GenericError", "Invalid parameter type for 'id', expected: string"),
        ("job-cancel", {"id": None}, "GenericError", "Invalid parameter type for 'id', expected: string"),
        ("job-cancel", {"id": "a", "b": 1}, "GenericError", "Parameter 'b' is unexpected"),
        ("job-cancel", {"id": "a\0"}, "GenericError", "NUL"),
        ("job-cancel", {"id": "\ud800"}, "GenericError", "not valid Unicode"),
        ("job-cancel", {"id": "a"}, "DeviceNotFound", "Job 'a' not found"),
        ("block-job-cancel", {"device": "a"}, "DeviceNotActive", "Block job 'a' not found"),
        ("block-job-set-speed", {"device": "a", "speed": True}, "GenericError", "expected: integer"),
        ("block-job-set-speed", {"device": "a", "speed": 1 << 70}, "GenericError", "64 bits"),
        ("x-test-bug", {}, "GenericError", "internal error"),
    ],
)
def test_a_refused_command_says_why_and_harms_nobody(
    server: AdminServer, command: str, arguments: dict[str, object], kind: str, text: str
) -> None:
    with server.client() as client:
        with pytest.raises(AdminError) as refusal:
            client.call(command, arguments)
        assert refusal.value.kind == kind
        assert text in str(refusal.value)
        assert client.call("query-name") == {}


@pytest.mark.parametrize(
    "garbage",
    [b"\x00\x01\x02\xff" * 50, b"GET / HTTP/1.1\r\n\r\n", b'{"execute": "x"]', b"{" * 20 + b"\xff", b"]]]]\n"],
)
def test_a_client_that_sent_garbage_can_go_on(server: AdminServer, garbage: bytes) -> None:
    with _negotiated(server) as sock:
        _lines(sock, 2)
        sock.sendall(garbage + b'\n\xff{"execute": "query-name", "id": "end"}\n')
        file = sock.makefile("rb")
        while (answer := json.loads(file.readline())).get("id") != "end":
            assert answer["error"]["class"] == "GenericError"
        assert answer["return"] == {}


@pytest.mark.parametrize(
    "flood", [b'{"execute": "' + b"x" * (2 << 20), b'{"a": ' + b"[" * 1000, b'{"a": "' * (1 << 18)]
)
def test_a_request_without_end_ends_its_connection_and_no_other(server: AdminServer, flood: bytes) -> None:
    with server.client() as other, _negotiated(server) as sock:
        with contextlib.suppress(OSError):  # cut off in the middle
            sock.sendall(flood)
        received = b""
        try:
            while data := sock.recv(1 << 16):
                received += data
        except ConnectionResetError:
            pass
        assert other.call("query-name") == {}
    assert received.count(b"\n") <= 3


def test_events_that_a_busy_client_has_not_read_yet_wait_for_it(server: AdminServer) -> None:
    with server.client() as busy, server.client() as other:
        other.call("x-test-events", {"count": 1000, "length": 200})
        events = busy.events()
        assert [next(events)["data"]["number"] for _ in range(1000)] == list(range(1000))


def test_a_client_that_never_reads_loses_only_itself(server: AdminServer) -> None:
    with _negotiated(server) as deaf, server.client() as other:
        _lines(deaf, 2)
        for _ in range(20):
            other.call("x-test-events", {"count": 10, "length": 1 << 16})
            assert other.call("query-name") == {}
        received = 0
        try:
            while data := deaf.recv(1 << 20):
                received += len(data)
        except ConnectionResetError:
            pass
        assert received < 20 * 10 << 16


def test_a_client_that_asks_and_does_not_read_is_not_answered_without_end(server: AdminServer) -> None:
    with _negotiated(server) as deaf, server.client() as other:
        _lines(deaf, 2)
        deaf.setblocking(False)
        asked = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                asked += deaf.send(b'{"execute": "x-test-answer", "arguments": {"length": 1000000}}')
        other.call("x-test-events", {"count": 10})
        assert server.administration.monitor.backlog < 8 << 20
        deaf.setblocking(True)
        file = deaf.makefile("rb")
        assert sum(b"event" in file.readline() for _ in range(40)) == 10  # behind the answers that were on their way
        assert other.call("query-name") == {}


def test_a_burst_of_events_within_one_command_reaches_who_asked_for_it(server: AdminServer) -> None:
    with server.client() as client:
        client.call("x-test-events", {"count": 2000})
        events = client.events()
        assert [next(events)["data"]["number"] for _ in range(2000)] == list(range(2000))


def test_fifty_clients_are_served_at_once(server: AdminServer) -> None:
    clients = [server.client() for _ in range(50)]
    answers: list[object] = []

    def ask(client: Client) -> None:
        answers.extend(client.call("query-status")["running"] for _ in range(5))

    threads = [threading.Thread(target=ask, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for client in clients:
        client.close()
    assert answers == [True] * 250


def test_clients_beyond_the_bound_are_turned_away_until_somebody_leaves(
    server: AdminServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "CLIENTS_MAX", 2)
    first, second = server.client(), server.client()
    with pytest.raises(AdminError, match="closed"):
        server.client()
    assert first.call("query-name") == {}
    first.close()
    second.call("query-name")
    with second:
        while True:  # the server needs a moment to see that it has gone
            try:
                server.client().close()
                break
            except AdminError:
                continue


def test_requests_come_no_faster_than_the_rate(server: AdminServer, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(monitor.asyncio, "sleep", note)
    with _negotiated(server) as sock:
        sock.sendall(b'{"execute": "query-name"}' * 500)
        assert len(_lines(sock, 502)) == 502
    assert sum(slept) > 0


def test_half_a_request_and_a_disconnect_leave_nothing_behind(server: AdminServer) -> None:
    for text in (b"", b"{", b'{"execute": "qmp_capabilities"', b'{"execute": "qmp_capabilities"}'):
        with server.raw() as sock:
            sock.sendall(text)
    with server.client() as client:
        assert client.call("query-name") == {}


def test_the_socket_is_ours_alone_and_taken_over_only_when_nobody_listens(server: AdminServer) -> None:
    assert stat.S_IMODE(os.stat(server.path).st_mode) == 0o600
    with pytest.raises(ExportError, match="another server"):
        listen_unix(server.path)


def test_only_root_our_own_user_and_the_list_are_let_in() -> None:
    own = os.geteuid()
    peer = monitor.Peer(1, own + 1000, 2000)
    assert Access().admits(monitor.Peer(1, own, 2000), ())
    assert Access().admits(monitor.Peer(1, 0, 2000), ())
    assert not Access().admits(peer, (2001,))
    assert Access(users=[own + 1000]).admits(peer, ())
    assert Access(groups=[2000]).admits(peer, ())
    assert Access(groups=[2001]).admits(peer, (2001, 5))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_a_user_who_is_not_on_the_list_is_turned_away_whatever_the_mode_says() -> None:
    # Not below the tests' own directory, which other users cannot enter.
    with tempfile.TemporaryDirectory(prefix="nbdq-") as directory, AdminServer(Path(directory)) as server:
        os.chmod(directory, 0o755)
        os.chmod(server.path, 0o666)
        child = os.fork()
        if child == 0:
            try:
                os.setuid(65534)
                Client(server.path, timeout=10)
            except AdminError as error:
                os._exit(7 if "closed" in str(error) else 8)
            finally:
                os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_change_is_logged_with_the_user_and_a_question_is_not(
    server: AdminServer, caplog: pytest.LogCaptureFixture
) -> None:
    with server.client() as client:
        client.call("query-jobs")
        client.call("x-test-events", {"count": 0})
    assert f"uid {os.geteuid()}" in caplog.text
    assert "x-test-events" in caplog.text
    assert "query-jobs" not in caplog.text


def test_the_server_stops_while_clients_are_connected(server: AdminServer) -> None:
    with server.client() as client:
        client.call("quit")
        assert list(client.events()) == []  # until the connection is closed
    assert not os.path.exists(server.path)


def test_help_says_every_argument_of_every_command(server: AdminServer) -> None:
    with server.client() as client:
        commands = {entry["name"]: entry for entry in client.call("x-nbdq-help")}
        assert {entry["name"] for entry in client.call("query-commands")} == set(commands)
        assert all(entry["help"] for name, entry in commands.items() if not name.startswith("x-test"))
        speed = client.call("x-nbdq-help", {"command": "block-job-set-speed"})[0]
    assert speed["arguments"] == [
        {"name": "device", "type": "string", "required": True},
        {"name": "speed", "type": "integer", "required": True},
    ]

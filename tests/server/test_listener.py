"""Listening sockets: whose path it is, who may connect, and what happens when accepting fails (R-41, R-42, 3.4)."""

import asyncio
import errno
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdq.errors import ExportError
from nbdq.server import listener as listener_module
from nbdq.server.listener import Listener, listen_tcp, listen_unix
from tests.server.client import PATIENCE, connect
from tests.server.harness import LOOPS, has_ipv6


@pytest.fixture
def path() -> Iterator[str]:
    """Where a unix socket may be; short, for it has 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="nbdq-") as directory:
        yield f"{directory}/socket"


def test_only_the_owner_may_connect_unless_told_otherwise(path: str) -> None:
    before = os.umask(0)
    try:
        for mode in (0o600, 0o660, 0o666):
            listener = listen_unix(path, mode=mode)
            assert stat.S_IMODE(os.stat(path).st_mode) == mode
            listener.close()
        listen_unix(path).close()
        assert os.umask(0) == 0
    finally:
        os.umask(before)


def test_the_path_is_removed_at_the_end(path: str) -> None:
    listener = listen_unix(path)
    listener.close()
    assert not os.path.exists(path)
    listener.close()


def test_a_path_that_somebody_else_took_meanwhile_is_left_alone(path: str) -> None:
    first = listen_unix(path)
    os.unlink(path)
    second = listen_unix(path)
    first.close()
    connect(path).close()
    second.close()


def test_a_server_that_takes_the_path_at_the_moment_of_the_end_keeps_it(path: str) -> None:
    """R-42: its socket file may get the inode number of ours as soon as that is free."""
    first = listen_unix(path)
    successors: list[Listener] = []

    class ClosingSocket:
        """Our socket, at whose close another server starts."""

        def __init__(self, sock: socket.socket) -> None:
            self.fileno = sock.fileno
            self._socket = sock

        def close(self) -> None:
            self._socket.close()
            successors.append(listen_unix(path))

    first.socket = ClosingSocket(first.socket)  # type: ignore[assignment]
    first.close()
    connect(path).close()
    successors[0].close()


def test_a_link_to_the_socket_that_took_its_place_is_left_alone(path: str) -> None:
    listener = listen_unix(path)
    os.rename(path, f"{path}-moved")
    os.symlink(f"{path}-moved", path)
    listener.close()
    assert os.path.islink(path)


def test_a_path_that_cannot_be_reached_any_more_does_not_hinder_the_end(path: str) -> None:
    os.mkdir(f"{path}-directory")
    listener = listen_unix(f"{path}-directory/socket")
    os.rename(f"{path}-directory", f"{path}-moved")
    Path(f"{path}-directory").write_text("a file now")
    listener.close()
    assert listener.socket.fileno() < 0


def test_a_socket_that_nobody_listens_on_is_replaced(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    listener = listen_unix(path)
    connect(path).close()
    listener.close()


def test_a_socket_that_somebody_listens_on_is_refused(path: str) -> None:
    first = listen_unix(path)
    with pytest.raises(ExportError, match="another server listens there"):
        listen_unix(path)
    connect(path).close()
    first.close()


def test_a_server_whose_queue_is_full_is_a_server(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(path)
        busy.listen(0)
        with connect(path), pytest.raises(ExportError, match="another server listens there"):
            listen_unix(path)


@pytest.mark.parametrize("kind", ["file", "directory", "fifo", "link"])
def test_what_is_no_socket_is_not_touched(path: str, kind: str) -> None:
    match kind:
        case "file":
            Path(path).write_text("precious")
        case "directory":
            os.mkdir(path)
        case "fifo":
            os.mkfifo(path)
        case "link":
            os.symlink("/nowhere", path)
    before = os.lstat(path)
    with pytest.raises(ExportError, match="is not a socket"):
        listen_unix(path)
    assert os.lstat(path).st_ino == before.st_ino


@pytest.mark.parametrize("name", ["/nowhere/at/all/socket", "x" * 200])
def test_a_path_that_cannot_be_bound_is_one_line(name: str) -> None:
    with pytest.raises(ExportError) as refused:
        listen_unix(name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("host", ["nowhere.invalid", "x" * 70, ".", "a..b", "\udcff", "256.0.0.1"])
def test_a_host_that_is_none_is_one_line(host: str) -> None:
    with pytest.raises(ExportError, match="cannot listen on") as refused:
        listen_tcp(host, 0)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")], ids=["IPv4", "IPv6"])
def test_a_tcp_listener_tells_the_port_that_it_got(host: str, shown: str) -> None:
    if ":" in host and not has_ipv6():
        pytest.skip("no IPv6 here")
    [listener] = listen_tcp(host, 0)
    port = listener.socket.getsockname()[1]
    assert listener.uri("disk") == f"nbd://{shown}:{port}/disk"
    connect((host, port)).close()
    listener.close()


def test_a_taken_port_is_refused_in_one_line() -> None:
    [first] = listen_tcp("127.0.0.1", 0)
    with pytest.raises(ExportError, match=r"cannot listen on 127\.0\.0\.1 port"):
        listen_tcp("127.0.0.1", first.socket.getsockname()[1])
    first.close()


class Failing:
    """A listening socket whose ``accept`` fails when told to."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.error = 0
        self.calls = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self) -> object:
        self.calls += 1
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        return self._socket.accept()

    def close(self) -> None:
        self._socket.close()


def failing_listener(path: str, error: int) -> tuple[Listener, Failing]:
    listener = listen_unix(path)
    failing = Failing(listener.socket)
    failing.error = error
    listener.socket = failing  # type: ignore[assignment]
    return listener, failing


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EPERM, errno.EPROTO])
def test_a_failing_accept_is_tried_again_after_a_while_and_does_not_spin(
    loop: str, path: str, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "_ACCEPT_PAUSE_SECONDS", 0.1)
    listener, failing = failing_listener(path, error)

    async def main() -> None:
        accepted = asyncio.Event()

        def accept(sock: socket.socket, peer: str) -> bool:
            sock.close()
            accepted.set()
            return True

        listener.start(asyncio.get_running_loop(), accept)
        with connect(path):
            while not failing.calls:
                await asyncio.sleep(0)
            for _ in range(100):  # turns of the loop
                await asyncio.sleep(0)
            assert failing.calls == 1
            failing.error = 0
            await asyncio.wait_for(accepted.wait(), PATIENCE)
        listener.close()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(main())


def test_the_pause_of_a_failure_outlasts_the_pause_of_a_limit(
    loop: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that come and go at the limit do not make a server without descriptors try, and complain, each time."""
    monkeypatch.setattr(listener_module, "_ACCEPT_PAUSE_SECONDS", 0.2)
    listener, failing = failing_listener(path, errno.EMFILE)

    async def main() -> None:
        accepted = asyncio.Event()

        def accept(sock: socket.socket, peer: str) -> bool:
            sock.close()
            accepted.set()
            return True

        listener.start(asyncio.get_running_loop(), accept)
        with connect(path):
            while not failing.calls:
                await asyncio.sleep(0)
            for _ in range(20):
                listener.pause()
                listener.resume()
                for _ in range(5):
                    await asyncio.sleep(0)
            assert failing.calls == 1
            failing.error = 0
            await asyncio.wait_for(accepted.wait(), PATIENCE)
        listener.close()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(main())


def test_an_address_that_a_host_has_twice_is_listened_on_once(monkeypatch: pytest.MonkeyPatch) -> None:
    once = socket.getaddrinfo("127.0.0.1", 0, type=socket.SOCK_STREAM)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(*once[0][:4], ("127.0.0.1", port))] * 2)
    listeners = listen_tcp("localhost", port)
    assert len(listeners) == 1
    listeners[0].close()


def test_the_pause_of_a_limit_outlasts_the_pause_of_a_failure(
    loop: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "_ACCEPT_PAUSE_SECONDS", 0.01)
    listener, failing = failing_listener(path, errno.EMFILE)

    async def main() -> None:
        accepted = asyncio.Event()

        def accept(sock: socket.socket, peer: str) -> bool:
            sock.close()
            accepted.set()
            return True

        listener.start(asyncio.get_running_loop(), accept)
        with connect(path):
            while not failing.calls:
                await asyncio.sleep(0)
            listener.pause()
            failing.error = 0
            await asyncio.sleep(0.05)
            assert not accepted.is_set()
            listener.resume()
            await asyncio.wait_for(accepted.wait(), PATIENCE)
        listener.close()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(main())

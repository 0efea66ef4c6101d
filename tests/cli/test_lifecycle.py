"""How ``nbdq serve`` begins and ends: who hears of it, on what sockets, and what signals do (R-76, F6 of the peers)."""

import asyncio
import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from nbdq.cli import main
from nbdq.errors import ExportError
from nbdq.server.activation import inherited_sockets
from nbdq.server.notify import Notifier
from tests.server.client import PATIENCE, READ, Client
from tests.support.serving import Server, serve
from tests.support.tools import requires

SERVE = [sys.executable, "-m", "nbdq", "serve"]
SIZE = 1 << 20
ESHUTDOWN = 108
CONTENT = bytes(range(256)) * (SIZE // 256)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw image."""
    path = tmp_path_factory.mktemp("image") / "disk"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="nbdq-") as path:
        yield Path(path)


def run(*words: str | Path, **options: object) -> "subprocess.CompletedProcess[str]":
    """``nbdq serve`` over a raw image until it ends by itself; what it says and its status."""
    command = [*SERVE, "-f", "raw", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, **options)  # type: ignore[call-overload,no-any-return]


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE} s"
        time.sleep(0.01)


def is_running(process: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Captive mode.


@requires("nbdinfo", "qemu-img")
def test_a_command_is_served_on_a_private_socket_and_its_status_is_ours(image: Path) -> None:
    script = """
        nbdinfo --size "$uri"
        qemu-img info "$nbd" | grep "virtual size"
        stat -c %a "${unixsocket%/*}" "$unixsocket"
        echo "[$port]" "$unixsocket"
        exit 7
    """
    done = run("--run", script, image)
    assert done.returncode == 7, done.stderr
    *said, place = done.stdout.splitlines()  # and no URI of ours in between
    assert said == [str(SIZE), f"virtual size: 1 MiB ({SIZE} bytes)", "700", "600"]
    port, _, path = place.partition(" ")
    assert port == "[]"
    assert not Path(path).parent.exists()


def test_a_command_that_a_signal_ends_has_the_status_that_shells_give_it(image: Path) -> None:
    assert run("--run", "kill -KILL $$", image).returncode == 128 + signal.SIGKILL


def test_a_command_finds_the_place_that_was_asked_for(image: Path) -> None:
    uri, nbd, port = run("-p", "0", "--run", 'echo "$uri" "$nbd" "$port"', image).stdout.split()
    assert (uri, nbd) == (f"nbd://127.0.0.1:{port}/", f"nbd:127.0.0.1:{port}")


def test_names_reach_a_command_as_text_and_never_as_code(image: Path, directory: Path) -> None:
    name = "$(touch pwned) `touch pwned`; touch pwned' \"ä"
    done = run("-x", name, "--run", 'printf %s "$exportname"', image, cwd=directory)
    assert done.stdout == name
    assert not (directory / "pwned").exists()


def test_a_command_does_not_find_what_was_meant_for_the_server(image: Path) -> None:
    with listening() as sock, telling() as manager:
        done = started_with([sock], ["--run", "env", "-f", "raw", str(image)], NOTIFY_SOCKET=manager.path)
        out, _ = done.communicate(timeout=PATIENCE)
    assert done.returncode == 0
    assert "uri=" in out
    assert not any(line.startswith(("LISTEN_", "NOTIFY_", "WATCHDOG_")) for line in out.splitlines())


@pytest.mark.parametrize("ignores", [False, True], ids=["obedient", "stubborn"])
def test_a_stop_ends_the_command(image: Path, directory: Path, ignores: bool) -> None:
    command = f"{'trap : TERM; ' if ignores else ''}echo $$; while :; do sleep 0.1; done"
    server = Server("-f", "raw", "--run", command, image, directory=directory)
    try:
        assert server.process.stdout is not None
        shell = int(server.process.stdout.readline())
        assert is_running(shell)
        expected = signal.SIGKILL if ignores else signal.SIGTERM
        assert server.terminate() == 128 + expected
        wait_for(lambda: not is_running(shell), "the end of the command")
        assert not server.socket.exists()
    finally:
        server.kill()


def test_a_command_and_the_background_exclude_each_other(image: Path) -> None:
    done = run("--fork", "--run", "true", image)
    assert done.returncode == 2
    assert "--fork goes on without its caller" in done.stderr


# In the background.


def test_the_background_is_there_when_the_caller_goes_on(image: Path, directory: Path) -> None:
    (directory / "disk").write_bytes(CONTENT)
    path, pid_file = directory / "socket", directory / "pid"
    # Names stay relative to where we are. This also waits until nobody has our output any more.
    done = run("-k", "socket", "--pid-file", "pid", "--fork", "disk", cwd=directory)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"nbd+unix:///?socket={path}\n"
    process = int(pid_file.read_text())
    try:
        with Client(str(path)) as client:
            assert client.go().read(0, 512) == CONTENT[:512]
        assert os.getsid(process) == process != os.getsid(0)
        assert {os.readlink(f"/proc/{process}/fd/{number}") for number in range(3)} == {"/dev/null"}
    finally:
        os.kill(process, signal.SIGTERM)
        wait_for(lambda: not is_running(process), "the end of the server")
    assert [left.name for left in directory.iterdir()] == ["disk"]


def test_the_log_of_the_background_stays_where_it_is_a_file(image: Path, directory: Path) -> None:
    with (directory / "log").open("wb") as log:
        command = [*SERVE, "-v", "-f", "raw", "-k", "socket", "--pid-file", "pid", "--fork", str(image)]
        subprocess.run(command, stdout=subprocess.PIPE, stderr=log, cwd=directory, check=True, timeout=PATIENCE)
    process = int((directory / "pid").read_text())
    with Client(str(directory / "socket")) as client:
        client.go()
    os.kill(process, signal.SIGTERM)
    wait_for(lambda: not is_running(process), "the end of the server")
    assert "client closed the connection" in (directory / "log").read_text()


def test_whoever_asked_for_the_background_sees_why_it_could_not_be(directory: Path) -> None:
    done = run("-k", directory / "socket", "--pid-file", directory / "pid", "--fork", directory / "nothing")
    assert done.returncode == 1
    assert done.stderr == f"nbdq: {directory / 'nothing'}: is missing; bring it back, or correct the name\n"
    assert list(directory.iterdir()) == []


# Who hears that clients can connect.


def test_a_descriptor_gets_a_newline_and_is_closed_when_clients_can_connect(image: Path, directory: Path) -> None:
    reader, writer = os.pipe()
    path = directory / "socket"
    command = [*SERVE, "-f", "raw", "-k", str(path), "--no-print-uri", "--ready-fd", str(writer), str(image)]
    process = subprocess.Popen(command, pass_fds=[writer], stdout=subprocess.PIPE, text=True)
    os.close(writer)
    try:
        with open(reader, "rb") as pipe:
            assert pipe.read() == b"\n"  # up to its end
        with Client(str(path)) as client:
            assert client.go().size == SIZE
    finally:
        process.terminate()
        assert process.communicate(timeout=PATIENCE)[0] == ""
    assert process.returncode == 0


def test_nobody_hears_of_a_server_that_does_not_start(directory: Path) -> None:
    reader, writer = os.pipe()
    done = run("--ready-fd", str(writer), directory / "nothing", pass_fds=[writer])
    os.close(writer)
    assert done.returncode == 1
    with open(reader, "rb") as pipe:
        assert pipe.read() == b""


def test_a_descriptor_that_is_not_there_is_a_usage_error(image: Path) -> None:
    done = run("--ready-fd", "77", image)
    assert done.returncode == 2
    assert "--ready-fd 77: Bad file descriptor" in done.stderr


def test_a_command_can_be_told_the_uri_on_the_output_too(image: Path) -> None:
    assert run("--print-uri", "--run", 'echo "$uri"', image).stdout.split()[0].startswith("nbd+unix:///?socket=")


def test_the_pid_file_of_a_successor_is_left_alone(image: Path, directory: Path) -> None:
    path = directory / "pid"
    with serve("-f", "raw", "--pid-file", path, image) as server:
        assert path.read_text() == f"{server.process.pid}\n"
        assert [name.name for name in directory.iterdir()] == ["pid"]
        path.write_text("1\n")
    assert path.read_text() == "1\n"


def test_a_pid_file_may_be_a_pipe(image: Path) -> None:
    reader, writer = os.pipe()
    done = run("--pid-file", f"/dev/fd/{writer}", "--run", "echo $PPID", image, pass_fds=[writer])
    os.close(writer)
    with open(reader) as pipe:
        assert pipe.read() == done.stdout


# Sockets that were opened for us.


@contextlib.contextmanager
def listening(path: Path | None = None) -> Iterator[socket.socket]:
    """A socket as a service manager makes it: on 127.0.0.1, or at ``path``."""
    with socket.socket(socket.AF_INET if path is None else socket.AF_UNIX) as sock:
        sock.bind(("127.0.0.1", 0) if path is None else str(path))
        sock.listen()
        yield sock


def started_with(
    sockets: list[socket.socket],
    words: list[str],
    *,
    names: str = "",
    process: str = "$$",
    count: int | None = None,
    **environment: str,
) -> "subprocess.Popen[str]":
    """``nbdq serve`` that inherits ``sockets`` as descriptors 3 and following."""
    numbers = [os.dup(sock.fileno()) for sock in sockets]
    high = [os.dup2(number, 200 + index) for index, number in enumerate(numbers)]
    moves = " ".join(f"{3 + index}<&{number} {number}<&-" for index, number in enumerate(high))
    script = f'export LISTEN_PID={process} LISTEN_FDS={len(high) if count is None else count}; exec "$@" {moves}'
    if names:
        environment["LISTEN_FDNAMES"] = names
    try:
        return subprocess.Popen(
            ["bash", "-c", script, "bash", *SERVE, *words],
            pass_fds=high,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        for number in (*numbers, *high):
            os.close(number)


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """The status and the complaint of a server that ends by itself."""
    _, said = process.communicate(timeout=PATIENCE)
    return process.returncode, said


def stop(process: "subprocess.Popen[str]") -> str:
    """End a server in order; what it has printed."""
    process.terminate()
    out, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    assert said == ""
    return out


def test_clients_are_served_on_sockets_that_were_opened_for_us(image: Path, directory: Path) -> None:
    path = directory / "socket"
    with listening() as tcp, listening(path) as local:
        process = started_with([tcp, local], ["-f", "raw", "--print-uri", str(image)])
        for address in (tcp.getsockname(), str(path)):
            with Client(address) as client:
                assert client.go().read(0, 512) == CONTENT[:512]
        host, port = tcp.getsockname()
        assert stop(process) == f"nbd://{host}:{port}/\nnbd+unix:///?socket={path}\n"
        assert path.exists()  # it is not ours


def test_a_client_that_comes_between_two_servers_is_served_by_the_second_one(image: Path, directory: Path) -> None:
    """R-78: the queue of the socket belongs to who opened it, so nobody is refused."""
    path = directory / "socket"
    with listening(path) as local:
        first = started_with([local], ["-f", "raw", str(image)])
        with Client(str(path)) as client:
            client.go().read(0, 512)
        assert stop(first) == ""  # the output belongs to who opened the sockets
        waiting = Client(str(path))
        second = started_with([local], ["-f", "raw", str(image)])
        with waiting:
            assert waiting.go().read(512, 512) == CONTENT[512:1024]
        stop(second)


def test_names_of_sockets_say_what_they_are_for(image: Path, directory: Path) -> None:
    admin, clients = directory / "admin", directory / "clients"
    with listening(admin) as first, listening(clients) as second, listening() as third:
        process = started_with([first, second, third], ["-f", "raw", str(image)], names="admin:nbdq.socket:metrics")
        with Client(str(clients)) as client:
            assert client.go().size == SIZE
        listed = subprocess.run(
            [sys.executable, "-m", "nbdq", "ctl", "--socket", str(admin), "exports"], capture_output=True, text=True
        )
        assert listed.returncode == 0, listed.stderr
        host, port = third.getsockname()
        with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=PATIENCE) as answer:
            assert b"nbdq_connections" in answer.read()
        stop(process)
        assert admin.exists()


def test_a_socket_for_tls_is_none_for_a_server_without_certificates(image: Path) -> None:
    with listening() as sock:
        status, said = ended(started_with([sock], ["-f", "raw", str(image)], names="nbd-tls"))
    assert (status, said) == (1, "nbdq: TLS needs certificates or keys: --tls-creds DIR or --tls-psk FILE\n")


def test_options_that_say_where_to_listen_contradict_sockets(image: Path) -> None:
    with listening() as sock:
        status, said = ended(started_with([sock], ["-f", "raw", "-p", "0", str(image)]))
    assert status == 2
    assert "leave out --socket, --bind, --port" in said


def test_sockets_for_another_process_are_not_ours(image: Path, directory: Path) -> None:
    with listening() as sock:
        process = started_with([sock], ["-f", "raw", "-k", str(directory / "own"), str(image)], process="1")
        assert process.stdout is not None
        assert process.stdout.readline() == f"nbd+unix:///?socket={directory / 'own'}\n"
        stop(process)


def test_a_socket_that_is_missing_is_told(image: Path) -> None:
    with listening() as sock:
        status, said = ended(started_with([sock], ["-f", "raw", str(image)], count=2))
    assert (status, said) == (1, "nbdq: descriptor 4, from socket activation: Bad file descriptor\n")


@pytest.mark.parametrize(
    ("count", "names", "complaint"),
    [
        ("1", "nbd:admin", "LISTEN_FDNAMES has 2 names for LISTEN_FDS=1"),
        ("-1", "", "LISTEN_FDS is '-1', which is not a number of sockets"),
        ("٣", "", "is not a number of sockets"),
    ],
)
def test_sockets_that_are_announced_in_no_known_way_are_refused(count: str, names: str, complaint: str) -> None:
    environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count, "LISTEN_FDNAMES": names}
    with pytest.raises(ExportError, match=re.escape(complaint)):
        inherited_sockets(environment)
    assert environment == {}


def test_what_does_not_listen_is_no_socket_for_clients(image: Path) -> None:
    with listening() as sock, socket.create_connection(sock.getsockname()) as connected:
        status, said = ended(started_with([connected], ["-f", "raw", str(image)]))
    assert status == 1
    assert "is no stream socket that listens; in a unit, use ListenStream= and Accept=no" in said


@requires("nbdinfo", "nbdcopy")
def test_libnbd_starts_a_server_for_itself(image: Path, directory: Path) -> None:
    """nbd.md part 2: the ``[ CMD ]`` form."""
    command = ["[", *SERVE, "-r", "-f", "raw", str(image), "]"]
    shown = subprocess.run(["nbdinfo", "--size", "--", *command], capture_output=True, text=True, timeout=PATIENCE)
    assert (shown.stdout, shown.stderr) == (f"{SIZE}\n", "")
    copied = subprocess.run(["nbdcopy", "--", *command, "-"], capture_output=True, timeout=PATIENCE)
    assert (copied.stdout, copied.stderr) == (CONTENT, b"")


@requires("systemd-socket-activate")
def test_systemd_starts_a_server_when_somebody_comes(image: Path, directory: Path) -> None:
    path = directory / "socket"
    words = ["systemd-socket-activate", "-l", str(path), *SERVE, "-f", "raw", str(image)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(path.exists, "the socket")
        with Client(str(path)) as client:
            assert client.go().read(0, 512) == CONTENT[:512]
    finally:
        process.terminate()
        said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, said


# What a service manager hears.


class Manager:
    """The receiving end of ``sd_notify``."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{path[1:]}" if path.startswith("@") else path)
        self._socket.settimeout(PATIENCE)

    def hear(self) -> dict[str, str]:
        """The next message."""
        return dict(line.split("=", 1) for line in self._socket.recv(4096).decode().splitlines())

    def hear_until(self, name: str) -> dict[str, str]:
        """The next message that says ``name``."""
        while name not in (heard := self.hear()):
            pass
        return heard

    @property
    def has_message(self) -> bool:
        """Whether there is a message that was not heard."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def close(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def telling(path: str = "") -> Iterator[Manager]:
    manager = Manager(path or f"@nbdq-test-{os.getpid()}")
    try:
        yield manager
    finally:
        manager.close()


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_a_service_manager_hears_how_the_server_is(
    image: Path, directory: Path, abstract: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with telling("" if abstract else str(directory / "notify")) as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", manager.path)
        monkeypatch.setenv("WATCHDOG_USEC", "400000")
        with serve("-f", "raw", image) as server:
            ready = manager.hear()
            assert ready == {"READY": "1", "STATUS": "1 exports, 0 clients"}
            for _ in range(3):
                assert manager.hear_until("WATCHDOG")["WATCHDOG"] == "1"
            with Client(str(server.socket)) as client:
                client.go()
                assert manager.hear_until("STATUS")["STATUS"] == "1 exports, 1 clients"
            server.process.terminate()
            stopping = manager.hear_until("STOPPING")
            assert int(stopping["EXTEND_TIMEOUT_USEC"]) > 30e6
            assert stopping["WATCHDOG_USEC"] == stopping["EXTEND_TIMEOUT_USEC"]  # nobody feeds it while disks are saved
            assert "saving" in manager.hear_until("STOPPING")["STATUS"]
            server.process.wait(PATIENCE)


def test_a_manager_that_cannot_be_told_is_no_reason_not_to_serve(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/socket")
    with serve("-f", "raw", image) as server:
        with Client(str(server.socket)) as client:
            assert client.go().size == SIZE
        assert "cannot tell the service manager READY=1: No such file or directory" in server.stderr


@pytest.mark.parametrize(
    "environment", [{"NOTIFY_SOCKET": "vsock:2:1234"}, {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}, {}]
)
def test_a_manager_that_speaks_otherwise_or_with_others_is_told_nothing(environment: dict[str, str]) -> None:
    notifier = Notifier.of_environment(environment)
    assert environment == {}

    async def live() -> None:
        notifier.start(lambda: "")
        notifier.stopping("", within=1)

    asyncio.run(live())


def test_a_loop_that_hangs_is_noticed() -> None:
    with telling() as manager:
        notifier = Notifier(manager.path, 0.1)

        async def hang() -> None:
            notifier.start(lambda: "")
            await asyncio.sleep(0.2)
            while manager.has_message:
                manager.hear()
            time.sleep(0.3)
            assert not manager.has_message

        asyncio.run(hang())


# Signals.


STARTING = """
import sys, time
from nbdq.chain.live import LiveChain
from nbdq.cli import main

def open_slowly(*words, **options):
    print("opening", flush=True)
    time.sleep(float(seconds))
    return open_at_once(*words, **options)

_, seconds, *words = sys.argv
open_at_once, LiveChain.open = LiveChain.open, open_slowly
main(["serve", "-f", "raw", *words])
"""


@pytest.mark.parametrize(("seconds", "signals"), [("0.5", 1), ("3600", 2)])
def test_signals_during_the_start_are_obeyed_and_leave_nothing_behind(
    image: Path, directory: Path, seconds: str, signals: int
) -> None:
    """What takes long, such as the repair of an image, is interrupted by the second one."""
    words = ["-k", directory / "socket", "--pid-file", directory / "pid", "--admin", directory / "admin", image]
    command = [sys.executable, "-c", STARTING, seconds, *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "opening\n"
        assert (directory / "admin").exists()
        for _ in range(signals):
            process.terminate()
            time.sleep(0.1)  # two that come at once are one
        assert process.communicate(timeout=PATIENCE) == ("", "")
    assert process.returncode == 0
    assert list(directory.iterdir()) == []


def test_a_second_signal_leaves_little_time(image: Path) -> None:
    """reliability.md 3.2: 30 s for clients that do not take their replies, or 2 s from the second signal on."""
    with tempfile.TemporaryDirectory(prefix="nbdq-") as path:
        server = Server("-f", "raw", image, directory=Path(path))
        try:
            server.wait_until_ready()
            stuck = Client(str(server.socket)).go()
            for _ in range(64):
                stuck.send(READ, 0, SIZE)
            select.select([stuck.socket], [], [], PATIENCE)
            server.process.terminate()
            with pytest.raises(subprocess.TimeoutExpired):
                server.process.wait(1)
            begun = time.monotonic()
            assert server.terminate() == 0
            assert time.monotonic() - begun < 15
            assert "1 connections did not finish in time" in server.stderr
            stuck.socket.close()
        finally:
            server.kill()


def test_a_server_that_does_not_come_back_refuses_for_as_long_as_it_is_told_to(image: Path, directory: Path) -> None:
    """P99; whoever has not left then is cut."""
    server = Server("-f", "raw", "--on-stop", "refuse", "--drain-seconds", "2", image, directory=directory)
    try:
        server.wait_until_ready()
        with Client(str(server.socket)).go() as client:
            server.process.terminate()
            wait_for(lambda: client.error(READ, 0, 512) == ESHUTDOWN, "the refusal")
            assert server.process.wait(PATIENCE) == 0
            assert client.is_closed()
        assert server.stderr == "nbdq: WARNING: 1 connections did not finish in time\n"
    finally:
        server.kill()


SAVING = """
import asyncio, os, signal, sys, uvloop
from nbdq.cli.serve.signals import StopSignals

async def serve(signals):
    stop = asyncio.Event()
    signals.deliver(lambda count: stop.set())
    os.kill(os.getpid(), signal.SIGTERM)
    await stop.wait()
    signals.ignore()

with StopSignals() as signals:
    os.kill(os.getpid(), signal.SIGHUP)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(signals))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(os.getpid(), number)
    print("saved")
os.kill(os.getpid(), signal.SIGTERM)
print("done")
"""


def test_signals_do_not_interrupt_the_saving_of_disks() -> None:
    done = subprocess.run([sys.executable, "-c", SAVING], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "saved\ndone\n", "")


def test_the_page_about_running_names_options_that_there_are() -> None:
    page = (Path(__file__).parents[2] / "docs" / "running.md").read_text()
    known = {
        option
        for name in ("serve", "wait")
        for parameter in main.get_command(click.Context(main), name).params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    named = set(re.findall(r"`(--[a-z-]+)", page))
    assert len(named) > 8
    assert named <= known

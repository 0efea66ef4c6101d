"""Hostile administrators against a real server: whatever they send is refused or done, disks stay whole, and the server
answers on (R-43). An "internal error" would leave a traceback in the server's log, which fails every test here.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest

from nbdq.admin.client import AdminError, Client
from tests.support.administration import Administered, administered, check, qemu_io, verified_load
from tests.support.serving import PATIENCE
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io", "fio")

SEED = int(os.environ.get("NBDQ_SEED", "1"))
#: They end the connection, or what is tested.
NOT_TRIED = {"quit", "qmp_capabilities"}
#: A value of every JSON type.
VALUES: dict[str, Any] = {
    "string": "disk",
    "integer": 1,
    "number": 1.5,
    "boolean": True,
    "array": [],
    "object": {},
    "null": None,
}
STRINGS = [
    "",
    "\x00",
    "disk\x00",
    "\n\x1b[31m\x7f",
    "\ud800",
    "\u202e",
    "../" * 100,
    "x" * 100_000,
    "%s%n",
    "json:{}",
    "nbd://localhost",
    "disk",
    ".",
    "/",
]
INTEGERS = [-1, 0, 1, 511, 2**31, 2**32, 2**53 + 1, 2**63 - 1, -(2**63), 2**64 - 1, 2**64, 10**30]
#: What makes a command as complete as it must be, by the name of the member.
PLAUSIBLE: dict[str, Any] = {
    "device": "disk",
    "node": "disk",
    "node-name": "disk",
    "size": 16 << 20,
    "type": "nbd",
    "actions": [],
    "bitmaps": [],
    "disks": [],
    "speed": 0,
    "write-threshold": 0,
    "backing-file": "",
}
MARKED = ("read -P 1 0 1M", "read -P 2 1M 1M", "read -P 3 2M 1M")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The top of a chain of three that reads 1, 2 and 3 in its first MiB; beside it lies what must not be touched."""
    directory = tmp_path / "disks"
    directory.mkdir()
    below: list[str | Path] = []
    for number, name in enumerate(("base", "middle", "disk")):
        path = directory / f"{name}.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", *below, path, "64M")
        run("qemu-io", "-c", f"write -P {number + 1} {number}M 1M", path)
        below = ["-b", path, "-F", "qcow2"]
    return path


@contextlib.contextmanager
def served(disk: Path) -> Iterator[Administered]:
    """A server that answers when the block ends, and disks that QEMU finds whole."""
    with administered("--state", disk.parent / "state", disk) as server:
        yield server
        for job in server("query-jobs"):
            with contextlib.suppress(AdminError):
                server("job-cancel", id=job["id"])
        with contextlib.suppress(AdminError):
            server("x-nbdq-resume", device="disk")
        with Client(server.client.path, timeout=PATIENCE) as client:
            assert client.call("query-status")["running"]
    check(*(path for path in disk.parent.glob("*.qcow2") if path.is_file() and not path.is_symlink()))


def call(client: Client, command: str, arguments: dict[str, Any]) -> str | None:
    """Why a command is refused; None if it is done."""
    try:
        client.call(command, arguments)
        return None
    except AdminError as error:
        refusal = error
    assert refusal.kind, f"{command} {arguments!r} broke the connection: {refusal}"
    assert "internal error" not in str(refusal), f"{command} {arguments!r}"
    return str(refusal)


def members(server: Administered) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(command, arguments that it needs at least, one of its members), for all commands."""
    found = []
    for command in server("x-nbdq-help"):
        if command["name"] in NOT_TRIED:
            continue
        needed = {each["name"]: PLAUSIBLE.get(each["name"], "x") for each in command["arguments"] if each["required"]}
        found += [(command["name"], needed, member) for member in command["arguments"]]
    return found


def in_parallel(server: Administered, requests: list[tuple[str, dict[str, Any]]]) -> list[str | None]:
    """Make all requests, by several clients, because each may make only so many in a second."""
    count = 16

    def make(first: int) -> list[str | None]:
        with Client(server.client.path, timeout=PATIENCE) as client:
            return [call(client, *request) for request in requests[first::count]]

    with ThreadPoolExecutor(count) as pool:
        parts = list(pool.map(make, range(count)))
    return [parts[number % count][number // count] for number in range(len(requests))]


def test_no_member_of_any_command_takes_another_type(disk: Path) -> None:
    with served(disk) as server:
        requests = []
        for command, needed, member in members(server):
            for kind, value in VALUES.items():
                may_be_null = kind == "null" and not member["required"]
                if kind not in member["type"].split(" or ") and not may_be_null:
                    requests.append((command, needed | {member["name"]: value}))
            requests.append((command, needed | {"unheard-of": 1}))
            if member["required"]:
                requests.append((command, {name: needed[name] for name in needed if name != member["name"]}))
        for request, refusal in zip(requests, in_parallel(server, requests), strict=True):
            assert refusal is not None, request
            assert refusal.startswith(("Invalid parameter type for", "Parameter '")), (request, refusal)
        qemu_io(server, *MARKED)


def test_no_value_of_any_member_upsets_the_server(disk: Path) -> None:
    with served(disk) as server:
        requests = []
        for command, needed, member in members(server):
            kinds = member["type"].split(" or ")
            values: list[Any] = [*(STRINGS if "string" in kinds else ()), *(INTEGERS if "integer" in kinds else ())]
            if "array" in kinds:
                values += [["disk"] * 1000, [None], [{}], [[[]]], [-1]]
            if "object" in kinds:
                values += [{"": 1}, {"x" * 1000: None}]
            requests += [(command, needed | {member["name"]: value}) for value in values]
        # What pauses disks or gives up exports would keep the others from being tried.
        in_parallel(server, [each for each in requests if each[0] not in ("x-nbdq-pause", "block-export-del")])
        in_parallel(server, [each for each in requests if each[0] in ("x-nbdq-pause", "block-export-del")])


PATHS = (
    "../outside.qcow2",
    "{outside}/victim.qcow2",
    "{outside}/new.qcow2",
    "link.qcow2",
    "linked/new.qcow2",
    "linked/victim.qcow2",
    "fifo",
    "/dev/zero",
    "/dev/stdin",
    "/dev/full",
    "/proc/self/mem",
    "/proc/self/fd/0",
    "/proc/self/environ",
    "/nowhere/x.qcow2",
    ".",
    "",
    "disk.qcow2/",
    "base.qcow2/../../outside.qcow2",
)
#: (command, arguments, the member that is a path)
PATH_MEMBERS: list[tuple[str, dict[str, Any], str]] = [
    ("blockdev-snapshot-sync", {"device": "disk"}, "snapshot-file"),
    ("blockdev-snapshot-sync", {"device": "disk", "mode": "existing"}, "snapshot-file"),
    ("block-commit", {"device": "disk"}, "top"),
    ("block-commit", {"device": "disk"}, "base"),
    ("block-stream", {"device": "disk"}, "base"),
    ("block-stream", {"device": "disk"}, "bottom"),
    ("block-stream", {"device": "disk"}, "x-nbdq-layer"),
    ("x-nbdq-rebase", {"device": "disk", "backing-format": "raw"}, "backing-file"),
    ("x-nbdq-rebase", {"device": "disk", "backing-format": "qcow2"}, "backing-file"),
    ("x-nbdq-amend", {"device": "disk"}, "data-file"),
    ("x-nbdq-check", {"device": "disk"}, "layer"),
    ("block-export-add", {"type": "nbd", "id": "e", "node-name": "disk"}, "x-nbdq-layer"),
    ("change-backing-file", {"device": "disk", "backing-file": "base.qcow2"}, "image-node-name"),
]


def outcome(server: Administered, command: str, arguments: dict[str, Any]) -> str | None:
    """As :func:`call`, of a command that may start a job: why that fails, too."""
    if command in ("block-commit", "block-stream", "x-nbdq-rebase", "x-nbdq-amend"):
        arguments = arguments | {"job-id": "j", "auto-dismiss": False}
    if (refusal := call(server.client, command, arguments)) is not None:
        return refusal
    deadline = time.monotonic() + PATIENCE
    while jobs := server("query-jobs"):
        assert time.monotonic() < deadline, jobs
        if jobs[0]["status"] == "concluded":
            server("job-dismiss", id="j")
            return jobs[0].get("error")
        time.sleep(0.005)
    return None


def test_no_path_leads_out_of_the_disks_directory(disk: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    victim = outside / "victim.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", victim, "64M")
    before = {path: path.read_bytes() for path in outside.iterdir()}
    (disk.parent / "link.qcow2").symlink_to(victim)
    (disk.parent / "linked").symlink_to(outside)
    os.mkfifo(disk.parent / "fifo")
    with served(disk) as server:
        requests = [
            (command, arguments | {member: path.format(outside=outside)})
            for command, arguments, member in PATH_MEMBERS
            for path in (
                *PATHS,
                *(os.path.join(disk.parent, path) for path in PATHS if not path.startswith(("/", "{"))),
            )
        ]
        for command, arguments in requests:
            if arguments.get("backing-file") != "":  # no backing file: that can be done
                assert outcome(server, command, arguments) is not None, (command, arguments)
        # Where other overlays are looked for is only read, whatever lies there.
        for directory in ("/dev", "/proc/self/fd", "/proc", str(disk.parent / "fifo"), "/nowhere", "", str(outside)):
            looked = {"device": "disk", "top": str(disk.with_name("middle.qcow2")), "x-nbdq-dry-run": True}
            call(server.client, "block-commit", looked | {"x-nbdq-directories": [directory]})
        qemu_io(server, *MARKED)
    assert {path: path.read_bytes() for path in outside.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disks", "outside"]


def test_lines_that_no_client_should_send_cost_their_connection_alone(disk: Path) -> None:
    lines = [
        b"{" * 100_000,
        b'{"execute": ' + b"[" * 10_000,
        b'{"execute": "query-status", "x": "' + b"x" * (1 << 20) + b'"}',
        b'{"execute": "query-status", "arguments": {"a": [' + b"1," * (1 << 19) + b"1]}}",
        b'{"execute": "query-status", "id": ' + b"9" * 100_000 + b"}",
        b'{"execute": "query-status", "id": 1e999999}',
        b'{"execute": "query-status", "id": NaN}',
        b'{"execute": "\\ud800", "arguments": {"\\u0000": 1}}',
        b'{"execute": {"execute": "quit"}}',
        b'{"execute": "query-status", "execute": "quit", "arguments": []}',
        b"\xff\x00\x01" * 20,
        bytes(range(256)),
        Random(SEED).randbytes(2_000),
        b'{"execute": "query-sta',
    ]
    with served(disk) as server:
        for line in lines:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(PATIENCE)
                sock.connect(server.client.path)
                with contextlib.suppress(ConnectionError):
                    sock.sendall(b'{"execute": "qmp_capabilities"}\n' + line + b"\n")
                    sock.shutdown(socket.SHUT_WR)
                    while said := sock.recv(1 << 16):
                        assert b"internal error" not in said, line[:100]
            assert server("query-status")["running"]
        qemu_io(server, *MARKED)


def test_whoever_steers_jobs_at_random_meets_refusals(disk: Path) -> None:
    verbs = ("pause", "resume", "cancel", "complete", "finalize", "dismiss")
    commands = [
        *((f"job-{verb}", "id") for verb in verbs),
        *((f"block-job-{verb}", "id" if verb in ("finalize", "dismiss") else "device") for verb in verbs),
    ]
    base, middle = (str(disk.with_name(f"{name}.qcow2")) for name in ("base", "middle"))
    with served(disk) as server:
        for job in ("", "nobody", "j" * 10_000, "../j", "\x07", "disk"):
            for command, member in commands:
                assert call(server.client, command, {member: job}) is not None
            assert call(server.client, "block-job-set-speed", {"device": job, "speed": 1}) is not None
        slow = {"device": "disk", "job-id": "j", "top": middle, "base": base, "speed": 1}
        assert call(server.client, "block-commit", slow) is None
        assert call(server.client, "block-commit", slow) is None, "the same again is the same job"
        for command, arguments in (
            ("block-commit", slow | {"speed": 2}),
            ("block-commit", slow | {"job-id": "k"}),
            ("block-stream", {"device": "disk", "job-id": "j"}),
            ("block-stream", {"device": "disk", "job-id": "k"}),
            ("blockdev-snapshot-sync", {"device": "disk", "snapshot-file": str(disk.with_name("s.qcow2"))}),
            ("block_resize", {"device": "disk", "size": 128 << 20}),
            ("x-nbdq-amend", {"device": "disk", "job-id": "k", "refcount-bits": 64}),
            ("x-nbdq-check", {"device": "disk"}),
            ("change-backing-file", {"device": "disk", "image-node-name": str(disk), "backing-file": base}),
        ):
            assert call(server.client, command, arguments) is not None, command
        assert [job["id"] for job in server("query-jobs")] == ["j"]
        qemu_io(server, *MARKED)
        server("job-cancel", id="j")
        while server("query-jobs"):
            time.sleep(0.01)
        qemu_io(server, *MARKED)


def _random_command(random: Random, server: Administered, directory: Path, number: int) -> tuple[str, dict[str, Any]]:
    """One that may well be carried out. Arguments fit each other only by chance."""
    names = ["base", "middle", "disk", *(f"s{each}" for each in range(number))]
    layer = str(directory / f"{random.choice(names)}.qcow2")
    other = str(directory / f"{random.choice(names)}.qcow2")
    job = random.choice("jkl")
    bitmap = random.choice("abc")
    verb = random.choice(("pause", "resume", "cancel", "complete", "finalize", "dismiss"))
    options = {"device": "disk", "job-id": job, "speed": random.choice((0, 0, 1 << 20))}
    options |= {"auto-finalize": random.random() < 0.8, "auto-dismiss": random.random() < 0.8}
    commands: list[tuple[str, dict[str, Any]]] = [
        ("blockdev-snapshot-sync", {"device": "disk", "snapshot-file": str(directory / f"s{number}.qcow2")}),
        ("block-commit", options | random.choice([{"top": layer, "base": other}, {"base": other}, {}])),
        ("block-stream", options | random.choice([{"base": other}, {"x-nbdq-layer": layer}, {}])),
        ("x-nbdq-rebase", options | {"backing-file": other, "backing-format": "qcow2"}),
        ("x-nbdq-amend", options | random.choice([{"refcount-bits": 64}, {"lazy-refcounts": True}, {"chain": True}])),
        (f"job-{verb}", {"id": job}),
        (f"job-{verb}", {"id": job}),
        ("block_resize", {"device": "disk", "size": (64 << 20) + random.randrange(64) * 65536}),
        (f"block-dirty-bitmap-{random.choice(('add', 'remove', 'clear'))}", {"node": "disk", "name": bitmap}),
        ("block-dirty-bitmap-merge", {"node": "disk", "target": bitmap, "bitmaps": ["a"]}),
        ("blockdev-snapshot-internal-sync", {"device": "disk", "name": bitmap}),
        ("blockdev-snapshot-delete-internal-sync", {"device": "disk", "name": bitmap}),
        ("block-export-add", {"type": "nbd", "id": bitmap, "node-name": "disk", "name": bitmap, "writable": True}),
        ("block-export-add", {"type": "nbd", "id": bitmap, "node-name": "disk", "name": bitmap, "x-nbdq-layer": layer}),
        ("block-export-del", {"id": bitmap, "mode": random.choice(("safe", "hard", "soft"))}),
        ("x-nbdq-pause", {"device": "disk", "seconds": 1}),
        ("x-nbdq-resume", {"device": "disk"}),
        ("x-nbdq-check", {"device": "disk", "fix": random.choice(("none", "leaks"))}),
        ("x-nbdq-map", {"device": "disk", "consistent": random.random() < 0.5}),
        ("x-nbdq-checkpoint", {"id": job, "disks": [{"node": "disk", "new-bitmap": bitmap}]}),
        ("x-nbdq-checkpoint-end", {"id": job, "success": random.random() < 0.5}),
        ("query-block", {}),
        ("query-named-block-nodes", {}),
        ("query-block-jobs", {}),
    ]
    return random.choice(commands)


def test_random_commands_from_many_clients_at_once_harm_no_disk_under_load(disk: Path) -> None:
    print(f"seed {SEED}")
    done: list[str] = []

    def order(client_number: int) -> None:
        random = Random(SEED * 100 + client_number)
        with Client(server.client.path, timeout=PATIENCE) as client:
            for number in range(50):
                command, arguments = _random_command(random, server, disk.parent, client_number * 50 + number)
                if call(client, command, arguments) is None:
                    done.append(command)

    with served(disk) as server:
        with verified_load(server, disk), ThreadPoolExecutor(4) as pool:
            list(pool.map(order, range(4)))
            for job in server("query-jobs"):
                with contextlib.suppress(AdminError):
                    server("job-resume", id=job["id"])
                with contextlib.suppress(AdminError):
                    server("job-cancel", id=job["id"])
            with contextlib.suppress(AdminError):
                server("x-nbdq-resume", device="disk")
        qemu_io(server, *MARKED)
        top = Path(server("query-block")[0]["inserted"]["file"])
    print(len(done), sorted(set(done)))
    assert len(set(done)) > 8
    run("qemu-io", "-r", "-f", "qcow2", *(word for read in MARKED for word in ("-c", read)), top)

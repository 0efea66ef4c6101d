"""``nbdq-qemu-nbd`` takes qemu-nbd's command lines (nbd.md 5.6), as QEMU's clients and the callers of qemu-nbd see."""

import json
import os
import re
import signal
import socket
import ssl
import stat
import subprocess
import time
import tomllib
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock

import pytest

from nbdq.chain.raw_disk import RawDisk
from nbdq.cli.qemu_nbd.arguments import parse
from nbdq.cli.qemu_nbd.devices import GuardedRaw, WriteThrough
from nbdq.cli.qemu_nbd.image import Image, parse_image
from nbdq.cli.qemu_nbd.main import main
from nbdq.cli.qemu_nbd.objects import Objects
from nbdq.cli.qemu_nbd.usage import HELP
from nbdq.errors import ExportError
from nbdq.storage import FileStorage
from tests.support.qemu_nbd import COMMAND, call, refusal, serve
from tests.support.serving import PATIENCE
from tests.support.tools import execute, requires, run

ROOT = Path(__file__).parent.parent.parent
MIB = 1 << 20


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """4 MiB, of which every sector begins with its number."""
    path = tmp_path / "disk.raw"
    path.write_bytes(b"".join(number.to_bytes(8, "big") + bytes(504) for number in range(8192)))
    return path


@pytest.fixture
def qcow2(tmp_path: Path, raw: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
    return path


def content(uri: str, directory: Path) -> bytes:
    """What QEMU reads of an export."""
    copy = directory / "copy"
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, copy)
    return copy.read_bytes()


def io(uri: str, *commands: str) -> str:
    """What qemu-io says of a few commands."""
    words = [word for command in commands for word in ("-c", command)]
    done = execute("qemu-io", "-f", "raw", *words, uri)
    return done.stdout + done.stderr


def flags(uri: str) -> set[str]:
    """The transmission flags by the names that nbdinfo has for them."""
    [export] = json.loads(run("nbdinfo", "--json", uri))["exports"]
    return {name for name, value in export.items() if value is True}


# How words are taken apart.


@pytest.mark.parametrize(
    "words",
    [
        ("-k", "/s", "-f", "raw", "-e", "3", "disk"),
        ("-k/s", "-fraw", "-e3", "disk"),
        ("--socket=/s", "--format=raw", "--shared=3", "disk"),
        ("--socket", "/s", "--format", "raw", "--shared", "0x3", "disk"),
        ("--sock", "/s", "--form=raw", "--shar=3", "disk"),
        ("disk", "-k", "/s", "-f", "raw", "-e", "3"),
        ("-k", "/s", "disk", "-fraw", "-e", "03"),
        ("-k", "/s", "-f", "raw", "-e", "3", "--", "disk"),
        ("-f", "raw", "disk", "-k", "/s", "-e 3", "--"),
    ],
)
def test_an_option_can_be_written_in_every_way_that_getopt_takes(words: tuple[str, ...]) -> None:
    arguments = parse(list(words))
    assert (arguments.socket, arguments.format, arguments.shared, arguments.file) == ("/s", "raw", 3, "disk")


def test_flags_can_be_joined_with_an_option_that_has_a_value() -> None:
    arguments = parse(["-trAk/s", "disk"])
    assert arguments.persistent
    assert arguments.read_only
    assert arguments.allocation_depth
    assert arguments.socket == "/s"


@requires("qemu-nbd")
@pytest.mark.parametrize(
    "words",
    [
        ("--foo", "disk"),
        ("-Z", "disk"),
        ("-k",),
        ("--socket",),
        ("--s", "disk"),
        ("--persistent=3", "disk"),
        ("-k", "relative", "disk"),
        ("-e", "-1", "disk"),
        ("-e", "08", "disk"),
        ("-e", "9" * 5000, "disk"),
        ("-o", "1k", "disk"),
        ("--cache=some", "disk"),
        ("-n", "--cache=none", "disk"),
        ("--aio=some", "disk"),
        ("--aio=threads", "--aio=native", "disk"),
        ("--discard=some", "disk"),
        ("--discard=unmap", "--discard=unmap", "disk"),
        ("--detect-zeroes=unmap", "disk"),
        ("-x", "x" * 4097, "disk"),
        ("-L", "disk"),
        ("-L", "-x", "name"),
        ("-L", "-f", "raw"),
        ("-L", "--fork"),
        ("--tls-authz=a", "disk"),
        ("--tls-hostname=a", "disk"),
        ("--tls-creds=a", "--tls-hostname=a", "disk"),
        ("--tls-creds=a", "-k", "/nowhere/socket", "disk"),
        ("--object", "secret,id=a,data=x", "--tls-creds=a", "disk"),
        (),
        ("one", "two"),
    ],
)
def test_what_qemu_nbd_refuses_is_refused_in_its_words(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = execute("qemu-nbd", *words)
    assert theirs.returncode == 1
    monkeypatch.setattr("sys.argv", ["qemu-nbd", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    said = theirs.stderr.splitlines()[0]
    assert capsys.readouterr().err.startswith(said[:100] if len(said) > 200 else said)


@pytest.mark.parametrize("words", [("-c", "/dev/nbd0", "disk"), ("-d", "/dev/nbd0")])
def test_the_kernel_module_is_left_to_nbd_client(words: tuple[str, ...]) -> None:
    with pytest.raises(ExportError, match="nbd-client"):
        parse(list(words))


def test_a_format_and_image_options_exclude_each_other() -> None:
    with pytest.raises(ExportError, match=r"^--image-opts and -f are mutually exclusive$"):
        parse(["--image-opts", "-f", "raw", "driver=raw"])


@requires("qemu-nbd")
def test_the_help_names_every_option_that_qemu_nbd_has() -> None:
    theirs = set(re.findall(r"--[a-z][a-z-]+", run("qemu-nbd", "--help")))
    ours = call("--help")
    assert ours.returncode == 0
    assert theirs - set(re.findall(r"--[a-z][a-z-]+", ours.stdout)) == set()


def test_the_version_is_one_that_programs_can_parse() -> None:
    done = call("--version")
    assert done.returncode == 0
    assert re.match(r"qemu-nbd \d+\.\d+\.\d+ ", done.stdout)


# What FILE means.


@pytest.mark.parametrize(
    ("text", "image"),
    [
        ("driver=qcow2,file.driver=file,file.filename=/a,,b", Image("/a,b", "qcow2")),
        ("driver=qcow2,file.filename=/a", Image("/a", "qcow2")),
        (
            "driver=raw,offset=512,size=1M,file.driver=host_device,file.filename=/a",
            Image("/a", "raw", offset=512, size=MIB),
        ),
        ("driver=file,filename=/a", Image("/a", "raw")),
        ("driver=raw,read-only=on,file.filename=/a,file.locking=on", None),
        ("driver=raw,offset=1k,file.driver=qcow2,file.file.filename=/a", Image("/a", "qcow2", offset=1024)),
        ("driver=qcow2,file.filename=/a,backing=", Image("/a", "qcow2", backing=())),
        (
            "driver=qcow2,file.filename=/a,backing.driver=raw,backing.file.filename=/b",
            Image("/a", "qcow2", backing=(("raw", "/b"),)),
        ),
    ],
)
def test_image_options_lead_to_an_image(text: str, image: Image | None) -> None:
    found = parse_image(text, format=None, image_opts=True)
    if image is None:
        assert (found.path, found.format, found.read_only) == ("/a", "raw", True)
    else:
        assert found == image


def test_a_json_name_leads_to_an_image() -> None:
    text = json.dumps(
        {"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": "/a", "cache": {"direct": True}}}
    )
    assert parse_image("json:" + text, format=None, image_opts=False) == Image("/a", "qcow2", backing=())
    assert parse_image("file:/a", format="raw", image_opts=False) == Image("/a", "raw")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("driver=vmdk,file.filename=/a", "Unknown driver 'vmdk'"),
        ("driver=qcow2,file.driver=nbd,file.host=a", "Unknown protocol driver 'nbd'|Unknown driver 'nbd'"),
        ("driver=qcow2", "A block device must be specified"),
        ("driver=qcow2,file.filename=/a,encrypt.format=luks", "does not support the option 'encrypt.format'"),
        ("driver=qcow2,file.driver=raw,file.offset=512,file.file.filename=/a", "not supported"),
        ("disk.qcow2", "Cannot find node|A block device must be specified"),
        ("driver=qcow2,offset=5,file.filename=/a", "offset"),
        ("driver=raw,offset=-5,file.filename=/a", "expects a size"),
    ],
)
def test_image_options_that_nbdq_does_not_have_are_named(text: str, what: str) -> None:
    with pytest.raises(ExportError, match=what):
        parse_image(text, format=None, image_opts=True)


@pytest.mark.parametrize(
    "text",
    [
        *("json:", "json:[]", "json:{", "json:" + "[" * 100000, 'json:{"a":' + "[" * 600 + "]" * 600 + "}"),
        *("nbd://host/disk", "ssh:x"),
    ],
)
def test_a_name_that_is_none_of_a_file_is_refused(text: str) -> None:
    with pytest.raises(ExportError, match=r"Could not parse|Unknown protocol|A block device must be specified"):
        parse_image(text, format="raw", image_opts=False)


def test_names_on_authorisation_lists_are_exact_unless_they_are_patterns() -> None:
    objects = Objects()
    objects.add("authz-simple,id=a,identity=CN=x,,O=[y]*")
    objects.add('{"qom-type":"authz-list","id":"b","rules":[{"match":"CN=*","policy":"allow","format":"glob"}]}')
    objects.add("authz-list,id=c,rules.0.match=CN=x,rules.0.policy=deny,policy=allow")
    assert objects.subjects("a") == ("CN=x,O=[[]y][*]",)
    assert objects.subjects("b") == ("CN=*",)
    with pytest.raises(ExportError, match="who is allowed"):
        objects.subjects("c")


# What is served.


@requires("qemu-img", "qemu-io", "nbdinfo")
def test_backup_programs_find_a_qcow2_image(qcow2: Path, raw: Path, tmp_path: Path) -> None:
    """As virtnbdbackup starts qemu-nbd: to save a disk of a machine that is off, and to restore it."""
    file = tmp_path / "pid"
    file.touch()
    words = ("-r", "--format=qcow2", "-x", "vda", qcow2, "-t", "-e 2", "--detect-zeroes=on", f"--pid-file={file}", "--")
    with serve(*words, pid_file=file) as server:
        assert content(server.uri("vda"), tmp_path) == raw.read_bytes()
        assert {"is_read_only", "can_multi_conn"} <= flags(server.uri("vda"))
    file.unlink()  # as the program does
    with serve("--discard=unmap", "--format=qcow2", "-x", "vda", qcow2) as server:
        assert "wrote 65536" in io(server.uri("vda"), "write -P 7 1M 64k", "discard 2M 64k")
        server.wait()
    assert "pattern" not in run("qemu-io", "-c", "read -P 7 1M 64k", qcow2)
    assert "No errors" in run("qemu-img", "check", qcow2)


@requires("qemu-img", "qemu-io", "nbdinfo")
def test_image_transfers_find_a_raw_image_and_its_bitmap(qcow2: Path, raw: Path, tmp_path: Path) -> None:
    """As ovirt-imageio starts qemu-nbd: long options, a JSON name, contexts; it asks for the version first."""
    run("qemu-img", "bitmap", "--add", qcow2, "b0")
    name = "json:" + json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": str(qcow2)}})
    words = ("--export-name=", "--persistent", "--shared=8", "--read-only", "--cache=none", "--aio=native")
    words = (*words, "--discard=unmap", "--detect-zeroes=unmap", "--bitmap=b0", "--allocation-depth")
    with serve(*words, name) as server:
        assert content(server.uri(), tmp_path) == raw.read_bytes()
        contexts = json.loads(run("nbdinfo", "--json", server.uri()))["exports"][0]["contexts"]
        assert set(contexts) == {"base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0"}
        assert "is_read_only" in flags(server.uri())


@requires("nbdcopy")
def test_a_socket_that_was_opened_for_it_is_served(raw: Path, tmp_path: Path) -> None:
    """As libnbd starts a server (``nbdcopy -- [ … ]``): one client, with whom the server ends."""
    copy = tmp_path / "copy"
    run("nbdcopy", "--", "[", *COMMAND, "-f", "raw", "-r", raw, "]", copy)
    assert copy.read_bytes() == raw.read_bytes()


@requires("qemu-img", "nbdinfo")
def test_one_client_at_a_time_is_served_and_others_wait(raw: Path) -> None:
    with serve("-t", "-f", "raw", raw) as server:
        assert "can_multi_conn" not in flags(server.uri())
        with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
            for client in (first, second):
                client.settimeout(PATIENCE)
                client.connect(str(server.socket))
            assert first.recv(8) == b"NBDMAGIC"
            second.setblocking(False)
            with pytest.raises(BlockingIOError):
                second.recv(8)
            first.close()
            second.settimeout(PATIENCE)
            assert second.recv(8) == b"NBDMAGIC"


@requires("qemu-io", "nbdinfo")
def test_the_server_ends_with_its_last_client_unless_it_is_persistent(raw: Path) -> None:
    with serve("-f", "raw", raw) as server:
        assert run("nbdinfo", "--list", server.uri())  # who only asks is no client
        assert server.is_running
        assert "read 512" in io(server.uri(), "read 0 512")
        server.wait()
        assert not server.socket.exists()
    with serve("-t", "-f", "raw", raw) as server:
        assert "read 512" in io(server.uri(), "read 0 512")
        assert "read 512" in io(server.uri(), "read 0 512")


@requires("qemu-io")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_with_status_0_and_everything_durable(qcow2: Path, tmp_path: Path, number: int) -> None:
    path = tmp_path / "s"
    with subprocess.Popen([*COMMAND, "-t", "-f", "qcow2", "-k", path, qcow2], stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + PATIENCE
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert "wrote 512" in io(f"nbd+unix:///?socket={path}", "write -P 9 0 512")
        process.send_signal(number)
        _, said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, said, path.exists()) == (0, b"", False)
    assert "pattern" not in run("qemu-io", "-c", "read -P 9 0 512", qcow2)


def test_what_goes_wrong_in_the_background_is_told_in_the_foreground(tmp_path: Path) -> None:
    path = tmp_path / "missing"
    said = refusal("--fork", "-f", "raw", "-k", tmp_path / "s", path)
    assert said == f"qemu-nbd: Failed to blk_new_open '{path}': Could not open '{path}': No such file or directory\n"
    assert not (tmp_path / "s").exists()
    for place in ("/nowhere/s", f"/{'a' * 120}"):
        assert refusal("--fork", "-f", "raw", "-k", place, path).startswith(
            f"qemu-nbd: Failed to bind socket to {place}: "
        )


@requires("qemu-io")
def test_an_image_that_is_in_use_is_refused_in_words_that_programs_know(qcow2: Path, tmp_path: Path) -> None:
    with serve("-t", "-f", "qcow2", qcow2):
        assert 'Failed to get "write" lock' in refusal("-f", "qcow2", "-k", tmp_path / "s", qcow2)


def test_the_socket_has_the_mode_that_the_umask_leaves(raw: Path) -> None:
    before = os.umask(0o007)
    try:
        with serve("-t", "-f", "raw", raw) as server:
            assert stat.S_IMODE(server.socket.stat().st_mode) == 0o770
    finally:
        os.umask(before)


def test_a_port_is_listened_on_at_all_addresses(raw: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*COMMAND, "-t", "-f", "raw", "-p", str(port), str(raw)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + PATIENCE
        try:
            while True:
                try:
                    with socket.create_connection(("127.0.0.2", port), PATIENCE) as client:
                        assert client.recv(8) == b"NBDMAGIC"
                    break
                except ConnectionRefusedError:
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
            assert "Failed to find an available port" in refusal("-f", "raw", "-r", "-p", str(port), raw)
        finally:
            process.terminate()


@requires("qemu-img", "qemu-io")
def test_writes_to_a_snapshot_leave_the_image_alone(qcow2: Path, raw: Path, tmp_path: Path) -> None:
    before = qcow2.read_bytes()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with serve("-s", "-t", "-f", "qcow2", qcow2, environment={"TMPDIR": str(temporary)}) as server:
        assert "wrote 65536" in io(server.uri(), "write -P 5 1M 64k", "flush")
        shown = content(server.uri(), tmp_path)
        assert list(temporary.iterdir()) == []  # nothing is left even if it is killed
    assert shown == raw.read_bytes()[:MIB] + b"\5" * 65536 + raw.read_bytes()[MIB + 65536 :]
    assert qcow2.read_bytes() == before


@requires("qemu-img", "qemu-io")
def test_an_internal_snapshot_is_served(qcow2: Path, raw: Path, tmp_path: Path) -> None:
    run("qemu-img", "snapshot", "-c", "one", qcow2)
    run("qemu-io", "-c", "write -P 1 0 1M", qcow2)
    with serve("-t", "-f", "qcow2", "-l", "snapshot.name=one", qcow2) as server:
        assert content(server.uri(), tmp_path) == raw.read_bytes()
    assert refusal("-f", "qcow2", "-l", "two", "-k", tmp_path / "s", qcow2)


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_part_of_a_disk_is_served(kind: str, qcow2: Path, raw: Path, tmp_path: Path) -> None:
    path = raw if kind == "raw" else qcow2
    expected = raw.read_bytes()[MIB:]
    with serve("-t", "-f", kind, "-o", str(MIB), path) as server:
        assert content(server.uri(), tmp_path) == expected
        assert "wrote 512" in io(server.uri(), "write -P 3 0 512", "write -z 1M 64k", "flush")
        mapped = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", server.uri()))
    assert mapped[0]["start"] == 0
    assert sum(extent["length"] for extent in mapped) == 3 * MIB
    copy = tmp_path / "after"
    run("qemu-img", "convert", "-f", kind, "-O", "raw", path, copy)
    after = bytearray(raw.read_bytes() if kind == "qcow2" else copy.read_bytes())
    assert copy.read_bytes()[:MIB] == after[:MIB]
    assert copy.read_bytes()[MIB : MIB + 512] == b"\3" * 512
    assert not any(copy.read_bytes()[2 * MIB : 2 * MIB + 65536])


@requires("qemu-img")
def test_a_part_of_a_raw_image_can_be_said_with_image_options(raw: Path, tmp_path: Path) -> None:
    text = f"driver=raw,offset={MIB},size=64k,file.driver=file,file.filename={raw}"
    with serve("-t", "--image-opts", text) as server:
        assert content(server.uri(), tmp_path) == raw.read_bytes()[MIB : MIB + 65536]
    text = f"driver=raw,offset={5 * MIB},file.filename={raw}"
    assert "cannot be greater than size of the containing file" in refusal("--image-opts", text, "-k", tmp_path / "s")


def test_a_write_is_durable_when_it_is_answered_if_the_cache_writes_through() -> None:
    device = Mock(size=MIB)
    device.write_cached.return_value = True
    disk = WriteThrough(device, 0)
    assert not disk.write_cached(0, memoryview(b"x"))  # which nothing could make durable without waiting
    for change in (
        lambda: disk.write(512, memoryview(b"x")),
        lambda: disk.zero(512, 512, unmap=True),
        lambda: disk.discard(512, 512),
    ):
        device.reset_mock()
        change()
        assert [called[0] for called in device.method_calls][1:] == ["flush"]


# Formats that nobody said.


@requires("qemu-io", "nbdinfo")
def test_a_disk_that_is_guessed_to_be_raw_cannot_become_an_image(raw: Path, tmp_path: Path) -> None:
    """As in QEMU (R-34): the guest would choose what is opened the next time."""
    with serve("-t", raw) as server:
        assert "probing guessed raw" in server.stderr
        assert "wrote 512" in io(server.uri(), "write -P 1 0 512")
        image = tmp_path / "image"
        image.write_bytes(b"QFI\xfb" + bytes(508))
        assert "Operation not permitted" in io(server.uri(), f"write -s {image} 0 512")
    assert raw.read_bytes()[:512] == b"\1" * 512


def test_a_beginning_of_an_image_cannot_be_put_together_either(raw: Path) -> None:
    device = RawDisk(FileStorage.open(str(raw), writable=True))
    with closing(device):
        disk = GuardedRaw(device)
        disk.write(0, memoryview(b"QF"))
        with pytest.raises(PermissionError):
            disk.write(2, memoryview(b"I\xfb"))
        disk.write(0, memoryview(b"QEDx"))
        with pytest.raises(PermissionError):
            disk.zero(3, 600, unmap=False)
        assert not disk.write_cached(511, memoryview(b"12"))
        disk.write(510, memoryview(b"QFI\xfb"))
        disk.discard(0, MIB)
        assert raw.read_bytes()[:5] == b"QEDx\0"


@requires("qemu-img")
def test_an_image_of_its_own_is_served_without_its_format(qcow2: Path, raw: Path, tmp_path: Path) -> None:
    with serve("-t", qcow2) as server:
        assert server.stderr == ""
        assert content(server.uri(), tmp_path) == raw.read_bytes()


@requires("qemu-img")
def test_an_image_that_leads_to_other_files_needs_its_format(qcow2: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    run("qemu-img", "create", "-f", "qcow2", "-b", qcow2, "-F", "qcow2", overlay)
    assert "refers to other files; say -f qcow2 or -f raw" in refusal("-k", tmp_path / "s", overlay)
    with serve("-t", "-f", "qcow2", overlay):
        pass


@requires("qemu-img")
def test_backing_files_elsewhere_have_to_be_allowed(qcow2: Path, raw: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    overlay = tmp_path / "elsewhere" / "overlay.qcow2"
    run("qemu-img", "create", "-f", "qcow2", "-b", qcow2, "-F", "qcow2", overlay)
    assert "lies outside the allowed directories" in refusal("-f", "qcow2", "-k", tmp_path / "s", overlay)
    allowed = {"NBDQ_QEMU_NBD_ALLOW_BACKING": str(tmp_path)}
    with serve("-t", "-f", "qcow2", overlay, environment=allowed) as server:
        assert content(server.uri(), tmp_path) == raw.read_bytes()


# Lists of other servers.


@requires("qemu-nbd", "qemu-img")
def test_exports_are_listed_as_qemu_nbd_lists_them(qcow2: Path) -> None:
    run("qemu-img", "bitmap", "--add", qcow2, "b0")
    with serve("-t", "-A", "-B", "b0", "-x", "näme", "-D", "some words", "-r", "-f", "qcow2", qcow2) as server:
        listed = call("-L", "-k", server.socket)
        assert listed.returncode == 0
        assert listed.stdout == run("qemu-nbd", "-L", "-k", server.socket)
        assert " export: 'näme'\n  description: some words\n  size:  4194304\n" in listed.stdout


@requires("qemu-img")
def test_names_that_the_terminal_has_no_characters_for_are_escaped(qcow2: Path) -> None:
    with serve("-t", "-x", "näme", "-r", "-f", "qcow2", qcow2) as server:
        listed = call("-L", "-k", server.socket, environment={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
        assert (listed.returncode, listed.stderr) == (0, "")
        assert " export: 'n\\xe4me'\n" in listed.stdout


def test_a_server_that_is_not_there_cannot_be_listed(tmp_path: Path) -> None:
    path = tmp_path / "nobody"
    assert refusal("-L", "-k", path) == f"qemu-nbd: Failed to connect to '{path}': No such file or directory\n"


@requires("certtool", "qemu-img", "qemu-nbd")
def test_tls_is_served_to_those_on_the_list(raw: Path, tmp_path: Path) -> None:
    """The options of iotest 233: certificates, and who may come in."""
    _make_certificates(tmp_path)
    credentials = f"tls-creds-x509,id=tls0,endpoint=server,verify-peer=on,dir={tmp_path}"
    client = f"tls-creds-x509,id=tls0,endpoint=client,dir={tmp_path}"
    words = ("-t", "-f", "raw", "--object", credentials, "--tls-creds", "tls0", raw)
    with serve("--object", "authz-simple,id=a,identity=CN=client", "--tls-authz", "a", *words) as server:
        place = f"driver=nbd,path={server.socket},tls-creds=tls0,tls-hostname=localhost"
        assert "4 MiB" in run("qemu-img", "info", "--image-opts", "--object", client, place)
        listing = ("-L", "-k", server.socket, "--object", client, "--tls-creds=tls0", "--tls-hostname=localhost")
        ours = call(*listing)
        assert ours.returncode == 0, ours.stderr
        assert ours.stdout == run("qemu-nbd", *listing)
        for words_of_others in (("-L", "-k", server.socket), (*listing[:-1], "--tls-hostname=elsewhere")):
            assert (
                refusal(*words_of_others).splitlines()[0]
                == execute("qemu-nbd", *words_of_others).stderr.splitlines()[0]
            )
    with serve("--object", "authz-simple,id=a,identity=CN=other", "--tls-authz", "a", *words) as server:
        place = f"driver=nbd,path={server.socket},tls-creds=tls0,tls-hostname=localhost"
        assert execute("qemu-img", "info", "--image-opts", "--object", client, place).returncode == 1


@pytest.mark.skipif(not getattr(ssl, "HAS_PSK", False), reason="pre-shared keys need Python 3.13")
@requires("psktool", "qemu-nbd")
def test_pre_shared_keys_are_served_and_used(raw: Path, tmp_path: Path) -> None:
    run("psktool", "-u", "qemu", "-p", tmp_path / "keys.psk")
    (tmp_path / "keys.psk").chmod(0o600)
    ours, theirs = (f"tls-creds-psk,id=t,endpoint={side},dir={tmp_path}" for side in ("server", "client"))
    with serve("-t", "-f", "raw", "--object", ours, "--tls-creds", "t", raw) as server:
        listing = ("-L", "-k", server.socket, "--object", theirs, "--tls-creds=t")
        assert call(*listing).stdout == run("qemu-nbd", *listing)
        stranger = ("-L", "-k", server.socket, "--object", f"{theirs},username=stranger", "--tls-creds=t")
        assert "TLS handshake failed" in refusal(*stranger)


@pytest.mark.skipif(getattr(ssl, "HAS_PSK", False), reason="this Python has pre-shared keys")
def test_pre_shared_keys_are_refused_where_there_are_none(raw: Path, tmp_path: Path) -> None:
    for words in (("-f", "raw", "-k", tmp_path / "s", raw), ("-L", "-k", tmp_path / "s")):
        side = "client" if "-L" in words else "server"
        credentials = f"tls-creds-psk,id=t,endpoint={side},dir={tmp_path}"
        assert "Python 3.13" in refusal("--object", credentials, "--tls-creds", "t", *words)


def _make_certificates(directory: Path) -> None:
    """An authority, a server called localhost, and a client called client, under QEMU's names."""
    template = directory / "template"
    for name, words in {
        "ca": "cn = authority\nca\ncert_signing_key\n",
        "server": "cn = localhost\ndns_name = localhost\ntls_www_server\nsigning_key\n",
        "client": "cn = client\ntls_www_client\nsigning_key\n",
    }.items():
        template.write_text(words)
        key, certificate = directory / f"{name}-key.pem", directory / f"{name}-cert.pem"
        run("certtool", "--generate-privkey", "--key-type=ecdsa", "--outfile", key)
        key.chmod(0o600)
        how = ["--generate-self-signed"] if name == "ca" else ["--generate-certificate"]
        if name != "ca":
            how += ["--load-ca-privkey", directory / "ca-key.pem", "--load-ca-certificate", directory / "ca-cert.pem"]
        run("certtool", *map(str, how), "--load-privkey", key, "--template", template, "--outfile", certificate)


def test_it_is_installed_under_its_name() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["nbdq-qemu-nbd"] == f"{main.__module__}:{main.__name__}"


def test_every_option_is_documented() -> None:
    documented = set(re.findall(r"`(-{1,2}[A-Za-z][a-z-]*)", (ROOT / "docs/drop-in.md").read_text()))
    lines = [line.split() for line in HELP.splitlines() if line.startswith("  -")]
    named = [{word.rstrip(",").partition("=")[0] for word in line[:2] if word.startswith("-")} for line in lines]
    missing = [names for names in named if not names & documented]
    assert not missing

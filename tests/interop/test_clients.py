"""Programs that people point at an NBD server, doing what they are used for (``nbd.md`` 5.1, 5.3-5.7)."""

import contextlib
import filecmp
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.images import Layer, Variant, build
from tests.support.serving import PATIENCE, Server, serve
from tests.support.tools import execute, requires, run

SIZE = 8 << 20
DISK = Variant(
    "disk",
    (
        Layer("6M", ("compress 0 1M", "write 2M 1M", "write 5M 64k"), "compression_type=zstd"),
        Layer("8M", ("write 64k 64k", "zero 2M 64k", "compress 4M 512k", "write 8M-512 512")),
    ),
)


class Disk(NamedTuple):
    server: Server
    uri: str
    raw: Path
    """The bytes that every client must see."""


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    directory = tmp_path_factory.mktemp("disk")
    image = build(DISK, directory)
    raw = directory / "raw"
    run("qemu-img", "convert", "-O", "raw", image.top, raw)
    with serve("-r", "-A", "-x", "disk", "-D", "the words of the operator", image.top) as server:
        yield Disk(server, server.uri("disk"), raw)


pytestmark = requires("qemu-img", "qemu-io")


@requires("nbdinfo")
def test_nbdinfo_describes_the_export(disk: Disk) -> None:
    described = json.loads(run("nbdinfo", "--json", disk.uri))
    assert (described["protocol"], described["TLS"], described["structured"]) == ("newstyle-fixed", False, True)
    [export] = described["exports"]
    expected = {
        "export-name": "disk",
        "description": "the words of the operator",
        "export-size": SIZE,
        "contexts": [
            *("base:allocation", "qemu:allocation-depth"),
            *("x-nbdq:layer", "x-nbdq:compressed", "x-nbdq:host-sector", "x-nbdq:since:1"),
        ],
        "is_rotational": False,
        "is_read_only": True,
        "can_cache": True,
        "can_df": True,
        "can_flush": True,
        "can_fua": True,
        "can_multi_conn": True,
        "can_trim": False,
        "can_zero": False,
        "can_fast_zero": False,
        "block_size_minimum": 1,
    }
    assert {key: export.get(key) for key in expected} == expected


@requires("nbdinfo")
def test_nbdinfo_answers_scripts(disk: Disk) -> None:
    assert run("nbdinfo", "--size", disk.uri).strip() == str(SIZE)
    for question in ("--is=read-only", "--can=multi-conn", "--can=df", "--can=flush", "--can=fua", "--can=cache"):
        run("nbdinfo", question, disk.uri)
    for question in ("--is=rotational", "--is=tls", "--can=write", "--can=trim", "--can=zero", "--can=fast-zero"):
        assert execute("nbdinfo", question, disk.uri).returncode == 2, question


@requires("nbdinfo", "nbd-client", "qemu-nbd")
def test_every_client_lists_all_exports(tmp_path: Path) -> None:
    """Names of the user's files become names of exports; nbd-client needs each reply in one piece (N2)."""
    names = ["one", "two", "dröi 3"]
    for name in names:
        run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / f"{name}.qcow2", "1M")
    with serve("-r", *(tmp_path / f"{name}.qcow2" for name in names)) as server:
        listed = json.loads(run("nbdinfo", "--list", "--json", server.uri()))
        assert [export["export-name"] for export in listed["exports"]] == names
        assert run("nbd-client", "-l", "-unix", server.socket).splitlines()[1:] == names
        assert run("qemu-nbd", "-L", "-k", server.socket).count("export: ") == 3
        for name in names:
            assert run("nbdinfo", "--size", server.uri(name)).strip() == str(1 << 20)


@requires("nbdinfo", "nbd-client")
def test_a_tcp_server_prints_the_uri_with_the_port_that_it_got(disk: Disk) -> None:
    with serve("-b", "127.0.0.1", "-p", "0", "-r", "-x", "a b", disk.raw, "-f", "raw") as server:
        uris = [server.printed_uri, *(line.decode().strip() for line in server.process.stdout.readlines(1))]  # type: ignore[union-attr]
        [tcp] = [uri for uri in uris if uri.startswith("nbd://")]
        assert run("nbdinfo", "--size", tcp).strip() == str(SIZE)
        port = tcp.partition("127.0.0.1:")[2].partition("/")[0]
        assert "a b" in run("nbd-client", "-l", "127.0.0.1", port)


@requires("nbdcopy")
@pytest.mark.parametrize(
    "options",
    [
        ["--connections=4", "--requests=64", "--request-size=4096"],
        ["--connections=1", "--requests=1", "--request-size=33554432"],
        ["--synchronous"],
        ["--no-extents"],
        ["--sparse=0", "--allocated"],
    ],
    ids=" ".join,
)
def test_nbdcopy_reads_the_disk_with_any_tuning(disk: Disk, options: list[str], tmp_path: Path) -> None:
    run("nbdcopy", *options, disk.uri, tmp_path / "copy")
    assert filecmp.cmp(disk.raw, tmp_path / "copy", shallow=False)


@requires("nbdcopy", "qemu-nbd")
def test_a_backup_is_the_disk(disk: Disk, tmp_path: Path) -> None:
    """Both usual ways: qemu-img convert from the URI, and nbdcopy into a new qcow2."""
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk.uri, tmp_path / "by-qemu.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "by-nbdcopy.qcow2", str(SIZE))
    run("nbdcopy", "--", disk.uri, "[", "qemu-nbd", "-f", "qcow2", tmp_path / "by-nbdcopy.qcow2", "]")
    for backup in ("by-qemu.qcow2", "by-nbdcopy.qcow2"):
        assert "identical" in run("qemu-img", "compare", "-f", "raw", disk.raw, "-F", "qcow2", tmp_path / backup)
    run("qemu-img", "check", tmp_path / "by-qemu.qcow2")


def test_qemu_io_finds_every_pattern_where_it_was_written(tmp_path: Path) -> None:
    """Bytes of three layers, of zero clusters, and of a short base, at offsets that nothing is aligned to."""
    base, middle, top = (tmp_path / f"{name}.qcow2" for name in ("base", "middle", "top"))
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
    run("qemu-io", "-c", "write -q -P 0x11 0 1M", base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", middle, "2M")
    run("qemu-io", "-c", "write -q -P 0x22 300000 100000", "-c", "write -q -z 512k 64k", middle)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", top, "2M")
    run("qemu-io", "-c", "write -q -P 0x33 350000 1000", top)
    patterns = [
        *("0x11 0 300000", "0x22 300000 50000", "0x33 350000 1000", "0x22 351000 49000", "0x11 400000 124288"),
        *("0 512k 64k", "0x11 576k 448k", "0 1M 1M"),
    ]
    commands = [word for pattern in patterns for word in ("-c", f"read -P {pattern}")]
    commands += [word for pattern in patterns for word in ("-c", f"aio_read -P {pattern}")]
    with serve("-r", top) as server:
        said = run("qemu-io", "-r", "-f", "raw", *commands, "-c", "aio_flush", server.uri())
        assert "verification failed" not in said
        assert said.count("read ") == 2 * len(patterns)


def test_qemu_img_looks_into_the_export(disk: Disk) -> None:
    info = json.loads(run("qemu-img", "info", "--output=json", disk.uri))
    assert (info["virtual-size"], info["format"]) == (SIZE, "raw")
    assert "required size" in run("qemu-img", "measure", "-f", "raw", "-O", "qcow2", disk.uri)


@pytest.mark.parametrize(("depth", "size"), [(1, 4096), (16, 4096), (64, 65536)])
def test_qemu_img_bench_gets_an_answer_to_every_request(disk: Disk, depth: int, size: int) -> None:
    count = ("-c", "500", "-d", str(depth), "-s", str(size))
    assert "Run completed" in run("qemu-img", "bench", *count, "-t", "none", "-f", "raw", disk.uri)


@pytest.mark.parametrize("command", ["write 0 4k", "write -z 0 64k", "discard 0 64k", "write -f 0 512"])
def test_qemu_cannot_open_the_export_for_writing(disk: Disk, command: str) -> None:
    done = execute("qemu-io", "-f", "raw", "-c", command, disk.uri)
    assert done.returncode != 0
    assert "Permission denied" in done.stderr


@requires("fio")
def test_fio_verifies_random_reads(tmp_path: Path) -> None:
    """fio stamps every block with its offset and checksum, and finds them again through a compressed overlay."""
    raw, base, top = (tmp_path / name for name in ("raw", "base.qcow2", "top.qcow2"))
    stamped = ("--bs=4k", "--size=4M", "--verify=crc32c")
    run("fio", "--name=stamp", f"--filename={raw}", "--rw=write", "--do_verify=0", *stamped, cwd=tmp_path)
    run("qemu-img", "convert", "-c", "-O", "qcow2", raw, base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    with serve("-r", top) as server:
        client = ("--ioengine=nbd", f"--uri={server.uri()}", "--iodepth=16", "--numjobs=2", "--verify_fatal=1")
        run("fio", "--name=verify", "--rw=randread", *client, *stamped, cwd=tmp_path)


@requires("nbdkit", "nbdcopy")
def test_nbdkit_passes_the_disk_on(disk: Disk, tmp_path: Path) -> None:
    """nbdkit's nbd plugin is another NBD client, with more than one connection."""
    plugin = ("nbd", f"uri={disk.uri}", "shared=true")
    run("nbdkit", "-U", "-", "-r", "--exit-with-parent", *plugin, "--run", f'nbdcopy "$uri" "{tmp_path}/copy"')
    assert filecmp.cmp(disk.raw, tmp_path / "copy", shallow=False)


@contextlib.contextmanager
def mounted(uri: str, directory: Path) -> Iterator[Path]:
    """The export as a file of a FUSE file system."""
    ready = directory / "pid"
    mountpoint = directory / "mnt"
    mountpoint.mkdir()
    process = subprocess.Popen(["nbdfuse", "-r", "-P", ready, mountpoint / "disk", uri], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + PATIENCE
        while not ready.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert ready.exists(), process.communicate()[1]
        yield mountpoint / "disk"
    finally:
        execute("fusermount3", "-u", mountpoint)
        process.kill()
        process.communicate()


@requires("nbdfuse", "fusermount3")
@pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="needs /dev/fuse")
def test_nbdfuse_shows_the_disk_as_a_file(disk: Disk, tmp_path: Path) -> None:
    with mounted(disk.uri, tmp_path) as file:
        assert filecmp.cmp(disk.raw, file, shallow=False)


@requires("nbdinfo")
def test_the_server_takes_its_socket_away_when_it_ends(disk: Disk) -> None:
    with serve("-r", disk.raw, "-f", "raw") as server:
        assert server.socket.is_socket()
        assert server.socket.stat().st_mode & 0o777 == 0o600
        assert server.terminate() == 0
        assert not server.socket.exists()
        assert execute("nbdinfo", "--size", server.uri()).returncode != 0

"""``nbdq probe`` finds no deviation in ``nbdq serve``, whatever is served and however."""

import json
from pathlib import Path

import pytest

from tests.support.cli import run_nbdq
from tests.support.pki import Authority
from tests.support.serving import serve
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A qcow2 image of no whole number of sectors' worth of clusters, with data, a backing file and a bitmap."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "20M")
    run("qemu-io", "-c", "write -P 1 1M 3M", "-c", "write -c -P 2 8M 64k", base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top, "40001k")
    run("qemu-img", "bitmap", "--add", top, "b0")
    run("qemu-io", "-c", "write -P 3 2M 64k", "-c", "write -z 3M 64k", top)
    return top


def _deviations(uri: str, *words: str) -> list[str]:
    """What the probe finds."""
    done = run_nbdq("probe", "--json", *words, uri)
    results = json.loads(done.stdout)
    found = [f"{result['check']}: {result['observed']}" for result in results if result["verdict"] == "deviates"]
    assert sum(result["verdict"] == "ok" for result in results) > 3
    assert done.exit_code == (1 if found else 0), done.stderr
    return found


def test_a_writable_export_among_others_keeps_every_rule(image: Path, tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "other.qcow2", "1T")
    with serve("-A", "-x", "disk", "-x", "other", image, tmp_path / "other.qcow2") as server:
        assert not _deviations(server.uri("disk"), "--write")
        assert not _deviations(server.uri("other"))


def test_a_read_only_export_keeps_every_rule(image: Path) -> None:
    with serve("-r", "-A", "-B", "b0", "-x", "disk", image) as server:
        assert not _deviations(server.uri("disk"), "--write")


def test_a_raw_disk_of_an_odd_size_keeps_every_rule(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"\1" * 1_000_001)
    with serve("-f", "raw", tmp_path / "raw") as server:
        assert not _deviations(server.uri(), "--write")


@requires("certtool")
@pytest.mark.parametrize("mode", ["allow", "require"])
def test_tls_keeps_every_rule(image: Path, tmp_path: Path, mode: str) -> None:
    authority = Authority(tmp_path / "authority")
    authority.server(tmp_path / "server")
    client = authority.client(tmp_path / "client")
    with serve("--tls", mode, "--tls-creds", tmp_path / "server", image) as server:
        secure = server.uri().replace("nbd+unix", "nbds+unix") + f"&tls-certificates={client}&tls-hostname=localhost"
        assert not _deviations(secure, *(["--write"] if mode == "require" else []))
        assert not _deviations(server.uri(), "--only", "P12", "--only", "P24", "--only", "P60", "--only", "P64")


def test_without_permission_nothing_is_written(image: Path, tmp_path: Path) -> None:
    run("qemu-img", "convert", "-O", "raw", image, tmp_path / "before")
    with serve(image) as server:
        assert not _deviations(server.uri())
    run("qemu-img", "convert", "-O", "raw", image, tmp_path / "after")
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


@pytest.mark.parametrize("size", [0, 100])
def test_an_export_of_next_to_nothing_keeps_every_rule(tmp_path: Path, size: int) -> None:
    (tmp_path / "raw").write_bytes(b"\1" * size)
    with serve("-f", "raw", tmp_path / "raw") as server:
        assert not _deviations(server.uri(), "--write")

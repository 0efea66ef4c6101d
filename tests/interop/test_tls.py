"""Clients that people have, under TLS: that they are let in, see the right bytes, and are refused when they must be."""

import filecmp
import json
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest

from tests.support.cli import nbdq, run_nbdq
from tests.support.images import Layer, Variant, build
from tests.support.pki import Authority, Pki
from tests.support.serving import PATIENCE, Server, refusal, serve
from tests.support.tools import execute, requires, run

SIZE = 8 << 20
DISK = Variant(
    "disk",
    (
        Layer("6M", ("compress 0 1M", "write 2M 1M", "write 5M 64k"), "compression_type=zstd"),
        Layer("8M", ("write 64k 64k", "zero 2M 64k", "compress 4M 512k", "write 8M-512 512")),
    ),
)

pytestmark = requires("qemu-img", "qemu-io", "certtool")


class Place(NamedTuple):
    """A server on TCP, which a certificate can name, and who may use it."""

    server: Server
    port: int
    client: Path
    """Directory of credentials."""

    @property
    def uri(self) -> str:
        return f"nbds://localhost:{self.port}/disk?tls-certificates={self.client}"

    def qemu(self, *words: str, client: Path | None = None) -> tuple[str, ...]:
        """The arguments with which QEMU's tools get there."""
        credentials = f"tls-creds-x509,id=tls,endpoint=client,dir={client or self.client}"
        options = f"driver=nbd,host=localhost,port={self.port},export=disk,tls-creds=tls"
        return (*words, "--object", credentials, "--image-opts", options)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    directory = tmp_path_factory.mktemp("pki")
    authority = Authority(directory / "authority")
    return Pki(authority, authority.server(directory / "server"), authority.client(directory / "client"))


def place_of(server: Server, client: Path) -> Place:
    """The TCP socket, whose URI is printed after that of the unix socket; once for a server."""
    assert server.process.stdout is not None
    port = urlsplit(server.process.stdout.readline().decode()).port
    assert port
    return Place(server, port, client)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The top of a chain, and its bytes."""
    directory = tmp_path_factory.mktemp("disk")
    top = build(DISK, directory).top
    run("qemu-img", "convert", "-O", "raw", top, directory / "raw")
    return top, directory / "raw"


@pytest.fixture(scope="module")
def place(pki: Pki, image: tuple[Path, Path]) -> Iterator[Place]:
    with serve_tcp("-r", "-x", "disk", "--tls-creds", pki.server, image[0]) as server:
        yield place_of(server, pki.client)


def serve_tcp(*words: str | Path) -> AbstractContextManager[Server]:
    """:func:`serve` on a free TCP port, too."""
    return serve("-b", "127.0.0.1", "-p", "0", *words)


def test_nbdinfo_and_qemu_see_the_same_disk_as_without_tls(place: Place, image: tuple[Path, Path]) -> None:
    described = json.loads(run("nbdinfo", "--json", place.uri))
    assert (described["protocol"], described["TLS"], described["structured"]) == ("newstyle-fixed", True, True)
    assert described["exports"][0]["export-size"] == SIZE
    assert json.loads(run(*place.qemu("qemu-img", "info", "--output=json")))["virtual-size"] == SIZE
    mapped = json.loads(run("nbdinfo", "--map", "--json", place.uri))
    plain = json.loads(run("qemu-img", "map", "--output=json", image[0]))
    assert sum(extent["length"] for extent in mapped) == SIZE
    data = [(e["offset"], e["offset"] + e["length"]) for e in mapped if e["type"] == 0]
    assert all(any(start <= e["start"] < end for start, end in data) for e in plain if e["data"])
    seen = json.loads(run(*place.qemu("qemu-img", "map", "--output=json")))
    assert sum(extent["length"] for extent in seen if extent["data"]) == sum(end - start for start, end in data)


@requires("nbdcopy")
@pytest.mark.parametrize("connections", [1, 4])
def test_nbdcopy_copies_the_disk(place: Place, image: tuple[Path, Path], tmp_path: Path, connections: int) -> None:
    run("nbdcopy", f"--connections={connections}", place.uri, tmp_path / "copy")
    assert filecmp.cmp(tmp_path / "copy", image[1], shallow=False)


def test_qemu_img_copies_the_disk(place: Place, image: tuple[Path, Path], tmp_path: Path) -> None:
    command = place.qemu("qemu-img", "convert", "-O", "raw")
    run(*command, str(tmp_path / "copy"))
    assert filecmp.cmp(tmp_path / "copy", image[1], shallow=False)


@requires("nbdkit", "nbdinfo")
def test_nbdkit_passes_the_disk_on(place: Place, image: tuple[Path, Path], tmp_path: Path) -> None:
    words = ("hostname=localhost", f"port={place.port}", "export=disk", "tls=require")
    run(
        *("nbdkit", "-U", "-", "nbd", *words, f"tls-certificates={place.client}"),
        *("--run", f'nbdcopy "$uri" {tmp_path / "copy"}'),
    )
    assert filecmp.cmp(tmp_path / "copy", image[1], shallow=False)


@requires("nbd-client")
def test_nbd_client_lists_the_exports(place: Place) -> None:
    files = [
        *("-certfile", place.client / "client-cert.pem", "-keyfile", place.client / "client-key.pem"),
        *("-cacertfile", place.client / "ca-cert.pem", "-tlshostname", "localhost"),
    ]
    listed = run("nbd-client", "-l", "localhost", str(place.port), *files)
    assert listed.splitlines()[-1] == "disk"


def test_clients_without_tls_learn_nothing(place: Place) -> None:
    plain = f"nbd://localhost:{place.port}/disk"
    assert "TLS" in execute("qemu-img", "info", plain).stderr
    assert execute("nbdinfo", plain).returncode != 0
    assert "disk" not in execute("nbdinfo", "--list", f"nbd://localhost:{place.port}/").stdout


def test_clients_with_foreign_certificates_are_refused(place: Place, pki: Pki, tmp_path: Path) -> None:
    others = Authority(tmp_path / "others").client(tmp_path / "foreign")
    refused = execute(*place.qemu("qemu-img", "info", client=others))  # does not trust us, either
    assert refused.returncode != 0
    (others / "ca-cert.pem").write_bytes((pki.client / "ca-cert.pem").read_bytes())
    refused = execute(*place.qemu("qemu-img", "info", client=others))
    assert refused.returncode != 0
    expired = pki.authority.client(tmp_path / "expired", expired=True)
    uri = f"nbds://localhost:{place.port}/disk?tls-certificates={expired}"
    assert execute("nbdinfo", uri).returncode != 0
    run("nbdinfo", "--size", place.uri)


def test_what_is_written_under_tls_is_in_the_image(pki: Pki, tmp_path: Path) -> None:
    image, raw = tmp_path / "image", tmp_path / "raw"
    run("qemu-img", "create", "-f", "qcow2", image, "64M")
    with serve_tcp("-x", "disk", "--tls-creds", pki.server, image) as server:
        place = place_of(server, pki.client)
        commands = ("write -P 9 1M 20M", "write -z 2M 1M", "discard 3M 1M", "write -f -P 5 60M 64k", "flush")
        words = [word for command in commands for word in ("-c", command)]
        run(*place.qemu("qemu-io"), *words)
        verify = ("read -P 9 1M 1M", "read -P 0 2M 2M", "read -P 9 4M 17M", "read -P 5 60M 64k")
        said = run(*place.qemu("qemu-io"), *(word for command in verify for word in ("-c", command)))
        assert "verification failed" not in said
        run("nbdcopy", place.uri, raw)
        run("nbdcopy", raw, place.uri)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, image)
    run("qemu-img", "check", image)


def test_a_unix_socket_can_demand_tls_too(pki: Pki, image: tuple[Path, Path]) -> None:
    with serve("-r", "-x", "disk", "--tls-certificates", pki.server, image[0]) as server:
        assert server.printed_uri.startswith("nbds+unix:///disk?socket=")
        run("nbdinfo", "--size", f"{server.printed_uri}&tls-certificates={pki.client}&tls-hostname=localhost")
        options = f"driver=nbd,path={server.socket},export=disk,tls-creds=tls,tls-hostname=localhost"
        credentials = f"tls-creds-x509,id=tls,endpoint=client,dir={pki.client}"
        run("qemu-img", "info", "--object", credentials, "--image-opts", options)


def test_a_subject_that_qemu_nbd_lets_in_is_let_in_by_us(pki: Pki, image: tuple[Path, Path], tmp_path: Path) -> None:
    """The string that QEMU compares, taken from what it says when it refuses."""
    name = subject_as_qemu_says_it(pki, image[0])
    assert "laptop.example.com" in name
    for subject, admitted in ((name, True), (name + "x", False)):
        config = tmp_path / "nbdq.toml"
        config.write_text(f"""
            [[listen]]
            port = 0
            [tls]
            certificates = {json.dumps(str(pki.server))}
            [[export]]
            image = {json.dumps(str(image[0]))}
            name = "disk"
            read-only = true
            access = {{ subjects = [{json.dumps(subject)}] }}
        """)
        command = [sys.executable, "-m", "nbdq", "serve", "--config", str(config)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                uri = server.stdout.readline().strip()
                found = execute("nbdinfo", "--size", f"{uri}?tls-certificates={pki.client}")
                assert (found.returncode == 0) == admitted, found.stderr
            finally:
                server.terminate()
                assert server.wait(PATIENCE) == 0


def subject_as_qemu_says_it(pki: Pki, image: Path) -> str:
    credentials = f"tls-creds-x509,id=tls,endpoint=server,dir={pki.server},verify-peer=yes"
    words = ("--object", credentials, "--tls-creds", "tls", "--object", "authz-simple,id=who,identity=nobody")
    with tempfile.TemporaryDirectory(prefix="nbdq-") as directory:
        path = Path(directory, "socket")
        command = ["qemu-nbd", "-r", "-k", str(path), *words, "--tls-authz", "who", str(image)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            try:
                wait_until(path.exists)
                execute("nbdinfo", "--size", f"nbds+unix:///?socket={path}&tls-certificates={pki.client}")
                assert server.stderr is not None
                match = re.search("authz check for (.*) is denied", server.stderr.readline())
            finally:
                server.kill()
    assert match
    return match[1]


def test_where_tls_is_allowed_clients_choose(pki: Pki, image: tuple[Path, Path]) -> None:
    with serve_tcp("-r", "-x", "disk", "--tls", "allow", "--tls-creds", pki.server, image[0]) as server:
        place = place_of(server, pki.client)
        assert json.loads(run("nbdinfo", "--json", place.uri))["TLS"] is True
        assert json.loads(run("nbdinfo", "--json", f"nbd://localhost:{place.port}/disk"))["TLS"] is False


def test_clients_need_no_certificate_where_none_is_asked_for(
    pki: Pki, image: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "ca-cert.pem").write_bytes((pki.client / "ca-cert.pem").read_bytes())
    words = ("--tls-creds", pki.server, "--no-tls-verify-peer")
    with serve_tcp("-r", "-x", "disk", *words, image[0]) as server:
        place = place_of(server, tmp_path)
        run(*place.qemu("qemu-img", "info"))
        run("nbdinfo", "--size", place.uri)


@pytest.mark.parametrize("words", [("--tls", "require"), ("--tls", "allow"), ("--tls-creds", "nowhere")])
def test_a_server_without_usable_credentials_does_not_start(words: tuple[str, ...], image: tuple[Path, Path]) -> None:
    said = refusal("-r", *words, image[0])
    assert said.count("\n") == 1
    assert "TLS" in said


needs_psk = pytest.mark.skipif(not getattr(ssl, "HAS_PSK", False), reason="this Python has no pre-shared keys")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A directory with a file of keys as QEMU wants it."""
    directory = tmp_path / "keys"
    directory.mkdir(mode=0o700)
    for name in ("alice", "bob"):
        run("psktool", "-u", name, "-p", directory / "keys.psk")
    (directory / "keys.psk").chmod(0o600)
    return directory


@needs_psk
@requires("psktool")
def test_clients_are_let_in_for_the_key_that_they_know(keys: Path, image: tuple[Path, Path], tmp_path: Path) -> None:
    path = keys / "keys.psk"
    with serve_tcp("-r", "-x", "disk", "--tls-psk", path, image[0]) as server:
        port = place_of(server, keys).port
        run("nbdcopy", f"nbds://alice@localhost:{port}/disk?tls-psk-file={path}", tmp_path / "copy")
        assert filecmp.cmp(tmp_path / "copy", image[1], shallow=False)
        credentials = f"tls-creds-psk,id=tls,endpoint=client,dir={keys},username=bob"
        options = f"driver=nbd,host=localhost,port={port},export=disk,tls-creds=tls"
        run("qemu-img", "info", "--object", credentials, "--image-opts", options)
        nbdq("wait", f"nbds://bob@localhost:{port}/disk?tls-psk-file={path}")
        for name in ("alice", "mallory"):
            wrong = tmp_path / "wrong"
            wrong.write_text(f"{name}:00112233445566778899aabbccddeeff\n")
            uri = f"nbds://{name}@localhost:{port}/disk?tls-psk-file={wrong}"
            assert execute("nbdinfo", uri).returncode != 0


@needs_psk
@requires("psktool")
def test_a_server_that_knows_no_key_cannot_show_a_certificate_in_place_of_it(
    keys: Path, pki: Pki, image: tuple[Path, Path]
) -> None:
    """TLS 1.3 lets it; it could be anybody between us and the server."""
    with serve_tcp("-r", "-x", "disk", "--tls-creds", pki.server, "--no-tls-verify-peer", image[0]) as server:
        port = place_of(server, keys).port
        uri = f"nbds://alice@localhost:{port}/disk?tls-psk-file={keys / 'keys.psk'}"
        assert run_nbdq("wait", "--timeout", "0", uri).exit_code != 0


@pytest.mark.skipif(getattr(ssl, "HAS_PSK", False), reason="this Python has pre-shared keys")
@requires("psktool")
def test_a_python_without_pre_shared_keys_says_what_is_needed(keys: Path, image: tuple[Path, Path]) -> None:
    said = refusal("-r", "--tls-psk", keys / "keys.psk", image[0])
    assert said.count("\n") == 1
    assert "Python 3.13" in said


def test_sighup_reads_certificates_anew_and_keeps_the_old_ones_when_that_fails(
    pki: Pki, image: tuple[Path, Path], tmp_path: Path
) -> None:
    directory = pki.authority.server(tmp_path / "server")
    others = Authority(tmp_path / "others")
    renewed, client = others.server(tmp_path / "renewed"), others.client(tmp_path / "client")
    with serve_tcp("-v", "-r", "-x", "disk", "--tls-creds", directory, image[0]) as server:
        old = place_of(server, pki.client)
        new = old._replace(client=client)
        (directory / "server-key.pem").write_text("broken")
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "server-key.pem" in server.stderr)
        run("nbdinfo", "--size", old.uri)
        for name in ("server-key.pem", "server-cert.pem", "ca-cert.pem"):
            (directory / name).write_bytes((renewed / name).read_bytes())
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: execute("nbdinfo", "--size", new.uri).returncode == 0)
        assert execute("nbdinfo", "--size", old.uri).returncode != 0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it does not come true"
        time.sleep(0.05)

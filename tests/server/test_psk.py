"""TLS with pre-shared keys: the file of keys, and clients that know one, none or another's (P65)."""

import contextlib
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from nbdq.errors import ExportError
from nbdq.nbd.handshake import TlsMode
from nbdq.server.admission.access import Access
from nbdq.server.exports.export import Export
from nbdq.server.tls.credentials import Tls, TlsSettings
from nbdq.server.tls.psk import PresharedKeys
from tests.server.client import ACK, GO
from tests.server.conftest import CONTENT
from tests.server.harness import LoopServer, MemoryDisk
from tests.server.secure import FLAGS, GO_DISK, STARTTLS, UNKNOWN, TlsClient, answer
from tests.support.tools import requires, run

KEY = "00112233445566778899aabbccddeeff"
HAS_PSK = getattr(ssl, "HAS_PSK", False)
with_psk = pytest.mark.skipif(not HAS_PSK, reason="this Python has no pre-shared keys")


def keys_in(path: Path, content: str = f"alice:{KEY}\nbob:{KEY[::-1]}\n") -> Path:
    path.write_text(content)
    path.chmod(0o600)
    return path


def complaint(path: Path) -> str:
    with pytest.raises(ExportError) as raised:
        PresharedKeys.load(str(path))
    said = str(raised.value)
    assert str(path) in said
    assert "\n" not in said
    return said


@requires("psktool")
def test_the_keys_of_psktool_are_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.psk"
    for name in ("alice", "bob"):
        run("psktool", "-u", name, "-p", path)
    path.chmod(0o600)
    keys = PresharedKeys.load(str(path))
    for line in path.read_text().splitlines():
        name, key = line.split(":")
        assert keys.key_of(name).hex() == key


def test_an_unknown_name_gets_a_key_that_nobody_has(tmp_path: Path) -> None:
    keys = PresharedKeys.load(str(keys_in(tmp_path / "keys")))
    for name in ("mallory", "", None, "alic", "ALICE"):
        found = keys.key_of(name)
        assert found.hex() not in (KEY, KEY[::-1])
        assert found != keys.key_of(name)


def test_keys_that_everybody_may_read_are_refused(tmp_path: Path) -> None:
    path = keys_in(tmp_path / "keys")
    path.chmod(0o640)
    PresharedKeys.load(str(path))
    path.chmod(0o644)
    assert "chmod o=" in complaint(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (f"alice:{KEY}\nnonsense of the secret kind\n", "line 2"),
        ("alice:123\n", "line 1"),  # half a byte
        ("alice:\n", "line 1"),
        (f":{KEY}\n", "line 1"),
        (f"alice:{KEY}\n\nalice:{KEY}\n", "line 3: a second key"),
        ("\n\n", "no key"),
        ("", "no key"),
    ],
)
def test_a_file_with_anything_else_in_it_is_refused_without_telling_secrets(
    tmp_path: Path, content: str, what: str
) -> None:
    said = complaint(keys_in(tmp_path / "keys", content))
    assert what in said
    assert KEY not in said
    assert "secret" not in said


def test_what_is_no_file_of_text_is_refused(tmp_path: Path) -> None:
    assert "No such file" in complaint(tmp_path / "nothing")
    tmp_path.chmod(0o700)
    complaint(tmp_path)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe:00")
    binary.chmod(0o600)
    assert "not text" in complaint(binary)
    huge = keys_in(tmp_path / "huge", "\n" * (1 << 20) + "\n")
    assert "MiB" in complaint(huge)


def knowing(name: str, key: str, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    """The client's side."""
    assert sys.version_info >= (3, 13)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    context.set_ciphers("PSK")
    context.set_psk_client_callback(lambda hint: (name, bytes.fromhex(key)))
    return context


@with_psk
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_who_knows_a_key_is_let_in_under_its_name(tmp_path: Path, version: ssl.TLSVersion) -> None:
    tls = Tls(TlsSettings(psk_file=str(keys_in(tmp_path / "keys"))))
    export = Export.read_only("disk", MemoryDisk(CONTENT))
    export.access = Access(subjects=("PSK:alice",))
    with LoopServer(export, tls=tls, tls_mode=TlsMode.REQUIRE) as server:
        with TlsClient(server, knowing("alice", KEY, version)) as alice:
            assert alice.go().read(0, 100_000) == CONTENT[:100_000]
        with TlsClient(server, knowing("bob", KEY[::-1], version)) as bob:
            assert answer(bob, GO, GO_DISK) == UNKNOWN


@with_psk
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_an_unknown_name_is_refused_like_a_wrong_key(tmp_path: Path, version: ssl.TLSVersion) -> None:
    tls = Tls(TlsSettings(psk_file=str(keys_in(tmp_path / "keys"))))
    alerts = set()
    with LoopServer(Export.read_only("disk", MemoryDisk(CONTENT)), tls=tls, tls_mode=TlsMode.REQUIRE) as server:
        for name, key in (("alice", KEY[::-1]), ("mallory", KEY), ("bob", KEY)):
            with pytest.raises(ssl.SSLError) as raised:
                TlsClient(server, knowing(name, key, version))
            alerts.add(raised.value.reason)
    assert len(alerts) == 1


@with_psk
def test_a_client_without_a_key_is_refused(tmp_path: Path) -> None:
    tls = Tls(TlsSettings(psk_file=str(keys_in(tmp_path / "keys"))))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with LoopServer(Export.read_only("disk", MemoryDisk(CONTENT)), tls=tls, tls_mode=TlsMode.REQUIRE) as server:
        with pytest.raises(ssl.SSLError):
            TlsClient(server, context)
        with TlsClient(server, knowing("alice", KEY)) as client:
            assert answer(client, GO, GO_DISK) == ACK


@with_psk
@requires("openssl")
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_a_name_that_is_no_text_is_refused_without_a_word_on_stderr(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], version: str
) -> None:
    tls = Tls(TlsSettings(psk_file=str(keys_in(tmp_path / "keys"))))
    with LoopServer(
        Export.read_only("disk", MemoryDisk(CONTENT)), tls=tls, tls_mode=TlsMode.REQUIRE, tcp=True
    ) as server:
        relay = socket.create_server(("127.0.0.1", 0))
        where = f"127.0.0.1:{relay.getsockname()[1]}"
        command = ["openssl", "s_client", "-connect", where, version, "-psk", KEY, "-psk_identity", b"\xff\xfe"]
        quiet = subprocess.DEVNULL
        tool = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)
        near, _ = relay.accept()
        client = server.connect()
        client.hello()
        client.socket.sendall(FLAGS)
        with near, relay, tool:
            assert answer(client, STARTTLS) == ACK
            client.socket.sendall(near.recv(1 << 16))
            with contextlib.suppress(ConnectionError, TimeoutError):
                while data := client.socket.recv(1 << 16):
                    near.sendall(data)
                    near.settimeout(0.5)
                    client.socket.sendall(near.recv(1 << 16))
            tool.kill()
        server.wait_for_connections(0)
    assert capfd.readouterr().err == ""

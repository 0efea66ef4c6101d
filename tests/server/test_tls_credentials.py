"""What an operator gives TLS to work with: certificates that are checked, exchanged, and what it costs to have them."""

import contextlib
import gc
import ssl
from pathlib import Path

import pytest

from nbdq.errors import ExportError
from nbdq.server.limits import Limits
from nbdq.server.tls.credentials import Tls, TlsSettings
from tests.server.conftest import CONTENT
from tests.server.harness import MemoryDisk, resident_bytes
from tests.server.secure import TlsClient, serving, trusting
from tests.support.pki import Authority, Pki
from tests.support.tools import requires

pytestmark = requires("certtool")


def test_new_connections_use_what_was_reloaded_and_old_ones_go_on(disk: MemoryDisk, pki: Pki, tmp_path: Path) -> None:
    directory = pki.authority.server(tmp_path / "server")
    tls = Tls(TlsSettings(certificates=str(directory), verify_peer=False))
    others = Authority(tmp_path / "others")
    renewed = others.server(tmp_path / "renewed")
    with serving(disk, tls) as server, TlsClient(server, trusting(pki.server)) as old:
        old.go()
        (directory / "server-key.pem").write_bytes((renewed / "server-key.pem").read_bytes())
        with pytest.raises(ExportError, match="key"):  # half of the new: nothing changes
            server.call(tls.reload)
        with TlsClient(server, trusting(pki.server)) as client:
            client.go()
        (directory / "server-cert.pem").write_bytes((renewed / "server-cert.pem").read_bytes())
        server.call(tls.reload)
        with pytest.raises(ssl.SSLError):
            TlsClient(server, trusting(pki.server))
        with TlsClient(server, trusting(others.directory)) as client:
            client.go()
        assert old.read(0, 10) == CONTENT[:10]


def test_credentials_that_clients_would_refuse_are_refused_at_the_start(pki: Pki, tmp_path: Path) -> None:
    def complaint(directory: Path, *, verify_peer: bool = True) -> str:
        with pytest.raises(ExportError) as raised:
            Tls(TlsSettings(certificates=str(directory), verify_peer=verify_peer))
        said = str(raised.value)
        assert "\n" not in said
        assert str(directory) in said
        return said

    assert "No such file" in complaint(tmp_path / "nowhere")
    assert "expired" in complaint(pki.authority.server(tmp_path / "expired", expired=True))
    mixed = pki.authority.server(tmp_path / "mixed")
    (mixed / "server-key.pem").write_bytes((pki.server / "server-key.pem").read_bytes())
    assert "mismatch" in complaint(mixed)
    garbled = pki.authority.server(tmp_path / "garbled")
    (garbled / "ca-cert.pem").write_text("nothing")
    assert "ca-cert.pem" in complaint(garbled)
    (garbled / "server-cert.pem").write_text("nothing")
    assert "server-cert.pem" in complaint(garbled, verify_peer=False)
    lonely = pki.authority.server(tmp_path / "lonely")
    (lonely / "ca-cert.pem").unlink()
    assert "ca-cert.pem" in complaint(lonely)
    Tls(TlsSettings(certificates=str(lonely), verify_peer=False))


def test_an_idle_client_under_tls_costs_little_memory(
    disk: MemoryDisk, tls: Tls, pki: Pki, many_descriptors: None
) -> None:
    """R-17: not the 256 KiB that asyncio takes for each. The clients of the test, in this process too, take as much."""
    context = trusting(pki.server)
    with (
        serving(disk, tls, limits=Limits(peer_connections=0, export_connections=0)) as server,
        contextlib.ExitStack() as clients,
    ):
        for _ in range(20):
            clients.enter_context(TlsClient(server, context)).go()
        before = resident_bytes()
        for _ in range(200):
            clients.enter_context(TlsClient(server, context)).go()
        assert (resident_bytes() - before) / 200 < 250 << 10


def test_what_tls_held_is_given_back_when_the_client_leaves(loop: str, disk: MemoryDisk, tls: Tls, pki: Pki) -> None:
    """At once, and not when the collector of circles comes by, which it does ever more rarely."""
    gc.collect()
    gc.disable()
    try:
        with serving(disk, tls, loop=loop) as server:
            for _ in range(10):
                with TlsClient(server, trusting(pki.server)) as client:
                    client.go().read(0, 1000)
                old = trusting(pki.server)
                old.set_ciphers("ECDHE-RSA-AES128-GCM-SHA256")
                old.maximum_version = ssl.TLSVersion.TLSv1_2
                with pytest.raises(ssl.SSLError):  # for which the server has no certificate
                    TlsClient(server, old)
            server.wait_for_connections(0)
            assert not [one for one in gc.get_objects() if isinstance(one, ssl.SSLObject)]
    finally:
        gc.enable()


HAS_PSK = getattr(ssl, "HAS_PSK", False)


@pytest.mark.skipif(HAS_PSK, reason="this Python has pre-shared keys")
def test_pre_shared_keys_are_refused_at_the_start_where_python_lacks_them(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"3\.13"):
        Tls(TlsSettings(psk_file=str(tmp_path / "keys.psk")))


@pytest.mark.parametrize("settings", [TlsSettings(), TlsSettings(certificates=".", psk_file=".")])
def test_there_are_certificates_or_keys_and_not_both(settings: TlsSettings) -> None:
    with pytest.raises(ExportError, match="either"):
        Tls(settings)

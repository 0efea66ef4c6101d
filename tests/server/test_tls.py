"""TLS on raw sockets: what is said in the clear, the switch, what may happen under TLS, and how it ends (P60-P67)."""

import contextlib
import random
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdq.nbd.handshake import TlsMode
from nbdq.server.admission.access import Access
from nbdq.server.exports.export import Export
from nbdq.server.limits import Limits
from nbdq.server.tls.credentials import Tls, TlsSettings
from tests.server.client import (
    ABORT,
    ACK,
    EXPORT_NAME,
    GO,
    INFO,
    LIST,
    PATIENCE,
    READ,
    SET_META_CONTEXT,
    STRUCTURED_REPLY,
    Client,
    HealthyClient,
    connect,
    option,
    request,
    reset,
    text,
)
from tests.server.conftest import CONTENT
from tests.server.harness import LoopServer, MemoryDisk, no_descriptor_leaks
from tests.server.secure import (
    EXTENDED_HEADERS,
    FLAGS,
    GO_DISK,
    INVALID,
    LIST_META_CONTEXT,
    PEEK_EXPORT,
    POLICY,
    STARTTLS,
    TLS_REQD,
    UNKNOWN,
    TlsClient,
    answer,
    serving,
    trusting,
)
from tests.support.pki import Authority, Pki
from tests.support.tools import requires

pytestmark = requires("certtool")

#: Options, as an honest client sends them.
OPTIONS = {
    "EXPORT_NAME": (EXPORT_NAME, b"disk"),
    "LIST": (LIST, b""),
    "PEEK_EXPORT": (PEEK_EXPORT, b""),
    "INFO": (INFO, GO_DISK),
    "GO": (GO, GO_DISK),
    "GO-unknown": (GO, text("nothing") + struct.pack(">H", 0)),
    "STRUCTURED_REPLY": (STRUCTURED_REPLY, b""),
    "LIST_META_CONTEXT": (LIST_META_CONTEXT, text("disk") + struct.pack(">I", 0)),
    "SET_META_CONTEXT": (SET_META_CONTEXT, text("disk") + struct.pack(">I", 0)),
    "EXTENDED_HEADERS": (EXTENDED_HEADERS, b""),
    "unknown": (99, b""),
    "too-long": (LIST, bytes(70_000)),
}


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_where_tls_is_required_every_other_option_is_refused_before_it(
    loop: str, disk: MemoryDisk, tls: Tls, name: str
) -> None:
    with serving(disk, tls, loop=loop) as server:
        client = server.connect()
        client.hello()
        client.socket.sendall(FLAGS)
        assert answer(client, *OPTIONS[name]) == (None if name == "EXPORT_NAME" else TLS_REQD)


def test_where_tls_is_required_a_client_may_abort_and_may_not_be_old(disk: MemoryDisk, tls: Tls) -> None:
    with serving(disk, tls) as server:
        polite, old = server.connect(), server.connect()
        for client, flags in ((polite, FLAGS), (old, bytes(4))):
            client.hello()
            client.socket.sendall(flags)
        assert answer(polite, ABORT) == ACK
        assert answer(old, STARTTLS) is None  # would not understand the reply (P13)


def test_where_tls_is_off_it_is_refused_by_policy_and_nothing_demands_it(disk: MemoryDisk) -> None:
    export = Export.read_only("disk", disk)
    export.access = Access(tls=True)
    with LoopServer(export) as server:
        client = server.connect()
        client.hello()
        client.socket.sendall(FLAGS)
        assert answer(client, STARTTLS) == POLICY
        assert answer(client, GO, GO_DISK) == POLICY  # never TLS_REQD (P64)
        assert answer(client, STRUCTURED_REPLY) == ACK  # still in sync


def test_an_export_may_demand_tls_beside_one_that_does_not(disk: MemoryDisk, tls: Tls, pki: Pki) -> None:
    secret, public = Export.read_only("disk", disk), Export.read_only("public", disk)
    secret.access = Access(tls=True)
    with LoopServer(secret, public, tls=tls, tls_mode=TlsMode.ALLOW) as server:
        plain, old = server.connect(), server.connect()
        for client in (plain, old):
            client.hello()
            client.socket.sendall(FLAGS)
        assert answer(old, EXPORT_NAME, b"disk") is None
        assert answer(plain, INFO, GO_DISK) == TLS_REQD
        plain.socket.sendall(option(LIST))
        assert plain.option_reply()[2] == text("public")  # names of the others stay secret
        assert plain.option_reply()[1] == ACK
        assert answer(plain, GO, text("public") + struct.pack(">H", 0)) == ACK
        with TlsClient(server, trusting(pki.server)) as client:
            assert client.go().read(5, 5000) == CONTENT[5:5005]


def test_starttls_forgets_everything_that_was_agreed_in_the_clear(disk: MemoryDisk, tls: Tls, pki: Pki) -> None:
    for agreed in (STRUCTURED_REPLY, EXTENDED_HEADERS):
        with serving(disk, tls, TlsMode.ALLOW) as server, Client(server.address) as plain:
            plain.hello()
            plain.socket.sendall(FLAGS)
            assert answer(plain, agreed) == ACK
            context = text("disk") + struct.pack(">I", 1) + text("base:allocation")
            assert answer(plain, SET_META_CONTEXT, context) == ACK
            assert answer(plain, STARTTLS) == ACK
            plain.socket = trusting(pki.server).wrap_socket(plain.socket)
            assert answer(plain, SET_META_CONTEXT, context) == INVALID, "structured replies are not forgotten (P61)"
            assert answer(plain, GO, GO_DISK) == ACK
            plain.socket.sendall(request(READ, 1, 0, 512))
            assert plain.receive(16) == struct.pack(">IIQ", 0x67446698, 0, 1), "not a simple reply"


def test_starttls_carries_no_data_and_comes_once(disk: MemoryDisk, tls: Tls, pki: Pki) -> None:
    with serving(disk, tls) as server:
        client = server.connect()
        client.hello()
        client.socket.sendall(FLAGS)
        assert answer(client, STARTTLS, b"x") == INVALID
        with TlsClient(server, trusting(pki.server)) as secure:
            assert answer(secure, STARTTLS) == INVALID  # P60
            assert answer(secure, STARTTLS, b"x") == INVALID
            assert answer(secure, GO, GO_DISK) == ACK


@pytest.mark.parametrize("separately", [False, True], ids=["in-one-segment", "in-two"])
@pytest.mark.parametrize("injected", ["option", "hello", "byte"])
def test_bytes_behind_starttls_before_its_answer_end_the_connection(
    loop: str, disk: MemoryDisk, tls: Tls, pki: Pki, injected: str, separately: bool
) -> None:
    """CVE-2021-3716: an option that somebody in between puts there must not count as said under TLS (R-14, P62)."""
    client_hello = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        trusting(pki.server).wrap_bio(ssl.MemoryBIO(), client_hello).do_handshake()
    said = {"option": option(STRUCTURED_REPLY), "hello": client_hello.read(), "byte": b"I"}[injected]
    with serving(disk, tls, loop=loop) as server:
        client = server.connect()
        client.hello()
        with server.paused():
            client.socket.sendall(FLAGS + option(STARTTLS) + (b"" if separately else said))
            if separately:
                client.socket.sendall(said)
        with contextlib.suppress(ConnectionError):
            assert client.socket.recv(100) == b"", "STARTTLS was answered"


def test_a_client_that_talks_on_in_the_clear_after_the_answer_is_cut(loop: str, disk: MemoryDisk, tls: Tls) -> None:
    with serving(disk, tls, loop=loop) as server:
        client = server.connect()
        client.hello()
        client.socket.sendall(FLAGS)
        assert answer(client, STARTTLS) == ACK
        client.socket.sendall(option(LIST))
        said = b""
        with contextlib.suppress(ConnectionError):
            while more := client.socket.recv(100):
                said += more
        assert said[:1] in (b"", b"\x15"), "an answer that is no TLS alert (P63)"


def test_garbled_handshakes_end_one_connection_each(loop: str, disk: MemoryDisk, tls: Tls, pki: Pki) -> None:
    limits = Limits(handshake_seconds=3 * PATIENCE, pending_handshakes=1000)
    with (
        serving(disk, tls, TlsMode.ALLOW, loop=loop, limits=limits) as server,
        HealthyClient(server.address, CONTENT, name="disk") as healthy,
    ):
        for seed in range(100):
            chance = random.Random(seed)
            hello = ssl.MemoryBIO()
            with contextlib.suppress(ssl.SSLWantReadError):
                trusting(pki.server).wrap_bio(ssl.MemoryBIO(), hello).do_handshake()
            said = bytearray(hello.read())
            for _ in range(chance.randint(1, 5)):
                said[chance.randrange(len(said))] = chance.randrange(256)
            with Client(server.address) as client, contextlib.suppress(ConnectionError):
                client.hello()
                client.socket.sendall(FLAGS)
                assert answer(client, STARTTLS) == ACK, f"seed {seed}"
                client.socket.sendall(said)
                client.socket.shutdown(socket.SHUT_WR)
                while client.socket.recv(1 << 16):
                    pass
        healthy.wait_for_a_round()


def test_a_client_may_vanish_at_every_byte_of_the_tls_handshake(
    loop: str, disk: MemoryDisk, strict: Tls, pki: Pki
) -> None:
    limits = Limits(handshake_seconds=10 * PATIENCE)  # that a client is gone is to be noticed long before
    context = trusting(pki.server, certificate=pki.client)
    with serving(disk, strict, loop=loop, tcp=True, limits=limits) as server, no_descriptor_leaks():
        cuts = [*range(0, 400, 37), *range(400, 1400, 97)]
        for number, cut in enumerate(cuts):
            sock = connect(server.address)
            sock.recv(18, socket.MSG_WAITALL)
            sock.sendall(FLAGS + option(STARTTLS))
            sock.recv(20, socket.MSG_WAITALL)
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            client = context.wrap_bio(incoming, outgoing)
            left = cut
            while left:
                try:
                    client.do_handshake()
                    client.write(option(LIST))
                except ssl.SSLWantReadError:
                    pass
                said = outgoing.read()[:left]
                sock.sendall(said)
                left -= len(said)
                if not said or not left:
                    break
                incoming.write(sock.recv(1 << 16))
            (reset if number % 2 else socket.socket.close)(sock)
        server.wait_for_connections(0)


def test_a_slow_tls_handshake_is_ended_by_the_deadline_of_the_whole(loop: str, disk: MemoryDisk, tls: Tls) -> None:
    with serving(disk, tls, loop=loop, limits=Limits(handshake_seconds=0.3)) as server:
        client = server.connect()
        client.hello()
        client.socket.sendall(FLAGS)
        assert answer(client, STARTTLS) == ACK
        with contextlib.suppress(ConnectionError):
            for byte in b"\x16\x03\x01\x02\x00" + bytes(500):  # of a hello, drip by drip
                client.socket.sendall(bytes([byte]))
                if select.select([client.socket], [], [], 0.01)[0]:
                    break
        assert client.is_closed()


class HeldPool:
    """A thread that is busy for as long as the test says."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], None]] = []

    def submit(self, job: Callable[[], None]) -> None:
        self.jobs.append(job)


def test_a_step_of_a_handshake_that_takes_long_holds_up_nobody(loop: str, disk: MemoryDisk, tls: Tls, pki: Pki) -> None:
    """As a signature of a long key does, which strangers can ask for as often as they like."""
    held = HeldPool()
    tls._pool = held  # type: ignore[assignment]
    hello = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        trusting(pki.server).wrap_bio(ssl.MemoryBIO(), hello).do_handshake()
    with serving(disk, tls, TlsMode.ALLOW, loop=loop) as server:
        with HealthyClient(server.address, CONTENT, name="disk") as healthy:
            clients = [server.connect() for _ in range(3)]
            for client in clients:
                client.hello()
                client.socket.sendall(FLAGS)
                assert answer(client, STARTTLS) == ACK
                client.socket.sendall(hello.read() or b"\x16\x03\x01")
            server.wait_for(lambda: len(held.jobs) == 3, "the handshakes have not begun")
            for client in clients:
                client.socket.sendall(bytes(10_000))  # to come back to later
            healthy.wait_for_a_round()
        used = time.process_time()
        time.sleep(0.2)
        assert time.process_time() - used < 0.15, "the server spins"
        server.call(lambda: [connection.abort() for connection in server._server.census])  # as their deadline does
        server.wait_for_connections(0)
        for job in held.jobs:  # too late
            job()
        server.call(lambda: None)


# Who is let in.


def refuses(server: LoopServer, context: ssl.SSLContext, alert: str) -> None:
    """The server ends the handshake with that alert; with TLS 1.3 a client hears of it when it believes to be done."""
    with pytest.raises(ssl.SSLError, match=alert), TlsClient(server, context) as client:
        client.socket.recv(1)


def test_a_client_without_a_certificate_is_refused(disk: MemoryDisk, strict: Tls, pki: Pki) -> None:
    with serving(disk, strict) as server:
        refuses(server, trusting(pki.server), "CERTIFICATE_REQUIRED")
        with TlsClient(server, trusting(pki.server, certificate=pki.client)) as client:
            assert client.go().read(0, 10) == CONTENT[:10]


def test_certificates_of_others_old_ones_and_revoked_ones_are_refused(
    disk: MemoryDisk, pki: Pki, tmp_path: Path
) -> None:
    server_directory = pki.authority.server(tmp_path / "server")
    good = pki.authority.client(tmp_path / "good", "good")
    revoked = pki.authority.client(tmp_path / "revoked", "revoked")
    bad = {
        "UNKNOWN_CA": Authority(tmp_path / "others").client(tmp_path / "foreign"),
        "CERTIFICATE_EXPIRED": pki.authority.client(tmp_path / "expired", expired=True),
        "CERTIFICATE_REVOKED": revoked,
    }
    pki.authority.revoke(revoked, server_directory)
    with serving(disk, Tls(TlsSettings(certificates=str(server_directory)))) as server:
        for alert, certificate in bad.items():
            refuses(server, trusting(pki.server, certificate=certificate), alert)
        with TlsClient(server, trusting(pki.server, certificate=good)) as client:
            client.go()


def test_a_client_that_does_not_trust_the_server_is_no_error_of_ours(
    disk: MemoryDisk, tls: Tls, tmp_path: Path
) -> None:
    others = Authority(tmp_path / "others")
    with serving(disk, tls) as server, pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        TlsClient(server, trusting(others.directory))


@pytest.mark.parametrize(
    ("pattern", "admitted"),
    [
        ("CN=laptop.example.com,O=Example\\, Home,C=GB", True),  # as RFC 4514 and QEMU's manual have it
        ("C=GB,O=Example\\, Home,CN=laptop.example.com", True),  # as QEMU has it
        ("CN=laptop.example.com,*", True),
        ("DNS:*.example.com", True),
        ("URI:spiffe://example.com/laptop", True),
        ("email:root@example.com", True),
        ("IP:192.0.2.7", True),
        ("CN=laptop.example.com", False),
        ("CN=other.example.com,*", False),
    ],
)
def test_an_export_lets_in_whom_its_list_of_subjects_names(
    disk: MemoryDisk, strict: Tls, pki: Pki, tmp_path: Path, pattern: str, admitted: bool
) -> None:
    names = (
        'dns_name = "laptop.example.com"',
        'uri = "spiffe://example.com/laptop"',
        'email = "root@example.com"',
        'ip_address = "192.0.2.7"',
    )
    certificate = pki.authority.client(tmp_path / "client", "laptop.example.com", *names)
    context = trusting(pki.server, certificate=certificate)
    with serving(disk, strict, access=Access(subjects=(pattern,))) as server, TlsClient(server, context) as client:
        assert answer(client, GO, GO_DISK) == (ACK if admitted else UNKNOWN)


def test_a_name_with_special_characters_cannot_look_like_another(
    pki: Pki, strict: Tls, disk: MemoryDisk, tmp_path: Path
) -> None:
    certificate = pki.authority.client(tmp_path / "client", "eve,CN=laptop.example.com")
    context = trusting(pki.server, certificate=certificate)
    for pattern, verdict in (("CN=laptop.example.com,*", UNKNOWN), ("CN=eve\\,CN=laptop.example.com,*", ACK)):
        with serving(disk, strict, access=Access(subjects=(pattern,))) as server, TlsClient(server, context) as client:
            assert answer(client, GO, GO_DISK) == verdict


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_versions_of_tls_are_refused(disk: MemoryDisk, tls: Tls, pki: Pki) -> None:
    context = trusting(pki.server)
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with serving(disk, tls) as server, pytest.raises(ssl.SSLError):
        TlsClient(server, context)


def test_both_versions_of_tls_are_spoken_with_modern_ciphers_alone(disk: MemoryDisk, tls: Tls, pki: Pki) -> None:
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = trusting(pki.server)
        context.minimum_version = context.maximum_version = version
        with serving(disk, tls) as server, TlsClient(server, context) as client:
            assert client.go().read(0, 100_000) == CONTENT[:100_000]
            cipher = client.socket.cipher()  # type: ignore[attr-defined]
            assert "GCM" in cipher[0] or "CHACHA20" in cipher[0]
            assert client.socket.compression() is None  # type: ignore[attr-defined]


def test_more_clients_under_tls_than_allowed_are_refused_it(disk: MemoryDisk, tls: Tls, pki: Pki) -> None:
    with serving(disk, tls, limits=Limits(tls_connections=1)) as server:
        with TlsClient(server, trusting(pki.server)) as first:
            first.go()
            second = server.connect()
            second.hello()
            second.socket.sendall(FLAGS)
            assert answer(second, STARTTLS) == POLICY
        server.wait_for(lambda: server.connections == 1, "the first is not gone")
        assert answer(second, STARTTLS) == ACK

"""TLS on raw sockets: what is said in the clear, the switch, what may happen under TLS, and how it ends (P60-P67)."""

import contextlib
import gc
import logging
import random
import select
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from nbdq.errors import ExportError
from nbdq.nbd.handshake import TlsMode
from nbdq.server.access import Access
from nbdq.server.export import Export
from nbdq.server.limits import Limits
from nbdq.server.tls import Tls, TlsSettings
from tests.server.client import (
    ABORT,
    ACK,
    DISC,
    EXPORT_NAME,
    FIXED_NEWSTYLE,
    GO,
    INFO,
    LIST,
    NO_ZEROES,
    PATIENCE,
    READ,
    SET_META_CONTEXT,
    STRUCTURED_REPLY,
    WRITE,
    Client,
    Disconnected,
    HealthyClient,
    connect,
    handshake,
    option,
    request,
    reset,
    text,
)
from tests.server.conftest import CONTENT
from tests.server.harness import FileDisk, LoopServer, MemoryDisk, WritableDisk, no_descriptor_leaks, resident_bytes
from tests.support.pki import Authority
from tests.support.tools import requires

pytestmark = requires("certtool")

PEEK_EXPORT, STARTTLS, LIST_META_CONTEXT, EXTENDED_HEADERS = 4, 5, 9, 11
POLICY, INVALID, TLS_REQD, UNKNOWN = 0x80000002, 0x80000003, 0x80000005, 0x80000006
FLAGS = struct.pack(">I", FIXED_NEWSTYLE | NO_ZEROES)
GO_DISK = text("disk") + struct.pack(">H", 0)


class Pki(NamedTuple):
    """Directories with credentials."""

    authority: Authority
    server: Path
    client: Path


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    directory = tmp_path_factory.mktemp("pki")
    authority = Authority(directory / "authority")
    return Pki(authority, authority.server(directory / "server"), authority.client(directory / "client"))


@pytest.fixture
def tls(pki: Pki) -> Tls:
    """The server's side, without demands on clients."""
    return Tls(TlsSettings(certificates=str(pki.server), verify_peer=False))


@pytest.fixture
def strict(pki: Pki) -> Tls:
    """The server's side; clients need a certificate."""
    return Tls(TlsSettings(certificates=str(pki.server)))


def trusting(directory: Path, *, certificate: Path | None = None) -> ssl.SSLContext:
    """A client's side: trusts the authority of ``directory``, and shows the ``certificate`` in its directory."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(directory / "ca-cert.pem")
    if certificate is not None:
        context.load_cert_chain(certificate / "client-cert.pem", certificate / "client-key.pem")
    return context


class TlsClient(Client):
    """A client that has negotiated TLS and says everything else under it."""

    def __init__(self, server: LoopServer, context: ssl.SSLContext) -> None:
        super().__init__(server.address)
        try:
            self.start_tls(context)
        except BaseException:
            self.socket.close()
            raise

    def start_tls(self, context: ssl.SSLContext) -> None:
        super().hello()
        self.socket.sendall(FLAGS + option(STARTTLS))
        assert self.option_reply() == (STARTTLS, ACK, b"")
        self.socket = context.wrap_socket(self.socket)

    def hello(self) -> None:
        """Was said in the clear."""

    def go(self, name: str = "disk", **agreed: object) -> "TlsClient":
        self.socket.sendall(handshake(name, **agreed)[len(FLAGS) :])  # type: ignore[arg-type]
        self.finish_handshake()
        return self


@contextlib.contextmanager
def serving(
    disk: MemoryDisk, tls: Tls, mode: TlsMode = TlsMode.REQUIRE, *, access: Access | None = None, **options: object
) -> Iterator[LoopServer]:
    """A server of ``disk`` under that name."""
    make = Export.writable if isinstance(disk, WritableDisk) else Export.read_only
    export = make("disk", disk)
    if access is not None:
        export.access = access
    with LoopServer(export, tls=tls, tls_mode=mode, **options) as server:  # type: ignore[arg-type]
        yield server


def answer(client: Client, code: int, data: bytes = b"") -> int | None:
    """The type of the last reply to an option; None if the server hangs up instead."""
    client.socket.sendall(option(code, data))
    try:
        while True:
            _, kind, _ = client.option_reply()
            if kind == ACK or kind >> 31:
                return kind
    except Disconnected:
        return None


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
        ("CN=laptop.example.com,O=Example\\, Home,C=GB", True),  # as RFC 4514, GnuTLS and QEMU write it
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


# Requests.


@pytest.mark.parametrize("kind", ["memory", "file", "pool"])
def test_what_is_read_under_tls_is_what_the_disk_holds(
    loop: str, tls: Tls, pki: Pki, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(CONTENT)
    disk = FileDisk(path) if kind == "file" else MemoryDisk(CONTENT, cached=kind == "memory")
    chance = random.Random(kind)
    with serving(disk, tls, loop=loop) as server, TlsClient(server, trusting(pki.server)) as client:
        client.go(contexts=("base:allocation",))
        expected = {}
        said = b""
        for _ in range(60):
            length = chance.choice((1, 512, 4096, 16384, 16385, 70_000, 1 << 20, 3 << 20))
            offset = chance.randrange(len(CONTENT) - length)
            header = client.pack(READ, offset, length)
            said += header
            expected[header[8:16]] = CONTENT[offset : offset + length]
        client.socket.sendall(said)
        for cookie, reply in client.replies().items():
            assert reply.data == expected[cookie.to_bytes(8, "big")]
    disk.close()


def test_clients_that_read_late_get_everything_and_are_not_read_meanwhile(loop: str, tls: Tls, pki: Pki) -> None:
    disk = MemoryDisk(CONTENT)
    limits = Limits(connection_bytes=4 << 20)
    with serving(disk, tls, loop=loop, limits=limits) as server, TlsClient(server, trusting(pki.server)) as client:
        client.go()
        client.socket.sendall(b"".join(client.pack(READ, 0, 1 << 20) for _ in range(200)))
        server.wait_for(lambda: disk.pieces_gathered > 0, "nothing is read")
        with HealthyTlsClient(server, pki) as healthy:
            healthy.wait_for_a_round()
        assert disk.pieces_gathered < 100, "read on for a client that takes nothing"
        for reply in client.replies().values():
            assert reply.data == CONTENT[: 1 << 20]


class HealthyTlsClient(HealthyClient):
    """Reads under TLS beside others."""

    def __init__(self, server: LoopServer, pki: Pki) -> None:
        super().__init__(server.address, CONTENT, client=TlsClient(server, trusting(pki.server)).go())


def test_writes_of_every_size_arrive_however_the_records_are_cut(loop: str, tls: Tls, pki: Pki) -> None:
    disk = WritableDisk(bytes(4 << 20))
    chance = random.Random("writes")
    model = bytearray(4 << 20)
    with serving(disk, tls, loop=loop) as server, TlsClient(server, trusting(pki.server)) as client:
        client.go()
        for length in (1, 512, 4096, 16384, 100_000, 256 << 10, (256 << 10) + 1, 1 << 20, 2 << 20):
            offset = chance.randrange(len(model) - length)
            payload = chance.randbytes(length)
            said = client.pack(WRITE, offset, length) + payload + client.pack(READ, offset, 10)
            while said:  # a record for each piece
                size = chance.choice((1, 28, 100, 5000, 16384, 60_000)) if len(said) < 300_000 else 16384
                client.socket.sendall(said[:size])
                said = said[size:]
            assert all(reply.error == 0 for reply in client.replies().values())
            model[offset : offset + length] = payload
        assert client.read(0, 4 << 20) == model
    assert disk.content == model


def test_a_thousand_requests_in_one_segment_are_all_answered(loop: str, disk: MemoryDisk, tls: Tls, pki: Pki) -> None:
    """More than one receive takes; what the TLS layer has kept is not forgotten when the socket has nothing more."""
    with serving(disk, tls, loop=loop) as server, TlsClient(server, trusting(pki.server)) as client:
        client.go()
        offsets = {}
        said = b""
        for number in range(5000):
            header = client.pack(READ, number * 64, 64)
            offsets[int.from_bytes(header[8:16], "big")] = number * 64
            said += header
        with server.paused():
            client.socket.sendall(said)
        for cookie, reply in client.replies().items():
            assert reply.data == CONTENT[offsets[cookie] :][:64]


def test_replies_half_encrypted_from_a_file_stay_true_although_the_file_changes(
    loop: str, tls: Tls, pki: Pki, tmp_path: Path
) -> None:
    """The disk is drained for an operation while a client has not read its replies."""
    path = tmp_path / "disk"
    path.write_bytes(CONTENT)
    disk = FileDisk(path)
    export = Export.read_only("disk", disk)
    with (
        LoopServer(export, tls=tls, tls_mode=TlsMode.REQUIRE, loop=loop) as server,
        TlsClient(server, trusting(pki.server)) as client,
    ):
        client.go()
        client.socket.sendall(b"".join(client.pack(READ, 0, 2 << 20) for _ in range(8)))
        assert select.select([client.socket], [], [], PATIENCE)[0]

        async def change() -> None:
            async with export.gate.closed():
                path.write_bytes(bytes(len(CONTENT)))

        server.wait(change)
        first = client.reply()
        assert first.data == CONTENT[: 2 << 20]
        seen = {reply.data for reply in client.replies().values()}
        assert seen <= {CONTENT[: 2 << 20], bytes(2 << 20)}, "a reply of two ages"
    disk.close()


# Endings.


def test_the_server_says_farewell_and_so_may_the_client(loop: str, disk: MemoryDisk, tls: Tls, pki: Pki) -> None:
    for tcp in (False, True):
        with serving(disk, tls, loop=loop, tcp=tcp) as server, TlsClient(server, trusting(pki.server)) as client:
            client.go()
            client.socket.sendall(request(DISC))
            client.socket.suppress_ragged_eofs = False  # type: ignore[attr-defined]
            assert client.socket.recv(1) == b"", "cut without close_notify (P67)"


@pytest.mark.parametrize("goodbye", ["close_notify", "FIN", "RST"])
@pytest.mark.parametrize("stage", ["before TLS", "handshake", "transmission", "with requests"])
def test_a_client_that_leaves_at_any_stage_costs_nothing(
    loop: str, disk: MemoryDisk, tls: Tls, pki: Pki, goodbye: str, stage: str
) -> None:
    """R-12: the end of a stream is the end, with or without TLS's word for it; nothing spins."""
    with serving(disk, tls, loop=loop, tcp=True) as server, no_descriptor_leaks():
        client: Client
        if stage == "before TLS":
            client = Client(server.address)
            client.hello()
            client.socket.sendall(FLAGS)
            assert answer(client, STARTTLS) == ACK
        else:
            client = TlsClient(server, trusting(pki.server))
            if stage != "handshake":
                client.go()
            if stage == "with requests":
                client.socket.sendall(b"".join(client.pack(READ, 0, 1 << 20) for _ in range(20)))
        sock = client.socket
        if goodbye == "close_notify" and isinstance(sock, ssl.SSLSocket):
            sock.settimeout(0.05)
            with contextlib.suppress(OSError, ssl.SSLError):
                sock.unwrap()  # and the socket stays open
            used = time.process_time()
            time.sleep(0.1)
            assert time.process_time() - used < 0.09, "the server spins"
        (reset if goodbye == "RST" else socket.socket.close)(sock)
        server.wait_for_connections(0)


def test_requests_before_a_half_close_are_answered(loop: str, disk: MemoryDisk, tls: Tls, pki: Pki) -> None:
    with serving(disk, tls, loop=loop, tcp=True) as server, TlsClient(server, trusting(pki.server)) as client:
        client.go()
        client.socket.sendall(b"".join(client.pack(READ, 0, 1 << 20) for _ in range(8)))
        socket.socket.shutdown(client.socket, socket.SHUT_WR)
        for reply in client.replies().values():
            assert reply.data == CONTENT[: 1 << 20]


def test_garbage_in_place_of_records_ends_one_connection(
    loop: str, disk: MemoryDisk, tls: Tls, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nbdq")
    with serving(disk, tls, loop=loop) as server, HealthyTlsClient(server, pki) as healthy:
        for seed in range(30):
            with TlsClient(server, trusting(pki.server)) as client:
                client.go()
                raw = socket.socket(fileno=client.socket.detach())
                with raw, contextlib.suppress(ConnectionError):
                    raw.settimeout(PATIENCE)
                    raw.sendall(
                        b"\x17\x03\x03\x01\x00" + random.Random(seed).randbytes(256) if seed % 2 else bytes(500)
                    )
                    while raw.recv(1000):
                        pass
        healthy.wait_for_a_round()
    reasons = [record.fields for record in caplog.records if "TLS: " in record.message]  # type: ignore[attr-defined]
    assert [fields["cause"] for fields in reasons] == ["tls"] * 30


@contextlib.contextmanager
def openssl(server: LoopServer, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """OpenSSL's own client, which does at our word what Python's cannot: lines that begin with R ask to renegotiate,
    with K for new keys. It knows no NBD; so a relay negotiates TLS for it."""
    with socket.create_server(("127.0.0.1", 0)) as listener, Client(server.address) as far:
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{listener.getsockname()[1]}", *words]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as tool, listener.accept()[0] as near:
            far.hello()
            far.socket.sendall(FLAGS)
            assert answer(far, STARTTLS) == ACK
            relay = threading.Thread(target=_relay, args=(near, far.socket))
            relay.start()
            try:
                yield tool
            finally:
                tool.kill()
                relay.join(PATIENCE)


def _relay(near: socket.socket, far: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            for source in select.select([near, far], [], [])[0]:
                data = source.recv(1 << 16)
                (far if source is near else near).sendall(data)
                if not data:
                    near.shutdown(socket.SHUT_RDWR)
                    return


@requires("openssl")
def test_a_client_that_asks_to_renegotiate_gets_nowhere(disk: MemoryDisk, tls: Tls) -> None:
    """R-16; only TLS 1.2 has it."""
    with serving(disk, tls, tcp=True) as server, openssl(server, "-tls1_2") as tool:
        said = tool.communicate(b"R\n", PATIENCE)[1]
    assert b"RENEGOTIATING" in said
    assert b"no renegotiation" in said


@requires("openssl")
def test_a_client_may_ask_for_new_keys_in_the_middle(loop: str, disk: MemoryDisk, tls: Tls) -> None:
    with serving(disk, tls, tcp=True, loop=loop) as server, openssl(server, "-tls1_3") as tool:
        assert tool.stdin is not None
        assert tool.stdout is not None
        assert tool.stderr is not None
        for number in range(20):
            tool.stdin.write(b"K\n")
            tool.stdin.flush()
            while (line := tool.stderr.readline()) != b"KEYUPDATE\n":  # so that nothing else is read together with it
                assert line, "the connection is gone"
            if number % 5 == 4:
                tool.stdin.write(option(LIST))
                tool.stdin.flush()
                said = b""
                while text("disk") not in said:
                    said += (byte := tool.stdout.read(1))
                    assert byte, "the connection is gone"


# The operator's side.


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

"""Requests under TLS, and every way in which a connection that uses it ends (P67, R-12)."""

import contextlib
import logging
import random
import select
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdq.nbd.handshake import TlsMode
from nbdq.server.exports.export import Export
from nbdq.server.limits import Limits
from nbdq.server.tls.credentials import Tls
from tests.server.client import (
    ACK,
    DISC,
    LIST,
    PATIENCE,
    READ,
    WRITE,
    Client,
    option,
    request,
    reset,
    text,
)
from tests.server.conftest import CONTENT
from tests.server.harness import FileDisk, LoopServer, MemoryDisk, WritableDisk, no_descriptor_leaks
from tests.server.secure import FLAGS, STARTTLS, HealthyTlsClient, TlsClient, answer, serving, trusting
from tests.support.pki import Pki
from tests.support.tools import requires

pytestmark = requires("certtool")


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

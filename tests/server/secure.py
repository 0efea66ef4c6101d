"""Clients and servers under TLS, for the tests of it."""

import contextlib
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path

from nbdq.nbd.handshake import TlsMode
from nbdq.server.admission.access import Access
from nbdq.server.exports.export import Export
from nbdq.server.tls.credentials import Tls
from tests.server.client import (
    ACK,
    FIXED_NEWSTYLE,
    NO_ZEROES,
    Client,
    Disconnected,
    HealthyClient,
    handshake,
    option,
    text,
)
from tests.server.conftest import CONTENT
from tests.server.harness import LoopServer, MemoryDisk, WritableDisk
from tests.support.pki import Pki

PEEK_EXPORT, STARTTLS, LIST_META_CONTEXT, EXTENDED_HEADERS = 4, 5, 9, 11
POLICY, INVALID, TLS_REQD, UNKNOWN = 0x80000002, 0x80000003, 0x80000005, 0x80000006
FLAGS = struct.pack(">I", FIXED_NEWSTYLE | NO_ZEROES)
GO_DISK = text("disk") + struct.pack(">H", 0)


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


class HealthyTlsClient(HealthyClient):
    """Reads under TLS beside others."""

    def __init__(self, server: LoopServer, pki: Pki) -> None:
        super().__init__(server.address, CONTENT, client=TlsClient(server, trusting(pki.server)).go())

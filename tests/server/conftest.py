"""Every test with a server in this process runs under both event loops."""

import random
import resource
from collections.abc import Iterator

import pytest

from nbdq.server.exports.export import Export
from nbdq.server.tls.credentials import Tls, TlsSettings
from tests.server.harness import LOOPS, LoopServer, MemoryDisk
from tests.support.pki import Authority, Pki

CONTENT = random.Random("content").randbytes(4 << 20)


@pytest.fixture(params=sorted(LOOPS))
def loop(request: pytest.FixtureRequest) -> str:
    """The event loop to run a server on."""
    name: str = request.param
    return name


@pytest.fixture
def disk() -> MemoryDisk:
    """4 MiB of noise, all of it cached."""
    return MemoryDisk(CONTENT)


@pytest.fixture
def server(loop: str, disk: MemoryDisk) -> Iterator[LoopServer]:
    """A server of ``disk`` on a unix socket."""
    with LoopServer(Export.read_only("", disk), loop=loop) as running:
        yield running


@pytest.fixture
def tcp_server(loop: str, disk: MemoryDisk) -> Iterator[LoopServer]:
    """A server of ``disk`` on TCP, which alone can reset a connection."""
    with LoopServer(Export.read_only("", disk), loop=loop, tcp=True) as running:
        yield running


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Room for thousands of sockets in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """For tests of TLS."""
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

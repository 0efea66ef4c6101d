"""Every check of the probe passes a server that is right, and finds the one that is wrong in just what it looks for."""

import ssl
from pathlib import Path

import pytest

from nbdq.nbd.uri import Uri
from nbdq.probe.check import CHECKS, Check
from nbdq.probe.run import Result, Verdict, run, select
from nbdq.probe.target import Target
from tests.probe.faulty import FaultyServer
from tests.support.pki import Authority
from tests.support.tools import requires

pytestmark = requires("certtool")

#: What the server has to be like for a check to be about anything.
_READ_ONLY = {"read-only-is-read-only", "read-only-says-eperm"}
_ALIGNED = {"misaligned-read", "misaligned-write", "sizes-fit"}
_SELECTIVE_TLS = {"tls-forgets-what-was-agreed"}
_TLS = {"tls-within-tls", "tls-before-version-1-2", "what-is-injected-before-tls", "failed-tls", *_SELECTIVE_TLS}
_TLS_ASKED_FOR_IN_VAIN = {"tls-is-demanded-of-all-or-of-exports", "export-name-does-not-avoid-tls"}

#: Waits a minute.
_SLOW = {"silent-client"}


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files of an authority, a server and a client."""
    directory = tmp_path_factory.mktemp("pki")
    authority = Authority(directory / "authority")
    authority.server(directory / "server")
    return directory / "server"


def _server(check: str, pki: Path, *, right: bool = False) -> FaultyServer:
    """A server that is wrong in what ``check`` looks for, or ``right`` and as that check needs it."""
    tls = None
    if check in _TLS | _TLS_ASKED_FOR_IN_VAIN:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(pki / "server-cert.pem", pki / "server-key.pem")
        if check == "tls-before-version-1-2" and not right:
            with pytest.warns(DeprecationWarning, match="TLSv1"):
                tls.minimum_version = ssl.TLSVersion.TLSv1
            tls.set_ciphers("ALL:@SECLEVEL=0")
    return FaultyServer(
        fault="" if right else check,
        tls=tls,
        selective=check in _SELECTIVE_TLS,
        read_only=check in _READ_ONLY,
        minimum=512 if check in _ALIGNED else 1,
    )


def _probe(server: FaultyServer, checks: list[Check], pki: Path, *, secure: bool, timeout: float) -> list[Result]:
    query = {"tls-certificates": str(pki), "tls-hostname": "localhost"} if secure else {}
    uri = Uri(secure=secure, socket_path=server.path, export="disk", query=query)
    return list(run(Target(uri, timeout, may_write=True), checks))


@pytest.mark.parametrize("name", [check.name for check in CHECKS if check.name not in _SLOW])
def test_a_server_that_is_wrong_is_found_out(name: str, pki: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdq.probe.run._RETURN", 0.1)
    with _server(name, pki) as server:
        (result,) = _probe(server, select([name]), pki, secure=name in _TLS, timeout=0.5)
    assert result.verdict is Verdict.DEVIATES, f"{result.verdict.value}: {result.observed}"


def test_a_server_that_is_right_passes_every_check(pki: Path) -> None:
    left = [check for check in CHECKS if check.name not in _SLOW]
    for like in ("", "tls-within-tls", *_READ_ONLY, *_ALIGNED, *_SELECTIVE_TLS, *_TLS_ASKED_FOR_IN_VAIN):
        with _server(like, pki, right=True) as server:
            results = _probe(server, left, pki, secure=like in _TLS, timeout=30)
        wrong = [f"{result.check.name}: {result.observed}" for result in results if result.verdict is Verdict.DEVIATES]
        assert not wrong, "\n".join(wrong)
        left = [result.check for result in results if result.verdict is not Verdict.OK]
    assert not left, "these are about nothing"

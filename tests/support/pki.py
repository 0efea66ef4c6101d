"""Certificates for the tests of TLS, made with certtool as QEMU's documentation describes, in QEMU's files."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.support.tools import run

_LONG_AGO = ("activation_date = 2001-01-01 00:00:00", "expiration_date = 2001-02-01 00:00:00")


class Authority:
    """A certificate authority, in a directory of its own."""

    def __init__(self, directory: Path, name: str = "nbdq test authority") -> None:
        directory.mkdir()
        self.directory = directory
        self.certificate, self._key = directory / "ca-cert.pem", directory / "ca-key.pem"
        _make_key(self._key)
        template = self._template(f'cn = "{name}"', "ca", "cert_signing_key", "crl_signing_key")
        run(
            *("certtool", "--generate-self-signed", "--load-privkey", self._key),
            *("--template", template, "--outfile", self.certificate),
        )

    def server(self, directory: Path, *, expired: bool = False) -> Path:
        """A directory for a server that clients call localhost or 127.0.0.1."""
        words = ('cn = "localhost"', 'dns_name = "localhost"', 'ip_address = "127.0.0.1"', "tls_www_server")
        self._issue(directory, "server", (*words, *(_LONG_AGO if expired else ())))
        return directory

    def client(self, directory: Path, name: str = "laptop.example.com", *lines: str, expired: bool = False) -> Path:
        """A directory for a client; ``lines`` are further ones of its template."""
        words = ('country = "GB"', 'organization = "Example, Home"', f'cn = "{name}"', "tls_www_client", *lines)
        self._issue(directory, "client", (*words, *(_LONG_AGO if expired else ())))
        return directory

    def revoke(self, client: Path, server: Path) -> None:
        """Let ``server`` know that the certificate of ``client`` is not good any more."""
        run(
            *("certtool", "--generate-crl", "--load-ca-privkey", self._key, "--load-ca-certificate", self.certificate),
            *("--load-certificate", client / "client-cert.pem", "--outfile", server / "ca-crl.pem"),
            *("--template", self._template("expiration_days = 30", "crl_number = 1")),
        )

    def _issue(self, directory: Path, role: str, lines: Sequence[str]) -> None:
        directory.mkdir()
        shutil.copy(self.certificate, directory)
        key = directory / f"{role}-key.pem"
        _make_key(key)
        run(
            *("certtool", "--generate-certificate", "--load-ca-certificate", self.certificate),
            *("--load-ca-privkey", self._key, "--load-privkey", key),
            *("--template", self._template(*lines, "signing_key"), "--outfile", directory / f"{role}-cert.pem"),
        )

    def _template(self, *lines: str) -> Path:
        path = self.directory / "template"
        path.write_text("\n".join((*lines, "")))
        return path


class Pki(NamedTuple):
    """An authority, and directories of credentials for a server and a client."""

    authority: Authority
    server: Path
    client: Path


def _make_key(path: Path) -> None:
    run("certtool", "--generate-privkey", "--key-type=ecdsa", "--curve=secp256r1", "--outfile", path)
    path.chmod(0o600)

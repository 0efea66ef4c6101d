"""TLS as the operator sets it up: certificates or keys, checked before anybody uses them, exchanged as a whole."""

import logging
import os
import socket
import ssl
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from nbdq.errors import ExportError, printable
from nbdq.nbd.handshake import TlsMode
from nbdq.pool import WorkerPool
from nbdq.server.resources import Resources
from nbdq.server.tls.psk import PresharedKeys
from nbdq.server.tls.stream import SecureStream

_log = logging.getLogger(__name__)

#: QEMU's names of the files in a directory of credentials.
_CA, _CRL, _CERTIFICATE, _KEY = "ca-cert.pem", "ca-crl.pem", "server-cert.pem", "server-key.pem"

#: Of TLS 1.2: fresh keys for each connection, and encryption that authenticates where there is any. 1.3 has no others.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
PSK_CIPHERS = "ECDHE-PSK-CHACHA20-POLY1305:kECDHEPSK+AES"
_WARN_SECONDS = 14 * 86400


@dataclass(frozen=True)
class TlsSettings:
    """Where certificates or keys are, and what clients have to show."""

    mode: Literal["off", "allow", "require"] | None = None
    """What clients may and must do where a listener does not say it itself (P64): by default they must use TLS if there
    are certificates or keys, and cannot if there are none."""
    certificates: str | None = None
    """A directory with QEMU's names: ``server-cert.pem``, ``server-key.pem``, ``ca-cert.pem``, perhaps
    ``ca-crl.pem``."""
    verify_peer: bool = True
    """Whether clients need a certificate signed by ``ca-cert.pem`` (R-16)."""
    psk_file: str | None = None
    """In place of certificates: pre-shared keys, a line ``name:hex`` for each (P65)."""

    @property
    def has_credentials(self) -> bool:
        """Whether there are certificates or keys."""
        return self.certificates is not None or self.psk_file is not None

    def mode_of(self, listener: Literal["off", "allow", "require"] | None) -> TlsMode:
        """What holds for a listener that says this itself, or None."""
        return TlsMode(listener or self.mode or ("require" if self.has_credentials else "off"))


@dataclass(frozen=True)
class _Credentials:
    """What one connection is opened with."""

    context: ssl.SSLContext
    keys: PresharedKeys | None
    expires: float | None = None
    """When the certificate does, in seconds since 1970."""


class Tls:
    """What new connections are secured with. Loop thread only."""

    def __init__(self, settings: TlsSettings) -> None:
        """Read everything.

        Raises:
            ExportError: a file is missing, cannot be used, or clients would refuse it.
        """
        self._settings = settings
        self._credentials = _load(settings)
        self._pool: WorkerPool | None = None  # from the first client on

    def reload(self, settings: TlsSettings | None = None) -> None:
        """Read everything anew, for connections that come from now on; those that are there stay as they are (R-77).

        Raises:
            ExportError: as when it was made; nothing has changed then.
        """
        settings = settings or self._settings
        self._credentials = _load(settings)
        self._settings = settings

    @property
    def expires(self) -> float | None:
        """When the certificate in use does, in seconds since 1970; None for keys."""
        return self._credentials.expires

    def secure(self, sock: socket.socket, resources: Resources, on_step: Callable[[], None]) -> SecureStream:
        """The stream on ``sock``, whose client begins TLS now; ``on_step`` is called when its handshake has come on."""
        if self._pool is None:
            self._pool = WorkerPool(1)
        credentials = self._credentials
        return SecureStream(sock, credentials.context, resources, self._pool, keys=credentials.keys, on_step=on_step)


def _load(settings: TlsSettings) -> _Credentials:
    if (settings.certificates is None) == (settings.psk_file is None):
        raise ExportError("TLS needs either a directory with certificates or a file with pre-shared keys")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # P60, R-16
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    # No tickets: they would let in after a reload who was let in before it. Sessions of TLS 1.2 that ended politely are
    # kept in the context, which a reload replaces: 20,000 at most, a KiB or two each.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    if settings.psk_file is not None:
        return _Credentials(context, _load_keys(context, settings.psk_file))
    assert settings.certificates is not None
    expires = _load_certificates(context, settings.certificates, verify_peer=settings.verify_peer)
    return _Credentials(context, None, expires)


def _load_keys(context: ssl.SSLContext, path: str) -> PresharedKeys:
    if sys.version_info < (3, 13) or not ssl.HAS_PSK:
        version = ".".join(map(str, sys.version_info[:2]))
        raise ExportError(
            f"TLS with pre-shared keys needs Python 3.13 or newer with a TLS library that has them; this is {version}: "
            "use certificates, or run nbdq with another Python"
        )
    keys = PresharedKeys.load(path)
    context.set_ciphers(PSK_CIPHERS)
    context.set_psk_server_callback(keys.key_of)
    return keys


def _load_certificates(context: ssl.SSLContext, directory: str, *, verify_peer: bool) -> float:
    """When the server's certificate expires."""
    certificate, key = (_existing(directory, name) for name in (_CERTIFICATE, _KEY))
    context.set_ciphers(_CIPHERS)
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        what = f"cannot use {printable(certificate)} with {printable(key)}"
        raise ExportError(
            f"{what}: {_words(error)}; the key has to be the certificate's, without a passphrase"
        ) from None
    expires = _check_certificate(context, directory)
    if os.stat(key).st_mode & stat.S_IRWXO:
        _log.warning("every user may read the key %s; try 'chmod o= %s'", printable(key), printable(key))
    if not verify_peer:
        return expires
    _load_authorities(context, _existing(directory, _CA))
    if os.path.exists(revoked := os.path.join(directory, _CRL)):
        _load_authorities(context, revoked)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    context.verify_mode = ssl.CERT_REQUIRED
    return expires


def _existing(directory: str, name: str) -> str:
    path = os.path.join(directory, name)
    try:
        os.stat(path)
    except OSError as error:
        raise ExportError(f"cannot use {printable(path)} for TLS: {error.strerror}") from None
    if not os.access(path, os.R_OK):
        raise ExportError(f"cannot use {printable(path)} for TLS: it may not be read")
    return path


def _load_authorities(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(path)
    except (OSError, ValueError) as error:
        raise ExportError(f"cannot use {printable(path)}: {_words(error)}; it has to be a PEM file") from None


def _check_certificate(context: ssl.SSLContext, directory: str) -> float:
    """Look at the server's certificate as a client does: whoever finds a mistake now spares all of them. Returns when
    it expires."""
    certificate, authority = (os.path.join(directory, name) for name in (_CERTIFICATE, _CA))
    try:
        seen = _as_a_client_sees(context, certificate)
    except ssl.SSLError as error:
        raise ExportError(f"clients would refuse {printable(certificate)}: {_words(error)}") from None
    expires = ssl.cert_time_to_seconds(seen["notAfter"])
    left = expires - time.time()
    if left < _WARN_SECONDS:
        _log.warning("%s expires in %.1f days", printable(certificate), left / 86400)
    if os.path.exists(authority):
        try:
            _as_a_client_sees(context, authority)
        except ssl.SSLError as error:
            _log.warning(
                "clients that trust only %s will refuse the certificate beside it: %s",
                printable(authority),
                _words(error),
            )
    return expires


def _as_a_client_sees(context: ssl.SSLContext, trusted: str) -> dict[str, Any]:
    """The server's certificate, after a handshake in memory with a client that trusts the certificates in ``trusted``.

    Raises:
        ssl.SSLError: the handshake failed.
    """
    judge = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    judge.check_hostname = False  # clients know by what name they call us
    judge.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    _load_authorities(judge, trusted)
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = judge.wrap_bio(to_client, to_server)
    server = context.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client):
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    seen = client.getpeercert()
    assert seen
    return seen


def _words(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not a PEM file").replace("_", " ").lower()
    return getattr(error, "strerror", None) or str(error)

"""The options of ``nbdq serve`` that are about TLS, and the credentials that they name."""

from collections.abc import Iterable
from typing import Literal

import click

from nbdq.cli.options import together
from nbdq.errors import ExportError
from nbdq.nbd.handshake import TlsMode
from nbdq.server.tls.credentials import Tls, TlsSettings

#: The options that ``tls_settings`` takes.
tls_options = together(
    click.option(
        "--tls",
        type=click.Choice([mode.value for mode in TlsMode]),
        default=None,
        help="Whether clients may or must use TLS.  [default: require with --tls-creds or --tls-psk, else off]",
    ),
    click.option(
        "--tls-creds",
        "--tls-certificates",
        type=click.Path(),
        help="Directory with server-cert.pem, server-key.pem, ca-cert.pem and perhaps ca-crl.pem.",
    ),
    click.option(
        "--tls-verify-peer/--no-tls-verify-peer",
        default=True,
        show_default=True,
        help="Whether clients need a certificate signed by ca-cert.pem.",
    ),
    click.option(
        "--tls-psk",
        type=click.Path(),
        help="Instead of certificates: file of pre-shared keys, lines of NAME:HEX as psktool writes them.",
    ),
)


def tls_settings(
    tls: Literal["off", "allow", "require"] | None,
    tls_creds: str | None,
    tls_verify_peer: bool,
    tls_psk: str | None,
) -> TlsSettings:
    """The section ``tls``."""
    return TlsSettings(mode=tls, certificates=tls_creds, verify_peer=tls_verify_peer, psk_file=tls_psk)


def open_tls(settings: TlsSettings, modes: Iterable[TlsMode]) -> Tls | None:
    """What listeners of these ``modes`` need; None if none of them has TLS on offer.

    Raises:
        ExportError: there are no credentials, or they cannot be used.
    """
    if all(mode is TlsMode.OFF for mode in modes):
        return None
    if not settings.has_credentials:
        raise ExportError("TLS needs certificates or keys: --tls-creds DIR or --tls-psk FILE")
    return Tls(settings)

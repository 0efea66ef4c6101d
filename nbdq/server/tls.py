"""TLS as the operator sets it up: certificates, keys, and the context that new connections take."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TlsSettings:
    """Where keys and certificates are, and what clients have to show."""

    certificates: str | None = None
    """A directory with QEMU's names: ``server-cert.pem``, ``server-key.pem``, ``ca-cert.pem``, perhaps
    ``ca-crl.pem``; None for pre-shared keys alone."""
    verify_peer: bool = True
    """Whether clients of X.509 need a certificate signed by ``ca-cert.pem`` (R-16)."""
    psk_file: str | None = None
    """Pre-shared keys, a line ``name:hex`` for each; None for certificates alone (P65)."""

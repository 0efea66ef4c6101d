"""TLS as a URI asks for it: certificates of one directory, under the names that GnuTLS programs use (U1)."""

import os
import ssl

from nbdq.errors import ExportError, in_words
from nbdq.nbd.uri import Uri


def tls_context(uri: Uri) -> ssl.SSLContext:
    """What ``tls-certificates``, ``tls-verify-peer`` and ``tls-hostname`` of ``uri`` say, TLS 1.2 at least (P60).

    Without a directory the system's authorities are trusted and no certificate of our own is shown. Without
    ``tls-verify-peer`` the server has to prove who it is, on a unix socket only if ``tls-hostname`` says who that is.

    Raises:
        ExportError: a file cannot be used, or the URI asks for a pre-shared key.
    """
    if "tls-psk-file" in uri.query:
        raise ExportError("tls-psk-file: this client knows certificates only")
    directory = uri.query.get("tls-certificates", "")
    authority = os.path.join(directory, "ca-cert.pem") if directory else None
    certificate, key = os.path.join(directory, "client-cert.pem"), os.path.join(directory, "client-key.pem")
    try:
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=authority)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if directory and os.path.exists(certificate):
            context.load_cert_chain(certificate, key)
    except OSError as error:
        raise ExportError(f"tls-certificates={directory}: {in_words(error)}") from None
    verify = uri.query.get("tls-verify-peer", "1") != "0"
    context.check_hostname = verify and bool(tls_hostname(uri))
    context.verify_mode = ssl.CERT_REQUIRED if verify else ssl.CERT_NONE
    return context


def tls_hostname(uri: Uri) -> str:
    """The name that the server's certificate has to carry; empty if nobody says it."""
    return uri.query.get("tls-hostname", uri.host)

"""How commands that are clients encrypt: with certificates, or with a pre-shared key (P65)."""

import ssl
import sys

from nbdq.client.tls import tls_context
from nbdq.errors import ExportError
from nbdq.nbd.uri import Uri
from nbdq.server.tls.credentials import PSK_CIPHERS
from nbdq.server.tls.psk import PresharedKeys


def tls_of(uri: Uri) -> ssl.SSLContext | None:
    """What the parameters of ``uri`` say, whose files are read; None if it does not ask for TLS.

    Raises:
        ExportError: a file cannot be used, or this Python has no pre-shared keys.
    """
    if not uri.secure:
        return None
    path = uri.query.get("tls-psk-file")
    return tls_context(uri) if path is None else psk_context(path, uri.user)


def psk_context(path: str, user: str) -> ssl.SSLContext:
    """TLS with the key of ``user`` in the file at ``path``, in place of certificates.

    Raises:
        ExportError: the file cannot be used, or this Python has no pre-shared keys.
    """
    if sys.version_info < (3, 13) or not ssl.HAS_PSK:
        raise ExportError("Failed to get TLS creds: pre-shared keys need Python 3.13 with a TLS library that has them")
    key = PresharedKeys.load(path).key_of(user)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    # Who knows the key is the server. TLS 1.3 lets one that does not know it show a certificate in place of that, of
    # which none is good, for no authority is trusted.
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_ciphers(PSK_CIPHERS)
    context.set_psk_client_callback(lambda hint: (user, key))
    return context

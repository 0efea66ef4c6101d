"""What a certificate says of its owner, in the words in which operators write lists of clients (P66)."""

from collections.abc import Iterable, Mapping
from typing import Any

from nbdq.server.admission.peer import Identity

#: OpenSSL's names of attributes → RFC 4514's; GnuTLS's word for the last, which QEMU uses. All others keep OpenSSL's.
_ATTRIBUTES = {
    "commonName": "CN",
    "localityName": "L",
    "stateOrProvinceName": "ST",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "countryName": "C",
    "streetAddress": "STREET",
    "domainComponent": "DC",
    "userId": "UID",
    "emailAddress": "EMAIL",
}
_KINDS = {"DNS": "DNS", "URI": "URI", "IP Address": "IP", "email": "email"}
_SPECIAL = frozenset('"+,;<>\\')


def identity_of(certificate: Mapping[str, Any]) -> Identity:
    """The owner of a certificate that was verified, as ``getpeercert`` describes it."""
    parts = _parts(certificate.get("subject", ()))
    names = {f"{_KINDS[kind]}:{value}" for kind, value in certificate.get("subjectAltName", ()) if kind in _KINDS}
    names.add(",".join(parts))  # what QEMU 7.2 compares with its lists, although its manual has the other order
    return Identity(",".join(reversed(parts)), frozenset(names))


def _parts(sets: Iterable[Iterable[tuple[str, str]]]) -> list[str]:
    """The parts of a name, each as RFC 4514 writes it; that has the last one first, and commas between them."""
    return ["+".join(f"{_ATTRIBUTES.get(key, key)}={_escaped(value)}" for key, value in part) for part in sets]


def _escaped(value: str) -> str:
    """RFC 4514, 2.4: so that no value can look like more parts than it is."""
    escaped = "".join(f"\\{char}" if char in _SPECIAL else "\\00" if char == "\0" else char for char in value)
    if escaped.startswith((" ", "#")):
        escaped = f"\\{escaped}"
    if value.endswith(" ") and len(value) > 1:
        escaped = f"{escaped[:-1]}\\ "
    return escaped

"""``--object``: the credentials and lists of names that other options refer to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from glob import escape

from nbdq.cli.qemu_nbd.words import boolean, parse_json, parse_list
from nbdq.errors import ExportError, printable

#: Type → the properties that are understood; ``secret`` is taken and never used: no image here is encrypted.
_PROPERTIES: dict[str, set[str]] = {
    "secret": {"data", "file", "format", "keyid", "iv"},
    "tls-creds-x509": {"dir", "endpoint", "verify-peer", "priority", "sanity-check"},
    "tls-creds-psk": {"dir", "endpoint", "username", "verify-peer", "priority"},
    "authz-simple": {"identity"},
    "authz-list": {"policy"},
}


@dataclass(frozen=True)
class Credentials:
    """A ``tls-creds-…`` object."""

    directory: str
    psk: bool
    """Pre-shared keys in ``keys.psk``, not certificates."""
    verify_peer: bool = True
    user: str = "qemu"
    """Whose key a client shows."""


@dataclass
class Objects:
    """Every ``--object`` of a command line."""

    by_id: dict[str, tuple[str, dict[str, str]]] = field(default_factory=dict)
    """(type, properties) of each."""

    def add(self, text: str) -> None:
        """Take one more.

        Raises:
            ExportError: it has a type or property that is not known, no id, or that of another one.
        """
        values = parse_json(text) if text.startswith("{") else parse_list(text, first="qom-type")
        kind, name = values.pop("qom-type", ""), values.pop("id", "")
        if kind not in _PROPERTIES:
            raise ExportError(f"invalid object type: {printable(kind)}")
        if not name:
            raise ExportError("Parameter 'id' is missing")
        if name in self.by_id:
            raise ExportError(f"attempt to add duplicate property '{printable(name)}' to object (type 'container')")
        for key in values:
            if key not in _PROPERTIES[kind] and not (kind == "authz-list" and key.startswith("rules.")):
                raise ExportError(f"Invalid parameter '{printable(key)}': not supported for {kind}")
        self.by_id[name] = kind, values

    def credentials(self, name: str, *, server: bool) -> Credentials:
        """What ``--tls-creds`` means.

        Raises:
            ExportError: no credentials, or for the other side.
        """
        fail = "Failed to get TLS creds: "
        if name not in self.by_id:
            raise ExportError(f"{fail}No TLS credentials with id '{printable(name)}'")
        kind, values = self.by_id[name]
        if not kind.startswith("tls-creds-"):
            raise ExportError(f"{fail}Object with id '{printable(name)}' is not TLS credentials")
        side = "server" if server else "client"
        if values.get("endpoint", "client") != side:
            raise ExportError(f"{fail}Expected TLS credentials for a {side} endpoint")
        if "priority" in values:
            raise ExportError(f"{fail}'priority' is a string of GnuTLS, which nbdq does not use; leave it out")
        if not values.get("dir"):
            raise ExportError(f"{fail}'dir' is missing from object '{printable(name)}'")
        return Credentials(
            directory=values["dir"],
            psk=kind == "tls-creds-psk",
            verify_peer=boolean("verify-peer", values.get("verify-peer", "on")),
            user=values.get("username", "qemu"),
        )

    def subjects(self, name: str) -> tuple[str, ...]:
        """Whom ``--tls-authz`` lets in, as :attr:`nbdq.server.admission.access.Access.subjects` says it.

        Raises:
            ExportError: no such list, or one that says more than who is let in.
        """
        if name not in self.by_id:
            raise ExportError(f"Authorization object '{printable(name)}' does not exist")
        kind, values = self.by_id[name]
        if kind == "authz-simple" and "identity" in values:
            return (escape(values["identity"]),)
        if kind == "authz-list" and (allowed := _allowed(name, values)):
            return allowed
        raise ExportError(f"Object '{printable(name)}' is not an authorization list")


def _allowed(name: str, values: Mapping[str, str]) -> tuple[str, ...]:
    rules: dict[str, dict[str, str]] = {}
    for key, value in values.items():
        if key.startswith("rules."):
            number, _, what = key.removeprefix("rules.").partition(".")
            rules.setdefault(number, {})[what] = value
    if values.get("policy", "deny") != "deny" or any(rule.get("policy") != "allow" for rule in rules.values()):
        raise ExportError(f"Authorization object '{printable(name)}': only lists of who is allowed are supported")
    return tuple(_pattern(name, rule) for rule in rules.values())


def _pattern(name: str, rule: Mapping[str, str]) -> str:
    style = rule.get("format", "exact")
    if "match" not in rule or style not in ("exact", "glob"):
        raise ExportError(f"Authorization object '{printable(name)}': a rule has a match, of format exact or glob")
    return rule["match"] if style == "glob" else escape(rule["match"])

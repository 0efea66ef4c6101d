"""URIs that other people's clients understand (U1)."""

from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from nbdq.errors import ExportError
from nbdq.nbd.uri import Uri, parse_uri, tcp_uri, unix_uri


@pytest.mark.parametrize(
    ("name", "host", "port", "uri"),
    [
        ("", "localhost", 10809, "nbd://localhost/"),
        ("disk", "127.0.0.1", 10809, "nbd://127.0.0.1/disk"),
        ("disk", "127.0.0.1", 10810, "nbd://127.0.0.1:10810/disk"),
        ("disk", "::1", 10809, "nbd://[::1]/disk"),
        ("disk", "fe80::1%eth0", 1, "nbd://[fe80::1%25eth0]:1/disk"),
        ("/disk", "h", 10809, "nbd://h//disk"),
        ("a/b c?d#e%f&g", "h", 10809, "nbd://h/a/b%20c%3Fd%23e%25f%26g"),
        ("ü", "h", 10809, "nbd://h/%C3%BC"),
    ],
)
def test_a_tcp_export_has_the_uri_that_clients_dial(name: str, host: str, port: int, uri: str) -> None:
    assert tcp_uri(name, host, port) == uri


def test_an_export_under_tls_has_a_scheme_that_insists_on_it() -> None:
    assert tcp_uri("disk", "::1", 1, secure=True) == "nbds://[::1]:1/disk"
    assert unix_uri("disk", "/s", secure=True) == "nbds+unix:///disk?socket=/s"
    assert parse_uri(tcp_uri("disk", "h", secure=True)).secure
    assert parse_uri(unix_uri("disk", "/s", secure=True)).secure


def test_the_default_port_need_not_be_said() -> None:
    assert tcp_uri("disk", "h") == "nbd://h/disk"


@pytest.mark.parametrize(
    ("name", "path", "uri"),
    [
        ("", "/run/nbd.sock", "nbd+unix:///?socket=/run/nbd.sock"),
        ("disk", "/run/nbd.sock", "nbd+unix:///disk?socket=/run/nbd.sock"),
        ("/disk", "/s", "nbd+unix:////disk?socket=/s"),
        ("disk", "/a b&c=d+e%f#g?h", "nbd+unix:///disk?socket=/a%20b%26c%3Dd%2Be%25f%23g%3Fh"),
        ("disk", "\0abstract", "nbd+unix:///disk?socket=%00abstract"),
        ("disk", "/bad\udcff", "nbd+unix:///disk?socket=/bad%FF"),
    ],
)
def test_an_export_on_a_unix_socket_has_the_uri_that_clients_dial(name: str, path: str, uri: str) -> None:
    assert unix_uri(name, path) == uri


@pytest.mark.parametrize("name", ["", "disk", "/x", "//", "a?b", "a#b", "%41", "ü/é", "a b+c", ";=@:"])
def test_a_client_that_takes_the_uri_apart_finds_the_same_name_and_socket(name: str) -> None:
    parts = urlsplit(unix_uri(name, f"/dir/{name}.sock"))
    assert unquote(parts.path.removeprefix("/")) == name
    assert parse_qs(parts.query) == {"socket": [f"/dir/{name}.sock"]}


@pytest.mark.parametrize("name", ["", "disk", "/x", "//", "a?b", "a#b", "%41", "ü/é", "a b+c", ";=@:"])
def test_we_find_what_we_told_clients(name: str) -> None:
    assert parse_uri(unix_uri(name, f"/dir/{name}.sock")) == Uri(
        secure=False, socket_path=f"/dir/{name}.sock", export=name, query={}
    )
    assert parse_uri(tcp_uri(name, "fe80::1%eth0", 1)) == Uri(
        secure=False, host="fe80::1%eth0", port=1, export=name, query={}
    )


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("nbd://", Uri(secure=False, host="localhost", query={})),
        ("nbd://h", Uri(secure=False, host="h", query={})),
        ("NBD://h:0/", Uri(secure=False, host="h", port=0, query={})),
        ("nbds://me@h/x", Uri(secure=True, host="h", export="x", user="me", query={})),
        ("nbd+unix:///?socket=%00a", Uri(secure=False, socket_path="\0a", query={})),
        ("nbds+unix:///x?socket=/s%FF", Uri(secure=True, socket_path="/s\udcff", export="x", query={})),
        (
            "nbds+unix:///?tls-certificates=/d+e&socket=/s&tls-verify-peer=0&x-y",
            Uri(
                secure=True,
                socket_path="/s",
                query={"tls-certificates": "/d+e", "tls-verify-peer": "0", "x-y": ""},
            ),
        ),
    ],
)
def test_a_uri_is_understood_like_by_other_clients(text: str, uri: Uri) -> None:
    assert parse_uri(text) == uri


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "does not begin with nbd://"),
        ("disk.qcow2", "does not begin with nbd://"),
        ("http://h/", "does not begin with nbd://"),
        ("nbd+vsock://1/", "does not begin with nbd://"),
        ("nbd+unix:///x", "needs ?socket=PATH"),
        ("nbd://h:port/", "port"),
        ("nbd://h:65536/", "ort"),
        ("nbd://[::1/", "IPv6"),
        ("nbd://h/%FF", "UTF-8"),
        ("nbd://h/a%00b", "NUL"),
        ("nbd://h/" + "x" * 4097, "4096"),
        ("nbd://h/x#1", "%23"),
        ("nbd://h/\n", "control characters"),
    ],
)
def test_what_is_no_uri_of_an_export_is_refused_in_one_line(text: str, why: str) -> None:
    with pytest.raises(ExportError, match=why.replace("?", r"\?")) as raised:
        parse_uri(text)
    assert "\n" not in str(raised.value)

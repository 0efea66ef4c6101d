"""Our client and other people's servers: it finds what libnbd finds, and reads and writes what they serve."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdq.client.connection import connect
from nbdq.client.wire import OptionFailed
from nbdq.errors import ExportError
from nbdq.nbd.constants import OptionReply, TransmissionFlag
from nbdq.nbd.uri import Uri, parse_uri
from tests.support.serving import qemu_nbd, serve
from tests.support.tools import requires, run

pytestmark = requires("qemu-nbd", "qemu-io", "nbdinfo")


@pytest.fixture
def uri(tmp_path: Path) -> Iterator[str]:
    """A read-only export "disk" of qemu-nbd: a megabyte of which the third quarter is zeros."""
    (tmp_path / "raw").write_bytes(b"abcd" * (128 << 10) + bytes(256 << 10) + b"z" * (256 << 10))
    with qemu_nbd("-f", "raw", "-x", "disk", "-D", "of a test", "-A", tmp_path / "raw") as socket_path:
        yield f"nbd+unix:///disk?socket={socket_path}"


def test_the_client_finds_what_libnbd_finds(uri: str) -> None:
    [found] = json.loads(run("nbdinfo", "--json", uri))["exports"]
    with connect(parse_uri(uri), timeout=30) as connection:
        assert [(listed.name, listed.description) for listed in connection.list()] == [("disk", "of a test")]
        assert connection.structured_reply()
        assert connection.list_meta_contexts("disk") == found["contexts"]
        told = connection.info("disk")
        assert told.size == found["export-size"]
        assert told.description == found["description"]
        assert told.block_sizes is not None
        assert told.block_sizes.preferred == found["block_size_preferred"]
        assert (TransmissionFlag.READ_ONLY in told.flags) == found["is_read_only"]
        connection.abort()


@pytest.mark.parametrize("structured", [False, True])
def test_the_client_reads_what_is_there(uri: str, structured: bool) -> None:
    with connect(parse_uri(uri), timeout=30) as connection:
        if structured:
            assert connection.structured_reply()
            assert connection.set_meta_contexts("disk", "base:allocation")
        session = connection.go("disk")
        assert session.read(0, 1 << 20) == b"abcd" * (128 << 10) + bytes(256 << 10) + b"z" * (256 << 10)
        assert session.read((512 << 10) - 2, 4) == b"cd\0\0"
        if structured:
            extents = session.block_status(0, 1 << 20)["base:allocation"]
            assert sum(extent.length for extent in extents) == 1 << 20
        with pytest.raises(OSError, match=r"EOF|Invalid argument"):
            session.read(1 << 20, 1)
        session.disconnect()


def test_the_old_option_leads_to_the_same_export(uri: str) -> None:
    with connect(parse_uri(uri), timeout=30) as connection:
        session = connection.export_name("disk")
        assert session.export.size == 1 << 20
        assert session.read(4, 4) == b"abcd"


def test_a_refusal_can_be_told_from_a_failure_and_another_name_be_tried(uri: str) -> None:
    with connect(parse_uri(uri), timeout=30) as connection:
        with pytest.raises(OptionFailed) as raised:
            connection.go("nobody")
        assert raised.value.reply == OptionReply.ERR_UNKNOWN
        assert isinstance(raised.value, ExportError)
        assert connection.go("disk").read(0, 4) == b"abcd"


def test_extended_headers_are_used_where_both_have_them(tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "disk", "1T")
    with serve(tmp_path / "disk") as server, connect(parse_uri(server.uri()), timeout=30) as connection:
        assert connection.extended_headers()
        assert connection.set_meta_contexts("", "base:allocation")
        session = connection.go("")
        session.write(5, b"hello", fua=True)
        assert session.read(0, 12) == bytes(5) + b"hello" + bytes(2)
        [rest] = session.block_status(1 << 39, 1 << 39)["base:allocation"]
        assert rest.length > 1 << 32
        session.flush()
        session.disconnect()


def test_that_nobody_listens_is_told_with_the_place(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere") as raised:
        connect(Uri(secure=False, socket_path=str(tmp_path / "nowhere"), query={}), timeout=1)
    assert raised.value.filename

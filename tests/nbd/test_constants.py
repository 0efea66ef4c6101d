"""The numbers of the protocol against the specification's tables, as literals."""

from enum import Enum

import pytest

from nbdq.nbd import constants


@pytest.mark.parametrize(
    ("name", "wire"),
    [
        ("NBDMAGIC", b"NBDMAGIC"),
        ("IHAVEOPT", b"IHAVEOPT"),
        ("OPTION_REPLY_MAGIC", b"\x00\x03\xe8\x89\x04\x55\x65\xa9"),
        ("REQUEST_MAGIC", b"\x25\x60\x95\x13"),
        ("SIMPLE_REPLY_MAGIC", b"\x67\x44\x66\x98"),
        ("CHUNK_MAGIC", b"\x66\x8e\x33\xef"),
        ("EXTENDED_REQUEST_MAGIC", b"\x21\xe4\x1c\x71"),
        ("EXTENDED_CHUNK_MAGIC", b"\x6e\x8a\x27\x8c"),
    ],
)
def test_magics_are_those_of_the_specification(name: str, wire: bytes) -> None:
    """P4."""
    assert getattr(constants, name) == int.from_bytes(wire, "big")


SPECIFICATION = {
    constants.HandshakeFlag: "FIXED_NEWSTYLE=1 NO_ZEROES=2",
    constants.ClientFlag: "FIXED_NEWSTYLE=1 NO_ZEROES=2",
    constants.Option: "EXPORT_NAME=1 ABORT=2 LIST=3 PEEK_EXPORT=4 STARTTLS=5 INFO=6 GO=7 STRUCTURED_REPLY=8 "
    "LIST_META_CONTEXT=9 SET_META_CONTEXT=10 EXTENDED_HEADERS=11",
    constants.OptionReply: "ACK=1 SERVER=2 INFO=3 META_CONTEXT=4 ERR_UNSUP=0x80000001 ERR_POLICY=0x80000002 "
    "ERR_INVALID=0x80000003 ERR_PLATFORM=0x80000004 ERR_TLS_REQD=0x80000005 ERR_UNKNOWN=0x80000006 "
    "ERR_SHUTDOWN=0x80000007 ERR_BLOCK_SIZE_REQD=0x80000008 ERR_TOO_BIG=0x80000009 ERR_EXT_HEADER_REQD=0x8000000A",
    constants.InfoType: "EXPORT=0 NAME=1 DESCRIPTION=2 BLOCK_SIZE=3",
    constants.TransmissionFlag: "HAS_FLAGS=0x1 READ_ONLY=0x2 SEND_FLUSH=0x4 SEND_FUA=0x8 ROTATIONAL=0x10 "
    "SEND_TRIM=0x20 SEND_WRITE_ZEROES=0x40 SEND_DF=0x80 CAN_MULTI_CONN=0x100 SEND_CACHE=0x400 SEND_FAST_ZERO=0x800 "
    "BLOCK_STATUS_PAYLOAD=0x1000",
    constants.Command: "READ=0 WRITE=1 DISC=2 FLUSH=3 TRIM=4 CACHE=5 WRITE_ZEROES=6 BLOCK_STATUS=7",
    constants.CommandFlag: "FUA=0x1 NO_HOLE=0x2 DF=0x4 REQ_ONE=0x8 FAST_ZERO=0x10 PAYLOAD_LEN=0x20",
    constants.ChunkFlag: "DONE=1",
    constants.ChunkType: "NONE=0 OFFSET_DATA=1 OFFSET_HOLE=2 BLOCK_STATUS=5 BLOCK_STATUS_EXT=6 ERROR=32769 "
    "ERROR_OFFSET=32770",
    constants.Errno: "EPERM=1 EIO=5 ENOMEM=12 EINVAL=22 ENOSPC=28 EOVERFLOW=75 ENOTSUP=95 ESHUTDOWN=108",
    constants.AllocationState: "HOLE=1 ZERO=2",
}


@pytest.mark.parametrize("enum", SPECIFICATION, ids=lambda enum: enum.__name__)
def test_names_have_the_numbers_of_the_specification(enum: type[Enum]) -> None:
    """P11, P12, P22, P23, P35, 1.6, P82, P83, P98, P110, P111, P118."""
    table = (entry.partition("=") for entry in SPECIFICATION[enum].split())
    assert {member.name: member.value for member in enum} == {name: int(number, 0) for name, _, number in table}

"""Checks of LIST, INFO and GO, of names, and of what the server tells of the export (P31-P38, P70, P126)."""

from nbdq.client import wire
from nbdq.client.wire import OptionFailed
from nbdq.errors import printable
from nbdq.nbd.constants import Option, OptionReply, TransmissionFlag
from nbdq.probe.check import Level, check
from nbdq.probe.findings import Deviation, expect
from nbdq.probe.target import (
    NO_EXPORT,
    STRUCTURED,
    Target,
    answer,
    expect_alive,
    expect_in_sync,
    expect_reply,
    info_data,
)

_REFUSALS = (OptionReply.ERR_UNKNOWN, OptionReply.ERR_POLICY, OptionReply.ERR_TLS_REQD)
_UNKNOWN_BITS = 0xFFFF & ~int(TransmissionFlag((1 << 9) - 1) | TransmissionFlag(7 << 10) | TransmissionFlag(1 << 9))


@check("P32 P150", Level.MUST)
def list_exports(target: Target) -> None:
    """LIST is answered with names and descriptions that are strings, or refused by policy."""
    with target.connect() as connection:
        try:
            connection.list()
        except OptionFailed as failure:
            expect(failure.reply != OptionReply.ERR_UNSUP, str(failure))


@check("P32", Level.PRACTICE)
def list_twice(target: Target) -> None:
    """A second LIST is answered like the first."""
    with target.connect() as connection:
        try:
            first = connection.list()
        except OptionFailed as failure:
            target.need(None, f"no LIST: {failure}")
        try:
            second = connection.list()
        except OptionFailed as failure:
            raise Deviation(f"the second is refused: {failure}") from None
        expect(sorted(first) == sorted(second), f"{len(first)} exports, then {len(second)}")


@check("P34 P35 P150", Level.MUST)
def info(target: Target) -> None:
    """INFO is answered with INFO_EXPORT at least, and ACK."""
    with target.connect() as connection:
        connection.info(target.uri.export)


@check("P33", Level.MUST)
def unknown_information(target: Target) -> None:
    """Requests for information that the server does not know are ignored, and there need not be any."""
    with target.connect() as connection:
        told = connection.info(target.uri.export)
        for types in ((), (0x7FFF,), (3, 0x7FFE, 0, 1), tuple(range(0x100, 0x200))):
            found = connection.info(target.uri.export, types)
            expect(found.size == told.size, f"the size is {found.size} instead of {told.size} for {len(types)} types")


@check("P36", Level.MUST)
def info_says_what_go_says(target: Target) -> None:
    """GO is answered with the same information as the INFO before it."""
    with target.connect() as connection:
        told = connection.info(target.uri.export)
        then = connection.go(target.uri.export).export
        expect(told.size == then.size, f"the size is {told.size}, then {then.size}")
        expect(told == then, f"{told}, then {then}")


@check("P30 P36", Level.MUST)
def export_name_says_what_go_says(target: Target) -> None:
    """EXPORT_NAME tells the size and flags that GO tells."""
    with target.session() as session:
        told = session.export
    with target.connect() as connection:
        then = connection.export_name(target.uri.export).export
    expect(
        (told.size, told.flags) == (then.size, then.flags),
        f"{told.size}, {told.flags!r} and {then.size}, {then.flags!r}",
    )


@check("P37", Level.SHOULD)
def unknown_export(target: Target) -> None:
    """INFO and GO of a name that no export has are answered with ERR_UNKNOWN, and nothing is told before."""
    target.need(not target.serves_every_name, "the server serves every name")
    with target.connect() as connection:
        for option in (Option.INFO, Option.GO):
            *before, final = connection.ask(option, info_data(NO_EXPORT))
            expect_reply(final.type, *_REFUSALS)
            expect(not before, f"{len(before)} INFO replies before the error")


@check("P38", Level.MUST)
def another_try_after_go_failed(target: Target) -> None:
    """After a GO that failed the client may try another export."""
    target.need(not target.serves_every_name, "the server serves every name")
    with target.connect() as connection:
        reply = answer(connection, Option.GO, info_data(NO_EXPORT))
        expect(reply >> 31, f"GO of an unknown name is answered with {wire.reply_name(reply)}")
        expect_alive(connection.go(target.uri.export), target)


@check("P30", Level.MUST)
def export_name_of_an_unknown_export(target: Target) -> None:
    """EXPORT_NAME of a name that no export has ends the connection."""
    target.need(not target.serves_every_name, "the server serves every name")
    with target.connect() as connection:
        connection.channel.send(wire.pack_option(Option.EXPORT_NAME, NO_EXPORT.encode()))
        said = connection.channel.wait_for_end()
        expect(not said, f"it is answered with {len(said)} bytes")


@check("P31", Level.MUST)
def empty_name(target: Target) -> None:
    """The empty name is that of the default export, which there need not be."""
    with target.connect() as connection:
        answer(connection, Option.INFO, info_data(""))
        expect_in_sync(connection)


@check("P2 P31", Level.MUST)
def longest_name(target: Target) -> None:
    """A name may have 4096 bytes."""
    with target.connect() as connection:
        reply = answer(connection, Option.INFO, info_data("x" * 4096))
        expect_reply(reply, *_REFUSALS, OptionReply.ACK, OptionReply.ERR_UNSUP)
        expect_in_sync(connection)


@check("P2 P31", Level.PRACTICE)
def names_that_are_no_strings(target: Target) -> None:
    """No export is found by a name of 4097 bytes, or by one with a NUL or with bytes that are not UTF-8."""
    for what, name in (("4097 bytes", b"x" * 4097), ("a NUL", b"a\0b"), ("invalid UTF-8", b"\xff\xfe")):
        with target.connect() as connection:
            try:
                final = connection.ask(Option.INFO, info_data(name))[-1]  # its text may repeat what we said
                expect(final.is_error, f"a name with {what} is accepted")
                expect_in_sync(connection)
            except ConnectionError:
                pass  # the client broke a rule, and a server may end it for that


@check("P70", Level.MUST)
def flags_are_there(target: Target) -> None:
    """The transmission flags say that they are some (HAS_FLAGS), and none is set that nobody knows."""
    flags = target.export.flags
    expect(TransmissionFlag.HAS_FLAGS in flags, f"the flags are {flags:#x}")
    expect(not flags & _UNKNOWN_BITS, f"the flags are {flags:#x}")


@check("P70", Level.MUST)
def flags_agree(target: Target) -> None:
    """FAST_ZERO needs WRITE_ZEROES, BLOCK_STATUS_PAYLOAD needs extended headers, DF needs structured replies."""
    flags = target.export.flags
    zeroes = TransmissionFlag.SEND_WRITE_ZEROES in flags or TransmissionFlag.SEND_FAST_ZERO not in flags
    expect(zeroes, f"SEND_FAST_ZERO without SEND_WRITE_ZEROES: {flags!r}")
    expect(
        TransmissionFlag.BLOCK_STATUS_PAYLOAD not in flags, f"BLOCK_STATUS_PAYLOAD without extended headers: {flags!r}"
    )
    with target.session() as session:
        expect(TransmissionFlag.SEND_DF not in session.export.flags, "SEND_DF without structured replies")


@check("P70", Level.PRACTICE)
def flags_of_structured_replies(target: Target) -> None:
    """A server with structured replies has DF, which all clients with structured replies use."""
    with target.session(STRUCTURED) as session:
        expect(TransmissionFlag.SEND_DF in session.export.flags, f"the flags are {session.export.flags!r}")


@check("P126", Level.MUST)
def block_sizes(target: Target) -> None:
    """Block sizes ascend: a minimum to 64 KiB and a preferred one from 512, powers of two, and a maximum."""
    sizes = target.export.block_sizes
    target.need(sizes, "the server does not say them")
    assert sizes is not None
    powers = all(size and size & size - 1 == 0 for size in sizes[:2])
    ascend = sizes.minimum <= 1 << 16 and max(512, sizes.minimum) <= sizes.preferred <= sizes.maximum
    expect(powers and ascend, f"they are {tuple(sizes)}")


@check("P126 P127", Level.SHOULD)
def sizes_fit(target: Target) -> None:
    """The export is made of minimum blocks, and a maximum block has 1 MiB at least if the export has."""
    sizes = target.sizes
    expect(not target.size % sizes.minimum, f"a size of {target.size} and a minimum block of {sizes.minimum}")
    expect(sizes.maximum >= min(1 << 20, target.size), f"a maximum block of {sizes.maximum}")


@check("P31 P36", Level.PRACTICE)
def name_of_the_export(target: Target) -> None:
    """The canonical name of an export that LIST tells is that name."""
    with target.connect() as connection:
        try:
            names = [listed.name for listed in connection.list()]
        except OptionFailed as failure:
            target.need(None, f"no LIST: {failure}")
        target.need(target.uri.export in names, "LIST does not tell of the export")
        told = connection.info(target.uri.export).name
        expect(told in (None, target.uri.export), f"it is called {printable(told or '')!r}")

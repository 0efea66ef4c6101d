"""Checks of the transmission phase that change nothing: requests, errors, order, and leaving (P80-P115)."""

import random
import time

from nbdq.client.session import Session
from nbdq.client.transaction import error_name
from nbdq.errors import ProtocolError
from nbdq.nbd.constants import ChunkType, Command, CommandFlag, Errno, TransmissionFlag
from nbdq.probe.check import Level, check
from nbdq.probe.findings import Deviation, expect
from nbdq.probe.target import (
    SETTLE,
    STRUCTURED,
    Target,
    drip,
    expect_alive,
    expect_error,
    expect_success,
)

#: Requests in flight at once: more than any client has, fewer than an attack.
_PIPELINED = 2000

#: Bytes of a READ that is not answered before the server sees what follows it.
_IN_FLIGHT = 256 << 10

_UNKNOWN_COMMANDS = (8, 99, 0xFFFF)
_UNKNOWN_FLAG = 1 << 14

_CONTENT = (ChunkType.OFFSET_DATA, ChunkType.OFFSET_HOLE)


def _commands(target: Target) -> list[int]:
    """The commands that the export has and that change nothing."""
    offered = {Command.FLUSH: TransmissionFlag.SEND_FLUSH, Command.CACHE: TransmissionFlag.SEND_CACHE}
    return [Command.READ, *(command for command, flag in offered.items() if target.has(flag))]


@check("P80 P100 P110 P113", Level.MUST)
def read(target: Target) -> None:
    """READ gives the whole range, the same one in every mode."""
    target.need(target.size, "the export is empty")
    ends = {(0, target.length(65536)), (target.last, target.block), (0, target.block)}
    contents = []
    for session in target.sessions():
        contents.append([expect_success(session.call(Command.READ, *end)).data for end in sorted(ends)])
    expect(all(content == contents[0] for content in contents), "contents differ from mode to mode")


@check("P5", Level.MUST)
def requests_byte_by_byte(target: Target) -> None:
    """A request may come in pieces of any size."""
    target.need(target.size, "the export is empty")
    for session in target.sessions():
        cookie = session.expect(Command.READ, 0, target.block)
        drip(session.channel, session.pack(Command.READ, cookie, 0, target.block))
        expect_success(session.receive()[1])


@check("P81", Level.MUST)
def cookies(target: Target) -> None:
    """A reply carries the cookie of its request, whatever that is."""
    target.need(target.size, "the export is empty")
    for session in target.sessions():
        for cookie in (0, 1, 1 << 63, (1 << 64) - 1, 0x6744_6698_668E_33EF):
            session.expect(Command.READ, 0, target.block, cookie=cookie)
            session.channel.send(session.pack(Command.READ, cookie, 0, target.block))
            expect_success(session.receive()[1])


@check("P81 P89", Level.MUST)
def thousands_of_requests(target: Target) -> None:
    """Two thousand requests at once are all answered, once each and with their own data."""
    target.need(target.size, "the export is empty")
    length = target.length(128 * target.block)
    for session in target.sessions():
        whole = expect_success(session.call(Command.READ, 0, length)).data
        offsets = random.Random(_PIPELINED).choices(range(0, length - target.block + 1, target.block), k=_PIPELINED)
        asked = {session.expect(Command.READ, offset, target.block): offset for offset in offsets}
        session.channel.send(
            b"".join(session.pack(Command.READ, cookie, offset, target.block) for cookie, offset in asked.items())
        )
        while session.outstanding:
            cookie, transaction = session.receive()
            expected = whole[asked[cookie] : asked[cookie] + target.block]
            expect(expect_success(transaction).data == expected, "a reply has the data of another request")


@check("P82", Level.SHOULD)
def unknown_commands(target: Target) -> None:
    """A command that the server does not know is answered with EINVAL, and the connection goes on."""
    for session in target.sessions():
        for command in _UNKNOWN_COMMANDS:
            expect_error(session.call(command, 0, target.block), Errno.EINVAL)
        expect_alive(session, target)


@check("P83", Level.SHOULD)
def flags_that_do_not_belong(target: Target) -> None:
    """A flag that is unknown, or none of the command's, is answered with EINVAL, and the connection goes on."""
    wrong = {
        Command.READ: (_UNKNOWN_FLAG, CommandFlag.NO_HOLE, CommandFlag.REQ_ONE, CommandFlag.FAST_ZERO),
        Command.FLUSH: (_UNKNOWN_FLAG, CommandFlag.DF),
        Command.CACHE: (_UNKNOWN_FLAG, CommandFlag.NO_HOLE),
    }
    for session in target.sessions():
        for command in _commands(target):
            for flag in wrong[Command(command)]:
                _expect_flag_refused(session, target, command, int(flag))
        expect_alive(session, target)


@check("P83", Level.SHOULD)
def flags_that_were_not_advertised(target: Target) -> None:
    """FUA without SEND_FUA, DF without SEND_DF and PAYLOAD_LEN without extended headers are answered with EINVAL."""
    for session in target.sessions():
        flags = session.export.flags
        wrong = [
            *([CommandFlag.FUA] if TransmissionFlag.SEND_FUA not in flags else []),
            *([CommandFlag.DF] if TransmissionFlag.SEND_DF not in flags else []),
            *([CommandFlag.PAYLOAD_LEN] if not session.extended else []),
        ]
        for flag in wrong:
            _expect_flag_refused(session, target, Command.READ, int(flag))
        expect_alive(session, target)


def _expect_flag_refused(session: Session, target: Target, command: int, flag: int) -> None:
    length = 0 if command == Command.FLUSH else target.block
    error = session.call(command, 0, length, flags=flag).error
    shown = CommandFlag(flag).name or hex(flag)
    expect(error == Errno.EINVAL, f"{Command(command).name} with {shown} is answered with {error_name(error)}")


@check("P83", Level.MUST)
def fua_everywhere(target: Target) -> None:
    """FUA is accepted with every command, once the export advertises it."""
    target.need_flag(TransmissionFlag.SEND_FUA)
    for session in target.sessions():
        for command in _commands(target):
            length = 0 if command == Command.FLUSH else target.block
            plain = session.call(command, 0, length).error
            forced = session.call(command, 0, length, flags=CommandFlag.FUA).error
            observed = f"{Command(command).name}: {error_name(plain)}, but with FUA {error_name(forced)}"
            expect(plain == forced, observed)


@check("P91", Level.MUST)
def flush(target: Target) -> None:
    """FLUSH succeeds, once the export advertises it."""
    target.need_flag(TransmissionFlag.SEND_FLUSH)
    for session in target.sessions():
        expect_success(session.call(Command.FLUSH))


@check("P86", Level.SHOULD)
def requests_for_nothing(target: Target) -> None:
    """A READ or CACHE of 0 bytes is answered somehow, and the connection goes on."""
    for session in target.sessions():
        for command in set(_commands(target)) - {Command.FLUSH}:
            for offset in (0, target.size):
                session.call(command, offset, 0)
        expect_alive(session, target)


@check("P87", Level.SHOULD)
def reads_beyond_the_end(target: Target) -> None:
    """READ and CACHE of anything behind the end are answered with EINVAL, and the connection goes on."""
    block = max(target.block, target.sizes.minimum)
    beyond = [
        (target.size, block),
        ((1 << 63) - block, block),
        ((1 << 64) - block, block),
        ((1 << 64) - block, 2 * block),
    ]
    if target.size >= block:
        beyond.append((target.last, 2 * block))
    for session in target.sessions():
        for command in set(_commands(target)) - {Command.FLUSH}:
            for offset, length in beyond:
                error = session.call(command, offset, length).error
                observed = f"{Command(command).name} of {length} bytes at {offset} is answered with {error_name(error)}"
                expect(error == Errno.EINVAL, observed)
        expect_alive(session, target)


@check("P85 P124", Level.SHOULD)
def huge_read(target: Target) -> None:
    """A READ that is too long to be answered fails with EINVAL or EOVERFLOW, and the connection goes on."""
    for session in target.sessions():
        length = (1 << 32) - max(512, target.sizes.minimum)
        target.need(target.size < length or target.sizes.maximum < length, "nothing is too long for this export")
        expect_error(session.call(Command.READ, 0, length), Errno.EINVAL, Errno.EOVERFLOW)
        expect_alive(session, target)


@check("P85 P128", Level.MUST)
def largest_read(target: Target) -> None:
    """A READ of as much as the server says it can give, or of 32 MiB, succeeds."""
    length = target.length(32 << 20)
    target.need(length, "the export is empty")
    for session in target.sessions():
        expect_success(session.call(Command.READ, 0, length))


@check("P88", Level.SHOULD)
def misaligned_read(target: Target) -> None:
    """A READ that is not aligned to the minimum block is answered with EINVAL."""
    minimum = target.sizes.minimum
    target.need(minimum > 1 and target.size >= 2 * minimum, "every byte can be read on its own")
    for session in target.sessions():
        expect_error(session.call(Command.READ, 1, minimum), Errno.EINVAL)
        expect_error(session.call(Command.READ, 0, minimum + 1), Errno.EINVAL)
        expect_alive(session, target)


@check("P115", Level.MUST)
def unfragmented_read(target: Target) -> None:
    """A READ of up to 64 KiB with DF is answered in at most one chunk of content."""
    target.need(target.size, "the export is empty")
    for session in target.sessions():
        if TransmissionFlag.SEND_DF in session.export.flags:
            length = target.length(65536)
            transaction = expect_success(session.call(Command.READ, 0, length, flags=CommandFlag.DF))
            expect(sum(kind in _CONTENT for kind in transaction.kinds) == 1, f"{len(transaction.kinds)} chunks")


@check("P102", Level.SHOULD)
def errors_in_chunks(target: Target) -> None:
    """Errors are told in chunks where those were agreed, so that they can carry a text."""
    with target.session(STRUCTURED) as session:
        expect(not session.call(99, 0, 0).simple, "a simple reply")


@check("P98", Level.SHOULD)
def error_numbers(target: Target) -> None:
    """Errors have numbers that the protocol knows."""
    for session in target.sessions():
        for transaction in (session.call(99), session.call(Command.READ, target.size, target.block + 1)):
            expect(transaction.error in set(Errno), f"a request fails with {transaction.error}")


@check("P93", Level.MUST)
def disconnecting(target: Target) -> None:
    """DISC is not answered; the server closes the connection."""
    for session in target.sessions():
        session.channel.send(session.pack(Command.DISC, 1))
        try:
            said = session.channel.wait_for_end()
        except TimeoutError:
            raise Deviation(f"it is still open after {target.timeout:g} s") from None
        expect(not said, f"{len(said)} bytes are sent")


@check("P93", Level.SHOULD)
def requests_before_disconnecting(target: Target) -> None:
    """What was asked before DISC is answered, and then the connection ends."""
    target.need(target.size, "the export is empty")
    length = target.length(_IN_FLIGHT)
    for session in target.sessions():
        cookies = [session.expect(Command.READ, 0, length) for _ in range(16)]
        requests = [session.pack(Command.READ, cookie, 0, length) for cookie in cookies]
        session.channel.send(b"".join(requests) + session.pack(Command.DISC, 1))
        while session.outstanding:
            try:
                session.receive()
            except ConnectionError:
                raise Deviation(f"the connection ends before {session.outstanding} of 16 replies") from None


@check("P80", Level.PRACTICE)
def wrong_request_magic(target: Target) -> None:
    """What does not begin like a request ends the connection."""
    for session in target.sessions():
        request = session.pack(Command.READ, session.expect(Command.READ, 0, target.block), 0, target.block)
        session.channel.send(b"\x12\x56\x09\x53" + request[4:] + request)
        try:
            while True:
                session.receive()
                raise Deviation("the server goes on")
        except (ConnectionError, ProtocolError):
            pass


@check("P94 P141", Level.MUST)
def client_that_does_not_listen(target: Target) -> None:
    """A client that asks for much, reads nothing and leaves harms nobody else."""
    target.need_several()
    target.need(target.size, "the export is empty")
    length = target.length(16 << 20)
    with target.session() as witness:
        for session in target.sessions():
            cookies = [session.expect(Command.READ, 0, length) for _ in range(16)]
            session.channel.send(b"".join(session.pack(Command.READ, cookie, 0, length) for cookie in cookies))
            session.channel.receive(1)
            time.sleep(SETTLE)
            session.channel.close()
            time.sleep(SETTLE)
            try:
                expect_alive(witness, target)
            except (OSError, ProtocolError) as error:
                raise Deviation(f"another client notices: {error}") from None

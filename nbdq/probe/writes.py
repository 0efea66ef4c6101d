"""Checks that write, and of what a server that must not be written to says (P83-P96)."""

from collections.abc import Iterator

from nbdq.client.session import Session
from nbdq.client.transaction import Transaction, error_name
from nbdq.nbd.constants import Command, CommandFlag, Errno, TransmissionFlag
from nbdq.probe.check import Level, check
from nbdq.probe.findings import Deviation, expect
from nbdq.probe.target import Target, drip, expect_alive, expect_error, expect_success

#: What a client without knowledge of block sizes may write at once (P85).
_LARGE = 32 << 20


def _data(length: int, seed: int) -> bytes:
    """Bytes that differ from seed to seed, none of them 0."""
    return (bytes((seed + number) % 251 + 1 for number in range(4096)) * (length // 4096 + 1))[:length]


def _write(session: Session, offset: int, data: bytes, *, flags: int = 0) -> Transaction:
    return session.call(Command.WRITE, offset, len(data), flags=flags, payload=data)


def _expect_content(session: Session, offset: int, data: bytes) -> None:
    read = expect_success(session.call(Command.READ, offset, len(data))).data
    expect(read == data, f"{len(data)} bytes at {offset} read back as something else")


@check("P80 P89", Level.MUST, writes=True)
def write(target: Target) -> None:
    """What was written can be read, and nothing beside it has changed."""
    target.need_writable()
    length = target.length(64 * target.block)
    for seed, session in enumerate(target.sessions(), 1):
        base = _data(length, seed)
        expect_success(_write(session, 0, base))
        _expect_content(session, 0, base)
        if target.sizes.minimum == 1 and length > 1024:
            expect_success(_write(session, 511, b"\xff" * 3))
            base = base[:511] + b"\xff" * 3 + base[514:]
            _expect_content(session, 0, base)


@check("P5", Level.MUST, writes=True)
def write_in_pieces(target: Target) -> None:
    """A WRITE may come in pieces of any size, also in the middle of its data."""
    target.need_writable()
    data = _data(target.block, 7)
    for session in target.sessions():
        request = session.pack(Command.WRITE, session.expect(Command.WRITE, 0, len(data)), 0, len(data), payload=data)
        drip(session.channel, request[:64])
        session.channel.send(request[64:])
        expect_success(session.receive()[1])
        _expect_content(session, 0, data)


@check("P92 P83", Level.MUST, writes=True)
def fua_on_writes(target: Target) -> None:
    """FUA is accepted with WRITE, TRIM and WRITE_ZEROES, once the export advertises it."""
    target.need_writable(TransmissionFlag.SEND_FUA)
    for session in target.sessions():
        expect_success(_write(session, 0, _data(target.block, 3), flags=CommandFlag.FUA))
        for command in _payload_less(target):
            plain = session.call(command, 0, target.block).error
            forced = session.call(command, 0, target.block, flags=CommandFlag.FUA).error
            observed = f"{Command(command).name}: {error_name(plain)}, but with FUA {error_name(forced)}"
            expect(plain == forced, observed)


def _payload_less(target: Target) -> list[int]:
    offered = {Command.TRIM: TransmissionFlag.SEND_TRIM, Command.WRITE_ZEROES: TransmissionFlag.SEND_WRITE_ZEROES}
    return [command for command, flag in offered.items() if target.has(flag)]


@check("P90", Level.MUST, writes=True)
def flush_covers_other_connections(target: Target) -> None:
    """With CAN_MULTI_CONN, what was written and flushed over one connection is read over another."""
    target.need_writable(TransmissionFlag.CAN_MULTI_CONN)
    target.need_several()
    with target.session() as writer, target.session() as reader:
        for seed in range(1, 9):
            data = _data(target.block, seed)
            reader.call(Command.READ, 0, target.block)
            expect_success(_write(writer, 0, data))
            expect_success(writer.call(Command.FLUSH))
            _expect_content(reader, 0, data)


@check("P96", Level.MUST, writes=True)
def write_zeroes(target: Target) -> None:
    """What WRITE_ZEROES wrote reads as zeros, with NO_HOLE, too, and nothing beside it has changed."""
    target.need_writable(TransmissionFlag.SEND_WRITE_ZEROES)
    block = target.block
    count = target.length(256 * block) // block
    for session in target.sessions():
        for flags in (0, int(CommandFlag.NO_HOLE)):
            base = _data(count * block, 5)
            expect_success(_write(session, 0, base))
            start, length = (block, (count - 2) * block) if count > 2 else (0, block)
            expect_success(session.call(Command.WRITE_ZEROES, start, length, flags=flags))
            _expect_content(session, 0, base[:start] + bytes(length) + base[start + length :])


@check("P96", Level.MUST, writes=True)
def fast_zero(target: Target) -> None:
    """WRITE_ZEROES with FAST_ZERO zeroes, or fails with ENOTSUP and changes nothing."""
    target.need_writable(TransmissionFlag.SEND_FAST_ZERO)
    for session in target.sessions():
        base = _data(target.block, 9)
        expect_success(_write(session, 0, base))
        transaction = session.call(Command.WRITE_ZEROES, 0, target.block, flags=CommandFlag.FAST_ZERO)
        expect_error(transaction, 0, Errno.ENOTSUP)
        _expect_content(session, 0, base if transaction.error else bytes(target.block))


@check("P83 P96", Level.SHOULD, writes=True)
def flags_of_writes_that_do_not_belong(target: Target) -> None:
    """A flag that is unknown, not the command's or not advertised is answered with EINVAL; the connection goes on."""
    target.need_writable()
    wrong: dict[int, list[int]] = {Command.WRITE: [1 << 14, CommandFlag.DF, CommandFlag.NO_HOLE]}
    for command in _payload_less(target):
        wrong[command] = [1 << 14, CommandFlag.DF, CommandFlag.REQ_ONE]
    if target.has(TransmissionFlag.SEND_WRITE_ZEROES) and not target.has(TransmissionFlag.SEND_FAST_ZERO):
        wrong[Command.WRITE_ZEROES].append(CommandFlag.FAST_ZERO)
    if not target.has(TransmissionFlag.SEND_FUA):
        wrong[Command.WRITE].append(CommandFlag.FUA)
    for session in target.sessions():
        base = _data(target.block, 11)
        expect_success(_write(session, 0, base))
        for command, flags in wrong.items():
            for flag in flags:
                payload = _data(target.block, 12) if command == Command.WRITE else b""
                error = session.call(command, 0, target.block, flags=flag, payload=payload).error
                shown = CommandFlag(flag).name or hex(flag)
                if error != Errno.EINVAL:
                    raise Deviation(f"{Command(command).name} with {shown} is answered with {error_name(error)}")
        _expect_content(session, 0, base)


@check("P84", Level.MUST, writes=True)
def data_of_a_refused_write(target: Target) -> None:
    """The data of a WRITE that is refused is skipped: what follows is taken for what it is."""
    block = target.block
    target.need(block, "the export is empty")
    for session in target.sessions():
        # The data looks like requests, which a server that does not skip it would carry out.
        decoy = (session.pack(Command.READ, 0xBAD, 0, block) * (block // 24 + 1))[:block]
        transaction = _write(session, target.size, decoy)
        expect(transaction.error, "a WRITE behind the end succeeds")
        expect_alive(session, target)


@check("P87", Level.SHOULD, writes=True)
def writes_beyond_the_end(target: Target) -> None:
    """WRITE and WRITE_ZEROES behind the end are answered with ENOSPC, TRIM with EINVAL; the connection goes on."""
    target.need_writable()
    block = target.block
    ranges = ((target.size, block), (target.last, 2 * block), ((1 << 64) - block, block))
    for session in target.sessions():
        for command in (Command.WRITE, *_payload_less(target)):
            due = Errno.EINVAL if command == Command.TRIM else Errno.ENOSPC
            for offset, length in ranges:
                payload = bytes(length) if command == Command.WRITE else b""
                error = session.call(command, offset, length, payload=payload).error
                if error != due:
                    observed = (
                        f"{Command(command).name} of {length} bytes at {offset} is answered with {error_name(error)}"
                    )
                    raise Deviation(f"{observed} instead of {due.name}")
        expect_alive(session, target)


@check("P86", Level.SHOULD, writes=True)
def writes_of_nothing(target: Target) -> None:
    """WRITE, TRIM and WRITE_ZEROES of 0 bytes are answered somehow, and the connection goes on."""
    target.need_writable()
    for session in target.sessions():
        for command in (Command.WRITE, *_payload_less(target)):
            session.call(command, 0, 0)
        expect_alive(session, target)


@check("P85", Level.SHOULD, writes=True)
def large_write(target: Target) -> None:
    """A WRITE of 32 MiB is carried out or answered with an error, and the connection goes on."""
    for session in target.sessions():
        error = _write(session, 0, bytes(_LARGE)).error
        if not target.has(TransmissionFlag.READ_ONLY) and target.size >= _LARGE <= target.sizes.maximum:
            expect(not error, f"it fails with {error_name(error)}")
        expect_alive(session, target)


@check("P95 P96 P128", Level.SHOULD, writes=True)
def long_trim_and_zero(target: Target) -> None:
    """TRIM and WRITE_ZEROES may be longer than data may be: they succeed, or fail, and the connection goes on."""
    target.need_writable()
    target.need(_payload_less(target), "the export has neither")
    length = min(target.size, (1 << 32) - max(512, target.sizes.minimum)) // target.sizes.minimum * target.sizes.minimum
    for session in target.sessions():
        for command in _payload_less(target):
            expect_error(session.call(command, 0, length), 0, Errno.EINVAL, Errno.EOVERFLOW)
        expect_alive(session, target)


@check("P88", Level.SHOULD, writes=True)
def misaligned_write(target: Target) -> None:
    """A WRITE that is not aligned to the minimum block is answered with EINVAL, and changes nothing."""
    target.need_writable()
    minimum = target.sizes.minimum
    target.need(minimum > 1 and target.size >= 2 * minimum, "every byte can be written on its own")
    for session in target.sessions():
        base = _data(2 * minimum, 13)
        expect_success(_write(session, 0, base))
        expect_error(_write(session, 1, bytes(minimum)), Errno.EINVAL)
        expect_error(_write(session, 0, bytes(minimum - 1)), Errno.EINVAL)
        _expect_content(session, 0, base)


@check("P70 P83", Level.MUST)
def read_only_is_read_only(target: Target) -> None:
    """On a read-only export nothing that would change it succeeds."""
    for command, transaction in _writes_to_read_only(target):
        expect(transaction.error, f"{Command(command).name} succeeds")


@check("P83 P98", Level.SHOULD)
def read_only_says_eperm(target: Target) -> None:
    """On a read-only export WRITE, TRIM and WRITE_ZEROES are answered with EPERM, and the connection goes on."""
    for _, transaction in _writes_to_read_only(target):
        expect_error(transaction, Errno.EPERM)


def _writes_to_read_only(target: Target) -> Iterator[tuple[int, Transaction]]:
    """Writes and their answers: without permission only one of what is there, which changes nothing if it succeeds."""
    target.need(target.has(TransmissionFlag.READ_ONLY), "the export can be written to")
    target.need(target.size, "the export is empty")
    for session in target.sessions():
        yield Command.WRITE, _write(session, 0, session.read(0, target.block))
        if target.may_write:
            for command in (Command.TRIM, Command.WRITE_ZEROES):
                yield command, session.call(command, 0, target.block)
        expect_alive(session, target)

"""Checks of metadata contexts and block status (P41-P48, P117-P119)."""

from nbdq.client import wire
from nbdq.client.transaction import Transaction, error_name
from nbdq.client.wire import OptionFailed, pack_context_request
from nbdq.nbd.constants import (
    BASE_ALLOCATION,
    AllocationState,
    Command,
    CommandFlag,
    Errno,
    Option,
    OptionReply,
    TransmissionFlag,
)
from nbdq.probe.check import Level, check
from nbdq.probe.findings import Deviation, expect
from nbdq.probe.target import (
    STRUCTURED,
    Target,
    answer,
    expect_alive,
    expect_error,
    expect_in_sync,
    expect_reply,
    expect_success,
)

#: Requests with which the status of the whole export is looked at, before the rest is believed.
_REQUESTS = 200

#: Bytes of each extent of zeros that are read.
_SAMPLE = 64 << 10

_UNKNOWN_CONTEXT = "x-nbdq-probe:nothing"


def _need_contexts(target: Target) -> str:
    target.need(target.contexts, "the export has no metadata contexts")
    target.need(target.size, "the export is empty")
    return BASE_ALLOCATION if BASE_ALLOCATION in target.contexts else target.contexts[0]


@check("P41 P45", Level.MUST)
def wildcard_of_base(target: Target) -> None:
    """LIST_META_CONTEXT of 'base:' finds what the export has in that namespace."""
    _need_contexts(target)
    with target.connect() as connection:
        connection.structured_reply()
        found = connection.list_meta_contexts(target.uri.export, "base:")
        expected = [name for name in target.contexts if name.startswith("base:")]
        expect(sorted(found) == sorted(expected), f"{found} instead of {expected}")


@check("P41 P45", Level.MUST)
def unknown_contexts_are_ignored(target: Target) -> None:
    """A query for an unknown namespace, or for an unknown name in 'base:', finds nothing, which is no error."""
    _need_contexts(target)
    for query in (_UNKNOWN_CONTEXT, "base:nothing"):
        with target.connect() as connection:
            connection.structured_reply()
            listed = connection.list_meta_contexts(target.uri.export, query)
            selected = connection.set_meta_contexts(target.uri.export, query)
            expect(not listed and not selected, f"{query} finds {listed or selected}")


@check("P44", Level.MUST)
def ids_are_unique(target: Target) -> None:
    """SET_META_CONTEXT selects a context once and with one id, also if two queries ask for it."""
    name = _need_contexts(target)
    with target.connect() as connection:
        connection.structured_reply()
        selected = connection.set_meta_contexts(target.uri.export, name, _UNKNOWN_CONTEXT, name)
        expect(list(selected) == [name], f"selected are {list(selected)}")
        every = connection.set_meta_contexts(target.uri.export, *target.contexts[:8])
        expect(set(every) == set(target.contexts[:8]), f"selected are {list(every)} of {target.contexts[:8]}")


@check("P42 P45", Level.MUST)
def nothing_is_selected_by_nothing(target: Target) -> None:
    """SET_META_CONTEXT without queries, or of 'base:' alone, selects nothing."""
    _need_contexts(target)
    for queries in ((), ("base:",)):
        with target.connect() as connection:
            connection.structured_reply()
            selected = connection.set_meta_contexts(target.uri.export, *queries)
            expect(not selected, f"{queries or 'no query'}: selected are {list(selected)}")


@check("P42", Level.SHOULD)
def contexts_need_structured_replies(target: Target) -> None:
    """SET_META_CONTEXT before structured replies were agreed is answered with ERR_INVALID."""
    name = _need_contexts(target)
    with target.connect() as connection:
        reply = answer(connection, Option.SET_META_CONTEXT, pack_context_request(target.uri.export, (name,)))
        expect_reply(reply, OptionReply.ERR_INVALID, OptionReply.ERR_EXT_HEADER_REQD)


@check("P46", Level.PRACTICE)
def many_queries(target: Target) -> None:
    """A thousand queries are answered, if only with ERR_TOO_BIG."""
    _need_contexts(target)
    queries = tuple(f"x-nbdq-probe:{number}" for number in range(1000))
    for option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
        with target.connect() as connection:
            connection.structured_reply()
            reply = answer(connection, option, pack_context_request(target.uri.export, queries))
            expect_reply(reply, OptionReply.ACK, OptionReply.ERR_TOO_BIG)
            expect_in_sync(connection)


@check("P42 P43", Level.SHOULD)
def status_without_contexts(target: Target) -> None:
    """BLOCK_STATUS is answered with EINVAL if no context was selected, and the connection goes on."""
    for session in target.sessions():
        expect_error(session.call(Command.BLOCK_STATUS, 0, target.block), Errno.EINVAL)
        expect_alive(session, target)


@check("P42", Level.SHOULD)
def a_failed_selection_selects_nothing(target: Target) -> None:
    """A SET_META_CONTEXT that fails leaves nothing selected, so that BLOCK_STATUS is answered with EINVAL."""
    name = _need_contexts(target)
    with target.connect() as connection:
        connection.structured_reply()
        connection.set_meta_contexts(target.uri.export, name)
        data = pack_context_request(target.uri.export, (name,))
        reply = answer(connection, Option.SET_META_CONTEXT, data[:-1])
        expect(reply >> 31, f"a truncated SET_META_CONTEXT is answered with {wire.reply_name(reply)}")
        session = connection.go(target.uri.export)
        expect_error(session.call(Command.BLOCK_STATUS, 0, target.block), Errno.EINVAL)


@check("P43", Level.SHOULD)
def a_selection_for_another_export(target: Target) -> None:
    """Contexts that were selected for another export count for nothing: BLOCK_STATUS is answered with EINVAL."""
    name = _need_contexts(target)
    with target.connect() as connection:
        try:
            others = [listed.name for listed in connection.list() if listed.name != target.uri.export]
        except OptionFailed as failure:
            target.need(None, f"no LIST: {failure}")
        target.need(others, "LIST does not tell of another export")
        connection.structured_reply()
        connection.set_meta_contexts(others[0], name)
        session = connection.go(target.uri.export)
        expect_error(session.call(Command.BLOCK_STATUS, 0, target.block), Errno.EINVAL)


@check("P117 P118 P119 P122", Level.MUST)
def block_status(target: Target) -> None:
    """Block status is contiguous from the requested offset on, without empty extents, one answer for each context."""
    _need_contexts(target)
    for session in target.sessions(*target.contexts[:8]):
        step = target.end if session.extended else (1 << 32) - (1 << 16)
        offset = requests = 0
        while offset < target.end and requests < _REQUESTS:
            length = min(step, target.end - offset)
            extents = expect_success(session.call(Command.BLOCK_STATUS, offset, length)).extents
            offset += min(sum(extent.length for extent in found) for found in extents.values())
            requests += 1


@check("P117", Level.MUST)
def one_extent(target: Target) -> None:
    """BLOCK_STATUS with REQ_ONE is answered with one extent for each context, not longer than the request."""
    _need_contexts(target)
    for session in target.sessions(*target.contexts[:8]):
        for offset in {0, target.size // 2 // target.block * target.block, target.last}:
            for length in {target.block, target.end - offset}:
                length = min(length, (1 << 32) - (1 << 16))
                expect_success(session.call(Command.BLOCK_STATUS, offset, length, flags=CommandFlag.REQ_ONE))


@check("P118", Level.SHOULD)
def allocation_has_two_bits(target: Target) -> None:
    """base:allocation knows two bits; the others are zero."""
    for _, transaction in _allocation(target):
        for extent in transaction.extents.popitem()[1]:
            expect(not extent.status & ~3, f"an extent has the status {extent.status:#x}")


@check("P118", Level.MUST)
def zeros_are_zeros(target: Target) -> None:
    """What base:allocation calls zero reads as zeros."""
    for offset, transaction in _allocation(target):
        zeros: list[tuple[int, int]] = []
        for extent in transaction.extents.popitem()[1]:
            if extent.status & AllocationState.ZERO and len(zeros) < 16:
                zeros.append((offset, min(extent.length, target.length(_SAMPLE))))
            offset += extent.length
        with target.session() as session:
            for start, length in zeros:
                if not (start | length) % target.sizes.minimum:
                    data = expect_success(session.call(Command.READ, start, length)).data
                    expect(not any(data), f"{length} bytes at {start} are not")


def _allocation(target: Target) -> list[tuple[int, Transaction]]:
    """The status of the beginning and of the middle of the export: offset and answer."""
    _need_contexts(target)
    target.need(BASE_ALLOCATION in target.contexts, f"the export does not have {BASE_ALLOCATION}")
    with target.session(STRUCTURED, BASE_ALLOCATION) as session:
        length = min(target.end, 1 << 30)
        offsets = {0, (target.end - length) // 2 // target.block * target.block}
        return [(at, expect_success(session.call(Command.BLOCK_STATUS, at, length))) for at in sorted(offsets)]


@check("P117 P87", Level.SHOULD)
def status_beyond_the_end(target: Target) -> None:
    """BLOCK_STATUS of anything behind the end is answered with EINVAL, and the connection goes on."""
    name = _need_contexts(target)
    block = target.block
    for session in target.sessions(name):
        for offset, length in ((target.size, block), (target.last, 2 * block), ((1 << 64) - block, block)):
            error = session.call(Command.BLOCK_STATUS, offset, length).error
            expect(error == Errno.EINVAL, f"{length} bytes at {offset} are answered with {error_name(error)}")
        expect_alive(session, target)


@check("P86", Level.SHOULD)
def status_of_nothing(target: Target) -> None:
    """BLOCK_STATUS of 0 bytes is answered somehow, and the connection goes on."""
    name = _need_contexts(target)
    for session in target.sessions(name):
        session.call(Command.BLOCK_STATUS, 0, 0)
        expect_alive(session, target)


@check("P83", Level.MUST)
def status_with_fua(target: Target) -> None:
    """BLOCK_STATUS accepts FUA, once the export advertises it."""
    name = _need_contexts(target)
    target.need_flag(TransmissionFlag.SEND_FUA)
    for session in target.sessions(name):
        expect_success(session.call(Command.BLOCK_STATUS, 0, target.block, flags=CommandFlag.FUA))


@check("P83", Level.SHOULD)
def status_with_wrong_flags(target: Target) -> None:
    """BLOCK_STATUS with a flag that is not its own is answered with EINVAL, and the connection goes on."""
    name = _need_contexts(target)
    for session in target.sessions(name):
        for flag in (1 << 14, CommandFlag.NO_HOLE, CommandFlag.DF):
            error = session.call(Command.BLOCK_STATUS, 0, target.block, flags=int(flag)).error
            if error != Errno.EINVAL:
                raise Deviation(f"the flag {flag:#x} is answered with {error_name(error)}")
        expect_alive(session, target)

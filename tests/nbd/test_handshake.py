"""The handshake as a client sees it; every conversation runs whole, byte by byte and with more bytes behind it (P5)."""

import random
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace

import pytest

from nbdq.errors import ExportError, ProtocolError
from nbdq.nbd.constants import TransmissionFlag
from nbdq.nbd.exports import ExportInfo, Negotiated
from nbdq.nbd.handshake import Handshake
from tests.nbd.wire import (
    ABORT,
    ACK,
    DISK,
    EXPORT_NAME,
    EXPORTS,
    EXT_HEADER_REQD,
    EXTENDED_HEADERS,
    FIXED,
    GO,
    INFO,
    INFO_REPLY,
    INVALID,
    LIST,
    LIST_META_CONTEXT,
    META_CONTEXT,
    NO_ZEROES,
    OTHER,
    PEEK_EXPORT,
    POLICY,
    READ_ONLY,
    SERVER,
    SET_META_CONTEXT,
    SHUTDOWN,
    STARTTLS,
    STRUCTURED_REPLY,
    TOO_BIG,
    UNKNOWN,
    UNSUP,
    Directory,
    info,
    meta,
    option,
    replies_to,
    reply,
    shake,
    shake_three_ways,
    text,
    u16,
    u32,
)

EVERY_OPTION = (*range(1, 12), 0, 12, 0xFFFFFFFF)
STRUCTURED = option(STRUCTURED_REPLY)
STRUCTURED_ACK = reply(STRUCTURED_REPLY, ACK)
DISK_SIZE = b"\0\0\0\1\x23\x45\x67\x89"


def kind(answer: bytes) -> int:
    return int.from_bytes(answer[12:16], "big")


def error_text(answer: bytes) -> str:
    """The text of an error reply, whose length must be that of the payload (P28)."""
    assert kind(answer) >= 0x80000000
    assert int.from_bytes(answer[16:20], "big") == len(answer) - 20
    return answer[20:].decode()


# Hello and client flags.


def test_the_server_opens_with_a_newstyle_hello() -> None:
    """P10, P11."""
    assert Handshake(EXPORTS).hello() == b"NBDMAGICIHAVEOPT\x00\x03"


def test_a_silent_client_is_sent_nothing() -> None:
    outcome = shake([b"", b""])
    assert (outcome.replies, outcome.finished, outcome.negotiated) == ((), False, None)


@pytest.mark.parametrize("flags", [4, 5, 0x80000003, 0xFFFFFFFF])
def test_a_client_with_flags_that_were_not_offered_is_dropped(flags: int) -> None:
    """P12."""
    outcome = shake_three_ways(u32(flags) + option(LIST))
    assert outcome.finished
    assert not outcome.replies
    assert hex(flags) in outcome.reason
    with pytest.raises(ProtocolError, match="flags"):
        Handshake(EXPORTS).receive(u32(flags))


@pytest.mark.parametrize("client", [b"\0\0\0\0", b"\0\0\0\2"])
@pytest.mark.parametrize("code", [code for code in EVERY_OPTION if code != EXPORT_NAME])
def test_a_client_without_fixed_newstyle_is_dropped_without_a_reply_to_anything_but_export_name(
    client: bytes, code: int
) -> None:
    """P13."""
    outcome = shake_three_ways(client + option(code))
    assert outcome.finished
    assert not outcome.replies
    assert "fixed newstyle" in outcome.reason


# Framing.


@pytest.mark.parametrize("magic", [b"IHAVEOPU", b"\0" * 8, b"NBDMAGIC"])
def test_a_wrong_option_magic_ends_the_connection(magic: bytes) -> None:
    """P20."""
    outcome = shake_three_ways(NO_ZEROES + magic + u32(LIST) + u32(0))
    assert outcome.finished
    assert not outcome.replies
    assert magic.hex() in outcome.reason


def test_replies_earned_before_sync_was_lost_are_still_sent() -> None:
    """P22: pieces or not, a client sees the same."""
    outcome = shake_three_ways(NO_ZEROES + STRUCTURED + b"?" * 16)
    assert outcome.replies == (STRUCTURED_ACK,)
    assert outcome.finished


def test_nothing_is_answered_after_sync_was_lost() -> None:
    handshake = Handshake(EXPORTS)
    with pytest.raises(ProtocolError):
        handshake.receive(NO_ZEROES + b"?" * 16)
    assert handshake.finished
    assert handshake.receive(STRUCTURED) == []


@pytest.mark.parametrize("code", [0, PEEK_EXPORT, 12, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("data", [b"", b"x", b"IHAVEOPT" * 100])
def test_an_unknown_option_is_unsupported_and_sync_is_kept(code: int, data: bytes) -> None:
    """P24, P40."""
    refused, after = replies_to(option(code, data) + STRUCTURED)
    assert refused.startswith(b"\x00\x03\xe8\x89\x04\x55\x65\xa9" + u32(code) + u32(UNSUP))
    assert error_text(refused)
    assert after == STRUCTURED_ACK


@pytest.mark.parametrize("code", [LIST, STARTTLS, STRUCTURED_REPLY])
def test_data_with_an_option_that_has_none_is_invalid(code: int) -> None:
    """P26, P60."""
    refused, after = replies_to(option(code, b"x") + option(LIST_META_CONTEXT, b""))
    assert kind(refused) == INVALID
    assert "1 byte" in error_text(refused)
    assert kind(after) == INVALID


def test_data_with_structured_reply_does_not_agree_to_it() -> None:
    """P26."""
    outcome = shake_three_ways(NO_ZEROES + option(STRUCTURED_REPLY, b"x") + info(GO, "disk"))
    assert outcome.negotiated == Negotiated(DISK, False, ())


@pytest.mark.parametrize("length", [(64 << 10) + 1, 1 << 20])
@pytest.mark.parametrize("code", [LIST, GO, STRUCTURED_REPLY, SET_META_CONTEXT, 99])
def test_an_option_too_long_to_keep_is_discarded_and_refused(code: int, length: int) -> None:
    """P25, R-05."""
    conversation = NO_ZEROES + option(code, bytes(length)) + STRUCTURED
    for pieces in ([conversation], [conversation[i : i + 4093] for i in range(0, len(conversation), 4093)]):
        refused, after = shake(pieces).replies
        assert kind(refused) == TOO_BIG
        assert "65536" in error_text(refused)
        assert after == STRUCTURED_ACK


@pytest.mark.parametrize("length", [(1 << 20) + 1, 1 << 31, 0xFFFFFFFF])
def test_an_option_too_long_to_discard_ends_the_connection_at_its_header(length: int) -> None:
    """P25, R-05."""
    outcome = shake_three_ways(NO_ZEROES + b"IHAVEOPT" + u32(LIST) + u32(length))
    assert outcome.finished
    assert not outcome.replies
    assert str(length) in outcome.reason
    assert "LIST" in outcome.reason


def test_the_longest_option_that_is_kept_is_answered_as_any_other() -> None:
    (refused,) = replies_to(option(77, bytes(64 << 10)))
    assert kind(refused) == UNSUP


def test_a_discarded_option_costs_no_memory() -> None:
    """P25, R-05: the client sends 1 MiB, in pieces of 4 KiB."""
    handshake = Handshake(EXPORTS)
    handshake.receive(NO_ZEROES + b"IHAVEOPT" + u32(LIST) + u32(1 << 20))
    piece = bytes(4096)
    tracemalloc.start()
    for _ in range(256):
        replies = handshake.receive(piece)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [kind(each) for each in replies] == [TOO_BIG]
    assert peak < 64 << 10


# The budget of options.


def test_a_client_that_never_stops_haggling_is_dropped() -> None:
    """P16."""
    outcome = shake_three_ways(NO_ZEROES + option(99) * 33)
    assert outcome.kinds == [UNSUP] * 32
    assert outcome.finished
    assert "option" in outcome.reason


def test_the_number_of_options_can_be_chosen() -> None:
    outcome = shake([NO_ZEROES + option(99) * 4], lambda: Handshake(EXPORTS, maximum_options=3))
    assert outcome.kinds == [UNSUP] * 3
    assert outcome.finished


def test_a_client_that_listed_exports_may_ask_about_each() -> None:
    """qemu-nbd --list sends INFO and LIST_META_CONTEXT for every export on one connection."""
    exports = Directory([ExportInfo(str(i), 0, TransmissionFlag(0)) for i in range(200)], {})
    data = option(LIST) + b"".join(info(INFO, str(i)) + meta(LIST_META_CONTEXT, str(i)) for i in range(200))
    outcome = shake([NO_ZEROES + data], lambda: Handshake(exports))
    assert not outcome.finished
    assert outcome.kinds.count(ACK) == 401


def test_listing_many_exports_over_and_over_is_not_free() -> None:
    """P16, R-05: 16 bytes of input must not buy any number of long lists."""
    exports = Directory([ExportInfo(str(i), 0, TransmissionFlag(0)) for i in range(200)], {})
    outcome = shake([NO_ZEROES + option(LIST) * 1000], lambda: Handshake(exports))
    assert outcome.finished
    assert 2 <= outcome.kinds.count(ACK) <= 33


def test_one_call_answers_no_second_long_list() -> None:
    """P16, R-05: what is answered before the client has taken anything must not be a multiple of all exports."""
    exports = Directory([ExportInfo(str(i), 0, TransmissionFlag(0)) for i in range(400)], {})
    handshake = Handshake(exports)
    handshake.receive(NO_ZEROES)
    for data in (option(LIST) * 3 + info(GO, "7")[:20], b"", b""):
        assert len(handshake.receive(data)) == 401
        assert handshake.has_more
    assert handshake.receive(b"") == []
    assert not handshake.has_more
    handshake.receive(info(GO, "7")[20:])
    assert handshake.negotiated


# LIST, ABORT, STARTTLS, STRUCTURED_REPLY.


def test_list_names_every_export_and_may_be_repeated() -> None:
    """P32."""
    listed = [
        b"\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\3\0\0\0\2\0\0\0\x0f\0\0\0\4diska d\xc3\xa9sk",
        b"\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\3\0\0\0\2\0\0\0\x0b\0\0\0\7a/other",
        b"\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\3\0\0\0\1\0\0\0\0",
    ]
    assert replies_to(option(LIST) * 2) == listed * 2
    assert kind(listed[0]) == SERVER


def test_a_server_without_exports_lists_none() -> None:
    outcome = shake_three_ways(NO_ZEROES + option(LIST), lambda: Handshake(Directory([], {})))
    assert outcome.replies == (reply(LIST, ACK),)


@pytest.mark.parametrize("data", [b"", b"bye", bytes(100 << 10)])
def test_abort_is_acknowledged_whatever_it_carries_and_ends_the_connection(data: bytes) -> None:
    """P26, P140."""
    outcome = shake([NO_ZEROES + option(ABORT, data) + option(LIST)])
    assert outcome.replies == (reply(ABORT, ACK),)
    assert outcome.finished
    assert "ABORT" in outcome.reason


def test_abort_in_pieces() -> None:
    outcome = shake_three_ways(FIXED + option(ABORT))
    assert outcome.replies == (reply(ABORT, ACK),)
    assert outcome.finished
    assert outcome.leftover == b""


def test_starttls_is_refused_by_policy_and_forgets_nothing() -> None:
    """P64: NOTLS mode never says TLS_REQD."""
    outcome = shake_three_ways(NO_ZEROES + STRUCTURED + option(STARTTLS) + info(GO, "disk"))
    assert outcome.kinds == [ACK, POLICY, INFO_REPLY, INFO_REPLY, ACK]
    assert outcome.negotiated is not None
    assert outcome.negotiated.structured


def test_structured_replies_may_be_asked_for_twice() -> None:
    """P39."""
    assert replies_to(STRUCTURED * 2) == [STRUCTURED_ACK] * 2


# INFO and GO.


@pytest.mark.parametrize("client", [FIXED, NO_ZEROES])
@pytest.mark.parametrize("code", [INFO, GO])
def test_a_client_that_asks_for_nothing_is_told_size_flags_and_block_sizes(code: int, client: bytes) -> None:
    """P33, P34, P35: there are no zeroes here, whatever the client flags."""
    outcome = shake_three_ways(client + info(code, "disk"))
    assert list(outcome.replies) == [
        reply(code, INFO_REPLY, b"\0\3\0\0\0\1\0\1\0\0\2\0\0\0"),
        reply(code, INFO_REPLY, b"\0\0" + DISK_SIZE + b"\0\7"),
        reply(code, ACK),
    ]
    assert outcome.negotiated == (Negotiated(DISK, False, ()) if code == GO else None)
    assert not outcome.finished


def test_name_and_description_are_told_to_who_asks() -> None:
    """P34, P35; types that nobody knows, and duplicates, are ignored (P33)."""
    replies = replies_to(info(INFO, "", 2, 1, 99, 0xFFFF, 1, 0, 3))
    assert replies[:2] == [
        reply(INFO, INFO_REPLY, b"\0\1disk"),
        reply(INFO, INFO_REPLY, b"\0\2a d\xc3\xa9sk"),
    ]
    assert len(replies) == 5


def test_an_export_without_description_says_nothing_about_it() -> None:
    replies = replies_to(info(INFO, "a/other", 2))
    assert [answer[20:22] for answer in replies] == [b"\0\3", b"\0\0", b""]


@pytest.mark.parametrize("structured", [False, True])
def test_df_is_offered_exactly_to_clients_with_structured_replies(structured: bool) -> None:
    """Table 1.6."""
    outcome = shake_three_ways(NO_ZEROES + (STRUCTURED if structured else b"") + info(GO, "a/other"))
    flags = int.from_bytes(outcome.replies[-2][-2:], "big")
    assert flags == (0x81 if structured else 0x01)
    assert outcome.negotiated == Negotiated(OTHER, structured, ())
    assert outcome.negotiated is not None
    assert outcome.negotiated.flags == flags


def test_info_promises_what_go_then_keeps() -> None:
    """P36."""
    data = option(STRUCTURED_REPLY) + info(INFO, "disk", 1, 2, 3) + info(GO, "disk", 1, 2, 3)
    replies = shake_three_ways(NO_ZEROES + data).replies[1:]
    asked, went = replies[: len(replies) // 2], replies[len(replies) // 2 :]
    assert [answer[12:] for answer in asked] == [answer[12:] for answer in went]


@pytest.mark.parametrize("code", [INFO, GO])
@pytest.mark.parametrize("name", ["nope", "DISK", "disk/", "/disk", "dis"])
def test_an_unknown_export_is_refused_and_another_may_be_tried(code: int, name: str) -> None:
    """P31, P37, P38."""
    outcome = shake_three_ways(NO_ZEROES + info(code, name) + info(GO, "a/other"))
    assert outcome.kinds == [UNKNOWN, INFO_REPLY, INFO_REPLY, ACK]
    assert name in error_text(outcome.replies[0])
    assert outcome.negotiated == Negotiated(OTHER, False, ())


def test_a_server_without_default_export_says_so() -> None:
    """P31."""
    outcome = shake_three_ways(NO_ZEROES + info(GO, ""), lambda: Handshake(Directory([DISK], {})))
    assert outcome.kinds == [UNKNOWN]
    assert "default export" in error_text(outcome.replies[0])


@pytest.mark.parametrize("code", [INFO, GO])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", INVALID),
        (text("disk"), INVALID),
        (text("disk") + u16(1), INVALID),
        (text("disk") + u16(0) + b"x", INVALID),
        (u32(5) + b"disk" + u16(0), INVALID),
        (u32(2**32 - 1) + b"disk" + u16(0), INVALID),
        (text(b"di\0sk") + u16(0), INVALID),
        (text(b"di\xffsk") + u16(0), INVALID),
        (text("d" * 4097) + u16(0), TOO_BIG),
    ],
)
def test_a_malformed_question_is_refused_and_sync_is_kept(code: int, data: bytes, expected: int) -> None:
    """P27, P31, R-04."""
    refused, after = replies_to(option(code, data) + STRUCTURED)
    assert kind(refused) == expected
    assert error_text(refused)
    assert after == STRUCTURED_ACK


@pytest.mark.parametrize("name", ["n" * 4096, "é" * 2048, "💾" * 1024, "\x1b" * 4096])
def test_the_longest_name_fits_into_every_error(name: str) -> None:
    """P28, R-06 (CVE-2020-10761), N2."""
    data = info(INFO, name) + info(GO, name) + meta(LIST_META_CONTEXT, name)
    data += STRUCTURED + meta(SET_META_CONTEXT, name) + meta(SET_META_CONTEXT, "", name)
    for answer in replies_to(data):
        assert len(answer) < 1024
        assert kind(answer) == ACK or error_text(answer).isprintable()
    outcome = shake([NO_ZEROES + option(EXPORT_NAME, name.encode())])
    assert outcome.finished
    assert outcome.reason.isprintable()
    assert len(outcome.reason) < 1024


def test_what_follows_go_is_left_over_for_transmission() -> None:
    request = b"\x25\x60\x95\x13" + bytes(24)
    outcome = shake_three_ways(NO_ZEROES + info(GO, "disk") + request)
    assert outcome.leftover == request


# EXPORT_NAME.


@pytest.mark.parametrize(
    ("client", "zeroes"), [(b"\0\0\0\0", 124), (b"\0\0\0\1", 124), (b"\0\0\0\2", 0), (b"\0\0\0\3", 0)]
)
def test_export_name_begins_transmission_for_every_kind_of_client(client: bytes, zeroes: int) -> None:
    """P13, P30."""
    outcome = shake_three_ways(client + option(EXPORT_NAME, b"disk"))
    assert outcome.replies == (DISK_SIZE + b"\0\7" + bytes(zeroes),)
    assert outcome.negotiated == Negotiated(DISK, False, ())


def test_export_name_keeps_what_was_agreed_before() -> None:
    """P30, P43."""
    data = STRUCTURED + meta(SET_META_CONTEXT, "a/other", "base:allocation") + option(EXPORT_NAME, b"a/other")
    outcome = shake_three_ways(NO_ZEROES + data)
    assert outcome.replies[-1] == b"\0\0\0\0\0\0\2\0" + b"\0\x81"
    assert outcome.negotiated == Negotiated(OTHER, True, ((0, "base:allocation"),))


@pytest.mark.parametrize("client", [FIXED, b"\0\0\0\0"])
@pytest.mark.parametrize("name", [b"nope", b"\xff", b"di\0sk", b"d" * 4097, b"d" * 70000])
def test_export_name_that_fails_closes_for_want_of_an_error_reply(client: bytes, name: bytes) -> None:
    """P30, P31."""
    outcome = shake([client + option(EXPORT_NAME, name)])
    assert outcome.finished
    assert not outcome.replies
    assert outcome.negotiated is None
    assert "EXPORT_NAME" in outcome.reason


def test_export_name_that_fails_in_pieces() -> None:
    outcome = shake_three_ways(NO_ZEROES + option(EXPORT_NAME, b"nope"))
    assert outcome.finished
    assert "nope" in outcome.reason


# Metadata contexts.


def listed_contexts(*queries: str, name: str = "disk") -> list[bytes]:
    *contexts, acknowledged = replies_to(meta(LIST_META_CONTEXT, name, *queries))
    assert acknowledged == reply(LIST_META_CONTEXT, ACK)
    for answer in contexts:
        assert answer == reply(LIST_META_CONTEXT, META_CONTEXT, b"\0\0\0\0" + answer[24:])  # id 0 (P41)
    return [answer[24:] for answer in contexts]


BASE, DEPTH = b"base:allocation", b"qemu:allocation-depth"
BITMAPS = [b"qemu:dirty-bitmap:b0", b"qemu:dirty-bitmap:b1"]


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ([], [BASE, DEPTH, *BITMAPS]),
        (["base:"], [BASE]),
        (["base:allocation"], [BASE]),
        (["qemu:"], [DEPTH, *BITMAPS]),
        (["qemu:dirty-bitmap:"], BITMAPS),
        (["qemu:dirty-bitmap:b1"], BITMAPS[1:]),
        (["base:", "base:allocation", "base:"], [BASE]),
        (["base:", "qemu:"], [BASE, DEPTH, *BITMAPS]),
        (["base:alloc"], []),
        (["Base:"], []),
        (["x-other:thing", "unknown:"], []),
        (["qemu:dirty-bitmap:b"], []),
        (["qemu:dirty-bitmap"], []),
        ([":"], []),
    ],
)
def test_list_meta_context_answers_names_and_wildcards(queries: list[str], found: list[bytes]) -> None:
    """P41, P44, P45, P48; before structured replies, as QEMU permits."""
    assert listed_contexts(*queries) == found


def test_list_meta_context_asks_one_export() -> None:
    assert listed_contexts(name="a/other") == [BASE]
    assert listed_contexts(name="") == [BASE, DEPTH, *BITMAPS]


@pytest.mark.parametrize(
    ("queries", "selected"),
    [
        ([], []),
        (["base:allocation"], [(0, BASE)]),
        (["base:allocation", "base:allocation"], [(0, BASE)]),
        (["qemu:dirty-bitmap:b1", "base:allocation"], [(0, BASE), (3, BITMAPS[1])]),
        (["base:"], []),
        (["qemu:"], []),
        (["qemu:dirty-bitmap:"], []),
        (["qemu:dirty-bitmap:nope", "other:thing"], []),
    ],
)
def test_set_meta_context_selects_full_names_only(queries: list[str], selected: list[tuple[int, bytes]]) -> None:
    """P42, P44, P45, P48."""
    data = STRUCTURED + meta(SET_META_CONTEXT, "disk", *queries) + info(GO, "disk")
    outcome = shake_three_ways(NO_ZEROES + data)
    assert list(outcome.replies[1:-3]) == [
        *(reply(SET_META_CONTEXT, META_CONTEXT, u32(number) + name) for number, name in selected),
        reply(SET_META_CONTEXT, ACK),
    ]
    assert outcome.negotiated == Negotiated(DISK, True, tuple((number, name.decode()) for number, name in selected))


@pytest.mark.parametrize(
    ("spoiler", "answer"),
    [
        (meta(SET_META_CONTEXT, "disk"), ACK),
        (meta(SET_META_CONTEXT, "disk", "base:nope"), ACK),
        (meta(SET_META_CONTEXT, "a/other", "base:allocation"), META_CONTEXT),
        (meta(SET_META_CONTEXT, "nope", "base:allocation"), UNKNOWN),
        (meta(SET_META_CONTEXT, "disk", "colonless"), INVALID),
        (meta(SET_META_CONTEXT, "disk", ""), INVALID),
        (meta(SET_META_CONTEXT, "disk", *["base:"] * 65), TOO_BIG),
        (option(SET_META_CONTEXT, b""), INVALID),
        (option(SET_META_CONTEXT, text("disk") + u32(0) + b"x"), INVALID),
        (option(SET_META_CONTEXT, bytes(70000)), TOO_BIG),
    ],
)
def test_a_selection_is_replaced_even_by_one_that_fails(spoiler: bytes, answer: int) -> None:
    """P42, P46."""
    data = NO_ZEROES + STRUCTURED + meta(SET_META_CONTEXT, "disk", "base:allocation") + spoiler
    outcome = shake([data, info(GO, "disk")])
    assert outcome.kinds[3] == answer
    assert outcome.negotiated == Negotiated(DISK, True, ())


@pytest.mark.parametrize(
    "between",
    [
        b"",
        option(99),
        option(STARTTLS),
        STRUCTURED,
        info(INFO, "disk"),
        info(INFO, "a/other"),
        info(GO, "nope"),
        meta(LIST_META_CONTEXT, "a/other"),
        option(LIST),
    ],
)
def test_a_selection_outlives_other_options(between: bytes) -> None:
    """P38, P43."""
    data = STRUCTURED + meta(SET_META_CONTEXT, "disk", "base:allocation") + between + info(GO, "disk")
    outcome = shake_three_ways(NO_ZEROES + data)
    assert outcome.negotiated == Negotiated(DISK, True, ((0, "base:allocation"),))


@pytest.mark.parametrize("final", [info(GO, "a/other"), option(EXPORT_NAME, b"a/other")])
def test_a_selection_made_for_another_export_counts_for_nothing(final: bytes) -> None:
    """P43."""
    data = STRUCTURED + meta(SET_META_CONTEXT, "disk", "base:allocation") + final
    assert shake_three_ways(NO_ZEROES + data).negotiated == Negotiated(OTHER, True, ())


def test_the_default_export_and_its_name_are_the_same_export() -> None:
    """P31, P43."""
    data = STRUCTURED + meta(SET_META_CONTEXT, "", "base:allocation") + info(GO, "disk")
    assert shake_three_ways(NO_ZEROES + data).negotiated == Negotiated(DISK, True, ((0, "base:allocation"),))


def test_set_meta_context_needs_structured_replies() -> None:
    """P42."""
    data = meta(SET_META_CONTEXT, "disk", "base:allocation") + STRUCTURED + info(GO, "disk")
    outcome = shake_three_ways(NO_ZEROES + data)
    assert outcome.kinds[0] == INVALID
    assert "STRUCTURED_REPLY" in error_text(outcome.replies[0])
    assert outcome.negotiated == Negotiated(DISK, True, ())


@pytest.mark.parametrize("code", [LIST_META_CONTEXT, SET_META_CONTEXT])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", INVALID),
        (text("disk"), INVALID),
        (text("disk") + u32(1), INVALID),
        (text("disk") + u32(1) + u32(2**31) + b"x:", INVALID),
        (text("disk") + u32(1) + text("base:") + b"x", INVALID),
        (text("disk") + u32(1) + text("colonless"), INVALID),
        (text("disk") + u32(2) + text("base:") + text("colonless"), INVALID),
        (text("disk") + u32(1) + text(b"\xff:"), INVALID),
        (text("nope") + u32(0), UNKNOWN),
        (text("disk") + u32(65) + text("base:") * 65, TOO_BIG),
        (text("disk") + u32(2**32 - 1), TOO_BIG),
        (text("disk") + u32(1) + text("x:" + "y" * 4095), TOO_BIG),
    ],
)
def test_malformed_queries_are_refused_and_sync_is_kept(code: int, data: bytes, expected: int) -> None:
    """P27, P41, P42, P45, P46, R-04."""
    _, refused, after = replies_to(STRUCTURED + option(code, data) + STRUCTURED)
    assert kind(refused) == expected
    assert error_text(refused)
    assert after == STRUCTURED_ACK


def test_an_export_with_many_contexts_lists_them_all_but_lends_a_client_no_more_than_sixteen() -> None:
    """P46."""
    names = tuple(f"qemu:dirty-bitmap:{i}" for i in range(17))
    exports = Directory([ExportInfo("", 0, TransmissionFlag(0), contexts=names)], {})
    data = STRUCTURED + meta(LIST_META_CONTEXT, "") + meta(SET_META_CONTEXT, "", *names)
    outcome = shake_three_ways(NO_ZEROES + data + meta(SET_META_CONTEXT, "", *names[1:]), lambda: Handshake(exports))
    assert outcome.kinds == [ACK] + [META_CONTEXT] * 17 + [ACK, TOO_BIG] + [META_CONTEXT] * 16 + [ACK]


# Shutdown.


@pytest.mark.parametrize("code", [code for code in EVERY_OPTION if code not in (EXPORT_NAME, ABORT)])
def test_a_server_that_shuts_down_refuses_every_option_but_abort(code: int) -> None:
    """P99."""

    def shutting_down() -> Handshake:
        handshake = Handshake(EXPORTS)
        handshake.shut_down()
        return handshake

    outcome = shake_three_ways(NO_ZEROES + option(code, b"data") + option(ABORT), shutting_down)
    assert outcome.kinds == [SHUTDOWN, ACK]
    assert outcome.finished


def test_a_server_that_shuts_down_closes_at_export_name() -> None:
    """P30, P99."""
    handshake = Handshake(EXPORTS)
    assert handshake.receive(NO_ZEROES + STRUCTURED) == [STRUCTURED_ACK]
    handshake.shut_down()
    assert handshake.receive(option(EXPORT_NAME, b"disk")) == []
    assert handshake.finished
    assert handshake.ending is not None
    assert "shutting down" in handshake.ending.text


# Exports that cannot be described to a client.


@pytest.mark.parametrize(
    "values",
    [
        {"name": "n" * 4097},
        {"name": "é" * 2049},
        {"name": "a\0b"},
        {"name": "\udcff"},
        {"description": "d" * 4097},
        {"contexts": ("qemu:dirty-bitmap:" + "b" * 4096,)},
        {"size": -1},
        {"size": 1 << 63},
        {"minimum_block": 0},
        {"minimum_block": 3},
        {"minimum_block": 128 << 10, "preferred_block": 128 << 10},
        {"preferred_block": 256},
        {"preferred_block": 4097},
        {"minimum_block": 8192},
        {"maximum_block": 2048},
        {"maximum_block": (1 << 20) + 1, "minimum_block": 512},
        {"maximum_block": 128 << 20},
    ],
)
def test_an_export_that_a_client_could_not_take_is_refused_when_it_is_made(values: dict[str, object]) -> None:
    """P2, P126."""
    with pytest.raises(ExportError) as refused:
        ExportInfo(**{"name": "disk", "size": 512, "flags": TransmissionFlag(0), **values})  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 700


@pytest.mark.parametrize(
    "values",
    [
        {"name": "", "size": 0},
        {"name": "n" * 4096, "description": "é" * 2048, "size": (1 << 63) - 1},
        {"minimum_block": 65536, "preferred_block": 65536, "maximum_block": 65536},
        {"minimum_block": 512, "preferred_block": 512, "maximum_block": 64 << 20},
    ],
)
def test_an_export_at_the_limits_is_fine(values: dict[str, object]) -> None:
    export = ExportInfo(**{"name": "disk", "size": 512, "flags": TransmissionFlag(0), **values})  # type: ignore[arg-type]
    outcome = shake([NO_ZEROES + info(GO, export.name, 1, 2)], lambda: Handshake(Directory([export], {})))
    assert outcome.negotiated == Negotiated(export, False, ())


# Extended headers.

EXTENDED = option(EXTENDED_HEADERS)
INFO_EXPORT = u32(INFO_REPLY) + u32(12) + u16(0)


def test_extended_headers_imply_structured_replies_and_can_be_agreed_twice() -> None:
    """P40: and then there is no way back to structured replies alone (P39)."""
    outcome = shake_three_ways(NO_ZEROES + EXTENDED + EXTENDED + option(STRUCTURED_REPLY) + info(GO, "disk"))
    assert outcome.kinds == [ACK, ACK, EXT_HEADER_REQD, INFO_REPLY, INFO_REPLY, ACK]
    assert outcome.negotiated == Negotiated(DISK, True, (), extended=True)
    assert outcome.negotiated.flags == READ_ONLY | TransmissionFlag.SEND_DF


def test_extended_headers_may_follow_structured_replies() -> None:
    outcome = shake_three_ways(NO_ZEROES + option(STRUCTURED_REPLY) + EXTENDED + info(GO, "disk"))
    assert outcome.negotiated == Negotiated(DISK, True, (), extended=True)


def test_extended_headers_carry_no_data() -> None:
    """P26."""
    outcome = shake_three_ways(NO_ZEROES + option(EXTENDED_HEADERS, b"x") + info(GO, "disk"))
    assert outcome.kinds[0] == INVALID
    assert outcome.negotiated == Negotiated(DISK, False, ())


def test_export_name_closes_a_conversation_with_extended_headers() -> None:
    """P30, P122."""
    outcome = shake_three_ways(NO_ZEROES + EXTENDED + option(EXPORT_NAME, b"disk"))
    assert outcome.finished
    assert outcome.negotiated is None


def test_block_status_with_payload_is_for_who_has_selected_contexts_with_extended_headers() -> None:
    """P120: and INFO says what GO will say (P36)."""
    payload = TransmissionFlag.BLOCK_STATUS_PAYLOAD
    select = meta(SET_META_CONTEXT, "disk", "base:allocation")
    for said, expected in [
        (EXTENDED + select, payload),
        (select.join([option(STRUCTURED_REPLY), EXTENDED]), payload),
        (EXTENDED, 0),
        (option(STRUCTURED_REPLY) + select, 0),
        (EXTENDED + meta(SET_META_CONTEXT, "a/other", "base:allocation"), 0),
    ]:
        outcome = shake_three_ways(NO_ZEROES + said + info(INFO, "disk") + info(GO, "disk"))
        assert outcome.negotiated is not None
        assert outcome.negotiated.flags & payload == expected
        flags = [int.from_bytes(each[-2:], "big") for each in outcome.replies if each[12:22] == INFO_EXPORT]
        assert flags == [outcome.negotiated.flags] * 2


SECRETIVE = ExportInfo(
    "disk",
    512,
    TransmissionFlag(0),
    contexts=("base:allocation", "x-a:wide", "x-a:narrow"),
    hidden_contexts=("x-a:hidden", "x-a:hidden-wide"),
    wide_contexts=frozenset({"x-a:wide", "x-a:hidden-wide"}),
)


def contexts_in(replies: Sequence[bytes]) -> list[tuple[int, bytes]]:
    return [(int.from_bytes(each[20:24], "big"), each[24:]) for each in replies if each[12:16] == u32(META_CONTEXT)]


@pytest.mark.parametrize(
    ("queries", "compact", "extended"),
    [
        ([], [b"base:allocation", b"x-a:narrow"], [b"base:allocation", b"x-a:wide", b"x-a:narrow"]),
        (["x-a:"], [b"x-a:narrow"], [b"x-a:wide", b"x-a:narrow"]),
        (["x-a:hidden"], [b"x-a:hidden"], [b"x-a:hidden"]),
        (["x-a:wide", "x-a:hidden-wide", "x-a:h"], [], [b"x-a:wide", b"x-a:hidden-wide"]),
    ],
)
def test_hidden_contexts_are_listed_by_name_only_and_wide_ones_for_extended_headers_only(
    queries: list[str], compact: list[bytes], extended: list[bytes]
) -> None:
    """P41, P45."""
    make = lambda: Handshake(Directory([SECRETIVE], {}))  # noqa: E731
    for agreed, expected in [(option(STRUCTURED_REPLY), compact), (EXTENDED, extended)]:
        outcome = shake_three_ways(NO_ZEROES + agreed + meta(LIST_META_CONTEXT, "disk", *queries), make)
        assert contexts_in(outcome.replies) == [(0, name) for name in expected]
        assert outcome.kinds[-1] == ACK


def test_hidden_contexts_can_be_selected_and_wide_ones_with_extended_headers_only() -> None:
    """P44: ids stay those of the export."""
    make = lambda: Handshake(Directory([SECRETIVE], {}))  # noqa: E731
    select = meta(SET_META_CONTEXT, "disk", "x-a:hidden-wide", "x-a:hidden", "x-a:hidden", "x-a:", "x-a:wide")
    outcome = shake_three_ways(NO_ZEROES + EXTENDED + select, make)
    assert contexts_in(outcome.replies) == [(1, b"x-a:wide"), (3, b"x-a:hidden"), (4, b"x-a:hidden-wide")]
    outcome = shake_three_ways(NO_ZEROES + option(STRUCTURED_REPLY) + select, make)
    assert contexts_in(outcome.replies) == [(3, b"x-a:hidden")]


def test_a_selection_keeps_what_still_means_the_same_when_an_export_changes_before_go() -> None:
    """As a snapshot at that moment lets the first layer be the second."""

    def agreed(**changes: object) -> tuple[tuple[int, str], ...]:
        before = replace(SECRETIVE, passing_contexts=("x-a:first", "x-a:second"))
        directory = Directory([before], {})
        handshake = Handshake(directory)
        queries = ("base:allocation", "x-a:narrow", "x-a:first", "x-a:hidden")
        handshake.receive(NO_ZEROES + EXTENDED + meta(SET_META_CONTEXT, "disk", *queries))
        directory.exports = [replace(before, **changes)]
        handshake.receive(info(GO, "disk"))
        assert handshake.negotiated is not None
        return handshake.negotiated.contexts

    everything = ((0, "base:allocation"), (2, "x-a:narrow"), (3, "x-a:first"), (5, "x-a:hidden"))
    assert agreed() == agreed(size=1024) == everything
    assert agreed(passing_contexts=("x-a:first", "x-a:second", "x-a:third")) == everything[:2]
    assert agreed(hidden_contexts=("x-a:hidden",)) == everything[:2]
    assert agreed(contexts=("base:allocation",), passing_contexts=(), hidden_contexts=()) == everything[:1]


# What real clients send.


def test_qemu_of_today_gets_its_disk() -> None:
    """Q1: EXTENDED_HEADERS first, then STRUCTURED_REPLY, SET_META_CONTEXT, GO with BLOCK_SIZE."""
    data = (
        b"\0\0\0\3"
        b"IHAVEOPT\0\0\0\x0b\0\0\0\0"
        b"IHAVEOPT\0\0\0\x08\0\0\0\0"
        b"IHAVEOPT\0\0\0\x0a\0\0\0\x1f\0\0\0\4disk\0\0\0\1\0\0\0\x0fbase:allocation"
        b"IHAVEOPT\0\0\0\7\0\0\0\x0c\0\0\0\4disk\0\1\0\3"
    )
    outcome = shake_three_ways(data)
    assert outcome.kinds == [ACK, EXT_HEADER_REQD, META_CONTEXT, ACK, INFO_REPLY, INFO_REPLY, ACK]
    assert outcome.negotiated == Negotiated(DISK, True, ((0, "base:allocation"),), extended=True)


def test_every_cut_of_a_good_conversation_gives_the_same_answers() -> None:
    """P5, R-03."""
    data = NO_ZEROES + option(LIST) + STRUCTURED + meta(SET_META_CONTEXT, "disk", "base:allocation")
    data += info(INFO, "disk", 1, 2, 3) + info(GO, "disk", 3) + b"transmission"
    whole = shake([data])
    assert whole.leftover == b"transmission"
    for cut in range(len(data)):
        assert shake([data[:cut], data[cut:]]) == whole
    chance = random.Random(5)
    for _ in range(200):
        cuts = sorted(chance.choices(range(len(data)), k=5))
        assert shake(data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)) == whole

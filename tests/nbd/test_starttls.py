"""STARTTLS in the handshake: what the modes permit, and that nothing said in the clear outlives it (P60-P64, R-14)."""

import random
from dataclasses import replace

import pytest

from nbdq.errors import ProtocolError
from nbdq.nbd.constants import OptionReply
from nbdq.nbd.exports import ExportInfo
from nbdq.nbd.handshake import Handshake, TlsMode
from nbdq.nbd.messages import OptionRefused
from tests.nbd.wire import (
    ABORT,
    ACK,
    EXPORTS,
    FIXED,
    GO,
    INFO,
    INVALID,
    LIST,
    POLICY,
    SET_META_CONTEXT,
    SHUTDOWN,
    STARTTLS,
    STRUCTURED_REPLY,
    Directory,
    info,
    meta,
    option,
    reply,
)

TLS_REQD = 0x80000005
ACKNOWLEDGED = [reply(STARTTLS, ACK)]


def begun(mode: TlsMode, exports: Directory = EXPORTS) -> Handshake:
    handshake = Handshake(exports, tls=mode)
    assert handshake.receive(FIXED) == []
    return handshake


def kinds(replies: list[bytes]) -> list[int]:
    return [int.from_bytes(one[12:16], "big") for one in replies]


@pytest.mark.parametrize("mode", [TlsMode.ALLOW, TlsMode.REQUIRE])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_tls_begins_with_the_answer_however_the_option_comes_in(mode: TlsMode, size: int) -> None:
    handshake = begun(mode)
    said = option(STARTTLS)
    replies = []
    for start in range(0, len(said), size):
        assert not handshake.starting_tls
        replies += handshake.receive(said[start : start + size])
    assert replies == ACKNOWLEDGED
    assert handshake.starting_tls
    handshake.secured()
    assert not handshake.starting_tls
    assert kinds(handshake.receive(info(GO, "disk")))[-1] == ACK
    assert handshake.negotiated


@pytest.mark.parametrize("behind", [b"I", option(LIST), option(STARTTLS), bytes(5000)])
def test_anything_behind_the_option_ends_the_connection_without_an_answer(behind: bytes) -> None:
    handshake = begun(TlsMode.ALLOW)
    with pytest.raises(ProtocolError, match="behind STARTTLS"):
        handshake.receive(option(STARTTLS) + behind)
    assert handshake.finished
    assert not handshake.starting_tls
    assert handshake.receive(b"more") == []


def test_what_was_answered_before_is_still_answered_when_something_comes_behind() -> None:
    handshake = begun(TlsMode.ALLOW)
    replies = handshake.receive(option(STRUCTURED_REPLY) + option(STARTTLS) + b"x")
    assert replies == [reply(STRUCTURED_REPLY, ACK)]
    assert handshake.finished
    assert not handshake.starting_tls


def test_a_selection_of_contexts_does_not_survive() -> None:
    handshake = begun(TlsMode.ALLOW)
    handshake.receive(option(STRUCTURED_REPLY) + meta(SET_META_CONTEXT, "disk", "base:allocation"))
    handshake.receive(option(STARTTLS))
    handshake.secured()
    handshake.receive(option(STRUCTURED_REPLY) + info(GO, "disk"))
    assert handshake.negotiated
    assert handshake.negotiated.contexts == ()


class Secretive(Directory):
    """Which has more to show under TLS."""

    def __init__(self) -> None:
        super().__init__([], {})

    def reveal(self, count: int) -> None:
        self.exports = [replace(EXPORTS.exports[0], name=str(number)) for number in range(count)]


def test_all_exports_can_be_listed_under_tls_and_asked_about_by_who_has_seen_the_few_before() -> None:
    """P16, P64: what a client may ask depends on what there is to ask about."""
    exports = Secretive()
    handshake = begun(TlsMode.ALLOW, exports)
    assert kinds(handshake.receive(option(LIST))) == [ACK]
    handshake.receive(option(STARTTLS))
    handshake.secured()
    exports.reveal(100)
    assert len(handshake.receive(option(LIST))) == 101
    for _ in range(100):
        assert kinds(handshake.receive(info(INFO, "5")))[-1] == ACK


def test_off_and_twice_and_with_data_and_at_the_end_it_is_refused() -> None:
    assert kinds(begun(TlsMode.OFF).receive(option(STARTTLS))) == [POLICY]
    handshake = begun(TlsMode.REQUIRE)
    assert kinds(handshake.receive(option(STARTTLS, b"x"))) == [INVALID]
    assert handshake.receive(option(STARTTLS)) == ACKNOWLEDGED
    handshake.secured()
    assert kinds(handshake.receive(option(STARTTLS))) == [INVALID]
    ending = begun(TlsMode.REQUIRE)
    ending.shut_down()
    assert kinds(ending.receive(option(STARTTLS))) == [SHUTDOWN]
    assert kinds(ending.receive(option(LIST))) == [TLS_REQD]
    assert kinds(ending.receive(option(ABORT))) == [ACK]


class Demanding(Directory):
    """Whose exports demand TLS, and which has no place for more of it."""

    def find(self, name: str) -> ExportInfo | None:
        raise OptionRefused(OptionReply.ERR_TLS_REQD, "needs TLS")

    def check_room_for_tls(self) -> None:
        raise OptionRefused(OptionReply.ERR_POLICY, "enough")


def test_a_demand_for_tls_is_made_only_where_tls_can_be_had() -> None:
    exports = Demanding(EXPORTS.exports, {})
    assert kinds(begun(TlsMode.ALLOW, exports).receive(info(INFO, "disk"))) == [TLS_REQD]
    assert kinds(begun(TlsMode.OFF, exports).receive(info(INFO, "disk"))) == [POLICY]


def test_who_is_one_too_many_goes_on_in_the_clear() -> None:
    handshake = begun(TlsMode.ALLOW, Demanding(EXPORTS.exports, {}))
    assert kinds(handshake.receive(option(STARTTLS) + option(STRUCTURED_REPLY))) == [POLICY, ACK]
    assert not handshake.starting_tls


@pytest.mark.parametrize("seed", range(200))
def test_where_tls_is_required_no_sequence_of_options_tells_a_name_before_it(seed: int) -> None:
    chance = random.Random(seed)
    handshake = begun(TlsMode.REQUIRE)
    names = [export.name for export in EXPORTS.exports]
    for _ in range(20):
        name = chance.choice([*names, "nothing", ""])
        code = chance.randrange(12)
        said = chance.choice([info(code, name), meta(code, name, "base:allocation"), option(code), option(code, b"x")])
        if code == STARTTLS:
            continue
        try:
            replies = handshake.receive(said)
        except ProtocolError:
            return
        assert set(kinds(replies)) <= {TLS_REQD, ACK}, f"seed {seed}"
        assert b"disk" not in b"".join(replies)
        assert handshake.negotiated is None
        if handshake.finished:
            return

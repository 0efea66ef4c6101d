"""The parsers judged by the fuzzer's oracle, on its corpus and random cases; and whether the oracle sees mistakes."""

from collections.abc import Callable
from typing import Any

import pytest

from nbdq.nbd import messages, transmission
from nbdq.nbd.handshake import Handshake
from nbdq.nbd.transmission import Transmission
from tests.fuzz.oracle import MODES, judge
from tests.fuzz.seeds import kept, made


def test_whatever_fuzzing_found_is_answered_or_refused_the_same_however_it_is_cut() -> None:
    cases = kept()
    assert {case[0] % MODES for case in cases} == set(range(MODES))
    for case in cases:
        judge(case)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_clients_say_is_answered_or_refused_the_same_however_it_is_cut(seed: int) -> None:
    for case in made(seed, 12):
        try:
            judge(case)
        except BaseException:
            print(f"seed {seed}, case {case.hex()}")
            raise


def _answer_too_long(code: int, refused: Any) -> bytes:
    return messages.ack(code) + b"\0"


def _forget(self: Transmission) -> memoryview:
    self._kept = b""
    return self._open


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "nothing is refused": lambda patch: patch.setattr(Transmission, "refusal", lambda self, request: None),
    "everything is refused": lambda patch: patch.setattr(
        Transmission, "refusal", lambda self, request: transmission.Refusal(transmission.Errno.EINVAL, "no")
    ),
    "payloads have no limit": lambda patch: patch.setattr(transmission, "MAXIMUM_PAYLOAD", 1 << 60),
    "the beginning of a header is forgotten": lambda patch: patch.setattr(Transmission, "buffer", _forget),
    "ids of contexts are not checked": lambda patch: patch.setattr(
        Transmission,
        "_status_request",
        lambda self, request, payload: (3, *request[1:4], int.from_bytes(payload[:8], "big")),
    ),
    "an option reply lies about its length": lambda patch: patch.setattr(messages, "error", _answer_too_long),
    "every export is another one": lambda patch: patch.setattr(
        Handshake, "_agreed", lambda self, export: transmission.Negotiated(export, False, ((0, "x"),))
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=list(MISTAKES))
def test_the_oracle_sees_a_mistake_of_the_parsers(
    mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    noticed = 0
    for case in made(0, 12):
        try:
            judge(case)
        except Exception:
            noticed += 1
    assert noticed

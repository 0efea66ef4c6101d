"""QMP as bytes, without any socket."""

import json
import random

import pytest

from nbdq.admin.wire import REQUEST_MAX, BadRequest, Parser, Request, TooLarge


def _all(text: bytes) -> list[Request | BadRequest]:
    return list(Parser().feed(text))


def _errors(text: bytes) -> list[str]:
    return [request.text for request in _all(text) if isinstance(request, BadRequest)]


def test_a_request_is_found_however_it_is_laid_out_and_cut() -> None:
    request = {"execute": "a-b", "arguments": {"x": [1, {"y": '}"{\\'}], "z": "é"}, "id": 7}
    layouts = [json.dumps(request), json.dumps(request, indent=3), json.dumps(request, ensure_ascii=False)]
    text = "".join(f" \r\n{layout}" for layout in layouts).encode() * 2
    for size in (1, 2, 3, 7, 64, len(text)):
        parser = Parser()
        found = [r for start in range(0, len(text), size) for r in parser.feed(text[start : start + size])]
        assert found == [Request("a-b", request["arguments"], {"id": 7})] * 6  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"hello\n", "stray 'hello'"),
        (b"[]\n", "stray"),
        (b'"x"\n', "stray"),
        (b"\xff", "stray"),
        (b"{]", "JSON parse error"),
        (b"{}", "lacks member 'execute'"),
        (b'{"execute": 1}', "must be a string"),
        (b'{"execute": "x", "arguments": 1}', "must be an object"),
        (b'{"execute": "x", "argument": {}}', "'argument' is unexpected"),
        (b'{"execute": "x", "execute": "y"}', "two members"),
        (b'{"execute": "x", "id": NaN}', "NaN"),
        (b'{"execute": "x", "id": 1e999}', "too large"),
        (b'{"execute": "x", "id": ' + b"9" * 5000 + b"}", "JSON parse error"),
        (b'{"execute": "\xc3("}', "JSON parse error"),
        (b'{"execute": "x" "y"}', "JSON parse error"),
        (b'{"execute": "\\x"}', "JSON parse error"),
        (b'{"execute": "a\nb"}', "stray"),
    ],
)
def test_what_is_no_request_is_one_error(text: bytes, reason: str) -> None:
    errors = _errors(text)
    assert errors
    assert reason in errors[0]


def test_the_id_comes_back_even_with_an_error_inside_the_request() -> None:
    assert _all(b'{"id": [1], "execute": 1}') == [
        BadRequest("QMP input member 'execute' must be a string", {"id": [1]})
    ]


@pytest.mark.parametrize("begun", [b'{"execute": "quer', b'{"a": [[{', b'{"a": "\\', b'{"a": 1,\n'])
@pytest.mark.parametrize("control", [b"\x00", b"\x1b", b"\xff"])
def test_a_control_character_forgets_what_was_begun(begun: bytes, control: bytes) -> None:
    found = _all(begun + control + b'{"execute": "x"}')
    assert [type(request) for request in found] == [BadRequest, Request]


def test_a_request_may_be_as_long_as_the_bound_and_no_longer() -> None:
    frame = b'{"execute": "", "id": 0}'
    assert isinstance(_all(frame.replace(b'""', b'"' + b"x" * (REQUEST_MAX - len(frame)) + b'"'))[0], Request)
    with pytest.raises(TooLarge):
        _all(frame.replace(b'""', b'"' + b"x" * (REQUEST_MAX - len(frame) + 1) + b'"'))
    with pytest.raises(TooLarge):  # long before it is complete
        list(Parser().feed(b'{"' + b"x" * REQUEST_MAX))


def test_depth_is_refused_before_anybody_recurses() -> None:
    with pytest.raises(TooLarge, match="deep"):
        _all(b'{"execute": "x", "arguments": ' + b"[" * 500_000)
    assert isinstance(_all(b'{"execute": "x", "id": ' + b"[" * 31 + b"]" * 31 + b"}")[0], Request)


def test_a_request_of_very_many_parts_is_refused() -> None:
    with pytest.raises(TooLarge, match="parts"):
        _all(b'{"execute": "x", "id": [' + b"[]," * 100_000)


def test_any_bytes_give_requests_or_errors_and_never_anything_else() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    generator = random.Random(seed)
    request = b'{"execute": "x", "arguments": {"a": [1, "b\\"", null, true, -1.5e3]}, "id": "\\u00e9"}\n'
    for _ in range(2000):
        text = bytearray(request)
        for _ in range(generator.randrange(1, 6)):
            text[generator.randrange(len(text))] = generator.randrange(256)
        parser = Parser()
        for start in range(0, len(text), 11):
            list(parser.feed(bytes(text[start : start + 11])))
        last = list(parser.feed(b"\xff" + request))
        assert isinstance(last[-1], Request), bytes(text)

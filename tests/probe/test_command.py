"""``nbdq probe`` on the command line: what it prints, what it refuses, and how it ends."""

import json
from pathlib import Path
from urllib.parse import quote

import pytest

from nbdq.probe.check import CHECKS
from tests.probe.faulty import FaultyServer
from tests.support.cli import run_nbdq


def _uri(server: FaultyServer, name: str = "disk") -> str:
    return f"nbd+unix:///{name}?socket={quote(server.path)}"


@pytest.mark.parametrize(
    ("fault", "level", "status"),
    [("unknown-option", "MUST", 1), ("unknown-commands", "SHOULD", 0), ("list-twice", "practice", 0)],
)
def test_a_deviation_is_told_with_its_rule_and_only_that_from_a_must_is_a_failure(
    fault: str, level: str, status: int
) -> None:
    with FaultyServer(fault) as server:
        done = run_nbdq("probe", "--only", fault, _uri(server))
    [check] = [check for check in CHECKS if check.name == fault]
    assert done.exit_code == status
    assert f"deviates ({level}): {' '.join(check.items)} {fault}\n" in done.stdout
    assert check.rule in done.stdout
    assert "1 checks: 0 ok, 1 deviations" in done.stdout


def test_what_is_well_is_told_on_request_only() -> None:
    with FaultyServer() as server:
        quiet = run_nbdq("probe", "--only", "P24", _uri(server))
        full = run_nbdq("probe", "--only", "P24", "--all", _uri(server))
    assert quiet.stdout.count("\n") == 1
    assert "ok: P24 P150 unknown-option\n" in full.stdout


def test_nothing_that_writes_is_tested_without_permission() -> None:
    with FaultyServer() as server:
        before = bytes(server.disk)
        done = run_nbdq("probe", "--json", _uri(server))
        assert bytes(server.disk) == before
    results = {result["check"]: result for result in json.loads(done.stdout)}
    for check in CHECKS:
        if check.writes:
            assert results[check.name]["verdict"] == "not tested"
            assert results[check.name]["observed"] == "it needs --write"


def test_a_server_that_goes_for_good_ends_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdq.probe.run._RETURN", 0.1)
    with FaultyServer("clients-that-leave") as server:
        done = run_nbdq("probe", "--json", "--only", "hello", "--only", "P94", "--only", "P81", _uri(server))
    results = json.loads(done.stdout)
    names = [result["check"] for result in results]
    last = names.index("clients-that-leave")
    assert results[last]["verdict"] == "deviates"
    assert results[last]["level"] == "MUST"
    assert "no longer accepts connections" in results[last]["observed"]
    assert {result["verdict"] for result in results[last + 1 :]} == {"not tested"}
    assert done.exit_code == 1


def test_a_server_that_comes_back_is_probed_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = iter([False, True])

    def dies_once(target: object) -> str:
        return "the server stopped accepting connections, and came back" if next(replies, True) is False else ""

    monkeypatch.setattr("nbdq.probe.run._death", dies_once)
    with FaultyServer("unknown-option") as server:
        results = json.loads(run_nbdq("probe", "--json", "--only", "P24", "--only", "P81", _uri(server)).stdout)
    found = {result["check"]: result for result in results}
    assert "came back" in found["unknown-option"]["observed"]
    assert found["cookies"]["verdict"] == "ok"


def test_every_check_is_listed_with_its_rule() -> None:
    text = run_nbdq("probe", "--list").stdout
    listed = json.loads(run_nbdq("probe", "--list", "--json").stdout)
    assert [entry["check"] for entry in listed] == [check.name for check in CHECKS]
    for check in CHECKS:
        assert check.rule in text
        assert check.rule.endswith(".")
        assert all(item.startswith("P") and item[1:].isdigit() for item in check.items)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--only", "P999", "nbd://h"], "no check of P999"),
        ([], "Missing argument 'URI'"),
        (["--timeout", "0", "nbd://h"], "--timeout"),
    ],
)
def test_a_wrong_command_line_is_refused(words: list[str], why: str) -> None:
    done = run_nbdq("probe", *words)
    assert done.exit_code == 2
    assert why in done.stderr


def test_what_cannot_be_probed_is_one_line_of_error(tmp_path: Path) -> None:
    with FaultyServer() as server:
        for uri in ("http://h/", f"nbd+unix:///?socket={tmp_path}/nowhere", _uri(server, "nobody")):
            done = run_nbdq("probe", uri)
            assert done.exit_code == 1
            assert done.stderr.startswith("nbdq: ")
            assert done.stderr.count("\n") == 1
            assert not done.stdout

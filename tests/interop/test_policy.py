"""Who may use an export and how fast, changed by administrators, seen by real clients."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.administration import administered
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "nbdinfo", "nbdcopy")

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    run("qemu-io", "-c", "write -P 1 0 8M", path)
    return path


def error_of(*words: str | Path) -> str:
    result = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    assert result.returncode, result.stdout
    return result.stderr


def test_nbdinfo_and_qemu_see_what_they_are_let_into_and_nothing_else(disk: Path) -> None:
    with administered("-x", "open", disk) as server:
        add = {"type": "nbd", "node_name": "open"}
        server("block-export-add", id="hidden", name="hidden", **add, x_nbdq_access={"users": [12345]})
        server("block-export-add", id="full", name="full", **add, x_nbdq_max_connections=1)
        server("block-export-add", id="secure", name="secure", **add, x_nbdq_access={"tls": True})
        listed = json.loads(run("nbdinfo", "--list", "--json", "--no-content", server.uri()))
        assert [export["export-name"] for export in listed["exports"]] == ["open", "full"]
        assert "No such file" in error_of("nbdinfo", server.uri("hidden"))
        assert "export 'secure' needs TLS" in error_of("qemu-img", "info", server.uri("secure"))
        server("x-nbdq-export-set", id="hidden", access={"users": ["root"], "groups": [0]})
        assert "64 MiB" in run("qemu-img", "info", server.uri("hidden"))
        server("x-nbdq-export-set", id="hidden", access={})
        (found,) = [export for export in server("query-block-exports") if export["id"] == "hidden"]
        assert "x-nbdq-access" not in found


def test_what_makes_no_sense_changes_nothing(disk: Path) -> None:
    with administered("-x", "disk", disk) as server:
        change = {"description": "changed", "max_connections": 3}
        for access, text in (
            ({"networks": ["10.0.0.1/8"]}, "is not a network"),
            ({"users": []}, "the list is empty"),
            ({"users": ["no-such-user"]}, "there is no user"),
            ({"users": ["²"]}, "there is no user"),
            ({"user": [0]}, "unexpected"),
        ):
            assert text in server.refusal("x-nbdq-export-set", id="disk", access=access, **change)
        assert "negative" in server.refusal("x-nbdq-export-set", id="disk", rates={"requests": -1}, **change)
        (export,) = server("query-block-exports")
        assert (export["x-nbdq-description"], export["x-nbdq-max-connections"]) == ("", 0)


def test_nbdcopy_is_as_fast_as_it_may_and_faster_when_it_may(disk: Path, tmp_path: Path) -> None:
    with administered("-x", "disk", disk) as server:
        server("x-nbdq-export-set", id="disk", rates={"bytes": 16 * MIB, "burst": 0.1})
        assert server("query-block-exports")[0]["x-nbdq-rates"]["bytes"] == 16 * MIB
        begun = time.monotonic()
        run("nbdcopy", "--connections=4", server.uri("disk"), tmp_path / "copy")
        assert time.monotonic() - begun >= (8 - 1.6) / 16 * 0.9
        assert (tmp_path / "copy").read_bytes()[: 8 * MIB] == b"\1" * 8 * MIB
        server("x-nbdq-export-set", id="disk", rates={"bytes": 1})
        with subprocess.Popen(["nbdcopy", server.uri("disk"), str(tmp_path / "slow")]) as slow:
            time.sleep(0.2)
            assert slow.poll() is None
            server("x-nbdq-export-set", id="disk", rates={})
            assert slow.wait(30) == 0

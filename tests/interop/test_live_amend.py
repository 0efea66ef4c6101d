"""Amending disks in use over the admin socket: the clients notice nothing, and QEMU finds what was asked for."""

import time
from pathlib import Path

import pytest

from tests.support.administration import Administered, administered, chain, check, qemu_io, verified_load
from tests.support.tools import requires, run

pytestmark = requires("qemu-img", "qemu-io", "fio")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An old disk over an old image."""
    for name, below in (("base", []), ("disk", ["-b", "base.qcow2", "-F", "qcow2"])):
        path = tmp_path / f"{name}.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", *below, path, "64M")
        run("qemu-io", "-c", "write -P 1 0 4M", path)
    return path


def versions(top: Path) -> list[str]:
    return [layer["format-specific"]["data"]["compat"] for layer in chain(top)]


def amend(server: Administered, **arguments: object) -> None:
    server("x-nbdq-amend", device="disk", **arguments)
    server.wait_for_jobs()


def test_clients_notice_nothing_while_the_whole_chain_is_upgraded_and_more(disk: Path) -> None:
    with administered(disk) as server:
        with verified_load(server, disk):
            for options in ({"compat": "1.1"}, {"refcount_bits": 64}, {"refcount_bits": 16}, {"compat": "0.10"}):
                time.sleep(0.1)
                amend(server, chain=True, **options)
            amend(server, chain=True, compat="1.1")
        qemu_io(server, "read -P 1 0 4M")
    assert versions(disk) == ["1.1", "1.1"]
    check(disk, disk.with_name("base.qcow2"))


def test_a_connected_client_can_use_what_a_larger_size_added(disk: Path) -> None:
    with administered(disk) as server:
        amend(server, size=128 << 20, compat="1.1")
        qemu_io(server, "write -P 5 127M 1M", "flush", "read -P 5 127M 1M", "read -P 0 64M 1M")
        assert "--shrink" in server.refusal("x-nbdq-amend", device="disk", size=1 << 20)
    assert (versions(disk), chain(disk)[0]["virtual-size"]) == (["1.1", "0.10"], 128 << 20)
    check(disk)


def test_every_image_that_was_amended_is_told_by_an_event(disk: Path) -> None:
    with administered(disk) as server:
        amend(server, compat="1.1", chain=True)
        events = [event["data"] for event in server.client.taken_events() if event["event"] == "X_NBDQ_AMENDED"]
    assert [(Path(event["file"]).name, event["done"], event["total"]) for event in events] == [
        ("base.qcow2", 1, 2),
        ("disk.qcow2", 2, 2),
    ]


def test_a_template_of_the_volume_policy_is_refused(disk: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(f'[[directory]]\npath = "{tmp_path}"\ntemplates = ["base.qcow2"]\n')
    with administered("--volume-policy", policy, disk) as server:
        refused = server.refusal("x-nbdq-amend", device="disk", compat="1.1", chain=True)
        assert "base.qcow2 is a template" in refused
        amend(server, compat="1.1")
    assert versions(disk) == ["1.1", "0.10"]


def test_impossible_requests_are_refused_and_change_nothing(disk: Path) -> None:
    with administered(disk) as server:
        for arguments, words in (
            ({}, "Must specify options"),
            ({"compat": "0.5"}, "does not accept value '0.5'"),
            ({"refcount_bits": 8}, "(use compat=1.1 or greater)"),
            ({"data_file": "x"}, "use an external data file"),
            ({"chain": True, "size": 1 << 30}, "leave out 'chain'"),
        ):
            assert words in server.refusal("x-nbdq-amend", device="disk", **arguments)
        assert not server("query-jobs")
    assert versions(disk) == ["0.10", "0.10"]


def test_the_log_says_how_it_ended(disk: Path) -> None:
    with administered("-v", disk) as server:
        amend(server, compat="1.1")
        server.refusal("x-nbdq-amend", device="disk", refcount_bits=3)
        said = server.server.stderr
    assert "disk has been amended successfully." in said
    assert "Failed to amend disk: " in said

"""What a server knows after a restart, and what it does with what a crash left behind."""

import contextlib
import json
import os
import stat
import sys
from pathlib import Path

import pytest

from nbdq.admin.recovery import remove_pending_overlays
from nbdq.admin.state import JobRecord, State, StateError
from tests.support.tools import requires, run


def _state(path: Path, *names: str) -> State:
    state = State(str(path))
    for name in names:
        state.name_disk(name, str(path.parent / f"{name}.qcow2"))
    return state


def test_what_was_recorded_is_there_after_a_restart(tmp_path: Path) -> None:
    path, overlay = tmp_path / "state", str(tmp_path / "sub" / "overlay.qcow2")
    state = _state(path, "a", "b")
    job = JobRecord("j", "block-commit", {"device": "a", "x": [1, None]}, {"top": "/t"})
    with state.transaction() as changes:
        changes.add_pending("a", overlay)
        changes.put_job("a", job)
    with state.transaction() as changes:
        changes.set_top("a", overlay, "qcow2")
        changes.set_top("b", str(tmp_path / "other.raw"), "raw")
        changes.advance_job("a", "j", 1 << 40)
    again = _state(path, "a", "b")
    assert again.disk("a") == state.disk("a")
    record = again.disk("a")
    assert record.top is not None
    assert (record.top.path, record.top.format, record.pending) == (overlay, "qcow2", [])
    assert record.directories == [os.path.dirname(overlay)]
    assert record.jobs == [JobRecord("j", "block-commit", {"device": "a", "x": [1, None]}, {"top": "/t"}, 1 << 40)]


def test_a_disk_is_known_by_its_image_whatever_it_is_called_and_however_it_is_reached(tmp_path: Path) -> None:
    state = _state(tmp_path / "state", "a")
    with state.transaction() as changes:
        changes.set_top("a", str(tmp_path / "o"), "qcow2")
    (tmp_path / "a.qcow2").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a.qcow2")
    record = State(str(tmp_path / "state")).name_disk("another name", str(tmp_path / "link"))
    assert record.top is not None


def test_names_that_are_no_text_are_kept_as_they_are_and_a_link_to_the_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "state")
    overlay = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")
    state = _state(tmp_path / "link", "a")
    with state.transaction() as changes:
        changes.set_top("a", overlay, "qcow2")
    again = _state(tmp_path / "state", "a").disk("a").top
    assert again is not None
    assert again.path == overlay
    assert (tmp_path / "link").is_symlink()


def test_a_disk_whose_first_image_is_the_top_again_leaves_no_record(tmp_path: Path) -> None:
    state = _state(tmp_path / "state", "a")
    for top in ("o.qcow2", "a.qcow2"):
        with state.transaction() as changes:
            changes.set_top("a", str(tmp_path / top), "qcow2")
    assert json.loads((tmp_path / "state").read_text())["disks"] == {}


def test_a_transaction_that_fails_changes_nothing(tmp_path: Path) -> None:
    state = _state(tmp_path / "state", "a", "b")
    with contextlib.suppress(KeyError), state.transaction() as changes:
        changes.set_top("a", str(tmp_path / "o"), "qcow2")
        changes.set_top("nobody", str(tmp_path / "o"), "qcow2")
    assert state.disk("a").top is None
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("call", ["os.rename", "os.fsync", "os.fdatasync", "os.pwritev"])
def test_a_file_that_cannot_be_written_leaves_the_old_one_and_the_old_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "state"
    state = _state(path, "a")
    with state.transaction() as changes:
        changes.set_top("a", str(tmp_path / "o"), "qcow2")
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(5, "no")

    with monkeypatch.context() as patch:
        patch.setattr(call, fail)
        with pytest.raises(OSError, match="no"), state.transaction() as changes:
            changes.set_top("a", str(tmp_path / "p"), "qcow2")
    top = state.disk("a").top
    assert top is not None
    assert top.path == str(tmp_path / "o")
    assert path.read_bytes() == before
    with state.transaction() as changes:
        changes.set_top("a", str(tmp_path / "q"), "qcow2")


@requires("strace")
def test_the_file_is_replaced_only_when_the_new_one_is_durable(tmp_path: Path) -> None:
    script = (
        "from nbdq.admin.state import State\n"
        f"state = State({str(tmp_path / 'state')!r}); state.name_disk('a', '/a')\n"
        "with state.transaction() as changes: changes.set_top('a', '/o', 'qcow2')\n"
    )
    trace = tmp_path / "trace"
    calls = "trace=pwritev,pwritev2,pwrite64,fdatasync,fsync,rename,renameat,renameat2"
    run("strace", "-f", "-e", calls, "-o", trace, sys.executable, "-c", script)
    names = [line.split(maxsplit=1)[1].partition("(")[0] for line in trace.read_text().splitlines() if "(" in line]
    order = ["write" if name.startswith("pwrite") else name for name in names]
    assert order == ["write", "fdatasync", "rename", "fsync"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": 2, "disks": {}}',
        '{"version": 1}',
        '{"version": 1, "disks": {"/a": {"top": "x"}}}',
        '{"version": 1, "disks": {"/a": {"top": {"path": "/x"}}}}',
        '{"version": 1, "disks": {"/a": {"pending": [1]}}}',
        '{"version": 1, "disks": {"/a": {"jobs": [{"id": "j"}]}}}',
        '{"version": 1, "disks": {}, "more": 1}',
        "[" * 100_000,
        "\x00\xff",
    ],
)
def test_a_damaged_file_is_an_error_in_one_line_and_never_ignored(tmp_path: Path, text: str) -> None:
    (tmp_path / "state").write_text(text, encoding="latin-1")
    with pytest.raises(StateError) as error:
        State(str(tmp_path / "state"))
    assert str(tmp_path / "state") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_half_written_successor_of_the_file_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "state.new").write_text("{")
    state = _state(tmp_path / "state", "a")
    with state.transaction() as changes:
        changes.set_top("a", str(tmp_path / "o"), "qcow2")
    assert not (tmp_path / "state.new").exists()


def test_a_device_goes_by_the_name_that_it_was_given_and_not_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, number in (("disk", "dm-3"), ("overlay", "dm-4")):
        (tmp_path / number).touch()
        (tmp_path / name).symlink_to(number)
    monkeypatch.setattr(stat, "S_ISBLK", lambda mode: True)
    state = State(str(tmp_path / "state"))
    state.name_disk("a", str(tmp_path / "disk"))
    with state.transaction() as changes:
        changes.set_top("a", str(tmp_path / "overlay"), "qcow2")
    assert b"dm-" not in (tmp_path / "state").read_bytes()


def _pending(tmp_path: Path, *overlays: Path) -> State:
    state = _state(tmp_path / "state", "a")
    with state.transaction() as changes:
        for overlay in overlays:
            changes.add_pending("a", str(overlay))
    return state


def test_an_overlay_that_never_became_the_top_is_removed_at_the_next_start(tmp_path: Path) -> None:
    base, overlay, torn, gone = (tmp_path / name for name in ("a.qcow2", "overlay", "torn", "gone"))
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay)
    torn.write_bytes(bytes(65536))
    state = _pending(tmp_path, overlay, torn, gone)
    remove_pending_overlays(state, "a", {str(base)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.qcow2", "state"]
    assert state.disk("a").pending == []


def test_an_overlay_that_somebody_uses_or_has_written_to_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, used, written, foreign = (tmp_path / name for name in ("a.qcow2", "used", "written", "foreign"))
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
    for path in (used, written):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", path)
    run("qemu-io", "-c", "write 0 64k", written)
    foreign.write_text("my diary")
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1024) + b"a file system" * 10)
    os.truncate(disk, 64 << 20)
    state = _pending(tmp_path, used, written, foreign, disk)
    remove_pending_overlays(state, "a", {str(base), str(used)})
    assert {path.name for path in tmp_path.iterdir()} == {"a.qcow2", "state", "used", "written", "foreign", "disk"}
    assert caplog.text.count("stays") == 4
    assert state.disk("a").pending == []

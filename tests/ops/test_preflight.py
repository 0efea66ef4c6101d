"""What is found out before an operation begins."""

import json
import os
from pathlib import Path

import pytest

from nbdq.errors import OperationError
from nbdq.ops import preflight
from nbdq.ops.active_commit import ActiveCommit
from nbdq.ops.commit import Commit
from nbdq.ops.control import Control
from nbdq.ops.preflight import find_overlays, free_space, plan_commit
from tests.ops.harness import served
from tests.support.images import Layer, Variant, build
from tests.support.tools import requires, run


def _overlay(path: Path, backing: str, *options: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", "qcow2", *options, path, "1M")
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "base", "1M")
    return tmp_path / "base"


@requires("qemu-img")
class TestOverlays:
    def test_are_found_beside_the_base_and_in_the_directories_that_are_named(self, base: Path, tmp_path: Path) -> None:
        beside = _overlay(tmp_path / "beside", "base")
        elsewhere = _overlay(tmp_path / "there" / "elsewhere", "../base")
        _overlay(tmp_path / "nowhere" / "unseen", str(base))
        _overlay(tmp_path / "other", "beside")
        (tmp_path / "text").write_text("QFI is how an image begins")
        assert find_overlays(str(base), [str(elsewhere.parent)]) == [str(beside), str(elsewhere)]

    def test_that_are_known_or_the_base_itself_do_not_count(self, base: Path, tmp_path: Path) -> None:
        known = _overlay(tmp_path / "known", "base")
        (tmp_path / "link").symlink_to(known)
        _overlay(tmp_path / "loop", "loop")
        assert find_overlays(str(base), [], known=[str(known)]) == []

    @pytest.mark.parametrize(
        "name",
        [
            "{base}",
            "file:{base}",
            "json:" + json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": "BASE"}}),
            "json:" + json.dumps({"driver": "qcow2", "file.filename": "BASE"}),
        ],
    )
    def test_are_found_by_any_name_that_qemu_would_follow(self, base: Path, tmp_path: Path, name: str) -> None:
        overlay = _overlay(tmp_path / "overlay", name.replace("{base}", str(base)).replace("BASE", str(base)))
        assert find_overlays(str(base), []) == [str(overlay)]

    def test_are_found_through_links(self, base: Path, tmp_path: Path) -> None:
        (tmp_path / "alias").symlink_to(base)
        overlay = _overlay(tmp_path / "overlay", "alias")
        assert find_overlays(str(base), []) == [str(overlay)]

    def test_that_nobody_could_serve_are_found_as_well(self, base: Path, tmp_path: Path) -> None:
        overlay = _overlay(tmp_path / "overlay", "base")
        with overlay.open("r+b") as file:
            file.seek(72)
            file.write((1 << 63).to_bytes(8, "big"))
        assert find_overlays(str(base), []) == [str(overlay)]

    def test_are_not_looked_for_among_more_files_than_can_be_looked_at(
        self, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(preflight, "_FILES_MAX", 3)
        for number in range(3):
            (base.parent / str(number)).touch()
        with pytest.raises(OperationError, match="name fewer directories"):
            find_overlays(str(base), [])


@requires("qemu-img", "qemu-io")
class TestPlans:
    @pytest.mark.parametrize("format", ["qcow2", "raw"])
    @pytest.mark.parametrize("top", [0, 1])
    def test_say_what_a_commit_does(self, tmp_path: Path, top: int, format: str) -> None:
        layers = (
            Layer("8M", ("write 1M 1M",), format=format),
            Layer("16M", ("write 0 4k", "write 1M 512k", "zero 2M 1M", "write 5M 1M", "write 12M 1M")),
            Layer("16M", ("write 12M 1M",)),
            Layer("16M", ("write 3M 64k",)),
        )
        image = build(Variant("test", layers), tmp_path)
        with served(image) as disk:
            before = image.paths[0].stat().st_blocks * 512
            plan = plan_commit(disk.chain, top=top, base=3)
            control = Control()
            if top:
                disk.carry_out(Commit(disk.chain, top=1, base=3), control=control)
            else:
                disk.carry_out(ActiveCommit(disk.chain, base=3), control=control)
            assert plan.bytes_to_copy == control.done
        assert plan.base_grows_by == 8 << 20
        assert plan.dropped == [str(path) for path in image.paths[::-1][top:3]]
        assert plan.invalid == plan.dropped[1:]
        assert plan.overlays == []
        grown = image.paths[0].stat().st_blocks * 512 - before
        assert abs(plan.space_needed - grown) <= 256 << 10  # tables, and what the file system needs itself
        assert plan.space_free > 0

    def test_change_nothing(self, tmp_path: Path) -> None:
        image = build(Variant("test", (Layer("4M"), Layer("4M", ("write 0 4M",)), Layer("4M"))), tmp_path)
        with served(image) as disk:
            before = [path.read_bytes() for path in image.paths]
            plan_commit(disk.chain, top=1, base=2)
            assert [path.read_bytes() for path in image.paths] == before

    def test_name_the_overlays_that_would_be_damaged(self, tmp_path: Path) -> None:
        image = build(Variant("test", (Layer("4M"), Layer("4M"), Layer("4M"), Layer("4M"))), tmp_path)
        of_base = _overlay(tmp_path / "sibling", "0.qcow2")
        of_middle = _overlay(tmp_path / "another", "1.qcow2")
        _overlay(tmp_path / "unharmed", "2.qcow2")
        with served(image) as disk:
            assert plan_commit(disk.chain, top=1, base=3).overlays == [str(of_middle), str(of_base)]


def test_free_space_is_that_of_the_file_system(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    for path in (tmp_path, tmp_path / "new"):
        assert abs(free_space(str(path)) - status.f_bavail * status.f_frsize) < 1 << 30

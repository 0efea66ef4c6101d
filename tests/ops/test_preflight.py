"""What is found out before an operation begins."""

import json
from pathlib import Path

import pytest

from nbdq.errors import OperationError
from nbdq.ops import preflight
from nbdq.ops.preflight import find_overlays
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

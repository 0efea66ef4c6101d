"""Whether twins that rest are the same chain, as QEMU sees them: every layer, not only the disk."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tests.random.live_actions import Twins, facts
from tests.random.twins import both_extents
from tests.support.tools import execute, run

#: Of ``qemu-img info``, what must be the same for each layer.
_ALIKE = ("format", "virtual-size", "cluster-size", "backing-filename-format")
_ALIKE_IN_QCOW2 = ("compat", "refcount-bits", "extended-l2", "compression-type", "corrupt", "bitmaps")


def judge(twins: Twins) -> None:
    """Let QEMU say that twins whose servers have ended are one chain, without damage or leaks.

    Raises:
        AssertionError: it says otherwise.
    """
    assert [path.name for path in twins.ours.paths] == [path.name for path in twins.theirs.paths]
    raw = told(twins.ours.paths[0])["format"] == "raw"
    for number, (mine, other) in enumerate(zip(twins.ours.paths, twins.theirs.paths, strict=True)):
        about = told(mine)
        assert about == told(other), f"{mine.name}: nbdq: {about}\nQEMU: {told(other)}"
        if about["format"] == "qcow2":
            run("qemu-img", "check", "-f", "qcow2", mine, cwd=mine.parent)
            checked = execute("qemu-img", "check", "-f", "qcow2", other, cwd=other.parent)
            if checked.returncode == 3:  # QEMU leaks clusters when it cannot make an internal snapshot
                run("qemu-img", "check", "-q", "-f", "qcow2", "-r", "leaks", other, cwd=other.parent)
            else:
                assert checked.returncode == 0, f"QEMU's {other.name}: {checked.stdout}{checked.stderr}"
        formats = ("-f", about["format"], "-F", about["format"])
        compared = execute("qemu-img", "compare", *formats, mine, other, cwd=mine.parent)
        assert compared.returncode == 0, f"{mine.name}: {compared.stdout}{compared.stderr}"
        for snapshot in about["snapshots"]:
            digests = [_snapshot_digest(path, snapshot) for path in (mine, other)]
            assert digests[0] == digests[1], f"{mine.name}: internal snapshot {snapshot} differs"
        if about["format"] == "qcow2":
            _judge_map(twins, mine, other, raw_depth=number if raw else -1)


def told(path: Path) -> dict[str, Any]:
    """What QEMU says of one image, as far as it does not depend on the directory or the time."""
    info = facts(path)
    found = {key: info.get(key) for key in _ALIKE}
    specific = info.get("format-specific", {}).get("data", {}) if info["format"] == "qcow2" else {}
    found |= {key: specific.get(key) for key in _ALIKE_IN_QCOW2}
    found["bitmaps"] = sorted(map(json.dumps, specific.get("bitmaps", [])))
    backing = info.get("full-backing-filename")  # the name itself may be a whole path or not
    found["backing"] = backing and os.path.relpath(backing, path.parent)
    found["snapshots"] = [snapshot["name"] for snapshot in info.get("snapshots", [])]
    return found


def _judge_map(twins: Twins, mine: Path, other: Path, *, raw_depth: int) -> None:
    """nbdq holds nothing further up than QEMU, and no data where QEMU has none; a raw file's holes are the file
    system's business.

    The other way around is fine: QEMU 7.2 commits zeros as data, and streams whole clusters where subclusters would do.
    """
    ours, theirs = (
        json.loads(run("qemu-img", "map", "-f", "qcow2", "--output=json", path, cwd=path.parent))
        for path in (mine, other)
    )
    differences = []
    for start, end, ours_there, theirs_there in both_extents(ours, theirs):
        sectors = range(start // 512, -(-end // 512))
        efforts = [_effort(extent, raw_depth) for extent in (ours_there, theirs_there)]
        if efforts[0] > efforts[1] and not twins.excused.issuperset(sectors):
            differences.append(f"  {start}-{end}: nbdq {ours_there}, QEMU {theirs_there}")
        elif efforts[0] != efforts[1]:
            twins.excused.update(sectors)
    assert not differences, f"map of {mine.name} differs:\n" + "\n".join(differences)


def _effort(extent: dict[str, Any], raw_depth: int) -> int:
    """The contents being the same: 0 for zeros, and in a raw file, more for data the further up it is."""
    return 1000 - extent["depth"] if extent["data"] and extent["depth"] != raw_depth else 0


def _snapshot_digest(path: Path, name: str) -> str:
    copy = path.with_name("copy.raw")
    run("qemu-img", "convert", "-f", "qcow2", "-l", name, "-O", "raw", path, copy, cwd=path.parent)
    digest = hashlib.sha1(copy.read_bytes()).hexdigest()
    copy.unlink()
    return digest

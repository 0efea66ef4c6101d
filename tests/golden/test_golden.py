"""Images kept in the repository, read without any tool of QEMU: what QEMU once said about them must still be so."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from nbdq.chain.clusters import ClusterCache
from nbdq.chain.open import open_disk
from nbdq.chain.policy import Policy
from tests.support.cli import nbdq, run_nbdq
from tests.support.oracles import without_compressed

HERE = Path(__file__).parent
MANIFEST: dict[str, Any] = json.loads((HERE / "MANIFEST.json").read_text())
READABLE = sorted(name for name, entry in MANIFEST.items() if "refused" not in entry)


def unpack(name: str, directory: Path) -> Path:
    """Unpack all layers of an image; return the top."""
    for layer in MANIFEST[name]["layers"]:
        (directory / layer).write_bytes(gzip.decompress((HERE / name / f"{layer}.gz").read_bytes()))
    return directory / str(MANIFEST[name]["layers"][-1])


def sums(top: Path, reads: list[tuple[int, int, str]], snapshot: str | None = None) -> list[str]:
    """SHA-256 of what the guest finds in each of the recorded ranges."""
    clusters = ClusterCache(budget=1 << 20)
    disk = open_disk(str(top), format="qcow2", policy=Policy(), clusters=clusters, snapshot=snapshot)
    try:
        found = []
        for offset, length, _ in reads:
            buffer = bytearray(b"\xee" * length)
            disk.read_into(offset, memoryview(buffer))
            found.append(hashlib.sha256(buffer).hexdigest())
        return found
    finally:
        disk.close()
        clusters.close()


@pytest.mark.parametrize("name", READABLE)
def test_the_guest_reads_what_was_recorded(name: str, tmp_path: Path) -> None:
    reads = MANIFEST[name]["reads"]
    assert sums(unpack(name, tmp_path), reads) == [digest for _, _, digest in reads]


@pytest.mark.parametrize("name", READABLE)
def test_the_map_is_what_was_recorded(name: str, tmp_path: Path) -> None:
    assert without_compressed(nbdq("map", "--output=json", unpack(name, tmp_path))) == MANIFEST[name]["map"]


@pytest.mark.parametrize(
    ("name", "snapshot"), [(name, snapshot) for name in READABLE for snapshot in MANIFEST[name]["snapshots"]]
)
def test_a_snapshot_holds_what_was_recorded(name: str, snapshot: str, tmp_path: Path) -> None:
    reads = MANIFEST[name]["snapshots"][snapshot]
    assert sums(unpack(name, tmp_path), reads, snapshot) == [digest for _, _, digest in reads]


@pytest.mark.parametrize("name", sorted(MANIFEST.keys() - READABLE))
def test_an_image_that_cannot_be_understood_is_refused_by_name(name: str, tmp_path: Path) -> None:
    done = run_nbdq("map", unpack(name, tmp_path))
    assert done.exit_code == 1
    assert MANIFEST[name]["refused"] in done.stderr
    assert done.stderr.count("\n") == 1

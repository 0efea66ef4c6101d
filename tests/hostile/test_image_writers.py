"""Those who may write image files that a server offers: what their names and contents must not bring about (R-36)."""

import os
import struct
from contextlib import closing
from pathlib import Path
from typing import cast

from nbdq.admin.service import Administration
from nbdq.chain.clusters import ClusterCache
from nbdq.chain.policy import Policy
from nbdq.cli.serve.disks import Disks
from nbdq.cli.serve.reload import Catalogue
from nbdq.cli.serve.settings import DirectorySettings, Settings
from nbdq.server.exports.derived import SNAPSHOTS_MAX
from nbdq.server.exports.export import Exports
from tests.support.serving import serve
from tests.support.tools import requires, run

_ENTRY = struct.Struct(">QIHHIIQII")
_CLUSTER = 64 << 10


def image_with_snapshots(path: Path, *names: bytes) -> Path:
    """An image with internal snapshots of these names, whose ids are 1, 2, …; QEMU would make only some of them."""
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    with path.open("r+b") as file:
        file.seek(36)
        l1_size, l1_offset = struct.unpack(">IQ", file.read(12))
        table = b""
        for number, name in enumerate(names, 1):
            id = str(number).encode()
            entry = _ENTRY.pack(l1_offset, l1_size, len(id), len(name), 0, 0, 0, 0, 24)
            entry += struct.pack(">QQQ", 0, 1 << 20, (1 << 64) - 1) + id + name
            table += entry.ljust(-(-len(entry) // 8) * 8, b"\0")
        offset = -(-file.seek(0, os.SEEK_END) // _CLUSTER) * _CLUSTER
        file.seek(offset)
        file.write(table.ljust(-(-len(table) // _CLUSTER) * _CLUSTER, b"\0"))
        file.seek(60)
        file.write(struct.pack(">IQ", len(names), offset))
    return path


@requires("qemu-img", "nbdinfo")
def test_names_of_snapshots_reach_no_terminal_of_a_client_if_they_hold_control_characters(tmp_path: Path) -> None:
    names = (b"good", b"line\nfeed", b"\x1b[31mred", b"\xff\xfe", "\N{RIGHT-TO-LEFT OVERRIDE}x".encode())
    path = image_with_snapshots(tmp_path / "disk.qcow2", *names)
    with serve("-r", "--snapshots", "-x", "disk", path) as server:
        listed = run("nbdinfo", "--list", server.uri())
    names_listed = {line for line in listed.splitlines() if line.startswith("export=")}
    assert names_listed == {f'export="disk{suffix}":' for suffix in ("", "@good", "@2", "@3", "@4", "@5")}


@requires("qemu-img", "nbdinfo")
def test_an_image_with_thousands_of_snapshots_costs_them_and_nobody_else(tmp_path: Path) -> None:
    path = image_with_snapshots(tmp_path / "bomb.qcow2", *(b"%d" % number for number in range(SNAPSHOTS_MAX + 1)))
    with serve("-r", "--snapshots", "-x", "disk", path) as server:
        assert run("nbdinfo", "--list", server.uri()).count("export=") == 1
        assert f"has {SNAPSHOTS_MAX + 1} internal snapshots" in server.stderr


class _NoAdministration:
    """Nobody has put anything over any image."""

    def top_of(self, name: str, image: str, *, format: str, policy: Policy) -> tuple[str, str, Policy]:
        return image, format, policy

    def is_passing(self, image: str) -> bool:
        return False


def test_a_file_that_gives_way_to_a_link_after_the_look_at_its_directory_is_not_followed(tmp_path: Path) -> None:
    directory, secret = tmp_path / "images", tmp_path / "secret"
    directory.mkdir()
    secret.write_bytes(b"secret" * 1024)
    image, other = directory / "disk.img", directory / "other.img"
    for path in (image, other):
        path.write_bytes(bytes(4096))
    settings = Settings(export_directory=(DirectorySettings(path=str(directory), raw=(".img",)),))
    wanted = Catalogue(of_file=False).wanted(settings)
    image.unlink()
    image.symlink_to(secret)
    exports, administration = Exports(), cast(Administration, _NoAdministration())
    with closing(ClusterCache(budget=1 << 20)) as clusters:
        disks = Disks(exports, administration, clusters=clusters, index_bytes=1 << 20)
        with closing(disks):
            disks.open_first(wanted)
            assert list(exports.by_name) == ["other.img"]

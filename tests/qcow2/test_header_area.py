"""Changing the header of an image that exists: nothing else changes, QEMU agrees, and no power cut leaves a mixture."""

import errno
import json
import random
import struct
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdq.errors import OperationError
from nbdq.qcow2.extensions import BitmapsExtension, UnknownExtension
from nbdq.qcow2.features import Autoclear, Compatible
from nbdq.qcow2.format import Header, read_header
from nbdq.qcow2.header_area import (
    rewrite_header_area,
    set_backing,
    set_bitmaps_extension,
    set_overlay_marker,
    write_fields,
)
from nbdq.storage import FileStorage
from tests.crash.operations import crash_states
from tests.qcow2.minimal import minimal_header, minimal_image, stored
from tests.support.tools import requires, run

FOREIGN = UnknownExtension(0x434C4233, b"somebody else's")


def make(path: Path, *, compat: str = "1.1", cluster_size: int = 65536, name: str | None = "base.qcow2") -> Path:
    backing = ["-u", "-b", name, "-F", "qcow2"] if name else []
    options = f"compat={compat},cluster_size={cluster_size}"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *backing, path, "1M")
    return path


def change(path: Path, operation: Callable[[FileStorage, Header], Header]) -> Header:
    with closing(FileStorage.open(str(path), writable=True)) as storage:
        said = operation(storage, read_header(storage))
        assert said == read_header(storage), "the header that is returned is the one in the file"
        return said


def rebased(name: str | None, format: str | None = "raw") -> Callable[[FileStorage, Header], Header]:
    return lambda storage, header: set_backing(storage, header, name=name, format=format)


def info(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("qemu-img", "info", "--output=json", path))
    return found


LAYOUTS = [
    pytest.param(compat, cluster_size, id=f"{compat}-{cluster_size}")
    for compat in ("0.10", "1.1")
    for cluster_size in (512, 4096, 65536, 2 << 20)
]


@requires("qemu-img")
@pytest.mark.parametrize(("compat", "cluster_size"), LAYOUTS)
def test_qemu_sees_the_new_backing_file_and_everything_else_unchanged(
    tmp_path: Path, compat: str, cluster_size: int
) -> None:
    path = make(tmp_path / "disk.qcow2", compat=compat, cluster_size=cluster_size)
    before = info(path)
    (tmp_path / "other.raw").write_bytes(bytes(1 << 20))
    change(path, rebased("other.raw"))
    after = info(path)
    assert after["backing-filename"] == "other.raw"
    assert after["backing-filename-format"] == "raw"
    assert after["format-specific"] == before["format-specific"]
    run("qemu-img", "check", path)
    change(path, rebased(None))
    assert "backing-filename" not in info(path)
    assert "backing-filename-format" not in info(path)


@requires("qemu-img")
@pytest.mark.parametrize("cluster_size", [2048, 65536])
def test_names_of_any_length_take_turns(tmp_path: Path, cluster_size: int) -> None:
    path = make(tmp_path / "disk.qcow2", cluster_size=cluster_size)
    longest = 1023 if cluster_size > 2048 else 700
    for length in (1, 300, longest, 2, longest, longest - 1, 400, longest):
        name = "x" * length
        change(path, rebased(name, "qcow2"))
        assert info(path)["backing-filename"] == name


def test_a_version_2_image_stays_one_and_its_header_stays_short() -> None:
    storage = stored(minimal_image(minimal_header(version=2)))
    set_backing(storage, read_header(storage), name="b", format="qcow2")
    assert storage.read(72, 4) == (0xE2792ACA).to_bytes(4, "big"), "extensions begin behind the fields of version 2"


def test_foreign_extensions_and_header_fields_survive(tmp_path: Path) -> None:
    header = minimal_header(header_length=128, unknown_fields=b"unknown fields 1", unknown_extensions=(FOREIGN,))
    storage = stored(minimal_image(header))
    set_overlay_marker(storage, set_backing(storage, read_header(storage), name="b", format="raw"), "/top")
    said = read_header(storage)
    assert said.unknown_fields == b"unknown fields 1"
    assert said.unknown_extensions == (FOREIGN,)
    assert (said.backing_name, said.backing_format, said.overlay_marker) == ("b", "raw", "/top")


@requires("qemu-img")
def test_qemu_keeps_our_mark_and_we_keep_its_bitmaps(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2")
    run("qemu-img", "bitmap", "--add", "-f", "qcow2", path, "b0")
    change(path, lambda storage, header: set_overlay_marker(storage, header, "/somewhere/top.qcow2"))
    assert info(path)["format-specific"]["data"]["bitmaps"][0]["name"] == "b0"
    (tmp_path / "x").write_bytes(bytes(1 << 20))
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "x", "-F", "raw", path)
    with closing(FileStorage.open(str(path))) as storage:
        assert read_header(storage).overlay_marker == "/somewhere/top.qcow2"
    run("qemu-img", "check", path)


def test_the_bitmaps_extension_comes_and_goes_together_with_its_promise() -> None:
    storage = stored(minimal_image())
    extension = BitmapsExtension(1, 32, 3 << 16)
    with_bitmaps = set_bitmaps_extension(storage, read_header(storage), extension)
    assert (with_bitmaps.bitmaps, with_bitmaps.autoclear) == (extension, Autoclear.BITMAPS)
    without = set_bitmaps_extension(storage, with_bitmaps, None)
    assert (without.bitmaps, without.autoclear) == (None, Autoclear.NONE)
    assert b"\x23\x85\x28\x75" not in storage.read(0, 512)


def test_as_many_names_of_features_are_kept_as_there_is_room_for() -> None:
    storage = stored(minimal_image(minimal_header(backing_name="b", backing_format="qcow2")))
    assert storage.read(128, 8) == bytes.fromhex("6803f857 00000180"), "all eight"
    header = set_backing(storage, read_header(storage), name="c", format="qcow2")
    assert storage.read(128, 8) == bytes.fromhex("6803f857 00000150"), "seven fit into the first sector"
    set_overlay_marker(storage, header, "/" + "x" * 350)
    assert bytes.fromhex("6803f857") not in storage.read(0, 512)


def test_changing_fields_leaves_extensions_and_name_where_they_are() -> None:
    image = minimal_image(minimal_header(backing_name="b", backing_format="qcow2"))
    storage = stored(image)
    header = read_header(storage)
    write_fields(storage, replace(header, compatible=Compatible.LAZY_REFCOUNTS))
    changed = storage.read(0, len(image))
    assert [at for at in range(len(image)) if image[at] != changed[at]] == [87]


def test_what_does_not_fit_into_a_sector_is_refused_before_anything_is_written() -> None:
    image = minimal_image()
    storage = stored(image)
    with pytest.raises(OSError, match="use shorter names") as caught:
        set_overlay_marker(storage, read_header(storage), "/" + "x" * 500)
    assert caught.value.errno == errno.ENOSPC
    small = stored(minimal_image(minimal_header(cluster_bits=9, size=8192)))
    with pytest.raises(OSError, match="shorter name"):
        set_backing(small, read_header(small), name="x" * 400, format="qcow2")
    assert storage.read(0, len(image)) == image


@pytest.mark.parametrize(
    ("name", "format", "problem"),
    [
        ("x" * 1024, "raw", "1023 bytes"),
        ("a\nb", "raw", "control character"),
        ("a", "two words", "name of a format"),
        ("a", "sixteen-letters-", "name of a format"),
    ],
)
def test_a_name_that_no_reader_accepts_is_not_stored(name: str, format: str, problem: str) -> None:
    image = minimal_image()
    storage = stored(image)
    with pytest.raises(OperationError, match=problem):
        set_backing(storage, read_header(storage), name=name, format=format)
    assert storage.read(0, len(image)) == image


def test_an_image_with_a_raw_data_file_gets_no_backing_file() -> None:
    storage = stored(minimal_image())
    with pytest.raises(OperationError, match="raw data file"):
        set_backing(storage, minimal_header(autoclear=Autoclear.DATA_FILE_RAW), name="b", format="raw")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("cluster_bits", [9, 11, 16])
def test_a_power_cut_leaves_the_old_header_or_the_new_one(tmp_path: Path, version: int, cluster_bits: int) -> None:
    """R-55: with names inside and outside of the first sector, and across its end."""
    limit = 200 if cluster_bits == 9 else 700
    seed = random.randrange(1 << 30)
    generator = random.Random(seed)
    path = tmp_path / "disk.qcow2"
    header = minimal_header(version=version, cluster_bits=cluster_bits, size=8192, unknown_extensions=(FOREIGN,))
    path.write_bytes(minimal_image(replace(header, backing_name="first", backing_format="qcow2")))
    for _ in range(12):
        name = generator.choice([None, "n", "n" * generator.randrange(1, limit)])
        marker = generator.choice([None, "/top", "/" + "t" * generator.randrange(120)])
        format = generator.choice(["raw", "qcow2"]) if name else None

        def operate(name: str | None = name, format: str | None = format, marker: str | None = marker) -> None:
            with closing(FileStorage.open(str(path), writable=True)) as storage:
                header = read_header(storage)
                rewrite_header_area(
                    storage, replace(header, backing_name=name, backing_format=format, overlay_marker=marker)
                )

        states = [content for (content,) in crash_states([path], operate, seed=seed)]
        said = [_said(state) for state in states]
        assert set(said) <= {said[0], said[-1]}, f"seed {seed}"
        assert (said[-1].backing_name, said[-1].overlay_marker) == (name, marker)
        rest = 1 << cluster_bits
        assert all(state[rest:] == states[0][rest:] for state in states)


def _said(state: bytes) -> Header:
    with closing(stored(state)) as storage:
        return read_header(storage)


def test_an_old_name_across_the_end_of_the_first_sector_is_not_overwritten(tmp_path: Path) -> None:
    """As QEMU lays it out behind its feature name table."""
    path = tmp_path / "disk.qcow2"
    path.write_bytes(minimal_image(minimal_header(backing_name="o" * 600, backing_format="qcow2")))
    offset = struct.unpack(">Q", path.read_bytes()[8:16])[0]
    assert offset > 512
    states = [
        _said(content) for (content,) in crash_states([path], lambda: change(path, rebased("n" * 700, "qcow2")), seed=1)
    ]
    assert {said.backing_name for said in states} == {"o" * 600, "n" * 700}

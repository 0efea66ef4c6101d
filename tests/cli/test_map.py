"""``nbdq map``: qemu-img's two formats to the byte, for any part of a disk."""

import json
import struct
from pathlib import Path

import pytest

from tests.qcow2.minimal import minimal_header, minimal_image
from tests.support.cli import nbdq, run_nbdq
from tests.support.tools import execute, requires, run

CLUSTER = 65536
COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1


def disk(directory: Path, entries: list[int], *, name: str = "disk.qcow2", **fields: int) -> Path:
    """An image whose guest clusters have these L2 entries."""
    header = minimal_header(**({"size": len(entries) * CLUSTER} | fields))
    image = minimal_image(header) + bytearray(CLUSTER)
    if entries:
        image[3 * CLUSTER : 3 * CLUSTER + 8] = (COPIED | 4 * CLUSTER).to_bytes(8, "big")
        image[4 * CLUSTER : 4 * CLUSTER + 8 * len(entries)] = struct.pack(f">{len(entries)}Q", *entries)
    path = directory / name
    path.write_bytes(image + bytes(20 * CLUSTER))
    return path


KINDS = [COPIED | 6 * CLUSTER, COPIED | 7 * CLUSTER, 0, ZERO, COPIED | 9 * CLUSTER | ZERO, COPIED | 5 * CLUSTER]


def test_json_has_one_extent_on_each_line_in_the_words_of_qemu_img(tmp_path: Path) -> None:
    """Chapter 4.1; with the key that qemu-img 8.2 added."""
    assert nbdq("map", "--output=json", disk(tmp_path, [*KINDS, COMPRESSED | 0x70000])) == (
        '[{ "start": 0, "length": 131072, "depth": 0, "present": true, "zero": false, "data": true, '
        '"compressed": false, "offset": 393216},\n'
        '{ "start": 131072, "length": 65536, "depth": 0, "present": false, "zero": true, "data": false, '
        '"compressed": false},\n'
        '{ "start": 196608, "length": 65536, "depth": 0, "present": true, "zero": true, "data": false, '
        '"compressed": false},\n'
        '{ "start": 262144, "length": 65536, "depth": 0, "present": true, "zero": true, "data": false, '
        '"compressed": false, "offset": 589824},\n'
        '{ "start": 327680, "length": 65536, "depth": 0, "present": true, "zero": false, "data": true, '
        '"compressed": false, "offset": 327680},\n'
        '{ "start": 393216, "length": 65536, "depth": 0, "present": true, "zero": false, "data": true, '
        '"compressed": true}]\n'
    )


def test_human_shows_only_data_with_its_file(tmp_path: Path) -> None:
    path = disk(tmp_path, KINDS)
    assert nbdq("map", path) == (
        "Offset          Length          Mapped to       File\n"
        f"0               0x20000         0x60000         {path}\n"
        f"0x50000         0x10000         0x50000         {path}\n"
    )


def test_human_gives_up_where_data_has_no_offset_after_what_it_has_shown(tmp_path: Path) -> None:
    """Chapter 4.1; the text is qemu-img's."""
    path = disk(tmp_path, [COPIED | 6 * CLUSTER, COMPRESSED | 0x70000, COPIED | 8 * CLUSTER])
    result = run_nbdq("map", path)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "Offset          Length          Mapped to       File",
        f"0               0x10000         0x60000         {path}",
    ]
    assert result.stderr == "nbdq: File contains external, encrypted or compressed clusters.\n"


@pytest.mark.parametrize("window", [(), ("-s", "0"), ("-l", "1M"), ("-s", "5", "-l", "5")])
def test_an_empty_disk_is_one_extent_of_nothing(tmp_path: Path, window: tuple[str, ...]) -> None:
    start = window[1] if "-s" in window else "0"
    nothing = '"length": 0, "depth": 0, "present": false, "zero": false, "data": false, "compressed": false'
    path = disk(tmp_path, [], l1_size=0)
    assert nbdq("map", "--output=json", *window, path) == f'[{{ "start": {start}, {nothing}}}]\n'
    assert nbdq("map", *window, path) == "Offset          Length          Mapped to       File\n"


@pytest.mark.parametrize(
    ("window", "starts"),
    [
        ((), [(0, 131072), (131072, 65536), (196608, 65536), (262144, 65536), (327680, 65536)]),
        (("-s", "64k"), [(65536, 65536), (131072, 65536), (196608, 65536), (262144, 65536), (327680, 65536)]),
        (("-l", "64k"), [(0, 65536)]),
        (("-l", "0"), [(0, 0)]),
        (("-s", "1000", "-l", "1"), [(1000, 1)]),
        (("--start-offset=0.375M",), [(393216, 0)]),
        (("-s", "131071", "--max-length", "0.0625M"), [(131071, 1), (131072, 65535)]),
        (("-s", "320K", "-l", "1T"), [(327680, 65536)]),
        (("-s", "1E", "-l", "1"), [(1 << 60, 0)]),
    ],
)
def test_a_window_is_cut_at_its_ends(window: tuple[str, ...], starts: list[tuple[int, int]], tmp_path: Path) -> None:
    extents = json.loads(nbdq("map", "--output=json", *window, disk(tmp_path, KINDS)))
    assert [(extent["start"], extent["length"]) for extent in extents] == starts


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("0", 0), ("512", 512), ("512b", 512), ("512B", 512), ("1k", 1 << 10), ("1K", 1 << 10), ("3M", 3 << 20)),
        *(("2g", 2 << 30), ("1.5G", 3 << 29), ("1T", 1 << 40), ("1P", 1 << 50), ("7e", 7 << 60), (".5k", 512)),
    ],
)
def test_sizes_are_written_as_for_qemu_img(text: str, size: int, tmp_path: Path) -> None:
    extents = json.loads(nbdq("map", "--output=json", "-s", text, disk(tmp_path, [])))
    assert extents[0]["start"] == size


@pytest.mark.parametrize(
    "text", ["", "k", "1kk", "1kB", "-1", "1e3", "0,5G", "nan", "inf", "1 k", "²", "٣", "1_0", "1.2.3", "many"]
)
def test_what_is_no_size_is_refused_with_what_would_be_one(text: str, tmp_path: Path) -> None:
    result = run_nbdq("map", f"--start-offset={text}", disk(tmp_path, []))
    assert result.exit_code == 2
    assert f"{text!r} is not a size; write bytes or a number with a suffix" in result.stderr


def test_a_map_through_a_chain_names_the_file_of_each_extent(tmp_path: Path) -> None:
    base = disk(tmp_path, [COPIED | 6 * CLUSTER] * 3, name="base.qcow2")
    top = disk(tmp_path, [0, COPIED | 8 * CLUSTER, ZERO, 0, 0], name="top.qcow2")
    assert nbdq("map", "--backing", f"qcow2:{base}", top).splitlines()[1:] == [
        f"0               0x10000         0x60000         {base}",
        f"0x10000         0x10000         0x80000         {top}",
    ]
    extents = json.loads(nbdq("map", "--output=json", "--backing", f"qcow2:{base}", top))
    assert [(extent["depth"], extent["present"]) for extent in extents] == [
        *((1, True), (0, True), (0, True)),
        (0, False),  # P2: the last layer long enough
    ]


def test_map_stops_at_a_corrupt_entry(tmp_path: Path) -> None:
    path = disk(tmp_path, [COPIED | 6 * CLUSTER, COPIED | 7 * CLUSTER + 512])
    result = run_nbdq("map", path)
    assert result.exit_code == 1
    assert result.stderr == f"nbdq: {path}: corrupt table entry for guest offset {CLUSTER}\n"
    assert json.loads(nbdq("map", "--output=json", "-l", "64k", path))[0]["data"]


@requires("qemu-img")
def test_both_formats_are_those_of_qemu_img(tmp_path: Path) -> None:
    path = disk(tmp_path, KINDS)
    for options in ([], ["--output=json"], ["-s", "100", "-l", "70000"]):
        ours = nbdq("map", *options, path).replace(', "compressed": false', "")
        theirs = run("qemu-img", "map", "-f", "qcow2", *options, path).replace(', "compressed": false', "")
        assert ours == theirs


@requires("qemu-img", "qemu-io")
def test_an_internal_snapshot_can_be_mapped(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write -q 0 64k", path)
    run("qemu-img", "snapshot", "-c", "before", path)
    run("qemu-io", "-f", "qcow2", "-c", "write -q 512k 64k", path)
    present = [e["start"] for e in json.loads(nbdq("map", "--output=json", path)) if e["present"]]
    earlier = [e["start"] for e in json.loads(nbdq("map", "--output=json", "-S", "before", path)) if e["present"]]
    assert (present, earlier) == ([0, 524288], [0])
    assert "'after'" in run_nbdq("map", "-S", "after", path).stderr


@requires("qemu-img")
def test_a_raw_image_is_mapped_when_it_is_said_to_be_raw(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * 5000)
    assert nbdq("map", "-f", "raw", path) == execute("qemu-img", "map", "-f", "raw", path).stdout

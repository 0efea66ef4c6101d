"""``nbdq check`` against ``qemu-img check``: the same verdict on every image, each content with the other's repairs.

Where the two differ on purpose, nbdq knows more or refuses sooner: :data:`OURS_ALONE` has all the reasons.
"""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.hostile.anatomy import COMPRESSED, COPIED, Anatomy, Area
from tests.hostile.mutations import mutate
from tests.hostile.seeds import VARIANTS_TO_MUTATE, make_seed
from tests.support.cli import nbdq, run_nbdq
from tests.support.images import Variant, build
from tests.support.tools import execute, requires, run
from tests.support.variants import KINDS, VARIANTS, single

pytestmark = requires("qemu-img", "qemu-io")

RANDOM_SEED = "check"

#: What nbdq finds and QEMU 7.2 does not, by words of the finding or the error.
OURS_ALONE = (
    "shares cluster",  # metadata that is also something else, with a refcount that agrees
    "also used otherwise",  # the same for an L2 table
    "not at its guest offset in the data file",  # QEMU fails only when the guest gets there (Q77)
    "a zero cluster in an image of version 2",  # the same (Q38)
    "flags without an L2 table",  # QEMU takes the header for an L2 table, and what it finds there for entries
    "promises bitmaps",  # QEMU marks the image corrupt on the first write (Q16)
    "leaked outside of the file",  # C9
    "also used for something else",  # counted before it is cut at the width of refcounts
    "the file was cut off",  # QEMU reads zeros past the end, and checks an empty disk
    "the header is damaged",  # the HARD list of the reference
)


class Verdict(NamedTuple):
    """What a check says, without texts."""

    status: int
    corruptions: int
    leaks: int


class Outcome(NamedTuple):
    """What a check says."""

    verdict: Verdict
    report: dict[str, Any]
    errors: str


def by_qemu(path: Path, *options: str) -> Outcome:
    done = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", "--output=json", *options, str(path)],
        cwd=path.parent,
        capture_output=True,
        timeout=100,
        check=False,
    )
    return _outcome(done.returncode, done.stdout.decode(), done.stderr.decode(errors="replace"))


def by_nbdq(path: Path, *options: str) -> Outcome:
    done = run_nbdq("check", "--output=json", *options, path)
    return _outcome(done.exit_code, done.stdout, done.stderr)


def _outcome(status: int, text: str, errors: str) -> Outcome:
    report = json.loads(text) if text.strip() else {}
    return Outcome(Verdict(status, report.get("corruptions", 0), report.get("leaks", 0)), report, errors)


#: Long chains are many times the same image.
_IMAGES = [variant for variant in VARIANTS if len(variant.layers) < 8]


@pytest.mark.parametrize("variant", _IMAGES, ids=str)
def test_an_image_that_qemu_made_is_judged_as_qemu_judges_it(variant: Variant, tmp_path: Path) -> None:
    image = build(variant, tmp_path)
    layers = list(zip(variant.layers, image.paths, strict=True))
    for layer, path in layers:
        if layer.format != "qcow2":
            continue
        theirs, ours = by_qemu(path), by_nbdq(path)
        assert ours.verdict == theirs.verdict
        assert ours.report == theirs.report


def test_people_read_what_qemu_img_would_tell_them(tmp_path: Path) -> None:
    path = build(single("mixed", steps=("compress 0 4c", *KINDS[2:])), tmp_path).top
    for damage in ((0, 0), (7, 0x0003)):
        _poke_refcount(path, *damage)
        theirs, ours = execute("qemu-img", "check", path), run_nbdq("check", path)
        assert ours.stdout == theirs.stdout
        assert ours.exit_code == theirs.returncode
    shutil.copy(path, copy := tmp_path / "copy.qcow2")
    theirs, ours = execute("qemu-img", "check", "-r", "all", path), run_nbdq("check", "-r", "all", copy)
    assert ours.stdout == theirs.stdout
    assert ours.exit_code == theirs.returncode == 0


def test_a_raw_disk_has_no_check(tmp_path: Path) -> None:
    (path := tmp_path / "disk.raw").write_bytes(bytes(1 << 16))
    assert execute("qemu-img", "check", "-f", "raw", path).returncode == 63
    assert run_nbdq("check", "-f", "raw", path).exit_code == 63


def test_an_encrypted_image_is_checked_without_its_key(tmp_path: Path) -> None:
    path, secret = tmp_path / "luks.qcow2", ("--object", "secret,id=key,data=pass")
    options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    creation = ("qemu-img", "create", "-q", "-f", "qcow2", *secret, "-o", options, path, "4M")
    while "Unable to get accurate CPU usage" in (done := execute(*creation)).stderr:
        pass  # it measures how fast the machine is, and gives up when it was interrupted
    assert done.returncode == 0, done.stderr
    keyed = f"driver=qcow2,encrypt.key-secret=key,file.filename={path}"
    run("qemu-io", *secret, "--image-opts", "-c", "write 64k 200k", keyed)
    theirs = json.loads(run("qemu-img", "check", *secret, "--output=json", "--image-opts", keyed))
    assert by_nbdq(path).report | {"filename": ""} == theirs | {"filename": ""}


def test_an_image_is_checked_without_its_backing_file(tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "gone", "-F", "qcow2", path := tmp_path / "disk", "1M")
    assert by_qemu(path).verdict.status == 1
    assert by_nbdq(path).verdict == Verdict(0, 0, 0)


def _poke(path: Path, offset: int, value: int, width: int = 8) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value.to_bytes(width, "big"))


def _refcount_block(path: Path) -> int:
    anatomy = Anatomy(path.read_bytes())
    return anatomy.number(anatomy.header["refcount_table_offset"], 8)


def _poke_refcount(path: Path, cluster: int, value: int) -> None:
    """Change a refcount of 16 bits; nothing for cluster 0, whose refcount must be there."""
    if cluster:
        _poke(path, _refcount_block(path) + 2 * cluster, value, 2)


#: Name → what to do to an image of KINDS in clusters of 64 KiB: (offset, value) of 8 bytes each, from its anatomy.
#: ``l2(i)`` is where the i-th L2 entry is, ``block`` the refcount block.
_DAMAGE: dict[str, Any] = {
    "refcount-too-high": lambda a, l2, block: [(block + 8, 0x0005_0001_0001_0001)],
    "refcount-too-low": lambda a, l2, block: [(block + 8, 0x0001_0000_0001_0001)],
    "refcounts-all-gone": lambda a, l2, block: [(a.header["refcount_table_offset"], 0)],
    "refcount-block-reserved-bits": lambda a, l2, block: [(a.header["refcount_table_offset"], block | 8)],
    "refcount-block-unaligned": lambda a, l2, block: [(a.header["refcount_table_offset"], block | 512)],
    "refcount-block-past-the-end": lambda a, l2, block: [(a.header["refcount_table_offset"] + 8, 1 << 40)],
    "refcount-block-is-the-l1-table": lambda a, l2, block: [
        (a.header["refcount_table_offset"] + 8, a.header["l1_table_offset"])
    ],
    "refcount-table-nowhere": lambda a, l2, block: [(48, 1 << 40)],
    "copied-missing": lambda a, l2, block: [(l2(0), a.number(l2(0), 8) ^ COPIED)],
    "copied-missing-in-l1": lambda a, l2, block: [
        (a.header["l1_table_offset"], a.number(a.header["l1_table_offset"], 8) ^ COPIED)
    ],
    "copied-on-what-is-shared": lambda a, l2, block: [(l2(1), a.number(l2(0), 8))],
    "mapped-twice": lambda a, l2, block: [(l2(3), a.number(l2(0), 8) ^ COPIED)],
    "preallocated-unaligned": lambda a, l2, block: [(l2(0), a.number(l2(0), 8) | 0x201)],
    "unmapped": lambda a, l2, block: [(l2(0), 0), (l2(1), 0)],
    "dirty-and-wrong": lambda a, l2, block: [(72, 1), (block + 8, 0)],
    "corrupt-but-sound": lambda a, l2, block: [(72, 2)],
    "unknown-autoclear": lambda a, l2, block: [(88, 0x100)],
}
_UNREPAIRABLE: dict[str, Any] = {
    "reserved-bits": lambda a, l2, block: [(l2(0), a.number(l2(0), 8) | 1 << 56)],
    "reserved-bits-in-l1": lambda a, l2, block: [
        (a.header["l1_table_offset"], a.number(a.header["l1_table_offset"], 8) | 1 << 60)
    ],
    "data-unaligned": lambda a, l2, block: [(l2(0), a.number(l2(0), 8) | 0x200)],
    "data-past-the-end": lambda a, l2, block: [(l2(0), COPIED | 1 << 40)],
    "compressed-past-the-end": lambda a, l2, block: [(l2(0), COMPRESSED | 1 << 40)],
}


def _damaged(name: str, tmp_path: Path, damage: Any) -> Path:
    path = build(single(name), tmp_path).top
    anatomy = Anatomy(path.read_bytes())
    entries = [field.offset for field in anatomy.fields[Area.L2]]
    block = anatomy.number(anatomy.header["refcount_table_offset"], 8)
    shutil.copy(path, path.with_name("before.qcow2"))
    for offset, value in damage(anatomy, lambda i: entries[0] + 8 * i, block):
        _poke(path, offset, value)
    return path


@pytest.mark.parametrize("name", [*_DAMAGE, *_UNREPAIRABLE])
def test_damage_is_counted_as_qemu_counts_it(name: str, tmp_path: Path) -> None:
    path = _damaged(name, tmp_path, (_DAMAGE | _UNREPAIRABLE)[name])
    ours, theirs = by_nbdq(path).verdict, by_qemu(path).verdict
    if name == "refcount-block-is-the-l1-table":  # its entries, taken for refcounts, are leaks past the end (C9)
        ours = ours._replace(leaks=0)
    assert ours == theirs


@pytest.mark.parametrize("name", _DAMAGE)
def test_after_a_repair_the_other_finds_nothing_and_the_guest_sees_what_it_saw(name: str, tmp_path: Path) -> None:
    path = _damaged(name, tmp_path, _DAMAGE[name])
    shutil.copy(path, theirs := tmp_path / "theirs.qcow2")
    reads_otherwise = name in ("unmapped", "copied-on-what-is-shared", "mapped-twice", "preallocated-unaligned")
    assert by_nbdq(path, "-r", "all").verdict == Verdict(0, 0, 0)
    assert by_qemu(path).verdict == Verdict(0, 0, 0)
    if not reads_otherwise:
        run("qemu-img", "compare", "-s", "-f", "qcow2", "-F", "qcow2", path, tmp_path / "before.qcow2")
    if by_qemu(theirs, "-r", "all").verdict.status == 0:  # QEMU 7.2 does not overcome some damage to refcount tables
        assert by_nbdq(theirs).verdict == Verdict(0, 0, 0)
        run("qemu-img", "compare", "-s", "-f", "qcow2", "-F", "qcow2", path, theirs)
        assert _features(path) == _features(theirs)
    else:
        assert name in ("refcount-block-reserved-bits", "refcount-block-unaligned", "refcount-block-is-the-l1-table")


def _features(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(96)[72:]


@pytest.mark.parametrize("options", ["", "refcount_bits=1", "refcount_bits=2", "refcount_bits=64", "cluster_size=512"])
def test_refcounts_of_every_width_are_rebuilt(options: str, tmp_path: Path) -> None:
    path = build(single("gone", options), tmp_path).top
    anatomy = Anatomy(path.read_bytes())
    shutil.copy(path, before := tmp_path / "before.qcow2")
    _poke(path, anatomy.header["refcount_table_offset"], 0)
    assert by_nbdq(path, "-r", "leaks").verdict.status == by_qemu(path, "-r", "leaks").verdict.status == 1
    assert by_nbdq(path, "-r", "all").verdict == Verdict(0, 0, 0)
    assert by_qemu(path).verdict == Verdict(0, 0, 0)
    run("qemu-img", "compare", "-s", path, before)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 18k", path)
    assert by_qemu(path).verdict == Verdict(0, 0, 0)


def test_leaks_are_given_back_and_nothing_else_is_touched(tmp_path: Path) -> None:
    path = _damaged("leaks", tmp_path, _DAMAGE["unmapped"])
    shutil.copy(path, theirs := tmp_path / "theirs.qcow2")
    ours, qemus = by_nbdq(path, "-r", "leaks"), by_qemu(theirs, "-r", "leaks")
    assert ours.report | {"filename": ""} == qemus.report | {"filename": ""}
    assert ours.report["leaks-fixed"] == 2
    assert path.read_bytes() == theirs.read_bytes()
    assert path.stat().st_blocks <= theirs.stat().st_blocks


def test_snapshots_without_their_sizes_get_them_from_the_image(tmp_path: Path) -> None:
    path = build(single("snapshots", steps=(*KINDS, "snapshot first", "write 0 1c", "snapshot second")), tmp_path).top
    anatomy = Anatomy(path.read_bytes())
    (start, entry), _ = anatomy.snapshot_entries()
    raw = path.read_bytes()
    names = start + 40 + entry["extra_length"]
    text = raw[names : names + entry["id_length"] + entry["name_length"]]
    second = raw[-(-(names + len(text)) // 8) * 8 :][:128]
    with path.open("r+b") as file:  # the entry as an old program would write it, without extra data
        file.seek(start)
        file.write(raw[start : start + 36] + bytes(4) + text.ljust(-(-len(text) // 8) * 8, b"\0") + second)
    shutil.copy(path, theirs := tmp_path / "theirs.qcow2")
    assert by_nbdq(path).verdict == by_qemu(path).verdict == Verdict(2, 1, 0)
    assert by_nbdq(path, "-r", "all").verdict == by_qemu(theirs, "-r", "all").verdict == Verdict(0, 0, 0)
    assert by_qemu(path).verdict == by_nbdq(theirs).verdict == Verdict(0, 0, 0)
    listing = [run("qemu-img", "snapshot", "-l", image) for image in (path, theirs)]
    assert listing[0] == listing[1]
    run("qemu-img", "snapshot", "-a", "first", path)
    run("qemu-img", "snapshot", "-d", "second", path)
    assert by_nbdq(path).verdict == by_qemu(path).verdict == Verdict(0, 0, 0)


def test_snapshots_with_too_much_extra_data_lose_some_of_it(tmp_path: Path) -> None:
    path = build(single("snapshots", steps=(*KINDS, "snapshot first", "write 0 1c")), tmp_path).top
    raw = path.read_bytes()
    ((start, entry),) = Anatomy(raw).snapshot_entries()
    end = start + 40 + entry["extra_length"]
    with path.open("r+b") as file:
        file.seek(start + 36)
        file.write((2000).to_bytes(4, "big") + raw[start + 40 : end].ljust(2000, b"?"))
        file.write(raw[end : end + entry["id_length"] + entry["name_length"]])
    shutil.copy(path, theirs := tmp_path / "theirs.qcow2")
    assert by_nbdq(path).verdict.status == by_qemu(path).verdict.status == 1
    assert by_nbdq(path, "-r", "all").verdict == by_qemu(theirs, "-r", "all").verdict == Verdict(0, 0, 0)
    assert by_qemu(path).verdict == by_nbdq(theirs).verdict == Verdict(0, 0, 0)
    listing = [run("qemu-img", "snapshot", "-l", image) for image in (path, theirs)]
    assert listing[0] == listing[1]
    assert "first" in listing[0]


def test_a_promise_of_bitmaps_that_are_not_there_is_taken_back(tmp_path: Path) -> None:
    """QEMU would mark the image corrupt on the guest's first write (Q16)."""
    path = _damaged("promise", tmp_path, lambda a, l2, block: [(88, 1)])
    assert by_nbdq(path).verdict == Verdict(2, 1, 0)
    assert by_nbdq(path, "-r", "all").verdict == Verdict(0, 0, 0)
    run("qemu-io", "-f", "qcow2", "-c", "write 0 64k", path)
    assert by_qemu(path).verdict == Verdict(0, 0, 0)


@requires("qemu-nbd")
def test_an_image_whose_writer_was_killed_is_repaired(tmp_path: Path) -> None:
    path, socket = tmp_path / "lazy.qcow2", tmp_path / "socket"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "64M")
    server = subprocess.Popen(["qemu-nbd", "-f", "qcow2", "-t", "--discard=unmap", "-k", str(socket), str(path)])
    try:
        while not socket.exists():
            assert server.poll() is None
            time.sleep(0.01)
        uri = f"nbd+unix:///?socket={socket}"
        writes = ["-c", "write -P 1 0 3M", "-c", "write -P 2 20M 1M", "-c", "discard 1M 1M", "-c", "flush"]
        run("qemu-io", "-f", "raw", *writes, uri)
        server.send_signal(signal.SIGKILL)
    finally:
        server.kill()
        server.wait()
    shutil.copy(path, theirs := tmp_path / "theirs.qcow2")
    assert by_nbdq(path).verdict == by_qemu(path).verdict
    assert by_nbdq(path).verdict.status == 2
    assert by_nbdq(path, "-r", "all").verdict == Verdict(0, 0, 0)
    assert by_qemu(path).verdict == Verdict(0, 0, 0)
    assert "dirty bit" not in run("qemu-img", "info", path)
    run("qemu-img", "compare", "-s", path, theirs)
    assert _features(path)[:8] == bytes(8)


@requires("qemu-nbd")
def test_a_check_keeps_to_the_locks_of_others(tmp_path: Path) -> None:
    path, socket = build(single("locked"), tmp_path).top, tmp_path / "socket"
    server = subprocess.Popen(["qemu-nbd", "-f", "qcow2", "-t", "-k", str(socket), str(path)])
    try:
        while not socket.exists():
            assert server.poll() is None
            time.sleep(0.01)
        refused = run_nbdq("check", path)
        assert refused.exit_code == execute("qemu-img", "check", path).returncode == 1
        assert 'failed to get shared "write" lock' in refused.stderr
        assert nbdq("check", "-U", path)
        assert run_nbdq("check", "-r", "all", path).exit_code == 1
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("variant", VARIANTS_TO_MUTATE, ids=str)
def test_a_damaged_image_is_judged_as_qemu_judges_it_or_for_a_reason(variant: Variant, tmp_path: Path) -> None:
    seed = make_seed(variant, tmp_path)
    for number in range(4):
        mutation = mutate(seed, number, random_seed=RANDOM_SEED)
        path = tmp_path / mutation.file
        mutation.apply(seed.files[mutation.file]).store(path)
        theirs, ours = by_qemu(path), by_nbdq(path)
        # QEMU opens no image without its key. A check that failed counts nothing there, and as far as it came here.
        failed = "Could not open" in theirs.errors or ours.verdict.status == theirs.verdict.status == 1
        if ours.verdict != theirs.verdict and not failed:
            assert any(reason in ours.errors for reason in OURS_ALONE), f"{mutation}\n{theirs}\n{ours}"
        if ours.verdict.status in (2, 3):
            after = by_nbdq(path, "-r", "all")
            if after.verdict.status == 0:
                assert by_qemu(path).verdict == Verdict(0, 0, 0), f"{mutation}\n{after}"
        seed.files[mutation.file].store(path)

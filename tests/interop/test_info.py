"""``nbdq info`` against ``qemu-img info``: the same lines and the same JSON, or both refuse.

Each parameter is a recipe: options of ``qemu-img create``, then commands and pokes that leave their mark on the header.
"""

import fcntl
import json
import os
import random
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nbdq.errors import ImageError
from nbdq.qcow2.bitmaps.directory import read_bitmaps
from nbdq.qcow2.extensions import EncryptionPointer
from nbdq.qcow2.format import CryptMethod, Header, build_header, read_header
from nbdq.qcow2.snapshots import read_snapshots
from nbdq.storage import FileStorage
from tests.qcow2.minimal import FIELDS, minimal_header, minimal_image, poke
from tests.qcow2.test_format import REFUSED
from tests.support.cli import nbdq, run_nbdq
from tests.support.tools import execute, requires, run

pytestmark = requires("qemu-img", "qemu-io")

#: Keys that QEMU learnt after 7.2.
_NEWER_KEYS = {"children", "detached-header"}


def info(*words: str | Path) -> str:
    """Standard output of a successful ``nbdq info``."""
    return nbdq("info", *words)


def refused(*words: str | Path) -> str:
    """The one line on stderr with which ``nbdq info`` fails, having printed nothing else."""
    done = run_nbdq("info", *words)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("nbdq: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def opened(path: Path, *, describe: bool = True) -> Header:
    """The header and whatever QEMU reads with it at open."""
    storage = FileStorage.open(str(path))
    try:
        header = read_header(storage, describe=describe)
        read_snapshots(storage, header)
        read_bitmaps(storage, header)
        return header
    finally:
        storage.close()


def without_newer_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_newer_keys(item) for key, item in value.items() if key not in _NEWER_KEYS}
    return [without_newer_keys(item) for item in value] if isinstance(value, list) else value


def assert_same_info(path: Path | str, *options: str) -> None:
    """Both outputs agree with QEMU's, as far as the installed QEMU goes."""
    expected = run("qemu-img", "info", *options, path)
    found = info(*options, path)
    if "Child node" not in expected:  # QEMU 8.0 and later print more than we do
        assert found == expected
    ours = json.loads(info(*options, "--output=json", path))
    theirs = json.loads(run("qemu-img", "info", *options, "--output=json", path))
    assert without_newer_keys(ours) == without_newer_keys(theirs)


@dataclass(frozen=True)
class Recipe:
    """How to make an image: create options, qemu-img commands ({} is the image), then header fields to poke."""

    options: str = ""
    commands: Sequence[str] = ()
    pokes: dict[str, int] | None = None
    size: str = "64M"
    create: Sequence[str] = ()

    def make(self, path: Path) -> Path:
        chosen = ["-o", self.options] if self.options else []
        run("qemu-img", "create", "-q", "-f", "qcow2", *chosen, *self.create, path, self.size, cwd=path.parent)
        for command in self.commands:
            run(*command.format(path.name).split(), cwd=path.parent)
        if self.pokes:
            path.write_bytes(poke(bytearray(path.read_bytes()), **self.pokes))
        return path


_SECRET = ("--object", "secret,id=s,data=x")
_BACKED = ("-u", "-F", "qcow2", "-b")

RECIPES = {
    "v3": Recipe(),
    "v2": Recipe("compat=0.10"),
    **{f"clusters of {size}": Recipe(f"cluster_size={size}") for size in ("512", "4k", "32k", "128k", "1M", "2M")},
    **{f"refcount bits {1 << order}": Recipe(f"refcount_bits={1 << order}") for order in range(7)},
    "extended L2": Recipe("extended_l2=on"),
    "zstd": Recipe("compression_type=zstd"),
    "lazy refcounts": Recipe("lazy_refcounts=on"),
    "data file": Recipe("data_file=guest.data"),
    "raw data file": Recipe("data_file=guest.data,data_file_raw=on"),
    "missing data file": Recipe("data_file=guest.data", ["rm guest.data"]),
    "data file that is no longer used": Recipe("data_file=guest.data", (), {"incompatible_features": 0}),
    "everything": Recipe("extended_l2=on,compression_type=zstd,lazy_refcounts=on,cluster_size=2M,refcount_bits=64"),
    "preallocated": Recipe("preallocation=metadata"),
    "empty disk": Recipe(size="0"),
    "one sector": Recipe(size="512"),
    "16 TiB": Recipe(size="16T"),
    "odd size": Recipe(pokes={"size": (64 << 20) + 1000}),
    "dirty": Recipe("lazy_refcounts=on", (), {"incompatible_features": 1}),
    "corrupt": Recipe(pokes={"incompatible_features": 2}),
    "unknown bits": Recipe(pokes={"compatible_features": 1 << 60, "autoclear_features": 1 << 50}),
    "snapshots": Recipe(
        commands=["qemu-img snapshot -c first {}", "qemu-img snapshot -c schön {}", "qemu-img snapshot -c first {}"]
    ),
    "a snapshot in v2": Recipe("compat=0.10", ["qemu-img snapshot -c first {}"]),
    "a snapshot with a name longer than its column": Recipe(commands=[f"qemu-img snapshot -c {'n' * 200} {{}}"]),
    "bitmaps": Recipe(
        commands=[
            "qemu-img bitmap --add -g 512 {} fine",
            "qemu-img bitmap --add --disable {} coarse",
            "qemu-img bitmap --add -g 2M {} dicht",
        ]
    ),
    "bitmaps that nobody maintained": Recipe(commands=["qemu-img bitmap --add {} b"], pokes={"autoclear_features": 0}),
    "backing": Recipe(create=(*_BACKED, "base.qcow2")),
    "backing in v2": Recipe("compat=0.10", create=(*_BACKED, "base.qcow2")),
    "backing elsewhere": Recipe(create=(*_BACKED, "../elsewhere/base.qcow2")),
    "absolute backing": Recipe(create=(*_BACKED, "/nowhere/base.qcow2")),
    "backing with spaces": Recipe(create=(*_BACKED, "bäse (1).qcow2")),
    "backing by protocol": Recipe(create=(*_BACKED, "nbd://localhost/base")),
    "backing by json": Recipe(create=(*_BACKED, 'json:{"driver":"null-co"}')),
    "backing with a colon": Recipe(create=(*_BACKED, "./a:b")),
    "backing of unknown format": Recipe(create=("-u", "-F", "raw", "-b", "base.raw")),
    "legacy encryption": Recipe("encrypt.format=aes,encrypt.key-secret=s", create=_SECRET),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_info_equals_qemu_img_info(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe.make(tmp_path / "disk.qcow2")
    assert_same_info(path)
    monkeypatch.chdir(tmp_path)
    assert_same_info(path.name)


@pytest.mark.parametrize("length", [0, 1, 511, 512, 1000, 999 << 10, (1000 << 10) - 512, 10**9, 3 << 42])
def test_info_of_a_raw_file_equals_qemu_img_info(length: int, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"")
    os.truncate(path, length)
    assert_same_info(path, "-f", "raw")


def test_a_qcow2_file_is_not_taken_for_one_when_raw_is_said(tmp_path: Path) -> None:
    assert_same_info(Recipe().make(tmp_path / "disk.qcow2"), "-f", "raw")


def test_every_field_of_a_snapshot_is_shown_as_qemu_img_shows_it(tmp_path: Path) -> None:
    path = Recipe(commands=["qemu-img snapshot -c a {}", "qemu-img snapshot -c b {}"]).make(tmp_path / "disk.qcow2")
    image = bytearray(path.read_bytes())
    table = struct.unpack_from(">Q", image, 64)[0]
    struct.pack_into(">Q", image, table + 24, (100 * 3600 + 62) * 10**9 + 987_654_321)
    struct.pack_into(">QQQ", image, table + 40, 1_234_567_890, 64 << 20, (1 << 64) - 1)
    path.write_bytes(image)
    assert_same_info(path)


def test_an_image_that_only_python_has_laid_out_satisfies_qemu(tmp_path: Path) -> None:
    for name, fields in {
        "base.qcow2": {},
        "mid.qcow2": {"version": 2, "backing_name": "base.qcow2", "backing_format": "qcow2"},
        "top.qcow2": {"cluster_bits": 9, "l1_size": 32, "backing_name": "mid.qcow2", "backing_format": "qcow2"},
    }.items():
        (tmp_path / name).write_bytes(minimal_image(minimal_header(**fields)))
        assert "No errors were found" in run("qemu-img", "check", "-f", "qcow2", tmp_path / name)
        assert_same_info(tmp_path / name)
    assert_same_info(tmp_path / "top.qcow2", "--backing-chain")


@pytest.mark.parametrize("fields", [fields for fields, _, _ in REFUSED], ids=str)
def test_what_is_refused_here_qemu_refuses_too(fields: dict[str, int], tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(poke(minimal_image(), **fields))
    assert execute("qemu-img", "map", "-f", "qcow2", path).returncode == 1
    with pytest.raises(ImageError):
        opened(path, describe=False)


@pytest.mark.parametrize("seed", range(6))
def test_no_damaged_header_that_qemu_refuses_is_accepted(seed: int, tmp_path: Path) -> None:
    """Ten images each with one to three fields set to likely troublemakers; the failing one is in the message."""
    choice = random.Random(seed)
    path = tmp_path / "disk.qcow2"
    for _ in range(10):
        fields = {}
        for name in choice.sample(sorted(FIELDS), choice.choice([1, 1, 2, 3])):
            width = 8 * FIELDS[name][1]
            likely = (choice.randrange(20), 1 << choice.randrange(width), choice.randrange(8) << 16, (1 << width) - 1)
            fields[name] = choice.choice(likely) % (1 << width)
        path.write_bytes(poke(minimal_image(), **fields))
        if execute("qemu-img", "info", "-f", "qcow2", path).returncode:
            with pytest.raises(ImageError):
                print(f"seed {seed}: {fields} became {opened(path)}")


@pytest.mark.parametrize(
    ("cipher", "mode", "hash_name", "key_length"),
    [
        ("aes", "xts-plain64", "sha256", 64),
        ("aes", "xts-plain64:ripemd160", "sha512", 32),
        ("aes", "cbc-essiv:sha256", "sha1", 24),
        ("serpent", "cbc-plain", "ripemd160", 16),
        ("cast5", "ecb-plain", "sha256", 16),
    ],
)
def test_a_luks_header_is_described_as_qemu_does(
    cipher: str, mode: str, hash_name: str, key_length: int, tmp_path: Path
) -> None:
    """The header is made by hand, because qemu-img takes seconds to measure its own key derivation."""
    slots = [(0x00AC71F3 if n == 2 else 0x0000DEAD, 1000 * n, bytes(32), 8 + 4096 * n, 4000) for n in range(8)]
    names = (cipher.encode(), mode.encode(), hash_name.encode())
    luks = struct.pack(">6sH32s32s32s", b"LUKS\xba\xbe", 1, *names)
    luks += struct.pack(
        ">II20s32sI40s", 8 + 4096 * 8, key_length, b"", b"", 1234, b"01234567-89ab-cdef-0123-456789abcdef"
    )
    luks += b"".join(struct.pack(">II32sII", *slot) for slot in slots)
    header = minimal_header(crypt_method=CryptMethod.LUKS, encryption=EncryptionPointer(4 << 16, (8 + 4096 * 8) * 512))
    path = tmp_path / "disk.qcow2"
    path.write_bytes(minimal_image(header) + luks)
    os.truncate(path, 32 << 20)
    assert_same_info(path)


# --- chains ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """raw ← v2 ← extended L2 with a snapshot; the top's path."""
    run("qemu-img", "create", "-q", "-f", "raw", tmp_path / "base.raw", "1M")
    for name, below, format, options in (
        ("mid.qcow2", "base.raw", "raw", "compat=0.10"),
        ("top.qcow2", "mid.qcow2", "qcow2", "extended_l2=on"),
    ):
        command = ("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-F", format, "-b", below)
        run(*command, tmp_path / name, cwd=tmp_path)
    run("qemu-img", "snapshot", "-c", "first", tmp_path / "top.qcow2")
    return tmp_path / "top.qcow2"


def test_a_whole_chain_equals_qemu_img_info(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same_info(chain, "--backing-chain")
    monkeypatch.chdir(chain.parent)
    assert_same_info(chain.name, "--backing-chain")


def test_a_chain_of_one_image_is_a_list_too(tmp_path: Path) -> None:
    assert_same_info(Recipe().make(tmp_path / "disk.qcow2"), "--backing-chain")


def test_a_loop_is_refused(tmp_path: Path) -> None:
    for name, below in (("a.qcow2", "b.qcow2"), ("b.qcow2", "a.qcow2")):
        Recipe(create=(*_BACKED, below)).make(tmp_path / name)
    assert "loop" in refused("--backing-chain", tmp_path / "a.qcow2")
    assert_same_info(tmp_path / "a.qcow2")


def test_a_missing_layer_matters_to_the_chain_only(chain: Path) -> None:
    (chain.parent / "base.raw").unlink()
    assert_same_info(chain)
    assert "base.raw" in refused("--backing-chain", chain)


# --- policy ---------------------------------------------------------------------------------------------------------


def test_info_opens_the_image_and_nothing_else(tmp_path: Path) -> None:
    image = Recipe("data_file=guest.data").make(tmp_path / "disk.qcow2")
    backed = Recipe(create=(*_BACKED, "base.qcow2")).make(tmp_path / "over.qcow2")
    Recipe().make(tmp_path / "base.qcow2")
    opened: list[str] = []
    recording = True

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if recording and event == "open" and str(arguments[0]).startswith(str(tmp_path)):
            opened.append(str(arguments[0]))

    sys.addaudithook(listen)
    info(image)
    info("--output=json", backed)
    recording = False
    assert opened == [str(image), str(backed)]


def test_a_locked_image_needs_force_share(tmp_path: Path) -> None:
    path = Recipe().make(tmp_path / "disk.qcow2")
    with path.open("rb") as file:
        for byte in (100, 101, 103, 201, 203):  # what a running guest holds (L6)
            flock = struct.pack("@hhqqi0q", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, flock)
        assert execute("qemu-img", "info", path).returncode == 1
        assert refused(path).startswith(f"nbdq: {path}: ")
        assert_same_info(path, "-U")


def test_an_error_names_the_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "gone.qcow2") == f"nbdq: {tmp_path}/gone.qcow2: No such file or directory\n"
    assert refused(tmp_path).startswith(f"nbdq: {tmp_path}: ")


def test_a_warning_leaves_the_output_alone(tmp_path: Path) -> None:
    path = Recipe(pokes={"size": (64 << 20) + 1000}).make(tmp_path / "disk.qcow2")
    done = run_nbdq("info", "--output=json", path)
    assert json.loads(done.stdout)["virtual-size"] == (64 << 20) + 512
    assert f"{path}: size is 67109864, not a multiple of 512" in done.stderr


def test_hostile_names_cannot_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    image = minimal_image(minimal_header(snapshot_count=1, snapshots_offset=4 << 16))
    name = b"\x1b]0;pwned\x07\n\xff"
    entry = struct.pack(">QIHHIIQII", 3 << 16, 1, 1, len(name), 0, 0, 0, 0, 24) + bytes(24) + b"1" + name
    path.write_bytes(image + entry)
    shown = info(path)
    assert "\\x1b]0;pwned\\x07\\n" in shown
    assert all(line.isprintable() for line in shown.splitlines())
    assert json.loads(info("--output=json", path))["snapshots"][0]["name"] == "\x1b]0;pwned\x07\n\ufffd"


# --- newer keys -------------------------------------------------------------------------------------------------------


def test_json_has_the_file_below_the_format_as_newer_qemu_prints_it(tmp_path: Path) -> None:
    path = Recipe().make(tmp_path / "disk.qcow2")
    found = json.loads(info("--output=json", path))
    length = path.stat().st_size
    assert found["children"] == [
        {
            "name": "file",
            "info": {
                "children": [],
                "filename": str(path),
                "format": "file",
                "virtual-size": -(-length // 512) * 512,
                "actual-size": found["actual-size"],
                "dirty-flag": False,
                "format-specific": {"type": "file", "data": {}},
            },
        }
    ]


def test_a_header_longer_than_any_known_is_described(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    header = minimal_header(header_length=128, unknown_fields=b"tomorrow's field")
    assert build_header(header)[112:128] == b"tomorrow's field"
    path.write_bytes(minimal_image(header))
    assert_same_info(path)

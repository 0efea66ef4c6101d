"""Where a name in an image may lead: what is allowed. What is not is in ``tests/hostile/test_references.py`` (R-36)."""

import os
import stat
from contextlib import closing, suppress
from pathlib import Path

import pytest

from nbdq.chain.policy import Gate, Policy, Reference, Role, has_protocol
from nbdq.chain.resolve import backing_path
from nbdq.errors import ChainError


class Pool:
    """A directory of images with a top image in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.top = str(directory / "top.qcow2")
        directory.mkdir()

    def content(self, name: str, *roots: Path) -> bytes:
        """What is read when the top image names ``name`` as its backing file."""
        reference = Reference(self.top, Role.BACKING, name, backing_path(self.top, name))
        with closing(Gate(self.top, Policy(roots=tuple(map(str, roots)))).open(reference)) as storage:
            assert storage.path == reference.path
            return storage.read(0, 1024)


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return Pool(tmp_path / "pool")


@pytest.mark.parametrize(
    "name",
    [
        "base",
        "./base",
        "sub/../base",
        "sub/deeper/../../base",
        "../pool/base",
        "sub//deep",
        "link",
        "sub/up/base",
        "b:c",
    ],
)
def test_a_name_may_wander_as_long_as_it_ends_beneath_the_directory_of_the_top(pool: Pool, name: str) -> None:
    (pool.directory / "sub/deeper").mkdir(parents=True)
    for file in ("base", "sub/deep", "b:c"):
        (pool.directory / file).write_bytes(b"content")
    (pool.directory / "link").symlink_to("sub/../base")
    (pool.directory / "sub/up").symlink_to("..")
    assert pool.content(f"./{name}" if has_protocol(name) else name) == b"content"


def test_names_of_any_printable_characters_and_the_full_length_are_followed(pool: Pool) -> None:
    for name in ("naïve 日本.img", "a b", "%41", "-rf", "~root", "$HOME", "*", "\\", "'\"", "e\u0301\u200d"):
        (pool.directory / name).write_bytes(name.encode())
        assert pool.content(name) == name.encode()
    longest = "./" * 510 + "a:b"
    assert len(longest) == 1023
    (pool.directory / "a:b").write_bytes(b"content")
    assert pool.content(longest) == b"content"


def test_a_directory_that_the_operator_allows_is_open_besides_that_of_the_top(pool: Pool, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "base").write_bytes(b"other")
    (pool.directory / "base").write_bytes(b"pool")
    for name in ("../other/base", str(other / "base")):
        with pytest.raises(ChainError, match=r"lies outside the allowed directories.*--allow-backing DIR"):
            pool.content(name)
        assert pool.content(name, other) == b"other"
        assert pool.content(name, tmp_path) == b"other"
        assert pool.content(name, Path("/")) == b"other"
    assert pool.content("base", other) == b"pool"


def test_a_root_and_a_name_may_both_go_through_links(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/base").write_bytes(b"content")
    (tmp_path / "alias").symlink_to("real")
    (tmp_path / "other-alias").symlink_to(tmp_path / "real")
    assert pool.content(str(tmp_path / "alias/base"), tmp_path / "other-alias") == b"content"


def test_a_directory_with_the_same_beginning_is_another_directory(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "pool2").mkdir()
    (tmp_path / "pool2/base").write_bytes(b"")
    with pytest.raises(ChainError, match="lies outside"):
        pool.content("../pool2/base")


def test_a_file_that_cannot_be_read_is_a_failure_of_the_system_not_of_the_policy(pool: Pool) -> None:
    (pool.directory / "loop").symlink_to("loop")
    (pool.directory / "file").write_bytes(b"")
    for name in ("gone", "loop", "file/below", "a" * 256):
        with pytest.raises(OSError, match=r"No such file|Too many levels|Not a directory|name too long"):
            pool.content(name)


def test_block_devices_are_opened_only_beneath_a_directory_that_the_operator_named(pool: Pool) -> None:
    """A top in /dev must not make the disks of the host reachable."""
    device = pool.directory / "device"
    try:
        os.mknod(device, stat.S_IFBLK | 0o600, os.makedev(7, 0))
    except PermissionError:
        pytest.skip("only root makes device nodes")
    with pytest.raises(ChainError, match="it is a block device; allow its directory with --allow-backing DIR"):
        pool.content("device")
    with suppress(OSError):  # allowed, but there may be no such device
        pool.content("device", pool.directory)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a:b", True),
        (":", True),
        ("json:{}", True),
        ("nbd://h/e", True),
        ("./a:b", False),
        ("/a:b", False),
        ("a", False),
    ],
)
def test_a_colon_before_any_slash_makes_a_protocol(name: str, expected: bool) -> None:
    """N1."""
    assert has_protocol(name) == expected

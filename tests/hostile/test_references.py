"""Images that name what they must not reach: each is refused by a named error and opens nothing foreign (R-34..R-37).

An audit hook sees every ``open`` of this process. A refused image may cost the opening of the image itself, and of
directories on the way to a file that is allowed; a file that is not is never opened, not even to look what it is.
"""

import os
import re
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdq.chain.policy import Policy
from nbdq.chain.resolve import resolve_chain
from nbdq.errors import ChainError, ImageError, InvalidImage, UnsupportedImage
from tests.support.references import refer

pytestmark = pytest.mark.timeout(20)  # a hang is a failure, too

Watcher = Callable[[str], None]
_watcher: Watcher | None = None


def _hear(event: str, arguments: tuple[object, ...]) -> None:
    if _watcher is not None and event == "open":
        _watcher(str(arguments[0]))


sys.addaudithook(_hear)


class Pool:
    """A directory with a top image, some harmless files, traps, and a secret next to it."""

    def __init__(self, parent: Path) -> None:
        self.secret = parent / "secret"
        self.directory = parent / "pool"
        self.top = self.directory / "top"
        self.secret.mkdir()
        (self.directory / "sub").mkdir(parents=True)
        for file in (self.secret / "base", self.directory / "base", self.directory / "sub/base"):
            file.write_bytes(refer())
        (parent / "pool-evil").mkdir()
        (parent / "pool-evil/base").write_bytes(refer())
        for name, target in LINKS.items():
            (self.directory / name).symlink_to(target.format(secret=self.secret))
        os.mkfifo(self.directory / "fifo")
        with socket.socket(socket.AF_UNIX) as listener:
            # a socket path has at most 107 bytes
            listener.bind(f"/proc/self/fd/{(fd := os.open(self.directory, os.O_PATH))}/socket")
            os.close(fd)
        self.opened: list[str] = []

    def refusal(self, image: bytes, *, during: Watcher | None = None) -> ImageError:
        """Why a chain with ``image`` on top is refused; ``during`` is told every path just before it is opened."""
        global _watcher
        self.top.write_bytes(image)
        self.opened = []

        def watch(path: str) -> None:
            self.opened.append(path)
            if during:
                during(path)

        _watcher = watch
        try:
            with pytest.raises((ChainError, InvalidImage, UnsupportedImage)) as caught:
                resolve_chain(str(self.top), policy=Policy(allow_data_file=True))
        finally:
            _watcher = None
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 2500
        return caught.value

    @property
    def foreign(self) -> list[str]:
        """What was opened besides the image and the directories of the pool."""
        allowed = {str(self.top), str(self.directory), "sub", *NO_DIRECTORIES}
        return [path for path in self.opened if path not in allowed]


LINKS = {
    "to-secret": "{secret}/base",
    "to-secret-relative": "../secret/base",
    "to-link": "to-secret",
    "to-directory": "{secret}",
    "to-parent": "..",
    "to-root": "/",
    "to-itself": "to-itself",
    "to-null": "/dev/null",
    "to-stdin": "/dev/stdin",
    "to-descriptors": "/proc/self/fd",
    "to-own-directory": "/proc/self/cwd",
    "to-fifo": "fifo",
    "to-nothing": "/nonexistent/base",
}

#: Names mean these directories of the pool, which do not exist: nothing expands them.
NO_DIRECTORIES = {"~", "$HOME", "a"}

PLACES = [
    "/etc/passwd",
    "/etc/shadow",
    "//etc//passwd",
    "/./etc/../etc/passwd",
    "/etc",
    "/",
    "//",
    ".",
    "..",
    "./",
    "sub/..",
    "../secret/base",
    "./../secret/base",
    "sub/../../secret/base",
    "sub/../../pool/../secret/base",
    "../pool-evil/base",
    "../../../../../../../../../../../../etc/passwd",
    "gone/../../secret/base",
    "base/../../secret/base",
    "to-secret",
    "to-secret-relative",
    "to-link",
    "to-directory/base",
    "to-parent/secret/base",
    "to-root/etc/passwd",
    "to-itself",
    "to-itself/base",
    "to-null",
    "to-stdin",
    "to-fifo",
    "to-nothing",
    "to-descriptors/0",
    "to-descriptors/../cwd/base",
    "to-own-directory/base",
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/tty",
    "/dev/stdin",
    "/dev/fd/0",
    "/dev/mem",
    "/proc/self/fd/0",
    "/proc/self/fd/3",
    "/proc/thread-self/fd/0",
    "/proc/self/mem",
    "/proc/self/environ",
    "/proc/self/cwd/base",
    *(f"/proc/{process}/root" + "/etc/passwd" for process in ("self", 1)),
    "/proc/kcore",
    "/proc",
    "/sys/kernel/notes",
    "/nonexistent/base",
    "~/.ssh/id_rsa",
    "$HOME/.ssh/id_rsa",
    "fifo",
    "socket",
    "sub",
    "sub/",
    "gone",
    "top",
    "sub/../top",
]

PROTOCOLS = [
    "json:",
    "json:{}",
    'json:{"driver":"qcow2","file":{"driver":"file","filename":"/etc/passwd"}}',
    'json:{"driver":"raw","file.filename":"/etc/passwd"}',
    "file:base",
    "file:/etc/passwd",
    "file:///etc/passwd",
    "FILE:/etc/passwd",
    "nbd:localhost:10809",
    "nbd:unix:/run/socket:exportname=x",
    "nbd://localhost/export",
    "nbd+unix:///?socket=/run/socket",
    "nbds://localhost/",
    "http://169.254.169.254/latest/meta-data",
    "https://localhost/x",
    "ftp://localhost/x",
    "ssh://root@localhost/etc/passwd",
    "iscsi://localhost/target/0",
    "rbd:pool/image",
    "gluster://localhost/volume/x",
    "host_device:/dev/vda",
    "host_cdrom:/dev/cdrom",
    "fat:rw:/etc",
    "vvfat:/etc",
    "blkdebug::/etc/passwd",
    "blkverify:/etc/passwd:/etc/passwd",
    "null-co://",
    "fd:0",
    "nvme://0000:01:00.0/1",
    "C:\\base",
    ":base",
    "base:",
    "base:x/../base",
]

BYTES = [
    b"\0",
    b"base\0",
    b"base\0.qcow2",
    b"\0/etc/passwd",
    b"base\n",
    b"\x1b[2Jbase",
    b"\rbase",
    b"ba\x7fse",
    "ba\x9bse".encode(),
    b"\xff\xfe",
    b"base\xff",
    b"\xc0\xaf\xc0\xaf",
    b"..\xc0\xafsecret",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"a" * 255 + b"b",
    b"a" * 1023,
    b"/" * 1023,
    b"../" * 341,
    b"a/" * 511 + b"a",
    b"/etc/passwd".rjust(1023, b"/"),
    b"x:" * 511,
    b"\xf0\x9f\x98\x80" * 255,
]

NAMES = [*map(os.fsencode, PLACES), *map(os.fsencode, PROTOCOLS), *BYTES]


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    pool = Pool(tmp_path)
    pool.refusal(refer(b"gone"))  # imports what is imported late
    return pool


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:40])[2:-1])
def test_a_name_that_leads_anywhere_else_opens_nothing(
    pool: Pool, name: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-35, R-36, CVE-2013-1922, CVE-2024-32498, CVE-2024-4467: for backing files of both formats, and data files."""
    monkeypatch.chdir(pool.directory)
    images = [refer(name), refer(name, format="raw"), refer(name, format=None), refer(data_file=name)]
    for image in images:
        error = pool.refusal(image)
        if name in (b"top", b"sub/../top"):  # our own file, which must be looked at to see that it is
            assert "closes a loop" in str(error)
        else:
            assert pool.foreign == []
        assert error.path == str(pool.top)


def test_at_least_sixty_names_are_tried() -> None:
    assert len(set(NAMES)) >= 60


@pytest.mark.parametrize("name", [b"base\xff", "ba\x9bse".encode(), b"\xed\xa0\x80"])
def test_a_name_that_no_terminal_should_see_is_refused_even_if_the_file_exists(pool: Pool, name: bytes) -> None:
    Path(os.fsdecode(pool.directory), os.fsdecode(name)).write_bytes(refer())
    for image in (refer(name), refer(data_file=name)):
        assert "control characters" in (message := str(pool.refusal(image))) or "not valid UTF-8" in message
        assert pool.opened == [str(pool.top)]


def test_a_name_longer_than_a_header_may_hold_is_refused(pool: Pool) -> None:
    """V23. Nothing limits a data file name but the cluster."""
    for image in (refer(b"a" * 1024), refer(data_file=b"a" * 1024), refer(data_file=b"./" * 1000 + b"base")):
        pool.refusal(image)
        assert pool.foreign == []


@pytest.mark.parametrize("format", ["vmdk", "json:{}", "file ", "raw\0", "host_cdrom", "qcow2;x", "a" * 16])
def test_a_format_that_is_no_format_opens_nothing(pool: Pool, format: str) -> None:
    """R-34."""
    pool.refusal(refer(b"base", format=format))
    assert pool.foreign == []


def test_data_files_are_not_even_looked_for_unless_allowed(pool: Pool) -> None:
    """R-37."""
    pool.top.write_bytes(refer(data_file=b"base"))
    with pytest.raises(ChainError, match="--allow-data-file"):
        resolve_chain(str(pool.top))


@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK])
def test_a_device_node_in_the_pool_is_not_opened(pool: Pool, kind: int) -> None:
    """Opening alone can rewind a tape or arm a watchdog."""
    try:
        os.mknod(pool.directory / "device", kind | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes device nodes")
    for image in (refer(b"device"), refer(b"device", format="host_device"), refer(data_file=b"device")):
        assert "device" in str(pool.refusal(image))
        assert pool.foreign == []


# Names that change their meaning between the check and the opening


def exchange(path: Path, make: Callable[[Path], None]) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    make(path)


def make_block_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(7, 0))
    except PermissionError:
        pytest.skip("only root makes device nodes")


def swaps(pool: Pool) -> Iterator[tuple[str, str, Watcher]]:
    """(what happens, what is named, the watcher that does it just before an opening)."""

    def to_secret(path: Path) -> None:
        path.symlink_to(pool.secret / path.name if path.name == "base" else pool.secret)

    file, directory = pool.directory / "base", pool.directory / "sub"
    root = str(pool.directory)

    def when(trigger: str, path: Path, make: Callable[[Path], None]) -> Watcher:
        return lambda opening: exchange(path, make) if opening == trigger else None

    yield "the file becomes a link to the secret", "base", when(root, file, to_secret)
    yield "the file becomes a link just before it is opened", "base", when("base", file, to_secret)
    yield "the file becomes a FIFO", "base", when(root, file, os.mkfifo)
    yield "the file becomes a FIFO just before it is opened", "base", when("base", file, os.mkfifo)
    yield "the file becomes a block device just before it is opened", "base", when("base", file, make_block_device)
    yield "the file is removed", "base", when(root, file, lambda path: None)
    yield "the directory becomes a link to the secret's", "sub/base", when(root, directory, to_secret)
    yield "the directory becomes a link just before it is opened", "sub/base", when("sub", directory, to_secret)


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("role", ["backing", "data file"])
def test_what_is_swapped_while_it_is_opened_is_not_followed(pool: Pool, number: int, role: str) -> None:
    """R-36: the directories are walked by descriptor, and no link is followed."""
    what, name, watcher = list(swaps(pool))[number]
    image = refer(name.encode()) if role == "backing" else refer(data_file=name.encode())
    with socket.socket() as probe:  # the lowest free descriptor before and after: nothing stays open
        lowest = probe.fileno()
    error = pool.refusal(image, during=watcher)
    with socket.socket() as probe:
        assert probe.fileno() == lowest, what
    assert isinstance(error, ChainError), what
    expected = r"is refused: it is a (FIFO|symbolic link|block device)|Too many levels|Not a directory|is missing"
    assert re.search(expected, str(error)), (what, str(error))


# Chains


def test_loops_of_every_length_end_at_the_image_that_closes_them(pool: Pool) -> None:
    """R-31."""
    for length in (1, 2, 3, 50):
        for number in range(length):
            target = f"loop{(number + 1) % length}"
            (pool.directory / f"loop{number}").write_bytes(refer(target.encode()))
        error = pool.refusal(refer(b"loop0"))
        assert error.path == str(pool.directory / f"loop{length - 1}")
        assert 'backing file "loop0"' in str(error)
        assert "closes a loop" in str(error)


def test_a_chain_of_300_layers_is_refused_by_its_depth(pool: Pool) -> None:
    """R-31."""
    for number in range(300):
        (pool.directory / f"{number}").write_bytes(refer(f"{number + 1}".encode()))
    assert "deeper than 256 backing files" in str(pool.refusal(refer(b"0")))


def test_a_layer_deep_in_the_chain_is_as_hostile_as_the_first(pool: Pool) -> None:
    (pool.directory / "sub/base").write_bytes(refer(b"../../secret/base"))
    error = pool.refusal(refer(b"sub/base"))
    assert error.path == str(pool.directory / "sub/base")
    assert pool.foreign == ["base"]


def test_raw_layers_name_nothing(pool: Pool) -> None:
    """CVE-2008-2004: what a guest wrote into a raw disk is data."""
    (pool.directory / "base").write_bytes(refer(b"/etc/passwd"))
    pool.top.write_bytes(refer(b"base", format="raw"))
    layers = resolve_chain(str(pool.top))
    for layer in layers:
        layer.storage.close()
    assert [layer.format for layer in layers] == ["qcow2", "raw"]

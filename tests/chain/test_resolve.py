"""From the path of a top image to its open, locked chain (N1-N8, F1-F6, S1-S4, D1-D4, Q76)."""

import errno
import fcntl
import json
import os
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

from nbdq.chain.policy import Policy
from nbdq.chain.resolve import ResolvedLayer, backing_path, resolve_chain
from nbdq.errors import ImageError, ImageLocked, InvalidImage, UnsupportedImage
from nbdq.locks import READER, TOLERANT_READER, WRITER, Claim, Locking, lock_image
from nbdq.storage import FileStorage
from tests.support.references import refer
from tests.support.tools import execute, requires, run


@contextmanager
def resolved(path: Path | str, **options: object) -> Iterator[list[ResolvedLayer]]:
    """The chain of ``path``, which leaves nothing open but the files of its layers."""
    before = os.listdir("/proc/self/fd")
    layers = resolve_chain(str(path), **options)  # type: ignore[arg-type]
    try:
        yield layers
    finally:
        for layer in layers:
            layer.storage.close()
            if layer.data_storage:
                layer.data_storage.close()
    assert os.listdir("/proc/self/fd") == before


def refusal(path: Path | str, **options: object) -> str:
    """The one line with which ``path`` is refused; nothing may stay open behind it."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ImageError) as caught:
        resolve_chain(str(path), **options)  # type: ignore[arg-type]
    assert os.listdir("/proc/self/fd") == before
    message = str(caught.value)
    assert message.isprintable()
    return f"{type(caught.value).__name__} {message}"


def is_locked(path: Path, newcomer: Claim = WRITER) -> bool:
    """Whether somebody keeps writers, or whoever else wants in, away from ``path``."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return not lock_image(descriptor, str(path), newcomer)
    except ImageLocked:
        return True
    finally:
        os.close(descriptor)


def write_chain(directory: Path, depth: int) -> Path:
    """A chain of ``depth`` backing files below the top, which is returned."""
    for number in range(depth + 1):
        backing = f"{number - 1}.qcow2".encode() if number else b""
        (directory / f"{number}.qcow2").write_bytes(refer(backing))
    return directory / f"{depth}.qcow2"


# What a chain is


@requires("qemu-img")
def test_layers_of_all_versions_sizes_and_cluster_sizes_come_top_first(tmp_path: Path) -> None:
    """M1, S1, S2: a shorter, a longer and a raw layer are no obstacle."""
    run("qemu-img", "create", "-q", "-f", "raw", "base.img", "3M", cwd=tmp_path)
    create = ("qemu-img", "create", "-q", "-f", "qcow2")
    options = ("compat=0.10", "cluster_size=512", "cluster_size=2M,extended_l2=on", "compression_type=zstd")
    below, below_format = "base.img", "raw"
    for number, (option, size) in enumerate(zip(options, ("2M", "1M", "4M", "2M"), strict=True)):
        run(*create, "-o", option, "-b", below, "-F", below_format, f"{number}.qcow2", size, cwd=tmp_path)
        below, below_format = f"{number}.qcow2", "qcow2"
    with resolved(tmp_path / "3.qcow2") as layers:
        names = [os.path.basename(layer.path) for layer in layers]
        assert names == ["3.qcow2", "2.qcow2", "1.qcow2", "0.qcow2", "base.img"]
        assert [layer.format for layer in layers] == ["qcow2"] * 4 + ["raw"]
        headers = [layer.header for layer in layers[:4] if layer.header]
        assert [header.guest_size >> 20 for header in headers] == [2, 4, 1, 2]
        assert [header.version for header in headers] == [3, 3, 3, 2]
        assert layers[4].header is None
        assert layers[4].storage.size() == 3 << 20
        assert all(layer.data_storage is None for layer in layers)


def test_a_raw_top_is_one_layer_whatever_its_first_bytes_say(tmp_path: Path) -> None:
    """R-34, CVE-2008-2004: a guest can write a qcow2 header into its raw disk."""
    top = tmp_path / "disk.img"
    top.write_bytes(refer(b"/etc/passwd", format="raw"))
    with resolved(top, format="raw") as layers:
        assert [(layer.format, layer.header) for layer in layers] == [("raw", None)]


def test_a_recorded_format_wins_even_if_it_is_wrong(tmp_path: Path) -> None:
    """F1."""
    (tmp_path / "base").write_bytes(refer(b"/etc/passwd", format="raw"))
    (tmp_path / "top").write_bytes(refer(b"base", format="raw"))
    with resolved(tmp_path / "top") as layers:
        assert [layer.format for layer in layers] == ["qcow2", "raw"]
    (tmp_path / "base").write_bytes(b"no header".ljust(1 << 20, b"\0"))
    (tmp_path / "top").write_bytes(refer(b"base", format="qcow2"))
    with pytest.raises(InvalidImage) as caught:
        resolve_chain(str(tmp_path / "top"))
    assert caught.value.path == str(tmp_path / "base")


def test_an_empty_format_is_none(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(512))
    (tmp_path / "top").write_bytes(refer(b"base", format=""))
    assert "has no recorded format" in refusal(tmp_path / "top")


@requires("qemu-img", "qemu-io")
def test_a_protocol_driver_recorded_as_format_reads_raw_bytes_as_in_qemu(tmp_path: Path) -> None:
    """N7."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "base", "1M", cwd=tmp_path)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "file", "top", cwd=tmp_path)
    run("qemu-io", "-r", "-c", "read -P 0x51 0 1", "top", cwd=tmp_path)  # the Q of the magic
    with resolved(tmp_path / "top") as layers:
        assert [layer.format for layer in layers] == ["qcow2", "raw"]


@pytest.mark.parametrize("format", ["vmdk", "qcow", "luks", "QCOW2", "nbd", "vpc"])
def test_other_formats_are_refused_by_name_and_not_opened(tmp_path: Path, format: str) -> None:
    os.mkfifo(tmp_path / "base")
    (tmp_path / "top").write_bytes(refer(b"base", format=format))
    message = refusal(tmp_path / "top")
    assert re.match(rf'UnsupportedImage {tmp_path}/top: format of backing file "base" .*is "{format}"', message)
    with pytest.raises(UnsupportedImage, match=f'format is "{format}"'):
        resolve_chain(str(tmp_path / "top"), format=format)


@requires("qemu-img")
@pytest.mark.parametrize(("content", "likely"), [(refer(), "qcow2"), (bytes(4096), "raw"), (b"", "raw")])
def test_a_backing_file_without_format_is_refused_with_a_command_that_mends_it(
    tmp_path: Path, content: bytes, likely: str
) -> None:
    """F2, F3, R-34."""
    directory = tmp_path / "it's an image"
    directory.mkdir()
    (directory / "base $HOME;x").write_bytes(content)
    top = directory / "top image"
    top.write_bytes(refer(b"base $HOME;x", format=None))
    message = refusal(top)
    assert message.startswith("ChainError ")
    assert 'backing file "base $HOME;x"' in message
    command = message[message.index("qemu-img rebase -u -f qcow2 -F ") :]
    assert execute("sh", "-c", command).returncode == 0
    with resolved(top) as layers:
        assert [layer.format for layer in layers] == ["qcow2", likely]


# Names


@requires("qemu-img")
@pytest.mark.parametrize(
    "name",
    [
        "b",
        "./b",
        "../b",
        "x/y",
        "z//w",
        "/abs/b",
        "//b",
        "a:b",
        "./a:b",
        "x/y:z",
        "file:b",
        "nbd://h/e",
        'json:{"a":1}',
    ],
)
def test_a_name_means_the_path_that_qemu_img_info_shows(tmp_path: Path, name: str) -> None:
    """N1, N2."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/top").write_bytes(refer(name.encode()))
    for spelling in ("sub/top", "./sub/top", "sub//top", "sub/../sub/top", str(tmp_path / "sub/top")):
        shown = json.loads(run("qemu-img", "info", "--output=json", spelling, cwd=tmp_path))
        assert backing_path(spelling, name) == shown["full-backing-filename"]
    shown = json.loads(run("qemu-img", "info", "--output=json", "top", cwd=tmp_path / "sub"))
    assert backing_path("top", name) == shown["full-backing-filename"]


def test_relative_names_start_at_the_image_that_holds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """N2: neither at our working directory nor at the top."""
    (tmp_path / "pool/old").mkdir(parents=True)
    (tmp_path / "pool/old/base").write_bytes(refer())
    (tmp_path / "pool/old/middle").write_bytes(refer(b"./base"))
    (tmp_path / "pool/top").write_bytes(refer(b"old/middle"))
    for directory, path in ((tmp_path, "pool/top"), (tmp_path / "pool/old", "../top"), (tmp_path / "pool", "top")):
        monkeypatch.chdir(directory)
        with resolved(path) as layers:
            start = path[: path.rfind("/") + 1]
            assert [layer.path for layer in layers] == [path, f"{start}old/middle", f"{start}old/./base"]


def test_absolute_names_are_taken_as_they_are(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(refer())
    (tmp_path / "top").write_bytes(refer(os.fsencode(base)))
    with resolved(tmp_path / "top") as layers:
        assert layers[1].path == str(base)


def test_a_top_named_through_a_link_has_its_backing_file_beside_the_link(tmp_path: Path) -> None:
    """N2: as in QEMU, a link to the directory works, and a link to the image in another directory does not."""
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/base").write_bytes(refer())
    (tmp_path / "pool/top").write_bytes(refer(b"base"))
    (tmp_path / "link").symlink_to("pool")
    with resolved(tmp_path / "link/top") as layers:
        assert layers[1].path == f"{tmp_path}/link/base"
    (tmp_path / "top").symlink_to("pool/top")
    assert f"({tmp_path}/base) is missing" in refusal(tmp_path / "top")
    (tmp_path / "base").symlink_to("pool/base")
    with resolved(tmp_path / "top") as layers:
        assert len(layers) == 2


def test_a_missing_layer_is_named_together_with_the_image_that_names_it(tmp_path: Path) -> None:
    """D3."""
    (tmp_path / "middle").write_bytes(refer(b"gone"))
    (tmp_path / "top").write_bytes(refer(b"middle"))
    message = refusal(tmp_path / "top")
    assert message.startswith(f'ChainError {tmp_path}/middle: backing file "gone" ({tmp_path}/gone) is missing')


def test_a_top_that_is_missing_a_directory_or_a_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert f"{tmp_path}/gone: is missing" in refusal(tmp_path / "gone")
    for name in ("fifo", ""):
        assert "cannot be opened: not a regular file or block device" in refusal(tmp_path / name)


# Loops and depth


@pytest.mark.parametrize("name", ["top", "./top", "sub/../top", "link", "hardlink"])
def test_an_image_that_backs_itself_is_refused_under_whatever_name(tmp_path: Path, name: str) -> None:
    """D1, R-31."""
    (tmp_path / "sub").mkdir()
    top = tmp_path / "top"
    top.write_bytes(refer(name.encode()))
    (tmp_path / "link").symlink_to("top")
    (tmp_path / "hardlink").hardlink_to(top)
    message = refusal(top)
    assert message.startswith(f'ChainError {top}: backing file "{name}" ({tmp_path}/{name}) closes a loop')
    assert f"as {top};" in message


def test_a_loop_is_reported_by_the_image_that_closes_it(tmp_path: Path) -> None:
    """D1: QEMU recurses until memory or descriptors are gone."""
    (tmp_path / "top").write_bytes(refer(b"a"))
    (tmp_path / "a").write_bytes(refer(b"b"))
    (tmp_path / "b").write_bytes(refer(b"a"))
    message = refusal(tmp_path / "top")
    assert message.startswith(f'ChainError {tmp_path}/b: backing file "a" ({tmp_path}/a) closes a loop')


def test_a_loop_is_found_by_name_where_inode_numbers_mean_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-31: some network and user-space file systems make them up at every look."""
    made_up = count()
    original = FileStorage.__init__

    def forget_identity(storage: FileStorage, descriptor: int, path: str) -> None:
        original(storage, descriptor, path)
        storage.identity = (0, next(made_up))

    monkeypatch.setattr(FileStorage, "__init__", forget_identity)
    (tmp_path / "top").write_bytes(refer(b"link"))
    (tmp_path / "link").symlink_to("top")
    assert "closes a loop" in refusal(tmp_path / "top")


def test_a_chain_may_have_256_backing_files_and_not_one_more(tmp_path: Path) -> None:
    """R-31."""
    write_chain(tmp_path, 257)
    with resolved(tmp_path / "256.qcow2") as layers:
        assert len(layers) == 257
    message = refusal(tmp_path / "257.qcow2")
    assert message.startswith(f'ChainError {tmp_path}/1.qcow2: backing file "0.qcow2"')
    assert "deeper than 256 backing files" in message
    with resolved(tmp_path / "257.qcow2", policy=Policy(max_depth=257)) as layers:
        assert len(layers) == 258


def test_a_chain_for_which_descriptors_do_not_suffice_is_refused_by_the_limits_name(tmp_path: Path) -> None:
    top = write_chain(tmp_path, 40)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir("/proc/self/fd")))
    limit = [number for number in range(len(used) + 20) if number not in used][19] + 1  # leaves 20, give or take
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        message = refusal(top)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert f"all {limit} file descriptors are in use; raise RLIMIT_NOFILE" in message
    assert message.startswith(f"ChainError {tmp_path}/")


# The operator's own chain


def test_an_explicit_chain_is_exactly_what_the_operator_names(tmp_path: Path) -> None:
    """F4, R-36: headers that name nothing, something missing or something forbidden are not asked."""
    for name, backing in (("top", b"gone"), ("middle", b"/etc/passwd"), ("base", b"nbd://host/export")):
        (tmp_path / name).write_bytes(refer(backing, format=None))
    (tmp_path / "elsewhere").mkdir()
    os.rename(tmp_path / "base", tmp_path / "elsewhere/base")
    below = [("qcow2", str(tmp_path / "middle")), ("qcow2", str(tmp_path / "elsewhere/base"))]
    with resolved(tmp_path / "top", backing=below) as layers:
        assert [layer.path for layer in layers] == [str(tmp_path / "top"), *(path for _, path in below)]
    with resolved(tmp_path / "top", backing=[("raw", str(tmp_path / "middle"))]) as layers:
        assert [layer.format for layer in layers] == ["qcow2", "raw"]
    with resolved(tmp_path / "top", backing=[]) as layers:
        assert len(layers) == 1


def test_an_explicit_chain_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for name in ("top", "base"):
        (tmp_path / name).write_bytes(refer())
    top, base, gone = (str(tmp_path / name) for name in ("top", "base", "gone"))
    assert f"{base}: closes a loop" in refusal(top, backing=[("qcow2", base), ("qcow2", base)])
    assert f"{top}: closes a loop" in refusal(top, backing=[("raw", top)])
    assert f"{base}: is raw and hides every layer below it" in refusal(top, backing=[("raw", base), ("qcow2", gone)])
    assert f'{base}: format is "vmdk"' in refusal(top, backing=[("vmdk", base)])
    assert f"{gone}: is missing" in refusal(top, backing=[("qcow2", gone)])
    assert "deeper than 0 backing files" in refusal(top, backing=[("raw", base)], policy=Policy(max_depth=0))


# External data files


def test_an_external_data_file_is_opened_only_where_the_operator_allows_it(tmp_path: Path) -> None:
    """R-37, CVE-2024-4467."""
    (tmp_path / "top").write_bytes(refer(data_file=b"data"))
    (tmp_path / "data").write_bytes(bytes(4096))
    message = refusal(tmp_path / "top")
    assert message.startswith(f'ChainError {tmp_path}/top: data file "data" ({tmp_path}/data) is refused')
    assert message.endswith("--allow-data-file")
    with resolved(tmp_path / "top", policy=Policy(allow_data_file=True)) as [layer]:
        assert layer.data_storage is not None
        assert layer.data_storage.path == str(tmp_path / "data")


def test_a_data_file_lies_beside_its_image_wherever_we_were_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Q76: QEMU looks in its working directory."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here/data").write_bytes(b"")
    (tmp_path / "top").write_bytes(refer(data_file=b"data"))
    (tmp_path / "data").write_bytes(b"")
    monkeypatch.chdir(tmp_path / "here")
    with resolved("../top", policy=Policy(allow_data_file=True)) as [layer]:
        assert layer.data_storage is not None
        assert layer.data_storage.path == "../data"


def test_a_data_file_that_is_missing_or_part_of_the_chain_is_refused(tmp_path: Path) -> None:
    policy = Policy(allow_data_file=True)
    (tmp_path / "top").write_bytes(refer(data_file=b"gone"))
    assert f'data file "gone" ({tmp_path}/gone) is missing' in refusal(tmp_path / "top", policy=policy)
    (tmp_path / "top").write_bytes(refer(data_file=b"top"))
    assert f'{tmp_path}/top: data file "top" ({tmp_path}/top) closes a loop' in refusal(tmp_path / "top", policy=policy)
    (tmp_path / "top").write_bytes(refer(b"base", format="raw", data_file=b"base"))
    (tmp_path / "base").write_bytes(b"")
    assert f'backing file "base" ({tmp_path}/base) closes a loop' in refusal(tmp_path / "top", policy=policy)


# Locks


def test_every_file_of_a_chain_is_locked_until_it_is_closed(tmp_path: Path) -> None:
    """L6, M5."""
    (tmp_path / "top").write_bytes(refer(b"middle"))
    (tmp_path / "middle").write_bytes(refer(b"base", format="raw", data_file=b"data"))
    files = [tmp_path / name for name in ("top", "middle", "data", "base")]
    for file in files[2:]:
        file.write_bytes(b"")
    policy = Policy(allow_data_file=True)
    with resolved(files[0], policy=policy):
        assert all(map(is_locked, files))
        with resolved(files[0], policy=policy) as again:  # L10: readers in one process get on
            assert len(again) == 3
    assert not any(map(is_locked, files))
    with resolved(files[0], policy=Policy(allow_data_file=True, locking=Locking.OFF)):
        assert not any(map(is_locked, files))


@pytest.mark.parametrize("name", ["top", "base"])
def test_a_layer_under_a_writer_is_refused_unless_sharing_is_forced(tmp_path: Path, name: str) -> None:
    """L6, L7."""
    (tmp_path / "top").write_bytes(refer(b"base"))
    (tmp_path / "base").write_bytes(refer())
    with (tmp_path / name).open("rb") as file:
        lock_image(file.fileno(), name, WRITER)
        message = refusal(tmp_path / "top")
        assert message.startswith(f'ImageLocked {tmp_path}/{name}: failed to get shared "write" lock')
        assert "-U/--force-share" in message
        with resolved(tmp_path / "top", policy=Policy(force_share=True)) as layers:
            assert len(layers) == 2
    assert not is_locked(tmp_path / "top")


def test_a_refused_chain_leaves_no_layer_open_or_locked(tmp_path: Path) -> None:
    top = write_chain(tmp_path, 5)
    for backing in (b"gone", b"../gone", b"3.qcow2", b"nbd:unix:x", b"dir", b"vmdk"):
        shutil.rmtree(tmp_path / "dir", ignore_errors=True)
        (tmp_path / "dir").mkdir()
        (tmp_path / "0.qcow2").write_bytes(refer(backing))
        assert refusal(top).startswith("ChainError ")  # which looks for open descriptors
        assert not any(is_locked(tmp_path / f"{number}.qcow2") for number in range(6))


# Writable tops


def is_writable(storage: FileStorage) -> bool:
    return fcntl.fcntl(storage.descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR


def test_of_a_writable_chain_only_the_top_and_its_data_file_can_be_written_to(tmp_path: Path) -> None:
    """D4, L6: the layers below are shared with readers, the top is not."""
    (tmp_path / "top").write_bytes(refer(b"middle", data_file=b"data"))
    (tmp_path / "middle").write_bytes(refer(b"base", format="raw", data_file=b"lower-data"))
    for name in ("data", "lower-data", "base"):
        (tmp_path / name).write_bytes(b"")
    policy = Policy(allow_data_file=True)
    for open_for, below in (({"backing": None}, 2), ({"backing": [("raw", str(tmp_path / "base"))]}, 1)):
        with resolved(tmp_path / "top", policy=policy, writable=True, **open_for) as layers:
            assert len(layers) == 1 + below
            used = {os.path.basename(file.path): file for file in (layer.storage for layer in layers)}
            used |= {os.path.basename(file.path): file for file in (layer.data_storage for layer in layers) if file}
            for name, storage in used.items():
                is_ours = name in ("top", "data")
                assert is_writable(storage) == is_ours
                assert is_locked(tmp_path / name)
                assert is_locked(tmp_path / name, READER) == is_ours
                assert not is_locked(tmp_path / name, TOLERANT_READER)
    with resolved(tmp_path / "top", policy=policy) as layers:
        assert not any(is_writable(layer.storage) for layer in layers)


def test_overlays_of_one_base_are_written_to_at_the_same_time(tmp_path: Path) -> None:
    """L10."""
    (tmp_path / "base").write_bytes(refer())
    for name in ("first", "second"):
        (tmp_path / name).write_bytes(refer(b"base"))
    with resolved(tmp_path / "first", writable=True), resolved(tmp_path / "second", writable=True):
        message = refusal(tmp_path / "base", writable=True)
    assert message.startswith(f'ImageLocked {tmp_path}/base: failed to get "write" lock')


@pytest.mark.parametrize("format", ["qcow2", "raw"])
@pytest.mark.parametrize("name", ["top", "link", "hardlink"])
def test_an_image_is_the_writable_top_of_one_disk_only(tmp_path: Path, format: str, name: str) -> None:
    """L10: also within one process, and under whatever name."""
    (tmp_path / "top").write_bytes(refer())
    (tmp_path / "link").symlink_to("top")
    (tmp_path / "hardlink").hardlink_to(tmp_path / "top")
    with resolved(tmp_path / "top", format=format, writable=True):
        for other in ("qcow2", "raw"):
            message = refusal(tmp_path / name, format=other, writable=True)
            assert message.startswith(f'ImageLocked {tmp_path}/{name}: failed to get "write" lock')
            assert message.endswith(
                "stop the other process, or serve the image with -r/--read-only if that only reads it"
            )
            assert "lock" in refusal(tmp_path / name, format=other)
    with resolved(tmp_path / name, format=format, writable=True):
        pass


def test_a_data_file_serves_one_writable_image_only(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).write_bytes(refer(data_file=b"data"))
    (tmp_path / "data").write_bytes(b"")
    policy = Policy(allow_data_file=True)
    with resolved(tmp_path / "first", policy=policy, writable=True):
        assert refusal(tmp_path / "second", policy=policy, writable=True).startswith(f"ImageLocked {tmp_path}/data: ")
        assert refusal(tmp_path / "data", format="raw", writable=True).startswith(f"ImageLocked {tmp_path}/data: ")
        assert refusal(tmp_path / "data", format="raw").startswith(f"ImageLocked {tmp_path}/data: ")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM, errno.ETXTBSY])
@pytest.mark.parametrize("name", ["top", "data"])
def test_what_may_only_be_read_is_refused_to_writers_with_the_switch_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    (tmp_path / "top").write_bytes(refer(data_file=b"data"))
    (tmp_path / "data").write_bytes(b"")
    original = os.open

    def protect(path: str, flags: int, *arguments: int, **options: int) -> int:
        if os.path.basename(path) == name and flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(number, os.strerror(number), path)
        return original(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", protect)
    policy = Policy(allow_data_file=True)
    message = refusal(tmp_path / "top", policy=policy, writable=True)
    assert message.startswith(f"ChainError {tmp_path}/top: ")
    assert message.endswith(f"cannot be opened for writing: {os.strerror(number)}; serve the image with -r/--read-only")
    with resolved(tmp_path / "top", policy=policy) as [layer]:
        assert layer.data_storage is not None


def test_nobody_writes_to_an_image_that_others_may_change(tmp_path: Path) -> None:
    (tmp_path / "top").write_bytes(refer())
    message = refusal(tmp_path / "top", policy=Policy(force_share=True), writable=True)
    assert message == (
        f"ChainError {tmp_path}/top: cannot be written to while others may change it; "
        "leave out -U/--force-share, or serve the image with -r/--read-only"
    )


def test_a_chain_that_cannot_be_written_to_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "top").write_bytes(refer(b"gone"))
    before = (tmp_path / "top").stat()
    refusal(tmp_path / "top", writable=True)  # which looks for open descriptors
    after = (tmp_path / "top").stat()
    assert (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size)
    assert not is_locked(tmp_path / "top")


@requires("qemu-img")
def test_the_crafted_images_are_what_qemu_reads(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(refer())
    (tmp_path / "top").write_bytes(refer(b"base"))
    run("qemu-img", "check", tmp_path / "top")
    shown = json.loads(run("qemu-img", "info", "--backing-chain", "--output=json", tmp_path / "top"))
    assert [image.get("backing-filename") for image in shown] == ["base", None]
    (tmp_path / "data").write_bytes(bytes(1 << 20))
    (tmp_path / "top").write_bytes(refer(data_file=b"data"))
    assert "data file: data" in run("qemu-img", "info", "top", cwd=tmp_path)

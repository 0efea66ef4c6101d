"""New images: what is refused, what a crash can leave, and what a failure leaves of what was there."""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbdq.chain import create as chain_create
from nbdq.chain.create import create_qcow2, create_raw
from nbdq.errors import ImageError, ImageLocked, InvalidImage, NbdqError
from nbdq.locks import WRITER, lock_image
from nbdq.qcow2.create import CreateOptions, Preallocation, create_image, plan_image, write_disk
from nbdq.qcow2.features import CompressionType
from nbdq.qcow2.format import read_header
from nbdq.qcow2.refcount_widths import unpack
from nbdq.storage import Data, FileStorage
from tests.qcow2.minimal import stored

METADATA = Preallocation.METADATA

LAYOUTS: list[dict[str, Any]] = [
    {"size": 0},
    {"size": 1},
    {"size": 3 << 20, "version": 2},
    {"size": 2 << 50},
    {"size": 64 << 20, "preallocation": METADATA},
    {"size": 1 << 20, "cluster_size": 512, "preallocation": METADATA, "refcount_bits": 1},
    {"size": 1 << 20, "cluster_size": 512, "preallocation": METADATA, "refcount_bits": 2},
    {"size": 4 << 20, "cluster_size": 512, "preallocation": METADATA, "refcount_bits": 64},
    {"size": 1 << 30, "cluster_size": 512, "refcount_bits": 64},
    {"size": 8 << 20, "preallocation": METADATA, "extended_l2": True, "cluster_size": 16 << 10},
    {"size": 8 << 20, "data_file_name": "data", "data_file_raw": True},
    {"size": 8 << 20, "backing_name": "base", "backing_format": "raw"},
]

IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"cluster_size": 256}, "cluster_size is 256"),
    ({"cluster_size": 4 << 20}, "cluster_size is 4194304"),
    ({"cluster_size": 3000}, "cluster_size is 3000"),
    ({"cluster_size": 0}, "cluster_size is 0"),
    ({"cluster_size": -512}, "cluster_size is -512"),
    ({"extended_l2": True, "cluster_size": 8192}, "extended_l2 needs clusters"),
    ({"refcount_bits": 3}, "refcount_bits is 3"),
    ({"refcount_bits": 128}, "refcount_bits is 128"),
    ({"version": 4}, "version is 4"),
    ({"version": 2, "refcount_bits": 8}, "refcount_bits=8 needs version 3"),
    ({"version": 2, "extended_l2": True}, "extended_l2 needs version 3"),
    ({"version": 2, "lazy_refcounts": True}, "lazy_refcounts needs version 3"),
    ({"version": 2, "data_file_name": "data"}, "data_file needs version 3"),
    ({"version": 2, "compression_type": CompressionType.ZSTD}, "compression_type=zstd needs version 3"),
    ({"size": -1}, "too large"),
    ({"size": (2 << 50) + 1}, "too large"),
    ({"size": 1 << 70}, "too large"),
    ({"size": (128 << 30) + 512, "cluster_size": 512}, "too large"),
    ({"size": 127 << 30, "cluster_size": 512, "refcount_bits": 64, "preallocation": METADATA}, "too large"),
    ({"size": 1 << 60, "cluster_size": 2 << 20, "preallocation": METADATA}, "too large"),
    ({"size": 1 << 60, "cluster_size": 2 << 20, "data_file_name": "data", "data_file_raw": True}, "too large"),
    ({"backing_name": "base"}, "backing_file needs its format"),
    ({"backing_format": "raw"}, "backing_fmt cannot be used without"),
    ({"backing_name": "", "backing_format": "raw"}, "backing_file is an empty name"),
    ({"backing_name": "a\nb", "backing_format": "raw"}, "control character"),
    ({"backing_name": "x" * 1024, "backing_format": "raw"}, "longer than 1023"),
    ({"backing_name": "x" * 400, "backing_format": "raw", "cluster_size": 512}, "do not fit into the first cluster"),
    ({"backing_name": "base", "backing_format": "raw", "preallocation": METADATA}, "preallocation would hide"),
    ({"data_file_raw": True}, "data_file_raw requires data_file"),
    (
        {"data_file_raw": True, "data_file_name": "data", "backing_name": "base", "backing_format": "raw"},
        "data_file_raw cannot be used with a backing file",
    ),
]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_a_new_image_counts_every_cluster_once_and_no_other(options: dict[str, Any]) -> None:
    storage = stored(b"")
    layout = create_image(storage, CreateOptions(**options))
    header = read_header(storage)
    assert not header.warnings
    cluster_size = header.cluster_size
    table = np.frombuffer(
        storage.read(header.refcount_table_offset, header.refcount_table_clusters * cluster_size), dtype=">u8"
    )
    blocks = [storage.read(int(offset), cluster_size) for offset in table[table != 0]]
    counts = np.concatenate([unpack(block, header.refcount_order) for block in blocks])
    assert np.all(table[len(blocks) :] == 0)
    assert np.all(counts[: layout.cluster_count] == 1)
    assert np.all(counts[layout.cluster_count :] == 0)
    assert layout.cluster_count == -(-storage.size() // cluster_size)


def test_the_size_of_a_disk_is_rounded_up_to_sectors() -> None:
    storage = stored(b"")
    create_image(storage, CreateOptions(size=1000))
    assert read_header(storage).guest_size == 1024


@pytest.mark.parametrize(("options", "reason"), IMPOSSIBLE, ids=[f"{options}"[:60] for options, _ in IMPOSSIBLE])
def test_an_impossible_image_is_refused_before_a_file_is_touched(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"old")
    with pytest.raises(NbdqError, match=reason) as refused:
        create_qcow2(str(path), CreateOptions(**{"size": 1 << 20, **options}))
    assert "\n" not in str(refused.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["image"]


def test_the_largest_disks_need_no_more_memory_or_time_than_small_ones() -> None:
    layout = plan_image(CreateOptions(size=16 << 40, preallocation=METADATA))
    assert layout.l2_table_count == 32768
    # For 2^28 clusters of data, 32768 L2 tables, an L1 table of 4, the header, 2 of the refcount table, and themselves.
    assert layout.refcount_block_count == 8194


class Log(FileStorage):
    """A file that remembers the acts that changed it."""

    def __init__(self, descriptor: int, path: str) -> None:
        super().__init__(descriptor, path)
        self.acts: list[tuple[str, int, bytes]] = []

    def _pwritev(self, buffers: Sequence[Data], offset: int) -> int:
        self.acts.append(("write", offset, b"".join(buffers)))
        return super()._pwritev(buffers, offset)

    def _fdatasync(self) -> None:
        self.acts.append(("sync", 0, b""))
        super()._fdatasync()

    def _ftruncate(self, size: int) -> None:
        self.acts.append(("truncate", size, b""))
        super()._ftruncate(size)


@pytest.mark.parametrize("options", [case for case in LAYOUTS if case["size"] < 1 << 40], ids=str)
def test_no_crash_leaves_an_image_that_is_not_complete(options: dict[str, Any]) -> None:
    descriptor = os.memfd_create("image", os.MFD_CLOEXEC)
    storage = Log(descriptor, "disk.qcow2")
    create_image(stored(b""), CreateOptions(size=1 << 20))
    create_image(storage, CreateOptions(size=5 << 20))  # an older image
    storage.acts.clear()
    create_image(storage, CreateOptions(**options))
    *before, barrier, publication, last = storage.acts
    # Nothing of the old image is left, whatever is done or lost from then on.
    assert before[:2] == [("truncate", 0, b""), ("sync", 0, b"")]
    assert all(name != "write" or offset >= 512 for name, offset, _ in before)  # so any subset of it is no image
    assert (barrier[0], last[0]) == ("sync", "sync")
    assert (publication[0], publication[1], len(publication[2])) == ("write", 0, 512)  # a sector does not tear


def test_an_unfinished_image_is_refused() -> None:
    storage = Log(os.memfd_create("image", os.MFD_CLOEXEC), "disk.qcow2")
    create_image(storage, CreateOptions(size=1 << 20))
    storage.write(0, bytes(512))
    with pytest.raises(InvalidImage):
        read_header(storage)


class Medium:
    """Where all files are: it fails from act number ``fatal`` on."""

    def __init__(self, fatal: int, code: int) -> None:
        self.fatal = fatal
        self.code = code
        self.acts = 0

    def failing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.acts += 1
            if self.acts > self.fatal:
                raise OSError(self.code, os.strerror(self.code))
            return original(*arguments)

        return call

    @property
    def failed(self) -> bool:
        return self.acts > self.fatal


def failures(monkeypatch: pytest.MonkeyPatch, code: int) -> Iterator[Medium]:
    """A medium for every act that changes files, which fails there, and at last one that does not fail."""
    for fatal in range(1000):
        medium = Medium(fatal, code)
        with monkeypatch.context() as patch:
            for name in ("_pwritev", "_fdatasync", "_fallocate", "_ftruncate"):
                patch.setattr(FileStorage, name, medium.failing(getattr(FileStorage, name)))
            yield medium
        if not medium.failed:
            return


def leftovers(directory: Path) -> dict[str, bytes]:
    """The files of a directory, as far as they are small."""
    return {path.name: path.read_bytes()[:16] for path in directory.iterdir()}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("existing", [(), ("image",), ("data",), ("image", "data")], ids=str)
def test_a_failure_at_any_point_leaves_nothing_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, existing: tuple[str, ...]
) -> None:
    options = CreateOptions(size=1 << 20, data_file_name="data", preallocation=Preallocation.FULL)
    old = {name: b"old " + name.encode() for name in existing}
    for medium in failures(monkeypatch, code):
        for name, content in old.items():
            (tmp_path / name).write_bytes(content)
        try:
            create_qcow2(str(tmp_path / "image"), options)
        except OSError:
            assert medium.failed
            # Files that were to be replaced may be gone if the failure came last; nothing else is there.
            assert leftovers(tmp_path).items() <= old.items()
        else:
            assert not medium.failed
    assert sorted(leftovers(tmp_path)) == ["data", "image"]
    assert (tmp_path / "data").stat().st_size == 1 << 20


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failure_at_any_point_leaves_the_old_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"old")
    for medium in failures(monkeypatch, code):
        try:
            create_qcow2(str(path), CreateOptions(size=1 << 20, preallocation=METADATA))
        except OSError:
            assert medium.failed
            assert leftovers(tmp_path) == {"image": b"old"}
        else:
            assert not medium.failed
    assert path.read_bytes()[:4] == b"QFI\xfb"


def test_an_old_image_is_gone_before_its_data_is_and_the_new_one_begins_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("image", "data"):
        (tmp_path / name).write_bytes(b"old")
    steps: list[str] = []
    rename, sync, write = os.rename, chain_create.sync_directory_of, FileStorage._pwritev

    def renamed(source: str, target: str) -> None:
        steps.append(f"rename {os.path.basename(target)} among {sorted({'image', 'data'} & {*os.listdir(tmp_path)})}")
        rename(source, target)

    def synced(path: str) -> None:
        steps.append("sync names")
        sync(path)

    def written(self: FileStorage, buffers: Sequence[Data], offset: int) -> int:
        if bytes(buffers[0][:4]) == b"QFI\xfb":
            steps.append("header")
        return write(self, buffers, offset)

    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(chain_create, "sync_directory_of", synced)
    monkeypatch.setattr(FileStorage, "_pwritev", written)
    create_qcow2(str(tmp_path / "image"), CreateOptions(size=1 << 20, data_file_name="data"))
    assert steps == [
        "sync names",
        "rename data among ['data']",
        "sync names",
        "header",
        "rename image among ['data']",
        "sync names",
    ]


def test_a_replaced_file_keeps_its_mode_and_links_lead_to_the_new_one(tmp_path: Path) -> None:
    path, link, hard_link = tmp_path / "image", tmp_path / "link", tmp_path / "hard"
    path.write_bytes(b"old")
    path.chmod(0o660)
    link.symlink_to("image")
    hard_link.hardlink_to(path)
    create_qcow2(str(link), CreateOptions(size=1 << 20))
    assert link.is_symlink()
    assert path.read_bytes()[:4] == b"QFI\xfb"
    assert path.stat().st_mode & 0o777 == 0o660
    assert hard_link.read_bytes() == b"old"


def test_a_new_file_is_made_where_a_dangling_link_leads(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("image")
    create_qcow2(str(tmp_path / "link"), CreateOptions(size=1 << 20))
    assert (tmp_path / "image").is_file()
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("alias", ["./base", "symbolic", "hard"])
def test_an_overlay_cannot_replace_the_image_below_it_by_another_name(tmp_path: Path, alias: str) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"precious")
    (tmp_path / "symbolic").symlink_to("base")
    (tmp_path / "hard").hardlink_to(base)
    options = CreateOptions(size=1 << 20, backing_name="base", backing_format="raw")
    with pytest.raises(ImageError, match="part of the disk"):
        create_qcow2(str(tmp_path / alias), options)
    assert base.read_bytes() == b"precious"


@pytest.mark.parametrize("exists", [False, True])
def test_an_image_cannot_be_its_own_data_file(tmp_path: Path, exists: bool) -> None:
    if exists:
        (tmp_path / "image").write_bytes(b"old")
    with pytest.raises(ImageError, match="part of the disk"):
        create_qcow2(str(tmp_path / "image"), CreateOptions(size=1 << 20, data_file_name="./image"))
    assert os.listdir(tmp_path) == (["image"] if exists else [])


def test_a_raw_disk_in_use_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"old")
    user = FileStorage.open(str(path), writable=True)
    lock_image(user.descriptor, str(path), WRITER)
    with pytest.raises(ImageLocked):
        create_raw(str(path), 1 << 20)
    user.close()
    assert path.read_bytes() == b"old"


def test_a_file_being_made_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "disk")
    write = FileStorage._pwritev

    def second(self: FileStorage, buffers: Sequence[Data], offset: int) -> int:
        with pytest.raises(ImageLocked):
            create_raw(path, 1 << 20)
        return write(self, buffers, offset)

    monkeypatch.setattr(FileStorage, "_pwritev", second)
    create_raw(path, 1 << 20)
    assert os.path.getsize(path) == 1 << 20


@pytest.mark.parametrize("preallocation", [Preallocation.FALLOC, Preallocation.FULL])
def test_preallocated_space_is_there(tmp_path: Path, preallocation: Preallocation) -> None:
    storage = FileStorage.create(str(tmp_path / "disk"))
    write_disk(storage, 3 << 20, preallocation)
    assert storage.allocated_size() >= 3 << 20
    assert storage.read(0, 4 << 20) == bytes(3 << 20)
    storage.close()

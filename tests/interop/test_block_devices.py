"""Images on block devices: no length to change, no room but what is there (L11; reliability.md 2.5).

The devices are loop devices over sparse files, which needs the rights of root.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdq.chain.policy import Policy
from nbdq.chain.raw_disk import RawDisk
from nbdq.chain.resolve import resolve_chain
from nbdq.errors import ChainError, ImageLocked
from nbdq.storage import FileStorage
from tests.support.tools import execute, requires, run

pytestmark = requires("losetup", "qemu-img", "qemu-io")

MIB = 1 << 20


@contextmanager
def loop_device(file: Path, *options: str) -> Iterator[Path]:
    """A block device that shows ``file``; skips the test where none can be had."""
    done = execute("losetup", "--find", "--show", *options, file)
    if done.returncode:
        pytest.skip(f"losetup cannot make a loop device here: {done.stderr.strip()}")
    device = Path(done.stdout.strip())
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """What the device is made of: 4 MiB, all zeros."""
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 4 * MIB)
    return path


@pytest.fixture
def device(file: Path) -> Iterator[Path]:
    with loop_device(file) as device:
        yield device


@contextmanager
def raw_disk(device: Path) -> Iterator[RawDisk]:
    [layer] = resolve_chain(str(device), format="raw", writable=True)
    disk = RawDisk(layer.storage)
    try:
        yield disk
    finally:
        disk.close()


def read(disk: RawDisk, offset: int, length: int) -> bytes:
    view = memoryview(bytearray(length))
    disk.read_into(offset, view)
    return bytes(view)


def test_a_raw_disk_on_a_device_is_as_long_as_the_device_and_keeps_what_it_is_given(file: Path, device: Path) -> None:
    with raw_disk(device) as disk:
        assert disk.size == 4 * MIB
        disk.write(disk.size - 512, memoryview(b"x" * 512))
        assert disk.write_cached(MIB, memoryview(b"y" * MIB))
        disk.flush()
        assert file.read_bytes() == bytes(MIB) + b"y" * MIB + bytes(2 * MIB - 512) + b"x" * 512
        run("qemu-io", "-r", "-f", "raw", "-U", "-c", f"read -P 0x79 {MIB} {MIB}", device)


def test_space_of_a_device_is_given_back_and_zeroed_as_the_device_can(file: Path, device: Path) -> None:
    with raw_disk(device) as disk:
        disk.write(0, memoryview(b"x" * 4 * MIB))
        disk.flush()
        full = file.stat().st_blocks
        disk.zero(0, MIB, unmap=False)
        disk.zero(MIB, MIB, unmap=True)
        disk.zero(2 * MIB - 512, 1024, unmap=True)
        disk.discard(3 * MIB, MIB)
        disk.flush()
        assert read(disk, 0, 2 * MIB + 512) == bytes(2 * MIB + 512)
        assert read(disk, 2 * MIB + 512, MIB - 512) == b"x" * (MIB - 512)
        assert file.stat().st_blocks < full
        assert disk.size == file.stat().st_size == 4 * MIB
        assert not disk.reads_zero(0, 512)  # a device does not tell its holes
        with pytest.raises(OSError, match="zeroing may take as long") as caught:
            disk.zero(0, MIB, unmap=True, fast=True)
        assert caught.value.errno == errno.EOPNOTSUPP


def test_a_device_on_which_we_write_is_locked_as_by_qemu(device: Path) -> None:
    """L11."""
    run("qemu-img", "create", "-q", "-f", "qcow2", device, "2M")
    for format in ("qcow2", "raw"):
        [layer] = resolve_chain(str(device), format=format, writable=True)
        done = execute("qemu-io", "-f", format, "-c", "write 0 512", device)
        assert done.returncode == 1
        assert "lock\nIs another process using the image" in done.stderr
        with pytest.raises(ImageLocked):
            resolve_chain(str(device), format=format)
        layer.storage.close()


def test_a_write_protected_device_is_refused_to_writers_before_anything_is_written(file: Path) -> None:
    """Linux opens it for writing, and fails the first write."""
    run("qemu-img", "create", "-q", "-f", "qcow2", file, "2M")
    os.truncate(file, 4 * MIB)
    with loop_device(file, "--read-only") as device:
        for format in ("qcow2", "raw"):
            with pytest.raises(ChainError) as caught:
                resolve_chain(str(device), format=format, writable=True)
            assert str(caught.value) == (
                f"{device}: cannot be opened for writing: Operation not permitted; serve the image with -r/--read-only"
            )
            for layer in resolve_chain(str(device), format=format):
                layer.storage.close()


def test_a_device_cannot_be_made_longer(device: Path) -> None:
    """Who tries has a bug, and must not take it for success."""
    storage = FileStorage.open(str(device), writable=True)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        storage.write(4 * MIB, b"x" * 512)
    assert caught.value.errno == errno.ENOSPC
    assert storage.failure is None
    storage.close()


def test_a_data_file_on_a_device_is_written_to_only_beneath_a_named_directory(file: Path, tmp_path: Path) -> None:
    """R-36, R-37."""
    with loop_device(file) as device:
        top = tmp_path / "top"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={device},data_file_raw=on", top, "4M")
        with pytest.raises(ChainError, match="outside the allowed directories"):
            resolve_chain(str(top), policy=Policy(allow_data_file=True), writable=True)
        policy = Policy(allow_data_file=True, roots=("/dev",))
        [layer] = resolve_chain(str(top), policy=policy, writable=True)
        assert layer.data_storage is not None
        layer.data_storage.write(0, b"x" * 512)
        layer.data_storage.close()
        layer.storage.close()

"""Images on block devices: no length to change, no room but what is there (L11; reliability.md 2.5).

The devices are loop devices over sparse files, which needs the rights of root.
"""

import errno
import json
import os
import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from nbdq.block import Kind, WritableBlockDevice
from nbdq.chain.clusters import ClusterCache
from nbdq.chain.open import open_writable
from nbdq.chain.overlay import OverlayDisk
from nbdq.chain.policy import Policy
from nbdq.chain.raw_disk import RawDisk
from nbdq.chain.resolve import resolve_chain
from nbdq.errors import ChainError, ImageLocked
from nbdq.storage import FileStorage
from tests.support.libnbd import nbdsh
from tests.support.serving import serve
from tests.support.tools import execute, requires, run

pytestmark = requires("losetup", "qemu-img", "qemu-io")

MIB = 1 << 20
NO_ROOM = f"Errno {errno.ENOSPC}"


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
    with closing(ClusterCache(budget=MIB)) as clusters:
        disk = open_writable(str(device), format="raw", policy=Policy(), clusters=clusters)
        assert isinstance(disk, RawDisk)
        with closing(disk):
            yield disk


def read(disk: WritableBlockDevice, offset: int, length: int) -> bytes:
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


@pytest.mark.parametrize("sector", [512, 4096])
def test_space_of_a_device_is_given_back_and_zeroed_as_the_device_can(file: Path, sector: int) -> None:
    """Whatever its sectors: a guest's are 512 bytes long."""
    with loop_device(file, f"--sector-size={sector}") as device, raw_disk(device) as disk:
        disk.write(0, memoryview(b"x" * 4 * MIB))
        disk.flush()
        full = file.stat().st_blocks
        disk.zero(0, MIB, unmap=False)
        disk.zero(MIB, MIB, unmap=True)
        disk.zero(2 * MIB - 512, 1024, unmap=True)
        disk.discard(3 * MIB, MIB)
        disk.discard(3 * MIB - 512, 512)
        disk.flush()
        assert read(disk, 0, 2 * MIB + 512) == bytes(2 * MIB + 512)
        assert read(disk, 2 * MIB + 512, MIB - 1024) == b"x" * (MIB - 1024)
        assert file.stat().st_blocks < full
        assert disk.size == file.stat().st_size == 4 * MIB
        assert [status.kind.tolist() for status in disk.status(0, 4 * MIB)] == [[Kind.DATA]]  # devices do not tell
        disk.zero(3 * MIB, MIB // 2, unmap=True, fast=True)
        with pytest.raises(OSError, match="zeros would have to be written") as caught:  # the device may write them
            disk.zero(0, MIB, unmap=False, fast=True)
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
    with pytest.raises(OSError, match=NO_ROOM):
        storage.write(4 * MIB, b"x" * 512)
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


# QCOW2 on devices


@contextmanager
def qcow2_disk(device: Path) -> Iterator[OverlayDisk]:
    with closing(ClusterCache(budget=MIB)) as clusters:
        disk = open_writable(str(device), format="qcow2", policy=Policy(), clusters=clusters)
        assert isinstance(disk, OverlayDisk)
        with closing(disk):
            yield disk


@pytest.fixture
def used_device(file: Path) -> Iterator[Path]:
    """A device full of what somebody else has left there, and which ends inside a cluster."""
    file.write_bytes(b"\xaa" * (4 * MIB + 3 * 512))
    with loop_device(file) as device:
        yield device


def assert_is_sound(device: Path, *, leaks: bool = False) -> None:
    """QEMU finds no errors; and no leaks, unless there was only one flush since something was freed."""
    done = execute("qemu-img", "check", "-U", "-f", "qcow2", device)
    assert done.returncode in ((0, 3) if leaks else (0,)), done.stdout + done.stderr


def assert_qemu_reads(device: Path, content: bytearray, tmp_path: Path) -> None:
    (tmp_path / "expected").write_bytes(content)
    run("qemu-img", "compare", "-U", "-f", "qcow2", "-F", "raw", device, tmp_path / "expected")


def written_until_full(disk: WritableBlockDevice, chunk: int) -> int:
    """Guest offset of the first chunk for which there was no room; all before it are written."""
    for offset in range(0, disk.size, chunk):
        try:
            disk.write(offset, memoryview(b"a" * chunk))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return offset
    raise AssertionError("there was room for everything")


def test_what_a_device_held_before_is_never_seen_by_the_guest(used_device: Path, tmp_path: Path) -> None:
    """A file is zeros behind its end; a device is somebody's old disk."""
    run("qemu-img", "create", "-q", "-f", "qcow2", used_device, "3M")
    expected = bytearray(3 * MIB)
    with qcow2_disk(used_device) as disk:
        for offset in (5, 100_000, MIB, 2 * MIB + 512, 3 * MIB - 1):
            disk.write(offset, memoryview(b"x"))
            expected[offset] = ord("x")
        disk.zero(512, 1024, unmap=False)
        assert read(disk, 0, disk.size) == expected
        disk.flush()
        assert_qemu_reads(used_device, expected, tmp_path)
    assert_is_sound(used_device)
    assert_qemu_reads(used_device, expected, tmp_path)


@pytest.mark.parametrize(
    "options",
    ["cluster_size=512,refcount_bits=64", "cluster_size=4k", "cluster_size=64k,extended_l2=on", "cluster_size=64k"],
)
def test_on_a_full_device_the_write_that_needs_room_fails_and_everything_else_goes_on(
    used_device: Path, tmp_path: Path, options: str
) -> None:
    """With small clusters and wide refcounts it is the refcount table that has to grow on the way."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, used_device, "16M")
    expected = bytearray(16 * MIB)
    chunk = 16 << 10
    with qcow2_disk(used_device) as disk:
        offset = written_until_full(disk, chunk)
        assert offset > 3 * MIB  # or it was not full
        expected[:offset] = b"a" * offset
        # Of the failed write there may be a part, and nothing else.
        part = read(disk, offset, chunk)
        assert set(part) <= set(b"\0a")
        expected[offset : offset + chunk] = part
        assert read(disk, 0, disk.size) == expected

        disk.flush()
        assert_is_sound(used_device, leaks=True)
        assert_qemu_reads(used_device, expected, tmp_path)

        for again in (12 * MIB, 15 * MIB, 16 * MIB - chunk):  # elsewhere, and where a table would be needed, too
            with pytest.raises(OSError, match=NO_ROOM):
                disk.write(again, memoryview(b"b" * chunk))
        disk.write(7, memoryview(b"c" * (2 * MIB)))
        expected[7 : 7 + 2 * MIB] = b"c" * (2 * MIB)
        disk.flush()
        assert read(disk, 0, disk.size) == expected
        assert_is_sound(used_device, leaks=True)

        disk.discard(MIB, MIB)  # room again, once it is durable that nothing is there
        disk.flush()
        expected[MIB : 2 * MIB] = bytes(MIB)
        disk.write(12 * MIB, memoryview(b"d" * (MIB // 2)))
        expected[12 * MIB : 12 * MIB + MIB // 2] = b"d" * (MIB // 2)
        assert read(disk, 0, disk.size) == expected
    assert_is_sound(used_device)
    assert_qemu_reads(used_device, expected, tmp_path)


OPTIONS = ("cluster_size=512,refcount_bits=64", "cluster_size=4k,compat=0.10", "cluster_size=16k,extended_l2=on")


@pytest.mark.parametrize("seed", range(3))
def test_whatever_fails_on_a_full_device_nothing_else_changes(used_device: Path, tmp_path: Path, seed: int) -> None:
    """A request that found no room has left old and new data in its own range, and the image has no leak at the end."""
    print(f"seed {seed}")
    chance = random.Random(seed)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", OPTIONS[seed], used_device, "8M")
    expected = bytearray(8 * MIB)
    failures = 0
    for _ in range(2):
        with qcow2_disk(used_device) as disk:
            for _ in range(120):
                offset = chance.randrange(8 << 11) * 512 + chance.choice((0, 0, 7))
                span = slice(offset, min(offset + chance.choice((1, 512, 4096, 300_000)), disk.size))
                before, new = bytes(expected[span]), bytes(span.stop - offset)
                try:
                    match chance.randrange(6):
                        case 0 | 1 | 2:
                            new = chance.randbytes(len(new))
                            disk.write(offset, memoryview(new))
                        case 3 | 4:
                            disk.zero(offset, len(new), unmap=chance.random() < 0.5)
                        case 5:
                            disk.flush()
                            new = before
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    failures += 1
                    now = read(disk, offset, len(new))
                    assert all(byte in choice for byte, *choice in zip(now, before, new, strict=True))
                    new = now
                expected[span] = new
            assert read(disk, 0, disk.size) == expected
        assert_is_sound(used_device)
        assert_qemu_reads(used_device, expected, tmp_path)
    assert failures > 0  # else the device was too large to prove anything


def test_an_image_on_a_device_ends_where_its_last_cluster_does_and_not_where_the_device_does(
    device: Path, tmp_path: Path
) -> None:
    """What is allocated lies behind what is there, without a gap, so that the device can be extended in time."""
    run("qemu-img", "create", "-q", "-f", "qcow2", device, "3M")
    before = json.loads(run("qemu-img", "check", "--output=json", "-f", "qcow2", device))["image-end-offset"]
    with qcow2_disk(device) as disk:
        disk.write(0, memoryview(b"x" * MIB))
    after = json.loads(run("qemu-img", "check", "--output=json", "-f", "qcow2", device))["image-end-offset"]
    assert after == before + MIB + (64 << 10)  # an L2 table


def test_whoever_extends_the_device_is_told_in_time_and_once(used_device: Path) -> None:
    """QEMU's block-set-write-threshold: so thin volumes grow with what is in them (reliability.md 2.5)."""
    run("qemu-img", "create", "-q", "-f", "qcow2", used_device, "16M")
    told: list[int] = []
    with qcow2_disk(used_device) as disk:
        allocator = disk.top.allocator
        allocator.watch(2 * MIB, told.append)
        for offset in range(0, MIB, 64 << 10):
            disk.write(offset, memoryview(b"x" * 512))
        disk.write(0, memoryview(b"x" * MIB))  # all of it in place
        assert told == []
        for offset in range(MIB, 3 * MIB, 64 << 10):
            disk.write(offset, memoryview(b"x" * 512))
        assert len(told) == 1
        assert 2 * MIB < told[0] <= 2 * MIB + (64 << 10)
        allocator.watch(4 * MIB - (64 << 10), told.append)
        with pytest.raises(OSError, match=NO_ROOM):
            disk.write(3 * MIB, memoryview(b"x" * 4 * MIB))
        assert told[1:] == [4 * MIB]


# Over the wire


@requires("/usr/bin/python3")
def test_a_client_of_a_full_device_is_told_enospc_for_that_request_and_served_on(
    used_device: Path, tmp_path: Path
) -> None:
    """P98, reliability.md 2.5."""
    run("qemu-img", "create", "-q", "-f", "qcow2", used_device, "16M")
    (tmp_path / "data").write_bytes(b"a" * MIB)
    script = """
h.connect_unix(socket)
offset = 0
while True:
    try:
        h.pwrite(data[:65536], offset)
    except nbd.Error as error:
        assert error.errno == "ENOSPC", error
        break
    offset += 65536
assert offset > 3 << 20
assert h.pread(offset, 0) == data[:1] * offset
assert set(h.pread(65536, offset)) <= {0, ord("a")}
h.flush()
assert failure(lambda: h.pwrite(data, 15 << 20, nbd.CMD_FLAG_FUA))[0] == "ENOSPC"
h.pwrite(b"b" * 65536, 5, nbd.CMD_FLAG_FUA)
h.trim(1 << 20, 1 << 20)
h.flush()
h.pwrite(b"c" * 65536, 8 << 20)
h.flush()
assert h.pread(65536 + 2, 4) == b"a" + b"b" * 65536 + b"a"
assert h.pread(65536, 8 << 20) == b"c" * 65536
h.shutdown()
"""
    with serve(used_device) as server:
        nbdsh(script, socket=server.socket, data=tmp_path / "data")
        assert_is_sound(used_device, leaks=True)
    assert_is_sound(used_device)


def test_clients_read_back_what_they_write_to_a_raw_device(file: Path, device: Path) -> None:
    with serve("-f", "raw", device) as server:
        write = ("write -P 1 0 1M", "write -P 2 700000 70000", "write -z 64k 64k", "discard 2M 1M", "flush")
        read = ("read -P 1 0 64k", "read -P 0 64k 64k", "read -P 2 700000 70000", "read -P 0 2M 2M")
        run("qemu-io", "-f", "raw", *(word for line in (*write, *read) for word in ("-c", line)), server.uri())
        assert file.read_bytes()[700_000:770_000] == b"\2" * 70_000

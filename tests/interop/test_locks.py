"""nbdq and QEMU on one image at the same time: who may come in, in both orders (L6-L8, L13, R-44)."""

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

from nbdq.chain.policy import Policy
from nbdq.chain.resolve import resolve_chain
from nbdq.errors import ImageLocked
from nbdq.locks import DATA_FILE_WRITER, READER, TOLERANT_READER, WRITER, Claim, Permission, lock_image
from tests.support.serving import refusal, serve
from tests.support.tools import execute, requires, run

pytestmark = requires("qemu-img", "qemu-io", "qemu-nbd")

COMMITTING = Claim(READER.permissions, Permission.WRITE_UNCHANGED)

#: Seconds until a holder that says nothing counts as hung; only bounds failures.
PATIENCE = 30

READING = """
qemu-img info top
qemu-img info --backing-chain top
qemu-img check top
qemu-img map top
qemu-img measure -O raw top
qemu-img convert -O raw top copy
qemu-img compare top top
qemu-img snapshot -l top
qemu-io -r -c "read 0 4k" top
qemu-io -r -c "read 0 4k" base
""".strip().splitlines()

WRITING = """
qemu-img check -r all top
qemu-io -c "write 0 4k" top
qemu-io -c "write 0 4k" base
qemu-img commit top
qemu-img resize top 2M
qemu-img amend -o lazy_refcounts=on top
qemu-img snapshot -c now top
qemu-img rebase -u -b "" top
qemu-img rebase -b other -F qcow2 top
qemu-img bitmap --add top b
qemu-img bench -w -c 1 -t writeback top
""".strip().splitlines()


RAW_READING = """
qemu-img info disk
qemu-img map -f raw disk
qemu-img compare -f raw -F raw disk disk
qemu-img convert -f raw -O raw disk copy
qemu-img measure -f raw -O qcow2 disk
qemu-io -r -f raw -c "read 0 4k" disk
""".strip().splitlines()

RAW_WRITING = """
qemu-io -f raw -c "write 0 4k" disk
qemu-img bench -w -c 1 -t writeback -f raw disk
qemu-img resize -f raw disk 2M
qemu-img commit -f qcow2 over
""".strip().splitlines()


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """A directory with ``top``, its backing file ``base``, and ``other``."""
    for name in ("base", "other"):
        run("qemu-img", "create", "-q", "-f", "qcow2", name, "1M", cwd=tmp_path)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top", cwd=tmp_path)
    return tmp_path


def shell(command: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return execute("sh", "-c", command, cwd=directory)


def forced(command: str) -> str:
    """The same with the switch that tolerates writers."""
    return re.sub(r"^(qemu-io|qemu-img \w+)", r"\1 -U", command)


@contextmanager
def reading(
    path: Path, policy: Policy | None = None, *, format: str = "qcow2", writable: bool = False
) -> Iterator[None]:
    """nbdq has the chain of ``path`` open."""
    with ExitStack() as opened:
        for layer in resolve_chain(str(path), format=format, policy=policy, writable=writable):
            opened.callback(layer.storage.close)
            if layer.data_storage is not None:
                opened.callback(layer.data_storage.close)
        yield


def writing(path: Path, format: str = "qcow2") -> AbstractContextManager[None]:
    """nbdq has the chain of ``path`` open, and its top to write to it."""
    return reading(path, Policy(allow_data_file=True), format=format, writable=True)


@contextmanager
def holding(path: Path, claim: Claim) -> Iterator[None]:
    """Somebody who follows the protocol holds ``claim`` on one file."""
    with path.open("rb") as file:
        lock_image(file.fileno(), str(path), claim)
        yield


@contextmanager
def qemu_nbd(path: Path, *options: str, format: str = "qcow2") -> Iterator[None]:
    """qemu-nbd serves the image, for writing unless told otherwise."""
    with tempfile.TemporaryDirectory(prefix="nbdq-") as directory:  # short: a socket path has 107 bytes
        started = Path(directory, "pid")
        command = ["qemu-nbd", "-t", "-f", format, "-k", f"{directory}/socket", f"--pid-file={started}"]
        process = subprocess.Popen([*command, *options, path], stdin=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + PATIENCE
            while not started.exists():
                assert process.poll() is None, "qemu-nbd ended"
                assert time.monotonic() < deadline, "qemu-nbd does not start"
                time.sleep(0.005)
            yield
        finally:
            process.kill()
            process.wait()


def locked_bytes(path: Path) -> set[int]:
    """The bytes of a file that anybody holds, as the kernel lists them."""
    found: set[int] = set()
    for line in Path("/proc/locks").read_text().splitlines():
        *_, file, start, end = line.split()
        if int(file.rpartition(":")[2]) == path.stat().st_ino:
            found.update(range(int(start), int(end) + 1))
    return found


@contextmanager
def qemu_io(path: Path, *options: str) -> Iterator[None]:
    """An interactive qemu-io has the image open, and has written to it if it may."""
    command = ["qemu-io", *options, path.name]
    process = subprocess.Popen(command, cwd=path.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write("read 0 512\n" if "-r" in options else "write 0 512\n")
        process.stdin.flush()
        assert "512/512" in process.stdout.readline()
        yield
    finally:
        process.communicate("quit\n", timeout=PATIENCE)


@pytest.mark.parametrize("command", READING)
def test_while_nbdq_reads_a_chain_qemu_may_read_it_too(chain: Path, command: str) -> None:
    with reading(chain / "top"):
        done = shell(command, chain)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", WRITING)
def test_while_nbdq_reads_a_chain_qemu_may_not_change_it(chain: Path, command: str) -> None:
    before = [(chain / name).read_bytes() for name in ("top", "base")]
    with reading(chain / "top"):
        done = shell(command, chain)
        assert done.returncode == 1, done.stdout
        assert re.search('Failed to get "(write|resize)" lock', done.stderr)
    assert [(chain / name).read_bytes() for name in ("top", "base")] == before
    done = shell(command, chain)
    assert done.returncode == 0, f"fails in any case: {done.stderr}"


def test_while_nbdq_reads_with_force_share_qemu_may_write(chain: Path) -> None:
    with reading(chain / "top", Policy(force_share=True)):
        run("qemu-io", "-c", "write 0 4k", "top", cwd=chain)


def test_a_new_overlay_may_be_made_of_a_chain_that_nbdq_reads(chain: Path) -> None:
    with reading(chain / "top"):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "top", "-F", "qcow2", "overlay", cwd=chain)
        run("qemu-io", "-c", "write 0 4k", "overlay", cwd=chain)


@pytest.mark.parametrize("command", [*READING, *WRITING, "qemu-nbd -f qcow2 -k $PWD/s top", "qemu-img info base"])
def test_while_nbdq_writes_to_a_chain_qemu_may_do_what_it_may_beside_a_qemu_that_writes(
    chain: Path, command: str
) -> None:
    """L6, L7: the same exit status and the same words, and nothing happens to the images."""
    verdicts = []
    for holder in (writing, qemu_nbd):
        with holder(chain / "top"):
            before = [(chain / name).read_bytes() for name in ("top", "base")]
            done = shell(f"timeout {PATIENCE} {command}", chain)
            assert [(chain / name).read_bytes() for name in ("top", "base")] == before
            verdicts.append((done.returncode, re.findall(r"Failed to get .* lock\n.*", done.stderr)))
            if command in READING:
                forced_done = shell(forced(command), chain)
                assert forced_done.returncode == 0, forced_done.stderr
    assert verdicts[0] == verdicts[1]
    is_allowed = command in ('qemu-io -r -c "read 0 4k" base', "qemu-img info base")  # that is only read
    assert (verdicts[0] == (0, [])) == is_allowed


def test_a_new_overlay_may_be_made_of_an_image_that_nbdq_writes_to(chain: Path) -> None:
    """L7: the first half of a snapshot, as QEMU's managers do it."""
    with writing(chain / "top"):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "top", "-F", "qcow2", "overlay", cwd=chain)


def test_overlays_of_one_base_are_written_to_by_nbdq_and_by_qemu(chain: Path) -> None:
    """L10, M5."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "sibling", cwd=chain)
    with writing(chain / "top"):
        run("qemu-io", "-c", "write 0 4k", "sibling", cwd=chain)
    with qemu_io(chain / "sibling"), writing(chain / "top"):
        pass


@pytest.mark.parametrize("holder", [qemu_nbd, qemu_io])
@pytest.mark.parametrize("options", [(), ("-r",)])
def test_while_qemu_has_an_image_nbdq_does_not_write_to_it(chain: Path, holder: type, options: tuple[str]) -> None:
    """In whatever place of its chain QEMU has it, and whatever QEMU does there."""
    with holder(chain / "top", *options):
        for name in ("top", "base"):
            with pytest.raises(ImageLocked, match=f'/{name}: failed to get "write" lock.*-r/--read-only'):
                resolve_chain(str(chain / name), writable=True)
    with writing(chain / "top"):
        pass


def test_of_two_nbdq_that_write_to_one_image_the_second_is_refused_whole(chain: Path) -> None:
    with writing(chain / "top"):
        with pytest.raises(ImageLocked):
            resolve_chain(str(chain / "top"), writable=True)
        with pytest.raises(ImageLocked):
            resolve_chain(str(chain / "top"))
        with reading(chain / "top", Policy(force_share=True)), reading(chain / "base"):
            pass


@pytest.mark.parametrize("command", [*RAW_READING, *RAW_WRITING])
def test_a_raw_disk_that_nbdq_writes_to_is_kept_from_other_writers_and_is_read_where_qemu_lets_it_be_read(
    tmp_path: Path, command: str
) -> None:
    """L6: qemu-nbd lets a second writer in, a guest of QEMU does not; nor does nbdq."""
    run("qemu-img", "create", "-q", "-f", "raw", "disk", "1M", cwd=tmp_path)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "disk", "-F", "raw", "over", cwd=tmp_path)
    with writing(tmp_path / "disk", "raw"):
        ours = shell(command, tmp_path)
    if command in RAW_WRITING:
        assert ours.returncode == 1
        assert re.search(r'Failed to get (shared )?"(write|resize)" lock\nIs another process', ours.stderr)
    with qemu_nbd(tmp_path / "disk", format="raw"):
        theirs = shell(command, tmp_path)
    if command in RAW_READING:
        assert (ours.returncode, ours.stderr) == (theirs.returncode, theirs.stderr)


def test_while_qemu_writes_to_a_raw_disk_nbdq_does_not_and_a_reader_of_qemu_tolerates_it(tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "raw", "disk", "1M", cwd=tmp_path)
    with qemu_nbd(tmp_path / "disk", format="raw"), pytest.raises(ImageLocked) as caught:
        resolve_chain(str(tmp_path / "disk"), format="raw", writable=True)
    assert str(caught.value).endswith(
        "stop the other process, or serve the image with -r/--read-only if that only reads it"
    )
    with qemu_nbd(tmp_path / "disk", "-r", format="raw"), writing(tmp_path / "disk", "raw"):
        pass


def test_a_data_file_is_claimed_byte_for_byte_as_by_qemu(tmp_path: Path) -> None:
    """L6."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", "top", "1M", cwd=tmp_path)
    found = []
    for holder in (writing, qemu_nbd):
        with holder(tmp_path / "top"):
            found.append([locked_bytes(tmp_path / name) for name in ("top", "data")])
            with (tmp_path / "data").open("rb") as file, pytest.raises(ImageLocked):
                lock_image(file.fileno(), "data", DATA_FILE_WRITER)
    assert found[0] == found[1] == [{100, 101, 103, 201, 203}, {100, 101, 103, 203}]


def test_qemu_cannot_read_a_layer_that_is_inconsistent_even_with_force_share(chain: Path) -> None:
    with holding(chain / "base", COMMITTING):
        for command in ("qemu-img map top", "qemu-img map -U top"):
            done = shell(command, chain)
            assert done.returncode == 1
            assert 'Failed to get "consistent read" lock' in done.stderr
        for policy in (Policy(), Policy(force_share=True)):
            with pytest.raises(ImageLocked, match='base: failed to get "consistent read" lock'):
                resolve_chain(str(chain / "top"), policy=policy)


@pytest.mark.parametrize("holder", [qemu_nbd, qemu_io])
def test_while_qemu_writes_an_image_nbdq_refuses_it_unless_sharing_is_forced(chain: Path, holder: type) -> None:
    with holder(chain / "top"):
        with pytest.raises(ImageLocked, match=r'/top: failed to get shared "(write|resize)" lock.*--force-share'):
            resolve_chain(str(chain / "top"))
        with reading(chain / "top", Policy(force_share=True)):
            pass
        with reading(chain / "base"):  # a backing file of the writer is only read
            pass
    with reading(chain / "top"):
        pass


def test_while_qemu_writes_a_layer_below_nbdq_refuses_the_chain(chain: Path) -> None:
    with qemu_io(chain / "base"), pytest.raises(ImageLocked) as caught:
        resolve_chain(str(chain / "top"))
    assert caught.value.path == str(chain / "base")


@pytest.mark.parametrize("holder", [qemu_nbd, qemu_io])
def test_while_qemu_reads_an_image_nbdq_reads_it_but_may_not_write(chain: Path, holder: type) -> None:
    with holder(chain / "top", "-r"):
        with reading(chain / "top"):
            pass
        for name in ("top", "base"):
            with (
                (chain / name).open("rb") as file,
                pytest.raises(ImageLocked, match='failed to get "write" lock'),
            ):
                lock_image(file.fileno(), name, WRITER)


def test_a_forced_reader_of_qemu_is_in_nobodys_way(chain: Path) -> None:
    with qemu_io(chain / "top", "-r", "-U"), holding(chain / "top", WRITER), (chain / "top").open("rb") as file:
        assert lock_image(file.fileno(), "top", TOLERANT_READER)


def test_qemu_cannot_start_writing_what_nbdq_reads_nor_after_it_the_reverse(chain: Path) -> None:
    """R-44: whoever comes first keeps the image."""
    with reading(chain / "top"):
        done = shell("timeout 30 qemu-nbd -f qcow2 -k $PWD/socket top", chain)
        assert done.returncode == 1
        assert 'Failed to get "write" lock' in done.stderr
    with qemu_nbd(chain / "top"), pytest.raises(ImageLocked):
        resolve_chain(str(chain / "top"))


# The same through the front door


@pytest.mark.parametrize("mode", ["--read-only", None])
def test_a_served_image_is_locked_until_the_server_ends(chain: Path, mode: str | None) -> None:
    options = (mode,) if mode else ()
    with serve(*options, chain / "top") as server:
        for name in ("top", "base"):
            assert 'Failed to get "write" lock' in shell(f'qemu-io -c "write 0 4k" {name}', chain).stderr
        done = shell("qemu-img check top", chain)
        assert done.returncode == (0 if mode else 1)
        assert mode or 'Failed to get shared "write" lock' in done.stderr
        run("qemu-img", "check", "-U", "top", cwd=chain)
        if not mode:
            run("qemu-io", "-f", "raw", "-c", "write 0 4k", server.uri(), cwd=chain)
    run("qemu-io", "-c", "write 0 4k", "top", cwd=chain)


def test_a_server_refuses_images_in_use_in_one_line(chain: Path) -> None:
    with qemu_io(chain / "base"):
        message = refusal("--read-only", chain / "top")
        assert re.fullmatch(r'.*/base: failed to get shared "write" lock: .*; stop .*--force-share\n', message)
        with serve("--read-only", "--force-share", chain / "top"):
            pass
    for holder, mode in ((qemu_nbd(chain / "top"), ()), (qemu_nbd(chain / "top", "-r"), ("--read-only",))):
        with holder:
            message = refusal(chain / "top")
            assert re.fullmatch(r'.*/top: failed to get "write" lock: .*; stop .* -r/--read-only .*\n', message)
            if mode:
                with serve(*mode, chain / "top"):
                    pass


def test_two_servers_write_to_one_image_never(chain: Path) -> None:
    with serve(chain / "top"):
        for format in ("qcow2", "raw"):
            message = refusal("-f", format, chain / "top")
            assert re.fullmatch(r'.*/top: failed to get "write" lock: .*\n', message)


def test_one_server_opens_one_image_for_writing_once(chain: Path) -> None:
    """Two exports of it are two names of one disk; another name of the file is another process's, for all we know."""
    with serve("-x", "a", "-x", "b", chain / "top", chain / "top") as server:
        run("qemu-io", "-f", "raw", "-c", "write -P 0x7e 0 64k", server.uri("a"))
        run("qemu-io", "-f", "raw", "-c", "read -P 0x7e 0 64k", server.uri("b"))
    os.link(chain / "top", chain / "link")
    message = refusal("-x", "a", "-x", "b", chain / "top", chain / "link")
    assert re.fullmatch(r'.*/link: failed to get "write" lock: .*\n', message)
    with serve("--read-only", "-x", "a", "-x", "b", chain / "top", chain / "link"):
        pass

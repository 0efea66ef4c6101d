"""nbdq and QEMU on one image at the same time: who may come in, in both orders (L6-L8, L13, R-44)."""

import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from nbdq.chain.policy import Policy
from nbdq.chain.resolve import resolve_chain
from nbdq.errors import ImageLocked
from nbdq.locks import READER, TOLERANT_READER, Claim, Permission, lock_image
from tests.support.serving import refusal, serve
from tests.support.tools import execute, requires, run

pytestmark = requires("qemu-img", "qemu-io", "qemu-nbd")

WRITER = Claim(READER.permissions | Permission.WRITE | Permission.RESIZE, READER.shared)
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
def reading(path: Path, policy: Policy | None = None) -> Iterator[None]:
    """nbdq has the chain of ``path`` open."""
    with ExitStack() as opened:
        for layer in resolve_chain(str(path), policy=policy):
            opened.callback(layer.storage.close)
        yield


@contextmanager
def holding(path: Path, claim: Claim) -> Iterator[None]:
    """Somebody who follows the protocol holds ``claim`` on one file."""
    with path.open("rb") as file:
        lock_image(file.fileno(), str(path), claim)
        yield


@contextmanager
def qemu_nbd(path: Path, *options: str) -> Iterator[None]:
    """qemu-nbd serves the image, for writing unless told otherwise."""
    with tempfile.TemporaryDirectory(prefix="nbdq-") as directory:  # short: a socket path has 107 bytes
        started = Path(directory, "pid")
        command = ["qemu-nbd", "-t", "-f", "qcow2", "-k", f"{directory}/socket", f"--pid-file={started}"]
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


@pytest.mark.parametrize("command", [*READING, *WRITING])
def test_qemu_refuses_an_image_on_which_nbdq_claims_to_write(chain: Path, command: str) -> None:
    """The set of L6, which a read-write export will take."""
    with holding(chain / ("base" if command.endswith("base") else "top"), WRITER):
        done = shell(command, chain)
        assert done.returncode in (1, 2), done.stdout
        assert "lock\nIs another process using the image" in done.stderr
        if command in READING:
            done = shell(forced(command), chain)
            assert done.returncode == 0, done.stderr


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


def test_a_served_image_is_locked_until_the_server_ends(chain: Path) -> None:
    """The same through the front door."""
    with serve(chain / "top"):
        for name in ("top", "base"):
            assert 'Failed to get "write" lock' in shell(f'qemu-io -c "write 0 4k" {name}', chain).stderr
    run("qemu-io", "-c", "write 0 4k", "top", cwd=chain)
    with qemu_io(chain / "base"):
        message = refusal(chain / "top")
        assert re.fullmatch(r'.*/base: failed to get shared "write" lock: .*; stop .*--force-share\n', message)
        with serve("--force-share", chain / "top"):
            pass

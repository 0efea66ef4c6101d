"""Three ways to do a guest's operations to an image: nbdq in this process, nbdq over the wire, and qemu-nbd."""

import contextlib
import errno
import itertools
import json
import subprocess
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nbdq.block import BlockDevice, WritableBlockDevice
from nbdq.chain.clusters import ClusterCache
from nbdq.chain.open import open_disk, open_writable
from nbdq.chain.policy import Policy
from tests.support.images import Image
from tests.support.operations import Operation, Verb, independent
from tests.support.serving import serve
from tests.support.tools import TIMEOUT

ROOT = Path(__file__).parents[2]
SYSTEM_PYTHON = "/usr/bin/python3"

Outcomes = list[str | int]
"""For each operation the name of the errno that it failed with, or ""; for a read the checksum of what was read."""


@contextlib.contextmanager
def writable_disk(image: Image) -> Iterator[WritableBlockDevice]:
    """The top of ``image`` open in this process, as ``nbdq serve`` opens it; closed, and so flushed, afterwards."""
    with writable_file(image.top, image.format, image.options) as disk:
        yield disk


@contextlib.contextmanager
def writable_file(path: Path, format: str = "qcow2", options: Sequence[str] = ()) -> Iterator[WritableBlockDevice]:
    """As :func:`writable_disk`, of any file; ``options`` are those of ``nbdq serve``."""
    with contextlib.closing(ClusterCache(budget=8 << 20)) as clusters:
        disk = open_writable(str(path), format=format, policy=_policy(options), clusters=clusters)
        with contextlib.closing(disk):
            yield disk


def _policy(options: Sequence[str]) -> Policy:
    roots = tuple(value for option, value in itertools.pairwise(options) if option == "--allow-backing")
    return Policy(roots=roots, allow_data_file="--allow-data-file" in options)


def read_in_process(image: Image) -> bytearray:
    """All that a guest can read of ``image``, by nbdq's reader."""
    with contextlib.closing(ClusterCache(budget=8 << 20)) as clusters:
        disk = open_disk(str(image.top), format=image.format, policy=_policy(image.options), clusters=clusters)
        with contextlib.closing(disk):
            return contents(disk)


def perform(disk: WritableBlockDevice, operation: Operation, *, cached: bool = True) -> str | int:
    """Carry one operation out as the server does; the outcome is one of :data:`Outcomes`.

    Only one thread at a time may do so with ``cached``: the one that stands for the server's loop.
    """
    try:
        return _perform(disk, operation, cached=cached)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def _perform(disk: WritableBlockDevice, operation: Operation, *, cached: bool) -> str | int:
    verb, offset, length = operation.verb, operation.offset, operation.length
    if verb is Verb.READ:
        view = memoryview(bytearray(length))
        if not (cached and disk.read_cached(offset, view)):
            disk.read_into(offset, view)
        return zlib.crc32(view)
    if verb in (Verb.WRITE, Verb.BLANK):
        view = memoryview(operation.payload())
        if not (cached and disk.write_cached(offset, view)):
            disk.write(offset, view)
    elif verb in (Verb.ZERO, Verb.UNMAP):
        try:
            disk.zero(offset, length, unmap=verb is Verb.UNMAP, fast=operation.fast)
        except OSError as error:
            if not operation.fast or error.errno != errno.EOPNOTSUPP:
                raise
            disk.zero(offset, length, unmap=verb is Verb.UNMAP)
    elif verb is Verb.DISCARD:
        disk.discard(offset, length)
    if verb is Verb.FLUSH or operation.fua:
        disk.flush()
    return ""


def contents(disk: BlockDevice) -> bytearray:
    """All that the guest can read."""
    found = bytearray(disk.size)
    view = memoryview(found)
    for offset in range(0, disk.size, 1 << 20):
        disk.read_into(offset, view[offset : offset + (1 << 20)])
    return found


def play_in_process(image: Image, operations: Sequence[Operation]) -> Outcomes:
    """Open, operate, close."""
    with writable_disk(image) as disk:
        return [perform(disk, operation) for operation in operations]


def play_in_threads(image: Image, operations: Sequence[Operation]) -> Outcomes:
    """As :func:`play_in_process`, but neighbours that touch different bytes are carried out at once."""
    outcomes: Outcomes = []
    with writable_disk(image) as disk, ThreadPoolExecutor(4) as pool:
        for first, *others in independent(operations, most=6):
            futures = [pool.submit(perform, disk, operation, cached=False) for operation in others]
            outcomes.append(perform(disk, first))
            outcomes += [future.result() for future in futures]
    return outcomes


def play_over_the_wire(image: Image, operations: Sequence[Operation]) -> Outcomes:
    """As a client of ``nbdq serve``, which is ended afterwards."""
    with serve("-f", image.format, *image.options, image.top) as server:
        return play(server.uri(), operations)


def play_with_qemu(image: Image, operations: Sequence[Operation]) -> Outcomes:
    """As a client of qemu-nbd, which passes discards on."""
    # QEMU looks for external data files in its working directory (Q76).
    command = ["env", f"--chdir={image.directory}", "qemu-nbd", "-f", image.format, "--discard=unmap"]
    return play(json.dumps([*command, "--cache=unsafe", str(image.top)]), operations)


def play(server: str, operations: Sequence[Operation]) -> Outcomes:
    """As a client of ``server``: a URI, or a command as JSON that is given its socket by libnbd."""
    done = subprocess.run(
        [SYSTEM_PYTHON, "-m", "tests.support.player", server],
        cwd=ROOT,
        input=json.dumps(operations),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, f"the client of {server} failed:\n{done.stderr}"
    outcomes: Outcomes = json.loads(done.stdout)
    return outcomes

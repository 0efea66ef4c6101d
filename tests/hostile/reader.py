"""nbdq under arrest: a process with limits on memory and CPU time that opens and reads the images it is told.

Run as ``python -m tests.hostile.reader``. One JSON job per line of stdin, one JSON report per line of stdout. A job
that needs more CPU time than allowed kills the process with SIGXCPU; the other limits end in a report.
"""

import gc
import json
import resource
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nbdq.block import Piece
from nbdq.chain.clusters import ClusterCache
from nbdq.chain.disk import ChainDisk
from nbdq.chain.open import open_disk
from nbdq.chain.policy import Policy
from nbdq.errors import NbdqError

#: What an image may cost: bytes beyond those of the loaded program, and seconds (R-33).
MEMORY_LIMIT = 256 << 20
CPU_LIMIT = 2.0
#: Seconds after which the kernel ends the process; above CPU_LIMIT, so that a report can name the excess.
_CPU_KILL = 6
#: Guest bytes that are read: all of a disk up to the first, else so many at its start and the second at its end.
HEAD, TAIL = 16 << 20, 1 << 20
#: Guest bytes that are mapped.
MAPPED = 1 << 40

_PIECE = 256 << 10


def windows(size: int) -> list[tuple[int, int]]:
    """(offset, length) of what is read of a disk of ``size`` bytes."""
    if size <= HEAD + TAIL:
        return [(0, size)] if size else []
    return [(0, HEAD), (size - TAIL, TAIL)]


def examine(job: dict[str, Any]) -> dict[str, Any]:
    """Open and read one disk. The report says how that went, in terms of the outcomes that are allowed."""
    found: dict[str, Any] = {"outcome": "opened"}
    _forget_peak()
    before, started = _memory("VmRSS"), time.process_time()
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + _CPU_KILL
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    clusters = ClusterCache(budget=8 << 20)
    try:
        policy = Policy(roots=(job["allow"],), allow_data_file=True)
        disk = open_disk(job["path"], format="qcow2", policy=policy, clusters=clusters, snapshot=job["snapshot"])
        try:
            found |= _read(disk, Path(job["content"]))
            found["map"], found["map_error"] = _map(disk)
        finally:
            disk.close()
    except (NbdqError, OSError) as error:
        found |= {"outcome": "refused", "error": str(error)}
    except MemoryError:
        found |= {"outcome": "memory", "error": traceback.format_exc(limit=-4)}
    except Exception:
        found |= {"outcome": "traceback", "error": traceback.format_exc(limit=-6)}
    finally:
        clusters.close()
    found["cpu"] = time.process_time() - started
    found["memory"] = max(0, _memory("VmHWM") - before)
    return found


def _read(disk: ChainDisk, target: Path) -> dict[str, Any]:
    """Write the windows of the disk to ``target``, one after the other; list what cannot be read."""
    granule = min(getattr(layer, "granule", _PIECE) for layer in disk.layers)
    bad: list[tuple[int, int, str]] = []
    differing: list[str] = []
    view = memoryview(bytearray(_PIECE))
    with target.open("wb") as file:
        position = 0
        for start, length in windows(disk.size):
            for offset in range(start, start + length, _PIECE):
                piece = view[: min(_PIECE, start + length - offset)]
                _read_piece(disk, offset, piece, granule, bad)
                differing += _compare_fast_paths(disk, offset, piece, bad)
                if np.frombuffer(piece, dtype=np.uint8).any():
                    file.seek(position)
                    file.write(piece)
                position += len(piece)
        file.truncate(position)
    return {"size": disk.size, "bad": bad, "differing": differing}


def _read_piece(disk: ChainDisk, offset: int, view: memoryview, granule: int, bad: list[tuple[int, int, str]]) -> None:
    """Fill ``view``; what cannot be read is zeros, and entered in ``bad`` by granules."""
    try:
        disk.read_into(offset, view)
        return
    except OSError as error:
        if len(view) <= granule:
            view[:] = bytes(len(view))
            bad.append((offset, len(view), str(error)))
            return
    for start in range(0, len(view), granule):
        _read_piece(disk, offset + start, view[start : start + granule], granule, bad)


def _compare_fast_paths(disk: ChainDisk, offset: int, piece: memoryview, bad: list[tuple[int, int, str]]) -> list[str]:
    """What the server would send without waiting, or by reference, must be what ``read_into`` says."""
    is_bad = any(start < offset + len(piece) and start + length > offset for start, length, _ in bad)
    copy = memoryview(bytearray(len(piece)))
    answers: dict[str, bytes | memoryview | None] = {"read_cached": copy if disk.read_cached(offset, copy) else None}
    pieces = disk.gather_cached(offset, len(piece))
    answers["gather_cached"] = _join(pieces) if pieces is not None else None
    try:
        answers["gather"] = _join(disk.gather(offset, len(piece)))
    except OSError:
        assert is_bad, "gather fails where read_into does not"
    return [
        f"{way} at {offset}" for way, answer in answers.items() if answer is not None and (is_bad or answer != piece)
    ]


def _join(pieces: Iterable[Piece]) -> bytes:
    return b"".join(p if isinstance(p, memoryview) else p.storage.read(p.offset, p.length) for p in pieces)


def _map(disk: ChainDisk) -> tuple[list[tuple[Any, ...]], str | None]:
    """The extents as qemu-img 7.2 has them, and the error at which they end. Block status has to cover the same."""
    length = min(disk.size, MAPPED)
    extents: list[tuple[Any, ...]] = []
    error = None
    try:
        for extent in disk.extents(0, length):
            extents.append((*extent[:6], extent.offset))
    except OSError as failure:
        error = str(failure)
    position = 0
    try:
        for status in disk.status(0, length):
            assert int(status.start[0]) == position, "a gap in block status"
            position = status.end
        assert position == length, "block status ends early"
    except OSError:
        assert error is not None, "block status fails where map does not"
    return extents, error


def _memory(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no {name} in /proc/self/status")


def _forget_peak() -> None:
    """Let VmHWM begin anew."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Serve jobs until stdin ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = _memory("VmSize") + MEMORY_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.stdin:
        print(json.dumps(examine(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

"""Map a whole export again and again over one connection, and say how long each time took.

A process of its own, because libnbd's Python binding may exist for another interpreter than the one that races.
Prints JSON: `seconds` of each pass, `busy` (the share of that time in which this client itself was on a CPU), and
`extents` after merging neighbours of one kind, which must be the same for every honest server.
"""

import json
import sys
import time

import nbd

CONTEXT = "base:allocation"
MAX_REQUEST = (1 << 32) - (1 << 20)  # the most that a 32-bit length can ask for, in whole MiB


def map_export(handle: nbd.NBD, size: int) -> list[list[int]]:
    """Every reply's list of length, flags, length, flags, ..."""
    replies: list[list[int]] = []

    def collect(_context: str, _offset: int, entries: list[int], _error: int) -> None:
        replies.append(entries)

    offset = 0
    while offset < size:
        before = len(replies)
        handle.block_status(min(size - offset, MAX_REQUEST), offset, collect)
        offset += sum(sum(entries[::2]) for entries in replies[before:])
    return replies


def count_extents(replies: list[list[int]]) -> int:
    flags = [flag for entries in replies for flag in entries[1::2]]
    return sum(1 for before, after in zip([None, *flags], flags, strict=False) if before != after)


def main(uri: str, budget_s: float) -> None:
    handle = nbd.NBD()
    handle.add_meta_context(CONTEXT)
    handle.connect_uri(uri)
    size = handle.get_size()
    passes: list[float] = []
    deadline = time.perf_counter() + budget_s
    cpu = time.process_time()
    while not passes or time.perf_counter() < deadline:
        started = time.perf_counter()
        replies = map_export(handle, size)
        passes.append(time.perf_counter() - started)
    cpu = time.process_time() - cpu
    handle.shutdown()
    print(json.dumps({"seconds": passes, "busy": cpu / sum(passes), "extents": count_extents(replies)}))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))

"""nbdq under arrest: a process with limits on memory and time that writes to the damaged images it makes.

Run as ``python -m tests.hostile.write_worker DIRECTORY``. Pickled (seed, random seed, numbers) come on stdin, one JSON
line for each mutation goes to stdout; a process that hangs or is killed leaves out the one that did it.
"""

import json
import pickle
import resource
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nbdq.storage import FileStorage
from tests.hostile.anatomy import Anatomy, Area
from tests.hostile.mutations import Mutation, mutate
from tests.hostile.seeds import Seed
from tests.hostile.write_trial import Disk, Outcome, attempt

#: What an image may cost: bytes beyond those of the loaded program, and seconds of CPU time (R-33). What the judge
#: needs is counted, too.
MEMORY_LIMIT = 256 << 20
CPU_LIMIT = 2.0


class _NeverSynced(FileStorage):
    """Syncs cost more time than all the rest, and no power is cut here."""

    def _fdatasync(self) -> None:
        pass


def try_all(directory: Path, seed: Seed, random_seed: str, numbers: Iterable[int]) -> None:
    """Damage the image, change it, and heal it, so many times."""
    place = directory / seed.variant.name
    for name, stored in seed.files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        stored.store(place / name)
    for number in numbers:
        mutation = mutate(seed, number, random_seed=random_seed)
        mutation.apply(seed.files[mutation.file]).store(place / mutation.file)
        started = time.process_time()
        report: dict[str, Any] = {"number": number, "what": str(mutation), "opened": False, "sound": False}
        try:
            outcome = attempt(Disk(place / seed.top, seed.directory, seed.variant.snapshots, _frozen(seed, mutation)))
            report |= _report(outcome)
        except Exception:
            report["failures"] = [traceback.format_exc(limit=-6)]
        report["cpu"] = time.process_time() - started
        if report["cpu"] > CPU_LIMIT:
            report["failures"].append(f"took {report['cpu']:.1f} s of CPU time")
        print(json.dumps(report), flush=True)
        for name in {mutation.file, seed.top}:
            seed.files[name].store(place / name)


def _report(outcome: Outcome) -> dict[str, Any]:
    return {
        "opened": outcome.opened,
        "sound": outcome.was_sound,
        "refusal": outcome.refusal,
        "failures": list(outcome.failures),
    }


def _frozen(seed: Seed, mutation: Mutation) -> tuple[tuple[int, int], ...]:
    """Where snapshots have metadata, unless the damage may have made it look free."""
    if {Area.HEADER, Area.SNAPSHOTS, Area.LENGTH}.intersection(mutation.areas) or not seed.variant.snapshots:
        return ()
    if {Area.L1, Area.REFCOUNTS}.issubset(mutation.areas):  # no table names it, and no refcount speaks for it
        return ()
    anatomy = seed.anatomies[seed.top]
    places = [(anatomy.header["snapshots_offset"], 64)]
    places += [(entry["l1_offset"], entry["l1_size"] * 8) for _, entry in anatomy.snapshot_entries()]
    places += [(offset, anatomy.cluster_size) for offset in _inactive_tables(anatomy)]
    return tuple(places)


def _inactive_tables(anatomy: Anatomy) -> set[int]:
    """Host offsets of L2 tables that only snapshots use."""
    reach = anatomy.cluster_size // anatomy.entry_size * anatomy.cluster_size
    found: dict[bool, set[int]] = {True: set(), False: set()}
    for snapshots, tables in found.items():
        for offset in range(0, anatomy.header["size"], reach):
            tables |= {place // anatomy.cluster_size for place in anatomy.entry_offsets(offset, snapshots=snapshots)}
    return {cluster * anatomy.cluster_size for cluster in found[True] - found[False]}


def _memory() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def main() -> None:
    """Serve jobs until stdin ends."""
    setattr(FileStorage, "_fdatasync", _NeverSynced._fdatasync)  # noqa: B010
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = _memory() + MEMORY_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while True:
        try:
            seed, random_seed, numbers = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try_all(Path(sys.argv[1]), seed, random_seed, numbers)


if __name__ == "__main__":
    main()

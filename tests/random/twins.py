"""Twin runs: the same operations by nbdq on one copy of a chain and by QEMU on another, which must stay the same disk.

After every round the two are compared by QEMU: contents, ``map``, internal snapshots, and ``check``, which may not even
find leaks. Then they change places, so that each goes on with what the other left behind. To run for long:

    .venv/bin/python -m tests.random.twins --seed 1 --runs 1000            # random chains
    .venv/bin/python -m tests.random.twins --seed 1 --runs 1 v3 'zlib-*'   # some of tests/support/variants.py

It prints each failure with the fewest operations that show it, and figures at the end.
"""

import argparse
import fnmatch
import hashlib
import itertools
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.random.chains import random_chain
from tests.support import oracles
from tests.support.images import Image, Variant, build
from tests.support.operations import Guest, Operation, Verb, random_operations
from tests.support.scratch import scratch
from tests.support.tools import execute, run
from tests.support.variants import VARIANTS
from tests.support.writing import (
    Outcomes,
    play_in_process,
    play_in_threads,
    play_over_the_wire,
    play_with_qemu,
    read_in_process,
)

Rounds = Sequence[Sequence[Operation]]
#: Makes ``nbdq`` carry operations out on an image.
Player = Callable[[Image, Sequence[Operation]], Outcomes]
PLAYERS: dict[str, Player] = {"process": play_in_process, "threads": play_in_threads, "wire": play_over_the_wire}


def is_writable(variant: Variant) -> bool:
    """Whether QEMU writes to it: not if it is marked corrupt; and raw tops have nothing to compare."""
    top = variant.layers[-1]
    return top.format == "qcow2" and "poke 72 8 2" not in top.steps


@dataclass
class Twins:
    """Two copies of one chain, and what both must read as."""

    ours: Image
    theirs: Image
    guest: Guest | None
    """None for a disk that is too large to hold."""
    lower: list[str]
    """Checksums of the layers below the top, which nobody may touch."""
    snapshots: dict[str, str]
    """Checksum of the contents of each internal snapshot."""
    excused: set[int] = field(default_factory=set)
    """Clusters in which the one may have written zeros where the other did not; see :meth:`excuse`."""

    @property
    def pair(self) -> tuple[Image, Image]:
        return self.ours, self.theirs

    def excuse(self, operation: Operation) -> None:
        """Over a backing file, both look whether what they would have to write zeros over reads as zeros anyway (Z2).

        QEMU asks the file system, too, and may see a hole of the base. In version 2 it does not look at all (Z3).
        """
        layers = self.ours.variant.layers
        if operation.verb not in (Verb.ZERO, Verb.UNMAP) or len(layers) == 1:
            return
        size = layers[-1].cluster_size
        start, end = operation.offset, operation.offset + operation.length
        if "compat=0.10" in layers[-1].options:
            self.excused.update(range(start // size, -(-end // size)))
        self.excused.update(edge // size for edge in (start, end) if edge % size)


def make_twins(variant: Variant, directory: Path) -> Twins:
    """Build ``variant`` in ``ours`` in the empty ``directory``, and its twin in ``theirs``."""
    first, second = (directory / name / "chain" for name in ("ours", "theirs"))
    first.mkdir(parents=True)
    ours = build(variant, first)
    if any("{directory}" in layer.options + layer.backing for layer in variant.layers):
        second.mkdir(parents=True)
        theirs = build(variant, second)  # a copy would share the files that are named by their whole path
    else:
        run("cp", "-a", first.parent, second.parent)
        theirs = Image(variant, second, [second / path.relative_to(first) for path in ours.paths])
    guest = None
    if not variant.huge:
        old = "compat=0.10" in variant.layers[-1].options  # amended images are v2 without a backing file
        guest = Guest(
            read_in_process(ours),
            cluster_size=variant.layers[-1].cluster_size,
            discards=not (old and len(variant.layers) > 1),
        )
    snapshots = {name: _checksum(raw_contents(ours, "-l", name)) for name in variant.snapshots}
    return Twins(ours, theirs, guest, _lower_checksums(ours), snapshots)


def raw_contents(image: Image, *options: str) -> bytes:
    """What QEMU's reader shows of an image."""
    with scratch() as directory:
        copy = directory / "copy.raw"
        run("qemu-img", "convert", "-f", image.format, *options, "-O", "raw", image.top, copy, cwd=image.directory)
        return copy.read_bytes()


def play_twins(twins: Twins, rounds: Rounds, player: Player = play_in_process) -> None:
    """Play ``rounds``, changing places after each.

    Raises:
        AssertionError: the twins differ, or one of them is damaged.
    """
    for number, operations in enumerate(rounds):
        mine, other = twins.pair if number % 2 == 0 else twins.pair[::-1]
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(play_with_qemu, other, operations)
            outcomes, expected = player(mine, operations), future.result()
        for operation, outcome, wanted in zip(operations, outcomes, expected, strict=True):
            assert outcome == wanted, f"{operation}: {outcome!r} from nbdq, {wanted!r} from QEMU"
        for operation in operations:
            twins.excuse(operation)
            if twins.guest is not None:
                twins.guest.apply(operation)
        judge(twins)


def judge(twins: Twins) -> None:
    """Let QEMU say that the twins are one disk, without damage or leaks.

    Raises:
        AssertionError: it says otherwise.
    """
    ours, theirs = twins.pair
    cluster = ours.variant.layers[-1].cluster_size
    for image, name in ((ours, "ours"), (theirs, "theirs")):
        check = execute("qemu-img", "check", "-f", image.format, image.top, cwd=image.directory)
        assert check.returncode == 0, f"check of {name}: status {check.returncode}\n{check.stdout}{check.stderr}"
    formats = ("-f", ours.format, "-F", theirs.format)
    compared = execute("qemu-img", "compare", *formats, ours.top, theirs.top, cwd=ours.directory)
    assert compared.returncode == 0, compared.stdout + compared.stderr
    if twins.guest is not None:
        shown = read_in_process(ours)
        assert shown == twins.guest.content, (
            f"not what was written, from byte {_first_difference(shown, twins.guest)} on"
        )
    differences = list(map_differences(oracles.map_extents(ours), oracles.map_extents(theirs), twins.excused, cluster))
    assert not differences, "map differs:\n" + "\n".join(differences)
    assert _lower_checksums(ours) == twins.lower, "a layer below the top was changed"
    for name, checksum in twins.snapshots.items():
        assert _checksum(raw_contents(ours, "-l", name)) == checksum, f"snapshot {name} has changed"
    _judge_raw_data_file(ours)


def map_differences(
    ours: Iterable[dict[str, Any]], theirs: Iterable[dict[str, Any]], excused: set[int], cluster_size: int
) -> Iterable[str]:
    """Where two maps of ``qemu-img map`` tell a client different things.

    What is data must be equal everywhere, and the layer that it comes from; what is not must read as zeros in both. The
    layer of zeros may differ: to zero what is allocated nowhere, QEMU writes an explicit zero cluster to the top, and
    nbdq nothing (Z1). And whether data is known to be zero depends on holes of the file (P5), which are the file
    system's business. In ``excused`` clusters the one may have data where the other reads as zeros.
    """
    for start, end, mine, other in both_extents(list(ours), list(theirs)):
        clusters = range(start // cluster_size, -(-end // cluster_size))
        alike = (mine["zero"] or other["zero"]) and excused.issuperset(clusters)
        if _told(mine) != _told(other) and not alike:
            yield f"  {start}-{end}: nbdq {mine}, QEMU {other}"


def _told(extent: dict[str, Any]) -> tuple[bool, int]:
    return (True, extent["depth"]) if extent["data"] else (False, extent["zero"])


def both_extents(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]]
) -> Iterable[tuple[int, int, dict[str, Any], dict[str, Any]]]:
    """(start, end, extent of the one, extent of the other) over all of the disk."""
    bounds = sorted({extent["start"] + add for extent in ours + theirs for add in (0, extent["length"])})
    left, right = iter(ours), iter(theirs)
    mine, other = next(left), next(right)
    for start, end in itertools.pairwise(bounds):
        while mine["start"] + mine["length"] <= start:
            mine = next(left)
        while other["start"] + other["length"] <= start:
            other = next(right)
        yield start, end, mine, other


def _judge_raw_data_file(image: Image) -> None:
    """With ``data_file_raw`` the data file alone is the disk, whoever reads it."""
    if "data_file_raw=on" in image.variant.layers[-1].options:
        data = (image.directory / "guest.data").read_bytes()
        assert data.ljust(image.size, b"\0") == raw_contents(image), "the raw data file is not the disk"


def _lower_checksums(image: Image) -> list[str]:
    return [_checksum(path.read_bytes()) for path in image.paths[:-1]]


def _checksum(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _first_difference(shown: bytes, guest: Guest) -> int:
    return next(i for i, (a, b) in enumerate(itertools.zip_longest(shown, guest.content)) if a != b)


def random_rounds(twins: Twins, seed: int, *, count: int, rounds: int) -> list[list[Operation]]:
    """``rounds`` lists of ``count`` operations each, for the disk of ``twins``."""
    size, cluster_size = twins.ours.size, twins.ours.variant.layers[-1].cluster_size
    return [
        random_operations(seed + number, count, size=size, cluster_size=cluster_size, number=number * count)
        for number in range(rounds)
    ]


def shrink(rounds: Rounds, fails: Callable[[Rounds], bool]) -> Rounds:
    """The fewest operations that still fail, found by leaving out ever smaller parts."""
    found = [(number, operation) for number, operations in enumerate(rounds) for operation in operations]

    def regrouped(tagged: Sequence[tuple[int, Operation]]) -> Rounds:
        return [[operation for at, operation in tagged if at == number] for number in range(len(rounds))]

    step = len(found) // 2
    while step:
        position = 0
        while position < len(found):
            fewer = found[:position] + found[position + step :]
            if fails(regrouped(fewer)):
                found = fewer
            else:
                position += step
        step //= 2
    return regrouped(found)


def _failure(variant: Variant, make_rounds: Callable[[Twins], Rounds], player: Player) -> str:
    """Why twins differ after such rounds; empty if they do not. Whatever is raised is a failure."""
    with scratch() as directory:
        twins = make_twins(variant, directory)
        rounds = make_rounds(twins)
        try:
            play_twins(twins, rounds, player)
        except AssertionError as error:
            return str(error) or traceback.format_exc()
        except Exception:
            return traceback.format_exc()
    return ""


def main() -> int:
    """Run twins as the command line says; 1 if any differed."""
    parser = argparse.ArgumentParser(prog="python -m tests.random.twins")
    parser.add_argument("patterns", nargs="*", help="variants; random chains if none is named")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--operations", type=int, default=100)
    parser.add_argument("--by", choices=PLAYERS, default="process", help="how nbdq does it")
    parser.add_argument("--no-shrink", action="store_true", help="print failures as they are")
    words = parser.parse_args()
    player = PLAYERS[words.by]
    failures = operations = twins = 0
    begun = time.monotonic()
    for seed in range(words.seed, words.seed + words.runs):
        named = [v for v in VARIANTS if any(fnmatch.fnmatch(v.name, pattern) for pattern in words.patterns)]
        for variant in named or [random_chain(seed)]:
            if not is_writable(variant):
                continue
            rounds: Rounds = []

            def make(made: Twins, seed: int = seed) -> Rounds:
                nonlocal rounds
                rounds = random_rounds(made, seed, count=words.operations, rounds=words.rounds)
                return rounds

            twins, operations = twins + 1, operations + words.operations * words.rounds
            if why := _failure(variant, make, player):
                failures += 1
                if not words.no_shrink:
                    rounds = shrink(rounds, lambda fewer, v=variant: bool(_failure(v, lambda _: fewer, player)))
                    why = _failure(variant, lambda _: rounds, player) or why  # noqa: B023
                print(f"FAILED seed {seed}: {variant.name}", *variant.layers, why, sep="\n  ")
                for number, found in enumerate(rounds):
                    print(f"  round {number}:", *found, sep="\n    ")
                sys.stdout.flush()
    took = time.monotonic() - begun
    print(f"{twins} twins, {operations} operations on each side, {failures} failures, {took:.0f} s")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())

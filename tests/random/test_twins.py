"""nbdq and QEMU write the same to every image that QEMU can write to, and the disks stay twins.

The ordinary run takes the same seed every time; ``NBDQ_SEED`` gives another. For long runs see ``twins.py``.
"""

import itertools
import os

import pytest

from tests.random.chains import random_chain
from tests.random.twins import Player, is_writable, make_twins, play_twins, random_rounds
from tests.support.images import Variant
from tests.support.scratch import scratch
from tests.support.tools import requires
from tests.support.variants import VARIANTS
from tests.support.writing import play_in_process, play_in_threads, play_over_the_wire

pytestmark = requires("qemu-img", "qemu-io", "qemu-nbd", "nbdsh")

SEED = int(os.environ.get("NBDQ_SEED", "1"))

#: Chains that differ in nothing but their depth, and tables that take long just to be read, are left to long runs.
SKIPPED = {*(f"depth-{depth}" for depth in (*range(3, 20), 100)), "huge-128G", "huge-64T"}
WRITABLE = [variant for variant in VARIANTS if is_writable(variant) and variant.name not in SKIPPED]
#: One of each path through the server: plain, without zero clusters, over a chain, subclusters, a data file.
WIRED = ("v3", "v2", "depth-5", "extended-l2-64k", "data-file-raw-off")


def _writable_chains(first: int, count: int) -> list[int]:
    """Seeds of random chains that QEMU writes to and that have not just a raw file on top."""
    return list(itertools.islice((s for s in itertools.count(first) if is_writable(random_chain(s))), count))


def _play(variant: Variant, *, seed: int, count: int, player: Player = play_in_process) -> None:
    print(f"seed {seed}:", *variant.layers, sep="\n  ")
    with scratch() as directory:
        twins = make_twins(variant, directory)
        play_twins(twins, random_rounds(twins, seed, count=count, rounds=2), player)


@pytest.mark.parametrize("variant", WRITABLE, ids=str)
def test_a_disk_written_by_nbdq_and_its_twin_written_by_qemu_are_the_same(variant: Variant) -> None:
    _play(variant, seed=SEED, count=30)


@pytest.mark.parametrize("seed", _writable_chains(SEED, 12))
def test_a_random_chain_written_by_both_in_turns_is_the_same(seed: int) -> None:
    _play(random_chain(seed), seed=seed, count=60)


@pytest.mark.parametrize("seed", _writable_chains(SEED + 100, 6))
def test_a_disk_written_by_many_threads_of_nbdq_is_the_same(seed: int) -> None:
    _play(random_chain(seed), seed=seed, count=100, player=play_in_threads)


@pytest.mark.parametrize("name", WIRED)
def test_clients_of_nbdq_and_of_qemu_nbd_leave_the_same_disk(name: str) -> None:
    variant = next(variant for variant in VARIANTS if variant.name == name)
    _play(variant, seed=SEED, count=60, player=play_over_the_wire)

"""Sets of numbers, judged by numpy's own."""

import random

import numpy as np

from nbdq.qcow2.distinct import distinct, union


def test_sets_are_those_of_numpy() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice = np.random.default_rng(seed)
    for length in (0, 1, 2, 3, 100):
        first, second = (
            dice.integers(0, 1 << 63, length).astype(np.uint64) >> np.uint64(dice.integers(64)) for _ in "ab"
        )
        assert distinct(first).tolist() == np.unique(first).tolist()
        assert union(first, second[:-1]).tolist() == np.union1d(first, second[:-1]).tolist()
        assert distinct(first).dtype == np.uint64

"""Thousands of damaged images: each is refused in one line, or shows the disk that QEMU shows (R-24..R-33, F3, F4).

Every image is opened and read by nbdq in a child process with limits (``reader.py``), and judged against qemu-img
(``referee.py``, ``verdict.py``); a failure says which of *hang*, *traceback*, *memory* and *difference* it is, and how
to make the image again. The figures are printed at the end of the run.

For a longer exploration set ``NBDQ_MUTATIONS`` to the number of images (the default takes about half a minute), and
``NBDQ_SEED`` to any text for others than the usual ones::

    NBDQ_SEED=$RANDOM NBDQ_MUTATIONS=50000 pytest tests/hostile/test_mutations.py
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.hostile.figures import Figures
from tests.hostile.laboratory import Laboratory
from tests.hostile.mutations import mutate
from tests.hostile.seeds import VARIANTS_TO_MUTATE, make_seed
from tests.support.images import Variant
from tests.support.tools import requires

pytestmark = [requires("qemu-img", "qemu-io"), pytest.mark.timeout(0)]  # the laboratory has its own time limits

RANDOM_SEED = os.environ.get("NBDQ_SEED", "nbdq")
TOTAL = int(os.environ.get("NBDQ_MUTATIONS", "800"))
_EACH = -(-TOTAL // len(VARIANTS_TO_MUTATE))
_AT_ONCE = 2


@pytest.fixture(scope="module")
def laboratories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Laboratory]]:
    """As many as work at the same time."""
    found = [Laboratory(tmp_path_factory.mktemp(f"laboratory-{number}")) for number in range(_AT_ONCE)]
    yield found
    for laboratory in found:
        laboratory.close()


@pytest.mark.parametrize("variant", VARIANTS_TO_MUTATE, ids=str)
def test_a_damaged_image_is_refused_in_one_line_or_read_as_qemu_reads_it(
    variant: Variant, laboratories: list[Laboratory], figures: Figures, tmp_path: Path
) -> None:
    seed = make_seed(variant, tmp_path)
    mutations = [mutate(seed, number, random_seed=RANDOM_SEED) for number in range(_EACH)]

    def work(share: int) -> list[str]:
        laboratory = laboratories[share]
        laboratory.take(seed)
        return [text for mutation in mutations[share::_AT_ONCE] for text in laboratory.try_mutation(mutation, figures)]

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        failures = [text for found in pool.map(work, range(_AT_ONCE)) for text in found]
    assert not failures, f"NBDQ_SEED={RANDOM_SEED}\n" + "\n".join(failures)


def test_at_least_half_of_the_damaged_images_still_open(figures: Figures) -> None:
    """Images that die at the header would test nothing else."""
    if figures.tried < TOTAL:
        pytest.skip("judges a whole run")
    assert figures.opened * 2 >= figures.tried, str(figures)
